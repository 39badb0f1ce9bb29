"""Custom functions, and the list of interventions."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import interp
from interp.attention import Edit, Gain, GivenRows, Uniform
from interp.heads import HeadError
from interp.interventions import Custom, MaskHeads
from interp.testing import build


@pytest.fixture
def llama():
    torch.set_num_threads(1)
    return build("llama")


def logits(specimen, *interventions):
    with torch.no_grad(), interp.hooked(specimen.module, interventions=interventions):
        return specimen.module(**specimen.inputs).logits


def halve(call, z):
    return z * 0.5


def test_the_identity_changes_nothing(llama):
    assert torch.equal(logits(llama, Custom(after=lambda site, z: z)), logits(llama))
    assert torch.equal(logits(llama, Custom(after=lambda site, z: None, before=lambda call: None)), logits(llama))


def test_after_acts_on_every_head_or_on_those_named(llama):
    everywhere = Custom(before=lambda call: Edit((Gain(0.5),)))
    assert torch.equal(logits(llama, Custom(after=halve)), logits(llama, everywhere))
    one = Custom(before=lambda call: Edit((Gain(0.5, call.heads([2])),)) if call.site.layer == 1 else None)
    assert torch.equal(logits(llama, Custom(after=halve, heads="L1H2")), logits(llama, one))
    assert not torch.equal(logits(llama, Custom(after=halve, heads="L1H2")), logits(llama, Custom(after=halve)))


def test_heads_limit_the_edit_of_before_and_the_sites_it_is_called_at(llama):
    seen = []

    def uniform(call):
        seen.append(call.site.layer)
        return Edit((Uniform(),))

    assert torch.equal(
        logits(llama, Custom(before=uniform, heads="L1H2")), logits(llama, MaskHeads("L1H2", kind="uniform"))
    )
    assert seen == [1]

    def first(call):
        p = torch.zeros(1, call.site.n_heads, 24, 24)
        p[..., 0] = 1
        return Edit((GivenRows(torch.arange(call.site.n_heads), torch.arange(24), p),))

    given = logits(llama, Custom(before=first, heads=["L1H2", "L1H0"]))
    assert torch.allclose(given, logits(llama, MaskHeads("L1H0,L1H2", kind="first_token")), atol=1e-5)


def test_an_in_place_change_cannot_reach_other_heads(llama):
    def spoil(call, z):
        z.mul_(0.5)
        return z

    assert torch.equal(
        logits(llama, Custom(after=spoil, heads="L1H2")), logits(llama, Custom(after=halve, heads="L1H2"))
    )


def test_before_may_replace_queries(llama):
    def silence(call):
        call.q = torch.zeros_like(call.q)

    # Without scores attention is uniform over what is visible.
    assert torch.allclose(
        logits(llama, Custom(before=silence)), logits(llama, MaskHeads("L*H*", kind="uniform")), atol=1e-4
    )


def test_what_cannot_be_is_refused(llama):
    with pytest.raises(TypeError, match="before or after must be given"):
        Custom()
    with pytest.raises(TypeError, match="after must be a function, got int"):
        Custom(after=3)
    with pytest.raises(TypeError, match="before must return .*got float"):
        logits(llama, Custom(before=lambda call: 1.0))
    with pytest.raises(TypeError, match="after must return a tensor or None, got float"):
        logits(llama, Custom(after=lambda call, z: 1.0, heads="L0H0"))
    with pytest.raises(TypeError, match="after must return a tensor or None, got float"):
        logits(llama, Custom(after=lambda call, z: 1.0))
    with pytest.raises(interp.tracing.SessionError, match="keep z's shape"):
        logits(llama, Custom(after=lambda call, z: z[:, :1]))
    with pytest.raises(HeadError, match="L7H0"):
        logits(llama, Custom(after=halve, heads="L7H0"))


def test_a_trace_names_the_function(llama):
    with (
        torch.no_grad(),
        interp.hooked(
            llama.module, capture=interp.Capture(row_stats=True), interventions=[Custom(after=halve, heads=[(0, 1)])]
        ) as run,
    ):
        llama.module(**llama.inputs)
    assert run.trace.attrs["interventions"] == [
        {"name": "Custom", "before": None, "after": f"{__name__}.halve", "heads": "L0H1"}
    ]
    assert np.isfinite(run.trace["text"]["entropy"].values).all()


CODES = (
    "import interp; first = interp.interventions(); second = interp.interventions()",
    "from interp.interventions import MaskHeads; import interp; first = second = interp.interventions()",
    "import interp; interp.MaskHeads; first = second = interp.interventions(); interp.interventions.Custom",
    "from interp.interventions import interventions, HeadMeans; first = second = interventions()",
)


def test_the_list_and_the_package_share_a_name():
    # Fresh processes: importing the package rebinds the name that the lazy attribute had. They share what takes long.
    script = """
import json, os, sys, torch, xarray
for code in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    if not os.fork():
        names = {}
        exec(code, names)
        assert names["first"] == names["second"]
        os.write(writing, json.dumps(names["first"], default=str).encode())
        os._exit(0)
    os.close(writing)
    print(open(reading).read())
    _, status = os.wait()
    assert status == 0, code
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(CODES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(CODES)
    for line in lines:
        listed = {entry["name"]: entry for entry in json.loads(line)}
        assert {"MaskHeads", "Custom"} <= set(listed) and "HeadMeans" not in listed
        assert listed["MaskHeads"]["settings"]["heads"] == "required"
        assert listed["MaskHeads"]["settings"]["kind"] == "zero"
        for entry in listed.values():
            assert set(entry) == {"name", "summary", "paper", "unit", "settings", "stacks", "needs"}
            assert entry["summary"].endswith(".") and entry["stacks"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(ImportError, match="NoSuchMethod"):
        from interp.interventions import NoSuchMethod  # noqa: F401
