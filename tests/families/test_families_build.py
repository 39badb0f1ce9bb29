"""The tiny models of interp.testing are what they say, and two independent computations of their maps agree."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from interp.testing import (
    Specimen,
    assert_within_error_budget,
    build,
    families,
    independent_maps,
    recompute,
)
from interp.testing.specimen import configs

TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


REACHED = families()
UNREACHED = families(reached=False)


@pytest.fixture(scope="module", params=REACHED + UNREACHED)
def any_family(request: pytest.FixtureRequest) -> Specimen:
    return build(request.param)


@pytest.fixture(scope="module", params=REACHED)
def s(request: pytest.FixtureRequest) -> Specimen:
    return build(request.param)


@pytest.fixture(scope="module", params=UNREACHED)
def unreached(request: pytest.FixtureRequest) -> Specimen:
    return build(request.param)


def logits(output) -> Tensor:
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if output.get(name) is not None:
            return output[name]
    raise AssertionError(f"no tensor to look at in {list(output)}")


def real_rows(inputs: dict, stack: str, m: Tensor) -> Tensor:
    """bool [batch, query]: the rows of real tokens (eager puts mass on pads where a row is fully masked)."""
    mask = inputs.get("attention_mask")
    rows_are_decoders = "decoder_input_ids" in inputs and stack != "encoder"
    if mask is not None and not rows_are_decoders and m.shape[::2] == mask.shape:
        return mask.bool()
    return torch.ones(m.shape[0], m.shape[2], dtype=torch.bool)


def test_runs_single_padded_and_generates(any_family):
    s = any_family
    assert not s.module.training
    with torch.no_grad():
        assert torch.isfinite(logits(s.module(**s.inputs))).all()
        if s.batch is not None:
            out = logits(s.module(**s.batch))
            keep = s.batch.get("attention_mask")
            if keep is not None and keep.shape == out.shape[:2]:
                out = out[keep.bool()]
            assert torch.isfinite(out).all()
        if s.generates:
            generated = s.module.generate(**s.inputs, max_new_tokens=3, do_sample=False)
            fed = s.inputs.get("decoder_input_ids", s.inputs.get("input_ids"))
            # Whisper's generate strips the prompt it was given.
            assert generated.shape[1] in (3, fed.shape[1] + 3, fed.shape[1] + 4)


def test_every_expected_site_is_visited_and_no_other(s):
    maps = independent_maps(s.module, s.inputs)
    expected = [path for stack in s.stacks.values() for path in stack.sites if path is not None]
    assert len(expected) == len(set(expected))
    assert set(maps) == set(expected)
    for stack_name, stack in s.stacks.items():
        assert s.expected_stacks[stack_name] == (len(stack.sites), stack.n_heads)
        for path in stack.sites:
            for m in maps.get(path, []) if path else []:
                assert m.shape[1] == stack.n_heads, f"{stack_name} {path}"


@pytest.mark.parametrize("which", ["inputs", "batch"])
def test_independent_maps_equal_the_librarys_eager_maps(s, which):
    inputs = getattr(s, which)
    if inputs is None:
        pytest.skip(f"{s.name} has no {which}")
    assert s.eager_maps is not None
    eager = s.eager_maps(inputs)
    mine = independent_maps(s.module, inputs)
    for stack_name, maps in eager.items():
        stack = s.stacks[stack_name]
        assert len(maps) == stack.shape[0]
        for layer, (path, library) in enumerate(zip(stack.sites, maps, strict=True)):
            assert (path is None) == (library is None), f"{stack_name} layer {layer}"
            if path is None:
                continue
            (ours,) = mine[path]
            assert ours.shape == library.shape
            rows = real_rows(inputs, stack_name, ours)
            error = (ours - library.double()).abs().amax(dim=(1, 3))[rows].max().item()
            assert error <= TOLERANCE, f"{stack_name} layer {layer}: {error:.2e}"


def test_the_oracle_gives_the_plain_models_output(s):
    with torch.no_grad():
        plain = logits(s.module(**s.inputs))
    again = logits(recompute(s.module, s.inputs).result)
    assert (plain - again).abs().max() <= 2e-5 * plain.abs().max()


def test_attention_is_far_from_uniform(s):
    for path, calls in independent_maps(s.module, s.inputs).items():
        for m in calls:
            visible = (m > 0).sum(-1)
            times_uniform = (m.amax(-1) * visible)[visible > 3]
            assert times_uniform.mean() > 1.7, path


def test_the_model_is_as_before(any_family):
    s = any_family
    before = [c._attn_implementation for c in configs(s.module)]
    with torch.no_grad():
        first = logits(s.module(**s.inputs))
    if s.eager_maps is not None:
        s.eager_maps()
    recompute(s.module, s.inputs)
    assert [c._attn_implementation for c in configs(s.module)] == before
    with torch.no_grad():
        assert torch.equal(first, logits(s.module(**s.inputs)))


def test_unreached_families_never_enter_the_interface(unreached):
    s = unreached
    assert s.stacks == {} and s.eager_maps is None
    assert independent_maps(s.module, s.inputs) == {}


def test_unreached_classes_are_there(any_family):
    s = any_family
    assert set(s.unreached) <= {type(m).__name__ for m in s.module.modules()}


def test_same_seed_same_model_and_bfloat16_runs(any_family):
    s = any_family
    twin = build(s.name, dtype=torch.bfloat16)
    theirs = dict(twin.module.named_parameters())
    for key, parameter in s.module.named_parameters():
        assert torch.equal(parameter.to(torch.bfloat16), theirs[key]), key
    assert set(s.inputs) == set(twin.inputs)
    with torch.no_grad():
        assert torch.isfinite(logits(twin.module(**twin.inputs))).all()


def test_another_seed_is_another_model():
    one, other = build("llama"), build("llama", seed=1)
    assert not torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
    drawn = [(a, b) for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True)]
    assert not any(torch.equal(a, b) for a, b in drawn)


def test_building_does_not_touch_the_global_random_state():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build("llama", seed=7)
    assert torch.equal(torch.rand(2), expected)


def _maps_differ(name: str, change) -> float:
    s = build(name)
    before = independent_maps(s.module, s.inputs)
    twin = copy.deepcopy(s.module)
    with torch.no_grad():
        change(twin)
    after = independent_maps(twin, s.inputs)
    return max((before[path][0] - after[path][0]).abs().max().item() for path in before)


def _no_softcap(module):
    for m in module.modules():
        if hasattr(m, "attn_logit_softcapping"):
            m.attn_logit_softcapping = None


def _no_window(module):
    module.config.sliding_window = None


def _no_sinks(module):
    for key, parameter in module.named_parameters():
        if key.endswith("sinks"):
            parameter.fill_(-1e4)


def _no_position_bias(module):
    for key, parameter in module.named_parameters():
        if "relative_attention_bias" in key:
            parameter.zero_()


@pytest.mark.parametrize(
    ("name", "change"),
    [("gemma2", _no_softcap), ("mistral", _no_window), ("gpt_oss", _no_sinks), ("t5", _no_position_bias)],
)
def test_what_makes_a_family_special_moves_its_maps(name, change):
    assert _maps_differ(name, change) > 0.05


def test_special_shapes():
    sinks = independent_maps(build("gpt_oss").module, build("gpt_oss").inputs)
    assert all((m[0].sum(-1) < 0.999).any() for m in sinks.values())
    mla = build("deepseek_v3")
    run = recompute(mla.module, mla.inputs)
    assert {z[0].shape[-1] for z in run.z.values()} == {12}
    qwen = build("qwen2_5_vl")
    calls = {p: len(m) for p, m in independent_maps(qwen.module, qwen.inputs).items() if "visual" in p}
    assert sorted(calls.values()) == [2, 2, 6, 6]
    tiles = build("llava_onevision")
    assert (
        independent_maps(tiles.module, tiles.inputs)["model.vision_tower.encoder.layers.0.self_attn"][0].shape[0] == 3
    )
    image = build("gemma3")
    types = image.inputs["token_type_ids"][0].bool()
    first = int(types.nonzero()[0])
    m = independent_maps(image.module, image.inputs)["model.language_model.layers.0.self_attn"][0]
    assert (m[0, :, first, first + 1 : first + 4] > 0).all(), "image positions see later ones of their image"
    assert (m[0, :, first - 1, first:] == 0).all()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of"):
        build("no such model")


def test_error_budget():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(torch.bfloat16) for _ in range(2))
    exact, low = a.double() @ b.double(), a @ b
    assert_within_error_budget(low, exact, low)
    assert_within_error_budget(exact.to(torch.bfloat16), exact, low)
    with pytest.raises(AssertionError, match=r"product: error .* against fp64 is over the budget .*rounding"):
        assert_within_error_budget(low * 1.05, exact, low, what="product")
    broken = low.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_error_budget(broken, exact, low)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_within_error_budget(low[:1], exact, low)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_within_error_budget(low, exact.float(), low)


def test_error_budget_where_the_reference_is_infinite():
    exact = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    good = torch.tensor([1.0, float("-inf")])
    assert_within_error_budget(good, exact, good)
    with pytest.raises(AssertionError, match="infinite"):
        assert_within_error_budget(torch.tensor([1.0, -1e30]), exact, good)
