"""Grounding: does a head look where the object is that the text is about to name?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from interp.analysis.image_inputs import answered, require_images
from interp.analysis.running import AnalysisError, Floats, HeadScore, forward, inputs_of, on_grid
from interp.models.layout import layout
from interp.models.model import Model
from interp.tracing.capture import Capture

Metric = Literal["auc", "nss", "mass", "iou"]
UNITS = {
    "auc": "area under the ROC curve", "nss": "standard deviations", "mass": "fraction of image mass",
    "iou": "intersection over union",
}  # fmt: skip


@dataclass(frozen=True)
class Grounding(HeadScore):
    """Grounding of text-to-patch maps on object masks (metrics: Bylinskii et al. 2019, https://arxiv.org/abs/1604.03605).

    For the row that predicts the first token of an object's name, the weights on image tokens put on the patch grid are a map; the
    patches that the object covers are its mask. Formulas: see :func:`grounding_metrics`. Mean over a sample's objects; rows
    ``[row, key]`` are read exactly, so memory is linear in length.

    Unit: by metric. ``auc`` 0 to 1, 0.5 is chance; ``nss`` standard deviations above the map's mean; ``mass`` fraction of the
    image's weight; ``iou`` 0 to 1.

    Args:
        metric: ``auc``, ``nss``, ``mass`` or ``iou``.
        row: ``"predicting"`` the name's first token, or the row of that token itself (``"word"``).
        baseline: what the control is: ``"centre"``, a Gaussian around the picture's centre (sigma a quarter of the grid), which
            pictures composed by people beat chance with; or ``"area"``, a flat map.

    Needs: a vision-language model whose image tokens stand in the text on one grid a picture; samples with
    ``targets(length, grid)`` as ``SceneDescriptions`` has.
    Control: the baseline map on the same masks. A sample without a mention that has a mask is missing.
    When not to use: as evidence that a head causes the word; AUC of tiny maps (14 x 14) moves by several hundredths.
    """

    name: ClassVar[str] = "grounding"
    summary: ClassVar[str] = "how well a head's attention to the image falls on the object about to be named"
    paper: ClassVar[str] = "metrics: Bylinskii et al. 2019, https://arxiv.org/abs/1604.03605"
    unit: ClassVar[str] = UNITS["auc"]
    probe: ClassVar[str] = "SceneDescriptions"
    control: ClassVar[str] = "a map that knows nothing of the picture: Gaussian around its centre, or flat"
    needs: ClassVar[str] = "a vision-language model"

    metric: Metric = "auc"
    row: Literal["predicting", "word"] = "predicting"
    baseline: Literal["centre", "area"] = "centre"

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise AnalysisError(f"metric must be one of {get_args(Metric)}, got {self.metric!r}")
        if self.row not in ("predicting", "word") or self.baseline not in ("centre", "area"):
            raise AnalysisError(
                f"row must be 'predicting' or 'word' and baseline 'centre' or 'area', got {self.row!r}, {self.baseline!r}"
            )

    @property
    def result_unit(self) -> str:
        return UNITS[self.metric]

    def default_probe(self) -> Any:
        from probes.scenes.described import SceneDescriptions

        return SceneDescriptions()

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        require_images(model, self.name)
        if not callable(getattr(sample, "targets", None)):
            raise AnalysisError(
                f"grounding needs samples with targets(length, grid): rows and object masks, got {type(sample).__name__}"
            )
        prompt = inputs_of(sample, model)
        inputs, _ = answered(sample, model)
        placed = layout(model.module, prompt, model.tokenizer)["text"]
        targets: list[tuple[int, NDArray[np.bool_]]] = sample.targets(prompt["input_ids"].shape[1], placed.grid())
        rows = sorted({row + (self.row == "word") for row, _ in targets})
        if not rows:
            blank = np.full((1, *model_shape(model)), np.nan)
            return blank, blank.copy()
        data = forward(model, inputs, Capture(rows=tuple(rows), stacks=("text",)), "text")
        weights = (
            data["row_attention"].isel(key=slice(0, placed.shape[1])).transpose("sample", "layer", "head", "row", "key")
        )
        maps = placed.overlay(weights.values[0])
        values: list[Floats] = []
        nulls: list[float] = []
        for row, mask in targets:
            at = rows.index(row + (self.row == "word"))
            values.append(grounding_metrics(maps[:, :, at], mask)[self.metric])
            flat = np.ones(mask.shape) if self.baseline == "area" else centre_map(mask.shape)
            nulls.append(float(grounding_metrics(flat, mask)[self.metric]))
        mean = xr.DataArray(
            np.mean(values, axis=0)[None], dims=("sample", "layer", "head"),
            coords={"layer": data["layer"].values, "head": data["head"].values},
        )  # fmt: skip
        value = on_grid(mean, model, "text")
        return value, np.where(np.isnan(value), np.nan, np.mean(nulls))


def grounding_metrics(maps: Floats, mask: NDArray[np.bool_]) -> dict[str, Floats]:
    """Four metrics of maps against a mask; cells that are NaN in a map are left out.

    ``auc``: chance that a cell in the mask has more weight than one outside, ties half (Mann-Whitney). ``nss``: mean in the mask
    of the map with mean 0 and standard deviation 1; 0 for a flat map. ``mass``: share of the map's weight in the mask; the mask's
    area for a flat map. ``iou`` of the mask with the map's largest cells, as many as the mask has
    (of equal ones at the edge, each counts in part).

    Args:
        maps: ``[..., row, column]``.
        mask: bool ``[row, column]``, neither empty nor full.

    Returns:
        Each ``[...]``; NaN for a map without numbers.

    Raises:
        AnalysisError: shapes that differ, or a mask that is empty or full.
    """
    if maps.shape[-2:] != mask.shape or not mask.any() or mask.all():
        raise AnalysisError(
            f"mask must have the maps' shape {maps.shape[-2:]} and be neither empty nor full, got {mask.shape}, {int(mask.sum())} cells"
        )
    flat = maps.reshape(*maps.shape[:-2], -1).astype(np.float64)
    there = ~np.isnan(flat)
    inside = there & mask.ravel()
    outside = there & ~mask.ravel()
    n_in, n_out = inside.sum(-1), outside.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        filled = np.where(there, flat, -np.inf)
        auc = (_midranks(filled, inside) - n_in * (n_in + 1) / 2 - n_in * (~there).sum(-1)) / (n_in * n_out)
        mean = np.where(there, flat, 0).sum(-1) / there.sum(-1)
        spread = np.sqrt(np.where(there, (flat - mean[..., None]) ** 2, 0).sum(-1) / there.sum(-1))
        in_mask = np.where(inside, flat, 0).sum(-1)
        # A map that is flat but for rounding has no places.
        nss = np.where(spread > 1e-12 * np.abs(mean), (in_mask / n_in - mean) / spread, 0.0)
        mass = in_mask / np.where(there, flat, 0).sum(-1)
    lowest = np.take_along_axis(-np.sort(-filled, axis=-1), np.maximum(n_in - 1, 0)[..., None], -1)
    above, level = filled > lowest, there & (filled == lowest)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (n_in - above.sum(-1)) / level.sum(-1)
        hits = (above & inside).sum(-1) + part * (level & inside).sum(-1)
        found = {"auc": auc, "nss": nss, "mass": mass, "iou": hits / (2 * n_in - hits)}
    usable = (n_in > 0) & (n_out > 0)
    return {name: np.where(usable, value, np.nan) for name, value in found.items()}


def centre_map(shape: tuple[int, ...]) -> Floats:
    """A Gaussian around the middle of the grid, sigma a quarter of each side."""
    rows, columns = ((np.arange(n) - (n - 1) / 2) / (n / 4) for n in shape)
    return np.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / 2)


def model_shape(model: Model) -> tuple[int, int]:
    """Layers and heads of the text stack."""
    from interp.models.anatomy import anatomy

    return anatomy(model.module).shape("text")


def _midranks(values: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """Sum of the ranks (from 1, ties their mean) of the chosen cells of each map."""
    out = np.empty(values.shape[:-1])
    for index in np.ndindex(out.shape):
        _, inverse, counts = np.unique(values[index], return_inverse=True, return_counts=True)
        last = counts.cumsum()
        out[index] = ((last - (counts - 1) / 2)[inverse] * chosen[index]).sum()
    return out
