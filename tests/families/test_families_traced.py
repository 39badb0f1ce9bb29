"""Every family: maps equal the eager library's (or an independent recomputation), statistics equal the maps', output unchanged."""

import numpy as np
import pytest
import torch

import interp
from interp.testing import agreement, build, families
from interp.testing.compare import block_sums, errors_of_statistics

TOLERANCE = 1e-5


LIMITS = {
    "entropy": 1e-4, "top_weight": TOLERANCE, "top_key": TOLERANCE, "mass": TOLERANCE, "row_attention": TOLERANCE,
    "received": 1e-4, "pooled": 1e-4, "offset": 1e-3, "group_output": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize("name", families())
def test_family(name):
    specimen = build(name)
    found = agreement(specimen)
    assert found.bit_equal
    assert "layout_problem" not in found.trace.attrs
    assert found.stacks == specimen.expected_stacks
    assert (found.eager is None) == (specimen.eager_maps is None)
    assert found.eager is None or found.eager < TOLERANCE
    assert set(found.statistics) >= set(LIMITS) - {"offset"}
    for statistic, error in found.statistics.items():
        assert error < LIMITS[statistic], statistic


def test_a_wrong_reading_shows():
    data = agreement(build("llama")).trace["text"]
    for name, limit in LIMITS.items():
        wrong = data.copy(deep=True)
        values = wrong[name].values
        values[..., -1] = 0 if name == "top_key" else values[..., -1] + 0.01
        assert errors_of_statistics(wrong)[name] > limit, name
    maps = data["attention"].values.astype(np.float64)
    assert np.allclose(block_sums(maps, (1, 1))[..., 0, 0], maps.sum((-1, -2)))
    with pytest.raises(ValueError, match="blocks must be"):
        block_sums(maps, (5, 1))


SILENT = ("bert", "vit", "deit", "dinov2", "dinov2_registers", "dinov3", "clip", "siglip")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [name for name in families() if name not in SILENT])
def test_generation_is_bit_equal_while_tracing(name, cache):
    specimen = build(name)
    assert specimen.generates

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
