"""One call of the op with all its arguments, and its restriction to a tile (some samples, heads, query rows and keys).

The specification in :mod:`~interp.attention.reference` works on a :class:`Call`. Because a tile of a call is a call
again (positions are absolute, see :class:`~interp.attention.mask.Mask`), the memory-linear backend runs the very same
functions tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from interp.attention.edits import (
    Blocks,
    Boost,
    DropKeys,
    Edit,
    Gain,
    GivenRows,
    GroupWeights,
    Neighbourhood,
    Operation,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    TopKeys,
    Uniform,
)
from interp.attention.mask import Mask
from interp.attention.readouts import Distances, OffsetBins, Readout

AXES: dict[type, dict[str, str]] = {
    Gain: {"value": "bhq", "where": "bhq"},
    Temperature: {"value": "bhq", "where": "bhq"},
    Boost: {"beta": "bhq.", "where": "bhq"},
    SinkWindow: {"sink": "h", "window": "h", "where": "bhq"},
    Blocks: {"allowed": "h..", "where": "bhq"},
    Neighbourhood: {"radius": "h", "query_coords": "bQ.", "key_coords": "bK.", "where": "bhq"},
    Threshold: {"value": "bhq", "where": "bhq"},
    DropKeys: {"keys": "bhq.", "where": "bhq"},
    TopKeys: {"draws": "bhq.", "where": "bhq"},
    Uniform: {"where": "bhq"},
    GroupWeights: {"weight": "bh..", "where": "bhq"},
    Redistribute: {"fraction": "bhq", "where": "bhq"},
    Edit: {"groups": "bK", "query_groups": "bQ"},
    OffsetBins: {"query_coords": "bQ.", "key_coords": "bK."},
    Distances: {"query_coords": "bQ.", "key_coords": "bK."},
    Readout: {"groups": "bK", "query_groups": "bQ"},
}
"""Axes of every tensor of an edit or readout: b, h, q may be 1 wide and stand for all, Q and K may not, . is free."""


@dataclass(frozen=True)
class Tile:
    """Half-open ranges of samples, query heads, query rows and key slots of a call."""

    batch: tuple[int, int]
    heads: tuple[int, int]
    rows: tuple[int, int]
    keys: tuple[int, int]

    def cut(self, tensor: Tensor, axes: str) -> Tensor:
        """The tile's part of a tensor whose axes are named as in :data:`AXES`."""
        ranges = {"b": self.batch, "h": self.heads, "q": self.rows, "Q": self.rows, "k": self.keys, "K": self.keys}
        for axis, name in enumerate(axes):
            if name == "." or (name in "bhqk" and tensor.shape[axis] == 1):
                continue
            start, stop = ranges[name]
            if stop - start != tensor.shape[axis]:
                tensor = tensor.narrow(axis, start, stop - start)
        return tensor

    def cut_fields(self, thing: Any) -> dict[str, Tensor]:
        """The tile's part of the tensors of an operation, edit or readout, by field."""
        values = {name: getattr(thing, name) for name in AXES[type(thing)]}
        axes = AXES[type(thing)]
        return {name: self.cut(value, axes[name]) for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Places:
    """Where a tile's readings belong on the axes that a readout chooses itself; None is a plain range."""

    heads: Tensor | None = None
    rows: Tensor | None = None
    output_rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """The validated arguments of :func:`~interp.attention.api.attend`, with defaults filled in.

    ``pooled_edge`` is the block edge of the whole call's pooled map (0 without one); a tile keeps it. ``lse`` is the
    log-sum-exp where the caller knows it. ``memo`` is where a backend keeps what calls of the same kind share.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Mask
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None
    edit: Edit
    readout: Readout
    want_output: bool
    pooled_edge: int = 0
    lse: Tensor | None = None
    memo: dict[str, Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, query heads, query rows, keys."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2]

    @property
    def whole(self) -> Tile:
        batch, heads, rows, keys = self.shape
        return Tile((0, batch), (0, heads), (0, rows), (0, keys))

    @property
    def needs_grad(self) -> bool:
        """Whether anything of this call will be differentiated."""
        if not torch.is_grad_enabled():
            return False
        given = [self.q, self.k, self.v, self.sinks, self.bias]
        given += [getattr(op, f.name) for op in self.edit.operations for f in fields(op)]
        return any(isinstance(x, Tensor) and x.requires_grad for x in given)

    def tile(self, tile: Tile) -> tuple[Call, Places]:
        """This call restricted to a tile, which holds whole KV groups or lies within one."""
        group = self.q.shape[1] // self.k.shape[1]
        kv = tile.heads[0] // group, -(-tile.heads[1] // group)
        kv_tile = replace(tile, heads=kv)
        mask = self.mask.batch(*tile.batch).heads(*tile.heads).rows(*tile.rows).keys(*tile.keys)
        readout, places = _tile_readout(self.readout, tile)
        part = replace(
            self,
            q=tile.cut(self.q, "bhQ."),
            k=kv_tile.cut(self.k, "bhK."),
            v=kv_tile.cut(self.v, "bhK."),
            mask=mask,
            sinks=None if self.sinks is None else tile.cut(self.sinks, "h"),
            bias=None if self.bias is None else tile.cut(self.bias, "bhqK"),
            edit=tile_edit(self.edit, tile),
            readout=readout,
            lse=None,
            memo=None,
        )
        return part, places


def tile_edit(edit: Edit, tile: Tile) -> Edit:
    """The part of an edit that acts on a tile."""
    if not edit.operations:
        return edit
    operations = [
        _tile_given_rows(op, tile) if isinstance(op, GivenRows) else _tile_operation(op, tile) for op in edit.operations
    ]
    kept = tuple(op for op in operations if op is not None)
    return replace(edit, operations=kept, n_groups=edit.key_groups, **tile.cut_fields(edit))


def _tile_operation(op: Operation, tile: Tile) -> Operation | None:
    """The operation on the tile, None where it selects nothing there."""
    part = replace(op, **tile.cut_fields(op))
    where: Tensor | None = getattr(part, "where", None)
    return part if where is None or bool(where.any()) else None


def _tile_given_rows(op: GivenRows, tile: Tile) -> GivenRows | None:
    heads, head_places = _inside(op.heads, tile.heads)
    rows, row_places = _inside(op.rows, tile.rows)
    if not len(heads) or not len(rows):
        return None
    p = tile.cut(op.p, "b..K")[:, head_places][:, :, row_places]
    return GivenRows(heads=heads, rows=rows, p=p)


def _tile_readout(readout: Readout, tile: Tile) -> tuple[Readout, Places]:
    if readout.empty:
        return readout, Places()
    heads = head_places = None
    if readout.heads is not None:
        heads, head_places = _inside(readout.heads, tile.heads)
        if not len(heads):
            return Readout(), Places()
    rows, row_places = _inside_or_none(readout.rows, tile.rows)
    output_rows, output_places = _inside_or_none(readout.group_output, tile.rows)
    offset, distance = readout.offset, readout.distance
    if offset is not None:
        offset = replace(offset, **tile.cut_fields(offset))
    if distance is not None:
        distance = replace(distance, **tile.cut_fields(distance))
    part = replace(
        readout, heads=heads, rows=rows, group_output=output_rows, offset=offset, distance=distance,
        **tile.cut_fields(readout),
    )  # fmt: skip
    return part, Places(head_places, row_places, output_places)


def _inside(numbers: Tensor, span: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The numbers within a range, counted from its start, and their places in ``numbers``."""
    places = torch.nonzero((numbers >= span[0]) & (numbers < span[1])).flatten()
    return numbers[places] - span[0], places


def _inside_or_none(numbers: Tensor | None, span: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    if numbers is None:
        return None, None
    inside, places = _inside(numbers, span)
    return (inside, places) if len(inside) else (None, None)
