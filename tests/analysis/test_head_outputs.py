"""Head outputs: what is collected is what goes into the output projection, at the rows that were asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis.head_outputs import head_outputs
from interp.analysis.running import AnalysisError
from interp.testing import build
from probes.linear_probe import LinearProbe
from probes.repeated import RepeatedTokens

REPEATED = RepeatedTokens(n=3, length=6, vocabulary=range(10, 60))


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build("llama").module


def into_projection(module: Any, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    attention = module.model.layers[layer].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        module(**inputs)
    hook.remove()
    return seen[0][0].unflatten(-1, (-1, attention.head_dim))


def test_rows_are_what_the_projection_gets(tiny: Any) -> None:
    samples = REPEATED.build(tiny)
    found = head_outputs(tiny, REPEATED, rows=(-1, 2))
    assert found.dims == ("sample", "layer", "head", "dim") and found.dtype == np.float32
    assert found["prompt"].values.tolist() == [0, 0, 1, 1, 2, 2]
    assert found["position"].values.tolist() == [len(samples[0].ids) - 1, 2] * 3
    for number, sample in enumerate(samples):
        for layer in found["layer"].values:
            z = into_projection(tiny, sample.inputs(), int(layer))
            here = found.sel(layer=layer).isel(sample=slice(2 * number, 2 * number + 2)).values
            np.testing.assert_allclose(here, z[[-1, 2]].numpy(), atol=1e-6)


def test_rows_by_name_and_by_function(tiny: Any) -> None:
    everything = head_outputs(tiny, REPEATED, rows="all")
    last = head_outputs(tiny, REPEATED)
    copy = head_outputs(tiny, REPEATED, rows=lambda sample: sample.last_copy, layers=[1])
    length = int(everything["position"].max()) + 1
    assert everything.sizes["sample"] == 3 * length and last.sizes["sample"] == 3
    np.testing.assert_array_equal(last.values, everything.values[length - 1 :: length])
    assert copy["layer"].values.tolist() == [1] and copy.sizes["sample"] == 18
    np.testing.assert_array_equal(copy.values[:6, 0], everything.sel(layer=1).values[length - 6 : length])


def test_edits_of_the_user_are_seen(tiny: Any) -> None:
    plain = head_outputs(tiny, REPEATED, layers=[0])
    with interp.hooked(tiny, interventions=[interp.Custom(after=lambda call, z: z * 2, heads="L0H1")]):
        doubled = head_outputs(tiny, REPEATED, layers=[0])
    np.testing.assert_allclose(doubled.sel(head=1), 2 * plain.sel(head=1), rtol=1e-6)
    np.testing.assert_array_equal(doubled.sel(head=0), plain.sel(head=0))


def test_a_stack_of_patches() -> None:
    specimen = build("vit")
    found = head_outputs(specimen.module, [specimen.inputs], rows="all", stack="vision")
    assert found.shape == (25, 3, 4, 12)


def test_probe_of_head_outputs(tiny: Any) -> None:
    # The first layer knows of the token that it is fed; whether its id is even is a function of the token.
    probe = RepeatedTokens(n=20, length=4, vocabulary=range(10, 18))
    z = head_outputs(tiny, probe, rows=(1, 2, 3, 4), layers=[0])
    ids = np.array([i for sample in probe.build(tiny) for i in sample.ids[1:5]])
    found = LinearProbe(folds=3, controls=1).fit(z.values, ids % 2, types=ids, groups=z["prompt"].values)
    assert found.accuracy.shape == z.shape[1:3] and np.isfinite(found.accuracy).all()
    assert (found.low <= found.accuracy).all() and (found.accuracy <= found.high).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": "first"}, "rows must be 'last', 'all'"),
        ({"rows": (99,)}, r"rows must lie in a sample of 13 positions, got 99"),
        ({"rows": ()}, "at least one position in all, got none"),
        ({"layers": [7]}, r"layers must be different ones in \[0, "),
        ({"layers": []}, "layers must be different ones"),
        ({"stack": "vision"}, "stack must be one of"),
    ],
)
def test_wrong_arguments(tiny: Any, change: dict[str, Any], says: str) -> None:
    with pytest.raises(AnalysisError, match=says):
        head_outputs(tiny, REPEATED, **change)


def test_a_batch_is_refused(tiny: Any) -> None:
    with pytest.raises(AnalysisError, match="one sequence .* got a batch of 2"):
        head_outputs(tiny, [{"input_ids": torch.tensor([[5, 6], [7, 8]])}])
