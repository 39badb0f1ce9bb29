"""The arrays of one stack of a trace while the pieces of a run are put into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp.attention import OffsetBins, Readings
from interp.models.layout import Layout

if TYPE_CHECKING:
    from interp.tracing.calls import RunState
    from interp.tracing.runs import Sequences

Array = NDArray[Any]
Places = slice | Array
"""Places on one axis: a slice (start and stop given, step 1) where they follow on each other, else integers."""


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
    """Arrays of one stack while they are filled; NaN (-1 for integers) is missing.

    An array is made without contents. Its part of one sample and layer is ``begun`` by the first piece that writes there:
    a piece that writes all of the part needs no contents, any other finds it filled with missing values, and
    :meth:`finish` fills the parts that no piece began. So every cell is either written or missing, and a prefill's
    readings go to memory once.
    """

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
        self.heads = sorted(set().union(*(p.heads for p in self.pieces)))
        self.limit = self._limit()
        self.positions = union(sorted({(p.start, p.stop) for p in self.pieces}))
        if self.limit is not None:
            self.positions = self.positions[self.positions < self.limit]
        self.n_keys = max((p.key_start + p.n_keys for p in self.pieces), default=0)
        if stack == "text" and self.limit is not None:
            self.n_keys = min(self.n_keys, self.limit)
        batch = max((p.sample + p.batch for p in self.pieces), default=0)
        beams = sequences.beams if sequences is not None and self.decoder else None
        self.beams = beams
        self.n_samples = len(beams) if beams is not None else batch
        self.variables: dict[str, tuple[tuple[str, ...], Array]] = {}
        self.coords: dict[str, Any] = {}
        self._begun: dict[str, NDArray[np.bool_]] = {}
        self._layer_place = {layer: n for n, layer in enumerate(layers)}
        self._head_place = {head: n for n, head in enumerate(self.heads)}
        self._samples: dict[Any, tuple[Array, Places, Places]] = {}
        self._heads: dict[tuple[int, ...], Places] = {}
        self._named: dict[str, dict[int, int]] = {}

    def _surviving(self, pieces: list[Piece]) -> list[Piece]:
        """Without draft rows that a later forward fed again: those were rejected."""
        if not self.decoder or not any(p.generated for p in pieces):
            return pieces
        # A forward that starts at or before a row drops every draft from there on, also where it fed fewer rows.
        starts: dict[int, int] = {}
        for piece in pieces:
            starts[piece.forward] = min(starts.get(piece.forward, piece.start), piece.start)
        dropped_from: dict[int, float] = {}
        lowest = np.inf
        for forward in sorted(starts, reverse=True):
            dropped_from[forward] = lowest
            lowest = min(lowest, starts[forward])
        return [p for p in pieces if not p.generated or p.start < dropped_from[p.forward]]

    def _limit(self) -> int | None:
        if not self.decoder:
            return None
        if self.sequences is not None and self.run.generating:
            return max(int(self.sequences.lengths.max()) - 1, 1)
        return None

    def samples_of(self, piece: Piece) -> tuple[Array, Places, Places]:
        """``(target samples, the same as places, rows of the piece)``.

        Samples that had stopped before a generated row are not among them.
        """
        key = (piece.sample, piece.batch, (piece.start, piece.stop) if piece.generated else None)
        if key not in self._samples:
            targets, rows = self._samples_of(piece)
            self._samples[key] = targets, span(targets), span(rows)
        return self._samples[key]

    def _samples_of(self, piece: Piece) -> tuple[Array, Array]:
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

    def heads_of(self, piece: Piece) -> Places:
        key = tuple(piece.heads)
        if key not in self._heads:
            self._heads[key] = span([self._head_place[h] for h in key])
        return self._heads[key]

    def rows_of(self, piece: Piece) -> slice:
        """Places of a piece's rows on the query axis; its last rows may be beyond the limit."""
        first, stop = np.searchsorted(self.positions, (piece.start, piece.stop))
        return slice(int(first), int(stop))

    def named(self, which: str) -> dict[int, int]:
        """Absolute positions of the rows that any piece read exactly, in order, and the place of each."""
        if which not in self._named:
            found = sorted(set().union(*(getattr(p, which) for p in self.pieces)))
            kept = [q for q in found if self.limit is None or q < self.limit]
            self._named[which] = {q: n for n, q in enumerate(kept)}
        return self._named[which]

    def array(self, name: str, dims: tuple[str, ...], sizes: tuple[int, ...], like: Tensor) -> Array:
        """The variable ``(sample, layer, head, *dims)``, made on first use; of integers where ``like`` is."""
        if name not in self.variables:
            shape = (self.n_samples, len(self.layers), len(self.heads), *sizes)
            integer = like.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
            self.variables[name] = (
                ("sample", "layer", "head", *dims),
                np.empty(shape, np.int32 if integer else np.float32),
            )
            self._begun[name] = np.zeros(shape[:2], bool)
        return self.variables[name][1]

    def write(self, name: str, piece: Piece, values: Tensor, *rest: Places, add: bool = False) -> None:
        """Put ``values [batch, head, ...]`` of a piece at its samples, layer and heads of a variable.

        Args:
            rest: places on the axes after the head.
            add: add to what other pieces wrote.
        """
        targets, samples, rows = self.samples_of(piece)
        if not len(targets):
            return
        array, layer, heads = self.variables[name][1], self._layer_place[piece.layer], self.heads_of(piece)
        whole = all(
            isinstance(p, slice) and p.start == 0 and p.stop == n
            for p, n in zip((heads, *rest), array.shape[2:], strict=True)
        )
        values = values.detach()
        if add and values.is_floating_point():
            # Sums start from 0, which makes a -0 a 0.
            values = values + 0.0
        add = self._begin(name, targets, layer, whole, add) and add
        part, index = array[:, layer], (samples, heads, *rest)
        if isinstance(rows, slice) and all(isinstance(p, slice) for p in index):
            # The usual case, whole heads and consecutive rows, without an index for every number.
            if not add:
                copy(part[index], values[rows])
                return
        elif sum(not isinstance(p, slice) for p in index) > 1:
            index = np.ix_(*(np.arange(p.start, p.stop) if isinstance(p, slice) else p for p in index))
        picked = values.cpu().numpy()[rows]
        if add:
            before = part[index]
            none = np.isnan(before) if array.dtype.kind == "f" else before < 0
            picked = np.where(none, array.dtype.type(0), before) + picked
        part[index] = picked

    def _begin(self, name: str, targets: Array, layer: int, whole: bool, add: bool) -> bool:
        """Make the parts ready for a write; False where no piece wrote to any of them before."""
        array, begun = self.variables[name][1], self._begun[name]
        before = begun[targets, layer]
        some = bool(before.any())
        if not whole or (add and some):
            for sample in targets[~before]:
                array[sample, layer] = _missing(array)
        begun[targets, layer] = True
        return some

    def finish(self) -> None:
        """Fill the parts that no piece wrote to."""
        for name, begun in self._begun.items():
            array = self.variables[name][1]
            for sample, layer in np.argwhere(~begun):
                array[sample, layer] = _missing(array)


def _missing(array: Array) -> float:
    return np.nan if array.dtype.kind == "f" else -1


def copy(view: Array, values: Tensor) -> None:
    """Copy a tensor of any device straight into an array; one head is given to all heads of the array."""
    if values.stride(1) == 0:
        # An expanded view is one head: it crosses to the CPU once.
        values = values[:, :1].cpu()
    torch.from_numpy(view).copy_(values)


def union(spans: list[tuple[int, int]]) -> NDArray[np.int64]:
    """The integers of ``(start, stop)`` spans, each once, in order."""
    parts: list[NDArray[np.int64]] = []
    reached = -1
    for start, stop in sorted(spans):
        parts.append(np.arange(max(start, reached), stop, dtype=np.int64))
        reached = max(reached, stop)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def span(places: Any) -> Places:
    """Consecutive places as a slice, others as they are."""
    places = np.asarray(places, dtype=int)
    if not len(places) or not bool((np.diff(places) == 1).all()):
        return places
    return slice(int(places[0]), int(places[-1]) + 1)
