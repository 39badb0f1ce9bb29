"""DuoAttention's gates, streaming mass, and texts ranked by AttentionInfluence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis import score
from interp.analysis.attention_influence import attention_influence, rank_jsonl, strongest
from interp.analysis.duo_attention import factor
from interp.analysis.running import AnalysisError
from interp.duo_files import read_gates, write_gates
from interp.heads import HeadError
from interp.models.model import Model
from interp.scores import make_score
from interp.testing import build
from probes.key_value import KeyValueTokens

PAIRS = KeyValueTokens(range(10, 50), range(50, 90), n_pairs=(10,), value_length=2, n=2)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build("llama").module


def test_schedule_of_the_learning_rate() -> None:
    assert [factor(s, 2000) for s in (0, 199, 399, 1000, 1600, 1800, 1999)] == [0.1, 0.5, 1, 1, 1, 0.5, 0.1]


def retriever() -> Any:
    """One layer whose KV head 0 attends to keys alike the query, far back, and whose KV head 1 attends evenly to nothing of use."""
    import copy

    module = copy.deepcopy(build("llama").module)
    module.model.layers = module.model.layers[:1]
    module.config.num_hidden_layers = 1
    attention = module.model.layers[0].self_attn
    with torch.no_grad():
        # Heads 2 and 3 (KV head 1) write nothing.
        attention.o_proj.weight[:, 32:] = 0
        attention.o_proj.weight[:, :32] *= 4
    return module


def test_gates_fall_where_streaming_costs_nothing() -> None:
    module = retriever()
    before = [p.requires_grad for p in module.parameters()]
    probe = KeyValueTokens(range(10, 50), range(50, 90), n_pairs=(10,), value_length=2)
    result = score("duo_attention", module, probe, steps=60, lr=0.05, reg=0.05, sink=1, recent=4)
    gate = result.gate.values
    assert gate.shape == (1, 2) and gate[0, 1] < 0.05 and gate[0, 0] > 0.3
    np.testing.assert_array_equal(result.value.values[0], gate[0].repeat(2).astype(np.float32))
    assert result.loss.values[-1] < result.loss.values[0] and result.sizes["step"] == 60
    assert [p.requires_grad for p in module.parameters()] == before
    assert np.isfinite(result.null.values).all()


def test_gradient_of_a_gate_is_that_of_finite_differences(tiny: Any) -> None:
    from interp.analysis.duo_attention import DuoAttention, _Forced

    model = Model(tiny)
    duo = DuoAttention(sink=1, recent=6, reg=0.05)
    sample = _Forced.of(PAIRS.build(tiny)[0], model)
    gates = {n: torch.full((2,), 0.5, requires_grad=True) for n in range(3)}
    duo._loss(model, sample, gates).backward()
    for layer, head in ((0, 1), (2, 0)):
        moved = []
        for step in (1e-2, -1e-2):
            other = {n: g.detach().clone() for n, g in gates.items()}
            other[layer][head] += step
            moved.append(float(duo._loss(model, sample, other).detach()))
        assert gates[layer].grad is not None
        assert gates[layer].grad[head].item() == pytest.approx((moved[0] - moved[1]) / 2e-2, rel=0.02, abs=1e-5)
    ones = {n: torch.ones(2) for n in range(3)}
    assert float(duo._loss(model, sample, ones).detach()) == pytest.approx(0.05, abs=1e-6)


def test_gates_go_through_their_file(tmp_path: Path) -> None:
    result = score("duo_attention", retriever(), PAIRS, steps=3, sink=1, recent=4, with_control=False)
    assert "null" not in result
    write_gates(result.gate.values, tmp_path / "full_attention_heads.tsv")
    np.testing.assert_allclose(read_gates(tmp_path / "full_attention_heads.tsv"), result.gate.values)


@pytest.mark.parametrize(("reg", "lr"), [(5.0, 0.9), (0.0, 0.9)])
def test_gates_do_not_leave_their_range_in_the_last_step(reg: float, lr: float) -> None:
    settings: dict[str, Any] = {"steps": 2, "lr": lr, "reg": reg, "sink": 1, "recent": 4, "with_control": False}
    gate = score("duo_attention", retriever(), PAIRS, **settings).gate.values
    # Adam's first steps are as long as the learning rate, whatever the gradient: unclamped, -0.8 where the penalty leads.
    assert gate.min() >= 0 and gate.max() <= 1 and (reg == 0 or gate.min() == 0)


def test_duo_attention_says_what_it_cannot_use(tiny: Any) -> None:
    with pytest.raises(AnalysisError, match=r"sink \+ recent = 384 must be less than the longest prompt"):
        score("duo_attention", tiny, PAIRS)
    with pytest.raises(AnalysisError, match="answer_ids"):
        score("duo_attention", tiny, [{"input_ids": torch.ones(1, 4)}])
    with pytest.raises(AnalysisError, match="steps and recent"):
        score("duo_attention", tiny, PAIRS, steps=0)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_streaming_mass_equals_that_of_the_full_map(family: str) -> None:
    module = build(family).module
    inputs = {"input_ids": torch.randint(10, 90, (1, 30))}
    with interp.hooked(module, capture=interp.Capture(attention=True)) as run, torch.no_grad():
        module(**inputs)
    a = run.trace["text"]["attention"].values[0]
    i, j = np.indices((30, 30))
    kept = np.where((j < 2) | (i - j < 5), a, 0).sum(-1)[..., 7:]
    result = score("streaming_mass", module, [inputs], sink=2, recent=5)
    np.testing.assert_allclose(result.value.values, kept.mean(-1), rtol=1e-4)
    assert result.null.values[0, 0] == pytest.approx(np.mean(7 / np.arange(8, 31)))
    # The number of keys that a streaming row may see (section 11, 12).
    assert (((j < 2) | (i - j < 5)) & (j <= i)).sum(-1).tolist() == [min(n + 1, 7) for n in range(30)]
    with pytest.raises(AnalysisError, match="more than sink"):
        score("streaming_mass", module, [inputs], sink=20, recent=10)


@pytest.fixture(scope="module")
def stories(shared: Path) -> Any:
    return interp.load(shared / "models/stories260k")


@pytest.mark.real("stories260k")
def test_influence_is_the_loss_of_uniform_rows(stories: Any) -> None:
    text = "Once upon a time there was a little dog. The little dog liked to play with a ball."
    found = attention_influence(stories, [text], "L1H*")[0]
    ids = stories.encode(text)["input_ids"]
    with torch.no_grad():
        plain = stories({"input_ids": ids}, labels=ids).loss.item()
        with interp.hooked(stories, interventions=[interp.MaskHeads("L1H*", kind="uniform")]):
            masked = stories({"input_ids": ids}, labels=ids).loss.item()
    assert found.loss == pytest.approx(plain, rel=1e-4) and found.masked_loss == pytest.approx(masked, rel=1e-4)
    assert found.value == pytest.approx((masked - plain) / plain, rel=1e-3) and found.n_tokens == ids.shape[1] - 1
    with pytest.raises(HeadError):
        attention_influence(stories, [text], "L99H0")
    with pytest.raises(AnalysisError, match="text 2: a text must have at least two tokens"):
        attention_influence(stories, [text, ""], "L1H0")


@pytest.mark.real("stories260k")
def test_a_file_with_bad_lines_is_ranked_and_they_are_named(stories: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "data.jsonl", tmp_path / "ranked.jsonl"
    good = [
        {"text": f"The cat number {n} sat on the mat and looked at the dog.", "kind": "ab"[n % 2]} for n in range(4)
    ]
    lines = [json.dumps(good[0]), "", "{not json", json.dumps(good[1]), json.dumps([1]), json.dumps({"other": "x"}),
             json.dumps(good[2]), json.dumps({"text": "", "kind": "a"}), json.dumps(good[3])]  # fmt: skip
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    ranked = rank_jsonl(stories, path, "L1H0-3,L2H*", out=out, domain="kind", top=0.5)
    assert [n for n, _ in ranked.problems] == [2, 3, 5, 6, 8, 10]
    whys = dict(ranked.problems)
    assert (
        "empty" in whys[2]
        and "no JSON" in whys[3]
        and "object" in whys[5]
        and "'text'" in whys[6]
        and "UTF-8" in whys[10]
    )
    values = [r["attention_influence"] for r in ranked.records]
    assert values == sorted(values, reverse=True) and sorted(r["line"] for r in ranked.records) == [1, 4, 7, 9]
    for kind in "ab":
        assert [r["rank"] for r in ranked.records if r["kind"] == kind] == [1, 2]
        assert [r["selected"] for r in ranked.records if r["kind"] == kind] == [True, False]
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [r["line"] for r in ranked.records]
    (tmp_path / "none.jsonl").write_text("\n{\n")
    with pytest.raises(AnalysisError, match="line 1: the line is empty; line 2: no JSON"):
        rank_jsonl(stories, tmp_path / "none.jsonl", "L1H0")


def test_the_strongest_heads() -> None:
    result = make_score(np.arange(40.0).reshape(4, 10), name="r", unit="u", paper="p")
    assert set(strongest(result)) == set(interp.Heads.parse("L3H8-9"))
    assert len(strongest(result, 0.001)) == 1
    with pytest.raises(AnalysisError, match="share must lie"):
        strongest(result, 0)
    with pytest.raises(AnalysisError, match="no numbers"):
        strongest(make_score(np.full((2, 2), np.nan), name="r", unit="u", paper="p"))
