"""Redundancy of heads: how alike their maps are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from interp.analysis.running import (
    AnalysisError,
    Floats,
    HeadScore,
    as_model,
    build,
    forward,
    inputs_of,
    on_grid,
    require_stack,
)
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class Redundancy(HeadScore):
    """Redundancy of heads (question of Michel et al. 2019, https://arxiv.org/abs/1905.10650; the measure is ours).

    Formula: of pooled maps with rows made to sum to 1, the mean over rows of the overlap ``sum_j min(P_ij, Q_ij)`` with every other head;
    value = the largest (1: another head has the same pooled map). From ``pooled``, so memory does not grow with length squared.

    Unit: fraction of row mass shared.

    Args:
        stack: which heads.
        among: ``"layer"``: other heads of the layer, or ``"model"``.
        grid: of the pooled maps.

    Probe: ``Passages`` for text, an iterable of inputs for other stacks. Control: the mean over all other heads in place of the largest.
    When not to use: two heads with one map may write different things.
    """

    name: ClassVar[str] = "redundancy"
    summary: ClassVar[str] = "how much of a head's map another head has too"
    paper: ClassVar[str] = "ours, after Michel et al. 2019, https://arxiv.org/abs/1905.10650"
    unit: ClassVar[str] = "fraction of row mass"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "Passages"
    control: ClassVar[str] = "the mean over all other heads"

    stack: str = "text"
    among: Literal["layer", "model"] = "layer"
    grid: int = 32

    def __post_init__(self) -> None:
        if self.among not in ("layer", "model") or self.grid < 2:
            raise AnalysisError(
                f"among must be 'layer' or 'model' and grid at least 2, got {self.among!r}, {self.grid}"
            )

    def default_probe(self) -> Any:
        if self.stack != "text":
            raise AnalysisError(
                f"probe must be given for stack {self.stack!r}: an iterable of inputs, as model.encode makes them"
            )
        from probes.text import Passages

        return Passages(length=128)

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        maps = pooled_maps(model, inputs_of(sample, model), self.stack, self.grid)
        shape = (maps.sizes["layer"], maps.sizes["head"])
        layer = np.repeat(np.arange(shape[0]), shape[1])
        others = ~np.eye(len(layer), dtype=bool)
        if self.among == "layer":
            others &= layer[:, None] == layer
        found: list[tuple[Floats, Floats]] = []
        for part in maps.transpose("sample", "layer", "head", ...).values:
            shared = overlap(part.reshape(len(layer), *part.shape[2:]))
            found.append((_over(shared, others, np.nanmax), _over(shared, others, np.nanmean)))
        coords = {"layer": maps["layer"].values, "head": maps["head"].values}
        value, null = (
            on_grid(
                xr.DataArray(np.stack([f[n] for f in found]).reshape(-1, *shape), dims=("sample", "layer", "head"), coords=coords),
                model, self.stack,
            )
            for n in (0, 1)
        )  # fmt: skip
        return value, null


def head_similarity(model: Any, probe: Any, *, stack: str = "text", grid: int = 32) -> xr.DataArray:
    """Overlap ``[layer, head, other_layer, other_head]`` of every two heads, mean over samples; 1 on the diagonal.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        probe: a probe, or an iterable of inputs.
        stack: whose heads.
        grid: of the pooled maps.
    """
    model = as_model(model)
    require_stack(model, stack)
    total, count, maps = 0.0, 0, None
    for sample in build(probe, model):
        with torch.no_grad():
            maps = pooled_maps(model, inputs_of(sample, model), stack, grid)
        for part in maps.transpose("sample", "layer", "head", ...).values:
            total = total + overlap(part.reshape(-1, *part.shape[2:]))
            count += 1
    assert maps is not None
    shape = (maps.sizes["layer"], maps.sizes["head"])
    coords = {"layer": maps["layer"].values, "head": maps["head"].values}
    coords |= {f"other_{name}": values for name, values in coords.items()}
    return xr.DataArray(
        (np.asarray(total) / count).reshape(shape * 2), dims=("layer", "head", "other_layer", "other_head"), coords=coords,
        attrs={"unit": "fraction of row mass", "stack": stack, "model": model.name},
    )  # fmt: skip


def pooled_maps(model: Model, inputs: Mapping[str, Any], stack: str, grid: int) -> xr.DataArray:
    """Pooled maps ``[sample, layer, head, query_block, key_block]`` whose rows sum to 1."""
    pooled = forward(model, inputs, Capture(pooled=grid, stacks=(stack,)), stack)["pooled"]
    total = pooled.sum("key_block", skipna=False)
    return (pooled / total.where(total > 0)).transpose("sample", "layer", "head", "query_block", "key_block")


def overlap(maps: Floats) -> Floats:
    """Mean over rows of the weight that two maps share, ``[n, n]`` for ``[n, row, key]``; rows that are NaN are left out."""
    out = np.empty((len(maps), len(maps)))
    for n, one in enumerate(maps):
        least = np.minimum(one[None], maps[n:]).sum(-1)
        there = ~np.isnan(least)
        with np.errstate(invalid="ignore"):
            out[n, n:] = out[n:, n] = np.where(there, least, 0).sum(-1) / there.sum(-1)
    return out


def _over(shared: Floats, others: NDArray[np.bool_], what: Any) -> Floats:
    import warnings

    masked = np.where(others, shared, np.nan)
    with warnings.catch_warnings():
        # A layer with one head has no other.
        warnings.simplefilter("ignore", RuntimeWarning)
        return what(masked, axis=1)
