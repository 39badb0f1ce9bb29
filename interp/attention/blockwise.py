"""The specification, tile by tile: exact, on any device, with memory linear in the number of tokens.

A tile is a few hundred query rows of a few heads against all keys that any of its rows may see; its probabilities
are the only thing of size rows x keys, and they live under a fixed byte budget. Because a tile holds whole rows, the
softmax needs no rescaling and every edit and reading is the one of :mod:`~interp.attention.reference`. What remains is
to choose tiles, to leave out keys that causality or a window hides from all rows of a tile, and to put readings together.

When something is to be differentiated, each tile is recomputed in the backward pass (torch's checkpoint), so that
memory stays linear there too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from interp.attention import reference
from interp.attention.call import Call, Places, Tile
from interp.attention.edits import (
    Blocks,
    Boost,
    DropKeys,
    Edit,
    Gain,
    GivenRows,
    GroupWeights,
    Neighbourhood,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    TopKeys,
    Uniform,
)
from interp.attention.kinds import LONGER, SHORT
from interp.attention.mask import Mask, Visible
from interp.attention.readouts import READING_AXES, Readings, Readout

# One fp32 temporary of a tile. On a CPU it should fit into cache together with its neighbours, yet have enough rows for
# the matrix products (4 MiB was the fastest of 0.5 to 8 MiB on a Xeon); on a GPU it should keep all cores busy.
TILE_BYTES = {"cpu": 4 << 20, "other": 256 << 20}
MIN_ROWS, MAX_ROWS = 16, 256


def supports(call: Call) -> str | None:
    """None: this backend has everything."""
    return None


def run(call: Call, tile_bytes: int | None = None) -> tuple[Tensor | None, Readings]:
    """Give z ``[B, Lq, H, Dv]`` in q's dtype (None where not wanted) and the readings.

    Args:
        call: the call.
        tile_bytes: byte budget of one temporary; None takes the device's.
    """
    if one_tile(call, tile_bytes):
        if call.memo is not None and SHORT not in call.memo and tile_bytes is None and Again.able(call):
            again = call.memo[SHORT] = Again.of(call)
            call.memo[LONGER] = again.of_length
        return reference.run(call)
    batch, heads, n_queries, _ = call.shape
    z = call.q.new_empty(batch, n_queries, heads, call.v.shape[-1]) if call.want_output else None
    gathered = Gathered(call, shared_visible=not visible_varies_by_head(call))
    differentiable = call.needs_grad
    seen: Visible | None = None
    rows_of_seen: tuple[tuple[int, int], tuple[int, int]] | None = None
    for tile in tiles(call, tile_bytes):
        if tile == call.whole:
            return reference.run(call)
        part, places = call.tile(tile)
        if not part.want_output and part.readout.empty:
            continue
        if not gathered.shared_visible or rows_of_seen != (tile.batch, tile.rows):
            seen = None
        if differentiable:
            part_z, readings, seen = checkpoint(
                reference.attend_tile, part, seen, use_reentrant=False, preserve_rng_state=False
            )
        else:
            part_z, readings, seen = reference.attend_tile(part, seen)
        rows_of_seen = (tile.batch, tile.rows)
        if z is not None and part_z is not None:
            z[slice(*tile.batch), slice(*tile.rows), slice(*tile.heads)] = part_z.transpose(1, 2).to(z.dtype)
        gathered.add(readings, tile, places)
    return z, gathered.finished()


@dataclass(eq=False)
class Again:
    """The way of later calls of a kind of which z alone is wanted, as every layer and token of a generation makes them."""

    scale: float
    mask: Mask
    softcap: float | None
    edit: Edit
    readout: Readout
    memo: dict[str, Any] = field(default_factory=dict[str, Any])

    @staticmethod
    def able(call: Call) -> bool:
        """Whether the way leads there; draws of :class:`TopKeys` are others at every call."""
        plain = call.want_output and call.readout.empty and not torch.is_grad_enabled()
        return plain and not call.edit.of(TopKeys)

    @classmethod
    def of(cls, call: Call) -> Again:
        return cls(call.scale, call.mask, call.softcap, call.edit, call.readout)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, groups: Tensor | None
    ) -> Tensor:
        edit, memo = self.edit, self.memo
        if groups is not None:
            edit, memo = edit.regrouped(groups[:, : k.shape[2]]), None
        z, _ = run(
            Call(
                q=q, k=k, v=v, scale=self.scale, mask=self.mask, softcap=self.softcap, sinks=sinks, bias=bias, edit=edit,
                readout=self.readout, want_output=True, memo=memo,
            )
        )  # fmt: skip
        assert z is not None
        return z

    def of_length(self, k: Tensor, v: Tensor, groups: Tensor | None) -> Again | None:
        """The way of calls whose one query row sees all of a cache of another length; None where the edit asks for places."""
        if any(type(op) not in PLACELESS for op in self.edit.operations):
            return None
        edit = self.edit if groups is None else self.edit.regrouped(groups[:, : k.shape[2]])
        return Again(self.scale, self.mask, self.softcap, edit, self.readout)


PLACELESS = frozenset((Gain, Temperature, Boost, Uniform, GroupWeights, Redistribute))
"""Operations that do not look at where a key lies, but for its group."""


def visible_varies_by_head(call: Call) -> bool:
    """Whether two heads of the call may see different keys."""
    tables = [call.mask.dense, call.bias]
    tables += [op.where for op in call.edit.of(SinkWindow, Blocks, Neighbourhood, DropKeys)]
    tables += [op.keys for op in call.edit.of(DropKeys)]
    if any(table is not None and table.shape[1] > 1 for table in tables):
        return True
    numbers = [x for op in call.edit.of(SinkWindow) for x in (op.sink, op.window)]
    numbers += [op.radius for op in call.edit.of(Neighbourhood)]
    if any(isinstance(number, Tensor) and number.numel() > 1 for number in numbers):
        return True
    return bool(call.edit.of(Threshold, TopKeys)) or any(op.allowed.shape[0] > 1 for op in call.edit.of(Blocks))


# Tiles


def tiles(call: Call, tile_bytes: int | None = None) -> Iterator[Tile]:
    """Tiles that cover the call; those of the same samples and rows follow each other."""
    batch, heads, n_queries, _ = call.shape
    n_rows, room = tile_sizes(call, tile_bytes)
    spans = list(head_spans(heads, heads // call.k.shape[1], room))
    n_samples = max(room // heads, 1)
    for samples in ranges(batch, n_samples):
        for rows in ranges(n_queries, n_rows):
            keys = key_range(call, samples, rows)
            for span in spans:
                yield Tile(samples, span, rows, keys)


def tile_sizes(call: Call, tile_bytes: int | None = None) -> tuple[int, int]:
    """Query rows of a tile, and how many heads of how many samples it may hold."""
    _, heads, n_queries, n_keys = call.shape
    budget = tile_bytes or TILE_BYTES.get(call.q.device.type, TILE_BYTES["other"])
    room = max(budget // (n_keys * call.dtype.itemsize), 1)
    n_rows = rows_per_tile(room, n_queries)
    room = max(room // n_rows, 1)
    if call.k.dtype != call.dtype:
        # The tile's keys and values are copied to the computation's dtype, which at few rows outweighs its scores.
        copied = n_keys * (call.k.shape[3] + call.v.shape[3]) * call.dtype.itemsize
        room = min(room, max(8 * budget // copied, 1) * (heads // call.k.shape[1]))
    return n_rows, room


def one_tile(call: Call, tile_bytes: int | None = None) -> bool:
    """Whether the call is plainly one tile, as steps of decoding are: what there is to choose costs as much as they do."""
    if call.mask.causal or call.mask.window is not None:
        return False  # Keys may be hidden from all rows.
    batch, heads, n_queries, _ = call.shape
    n_rows, room = tile_sizes(call, tile_bytes)
    return n_rows == n_queries and room >= batch * heads


def rows_per_tile(room: int, n_queries: int) -> int:
    """A power of two, so that tiles and the blocks of a pooled map nest; or all rows."""
    n_rows = max(min(room, MAX_ROWS), min(MIN_ROWS, room * 4))
    n_rows = 1 << (n_rows.bit_length() - 1)
    return n_queries if n_rows >= n_queries else n_rows


def head_spans(heads: int, group: int, room: int) -> Iterator[tuple[int, int]]:
    """Spans of at most ``room`` query heads that hold whole KV groups or lie within one."""
    if room >= group:
        yield from ranges(heads, room // group * group)
        return
    for first in range(0, heads, group):
        yield from ((first + start, first + stop) for start, stop in ranges(group, room))


def ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    yield from ((start, min(start + step, total)) for start in range(0, total, step))


def key_range(call: Call, samples: tuple[int, int], rows: tuple[int, int]) -> tuple[int, int]:
    """Key slots that these rows can have anything to do with, from a multiple of the pooled map's block edge on."""
    n_keys = call.shape[3]
    if any(bool(((op.rows >= rows[0]) & (op.rows < rows[1])).any()) for op in call.edit.of(GivenRows)):
        return 0, n_keys  # a given row may have mass where the mask hides keys
    start, stop = call.mask.rows(*rows).key_range(rows[1] - rows[0], n_keys)
    if call.pooled_edge:
        start = start // call.pooled_edge * call.pooled_edge
    return start, stop


# Assembly


@dataclass
class Gathered:
    """Readings of a whole call, filled tile by tile."""

    call: Call
    shared_visible: bool
    readings: Readings = field(default_factory=Readings)
    counted: tuple[tuple[int, int], tuple[int, int]] | None = None

    def add(self, part: Readings, tile: Tile, places: Places) -> None:
        """Put a tile's readings where they belong: sums over rows are added up, everything else is placed."""
        for name, piece in part.tensors().items():
            if name == "received_rows":
                self._add_received_rows(piece, tile, places)
                continue
            whole = self._whole(name, piece)
            index = self._index(name, tile, places)
            if name in ("received", "pooled", "offset"):
                whole[index] += piece
            else:
                whole[index] = piece
        self.readings.pooled_edge = part.pooled_edge or self.readings.pooled_edge

    def _whole(self, name: str, piece: Tensor) -> Tensor:
        whole = getattr(self.readings, name)
        if whole is None:
            whole = piece.new_zeros(self._shape(name, piece))
            setattr(self.readings, name, whole)
        return whole

    def _shape(self, name: str, piece: Tensor) -> list[int]:
        batch, heads, n_queries, n_keys = self.call.shape
        asked, edge = self.call.readout, max(self.call.pooled_edge, 1)
        sizes = {
            "batch": batch,
            "head": heads if asked.heads is None else len(asked.heads),
            "query": n_queries,
            "key": n_keys,
            "query_block": -(-n_queries // edge),
            "key_block": -(-n_keys // edge),
            "row": 0 if asked.rows is None else len(asked.rows),
            "output_row": 0 if asked.group_output is None else len(asked.group_output),
        }
        return [sizes.get(axis, own) for axis, own in zip(READING_AXES[name], piece.shape, strict=True)]

    def _index(self, name: str, tile: Tile, places: Places) -> tuple[slice | Tensor, ...]:
        edge = max(self.call.pooled_edge, 1)
        index: dict[str, slice | Tensor | None] = {
            "batch": slice(*tile.batch),
            "head": slice(*tile.heads) if places.heads is None else places.heads,
            "query": slice(*tile.rows),
            "key": slice(*tile.keys),
            "query_block": slice(tile.rows[0] // edge, -(-tile.rows[1] // edge)),
            "key_block": slice(tile.keys[0] // edge, -(-tile.keys[1] // edge)),
            "row": places.rows,
            "output_row": places.output_rows,
        }
        chosen = [index.get(axis, slice(None)) for axis in READING_AXES[name]]
        if isinstance(chosen[1], Tensor) and isinstance(chosen[2], Tensor):
            chosen[1] = chosen[1].unsqueeze(-1)  # every listed head at every listed row
        return tuple(x if x is not None else slice(None) for x in chosen)

    def _add_received_rows(self, piece: Tensor, tile: Tile, places: Places) -> None:
        """Counts of rows do not depend on the head where the visible set does not: then one tile of heads counts."""
        if self.shared_visible:
            if self.counted == (tile.batch, tile.rows):
                return
            self.counted = (tile.batch, tile.rows)
        whole = self.readings.received_rows
        if whole is None:
            shape = self._shape("received_rows", piece)
            whole = piece.new_zeros([shape[0], 1 if self.shared_visible else shape[1], *shape[2:]])
            self.readings.received_rows = whole
        batch, head, *rest = self._index("received_rows", tile, places)
        whole[(batch, slice(None) if self.shared_visible else head, *rest)] += piece

    def finished(self) -> Readings:
        readings = self.readings
        if readings.received_rows is not None and readings.received is not None:
            readings.received_rows = readings.received_rows.expand_as(readings.received)
        return readings
