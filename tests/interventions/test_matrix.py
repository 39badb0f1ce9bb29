"""Every registered intervention on every family that generates: off is the plain model to the token, on says why not or acts.

A new intervention joins by existing; it must have ``example(model, strength="on" | "off")``.
"""

import logging
import warnings

import pytest
import torch

import interp
from interp import InterventionError
from interp.heads import HeadError
from interp.interventions import _classes
from interp.testing import build, families

logging.getLogger("transformers").setLevel(logging.ERROR)
INTERVENTIONS = _classes()
REFUSALS = (InterventionError, HeadError, ValueError)


def generate(module, inputs, interventions=(), **options):
    with torch.no_grad(), interp.hooked(module, interventions=interventions) as session:
        out = module.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
    return out, session


def test_all_are_listed():
    listed = {entry["name"]: entry for entry in interp.interventions()}
    assert set(listed) == set(INTERVENTIONS)
    assert set(listed) >= {"VHR", "VAR", "PAI", "PAINT", "Knockout", "MaskHeads", "Custom"}
    for name, entry in listed.items():
        assert entry["summary"].endswith("."), name
        assert getattr(interp.interventions, name) is INTERVENTIONS[name]


SILENT = ("bert", "vit", "deit", "dinov2", "dinov2_registers", "dinov3", "clip", "siglip")


@pytest.mark.parametrize("family", [name for name in families() if name not in SILENT])
def test_off_is_the_plain_model_and_on_acts_or_says_why_not(family):
    specimen = build(family)
    module, inputs = specimen.module, specimen.inputs
    plain, _ = generate(module, inputs)
    refused = {}
    for name, cls in INTERVENTIONS.items():
        example = getattr(cls, "example", None)
        if name == "Custom":
            example = lambda model, strength: interp.Custom(after=lambda call, z: None)  # noqa: E731
        assert example is not None, f"{name} must have a classmethod example(model, *, strength)"
        off = example(module, strength="off")
        tokens, session = generate(module, inputs, [off])
        assert torch.equal(tokens, plain), f"{name} at strength off changes the tokens of {family}"
        used = {how for site in session.report().values() for how in site}
        assert not any("edited" in how or how == "gain" for how in used), (
            f"{name} at strength off edits {family}: {used}"
        )
        assert session.extra_forwards == 0, name
        if not hasattr(cls, "extra_passes") or name not in ("VHR", "VAR", "PAI", "PAINT", "Knockout"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _, session = generate(module, inputs, [example(module, strength="on")])
        except REFUSALS as error:
            refused[name] = str(error)
            continue
        used = {how for site in session.report().values() for how in site}
        assert name == "VHR" or any("edited" in how for how in used), f"{name} did nothing on {family}: {used}"
    assert all(name in message for name, message in refused.items()), refused
    sees = any("pixel" in name for name in inputs) and not set(specimen.stacks) & {"cross"}
    assert sees == ("VHR" not in refused)
    assert "Knockout" not in refused
