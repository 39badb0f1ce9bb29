"""Every family's sites are where the models really have them, and a run confirms their shapes."""

import pytest

import interp
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
