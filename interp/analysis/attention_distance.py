"""How far heads look: mean attention distance, and the k-hop profile of vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr

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
from interp.models.anatomy import anatomy
from interp.models.layout import layout
from interp.models.model import Model
from interp.tracing.capture import Capture

SPECIAL = 0


@dataclass(frozen=True)
class AttentionDistance(HeadScore):
    """Mean attention distance, Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, figure 7 (reference snippet of Keras).

    Formula: ``1 / N sum_i sum_j A_ij d(i, j)`` over ordinary queries and keys: patches on their grid, or tokens in a row; CLS, BOS and
    other special tokens are left out on both sides *without* renormalising, as the snippet does. From ``distance`` and
    ``distance_mass``, linear in length.

    Unit: patches (``metric="euclidean"``: of their centres; ``"hop"``: Chebyshev rings) or tokens; times the patch's edge in pixels it
    is the paper's.

    Args:
        stack: which heads; ``vision`` for the paper's.
        metric: ``"euclidean"`` or ``"hop"``; the same in one dimension.
        renormalise: divide by the weight between ordinary tokens: mass on CLS otherwise shortens the distance.

    Probe: ``Passages`` for text; an iterable of inputs, such as ``ImageFolder``, for images.
    Control: a head that spreads its attention evenly over all keys that it can see.
    When not to use: for packed images (Qwen-VL), whose offsets are within one image.
    """

    name: ClassVar[str] = "attention_distance"
    summary: ClassVar[str] = "mean distance between a query and what it looks at"
    paper: ClassVar[str] = "Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929"
    unit: ClassVar[str] = "patches or tokens"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "Passages"
    control: ClassVar[str] = "a uniform head"

    stack: str = "text"
    metric: Literal["euclidean", "hop"] = "euclidean"
    renormalise: bool = False

    def __post_init__(self) -> None:
        if self.metric not in ("euclidean", "hop"):
            raise AnalysisError(f"metric must be 'euclidean' or 'hop', got {self.metric!r}")

    @property
    def result_unit(self) -> str:
        return "tokens" if self.stack == "text" else "patches"

    def default_probe(self) -> Any:
        if self.stack != "text":
            raise AnalysisError(
                f"probe must be given for stack {self.stack!r}: an iterable of inputs, as model.encode makes them"
            )
        from probes.text import Passages

        return Passages(length=128)

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        inputs = inputs_of(sample, model)
        data = forward(model, inputs, Capture(distance=self.metric, stacks=(self.stack,)), self.stack)
        places = places_of(model, inputs, self.stack)
        ordinary = (~np.isnan(places)).all(-1).sum(-1)
        total, weighted = (row_sums(data[name]) for name in ("distance_mass", "distance"))
        n = total if self.renormalise else xr.DataArray(ordinary, dims="sample")
        value = on_grid(weighted / n, model, self.stack)
        causal = all(site.causal for site in anatomy(model.module).stacks[self.stack])
        uniform = np.array([uniform_distance(p, self.metric, causal, self.renormalise) for p in places])
        return value, np.where(np.isnan(value), np.nan, uniform[:, None, None])


def row_sums(by_row: xr.DataArray) -> xr.DataArray:
    """Sums over the rows that were read, in double precision; NaN where none was."""
    return by_row.astype(np.float64).sum("query", min_count=1)


def places_of(model: Model, inputs: Mapping[str, Any], stack: str) -> Floats:
    """Places ``[sample, position, 1 | 2]`` of ordinary tokens or patches, NaN for special ones (all without pads).

    Raises:
        AnalysisError: the layout of the stack is not known.
    """
    found = layout(model.module, inputs, model.tokenizer).get(stack)
    if found is None:
        raise AnalysisError(f"the layout of stack {stack!r} of {type(model.module).__name__} is not known")
    if stack not in ("text", "encoder") and (found.row >= 0).any():
        cells = np.stack([found.row, found.column], -1).astype(np.float64)
        return np.where(cells >= 0, cells, np.nan)
    if (found.kind < 0).any():
        raise AnalysisError("samples must be without pads: give them one by one")
    positions = np.where(found.kind == SPECIAL, np.nan, np.arange(found.shape[1]))
    return positions[..., None]


def uniform_distance(places: Floats, metric: str, causal: bool, renormalise: bool) -> float:
    """Mean distance of a head that gives all visible keys one weight, of places ``[position, 1 | 2]``."""
    there = ~np.isnan(places).any(-1)
    if causal:
        # Running sums: a prompt of 128k tokens has no map of distances.
        at = np.nan_to_num(places[:, 0])
        count, summed = there.cumsum(), (at * there).cumsum()
        seen = count if renormalise else np.arange(1, len(at) + 1)
        rows = (at * count - summed) / np.maximum(seen, 1)
        return float(rows[there].mean())
    cells = places[there]
    gaps = np.abs(cells[:, None] - cells[None])
    distance = np.sqrt((gaps**2).sum(-1)) if metric == "euclidean" else gaps.max(-1)
    return float(distance.mean() if renormalise else distance.sum(-1).mean() / len(places))


def hop_profile(model: Any, probe: Any, *, stack: str = "vision") -> xr.Dataset:
    """k-hop spatial profile of a vision transformer's heads, mean over images. The definitions are ours.

    Ring k of a patch: the patches at Chebyshev distance k on the grid, cut at its border. ``mass_k = 1 / N sum_i sum over ring_k(i) of
    A_ij`` and ``strength_k``, the same with each ring's mean in place of its sum. The full maps of one image are held at a time.

    Args:
        model: one with patches on a single grid an image.
        probe: a probe, or an iterable of inputs.
        stack: whose heads.

    Returns:
        ``mass``, ``strength (layer, head, hop)``, ``special_to_patch``, ``patch_to_special``, ``special_to_special (layer, head)`` (mean
        over the rows of that kind), ``n`` images. The masses of a patch row add up to 1 with ``patch_to_special``.

    Raises:
        AnalysisError: no such stack, or positions without rows and columns.
    """
    model = as_model(model)
    require_stack(model, stack)
    parts: list[xr.Dataset] = []
    for sample in build(probe, model):
        inputs = inputs_of(sample, model)
        places = places_of(model, inputs, stack)
        if places.shape[-1] != 2:
            raise AnalysisError(f"stack {stack!r} must have patches with rows and columns")
        with torch.no_grad():
            data = forward(model, inputs, Capture(attention=True, stacks=(stack,)), stack)
        attention = data["attention"].transpose("sample", "layer", "head", "query", "key")
        parts += [_profile(attention.isel(sample=n), places[n]) for n in range(attention.sizes["sample"])]
    joined = xr.concat(parts, dim="image", join="outer")
    out = joined.mean("image")
    out["n"] = len(parts)
    return out.assign_attrs(unit="fraction of row mass", name="hop_profile", model=model.name, stack=stack)


def _profile(a: xr.DataArray, places: Floats) -> xr.Dataset:
    """Of one image: a ``[layer, head, query, key]``, places ``[position, 2]``."""
    patch = ~np.isnan(places).any(-1)
    gaps = np.abs(places[patch][:, None] - places[patch][None]).max(-1).astype(int)
    inner = a.values[..., patch, :][..., patch]
    n_hops = int(gaps.max()) + 1
    mass = np.empty((*inner.shape[:2], n_hops))
    strength = np.empty_like(mass)
    for hop in range(n_hops):
        ring = gaps == hop
        sums = np.where(ring, inner, 0).sum(-1)
        mass[..., hop] = sums.mean(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums / ring.sum(-1)
            # A patch in the middle has no far ring; the mean is over those that have one.
            strength[..., hop] = np.nanmean(means, axis=-1)
    special = ~patch

    def block(rows: Any, keys: Any) -> Floats:
        part = a.values[..., rows, :][..., keys]
        return part.sum(-1).mean(-1) if rows.any() else np.full(part.shape[:2], np.nan)

    heads = {"layer": a["layer"].values, "head": a["head"].values}
    return xr.Dataset(
        {
            "mass": (("layer", "head", "hop"), mass),
            "strength": (("layer", "head", "hop"), strength),
            "special_to_patch": (("layer", "head"), block(special, patch)),
            "patch_to_special": (("layer", "head"), block(patch, special)),
            "special_to_special": (("layer", "head"), block(special, special)),
        },
        coords={**heads, "hop": np.arange(n_hops)},
    )
