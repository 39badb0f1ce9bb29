"""Scores of vision: known answers by hand, and against the model itself with the image really taken away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.analysis import score
from interp.analysis.grounding import centre_map, grounding_metrics
from interp.analysis.image_centric import visual_sinks
from interp.analysis.image_mass import image_mass_by_step
from interp.analysis.local_divergence import knocked_out
from interp.analysis.running import AnalysisError
from interp.analysis.vision_divergence import token_divergence
from interp.attention import Edit, GroupWeights
from interp.testing import build
from interp.tracing.calls import Intervention

VISION = ["vision_aware_divergence", "local_vision_divergence", "image_mass", "image_centric", "visual_sink_share"]


@pytest.fixture(scope="module")
def llava() -> Any:
    return build("llava")


@dataclass(frozen=True)
class Told:
    """A prompt with an answer of its own, and a mask for one row."""

    given: dict[str, Any]
    answer_ids: tuple[int, ...] = (11, 12, 13)

    def inputs(self, device: Any = None) -> dict[str, Any]:
        return dict(self.given)

    def forced(self, device: Any = None) -> dict[str, Any]:
        ids = torch.cat([self.given["input_ids"], torch.tensor([self.answer_ids])], 1)
        return {**self.given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def targets(self, length: int, grid: tuple[int, int]) -> list[tuple[int, Any]]:
        mask = np.zeros(grid, dtype=bool)
        mask[0] = True
        return [(length - 1, mask), (length + 1, ~mask)]


def image_columns(specimen: Any, ids: torch.Tensor) -> torch.Tensor:
    return ids[0] == specimen.module.config.image_token_index


def zs(module: Any, rows: tuple[int, ...], **inputs: Any) -> np.ndarray:
    with interp.hooked(module, capture=interp.Capture(z=True, queries=rows, stacks=("text",))) as run, torch.no_grad():
        module(**inputs)
    return run.trace["text"]["z"].values[0]


def test_divergence_is_that_of_a_run_without_the_image(llava: Any) -> None:
    told = Told(llava.inputs)
    result = score("vision_aware_divergence", llava.module, [told], rows="answer")
    forced = told.forced()
    ids = forced["input_ids"]
    image = image_columns(llava, ids)
    assert image.any()
    n, length = int(image.sum()), ids.shape[1]
    rows = (length - 4, length - 3, length - 2)
    seen = zs(llava.module, rows, **forced)
    alone = zs(llava.module, tuple(r - n for r in rows), input_ids=ids[:, ~image])
    wanted = np.linalg.norm(seen - alone, axis=-1)
    np.testing.assert_allclose(result.value.values, wanted.mean(-1), rtol=1e-5)
    assert np.isnan(result.null.values).all()  # a single sample has no other image
    steps = token_divergence(llava.module, told, k=2)
    np.testing.assert_allclose(steps.vhd.values, np.moveaxis(wanted, -1, 0), rtol=1e-5)
    np.testing.assert_allclose(steps.t_vhd.values, np.sort(wanted, 1)[:, -2:].sum((0, 1)), rtol=1e-5)
    first = score("vision_aware_divergence", llava.module, [told], distance="squared", relative=True)
    last = length - 4
    seen, alone = (
        zs(llava.module, (last,), **told.inputs()),
        zs(llava.module, (last - n,), input_ids=ids[:, :-3][:, ~image[:-3]]),
    )
    wanted = ((seen - alone) ** 2).sum(-1)[..., 0] / (seen**2).sum(-1)[..., 0]
    np.testing.assert_allclose(first.value.values, wanted, rtol=1e-4)


def test_control_of_divergence_exchanges_the_image(llava: Any) -> None:
    other = {**llava.inputs, "pixel_values": torch.randn_like(llava.inputs["pixel_values"])}
    result = score("vision_aware_divergence", llava.module, [llava.inputs, other])
    last = llava.inputs["input_ids"].shape[1] - 1
    a, b = zs(llava.module, (last,), **llava.inputs), zs(llava.module, (last,), **other)
    np.testing.assert_allclose(result.null.values, np.linalg.norm(a - b, axis=-1)[..., 0], rtol=1e-4)
    same = score("vision_aware_divergence", llava.module, [llava.inputs, llava.inputs])
    assert (same.null.values == 0).all() and (same.value.values > 0).any()


class KnockOut(Intervention):
    def __init__(self, layer: int, image: torch.Tensor) -> None:
        self.layer, self.image = layer, image

    def before(self, call: Any) -> Edit | None:
        if call.site.stack != "text" or call.site.layer != self.layer:
            return None
        groups = self.image.to(torch.int8)[None]
        return Edit((GroupWeights(torch.tensor([1.0, 0.0])[None, None, None], True),), groups=groups)


def test_local_divergence_is_that_of_a_knockout_in_one_layer(llava: Any) -> None:
    result = score("local_vision_divergence", llava.module, [llava.inputs])
    last = llava.inputs["input_ids"].shape[1] - 1
    image = image_columns(llava, llava.inputs["input_ids"])
    plain = zs(llava.module, (last,), **llava.inputs)
    for layer in range(result.sizes["layer"]):
        with interp.hooked(llava.module, interventions=[KnockOut(layer, image)]):
            hidden = zs(llava.module, (last,), **llava.inputs)
        wanted = np.linalg.norm(plain[layer] - hidden[layer], axis=-1)[..., 0]
        np.testing.assert_allclose(result.value.values[layer], wanted, rtol=1e-4, atol=1e-6)
    assert not np.allclose(result.value.values, result.null.values)


def test_knocking_out_by_hand() -> None:
    outputs = xr.DataArray(
        [[[3.0, 0.0], [0.0, 2.0]]], dims=("query", "group", "dim"), coords={"group": ["text", "image"]}
    )
    mass = xr.DataArray([[0.25, 0.75]], dims=("query", "group"), coords={"group": ["text", "image"]})
    # z = (3, 2); without the image (3, 0) / 0.25 = (12, 0).
    assert knocked_out(outputs, mass, "image").item() == pytest.approx(np.hypot(9, 2))
    assert knocked_out(outputs, mass, "image", relative=True).item() == pytest.approx(np.hypot(9, 2) / np.hypot(3, 2))
    alone = xr.DataArray([[0.0, 1.0]], dims=("query", "group"), coords={"group": ["text", "image"]})
    assert knocked_out(outputs, alone, "image").item() == pytest.approx(np.hypot(3, 2))


def test_image_mass_equals_that_of_the_full_map(llava: Any) -> None:
    told = Told(llava.inputs)
    forced = told.forced()
    with interp.hooked(llava.module, capture=interp.Capture(attention=True, stacks=("text",))) as run, torch.no_grad():
        llava.module(**forced)
    a = run.trace["text"]["attention"].values[0]
    image = image_columns(llava, forced["input_ids"]).numpy()
    length = a.shape[-1]
    rows = slice(length - 4, length - 1)
    wanted = a[:, :, rows][..., image].sum(-1)
    result = score("image_mass", llava.module, [told])
    np.testing.assert_allclose(result.value.values, wanted.mean(-1), atol=1e-6)
    uniform = image.sum() / np.arange(length - 3, length)
    np.testing.assert_allclose(result.null.values, uniform.mean())
    by_step = image_mass_by_step(llava.module, told)
    np.testing.assert_allclose(by_step.values, np.moveaxis(wanted, -1, 0), atol=1e-6)
    np.testing.assert_allclose(by_step["uniform"].values, uniform)


def test_sinks_and_image_centric_heads_equal_those_of_the_full_map(llava: Any) -> None:
    dims, tau = (3, 7), 1.5
    found = visual_sinks(llava.module, llava.inputs, tau=tau, scale_tau=False, dims=dims)
    states: list[torch.Tensor] = []
    layers = llava.module.get_submodule("model.language_model.layers")
    handles = [
        layer.register_forward_pre_hook(
            lambda _, a, k: states.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    with interp.hooked(llava.module, capture=interp.Capture(attention=True, stacks=("text",))) as run, torch.no_grad():
        llava.module(**llava.inputs)
    for handle in handles:
        handle.remove()
    x = torch.stack(states, 1)
    wanted = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())[..., dims].abs().amax(-1).numpy()
    np.testing.assert_allclose(found.phi.values, wanted, rtol=1e-5)
    image = image_columns(llava, llava.inputs["input_ids"]).numpy()
    sinks = (wanted[0] >= tau) & image
    assert sinks.any() and not sinks[:, image].all()
    a = run.trace["text"]["attention"].values[0][:, :, np.flatnonzero(image).max() + 1 :]
    s = a[..., image].sum(-1)
    on_sinks = (a * sinks[:, None, None]).sum(-1)
    settings = {"tau": tau, "scale_tau": False, "dims": dims}
    centric = score("image_centric", llava.module, [llava.inputs], **settings)
    np.testing.assert_allclose(centric.value.values, ((s >= 0.2) & (s - on_sinks >= 0.5 * s)).mean(-1))
    share = score("visual_sink_share", llava.module, [llava.inputs], **settings)
    np.testing.assert_allclose(share.value.values, (on_sinks / s).mean(-1), rtol=1e-4)
    np.testing.assert_allclose(share.null.values, sinks.sum() / (len(sinks) * image.sum()))


def test_a_model_without_sinks_says_so(llava: Any) -> None:
    with pytest.warns(UserWarning, match="no visual sinks.*cannot be calibrated"):
        result = score("visual_sink_share", llava.module, [llava.inputs])
    assert (result.value.values == 0).all()
    with pytest.raises(AnalysisError, match="cannot be calibrated"):
        visual_sinks(llava.module, llava.inputs)


MASK = np.array([[True, True, False], [False, False, False]])


@pytest.mark.parametrize(
    ("cells", "auc", "nss", "mass", "iou"),
    [
        ([[1, 1, 0], [0, 0, 0]], 1.0, np.sqrt(2), 1.0, 1.0),
        ([[1, 1, 1], [1, 1, 1]], 0.5, 0.0, 1 / 3, 0.2),  # a flat map: two of six cells, whichever
        ([[0, 0, 1], [1, 1, 1]], 0.0, -np.sqrt(2), 0.0, 0.0),
        ([[3, 1, 2], [0, 0, 0]], 7 / 8, 1.0 / np.sqrt(4 / 3), 4 / 6, 1 / 3),
    ],
)
def test_grounding_by_hand(cells: list[list[int]], auc: float, nss: float, mass: float, iou: float) -> None:
    found = grounding_metrics(np.array(cells, dtype=float), MASK)
    assert [found[k].item() for k in ("auc", "nss", "mass", "iou")] == pytest.approx([auc, nss, mass, iou])


def test_grounding_of_maps_with_missing_cells_and_bad_masks() -> None:
    maps = np.array([[[np.nan, 2, 1], [0, 0, np.nan]], np.full((2, 3), np.nan)])
    found = grounding_metrics(maps, MASK)
    assert found["auc"][0] == 1 and found["mass"][0] == pytest.approx(2 / 3) and np.isnan(found["auc"][1])
    for mask in (np.zeros((2, 3), bool), np.ones((2, 3), bool), np.ones((3, 3), bool)):
        with pytest.raises(AnalysisError, match="mask must have the maps' shape"):
            grounding_metrics(maps, mask)
    np.testing.assert_allclose(centre_map((3, 5)), centre_map((3, 5))[::-1, ::-1])
    assert centre_map((3, 5)).argmax() == 7


def test_grounding_reads_the_row_that_predicts_the_name(llava: Any) -> None:
    told = Told(llava.inputs)
    with interp.hooked(llava.module, capture=interp.Capture(attention=True, stacks=("text",))) as run, torch.no_grad():
        llava.module(**told.forced())
    a = run.trace["text"]["attention"].values[0]
    ids = told.forced()["input_ids"]
    image = image_columns(llava, ids).numpy()
    edge = int(np.sqrt(image.sum()))
    maps = a[..., image].reshape(*a.shape[:3], edge, edge)
    length = ids.shape[1] - 3
    mask = np.zeros((edge, edge), bool)
    mask[0] = True
    for name, shift in (("predicting", 0), ("word", 1)):
        got = score("grounding", llava.module, [told], metric="mass", row=name, baseline="area")
        wanted = [
            grounding_metrics(maps[:, :, length - 1 + at + shift], m)["mass"]
            for at, m in ((0, mask), (2, ~mask))
            if length - 1 + at + shift < a.shape[2]
        ]
        if len(wanted) == 2:
            np.testing.assert_allclose(got.value.values, np.mean(wanted, 0), rtol=1e-4)
            np.testing.assert_allclose(got.null.values, 0.5)
    with pytest.raises(AnalysisError, match="targets"):
        score("grounding", llava.module, [llava.inputs])


@pytest.mark.parametrize("name", [*VISION, "grounding"])
def test_scores_of_vision_refuse_a_text_model(name: str) -> None:
    module = build("llama").module
    with pytest.raises(AnalysisError, match="needs a vision-language model"):
        score(name, module, [{"input_ids": torch.randint(10, 90, (1, 12))}])


@pytest.mark.parametrize("name", VISION)
def test_scores_of_vision_refuse_a_prompt_without_an_image(llava: Any, name: str) -> None:
    with pytest.raises(AnalysisError, match="needs image tokens"):
        score(name, llava.module, [{"input_ids": torch.randint(10, 90, (1, 12))}])


@pytest.mark.parametrize("family", ["llava_onevision", "paligemma", "gemma3", "qwen2_5_vl"])
def test_scores_of_vision_run_on_other_families(family: str) -> None:
    specimen = build(family)
    for name in ("image_mass", "local_vision_divergence", "vision_aware_divergence"):
        result = score(name, specimen.module, [specimen.inputs])
        assert np.isfinite(result.value.values).all(), name
