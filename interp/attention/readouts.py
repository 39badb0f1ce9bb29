"""What is asked of attention at one site in one call (:class:`Readout`), and the answer (:class:`Readings`).

All readings are of the final p (after every edit), fp32 / int32 (fp64 where the inputs are), from unrounded p.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

MAX_TOPK = 8


@dataclass(frozen=True, eq=False)
class OffsetBins:
    """A histogram of key-query offset ``coordinate(query) - coordinate(key)``, in 1-D (tokens) or 2-D (patches).

    Args:
        query_coords: int ``[B|1, Lq, n]``; a negative coordinate marks a special token.
        key_coords: int ``[B|1, Lk, n]``.
        lo: smallest offset counted, one entry a dimension.
        hi: largest offset counted, inclusive. Pairs outside ``lo..hi`` are not counted.
    """

    query_coords: Tensor
    key_coords: Tensor
    lo: tuple[int, ...]
    hi: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(h - low + 1 for low, h in zip(self.lo, self.hi, strict=True))


@dataclass(frozen=True, eq=False)
class Distances:
    """How far apart queries and keys are, by their coordinates in 1-D (tokens) or 2-D (patches).

    Args:
        query_coords: int ``[B|1, Lq, n]``; a negative coordinate marks a special token, which has no place.
        key_coords: int ``[B|1, Lk, n]``, likewise.
        hop: the largest difference over the dimensions (Chebyshev) in place of the Euclidean distance; the same in 1-D.
    """

    query_coords: Tensor
    key_coords: Tensor
    hop: bool = False


@dataclass(frozen=True, eq=False)
class Readout:
    """Which readings to return.

    Args:
        heads: int64 ``[Hs]``, the query heads to read (None is all); every reading's head axis has length Hs.
        groups: int8 ``[B|1, Lk]`` key groups for ``mass`` and ``group_output`` (None is one). Own, not the edit's.
        n_groups: number of key groups, at most 8.
        query_groups: int8 ``[B|1, Lq]``; rows of group -1 (pads) are not counted in ``received``, ``pooled``,
            ``offset``.
        n_query_groups: number of query groups.
        row_stats: ``lse``, ``top_weight``, ``top_key``, ``entropy``, ``mass``, ``sink_share``.
        topk: k in 0..8 for ``topk_weight`` and ``topk_key``.
        group_output: int64 ``[R]`` query rows of this call for which ``group_output`` is wanted.
        received: column sums per query group.
        pooled: block sums on a grid of at most P x P; 0 is none.
        offset: an :class:`OffsetBins`.
        distance: a :class:`Distances`, for ``distance`` and ``distance_mass``.
        rows: int64 ``[R]`` query rows of this call whose exact p is wanted.
        attention: the full map.
    """

    heads: Tensor | None = None
    groups: Tensor | None = None
    n_groups: int = 1
    query_groups: Tensor | None = None
    n_query_groups: int = 1
    row_stats: bool = False
    topk: int = 0
    group_output: Tensor | None = None
    received: bool = False
    pooled: int = 0
    offset: OffsetBins | None = None
    distance: Distances | None = None
    rows: Tensor | None = None
    attention: bool = False

    @property
    def empty(self) -> bool:
        return not (
            self.row_stats
            or self.topk
            or self.group_output is not None
            or self.received
            or self.pooled
            or self.offset is not None
            or self.distance is not None
            or self.rows is not None
            or self.attention
        )


READING_AXES: dict[str, tuple[str, ...]] = {
    "lse": ("batch", "head", "query"),
    "top_weight": ("batch", "head", "query"),
    "top_key": ("batch", "head", "query"),
    "entropy": ("batch", "head", "query"),
    "mass": ("batch", "head", "query", "group"),
    "sink_share": ("batch", "head", "query"),
    "topk_weight": ("batch", "head", "query", "k"),
    "topk_key": ("batch", "head", "query", "k"),
    "group_output": ("batch", "head", "output_row", "group", "dim"),
    "received": ("batch", "head", "query_group", "key"),
    "received_rows": ("batch", "head", "query_group", "key"),
    "pooled": ("batch", "head", "query_block", "key_block"),
    "offset": ("batch", "head", "offset"),
    "distance": ("batch", "head", "query"),
    "distance_mass": ("batch", "head", "query"),
    "rows": ("batch", "head", "row", "key"),
    "attention": ("batch", "head", "query", "key"),
}
"""Axes of each reading; ``row`` counts ``Readout.rows`` and ``output_row`` counts ``Readout.group_output``."""


@dataclass(eq=False)
class Readings:
    """The answer; a field is None where it was not asked for. H is the number of heads read, R of rows asked for.

    Attributes:
        lse: ``[B, H, Lq]`` natural log of the softmax denominator, sink included, before steps 4 and 5.
        top_weight: ``[B, H, Lq]`` largest p of the row.
        top_key: int32 ``[B, H, Lq]`` its absolute position; -1 where the row has no mass; ties go to the lowest.
        entropy: ``[B, H, Lq]`` -sum p ln p over keys, nats, not renormalised.
        mass: ``[B, H, Lq, G]`` sum of p per key group (fraction of row mass).
        sink_share: ``[B, H, Lq]`` probability that went to the model's learned sink.
        topk_weight: ``[B, H, Lq, k]`` in falling order; 0 where fewer keys have mass.
        topk_key: int32 ``[B, H, Lq, k]``; -1 likewise.
        group_output: ``[B, H, R, G, Dv]`` what each key group contributed to z (gain included); sums to z over G.
        received: ``[B, H, Gq, Lk]`` raw column sums.
        received_rows: int32 ``[B, H, Gq, Lk]`` number of counted rows that can see the key; an expanded view (stride 0
            over heads) where all heads see the same keys.
        pooled: ``[B, H, ceil(Lq / edge), ceil(Lk / edge)]`` block sums.
        pooled_edge: the block edge, the smallest power of two >= max(Lq, Lk) / P.
        offset: ``[B, H, bins + 1]`` summed p per offset (row-major over dimensions); the last bin has special tokens.
        distance: ``[B, H, Lq]`` sum of p times distance over the keys that have a place; 0 in the row of a special token.
        distance_mass: ``[B, H, Lq]`` sum of p over the same keys, 0 likewise; their quotient is the mean distance.
        rows: ``[B, H, R, Lk]`` exact rows of p.
        attention: ``[B, H, Lq, Lk]`` the full map.
        backend: which backend computed the call.
    """

    lse: Tensor | None = None
    top_weight: Tensor | None = None
    top_key: Tensor | None = None
    entropy: Tensor | None = None
    mass: Tensor | None = None
    sink_share: Tensor | None = None
    topk_weight: Tensor | None = None
    topk_key: Tensor | None = None
    group_output: Tensor | None = None
    received: Tensor | None = None
    received_rows: Tensor | None = None
    pooled: Tensor | None = None
    pooled_edge: int | None = None
    offset: Tensor | None = None
    distance: Tensor | None = None
    distance_mass: Tensor | None = None
    rows: Tensor | None = None
    attention: Tensor | None = None
    backend: str | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The readings that are there, by name."""
        present = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in present if isinstance(value, Tensor)}


def pooled_edge(n_queries: int, n_keys: int, grid: int) -> int:
    """Smallest power of two that covers ``max(n_queries, n_keys)`` with at most ``grid`` blocks."""
    edge = 1
    while edge * grid < max(n_queries, n_keys):
        edge *= 2
    return edge
