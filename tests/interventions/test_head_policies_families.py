"""Interventions on heads on every family, in one forward: strength off, strength on, a run patched with itself, frozen norms."""

import logging

import pytest
import torch

import interp
from interp.interventions import HeadActivations, MaskHeads, NormScales, PatchHeads
from interp.testing import build, families

logging.getLogger("transformers").setLevel(logging.ERROR)
NAMES = (
    "MaskHeads", "ScaleHeads", "Temperature", "GateHeads", "TopKMask", "Streaming", "PatchHeads", "AddToHeads", "Custom",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def output(specimen, *interventions):
    with torch.no_grad(), interp.hooked(specimen.module, interventions=interventions):
        result = specimen.module(**specimen.inputs)
    names = ("logits", "last_hidden_state", "logits_per_image")
    return result[next(name for name in names if name in result)]


@pytest.mark.parametrize("family", families())
def test_every_family(family):
    specimen = build(family)
    plain = output(specimen)
    for name in NAMES:
        cls = getattr(interp, name)
        assert torch.equal(output(specimen, cls.example(specimen.module, strength="off")), plain), name
        on = output(specimen, cls.example(specimen.module, strength="on"))
        assert torch.isfinite(on).all() and not torch.allclose(on, plain, atol=1e-4), name
    heads = ",".join(f"{stack}.L*H*" for stack in interp.anatomy(specimen.module).stacks)
    source = HeadActivations.collect(specimen.module, specimen.inputs, what=["z", "q", "k", "v", "pattern"])
    for what in source.what:
        same = output(specimen, PatchHeads(heads, source, what=what))
        assert torch.allclose(same, plain, atol=2e-4), what
    norms = NormScales.collect(specimen.module, specimen.inputs)
    assert torch.equal(output(specimen, MaskHeads([], norms=norms)), plain)


def test_a_norm_of_another_kind_is_refused():
    specimen = build("llama")

    class MaxNorm(torch.nn.Module):
        eps = 1e-6

        def forward(self, x):
            return x / x.abs().max(-1, keepdim=True).values.pow(2)

    specimen.module.model.norm = MaxNorm()
    with pytest.raises(ValueError, match=r"model.norm \(MaxNorm\) does something else"):
        NormScales.collect(specimen.module, specimen.inputs)
