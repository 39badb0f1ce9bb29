"""From the pieces of a run to the labelled arrays of one stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from interp.attention import OffsetBins, Readings, pooled_edge
from interp.models.layout import KINDS, Layout

if TYPE_CHECKING:
    from interp.tracing.calls import RunState
    from interp.tracing.capture import Capture
    from interp.tracing.runs import Sequences

ROW_VARIABLES = (
    "lse",
    "top_weight",
    "top_key",
    "entropy",
    "mass",
    "sink_share",
    "topk_weight",
    "topk_key",
    "distance",
    "distance_mass",
)
Array = NDArray[Any]


@dataclass(eq=False)
class Piece:
    """Readings of one run of query rows of one site in one call; positions are absolute."""

    layer: int
    heads: list[int]
    n_heads: int
    sample: int
    batch: int
    start: int
    stop: int
    key_start: int
    n_keys: int
    generated: bool
    readings: Readings | None
    rows: list[int]
    output_rows: list[int]
    offsets: OffsetBins | None
    pooled: int
    z: Tensor | None
    forward: int


class StackArrays:
    """Arrays of one stack while they are filled; NaN (-1 for integers) is missing."""

    def __init__(
        self,
        stack: str,
        layers: list[int],
        pieces: list[Piece],
        run: RunState,
        layout: Layout | None,
        sequences: Sequences | None,
    ) -> None:
        self.stack, self.layers, self.run, self.layout, self.sequences = stack, layers, run, layout, sequences
        self.decoder = stack in ("text", "cross")
        self.pieces = self._surviving(pieces)
        self.heads = sorted({h for p in self.pieces for h in p.heads})
        self.positions = sorted({q for p in self.pieces for q in range(p.start, p.stop)})
        self.limit = self._limit()
        self.positions = [q for q in self.positions if self.limit is None or q < self.limit]
        self.n_keys = max((p.key_start + p.n_keys for p in self.pieces), default=0)
        if stack == "text" and self.limit is not None:
            self.n_keys = min(self.n_keys, self.limit)
        batch = max((p.sample + p.batch for p in self.pieces), default=0)
        beams = sequences.beams if sequences is not None and self.decoder else None
        self.beams = beams
        self.n_samples = len(beams) if beams is not None else batch
        self.variables: dict[str, tuple[tuple[str, ...], Array]] = {}
        self.coords: dict[str, Any] = {}
        self.place = {q: n for n, q in enumerate(self.positions)}

    def _surviving(self, pieces: list[Piece]) -> list[Piece]:
        """Without draft rows that a later forward fed again: those were rejected."""
        if not self.decoder or not any(p.generated for p in pieces):
            return pieces
        latest: dict[int, int] = {}
        for piece in pieces:
            for position in range(piece.start, piece.stop):
                latest[position] = max(latest.get(position, 0), piece.forward)
        # A forward that starts at or before a row drops every draft from there on, also where it fed fewer rows.
        starts: dict[int, int] = {}
        for piece in pieces:
            starts[piece.forward] = min(starts.get(piece.forward, piece.start), piece.start)
        order = sorted(starts)
        dropped_from = {f: min((starts[g] for g in order if g > f), default=np.inf) for f in order}
        return [p for p in pieces if not p.generated or p.start < dropped_from[p.forward]]

    def _limit(self) -> int | None:
        if not self.decoder:
            return None
        if self.sequences is not None and self.run.generating:
            return max(int(self.sequences.lengths.max()) - 1, 1)
        return None

    def samples_of(self, piece: Piece) -> tuple[Array, Array]:
        """``(target samples, rows of the piece)``, without samples that had stopped before a generated row."""
        if self.beams is not None and self.sequences is not None:
            targets = np.arange(self.n_samples)
            step = max(0, piece.stop - (self.run.prompt_length or 0)) if piece.generated else 0
            step = min(step, self.beams.shape[1] - 1)
            rows = self.beams[:, step]
            keep = rows >= 0
        else:
            rows = np.arange(piece.batch)
            targets = rows + piece.sample
            keep = np.ones(len(rows), bool)
        if piece.generated and self.sequences is not None and self.decoder:
            keep = keep & (piece.start < self.sequences.lengths[targets] - 1)
        return targets[keep], rows[keep]

    def array(self, name: str, dims: tuple[str, ...], sizes: tuple[int, ...], integer: bool = False) -> Array:
        """The variable ``(sample, layer, head, *dims)``, made on first use."""
        if name not in self.variables:
            shape = (self.n_samples, len(self.layers), len(self.heads), *sizes)
            filled = np.full(shape, -1, np.int32) if integer else np.full(shape, np.nan, np.float32)
            self.variables[name] = (("sample", "layer", "head", *dims), filled)
        return self.variables[name][1]

    def write(self, array: Array, piece: Piece, values: Array, *rest: Any, add: bool = False) -> None:
        """Put ``values [batch, head, ...]`` of a piece at its samples, layer and heads."""
        targets, rows = self.samples_of(piece)
        if not len(targets):
            return
        layer = self.layers.index(piece.layer)
        heads = [self.heads.index(h) for h in piece.heads]
        picked = values[_span(rows)]
        if picked.shape[1] == 1 and len(heads) > 1:
            picked = np.broadcast_to(picked, (picked.shape[0], len(heads), *picked.shape[2:]))
        spans = [_span(x) for x in (targets, np.array(heads), *rest)]
        if not add and all(isinstance(x, slice) for x in spans):
            # The usual case, whole heads and consecutive rows, without an index for every number.
            array[(spans[0], layer, *spans[1:])] = picked
            return
        for n, head in enumerate(heads):
            view = array[:, layer, head]
            where = (targets, *rest) if all(isinstance(r, slice) for r in rest) else np.ix_(targets, *rest)
            if add:
                before = view[where]
                view[where] = (
                    np.where(np.isnan(before), 0.0, before) + picked[:, n]
                    if array.dtype.kind == "f"
                    else np.maximum(before, 0) + picked[:, n]
                )
            else:
                view[where] = picked[:, n]


def assemble_stack(
    stack: str, layers: list[int], pieces: list[Piece], *, run: RunState, layout: Layout | None, sequences: Sequences | None,
    tokenizer: Any, capture: Capture,
) -> xr.Dataset:  # fmt: skip
    """One stack's Dataset. See :class:`~interp.tracing.trace.Trace` for dims and units."""
    out = StackArrays(stack, layers, pieces, run, layout, sequences)
    for piece in out.pieces:
        _row_readings(out, piece)
        _exact_rows(out, piece)
        _columns(out, piece)
        _pooled(out, piece, capture)
        _offsets(out, piece)
    if not capture.attention:
        out.variables.pop("attention", None)
    coords = _coordinates(out, tokenizer, capture)
    return xr.Dataset(dict(out.variables), coords=coords)


def _span(places: Any) -> Any:
    """Consecutive places as a slice, others as they are."""
    if isinstance(places, slice) or not len(places) or not bool((np.diff(places) == 1).all()):
        return places
    return slice(int(places[0]), int(places[-1]) + 1)


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()


def _row_readings(out: StackArrays, piece: Piece) -> None:
    inside = [q for q in range(piece.start, piece.stop) if q in out.place]
    if not inside:
        return
    rows = np.array([out.place[q] for q in inside])
    taken = _span(np.array([q - piece.start for q in inside]))
    found: dict[str, Tensor] = {} if piece.readings is None else piece.readings.tensors()
    if piece.z is not None:
        found = {**found, "z": piece.z}
    tails = {"mass": "group", "topk_weight": "k", "topk_key": "k", "z": "dim"}
    for name in (*ROW_VARIABLES, "z"):
        if name not in found:
            continue
        values = _numpy(found[name])[:, :, taken]
        tail = (tails[name],) if name in tails else ()
        sizes = (len(out.positions), *values.shape[3:])
        array = out.array(name, ("query", *tail), sizes, integer=values.dtype.kind == "i")
        extra = [np.arange(n) for n in values.shape[3:]]
        out.write(array, piece, values, rows, *extra)


def _exact_rows(out: StackArrays, piece: Piece) -> None:
    readings = piece.readings
    if readings is None:
        return
    if readings.attention is not None:
        _write_rows(
            out, piece, "attention", "query", out.positions, list(range(piece.start, piece.stop)), readings.attention
        )
    if readings.rows is not None:
        named = _named(out, "rows")
        out.coords["row"] = named
        _write_rows(out, piece, "row_attention", "row", named, piece.rows, readings.rows)
    if readings.group_output is not None:
        named = _named(out, "output_rows")
        out.coords["output_row"] = named
        kept = [n for n, q in enumerate(piece.output_rows) if q in named]
        values = _numpy(readings.group_output)[:, :, kept]
        array = out.array("group_output", ("output_row", "group", "dim"), (len(named), *values.shape[3:]))
        places = np.array([named.index(piece.output_rows[n]) for n in kept], dtype=int)
        out.write(array, piece, values, places, *[np.arange(n) for n in values.shape[3:]])


def _named(out: StackArrays, which: str) -> list[int]:
    """Absolute positions of the rows that any piece read exactly."""
    found = sorted({q for p in out.pieces for q in getattr(p, which)})
    return [q for q in found if out.limit is None or q < out.limit]


def _write_rows(
    out: StackArrays, piece: Piece, name: str, dim: str, named: list[int], mine: list[int], tensor: Tensor
) -> None:
    """Rows of p over all keys; keys the call did not have (to come, or fallen out of a sliding cache) got none: 0."""
    count = min(piece.key_start + piece.n_keys, out.n_keys) - piece.key_start
    kept = [n for n, q in enumerate(mine) if q in named]
    if not kept:
        return
    values = _numpy(tensor)[:, :, kept, :count]
    full = np.zeros((*values.shape[:3], out.n_keys), np.float32)
    full[..., piece.key_start : piece.key_start + count] = values
    array = out.array(name, (dim, "key"), (len(named), out.n_keys))
    out.write(array, piece, full, np.array([named.index(mine[n]) for n in kept]), np.arange(out.n_keys))


def _columns(out: StackArrays, piece: Piece) -> None:
    readings = piece.readings
    if readings is None or readings.received is None or readings.received_rows is None:
        return
    count = min(piece.key_start + piece.n_keys, out.n_keys) - piece.key_start
    keys = np.arange(piece.key_start, piece.key_start + count)
    for name, tensor in (("received", readings.received), ("received_rows", readings.received_rows)):
        values = _numpy(tensor)[..., :count]
        array = out.array(name, ("query_group", "key"), (values.shape[2], out.n_keys), integer=values.dtype.kind == "i")
        out.write(array, piece, values, np.arange(values.shape[2]), keys, add=True)


def _pooled(out: StackArrays, piece: Piece, capture: Capture) -> None:
    """Block sums; those of a packed tower's windows and images are made here, where the whole length is known."""
    readings = piece.readings
    if not capture.pooled or readings is None or piece.generated:
        return
    if readings.pooled is not None:
        values = _numpy(readings.pooled)
        array = out.array("pooled", ("query_block", "key_block"), values.shape[2:])
        out.coords["block_edge"] = readings.pooled_edge
        if array.shape[3:] == values.shape[2:]:
            out.write(array, piece, values, np.arange(values.shape[2]), np.arange(values.shape[3]))
        return
    if readings.attention is None or out.decoder:
        return
    length = max(len(out.positions), out.n_keys)
    edge = pooled_edge(length, length, capture.pooled)
    blocks = -(-length // edge)
    out.coords["block_edge"] = edge
    array = out.array("pooled", ("query_block", "key_block"), (blocks, blocks))
    p = _numpy(readings.attention)
    rows = np.arange(piece.start, piece.stop) // edge
    columns = np.arange(piece.key_start, piece.key_start + piece.n_keys) // edge
    sums = np.zeros((*p.shape[:2], blocks, p.shape[3]), np.float32)
    np.add.at(sums, _axis(2, rows), p)
    both = np.zeros((*p.shape[:2], blocks, blocks), np.float32)
    np.add.at(both, _axis(3, columns), sums)
    out.write(array, piece, both, np.arange(blocks), np.arange(blocks), add=True)


def _axis(axis: int, places: Array) -> Any:
    """An index of ``places`` on one axis and everything before it."""
    return (*[slice(None)] * axis, places)


def _offsets(out: StackArrays, piece: Piece) -> None:
    readings, bins = piece.readings, piece.offsets
    if readings is None or readings.offset is None or bins is None:
        return
    mine = [p.offsets for p in out.pieces if p.offsets is not None]
    lo = tuple(min(b.lo[d] for b in mine) for d in range(len(bins.lo)))
    hi = tuple(max(b.hi[d] for b in mine) for d in range(len(bins.lo)))
    shape = tuple(h - low + 1 for low, h in zip(lo, hi, strict=True))
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    own = numbers[tuple(slice(a - low, b - low + 1) for a, b, low in zip(bins.lo, bins.hi, lo, strict=True))].ravel()
    total = numbers.size
    if "offset" not in out.variables:
        grid = np.stack(
            np.meshgrid(*[np.arange(a, b + 1) for a, b in zip(lo, hi, strict=True)], indexing="ij"), -1
        ).reshape(total, -1)
        names = ("offset_position",) if len(lo) == 1 else ("offset_row", "offset_column")
        for d, name in enumerate(names):
            out.coords[name] = ("offset", np.append(grid[:, d].astype(float), np.nan))
        out.coords["offset_special"] = ("offset", np.append(np.zeros(total, bool), True))
    array = out.array("offset", ("offset",), (total + 1,))
    out.write(array, piece, _numpy(readings.offset), np.append(own, total), add=True)


def _coordinates(out: StackArrays, tokenizer: Any, capture: Capture) -> dict[str, Any]:
    from interp.models.layout_tokens import strings

    coords: dict[str, Any] = {"layer": out.layers, "head": out.heads, "sample": np.arange(out.n_samples), **out.coords}
    used = {dim for dims, _ in out.variables.values() for dim in dims}
    if "group" in used:
        size = next(a.shape[dims.index("group")] for dims, a in out.variables.values() if "group" in dims)
        named = out.stack != "text" or capture.groups is None
        names = list(KINDS) if named else list(capture.group_names or map(str, range(size)))
        coords["group"] = names[:size]
    if "query_group" in used:
        coords["query_group"] = ["prefill", "generated"][
            : next(a.shape[3] for d, a in out.variables.values() if "query_group" in d)
        ]
    generated = {q for p in out.pieces if p.generated for q in range(p.start, p.stop)}
    key_layout, query_layout, ids = _sequences(out)
    if "query" in used:
        coords["query"] = np.array(out.positions, dtype=np.int64)
        coords["phase"] = (
            "query",
            np.array(["generated" if q in generated else "prefill" for q in out.positions], dtype="<U9"),
        )
        if ids is not None:
            fed = np.array([[row[q] if q < len(row) else -1 for q in out.positions] for row in ids]).reshape(
                len(ids), -1
            )
            made = np.array(
                [[row[q + 1] if q + 1 < len(row) and _produced(out, q) else -1 for q in out.positions] for row in ids]
            ).reshape(len(ids), -1)
            for name, values in (("token_fed", fed), ("token_produced", made)):
                text = strings(np.maximum(values, 0), tokenizer)
                coords[name] = (("sample", "query"), np.where(values < 0, "", text).astype(str))
                coords[f"{name}_id"] = (("sample", "query"), values.astype(np.int64))
        if query_layout is not None:
            pads = (query_layout.kind < 0).sum(1)
            pads = np.resize(np.repeat(pads, max(1, out.n_samples // len(pads))), out.n_samples)
            coords["position_in_sample"] = (
                ("sample", "query"),
                np.maximum(np.array(out.positions)[None] - pads[:, None], -1),
            )
    if "key" in used:
        coords["key"] = np.arange(out.n_keys)
        if key_layout is not None:
            labels = {
                "token": key_layout.tokens,
                "kind": key_layout.kind,
                "row_in_image": key_layout.row,
                "column_in_image": key_layout.column,
                "image": key_layout.image,
                "tile": key_layout.tile,
            }
            for name, values in labels.items():
                coords[name] = (("sample", "key"), _fitted(values, out.n_samples, out.n_keys))
    _blank_pads(out, query_layout)
    return coords


def _produced(out: StackArrays, position: int) -> bool:
    return out.run.generating and position >= (out.run.prompt_length or 0) - 1


def _sequences(out: StackArrays) -> tuple[Layout | None, Layout | None, Array | None]:
    """Layouts of keys and of queries over the whole run, and the token ids of the query sequence."""
    query = out.run.layouts.get("text") if out.stack == "cross" else out.layout
    ids = None
    if out.decoder and out.sequences is not None:
        ids = out.sequences.ids
    elif query is not None and (query.token_ids >= 0).any():
        ids = query.token_ids
    if ids is not None and len(ids) != out.n_samples:
        ids = None
    if query is not None and ids is not None and ids.shape[1] > query.shape[1] and out.decoder and out.stack != "cross":
        from interp.models.layout_tokens import strings

        new = ids[:, query.shape[1] :]
        if len(query.kind) == len(new):
            longer = query.extend(new)
            longer.tokens[:, query.shape[1] :] = strings(new, out.run.tokenizer)
            query = longer
    return (out.layout if out.stack == "cross" else query), query, ids


def _fitted(values: Array, samples: int, length: int) -> Array:
    if len(values) != samples:
        values = values[np.resize(np.repeat(np.arange(len(values)), max(1, samples // len(values))), samples)]
    blank = "" if values.dtype.kind == "O" else np.asarray(-1, values.dtype)
    out = np.full((samples, length), blank, dtype=values.dtype)
    out[:, : values.shape[1]] = values[:, :length]
    return out.astype(str) if values.dtype.kind == "O" else out


def _blank_pads(out: StackArrays, layout: Layout | None) -> None:
    """Rows of pads are missing."""
    if layout is None:
        return
    kind = _fitted(layout.kind, out.n_samples, max([*out.positions, 0]) + 1)
    known = np.array(out.positions) < layout.shape[1]
    pads = (kind[:, out.positions] < 0) & known
    if not pads.any():
        return
    for dims, array in out.variables.values():
        if "query" in dims:
            view = np.moveaxis(array, 3, 1)
            view[pads] = np.nan if array.dtype.kind == "f" else -1
