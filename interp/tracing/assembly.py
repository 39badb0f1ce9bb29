"""From the pieces of a run to the labelled arrays of one stack."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.attention import pooled_edge
from interp.models.layout import Layout
from interp.tracing.stack_arrays import Piece, Places, StackArrays, span
from interp.tracing.stack_labels import blank_pads, coordinates, whole_sequences

if TYPE_CHECKING:
    from interp.tracing.calls import RunState
    from interp.tracing.capture import Capture
    from interp.tracing.runs import Sequences

__all__ = ["Piece", "assemble_stack"]

ROW_VARIABLES = {
    "lse": (),
    "top_weight": (),
    "top_key": (),
    "entropy": (),
    "mass": ("group",),
    "sink_share": (),
    "topk_weight": ("k",),
    "topk_key": ("k",),
    "distance": (),
    "distance_mass": (),
    "z": ("dim",),
}
"""Variables with a number, or one for each place of a last axis, for each query row."""


def assemble_stack(
    stack: str, layers: list[int], pieces: list[Piece], *, run: RunState, layout: Layout | None, sequences: Sequences | None,
    tokenizer: Any, capture: Capture,
) -> xr.Dataset:  # fmt: skip
    """One stack's Dataset. See :class:`~interp.tracing.trace.Trace` for dims and units."""
    out = StackArrays(stack, layers, pieces, run, layout, sequences)
    offsets = _offset_grid(out)
    most = max((_topk_of(piece) for piece in out.pieces), default=0)
    for piece in out.pieces:
        _row_readings(out, piece, most)
        _exact_rows(out, piece, capture)
        _columns(out, piece)
        _pooled(out, piece, capture)
        _offsets(out, piece, offsets)
    out.finish()
    key_layout, query_layout, ids = whole_sequences(out)
    coords = coordinates(out, tokenizer, capture, key_layout, query_layout, ids)
    blank_pads(out, query_layout)
    return xr.Dataset(dict(out.variables), coords=coords)


def _all(n: int) -> slice:
    return slice(0, n)


def _topk_of(piece: Piece) -> int:
    """How many largest keys a piece names: no more than there were."""
    found = None if piece.readings is None else piece.readings.topk_weight
    return 0 if found is None else found.shape[-1]


def _row_readings(out: StackArrays, piece: Piece, most: int) -> None:
    rows = out.rows_of(piece)
    if rows.start == rows.stop:
        return
    found: dict[str, Tensor] = {} if piece.readings is None else piece.readings.tensors()
    if piece.z is not None:
        found = {**found, "z": piece.z}
    for name, tail in ROW_VARIABLES.items():
        if name not in found:
            continue
        values = found[name][:, :, : rows.stop - rows.start]
        if tail == ("k",) and values.shape[3] < most:
            # A prompt may have fewer keys than what is generated after it.
            values = torch.nn.functional.pad(
                values, (0, most - values.shape[3]), value=0.0 if values.is_floating_point() else -1
            )
        sizes = tuple(values.shape[3:])
        out.array(name, ("query", *tail), (len(out.positions), *sizes), values)
        out.write(name, piece, values, rows, *map(_all, sizes))


def _exact_rows(out: StackArrays, piece: Piece, capture: Capture) -> None:
    readings = piece.readings
    if readings is None:
        return
    if readings.attention is not None and capture.attention:
        rows = out.rows_of(piece)
        if rows.start < rows.stop:
            values = readings.attention[:, :, : rows.stop - rows.start]
            _write_rows(out, piece, "attention", "query", len(out.positions), rows, values)
    if readings.rows is not None:
        named = out.named("rows")
        out.coords["row"] = list(named)
        kept, places = _kept(named, piece.rows)
        if len(kept):
            _write_rows(out, piece, "row_attention", "row", len(named), span(places), readings.rows[:, :, span(kept)])
    if readings.group_output is not None:
        named = out.named("output_rows")
        out.coords["output_row"] = list(named)
        kept, places = _kept(named, piece.output_rows)
        values = readings.group_output[:, :, span(kept)]
        sizes = tuple(values.shape[3:])
        out.array("group_output", ("output_row", "group", "dim"), (len(named), *sizes), values)
        out.write("group_output", piece, values, span(places), *map(_all, sizes))


def _kept(named: dict[int, int], mine: list[int]) -> tuple[list[int], list[int]]:
    """Which of a piece's exact rows are kept, and their places."""
    kept = [n for n, q in enumerate(mine) if q in named]
    return kept, [named[mine[n]] for n in kept]


def _write_rows(out: StackArrays, piece: Piece, name: str, dim: str, size: int, places: Places, values: Tensor) -> None:
    """Rows of p over all keys; keys the call did not have (to come, or fallen out of a sliding cache) got none: 0."""
    count = min(piece.key_start + piece.n_keys, out.n_keys) - piece.key_start
    values = values[..., :count]
    if count < out.n_keys:
        full = torch.zeros((*values.shape[:3], out.n_keys), dtype=torch.float32)
        full[..., piece.key_start : piece.key_start + count] = values.detach()
        values = full
    out.array(name, (dim, "key"), (size, out.n_keys), values)
    out.write(name, piece, values, places, _all(out.n_keys))


def _columns(out: StackArrays, piece: Piece) -> None:
    readings = piece.readings
    if readings is None or readings.received is None or readings.received_rows is None:
        return
    stop = min(piece.key_start + piece.n_keys, out.n_keys)
    for name, tensor in (("received", readings.received), ("received_rows", readings.received_rows)):
        values = tensor[..., : stop - piece.key_start]
        n_groups = values.shape[2]
        out.array(name, ("query_group", "key"), (n_groups, out.n_keys), values)
        out.write(name, piece, values, _all(n_groups), slice(piece.key_start, stop), add=True)


def _pooled(out: StackArrays, piece: Piece, capture: Capture) -> None:
    """Block sums; those of a packed tower's windows and images are made here, where the whole length is known."""
    readings = piece.readings
    if not capture.pooled or readings is None or piece.generated:
        return
    array = partial(out.array, "pooled", ("query_block", "key_block"))
    if readings.pooled is not None:
        values = readings.pooled
        sizes = tuple(values.shape[2:])
        out.coords["block_edge"] = readings.pooled_edge
        if array(sizes, values).shape[3:] == sizes:
            out.write("pooled", piece, values, *map(_all, sizes))
        return
    if readings.attention is None or out.decoder:
        return
    length = max(len(out.positions), out.n_keys)
    edge = pooled_edge(length, length, capture.pooled)
    blocks = -(-length // edge)
    out.coords["block_edge"] = edge
    p = readings.attention.detach().cpu().numpy()
    rows = np.arange(piece.start, piece.stop) // edge
    columns = np.arange(piece.key_start, piece.key_start + piece.n_keys) // edge
    sums = np.zeros((*p.shape[:2], blocks, p.shape[3]), np.float32)
    np.add.at(sums, _axis(2, rows), p)
    both = np.zeros((*p.shape[:2], blocks, blocks), np.float32)
    np.add.at(both, _axis(3, columns), sums)
    values = torch.from_numpy(both)
    array((blocks, blocks), values)
    out.write("pooled", piece, values, _all(blocks), _all(blocks), add=True)


def _axis(axis: int, places: Any) -> Any:
    """An index of ``places`` on one axis and everything before it."""
    return (*[slice(None)] * axis, places)


def _offset_grid(out: StackArrays) -> tuple[tuple[int, ...], np.ndarray[Any, Any]] | None:
    """The smallest offset of all pieces, and the number of each bin of the grid that holds them all."""
    mine = [p.offsets for p in out.pieces if p.offsets is not None]
    if not mine:
        return None
    lo = tuple(map(min, zip(*(b.lo for b in mine), strict=True)))
    hi = tuple(map(max, zip(*(b.hi for b in mine), strict=True)))
    shape = tuple(h - low + 1 for low, h in zip(lo, hi, strict=True))
    return lo, np.arange(int(np.prod(shape))).reshape(shape)


def _offsets(out: StackArrays, piece: Piece, grid: tuple[tuple[int, ...], np.ndarray[Any, Any]] | None) -> None:
    readings, bins = piece.readings, piece.offsets
    if readings is None or readings.offset is None or bins is None or grid is None:
        return
    lo, numbers = grid
    own = numbers[tuple(slice(a - low, b - low + 1) for a, b, low in zip(bins.lo, bins.hi, lo, strict=True))].ravel()
    total = numbers.size
    if "offset" not in out.variables:
        cells = np.indices(numbers.shape).reshape(len(lo), -1) + np.array(lo)[:, None]
        names = ("offset_position",) if len(lo) == 1 else ("offset_row", "offset_column")
        for name, cell in zip(names, cells, strict=True):
            out.coords[name] = ("offset", np.append(cell.astype(float), np.nan))
        out.coords["offset_special"] = ("offset", np.append(np.zeros(total, bool), True))
    out.array("offset", ("offset",), (total + 1,), readings.offset)
    out.write("offset", piece, readings.offset, span(np.append(own, total)), add=True)
