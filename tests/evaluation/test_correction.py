"""Sign flips and the largest statistic: hand-counted cases, and how often nothing is taken for something."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from interp.evaluation.correction import by_unit, max_t
from probes.samples import ProbeError


def student(d: np.ndarray) -> float:
    return float(d.mean() / (d.std(ddof=1) / len(d) ** 0.5))


def test_against_every_sign_assignment() -> None:
    d = np.array([0.4, 1.1, -0.3, 0.9, 0.7, 1.3, -0.1, 0.5])
    found = max_t({"a": {"x": d}}, n_flips=40_000)["a", "x"]
    assert found.t == pytest.approx(student(d)) and found.difference == d.mean() and found.n == 8
    exact = np.mean([abs(student(d * s)) >= found.t - 1e-9 for s in itertools.product((-1, 1), repeat=8)])
    assert found.p == pytest.approx(exact, abs=0.006)
    assert found.p == found.p_max_t == found.p_bh, "one comparison needs no correction"


def test_correction_grows_with_comparisons_and_keeps_what_is_shared() -> None:
    rng = np.random.default_rng(1)
    effect = rng.normal(0.45, 1, 40)
    alone = max_t({"a": {"x": effect}})["a", "x"]
    copies = max_t({"a": {f"x{k}": effect for k in range(10)}})["a", "x3"]
    assert copies.p_max_t == copies.p == pytest.approx(alone.p, abs=0.01), "ten names of one comparison are one"
    noise = {f"n{k}": rng.normal(size=40) for k in range(10)}
    many = max_t({"a": {"x": effect, **noise}, "b": {"y": rng.normal(size=30)}})
    assert many["a", "x"].p_max_t > 2 * many["a", "x"].p and many["a", "x"].p_bh >= many["a", "x"].p
    assert many["b", "y"].n == 30
    zero = max_t({"a": {"same": np.zeros(12), "always": np.ones(12)}})
    assert zero["a", "same"].p == 1 and zero["a", "always"].p < 0.01


def test_nothing_is_found_where_nothing_is() -> None:
    rng = np.random.default_rng(2)
    wrong = 0
    for run in range(200):
        shared = rng.normal(size=25)
        parts = {
            "a": {f"s{k}": shared + rng.normal(size=25) for k in range(6)},
            "b": {f"s{k}": rng.normal(size=20) for k in range(6)},
        }
        wrong += min(t.p_max_t for t in max_t(parts, n_flips=200, seed=run).values()) <= 0.05
    assert 2 <= wrong <= 20, "5 % of 200 would be 10"


def test_units_are_averaged_and_lengths_checked() -> None:
    assert by_unit(["b", "a", "b"], [1.0, 5.0, 2.0])[0] == ["b", "a"]
    assert by_unit(["b", "a", "b"], [1.0, 5.0, 2.0])[1].tolist() == [1.5, 5.0]
    for parts in ({}, {"a": {}}, {"a": {"x": np.ones(3), "y": np.ones(4)}}, {"a": {"x": np.ones(1)}}):
        with pytest.raises(ProbeError):
            max_t(parts)
