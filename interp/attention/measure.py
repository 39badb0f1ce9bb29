"""What the op reads off the final p of a call or tile: one function per readout.

``p`` is ``[B, H, Lq, Lk]`` in the call's dtype; every function computes only what was asked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from interp.attention.call import Call
from interp.attention.groups import group_sums, one_hot
from interp.attention.mask import Visible
from interp.attention.readouts import Distances, OffsetBins, Readings

PEAK_BLOCK = 64
MANY = 1 << 16


def read(
    call: Call, p: Tensor, lse: Tensor | None, sink_share: Tensor | None, visible: Visible, gain: Tensor | None
) -> Readings:
    """The readings that the call's readout asks for.

    Args:
        call: the call or tile.
        p: final probabilities of all its heads.
        lse: ``[B, H, Lq]`` of step 3, there if row statistics are asked for.
        sink_share: ``[B, H, Lq]``, None for a model without sink logits.
        visible: the visible set, for ``received_rows``.
        gain: broadcast over ``[B, H, Lq]``, for ``group_output``.
    """
    asked, readings = call.readout, Readings()
    if asked.empty:
        return readings
    if asked.group_output is not None:
        readings.group_output = pick(group_output(call, p, gain, asked.group_output), asked.heads)
    p = pick(p, asked.heads)
    if asked.row_stats or asked.topk:
        weights, keys = largest(p, max(asked.topk, 1))
        keys = torch.where(weights > 0, keys + call.mask.kv_offset, -1).int()
        if asked.topk:
            readings.topk_weight, readings.topk_key = weights[..., : asked.topk], keys[..., : asked.topk]
        if asked.row_stats:
            readings.top_weight, readings.top_key = weights[..., 0], keys[..., 0]
    if asked.row_stats:
        assert lse is not None
        readings.lse = pick(lse, asked.heads)
        readings.entropy = entropy(p)
        readings.mass = mass(call, p)
        readings.sink_share = p.new_zeros(p.shape[:3]) if sink_share is None else pick(sink_share, asked.heads)
    if asked.received:
        kinds = query_kinds(call, p)
        readings.received = kinds.mT.unsqueeze(1) @ p
        seen = visible.counts(kinds)
        readings.received_rows = pick(seen, asked.heads) if visible.n_heads > 1 else seen
    if asked.pooled:
        readings.pooled, readings.pooled_edge = pooled(p, counted_rows(call, p), call.pooled_edge), call.pooled_edge
    if asked.offset is not None:
        readings.offset = offset_histogram(p, asked.offset, counted_rows(call, p))
    if asked.distance is not None:
        readings.distance, readings.distance_mass = distance(p, asked.distance)
    if asked.rows is not None:
        readings.rows = p[:, :, asked.rows]
    if asked.attention:
        readings.attention = p
    return readings


def pick(x: Tensor, heads: Tensor | None) -> Tensor:
    return x if heads is None else x[:, heads]


# Rows


def largest(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in falling order with their key slots, ties to the lowest; 0 beyond the last key.

    They lie in the k blocks of keys with the largest maxima (a block of lower rank would need k better elements before
    its own), and torch finds block maxima many times faster than it finds an index among all keys. On a few thousand
    numbers the search by blocks costs more in calls than it saves.
    """
    *_, n_keys = p.shape
    values = p.detach()
    slots = None
    if n_keys > 4 * k * PEAK_BLOCK and p.numel() >= MANY:
        blocks = _first_largest(block_reduce(values, PEAK_BLOCK, "amax"), k)[1].sort(-1).values
        slots = (blocks.unsqueeze(-1) * PEAK_BLOCK + torch.arange(PEAK_BLOCK, device=p.device)).flatten(-2)
        values = values.gather(-1, slots.clamp_max(n_keys - 1)).masked_fill(slots >= n_keys, -1.0)
    elif n_keys < k:
        values = F.pad(values, (0, k - n_keys), value=-1.0)
    places = _first_largest(values, k)[1]
    keys = places if slots is None else slots.gather(-1, places)
    weights = p.gather(-1, keys.clamp_max(n_keys - 1))
    return torch.where(keys < n_keys, weights, 0.0), keys


def _first_largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like topk for non-negative values, but ties go to the lowest index (torch's topk leaves that open)."""
    weights, places = [], []
    for step in range(k):
        weight, place = values.max(-1, keepdim=True)
        weights.append(weight)
        places.append(place)
        if step < k - 1:
            values = values.scatter(-1, place, -2.0)
    return torch.cat(weights, -1), torch.cat(places, -1)


def entropy(p: Tensor) -> Tensor:
    """``-sum p ln p`` in nats, ``[B, H, Lq]``; 0 ln 0 is 0."""
    # Adding the smallest normal number changes no p above 1e-30 and keeps the logarithm finite at 0.
    return -(p + torch.finfo(p.dtype).tiny).log_().mul_(p).sum(-1)


def distance(p: Tensor, asked: Distances) -> tuple[Tensor, Tensor]:
    """Sums of p times distance, and of p, over the keys that have a place, each ``[B, H, Lq]``; 0 for queries without one."""
    queries, keys = asked.query_coords.to(p.dtype), asked.key_coords.to(p.dtype)
    along = [(queries[..., d, None] - keys[:, None, :, d]).abs() for d in range(queries.shape[-1])]
    away = along[0]
    if len(along) > 1:
        away = torch.maximum(*along) if asked.hop else torch.hypot(*along)
    placed = (keys >= 0).all(-1)
    there = (queries >= 0).all(-1)[:, None].to(p.dtype)
    away = away.masked_fill(~placed.unsqueeze(1), 0.0)
    weight = (p @ placed[:, None, :, None].to(p.dtype)).squeeze(-1)
    return (p * away.unsqueeze(1)).sum(-1) * there, weight * there


def mass(call: Call, p: Tensor) -> Tensor:
    """Sum of p per key group of the readout, ``[B, H, Lq, G]``."""
    asked = call.readout
    if asked.groups is None:
        total = p.sum(-1, keepdim=True)
        return F.pad(total, (0, asked.n_groups - 1))
    return group_sums(p, one_hot(asked.groups, asked.n_groups, p.dtype))


def group_output(call: Call, p: Tensor, gain: Tensor | None, rows: Tensor) -> Tensor:
    """What each key group contributed to z in some rows, ``[B, H, R, G, Dv]``."""
    asked = call.readout
    batch, heads, _, n_keys = p.shape
    groups = torch.zeros((1, n_keys), dtype=torch.int8, device=p.device) if asked.groups is None else asked.groups
    kinds = one_hot(groups, asked.n_groups, p.dtype)
    v = call.v.to(p.dtype)
    chosen = p[:, :, rows].view(batch, v.shape[1], -1, n_keys)
    parts = torch.stack([(chosen * kinds[:, None, None, :, g]) @ v for g in range(asked.n_groups)], dim=-2)
    parts = parts.view(batch, heads, len(rows), asked.n_groups, -1)
    if gain is not None:
        parts = parts * gain.expand(batch, heads, p.shape[2])[:, :, rows, None, None]
    return parts


# Columns


def query_kinds(call: Call, p: Tensor) -> Tensor:
    """One-hot ``[B|1, Lq, Gq]`` of the readout's query groups; a row of group -1 is in none."""
    asked = call.readout
    if asked.query_groups is None:
        rows = torch.zeros((1, p.shape[2]), dtype=torch.int8, device=p.device)
        return one_hot(rows, asked.n_query_groups, p.dtype)
    return one_hot(asked.query_groups, asked.n_query_groups, p.dtype)


def counted_rows(call: Call, p: Tensor) -> Tensor | None:
    """1 for the rows that count, 0 for pads, ``[B|1, Lq]``; None where all count."""
    groups = call.readout.query_groups
    if groups is None or bool((groups >= 0).all()):
        return None
    return (groups >= 0).to(p.dtype)


def pooled(p: Tensor, counted: Tensor | None, edge: int) -> Tensor:
    """Block sums ``[B, H, ceil(Lq / edge), ceil(Lk / edge)]``."""
    sums = block_reduce(p, edge, "sum")
    if counted is not None:
        sums = sums * counted[:, None, :, None]
    return block_reduce(sums.mT, edge, "sum").mT


def block_reduce(x: Tensor, block: int, how: str) -> Tensor:
    """Sum or maximum of each block of the last axis, the last one perhaps shorter."""
    if block == 1:
        return x
    whole = x.shape[-1] // block * block
    parts = [x[..., :whole].unflatten(-1, (-1, block))] if whole else []
    if whole < x.shape[-1]:
        parts.append(x[..., None, whole:])
    reduced = [part.sum(-1) if how == "sum" else part.amax(-1) for part in parts]
    return reduced[0] if len(reduced) == 1 else torch.cat(reduced, -1)


def offset_histogram(p: Tensor, bins: OffsetBins, counted: Tensor | None) -> Tensor:
    """Summed p per key-query offset, ``[B, H, bins + 1]``; the last bin has pairs with a special token.

    By diagonals where both sides are consecutive tokens, else pair by pair.
    """
    if counted is not None:
        p = p * counted[:, None, :, None]
    first = _consecutive(bins)
    return _pair_histogram(p, bins) if first is None else _diagonal_histogram(p, bins, first)


def _consecutive(bins: OffsetBins) -> int | None:
    """``coordinate(query row 0) - coordinate(key slot 0)`` where both rise by one a token (specials aside), or None."""
    firsts = []
    for coords in (bins.query_coords, bins.key_coords):
        if coords.shape[0] != 1 or coords.shape[2] != 1:
            return None
        line = coords[0, :, 0].long()
        placed = line >= 0
        base = (line - torch.arange(len(line), device=line.device))[placed]
        if not len(base) or bool((base != base[0]).any()):
            return None
        firsts.append(int(base[0]))
    return firsts[0] - firsts[1]


def _diagonal_histogram(p: Tensor, bins: OffsetBins, first: int) -> Tensor:
    batch, heads, n_rows, n_keys = p.shape
    special = p.new_zeros(batch, heads, 1)
    rows, keys = ((coords[0, :, 0] >= 0).to(p.dtype) for coords in (bins.query_coords, bins.key_coords))
    if bool((rows == 0).any()) or bool((keys == 0).any()):
        placed, unplaced = (torch.stack([rows, 1 - rows]) @ p).unbind(-2)
        special = (unplaced.sum(-1) + placed @ (1 - keys)).unsqueeze(-1)
        p = p * rows[:, None] * keys
    sums = diagonal_sums(p).flip(-1)  # by rising offset, from first - (n_keys - 1) to first + n_rows - 1
    lowest, (lo,), (hi,) = first - n_keys + 1, bins.lo, bins.hi
    start, stop = max(lo, lowest), min(hi, first + n_rows - 1) + 1
    inside = p.new_zeros(batch, heads, hi - lo + 1)
    if start < stop:
        inside = F.pad(sums[..., start - lowest : stop - lowest], (start - lo, hi + 1 - stop))
    return torch.cat([inside, special], dim=-1)


def diagonal_sums(p: Tensor) -> Tensor:
    """Sums along the diagonals of ``p [B, H, R, L]``, ``[B, H, R + L - 1]``, by rising ``column - row`` from ``1 - R`` on."""
    n_rows, n_columns = p.shape[2:]
    if n_columns < 2 * n_rows:
        return _skewed(F.pad(p, (n_rows - 1, n_rows - 1)), n_rows + n_columns - 1)
    # Diagonals of full length need no copy; only the corners that the others cut off are padded.
    left = _skewed(F.pad(p[..., : n_rows - 1].tril(-1), (n_rows - 1, 0)), n_rows - 1)
    right = _skewed(F.pad(p[..., n_columns - n_rows + 1 :].triu(), (0, n_rows - 1)), n_rows - 1)
    return torch.cat([left, _skewed(p, n_columns - n_rows + 1), right], dim=-1)


def _skewed(p: Tensor, n_diagonals: int) -> Tensor:
    """Sums of the first diagonals of full length: a row stride of one more than the width lines them up as columns."""
    p = p.contiguous()
    batch, heads, n_rows, width = p.shape
    strides = (heads * n_rows * width, n_rows * width, width + 1, 1)
    return p.as_strided((batch, heads, n_rows, n_diagonals), strides, p.storage_offset()).sum(2)


def _pair_histogram(p: Tensor, bins: OffsetBins) -> Tensor:
    batch, heads, _, _ = p.shape
    queries, keys = bins.query_coords.int(), bins.key_coords.int()
    n_bins = 1
    number = torch.zeros((), dtype=torch.int32, device=p.device)
    inside = torch.ones((), dtype=torch.bool, device=p.device)
    for axis, (lo, hi) in enumerate(zip(bins.lo, bins.hi, strict=True)):
        offset = queries[:, :, None, axis] - keys[:, None, :, axis]
        inside = inside & (offset >= lo) & (offset <= hi)
        number = number * (hi - lo + 1) + (offset - lo)
        n_bins *= hi - lo + 1
    special = (queries < 0).any(-1)[:, :, None] | (keys < 0).any(-1)[:, None]
    number = torch.where(special, n_bins, torch.where(inside, number, n_bins + 1)).long()
    # On a GPU additions happen in any order: in double precision the order leaves no trace in the rounded sum.
    wide = p.double() if p.is_cuda else p
    histogram = wide.new_zeros(batch, heads, n_bins + 2)
    number = number.unsqueeze(1).expand(p.shape).flatten(-2)
    return histogram.scatter_add(-1, number, wide.flatten(-2))[..., : n_bins + 1].to(p.dtype)
