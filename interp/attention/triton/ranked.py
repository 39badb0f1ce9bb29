"""Calls whose edit goes by the ranks of keys (:class:`~interp.attention.edits.TopKeys`), for which rows must be seen whole.

The rows are read block by block, and what their ranks come to is put to the kernels as a score to reach or as keys to drop.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from interp.attention import reference
from interp.attention.call import Call, Tile, tile_edit
from interp.attention.edits import MAX_DROPPED_KEYS, STAGES, DropKeys, Edit, Threshold, TopKeys
from interp.attention.readouts import Readings, Readout

ROUNDING = 8e-7
"""Of a score that was worked out from its weight, as a fraction of it and the log-sum-exp: twice what the steps can add up to."""
BLOCK = 1 << 24
"""Weights looked at at once, so that no whole map is held."""


class Ranked(NamedTuple):
    """The largest weights of every row, fp32 ``[B, H, Lq, k]``, the positions of their keys, and ``lse [B, H, Lq]``."""

    weights: Tensor
    keys: Tensor
    lse: Tensor


def lacks(call: Call) -> str | None:
    """What of a call's ranks cannot be put to the kernels, or None."""
    ranked = call.edit.of(TopKeys)
    if len(ranked) > 1:
        return "it takes one TopKeys at a time"
    for op in ranked:
        other = Threshold if op.draws is None else DropKeys
        if call.edit.of(other):
            return f"it cannot take TopKeys beside {other.__name__}"
        if op.draws is not None and op.k > MAX_DROPPED_KEYS:
            return f"it drops at most {MAX_DROPPED_KEYS} keys of a row, and TopKeys may drop {op.k}"
    return None


def run(call: Call) -> tuple[Tensor | None, Readings]:
    """z and readings, as those of any backend."""
    from interp.attention.api import attend

    (op,) = call.edit.of(TopKeys)
    plain = tuple(other for other in call.edit.operations if other is not op)
    n_keys = call.shape[3]
    if op.draws is not None or op.k < n_keys:
        found = _ranked(call, min(op.k + 1, n_keys))
        plain = (*plain, _as_threshold(op, found) if op.draws is None else _as_keys(op, found))
    made = attend(
        call.q, call.k, call.v, scale=call.scale, mask=call.mask, softcap=call.softcap, sinks=call.sinks, bias=call.bias,
        edit=replace(call.edit, operations=plain), readout=call.readout, want_output=call.want_output, backend="triton",
    )  # fmt: skip
    return made.output, made.readings


def _as_threshold(op: TopKeys, found: Ranked) -> Threshold:
    """A score between those of the k-th key and the next; of keys that rounding cannot tell apart all are kept."""
    kth, following = found.weights[..., op.k - 1], found.weights[..., op.k]
    lowest = kth.log() + found.lse
    gap = (kth.log() - following.log()).clamp(max=1.0)
    margin = torch.maximum(gap / 2, ROUNDING * (1 + lowest.abs() + found.lse.abs()))
    return Threshold(torch.where(kth > 0, lowest - margin, -torch.inf), op.where)


def _as_keys(op: TopKeys, found: Ranked) -> DropKeys:
    seen = found.weights > 0
    hidden = reference.hidden_candidates(op, seen[..., : op.k], seen.sum(-1, keepdim=True) - 1)
    return DropKeys(torch.where(hidden, found.keys[..., : op.k], -1), op.where)


def _ranked(call: Call, k: int) -> Ranked:
    """The k largest weights of every row behind all that changes or restricts its scores."""
    from interp.attention.api import attend

    batch, n_heads, n_queries, n_keys = call.shape
    before = tuple(op for op in call.edit.operations if STAGES[type(op)] < STAGES[TopKeys])
    edit = Edit(before, call.edit.groups, call.edit.query_groups, call.edit.key_groups) if before else None
    readouts = _readouts(n_queries, max(1, BLOCK // (batch * n_heads * n_keys)), call.q.device)
    parts: list[Ranked] = []
    for start, stop, readout in readouts:
        q, mask, bias, part = call.q, call.mask, call.bias, edit
        if len(readouts) > 1:
            tile = Tile((0, batch), (0, n_heads), (start, stop), (0, n_keys))
            q, mask, part = q[:, :, start:stop], mask.rows(start, stop), None if edit is None else tile_edit(edit, tile)
            bias = bias if bias is None or bias.shape[2] == 1 else bias[:, :, start:stop]
        readings = attend(
            q, call.k, call.v, scale=call.scale, mask=mask, softcap=call.softcap, sinks=call.sinks, bias=bias, edit=part,
            readout=readout, want_output=False, backend="triton",
        ).readings  # fmt: skip
        assert readings.rows is not None
        assert readings.lse is not None
        weights, slots = readings.rows.topk(k, dim=-1)
        parts.append(Ranked(weights, slots + call.mask.kv_offset, readings.lse))
    return Ranked(*(torch.cat([getattr(part, name) for part in parts], 2) for name in Ranked._fields))


@functools.lru_cache(maxsize=8)
def _readouts(n_queries: int, step: int, device: torch.device) -> list[tuple[int, int, Readout]]:
    """First row, end and readout of each block: one object for all layers, since calls of a kind know each other by it."""
    blocks = [(start, min(start + step, n_queries)) for start in range(0, n_queries, step)]
    return [
        (start, stop, Readout(rows=torch.arange(stop - start, device=device), row_stats=True)) for start, stop in blocks
    ]
