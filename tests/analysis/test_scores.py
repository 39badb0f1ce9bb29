"""Scores: known answers on hand-made maps, and every score against the full map on a tiny model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.analysis import score, scores
from interp.analysis.diagonals import diagonal_mean
from interp.analysis.retrieval import copied, elsewhere
from interp.analysis.running import AnalysisError
from interp.analysis.sink import above, alpha
from interp.testing import build
from probes.needle import NeedleInHaystack, NeedleSample
from probes.repeated import RepeatedTokens

T = 64


def uniform(length: int) -> np.ndarray:
    return np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]


def shifted(length: int, by: int) -> np.ndarray:
    """Every row looks exactly ``by`` back, at the first key where that is too far."""
    out = np.zeros((length, length))
    out[np.arange(length), np.maximum(np.arange(length) - by, 0)] = 1
    return out


def histogram(a: np.ndarray, rows: range) -> xr.DataArray:
    sums = np.zeros((1, 1, 1, len(a)))
    for i in rows:
        for j in range(i + 1):
            sums[..., i - j] += a[i, j]
    return xr.DataArray(
        sums, dims=("sample", "layer", "head", "offset"), coords={"offset_position": ("offset", np.arange(len(a)))}
    )


def test_gu_alpha_of_uniform_attention() -> None:
    assert alpha(uniform(T))[0] == pytest.approx(sum(1 / i for i in range(1, T + 1)) / T)
    assert alpha(shifted(T, T))[0] == 1 and above(alpha(shifted(T, T)), 0.3)[:2].tolist() == [1, 0]
    np.testing.assert_array_equal(above(np.array([0.3, 0.31, np.nan]), 0.3), [0, 1, np.nan])


def test_diagonals_of_perfect_heads() -> None:
    s = T // 2
    rows = range(s, T)
    assert diagonal_mean(histogram(shifted(T, s - 1), rows), [s - 1], s).item() == 1
    assert diagonal_mean(histogram(shifted(T, s - 1), rows), [s], s).item() == 0
    assert diagonal_mean(histogram(shifted(T, 1), range(1, T)), [1], T - 1).item() == 1
    wanted = sum(1 / i for i in range(2, T + 1)) / (T - 1)
    assert diagonal_mean(histogram(uniform(T), range(1, T)), [1], T - 1).item() == pytest.approx(wanted)


PROMPT = [1, 50, 51, 7, 8, 7, 9, 52, 7]
SPAN = (3, 7)  # 7 8 7 9


@pytest.mark.parametrize(
    ("top_key", "produced", "set_form", "step_form"),
    [
        ([3, 4, 5, 6], [7, 8, 7, 9], 1.0, 1.0),
        ([3, 4, 5, 3], [7, 8, 7, 7], 2 / 3, 1.0),
        ([3, 3, 3, 3, 3], [7, 7, 7, 7, 7], 1 / 3, 1.25),  # the released code passes 1
        ([4, 5, 6, 7], [7, 8, 7, 9], 0.0, 0.0),  # the row of the token that is fed, not of the one produced
        ([8, 4, 2, -1], [7, 8, 7, 9], 1 / 3, 0.25),  # the same token outside the span does not count
        ([3, 4, 5, 20], [7, 8, 9, 9], 2 / 3, 0.5),  # nor a generated key
    ],
)
def test_retrieval_count(top_key: list[int], produced: list[int], set_form: float, step_form: float) -> None:
    keys = np.array(top_key)[None, None]
    assert copied(keys, produced, PROMPT, SPAN, dedupe=True).item() == pytest.approx(set_form)
    assert copied(keys, produced, PROMPT, SPAN, dedupe=False).item() == pytest.approx(step_form)


def test_retrieval_count_of_a_layer_without_heads_is_missing() -> None:
    assert np.isnan(copied(np.full((1, 1, 2), -1), [7, 8], PROMPT, SPAN, dedupe=True)).all()
    with pytest.raises(AnalysisError, match="one id a row, 2, got 1"):
        copied(np.zeros((1, 2)), [7], PROMPT, SPAN, dedupe=True)


def test_control_span_is_elsewhere() -> None:
    for length in range(20, 60):
        start, stop = elsewhere(length, (8, 12), (5, 13))
        assert stop - start == 4 and start >= 1 and stop <= length and (stop <= 5 or start >= 13)
    with pytest.raises(AnalysisError, match="room for a control span of 4"):
        elsewhere(8, (2, 6), (1, 7))


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build("llama").module


REPEATED = RepeatedTokens(n=3, length=12, repeats=3, vocabulary=range(10, 90))


def maps(module: Any, ids: tuple[int, ...]) -> np.ndarray:
    with interp.hooked(module, capture=interp.Capture(attention=True)) as run, torch.no_grad():
        module(input_ids=torch.tensor([ids]))
    return run.trace["text"]["attention"].values[0]


@pytest.mark.parametrize(("name", "back"), [("induction", -1), ("duplicate_token", 0)])
def test_diagonal_scores_equal_those_of_the_full_map(tiny: Any, name: str, back: int) -> None:
    result = score(name, tiny, REPEATED)
    for variable, which in (("value_by_sample", "ids"), ("null_by_sample", "control_ids")):
        for n, sample in enumerate(REPEATED.build(tiny)):
            a = maps(tiny, getattr(sample, which))
            rows = np.array(sample.last_copy)
            wanted = sum(a[:, :, rows, rows - c * 12 - back] for c in (1, 2)).mean(-1)
            np.testing.assert_allclose(result[variable].values[n], wanted, atol=1e-6)


def test_previous_token_equals_that_of_the_full_map(tiny: Any) -> None:
    result = score("previous_token", tiny, REPEATED)
    for n, sample in enumerate(REPEATED.build(tiny)):
        a = maps(tiny, sample.ids)
        for variable, back in (("value_by_sample", 1), ("null_by_sample", 2)):
            rows = np.arange(sample.start + back, len(sample.ids))
            np.testing.assert_allclose(result[variable].values[n], a[:, :, rows, rows - back].mean(-1), atol=1e-6)


def test_sink_equals_that_of_the_full_map(tiny: Any) -> None:
    inputs = [{"input_ids": torch.randint(10, 90, (1, 40))} for _ in range(3)]
    mass = score("sink", tiny, inputs, length=32, measure="mass")
    share = score("sink", tiny, inputs, length=32, epsilon=0.1)
    for n, sample in enumerate(inputs):
        wanted = alpha(maps(tiny, tuple(sample["input_ids"][0, :32].tolist())))
        np.testing.assert_allclose(mass.value_by_sample.values[n], wanted[..., 0], atol=1e-6)
        np.testing.assert_allclose(mass.null_by_sample.values[n], wanted[..., 16], atol=1e-6)
        np.testing.assert_array_equal(share.value_by_sample.values[n], wanted[..., 0] > 0.1)
    assert 0 < share.value.values.mean() < 1


@pytest.mark.parametrize("normalise", [False, True])
def test_entropy_equals_that_of_the_full_map(tiny: Any, normalise: bool) -> None:
    ids = torch.randint(10, 90, (2, 20))
    ids[1, :6] = 0
    padded = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    result = score("entropy", tiny, [padded], normalise=normalise)
    for n, row in enumerate((ids[0], ids[1, 6:])):
        a = maps(tiny, tuple(row.tolist())).astype(float)
        h = -np.where(a > 0, a * np.log(np.maximum(a, 1e-300)), 0).sum(-1)
        if normalise:
            h = h[..., 1:] / np.log(np.arange(2, len(row) + 1))
        np.testing.assert_allclose(result.value_by_sample.values[n], h.mean(-1), atol=1e-4)
    assert "null" in result and np.isfinite(result.null.values).all()


def test_entropy_and_sink_of_a_vision_stack() -> None:
    specimen = build("vit")
    stack = next(iter(specimen.expected_stacks))
    for name in ("entropy", "sink"):
        result = score(name, specimen.module, [specimen.inputs], stack=stack)
        assert (result.sizes["layer"], result.sizes["head"]) == specimen.expected_stacks[stack]
        assert np.isfinite(result.value.values).all() and result.attrs["stack"] == stack
        with pytest.raises(AnalysisError, match="probe must be given"):
            score(name, specimen.module, stack=stack)


def test_scores_of_text_refuse_other_models(tiny: Any) -> None:
    vit = build("vit").module
    with pytest.raises(AnalysisError, match=r"stack must be one of .* got 'text'"):
        score("induction", vit, REPEATED)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        score("entropy", tiny)
    with pytest.raises(AnalysisError, match="name must be one of"):
        score("inducton", tiny)
    with pytest.raises(AnalysisError, match=r"settings of 'sink' must be among .* got \['eps'\]"):
        score("sink", tiny, eps=1)
    with pytest.raises(AnalysisError, match=r"eval\(\)"):
        score("induction", tiny.train(), REPEATED)
    tiny.eval()
    with pytest.raises(AnalysisError, match="length=64 unpadded tokens, got 9"):
        score("sink", tiny, [{"input_ids": torch.ones(1, 9, dtype=torch.int64)}])


def test_scores_lists_what_score_runs() -> None:
    listed = scores()
    assert {"entropy", "sink", "previous_token", "duplicate_token", "induction", "retrieval"} <= {
        s.name for s in listed
    }
    assert all(s.summary and "https://" in s.paper and s.unit and s.stacks and s.probe for s in listed)


@pytest.fixture(scope="module")
def stories(shared: Path) -> Any:
    return interp.load(shared / "models/stories260k")


class Copies(NeedleInHaystack):
    """Samples whose "needle" is what the model will write: then generated and forced runs have the same rows."""

    def build(self, model_or_tokenizer: Any) -> list[NeedleSample]:
        model = model_or_tokenizer
        inputs = model.encode("Once upon a time there was a little girl named Lily. She loved to play outside. One day")
        prompt = inputs["input_ids"][0].tolist()
        written = model.generate(inputs, max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
        # Any prompt positions that hold the tokens that will be written make a needle.
        span = (5, 9)
        return [NeedleSample(tuple(prompt), answer="x", needle_span=span, answer_span=span, answer_ids=tuple(written))]

    def judge(self, sample: NeedleSample, generated: str) -> bool:
        return True


@pytest.mark.real("stories260k")
def test_generated_and_forced_rows_are_the_same(stories: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("interp.analysis.retrieval.copied", lambda *a, **k: seen.append(a) or copied(*a, **k))
    score("retrieval", stories, Copies(), mode="generate", max_new_tokens=4)
    score("retrieval", stories, Copies(), mode="teacher_forced")
    generated, forced = seen[0], seen[2]
    assert generated[1] == forced[1] and len(generated[1]) == 4
    np.testing.assert_array_equal(generated[0].values, forced[0].values)


@pytest.mark.real("stories260k")
@pytest.mark.parametrize("name", ["entropy", "sink", "previous_token", "duplicate_token", "induction", "retrieval"])
def test_scores_run_end_to_end(stories: Any, name: str) -> None:
    probe = NeedleInHaystack(lengths=(160,), depths=(0.0, 1.0)) if name == "retrieval" else None
    settings = {"gate": False, "max_new_tokens": 6} if name == "retrieval" else {}
    result = score(name, stories, probe, **settings)
    assert dict(result.value.sizes) == {"layer": 5, "head": 8}
    for variable in ("value", "se", "null"):
        assert np.isfinite(result[variable].values).all(), variable
    assert result.attrs["settings"]["control"] and result.attrs["name"] == name


@pytest.mark.real("stories260k")
def test_a_model_that_fails_has_no_retrieval_score(stories: Any) -> None:
    probe = NeedleInHaystack(lengths=(160,), depths=(0.0,))
    with pytest.warns(UserWarning, match=r"no sample passed the gate: the model solved 0 of 1"):
        result = score("retrieval", stories, probe, max_new_tokens=4)
    assert np.isnan(result.value.values).all() and (result.n.values == 0).all()
    with pytest.raises(AnalysisError, match="gate must not be True"):
        score("retrieval", stories, probe, mode="teacher_forced", gate=True)
    with pytest.raises(AnalysisError, match="pass gate=False"):
        score("retrieval", stories, probe.build(stories))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score("retrieval", stories, probe.build(stories), mode="teacher_forced")
