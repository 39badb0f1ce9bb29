"""Linear probes: heads that know, heads that do not, and heads that only memorise."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

from probes.gate import wilson
from probes.linear_probe import LinearProbe
from probes.samples import ProbeError

N = 120
RNG = np.random.default_rng(0)
Y = np.arange(N) % 2


def heads(*features: np.ndarray) -> np.ndarray:
    """``[sample, head, d]`` of ``[sample, d]`` each, padded with zeros."""
    width = max(f.shape[1] for f in features)
    return np.stack([np.pad(f, ((0, 0), (0, width - f.shape[1]))) for f in features], axis=1)


def test_a_head_that_knows_and_one_that_does_not() -> None:
    knows = RNG.normal(size=(N, 3)) * 0.1
    knows[:, 1] += 4 * Y
    noise = RNG.normal(size=(N, 3))
    found = LinearProbe().fit(heads(knows, noise), Y)
    assert found.accuracy[0] == 1 and 0.35 < found.accuracy[1] < 0.65
    assert found.majority == 0.5 and found.n == N and found.classes == (0, 1) and found.correct.shape == (N, 2)
    assert (found.low[0], found.high[0]) == pytest.approx(wilson(N, N)) and found.low[1] < 0.5 < found.high[1]
    # Each sample is its own type: the control is a guess.
    assert (abs(found.control_accuracy - 0.5) < 0.12).all()
    np.testing.assert_allclose(found.selectivity, found.accuracy - found.control_accuracy)
    assert found.n_fits == 2 * 5 * 4 and found.not_converged == 0


def test_selectivity_unmasks_memory() -> None:
    types = np.arange(N) % 12  # the label is a function of the type
    memory = np.eye(12)[types]
    direct = (2.0 * Y - 1)[:, None] + 0.01 * RNG.normal(size=(N, 1))
    found = LinearProbe(controls=5).fit(heads(memory, direct), Y, types=types)
    # Knowing the type is enough for the task and for any other task on types; knowing the label alone is not.
    assert found.accuracy.tolist() == [1, 1]
    assert found.control_accuracy[0] == 1 and found.selectivity[0] == 0
    assert found.control_accuracy[1] < 0.85 and found.selectivity[1] > 0.15


def test_control_labels_belong_to_types() -> None:
    probe, kinds = LinearProbe(), np.array([0, 1, 2, 0, 1, 2, 0, 1])
    draws = [probe._control(np.array([5, 5, 7, 7, 7, 7, 7, 7]), kinds, k) for k in range(200)]
    for labels in draws:
        assert len({(k, v) for k, v in zip(kinds, labels, strict=True)}) == 3
    # Drawn from the frequencies of the labels: 3 of 4 are a 7.
    assert np.mean(np.array(draws)[:, :3] == 7) == pytest.approx(0.75, abs=0.06)


def test_groups_are_never_split() -> None:
    groups = np.arange(N) // 6
    labels = np.random.default_rng(3).permutation(np.arange(20) % 2)[groups]
    own = np.eye(20)[groups]  # a mark of the group: what it says of the label, no other group can say
    apart, mixed = LinearProbe(controls=0).fit(heads(own), labels, groups=groups), LinearProbe().fit(heads(own), labels)
    assert mixed.accuracy[0] == 1 and apart.accuracy[0] < 0.7
    # Resampled by group, the interval is far wider than that of 120 independent samples.
    wide, narrow = apart.high[0] - apart.low[0], np.subtract(*wilson(int(apart.correct.sum()), N)[::-1])
    assert wide > narrow and np.isnan(apart.control_accuracy[0]) and np.isnan(apart.selectivity[0])


def test_layers_and_missing_heads() -> None:
    z = np.zeros((N, 2, 2, 3))
    z[:, 1, 0, 0] = Y
    z[:, 0, 1] = np.nan
    found = LinearProbe(folds=3, controls=1).fit(z, np.where(Y, "yes", "no"))
    assert found.accuracy.shape == (2, 2) == found.correct.shape[1:] and found.classes == ("no", "yes")
    assert found.accuracy[1, 0] == 1 and np.isnan(found.accuracy[0, 1]) and np.isnan(found.low[0, 1])
    assert np.isnan(found.control_accuracy[0, 1]) and not np.isnan(found.accuracy[0, 0])


def test_three_classes_and_constant_controls() -> None:
    y = np.arange(90) % 3
    found = LinearProbe(controls=8).fit(np.eye(3)[y][:, None], y, types=np.zeros(90))
    # One type has one control label: always right, and nothing to fit.
    assert found.accuracy[0] == 1 and found.control_accuracy[0] == 1 and found.n_fits == 5


def test_same_seed_same_result() -> None:
    z = heads(RNG.normal(size=(N, 4)))
    a, b = (LinearProbe().fit(z, Y) for _ in range(2))
    np.testing.assert_array_equal(a.correct, b.correct)
    np.testing.assert_array_equal(a.control_accuracy, b.control_accuracy)


def test_fits_that_do_not_converge_are_counted_not_shouted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LinearProbe(max_iter=1, controls=0).fit(heads(RNG.normal(size=(N, 8))), Y)
    assert found.not_converged == found.n_fits == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"z": np.zeros((N, 3))}, r"z must be \[sample, head, d\] or"),
        ({"z": np.zeros((0, 1, 1)), "labels": []}, "none of them 0"),
        ({"labels": Y[1:]}, r"labels must have one entry a sample, 120, got 119"),
        ({"types": [1]}, "types must have one entry a sample"),
        ({"groups": [1]}, "groups must have one entry a sample"),
        ({"labels": np.zeros(N)}, r"at least two classes, got \[0.0\]"),
        ({"labels": np.arange(N) < 3}, r"at least folds=5 samples each, got 3 of True"),
        ({"groups": np.arange(N) // 30}, r"at least folds=5 groups each, got 4"),
    ],
)
def test_wrong_data(change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"z": np.zeros((N, 1, 2)), "labels": Y, **change}
    with pytest.raises(ProbeError, match=says):
        LinearProbe().fit(given.pop("z"), given.pop("labels"), **given)


def test_a_feature_that_is_not_finite_is_named() -> None:
    z = np.zeros((N, 2, 3, 4))
    z[:, 0, 0] = np.nan
    z[7, 1, 2, 0] = np.inf
    with pytest.raises(ProbeError, match=r"z must be finite, and is not at head \(1, 2\)"):
        LinearProbe().fit(z, Y)


@pytest.mark.parametrize(
    "settings", [{"folds": 1}, {"controls": -1}, {"max_iter": 0}, {"C": 0.0}, {"level": 1.0}], ids=str
)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ProbeError, match=next(iter(settings))):
        LinearProbe(**settings)


def test_without_scikit_learn() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import numpy as np\nfrom probes.linear_probe import LinearProbe\n"
        "LinearProbe().fit(np.zeros((20, 1, 1)), np.arange(20) % 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install headscope[analysis]" in done.stderr
