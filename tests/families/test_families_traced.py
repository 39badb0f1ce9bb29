"""Every family: maps equal the eager library's (or an independent recomputation), statistics equal the maps', output unchanged."""

import numpy as np
import pytest
import torch

import interp
from interp.checking import logits
from interp.testing import build, families

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", families())
def test_family(name):
    specimen = build(name)
    module = specimen.module
    wanted = interp.Capture(
        attention=True, row_stats=True, received=True, pooled=4, offset=True, topk=2, rows=[1], group_output=[1], z=True
    )
    with torch.no_grad():
        plain = logits(module(**specimen.inputs))
        with interp.hooked(module) as empty:
            assert torch.equal(plain, logits(module(**specimen.inputs)))
        with interp.hooked(module, capture=wanted) as run:
            assert torch.equal(plain, logits(module(**specimen.inputs)))
        assert torch.equal(plain, logits(module(**specimen.inputs)))
    assert not empty.traces
    trace = run.trace
    assert "layout_problem" not in trace.attrs
    assert {s: (trace[s].sizes["layer"], trace[s].sizes["head"]) for s in trace.stacks} == specimen.expected_stacks
    expected = specimen.eager_maps() if specimen.eager_maps else {}
    for stack in trace.stacks:
        data = trace[stack]
        maps = data["attention"].values
        for layer, known in enumerate(expected.get(stack) or []):
            if known is None:
                assert np.isnan(maps[:, layer]).all()
                continue
            got = maps[:, layer]
            assert np.nanmax(np.abs(got - known.float().numpy())) < TOLERANCE
        _statistics_equal_those_of_the_maps(data, maps)


def _statistics_equal_those_of_the_maps(data, maps):
    there = ~np.isnan(maps).all(-1)
    p = np.nan_to_num(maps.astype(np.float64))
    entropy = -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0.0), -1)
    assert np.abs(data["entropy"].values - entropy)[there].max() < 1e-4
    assert np.abs(data["top_weight"].values - p.max(-1))[there].max() < TOLERANCE
    top = data["top_key"].values
    chosen = np.take_along_axis(p, np.maximum(top, 0)[..., None], -1)[..., 0]
    assert np.abs(chosen - p.max(-1))[there].max() < TOLERANCE
    assert np.abs(data["mass"].values.sum(-1) + data["sink_share"].values - 1.0)[there].max() < TOLERANCE
    received = np.nan_to_num(data["received"].values).sum(3)
    assert np.abs(received - p.sum(3)).max() < 1e-4
    pooled = np.nan_to_num(data["pooled"].values)
    assert np.abs(pooled.sum((-1, -2)) - p.sum((-1, -2))).max() < 1e-3
    if "offset" in data:
        assert np.abs(np.nan_to_num(data["offset"].values).sum(-1) - p.sum((-1, -2))).max() < 1e-3
    row = data["row_attention"].values[..., 0, :]
    place = data["query"].values.tolist().index(1)
    both = there[..., place]
    assert np.abs(row - p[..., place, :])[both].max() < TOLERANCE
    z = data["z"].values[..., place, :]
    parts = data["group_output"].values[..., 0, :, :].sum(-2)
    assert np.abs(z - parts)[both].max() < 1e-4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", families())
def test_generation_is_bit_equal_while_tracing(name, cache):
    specimen = build(name)
    if not specimen.generates:
        pytest.skip(f"{name} does not generate")

    def generate():
        result = specimen.module.generate(
            **specimen.inputs, max_new_tokens=4, do_sample=False, cache_implementation=cache, disable_compile=True,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return result.sequences, torch.stack(result.logits)

    try:
        tokens, plain = generate()
    except RuntimeError as error:
        pytest.skip(f"the plain model cannot generate with a {cache} cache in this transformers: {error}")
    with interp.hooked(specimen.module, capture=interp.Capture(row_stats=True, received=True)) as run:
        again, traced = generate()
    assert torch.equal(tokens, again)
    assert torch.equal(plain, traced)
    phase = run.trace["text"]["phase"].values
    assert (phase == "generated").sum() == 3


@pytest.mark.parametrize("name", families())
def test_check_passes_and_nothing_is_left(name):
    specimen = build(name)
    before = {
        n: m.config._attn_implementation
        for n, m in specimen.module.named_modules()
        if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")
    }
    report = interp.check(specimen.module, specimen.inputs)
    assert report.passed, str(report)
    after = {
        n: m.config._attn_implementation
        for n, m in specimen.module.named_modules()
        if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")
    }
    assert before == after
    assert "generate" not in vars(specimen.module)
    # transformers leaves hooks of its own that gather outputs.
    hooks = [h for m in specimen.module.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [
        h
        for h in hooks
        if "interp" in getattr(h, "__module__", "") or "interp" in type(getattr(h, "__self__", None)).__module__
    ]


@pytest.mark.parametrize(
    "name",
    [n for n in families() if n in ("llama", "gpt2", "gemma2", "mistral", "gpt_oss", "deepseek_v3", "qwen3_next")],
)
def test_left_padding_gives_the_answers_of_single_samples(name):
    specimen = build(name)
    ids = specimen.inputs["input_ids"][:1]
    short = ids[:, : ids.shape[1] - 5]
    pads = ids.shape[1] - short.shape[1]
    batch = torch.cat([ids, torch.cat([torch.zeros(1, pads, dtype=ids.dtype), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :pads] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    capture = interp.Capture(attention=True, row_stats=True, received=True)
    options = {"attention_mask": mask} if name == "qwen3_next" else {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        with interp.hooked(specimen.module, capture=capture) as run:
            specimen.module(input_ids=batch, **options)
        with interp.hooked(specimen.module, capture=capture) as alone:
            specimen.module(input_ids=short)
    both, single = run.trace["text"], alone.trace["text"]
    layers = ~np.isnan(single["entropy"].values[0]).all((1, 2))
    got = both["attention"].values[1][layers][:, :, pads:, pads:]
    assert np.abs(got - single["attention"].values[0][layers]).max() < 1e-4
    assert np.isnan(both["entropy"].values[1][..., :pads]).all()
    assert np.abs(both["entropy"].values[1][layers][:, :, pads:] - single["entropy"].values[0][layers]).max() < 1e-3
    received = both["received"].values[1][layers][:, :, 0, pads:]
    assert np.abs(received - single["received"].values[0][layers][:, :, 0]).max() < 1e-3
    assert both["position_in_sample"].values[1, pads] == 0
