"""How many rows can see a key, for ``received_rows``."""

from __future__ import annotations

import torch
from torch import Tensor

from interp.attention.blockwise import visible_varies_by_head
from interp.attention.call import Call
from interp.attention.edits import Restriction
from interp.attention.groups import one_hot
from interp.attention.triton.passes import Live, Pass, Wanted
from interp.attention.triton.tables import Tables


def received_rows(call: Call, shared: Tables, x: Live) -> Tensor:
    """int32 ``[B, Hs, Gq, Lk]``, expanded over the heads where they all see the same keys.

    In closed form where only causality and a window hide anything, else counted by the kernel.
    """
    asked, mask = call.readout, call.mask
    batch, heads, _, n_keys = call.shape
    n_read = heads if asked.heads is None else len(asked.heads)
    shape = (batch, n_read, asked.n_query_groups, n_keys)
    simple = mask.padding is None and mask.dense is None and mask.rule is None and call.bias is None
    if simple and not call.edit.of(*Restriction):
        return _closed_form(call).expand(shape)
    if not visible_varies_by_head(call):
        one = torch.zeros(1, dtype=torch.int64, device=call.q.device)
        counted = Pass(shared, Wanted(count=True, heads=one))(x)["received"]
    else:
        counted = Pass(shared, Wanted(count=True, heads=asked.heads))(x)["received"]
    return counted.round().int().expand(shape)


def _closed_form(call: Call) -> Tensor:
    """``[B|1, 1, Gq, Lk]``: rows within a range around each key, by differences of running counts."""
    asked, mask = call.readout, call.mask
    _, _, n_queries, n_keys = call.shape
    device = call.q.device
    groups = asked.query_groups
    if groups is None:
        groups = torch.zeros((1, n_queries), dtype=torch.int8, device=device)
    before = one_hot(groups, asked.n_query_groups, torch.int32).cumsum(1, dtype=torch.int32).mT
    before = torch.nn.functional.pad(before, (1, 0))
    key = torch.arange(n_keys, device=device) - (mask.q_offset - mask.kv_offset)
    left, right = mask.window or (None, None)
    first, stop = torch.zeros_like(key), torch.full_like(key, n_queries)
    if mask.causal:
        first = torch.maximum(first, key)
    if right is not None:
        first = torch.maximum(first, key - right)
    if left is not None:
        stop = torch.minimum(stop, key + left + 1)
    first, stop = first.clamp(0, n_queries), stop.clamp(0, n_queries)
    counted = (before[..., stop] - before[..., first]).clamp_min(0)
    return counted.unsqueeze(1)
