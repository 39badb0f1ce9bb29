"""The full attention maps of one sample of a trace with their tokens, pads left out: what every export of maps begins with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from interp.tracing.trace import Trace

IMAGE = 2
"""The kind of a position that holds a patch of an image (:data:`interp.models.layout.KINDS`)."""


class ExportError(ValueError):
    """A trace that does not hold what an export needs."""


class Maps(NamedTuple):
    """Maps of one sample.

    Attributes:
        attention: fp32 ``[layer, head, query, key]``; a layer without heads of this kind is NaN.
        layers: their numbers.
        heads: their numbers.
        queries: text of each query's token.
        keys: text of each key's token.
        query_ids: token ids of the queries; -1 where a position has none (a patch).
        kinds: of the keys (special, text, image, generated).
        cross: keys are another sequence.
    """

    attention: NDArray[np.float32]
    layers: list[int]
    heads: list[int]
    queries: list[str]
    keys: list[str]
    query_ids: NDArray[np.int64]
    kinds: NDArray[np.int64]
    cross: bool

    @property
    def there(self) -> list[int]:
        """Places (not numbers) of the layers that have the map of some head."""
        return sorted({i for i, _ in self.pairs})

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Places of layer and head that have a map."""
        known = ~np.isnan(self.attention).any(axis=(2, 3))
        return [(int(i), int(j)) for i, j in np.argwhere(known)]


def maps_of(trace: Trace, stack: str, sample: int) -> Maps:
    """The maps of one sample.

    Args:
        trace: of a run with ``Capture(attention=True)``.
        stack: which.
        sample: its number in the trace.

    Raises:
        ExportError: no such stack or sample, no full map, or not every row of it.
    """
    held = dataset(trace, stack)
    if isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < held.sizes["sample"]:
        raise ExportError(f"sample must be one of 0..{held.sizes['sample'] - 1}, got {sample!r}")
    one = held.isel(sample=sample)
    cross = stack == "cross" or one.sizes["query"] != one.sizes["key"]
    rows = one["query"].values
    if not np.array_equal(rows, np.arange(len(rows))) or (stack != "cross" and cross):
        n = one.sizes["key"]
        raise ExportError(
            f"trace must hold every row of stack {stack!r}, 0..{n - 1}: trace again with queries='all'; got {_brief(rows)}"
        )
    kinds = one["kind"].values.astype(np.int64) if "kind" in one.coords else np.ones(one.sizes["key"], np.int64)
    keys = kinds >= 0
    attention = one["attention"].transpose("layer", "head", "query", "key").values
    read: NDArray[np.bool_] = np.asarray(~np.isnan(attention).all(axis=(0, 1, 3)))
    queries = read if stack == "cross" else read & keys
    if not queries.any():
        raise ExportError(f"trace must hold rows of sample {sample} in stack {stack!r}, got none")
    if stack != "cross":
        keys = queries
    names = [str(t) for t in one["token"].values] if "token" in one.coords else [str(n) for n in one["key"].values]
    fed = [str(t) for t in one["token_fed"].values] if stack == "cross" and "token_fed" in one.coords else names
    if stack == "cross" and "token_fed" not in one.coords:
        fed = [str(n) for n in rows]
    ids = one["token_fed_id"].values if "token_fed_id" in one.coords else np.full(len(rows), -1)
    return Maps(
        np.ascontiguousarray(attention[:, :, queries][..., keys], np.float32),
        [int(n) for n in one["layer"].values], [int(n) for n in one["head"].values],
        [t for t, kept in zip(fed, queries, strict=True) if kept], [t for t, kept in zip(names, keys, strict=True) if kept],
        np.asarray(ids, np.int64)[queries], kinds[keys], stack == "cross",
    )  # fmt: skip


def dataset(trace: Trace, stack: str) -> xr.Dataset:
    """The stack's Dataset, with the full map in it.

    Raises:
        ExportError: it is not there.
    """
    if stack not in trace:
        raise ExportError(f"stack must be one of {list(trace)}, got {stack!r}")
    held = trace[stack]
    if "attention" not in held:
        has = ", ".join(map(str, held.data_vars)) or "none"
        raise ExportError(
            f"trace must hold the full maps of stack {stack!r}: trace again with Capture(attention=True). Captured here: {has}"
        )
    return held


def _brief(rows: Any) -> str:
    return f"{len(rows)} rows, {rows[0]}..{rows[-1]}" if len(rows) else "none"
