"""Numbers per head that a trace of one prompt holds: what the overview can be coloured by at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

Floats = NDArray[np.float32]
GU = "Gu et al. 2025, https://arxiv.org/abs/2410.10781"


@dataclass(frozen=True)
class Metric:
    """A number per head of one prompt.

    Attributes:
        key: in addresses.
        name: shown.
        unit: of the value.
        definition: one line.
        paper: reference, empty for our own.
        needs: variables of the trace.
        values: ``[layer, head]`` of the stack's Dataset, over the trace's own layers.
    """

    key: str
    name: str
    unit: str
    definition: str
    paper: str
    needs: tuple[str, ...]
    values: Callable[[xr.Dataset], xr.DataArray]


def metrics_of(data: xr.Dataset) -> list[Metric]:
    """Those whose variables the trace has; a mass only for groups that occur in the prompt."""
    found = [m for m in _PLAIN if set(m.needs) <= set(data.variables)]
    if "mass" in data.variables and "group" in data.coords:
        seen = data["mass"].sum([d for d in data["mass"].dims if d != "group"], skipna=True).values
        names = [str(g) for g in data["group"].values]
        found += [_mass(name) for name, total in zip(names, seen, strict=True) if total > 0]
    if "sink_share" in data.variables and float(data["sink_share"].max()) == 0:
        found = [m for m in found if m.key != "sink_share"]
    return found


def grid_of(data: xr.Dataset, values: xr.DataArray) -> Floats:
    """``[layer, head]`` from layer 0 and head 0 on, NaN where the stack has no such head."""
    layers, heads = int(data["layer"].max()) + 1, int(data["head"].max()) + 1
    full = values.transpose("layer", "head").reindex(layer=range(layers), head=range(heads))
    return full.values.astype(np.float32)


def received_mean(data: xr.Dataset, group: str | None = None) -> xr.DataArray:
    """Mean attention that a key receives from the rows that can see it, ``[layer, head, key]``, over samples and query groups.

    Args:
        group: only rows of this query group (``prefill``, ``generated``).
    """
    sums, rows = data["received"], data["received_rows"]
    if group is not None:
        sums, rows = sums.sel(query_group=group), rows.sel(query_group=group)
    over = [d for d in ("sample", "query_group") if d in sums.dims]
    total = sums.sum(over, skipna=True)
    count = rows.sum(over)
    return (total / count.where(count > 0)).where(sums.notnull().any(over))


def pooled_mean(data: xr.Dataset) -> Floats:
    """Pooled maps as mean mass of a row on a block of keys, ``[layer, head, query block, key block]``, first sample.

    Block sums are divided by the rows of the block, so rows of blocks sum to 1 (less where a sink logit takes a share).
    """
    sums = data["pooled"].isel(sample=0).transpose("layer", "head", "query_block", "key_block")
    edge = int(data["block_edge"])
    prefill = int((data["phase"].values == "prefill").sum()) if "phase" in data.coords else data.sizes.get("query", 0)
    count = np.clip(prefill - np.arange(sums.sizes["query_block"]) * edge, 1, edge)
    values = (sums / xr.DataArray(count, dims="query_block")).transpose(*sums.dims)
    layers, heads = int(data["layer"].max()) + 1, int(data["head"].max()) + 1
    return values.reindex(layer=range(layers), head=range(heads)).values.astype(np.float32)


def _over_rows(array: xr.DataArray) -> xr.DataArray:
    return array.mean([d for d in array.dims if d not in ("layer", "head")], skipna=True)


def _mass(group: str) -> Metric:
    return Metric(
        f"mass_{group}", f"mass on {group} keys", "fraction of row mass",
        f"mean over rows of the attention a head spends on {group} keys", "", ("mass",),
        lambda data: _over_rows(data["mass"].sel(group=group)),
    )  # fmt: skip


def _first_key(data: xr.Dataset) -> xr.DataArray:
    return received_mean(data).isel(key=0)


def _reach(data: xr.Dataset) -> xr.DataArray:
    top = data["top_key"]
    return _over_rows((data["query"] - top).where(top >= 0).pipe(np.abs))


_PLAIN = (
    Metric(
        "entropy", "row entropy", "nats", "mean over rows of -sum p ln p: low is focused, high is diffuse", "", ("entropy",),
        lambda data: _over_rows(data["entropy"]),
    ),
    Metric(
        "first_key", "attention to the first key", "fraction of row mass",
        "mean attention that position 0 receives from the rows that see it", GU, ("received", "received_rows"), _first_key,
    ),
    Metric(
        "top_weight", "largest weight of a row", "fraction of row mass", "mean over rows of the largest attention weight", "",
        ("top_weight",), lambda data: _over_rows(data["top_weight"]),
    ),
    Metric(
        "reach", "distance to the top key", "positions", "mean over rows of |query - key with the largest weight|", "",
        ("top_key",), _reach,
    ),
    Metric(
        "sink_share", "share of the sink logit", "fraction of row mass", "mean over rows of what a learned sink logit takes", "",
        ("sink_share",), lambda data: _over_rows(data["sink_share"]),
    ),
)  # fmt: skip
