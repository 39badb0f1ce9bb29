"""Local divergence: what a head's output owes to the image in its own layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from interp.analysis.image_inputs import answered, prompt_of, require_images
from interp.analysis.running import Floats, HeadScore, forward, on_grid
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class LocalDivergence(HeadScore):
    """Local VHD: VHD (He et al. 2025, https://arxiv.org/abs/2412.13949) with the image columns knocked out in that layer alone.

    Formula: with ``m`` the row's weight on image keys and ``o`` what they contributed to z,
    ``|| z - (z - o) / (1 - m) ||_2``: z minus what the same row gives when the image's scores are minus infinity (exact; 0 in
    place of the second term where m = 1). From ``group_output`` and ``mass`` of the rows, one forward, linear in length.
    VHD lets the missing image change every layer below as well, and renumbers positions; this score leaves the head its inputs
    and asks what it takes from image positions itself. It is ours.

    Unit: that of z, not comparable between layers.

    Args:
        relative: divide by ``|| z ||``.

    Needs: a vision-language model whose image tokens stand in the text.
    Probe: ``SceneDescriptions``: the mean over the rows that predict the answer's tokens; the last row for inputs without answer.
    Control: text columns (special tokens not counted) knocked out instead.
    When not to use: information from the image that lower layers have carried into text positions does not count.
    """

    name: ClassVar[str] = "local_vision_divergence"
    summary: ClassVar[str] = "how far a head's output moves when the image is hidden from it in its own layer"
    paper: ClassVar[str] = "ours, after He et al. 2025, https://arxiv.org/abs/2412.13949"
    unit: ClassVar[str] = "norm of z"
    probe: ClassVar[str] = "SceneDescriptions"
    control: ClassVar[str] = "text columns knocked out instead of the image's"
    needs: ClassVar[str] = "a vision-language model"

    relative: bool = False

    @property
    def result_unit(self) -> str:
        return "fraction of the norm of z" if self.relative else self.unit

    def default_probe(self) -> Any:
        from probes.scenes.described import SceneDescriptions

        return SceneDescriptions()

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        require_images(model, self.name)
        inputs, rows = answered(sample, model)
        prompt_of(model, inputs, self.name)
        capture = Capture(row_stats=True, group_output=tuple(rows), queries=tuple(rows), stacks=("text",))
        data = forward(model, inputs, capture, "text")
        outputs = data["group_output"].rename(output_row="query").assign_coords(query=data["query"].values)
        moved = {group: knocked_out(outputs, data["mass"], group, self.relative) for group in ("image", "text")}
        value, null = (on_grid(moved[group].mean("query"), model, "text") for group in ("image", "text"))
        return value, null


def knocked_out(outputs: xr.DataArray, mass: xr.DataArray, group: str, relative: bool = False) -> xr.DataArray:
    """``|| z - z without the group ||_2`` with the rest of the row renormalised.

    Args:
        outputs: ``[..., group, dim]`` what each key group contributed to z.
        mass: ``[..., group]`` its share of the row; what is missing to 1 is a learned sink's.
        group: which to hide.
        relative: divide by ``|| z ||``.
    """
    z = outputs.sum("group", skipna=False)
    rest = 1 - mass.sel(group=group)
    without = (z - outputs.sel(group=group)) / rest.where(rest > np.finfo(np.float32).eps)
    without = without.fillna(0.0).where(z.notnull())
    distance = ((z - without) ** 2).sum("dim", skipna=False) ** 0.5
    return distance / (z**2).sum("dim", skipna=False) ** 0.5 if relative else distance
