"""Scores of retrieval and copying: by hand, and against the full map and the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis import score
from interp.analysis.activation_frequency import by_context
from interp.analysis.needle_contribution import contributions
from interp.analysis.projections import LogitDirections, require_plain_heads
from interp.analysis.query_mass import question_rows
from interp.analysis.retrieval import elsewhere
from interp.analysis.running import AnalysisError
from interp.models.model import Model
from interp.scores import make_score
from interp.testing import build
from probes.key_value import KeyValueTokens
from probes.needle import NeedleInHaystack
from probes.repeated import RepeatedTokens

PAIRS = KeyValueTokens(range(10, 50), range(50, 90), n_pairs=(6,), value_length=2, n=2)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build("llama").module


def maps(module: Any, ids: tuple[int, ...]) -> np.ndarray:
    with interp.hooked(module, capture=interp.Capture(attention=True, stacks=("text",))) as run, torch.no_grad():
        module(input_ids=torch.tensor([ids]))
    return run.trace["text"]["attention"].values[0]


def test_query_mass_equals_that_of_the_full_map(tiny: Any) -> None:
    result = score("query_mass", tiny, PAIRS)
    for n, sample in enumerate(PAIRS.build(tiny)):
        rows = maps(tiny, sample.ids)[:, :, slice(*sample.query_span)]
        control = elsewhere(len(sample.ids), sample.needle_span, sample.needle_span)
        np.testing.assert_allclose(
            result.value_by_sample.values[n], rows[..., slice(*sample.needle_span)].sum(-1).mean(-1), atol=1e-6
        )
        np.testing.assert_allclose(
            result.null_by_sample.values[n], rows[..., slice(*control)].sum(-1).mean(-1), atol=1e-6
        )
    last = score("query_mass", tiny, PAIRS, rows="last")
    wanted = maps(tiny, sample.ids)[:, :, -1, slice(*sample.needle_span)].sum(-1)
    np.testing.assert_allclose(last.value_by_sample.values[n], wanted, atol=1e-6)


@pytest.mark.real("stories260k")
def test_question_rows_are_those_of_the_question(shared: Path) -> None:
    model = interp.load(shared / "models/stories260k")
    sample = NeedleInHaystack(lengths=(160,), depths=(0.5,)).build(model)[0]
    rows = question_rows(sample, model)
    assert model.decode(sample.ids[rows.start : rows.stop]).strip() == sample.question
    with pytest.raises(AnalysisError, match="question must stand behind"):
        question_rows(type(sample)(sample.ids, needle_span=sample.needle_span), model)


def test_skipping_the_first_key_takes_the_next_best(tiny: Any) -> None:
    forced = {"mode": "teacher_forced", "skip_first": True}
    result = score("retrieval", tiny, PAIRS, **forced)
    sample = PAIRS.build(tiny)[0]
    a = maps(tiny, (*sample.ids, *sample.answer_ids))[:, :, len(sample.ids) - 1 : len(sample.ids) + 1].copy()
    a[..., 0] = -1
    ids = np.array([*sample.ids, *sample.answer_ids])
    start, stop = sample.answer_span
    top = a.argmax(-1)
    hit = (top >= start) & (top < stop) & (ids[top] == np.array(sample.answer_ids))
    np.testing.assert_allclose(result.value_by_sample.values[0], hit.mean(-1))


def test_success_and_rate_stand_beside_every_sample(tiny: Any) -> None:
    model = Model(tiny)
    answers = iter([True, False] * 10)

    class Sometimes(KeyValueTokens):
        def judge(self, sample: Any, generated: Any) -> bool:
            return next(answers)

    model.decode = lambda *a, **k: "x"  # type: ignore[method-assign]
    probe = Sometimes(range(10, 50), n_pairs=(6,), n=2, positions=(0.0, 1.0))
    free = score("retrieval", model, probe, gate=False, max_new_tokens=2)
    assert free.solved.values.tolist() == [True, False, True, False] and free.attrs["settings"]["gate_rate"] == 0.5
    assert (free.n.values == 4).all()
    gated = score("retrieval", model, probe, max_new_tokens=2)
    assert (gated.n.values == 2).all() and np.isnan(gated.value_by_sample.values[1]).all()
    assert free.length.values.tolist() == [len(s.ids) for s in probe.build(model)]


def test_contexts_by_hand() -> None:
    # Head 0 always copies, head 1 only in long prompts, head 2 never; one long sample failed.
    samples = np.array([[[0.5, 0, 0]], [[1.0, 0, 0]], [[0.5, 0.5, 0]], [[np.nan] * 3]])
    result = make_score(samples, name="r", unit="u", paper="p").assign_coords(length=("sample", [64, 64, 128, 128]))
    found = by_context(result)
    assert found.context.values.tolist() == [64, 128] and found.n.values.tolist() == [2, 1]
    np.testing.assert_allclose(found.frequency.values[:, 0], [[1, 0, 0], [1, 1, 0]])
    np.testing.assert_allclose(found.value.values[:, 0], [[0.75, 0, 0], [0.5, 0.5, 0]])
    assert found.dynamic.item() == 0.5  # of two active heads, one only sometimes
    np.testing.assert_allclose(np.diag(found.agreement.values), 1)
    with pytest.raises(AnalysisError, match=r"one of \['length'\], got 'depth'"):
        by_context(result, "depth")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3_text", "qwen3"])
def test_contributions_add_up_to_what_attention_writes_on_the_logit(family: str) -> None:
    specimen = build(family)
    model = Model(specimen.module)
    ids = specimen.inputs["input_ids"]
    inputs = {"input_ids": ids}
    rows, tokens = [5, 9, ids.shape[1] - 1], [20, 30, 40]
    with interp.hooked(model, capture=interp.Capture(group_output=rows, stacks=("text",))) as run, torch.no_grad():
        specimen.module(**inputs)
    found = contributions(model, inputs, run.trace["text"]["group_output"], tokens, rows, "test")
    sites = require_plain_heads(model, inputs, "text", "test")
    directions = LogitDirections(model, inputs, sites, "test")
    written: dict[int, torch.Tensor] = {}
    entering: list[torch.Tensor] = []
    handles = []
    for site in sites:
        projection = specimen.module.get_submodule(f"{site.name}.{site.out_proj}")
        bias = getattr(projection, "bias", None)

        def keep(module: Any, args: Any, output: Any, layer: int = site.layer, bias: Any = bias) -> None:
            written[layer] = output - (0 if bias is None else bias)

        handles.append(projection.register_forward_hook(keep))
    head = specimen.module.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda _, a: entering.append(a[0])))
    with torch.no_grad():
        specimen.module(**inputs)
    for handle in handles:
        handle.remove()
    u = directions.unembedding.float()
    wanted = (u[tokens] - u.mean(0))[:, None]
    for site in sites:
        d = directions.of(rows, wanted, site.layer)[:, 0]
        expected = (written[site.layer][0, rows] * d).sum(-1)
        got = found.sel(layer=site.layer).sum(["head", "group"]).values[0]
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-5)
    # The stream itself, through the frozen norm, is the logit (less a LayerNorm's bias).
    norm = [m for m in specimen.module.modules() if "Norm" in type(m).__name__ and not list(m.children())]
    seen: dict[str, torch.Tensor] = {}
    final = [m.register_forward_hook(lambda _, a, o: seen.update(x=a[0], y=o)) for m in norm]
    with torch.no_grad():
        specimen.module(**inputs)
    for handle in final:
        handle.remove()
    directions.after = {}
    d = directions.of(rows, u[tokens][:, None], 0)[:, 0]
    x, y = seen["x"][0, rows], seen["y"][0, rows]
    shift = next((m.bias for m in norm if isinstance(m, torch.nn.LayerNorm)), None)
    expected = ((y - (0 if shift is None else specimen.module.transformer.ln_f.bias)) * u[tokens]).sum(-1)
    np.testing.assert_allclose((x * d).sum(-1).detach().numpy(), expected.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_needle_contribution_is_that_of_its_span(tiny: Any) -> None:
    result = score("needle_contribution", tiny, PAIRS)
    contrast = score("needle_contribution", tiny, PAIRS, contrast=True)
    assert np.isfinite(result.value.values).all() and np.abs(result.value.values - contrast.value.values).max() > 1e-4
    sample = PAIRS.build(tiny)[0]
    span, answer = sample.answer_span, sample.answer_ids
    # The last layer by hand: weights, values and the two projections, through the final norm of the run.
    ids = torch.tensor([[*sample.ids, answer[0]]])
    stream: list[torch.Tensor] = []
    kept = [
        tiny.model.norm.register_forward_hook(lambda _, a, o: stream.append(a[0])),
        tiny.model.layers[2].self_attn.v_proj.register_forward_hook(lambda _, a, o: stream.append(o)),
    ]
    a = maps(tiny, tuple(ids[0].tolist()))[2]
    for handle in kept:
        handle.remove()
    v, x = stream
    v = v[0].reshape(ids.shape[1], 2, 16).repeat_interleave(2, 1).detach()
    rows = [len(sample.ids) - 1, len(sample.ids)]
    u = tiny.lm_head.weight.detach()
    direction = tiny.model.norm.weight.detach() * (u[list(answer)] - u.mean(0))
    direction = direction / (x[0, rows].square().mean(-1, keepdim=True) + tiny.config.rms_norm_eps).sqrt().detach()
    w_o = tiny.model.layers[2].self_attn.o_proj.weight.detach().T.reshape(4, 16, -1)
    part = torch.einsum("hrj,jhv->rhv", torch.from_numpy(a[:, rows, slice(*span)]), v[slice(*span)])
    wanted = torch.einsum("rhv,hvd,rd->rh", part, w_o, direction).mean(0)
    np.testing.assert_allclose(result.value_by_sample.values[0, 2], wanted.numpy(), rtol=1e-3, atol=1e-5)
    with pytest.raises(AnalysisError, match="needs samples of NeedleInHaystack"):
        score("needle_contribution", tiny, [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}])


def test_prefix_matching_equals_that_of_the_full_map(tiny: Any) -> None:
    probe = RepeatedTokens(n=2, length=7, repeats=4, vocabulary=range(10, 90))
    result = score("prefix_matching", tiny, probe)
    summed = score("induction", tiny, probe)
    assert not np.allclose(result.value, summed.value)
    for n, sample in enumerate(probe.build(tiny)):
        for variable, ids in (("value_by_sample", sample.ids), ("null_by_sample", sample.control_ids)):
            a = maps(tiny, ids)
            entries = [
                a[:, :, row, row - c * 7 + 1]
                for row in range(sample.start + 7, len(ids))
                for c in range(1, (row - sample.start) // 7 + 1)
            ]
            np.testing.assert_allclose(result[variable].values[n], np.mean(entries, axis=0), atol=1e-6)


def test_a_head_that_splits_its_weight_scores_a_half_and_one() -> None:
    from interp.analysis.diagonals import PrefixMatching  # noqa: F401 - the two forms, on one perfect map

    length, repeats = 5, 4
    total = length * repeats
    a = np.zeros((total, total))
    for row in range(length, total):
        earlier = [row - c * length + 1 for c in range(1, row // length + 1)]
        a[row, earlier] = 1 / len(earlier)
    entries = [a[row, row - c * length + 1] for row in range(length, total) for c in range(1, row // length + 1)]
    summed = [sum(a[row, row - c * length + 1] for c in range(1, row // length + 1)) for row in range(length, total)]
    assert np.mean(entries) == pytest.approx(0.5) and np.mean(summed) == pytest.approx(1)


def test_copying_of_heads_that_copy_and_that_do_not(tiny: Any) -> None:
    import copy

    module = copy.deepcopy(tiny)
    # Values are the embedding, the output is its unembedding: head 0 of layer 0 copies what it looks at.
    layer = module.model.layers[0].self_attn
    d, dim = module.config.hidden_size, module.config.head_dim
    basis = torch.linalg.qr(torch.randn(d, dim)).Q
    u = torch.randn(module.config.vocab_size, dim) @ basis.T
    with torch.no_grad():
        module.model.embed_tokens.weight.copy_(u)
        module.lm_head.weight.copy_(u)
        layer.v_proj.weight[:dim] = basis.T
        layer.o_proj.weight.zero_()
        layer.o_proj.weight[:, :dim] = basis
        layer.o_proj.weight[:, dim : 2 * dim] = -basis
    probe = RepeatedTokens(n=4, length=12, vocabulary=range(10, 90))
    result = score("copying", module, probe, attended="weighted")
    assert result.value.values[0, 0] > 3 * max(result.value.values[0, 1], result.null.values[0, 0])
    mapped = score("copying", module, probe, attended="weighted", scale="4r-1")
    np.testing.assert_allclose(mapped.value_by_sample.values, 4 * result.value_by_sample.values - 1)
    assert score("ov_copying", module).value.values[0, 0] > 0.9
    assert score("ov_copying", module).value.values[0, 1] < -0.9


@pytest.mark.real("stories260k")
@pytest.mark.parametrize(
    "name",
    [
        "activation_frequency",
        "query_mass",
        "needle_contribution",
        "prefix_matching",
        "copying",
        "ov_copying",
        "qk_matching",
    ],
)
def test_they_run_on_real_weights(shared: Path, name: str) -> None:
    model = interp.load(shared / "models/stories260k")
    needles = {"activation_frequency", "query_mass", "needle_contribution"}
    probe = NeedleInHaystack(lengths=(160,), depths=(0.0, 1.0)) if name in needles else None
    settings = {"gate": False, "max_new_tokens": 4} if name == "activation_frequency" else {}
    result = score(name, model, probe, **settings)
    assert np.isfinite(result.value.values).all() and np.isfinite(result.null.values).all()
    assert result.attrs["settings"]["control"]
