"""The head detector's known answers, and the scores on every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis import score
from interp.analysis.head_detector import detection_pattern, head_detector, likeness
from interp.analysis.running import AnalysisError
from interp.testing import build
from probes.key_value import KeyValueTokens
from probes.repeated import RepeatedTokens

T = 16


def test_known_answers() -> None:
    previous = detection_pattern("previous_token", list(range(T)))
    shift = previous.copy()
    shift[0, 0] = 1
    assert likeness(shift, previous, "mul") == pytest.approx((T - 1) / T)
    assert likeness(shift, previous, "abs") == pytest.approx(1 - 1 / T)
    uniform = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    assert likeness(uniform, previous, "mul") == pytest.approx(sum(1 / i for i in range(2, T + 1)) / T)
    ids = list(range(T // 2)) * 2
    induction = detection_pattern("induction", ids)
    # A perfect induction head on [x; x]: rows with a pattern / T.
    exact = np.where(induction.any(1, keepdims=True), induction, np.eye(T))
    assert likeness(exact, induction, "mul") == pytest.approx(induction.any(1).sum() / T)
    assert induction[T // 2, 1] == 1 and detection_pattern("duplicate_token", ids)[T // 2, 0] == 1


def test_options_leave_the_map_alone() -> None:
    a = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    before = a.copy()
    d = detection_pattern("previous_token", [1, 2, 3, 4])
    without = likeness(a, d, "mul", exclude_first=True, exclude_current=True)
    np.testing.assert_array_equal(a, before)
    # Left: (2,1) (3,1) (3,2), of which (2,1) and (3,2) count.
    assert without == pytest.approx((1 / 3 + 1 / 4) / (1 / 3 + 2 / 4))
    assert np.isnan(likeness(np.eye(4)[None], d, "mul", exclude_current=True))[0]


def test_it_reads_the_models_maps() -> None:
    module = build("llama").module
    ids = torch.tensor([[20, 21, 22, 20, 21, 22]])
    with interp.hooked(module, capture=interp.Capture(attention=True)) as run, torch.no_grad():
        module(input_ids=ids)
    a = run.trace["text"]["attention"].values[0]
    got = head_detector(module, {"input_ids": ids}, "induction")
    wanted = (a[..., 3, 1] + a[..., 4, 2] + a[..., 5, 3]) / 6
    np.testing.assert_allclose(got.values, wanted, rtol=1e-5)
    for pattern, match in (
        ("x", "pattern must be one of"),
        (np.ones((6, 6)), "lower triangular"),
        (np.eye(3), "lower triangular"),
    ):
        with pytest.raises(AnalysisError, match=match):
            head_detector(module, {"input_ids": ids}, pattern)  # type: ignore[arg-type]


PAIRS = KeyValueTokens(range(10, 50), range(50, 90), n_pairs=(8,))
REPEATED = RepeatedTokens(n=1, length=8, repeats=2, vocabulary=range(10, 90))
SETTINGS: dict[str, dict[str, Any]] = {
    "elasticity": {"lengths": (8, 12, 16), "rows": 4}, "streaming_mass": {"sink": 1, "recent": 4}, "sink": {"length": 12},
    "duo_attention": {"steps": 2, "sink": 1, "recent": 4}, "retrieval": {"mode": "teacher_forced"},
}  # fmt: skip
TEXT = [
    "entropy", "sink", "effective_keys", "top_k_mass", "selection_margin", "attention_distance", "elasticity", "redundancy",
    "previous_token", "duplicate_token", "induction", "prefix_matching", "copying", "ov_copying", "qk_matching", "retrieval",
    "needle_contribution", "duo_attention", "streaming_mass", "query_mass",
]  # fmt: skip
NEEDLES = {"retrieval", "needle_contribution", "duo_attention", "query_mass"}
DIAGONALS = {"previous_token", "duplicate_token", "induction", "prefix_matching", "copying"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["mistral", "qwen3", "gemma2", "gpt2", "gpt_neox", "gpt_oss", "deepseek_v3", "qwen3_next", "lfm2"]
)
def test_every_score_of_text_runs_or_refuses_on_every_family(family: str) -> None:
    module = build(family).module
    refused: list[str] = []
    for name in TEXT:
        probe: Any = [{"input_ids": torch.randint(10, 90, (1, 20))}]
        if name in NEEDLES | DIAGONALS:
            probe = PAIRS if name in NEEDLES else REPEATED
        probe = None if name in ("ov_copying", "qk_matching") else probe
        try:
            result = score(name, module, probe, **SETTINGS.get(name, {}))
        except AnalysisError as error:
            refused.append(f"{name}: {error}")
            continue
        there = ~np.isnan(result.value.values)
        assert there.any(), name
        # Layers without softmax heads are missing in every score alike.
        assert there.any(1).sum() == len(interp.anatomy(module).stacks["text"]), name
    known = {"qwen3_next": 5, "deepseek_v3": 2, "lfm2": 0}
    assert len(refused) <= known.get(family, 0), refused
