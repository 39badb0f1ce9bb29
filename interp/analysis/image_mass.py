"""Attention mass on the image, by head, layer and step of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr

from interp.analysis.image_inputs import answered, prompt_of, require_images
from interp.analysis.running import Floats, HeadScore, as_model, forward, on_grid
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class ImageMass(HeadScore):
    """Share of a head's attention on image tokens, as in Kang et al. 2025, https://arxiv.org/abs/2503.03321 ("summ").

    Formula: mean over the rows that predict the answer's tokens of ``sum over image keys of A_ij``; ``mass`` of ``row_stats``,
    linear in length.

    Unit: fraction of row mass. Needs: a vision-language model whose image tokens stand in the text.
    Probe: ``SceneDescriptions``; the last row for inputs without an answer.
    Control: the share of image tokens among the keys that a row sees: what a uniform head has.
    When not to use: mass misleads at sinks, whose values are small: see ``visual_sink_share`` and ``local_vision_divergence``.
    """

    name: ClassVar[str] = "image_mass"
    summary: ClassVar[str] = "share of attention on image tokens while the answer is written"
    paper: ClassVar[str] = "Kang et al. 2025, https://arxiv.org/abs/2503.03321"
    unit: ClassVar[str] = "fraction of row mass"
    probe: ClassVar[str] = "SceneDescriptions"
    control: ClassVar[str] = "the image's share of the keys a row sees (a uniform head)"
    needs: ClassVar[str] = "a vision-language model"

    def default_probe(self) -> Any:
        from probes.scenes.described import SceneDescriptions

        return SceneDescriptions()

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        require_images(model, self.name)
        mass, share = _by_row(model, sample, self.name)
        value = on_grid(mass.mean("query"), model, "text")
        return value, np.where(np.isnan(value), np.nan, share.mean())


def image_mass_by_step(model: Any, sample: Any) -> xr.DataArray:
    """Image mass ``[step, layer, head]`` of the rows that predict each token of a sample's answer.

    Args:
        model: a vision-language model.
        sample: a prompt with its answer (``SceneDescriptions``); of inputs without one, the last row.

    Returns:
        Coordinates ``layer``, ``head``, ``uniform (step)``: what a uniform head has.
    """
    model = as_model(model)
    require_images(model, "image_mass_by_step")
    with torch.no_grad():
        mass, share = _by_row(model, sample, "image_mass_by_step")
    found = mass.isel(sample=0).transpose("query", "layer", "head")
    return xr.DataArray(
        found.values, dims=("step", "layer", "head"), name="image_mass",
        coords={"layer": found["layer"].values, "head": found["head"].values, "uniform": ("step", share)},
        attrs={"unit": "fraction of row mass", "model": model.name},
    )  # fmt: skip


def _by_row(model: Model, sample: Any, name: str) -> tuple[xr.DataArray, Floats]:
    inputs, rows = answered(sample, model)
    prompt = prompt_of(model, inputs, name)
    data = forward(model, inputs, Capture(row_stats=True, queries=tuple(rows), stacks=("text",)), "text")
    seen = prompt.real[0].cumsum(0).numpy()
    image = prompt.image[0].cumsum(0).numpy()
    at = np.asarray(rows)
    return data["mass"].sel(group="image", drop=True), image[at] / seen[at]
