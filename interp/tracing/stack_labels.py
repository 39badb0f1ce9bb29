"""Coordinates of one stack of a trace: what its samples, rows and keys are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from interp.models.layout import KINDS, Layout
from interp.tracing.stack_arrays import span, union

if TYPE_CHECKING:
    from interp.tracing.capture import Capture
    from interp.tracing.stack_arrays import StackArrays

Array = NDArray[Any]


def coordinates(
    out: StackArrays,
    tokenizer: Any,
    capture: Capture,
    key_layout: Layout | None,
    query_layout: Layout | None,
    ids: Array | None,
) -> dict[str, Any]:
    """Coordinates of the dims that the stack's variables use; layouts and ids are those of :func:`whole_sequences`."""
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
    if "query" in used:
        positions = out.positions
        coords["query"] = positions
        generated = union(sorted({(p.start, p.stop) for p in out.pieces if p.generated}))
        phases = np.array(["prefill", "generated"], dtype="<U9")
        coords["phase"] = ("query", phases[np.isin(positions, generated).astype(int)])
        if ids is not None:
            fed = _at(ids, positions)
            made = np.where(_produced(out, positions), _at(ids, positions + 1), -1)
            # Both are of one tokenizer, which takes its time for each word.
            known = query_layout if tokenizer is out.run.tokenizer else None
            for name, values in (("token_fed", fed), ("token_produced", made)):
                coords[name] = (("sample", "query"), _words(values, tokenizer, known))
                coords[f"{name}_id"] = (("sample", "query"), values)
        if query_layout is not None:
            pads = (query_layout.kind < 0).sum(1)
            pads = np.resize(np.repeat(pads, max(1, out.n_samples // len(pads))), out.n_samples)
            coords["position_in_sample"] = (("sample", "query"), np.maximum(positions[None] - pads[:, None], -1))
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
    return coords


def _at(ids: Array, positions: Array) -> NDArray[np.int64]:
    """Ids of positions, -1 beyond the sequence: int64 ``[sample, position]``."""
    found = np.full((len(ids), len(positions)), -1, np.int64)
    known = positions < ids.shape[1]
    found[:, known] = ids[:, positions[known]]
    return found


def _produced(out: StackArrays, positions: Array) -> NDArray[np.bool_]:
    """Whether the token after each position was made by the run."""
    return out.run.generating & (positions >= (out.run.prompt_length or 0) - 1)


def _words(ids: Array, tokenizer: Any, known: Layout | None) -> Array:
    """Readable strings of token ids, "" for -1; those that a layout has are taken from it."""
    from interp.models.layout_tokens import strings

    distinct, where = np.unique(ids, return_inverse=True)
    words = np.full(distinct.shape, "", dtype=object)
    missing = distinct >= 0
    if known is not None and known.token_ids.size:
        have, first = np.unique(known.token_ids, return_index=True)
        place = np.minimum(np.searchsorted(have, distinct), len(have) - 1)
        found = missing & (have[place] == distinct)
        words[found] = known.tokens.ravel()[first[place[found]]]
        missing &= ~found
    words[missing] = strings(distinct[missing], tokenizer)
    return words.astype(str)[where].reshape(ids.shape)


def whole_sequences(out: StackArrays) -> tuple[Layout | None, Layout | None, Array | None]:
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


def blank_pads(out: StackArrays, layout: Layout | None) -> None:
    """Make rows of pads missing."""
    if layout is None:
        return
    kind = _fitted(layout.kind, out.n_samples, int(out.positions.max(initial=0)) + 1)
    known = out.positions < layout.shape[1]
    pads = (kind[:, out.positions] < 0) & known
    if not pads.any():
        return
    for sample, places in ((n, span(np.flatnonzero(row))) for n, row in enumerate(pads) if row.any()):
        for dims, array in out.variables.values():
            if "query" in dims:
                array[sample, :, :, places] = np.nan if array.dtype.kind == "f" else -1
