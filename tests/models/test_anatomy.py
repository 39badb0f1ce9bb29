"""Every family's sites are where the models really have them, and a run confirms their shapes."""

from typing import Any

import pytest
from torch import nn

import interp
from interp.models.module_walk import Walk
from interp.testing import build, families


@pytest.mark.parametrize("name", families())
def test_sites_are_those_of_the_family_and_a_run_confirms_them(name):
    specimen = build(name)
    still = interp.anatomy(specimen.module)
    named = {s: [site.name for site in sites] for s, sites in still.stacks.items()}
    assert named == {s: [p for p in stack.sites if p is not None] for s, stack in specimen.stacks.items()}
    assert still.shapes() == specimen.expected_stacks
    before = specimen.module.config._attn_implementation
    ran = interp.anatomy(specimen.module, specimen.inputs)
    assert specimen.module.config._attn_implementation == before
    assert all(site.seen for site in ran.sites)
    shapes = [(s.n_heads, s.n_kv_heads, s.head_dim, s.v_head_dim) for s in still.sites]
    assert shapes == [(s.n_heads, s.n_kv_heads, s.head_dim, s.v_head_dim) for s in ran.sites]
    gated = {site.z_is_projected for site in ran.sites}
    assert gated == {name != "qwen3_next"} or None in gated


@pytest.mark.parametrize("name", families(reached=False))
def test_what_is_not_reached_is_named(name):
    specimen = build(name)
    shape = interp.anatomy(specimen.module)
    assert not shape.sites
    assert bool(shape.unreached) == (name != "mamba")


def test_a_module_replaced_between_two_calls_is_seen() -> None:
    module = build("llama").module
    before = interp.anatomy(module)
    name = before.sites[0].name
    parent, _, key = name.rpartition(".")
    second: Any = module.get_submodule(before.sites[1].name)
    second.num_key_value_groups *= 2
    setattr(module.get_submodule(parent), key, nn.MultiheadAttention(4, 2))
    after = interp.anatomy(module)
    assert after.sites[0].name == before.sites[1].name
    assert after.sites[0].n_kv_heads * 2 == before.sites[1].n_kv_heads
    assert after.without_softmax == {"text": (0,)}
    assert after.unreached == (f"{name} (MultiheadAttention)",)


def test_a_site_that_is_a_member_of_its_layer_list_fills_the_layer() -> None:
    module = build("llama").module
    layers = module.model.layers
    module.model.layers = nn.ModuleList([layer.self_attn for layer in layers])
    shape = interp.anatomy(module)
    assert [site.layer for site in shape.sites] == list(range(len(layers)))
    assert shape.n_layers == {"text": len(layers)}
    assert not shape.without_softmax


@pytest.mark.parametrize("name", ["llava", "mllama", "whisper"])
def test_the_walk_meets_modules_as_named_modules_does(name: str) -> None:
    module = build(name).module
    module.again = nn.ModuleList([next(m for m in module.modules() if isinstance(m, nn.ModuleList))])
    walk = Walk(module)
    order = [path for path, _ in module.named_modules()]
    seen = [w.name for w in walk.sites]
    assert seen == [path for path in order if path in set(seen)]
    assert list(walk.lists) == [p for p, m in module.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    for site in walk.sites:
        assert module.get_submodule(site.name) is site.module
        assert module.get_submodule(site.owner_path) is site.owner
