"""The specification of the op in eager PyTorch, in the order of its steps.

Computes in fp32 (fp64 where q is fp64), whatever the dtype of q, k and v. Shapes: ``B`` samples, ``H`` query heads,
``Hkv`` key-value heads, ``Lq`` query rows, ``Lk`` keys, ``G`` key groups; head ``h`` reads key-value head ``h // (H / Hkv)``.

1. scores      ``s = scale * q.k / T``, softcap, ``+ bias``, then the boost ``s += beta * |s|``
2. visible     ``V`` = causal and window and padding and mask and restrictions
3. softmax     over V, with the model's sink logit in the denominator
4. replaced    uniform rows and given rows
5. weighted    group weights and redistribution
6. output      ``z = p v``, times a gain

Everything here is differentiable with respect to q, k, v, sinks, bias and the floating-point values of an edit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from interp.attention import measure
from interp.attention.call import Call
from interp.attention.edits import (
    Blocks,
    Boost,
    DropKeys,
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
from interp.attention.groups import group_sums, one_hot
from interp.attention.mask import Visible
from interp.attention.readouts import Readings

KEPT_TABLE_BYTES = 1 << 18
"""Largest one-hot table kept for later calls of a kind, that of a step after some 20 000 keys."""

Restriction = SinkWindow | Blocks | Neighbourhood | Threshold | DropKeys


class Probabilities(NamedTuple):
    """``p [B, H, Lq, Lk]`` and what did not go to a key: ``sink_share [B, H, Lq]``, with the ``lse`` of step 3."""

    p: Tensor
    sink_share: Tensor | None
    lse: Tensor | None


def supports(call: Call) -> str | None:
    """None: the specification has everything."""
    return None


def run(call: Call) -> tuple[Tensor | None, Readings]:
    """The whole call at once: z ``[B, Lq, H, Dv]`` in q's dtype (None where not wanted) and the readings.

    Holds several full maps.
    """
    z, readings, _ = attend_tile(call)
    z = None if z is None else z.transpose(1, 2).to(call.q.dtype).contiguous()
    if readings.received_rows is not None and readings.received is not None:
        readings.received_rows = readings.received_rows.expand_as(readings.received)
    return z, readings


def attend_tile(call: Call, visible: Visible | None = None) -> tuple[Tensor | None, Readings, Visible]:
    """Steps 1-6 and the readings of one call or tile.

    Args:
        call: the call or tile.
        visible: the set of step 2 where it is known from another tile of the same samples, rows and keys.

    Returns:
        ``z [B, H, Lq, Dv]`` or None, the readings, the visible set. ``received_rows`` is as wide over heads as the set.
    """
    s = scores(call)
    if visible is None:
        visible = visible_set(call, s)
    probabilities = softmax(call, s, visible)
    del s
    probabilities = replaced(call, probabilities, visible)
    probabilities = weighted(call, probabilities)
    z = output(call, probabilities.p) if call.want_output else None
    readings = measure.read(call, probabilities.p, probabilities.lse, probabilities.sink_share, visible, gain(call))
    return z, readings, visible


# Step 1


def scores(call: Call) -> Tensor:
    """``s [B, H, Lq, Lk]``; entries that the bias masks are finite here and hidden in step 2."""
    q = call.q.to(call.dtype) * call.scale
    for op in call.edit.of(Temperature):
        q = q / selected(op.value, op.where, 1.0, call).unsqueeze(-1)
    s = grouped_matmul(q, call.k.to(call.dtype).mT)
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        s = s + finite_bias(call.bias).to(call.dtype)
    for op in call.edit.of(Boost):
        beta = op.beta if op.where is None else torch.where(op.where.unsqueeze(-1), op.beta, 0.0)
        s = s + per_key(call, beta.to(call.dtype)) * s.abs()
    return s


def bias_hides(bias: Tensor) -> Tensor:
    """Entries of an additive bias that mean "masked"."""
    return bias <= torch.finfo(bias.dtype).min / 2


def finite_bias(bias: Tensor) -> Tensor:
    """The bias with masked entries replaced by 0: added, they would swallow the score and spoil the boost."""
    hidden = bias_hides(bias)
    return bias.masked_fill(hidden, 0.0) if bool(hidden.any()) else bias


# Step 2


def visible_set(call: Call, s: Tensor) -> Visible:
    """``V``, the keys that each row may see."""
    batch, _, n_queries, n_keys = call.shape
    hidden = None if call.bias is None else bias_hides(call.bias)
    restrictions = call.edit.of(SinkWindow, Blocks, Neighbourhood, Threshold, DropKeys)
    ranked = call.edit.of(TopKeys)
    narrowed = bool(restrictions or ranked) or (hidden is not None and bool(hidden.any()))
    settled = 0 if narrowed else call.mask.settled(n_keys)
    unsettled = call.mask.keys(settled, n_keys) if settled else call.mask
    mask = unsettled.visible(batch, n_queries, n_keys - settled, s.device)
    if hidden is not None and narrowed:
        mask = both(mask, ~hidden)
    for op in restrictions:
        allowed = allows(op, call, s)
        mask = both(mask, allowed if op.where is None else allowed | ~op.where.unsqueeze(-1))
    for op in ranked:
        allowed = ranks_allow(op, s, mask)
        mask = both(mask, allowed if op.where is None else allowed | ~op.where.unsqueeze(-1))
    return Visible.of(mask, n_queries, n_keys, call.dtype)


def both(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first & second


def allows(op: Restriction, call: Call, s: Tensor) -> Tensor:
    """Keys that a restriction leaves, bool broadcast over ``[B, H, Lq, Lk]``."""
    _, _, n_queries, n_keys = call.shape
    i, j = call.mask.positions(n_queries, n_keys, s.device)
    i, j = i[:, None], j[None, :]
    match op:
        case SinkWindow():
            first = 0 if call.mask.first is None else call.mask.first.to(s.device)[:, None, None, None]
            kept = (j - first < per_head(op.sink)) | (i - j < per_head(op.window))
            return kept if kept.ndim == 4 else kept[None, None]
        case Blocks():
            return op.allowed[:, i // op.block, j // op.block].unsqueeze(0)
        case Neighbourhood():
            return chebyshev(op.query_coords, op.key_coords) <= per_head(op.radius)
        case Threshold():
            return s.detach() >= op.value.unsqueeze(-1)
        case DropKeys():
            return ~among(op.keys - call.mask.kv_offset, n_keys)


def ranks_allow(op: TopKeys, s: Tensor, mask: Tensor | None) -> Tensor:
    """Keys that are left by their rank among those visible so far, bool ``[B, H, Lq, Lk]``."""
    s = s.detach() if mask is None else s.detach().masked_fill(~mask, -torch.inf)
    n_keys = s.shape[-1]
    # One key more than is asked about: where there is none, a candidate must stay.
    values, slots = s.topk(min(op.k + (op.draws is not None), n_keys), dim=-1)
    listed = torch.zeros_like(s, dtype=torch.bool)
    if op.draws is None:
        return listed.scatter_(-1, slots, True)
    most = (values > -torch.inf).sum(-1, keepdim=True) - 1
    values, slots = values[..., : op.k], slots[..., : op.k]
    return ~listed.scatter_(-1, slots, hidden_candidates(op, values > -torch.inf, most))


def hidden_candidates(op: TopKeys, there: Tensor, most: Tensor) -> Tensor:
    """Which candidates to hide, ``[B, H, Lq, n]``, of those that are ``there``; at most ``most [B, H, Lq, 1]`` of a row."""
    assert op.draws is not None
    draws = op.draws[..., : there.shape[-1]].expand(there.shape).masked_fill(~there, torch.inf)
    order = draws.argsort(-1)
    wanted = (there.sum(-1, keepdim=True) * op.share).long() if op.exact else (draws < op.share).sum(-1, keepdim=True)
    places = torch.arange(there.shape[-1], device=there.device)
    among = places < torch.minimum(wanted, most.clamp_min(0))
    return there & torch.zeros_like(there).scatter_(-1, order, among)


def chebyshev(query_coords: Tensor, key_coords: Tensor) -> Tensor:
    """Distance int32 ``[B|1, 1, Lq, Lk]`` of coordinates ``[B|1, L, n]``, 0 where either has no place."""
    placeless = (query_coords < 0).any(-1)[:, :, None] | (key_coords < 0).any(-1)[:, None]
    along = [
        (a[..., None] - b[:, None]).abs()
        for a, b in zip(query_coords.int().unbind(-1), key_coords.int().unbind(-1), strict=True)
    ]
    distance = along[0] if len(along) == 1 else torch.maximum(*along)
    return torch.where(placeless, 0, distance).unsqueeze(1)


def among(slots: Tensor, n_keys: int) -> Tensor:
    """Bool ``[..., Lk]``, True at the slots listed along the last axis; slots outside ``0 .. Lk - 1`` are ignored."""
    inside = torch.where((slots >= 0) & (slots < n_keys), slots, n_keys)
    listed = torch.zeros((*slots.shape[:-1], n_keys + 1), dtype=torch.bool, device=slots.device)
    return listed.scatter(-1, inside.long(), True)[..., :n_keys]


# Step 3


def softmax(call: Call, s: Tensor, visible: Visible) -> Probabilities:
    """Softmax of s over the visible keys, and the sink; a row that sees nothing is 0. Consumes ``s``."""
    if visible.penalty is not None:
        # In place: the matmul that made s keeps no copy of it for its gradient.
        s[..., visible.start :].add_(visible.penalty)
    p = torch.softmax(s, dim=-1)
    lse = None
    if call.sinks is not None or call.readout.row_stats:
        # ln p = s - lse for any key; the one with the largest p is the most exact.
        weight, slot = measure.largest(p, 1)
        lse = (s.gather(-1, slot) - weight.log()).squeeze(-1)
    if visible.alive is not None:
        p = p * visible.alive.unsqueeze(-1)
        lse = None if lse is None else torch.where(visible.alive, lse, -torch.inf)
    if call.sinks is None or lse is None:
        return Probabilities(p, None, lse)
    sink = call.sinks.to(call.dtype)[None, :, None]
    with_sink = torch.logaddexp(lse, sink)
    return Probabilities(p * (lse - with_sink).exp().unsqueeze(-1), (sink - with_sink).exp(), with_sink)


# Step 4


def replaced(call: Call, probabilities: Probabilities, visible: Visible) -> Probabilities:
    """Uniform rows and given rows, in the order given."""
    p, share, lse = probabilities
    for op in call.edit.of(Uniform, GivenRows):
        if isinstance(op, Uniform):
            even = visible.uniform(p)
            p = even.expand_as(p) if op.where is None else torch.where(op.where.unsqueeze(-1), even, p)
            share = None if share is None else share * (0.0 if op.where is None else (~op.where).to(share.dtype))
        else:
            heads, rows = op.heads[:, None], op.rows[None, :]
            p = p.clone()
            p[:, heads, rows] = op.p.to(p.dtype)
            if share is not None:
                share = share.clone()
                share[:, heads, rows] = 0.0
    return Probabilities(p, share, lse)


# Step 5


def weighted(call: Call, probabilities: Probabilities) -> Probabilities:
    """Group weights and redistributions, in the order given; each sees the masses that the one before it left.

    All of them scale whole groups of a row, so they are worked out on the masses and applied to p once.
    """
    p, share, lse = probabilities
    if not call.edit.of(GroupWeights, Redistribute):
        return probabilities
    groups = key_one_hot(call, p.dtype)
    total, share = total_weights(call, group_sums(p, groups), share)
    return Probabilities(p * (total @ groups.mT.unsqueeze(1)), share, lse)


def total_weights(call: Call, masses: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Step 5 on the masses ``[B, H, Lq, G]`` of step 4 alone: the weight of every group, and the sink share it leaves."""
    total = None
    for op in call.edit.of(GroupWeights, Redistribute):
        if isinstance(op, GroupWeights):
            weights, rescale = group_weights(op, call, masses, share)
            share = None if share is None or rescale is None else share * rescale
        else:
            weights = redistribution(op, call, masses)
        masses, total = masses * weights, weights if total is None else total * weights
    return torch.ones_like(masses) if total is None else total.expand_as(masses), share


def group_weights(op: GroupWeights, call: Call, masses: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights ``[B|1, H|1, Lq|1, G]`` and the factor on the sink share, 1 where the operation does not act."""
    weights = op.weight.to(masses.dtype)
    if weights.shape[2] > 1:
        # A row's query group chooses its line of the table.
        assert call.edit.query_groups is not None
        rows = one_hot(call.edit.query_groups, weights.shape[2], masses.dtype)
        weights = rows.unsqueeze(1) @ weights
    rescale = torch.ones_like(masses[..., 0])
    if op.renormalise:
        held, left = masses.sum(-1), (weights * masses).sum(-1)
        if share is not None:
            held, left = held + share, left + share
        some = left >= tiny(left)
        rescale = torch.where(some, held / torch.where(some, left, 1.0), 0.0)
        weights = weights * rescale.unsqueeze(-1)
    if op.where is not None:
        weights = torch.where(op.where.unsqueeze(-1), weights, 1.0)
        rescale = torch.where(op.where, rescale, 1.0)
    return weights, rescale


def redistribution(op: Redistribute, call: Call, masses: Tensor) -> Tensor:
    """Weights ``[B, H, Lq, G]`` that move ``fraction`` of the source mass to the target in open rows."""
    by_group = masses.unbind(-1)
    # Sums of slices: an index would be copied from the host at every call.
    source, target, gate, share = (
        functools.reduce(torch.add, [by_group[g] for g in groups]) if groups else torch.zeros_like(by_group[0])
        for groups in (op.source, op.target, op.gate_mass, op.gate_share)
    )
    open_rows = (gate >= op.summ) & (share >= op.rho * gate) & (source > 0) & (target >= tiny(target))
    if op.where is not None:
        open_rows = open_rows & op.where
    if isinstance(op.fraction, Tensor):
        fraction = torch.where(open_rows, selected(op.fraction, None, 0.0, call), 0.0)
    else:
        fraction = open_rows.to(masses.dtype) * op.fraction
    less, more = 1.0 - fraction, 1.0 + fraction * source / torch.where(open_rows, target, 1.0)
    one = torch.ones_like(less)
    chosen = [less if g in op.source else more if g in op.target else one for g in range(masses.shape[-1])]
    return torch.stack(chosen, -1)


# Step 6


def output(call: Call, p: Tensor) -> Tensor:
    """``z [B, H, Lq, Dv]``."""
    z = grouped_matmul(p, call.v.to(call.dtype))
    factor = gain(call)
    return z if factor is None else z * factor.unsqueeze(-1)


def gain(call: Call) -> Tensor | None:
    """The product of all gains, broadcast over ``[B, H, Lq]``; None where there is none."""
    total = None
    for op in call.edit.of(Gain):
        factor = selected(op.value, op.where, 1.0, call)
        total = factor if total is None else total * factor
    return total


# Small parts


def grouped_matmul(rows: Tensor, table: Tensor) -> Tensor:
    """``rows [B, H, Lq, X] @ table [B, Hkv, X, Y]``, a key-value head serving its ``H / Hkv`` query heads unrepeated."""
    batch, heads, n_rows, _ = rows.shape
    kv_heads = table.shape[1]
    together = rows.reshape(batch, kv_heads, heads // kv_heads * n_rows, -1)
    return (together @ table).view(batch, heads, n_rows, -1)


def selected(value: Tensor | float, where: Tensor | None, neutral: float, call: Call) -> Tensor:
    """``value`` where the operation acts, its neutral element elsewhere, ``[B|1, H|1, Lq|1]`` in the call's dtype."""
    if not isinstance(value, Tensor):
        value = torch.full((1, 1, 1), value, dtype=call.dtype, device=call.q.device)
    value = value.to(call.dtype)
    value = value if value.ndim == 3 else value.reshape(1, 1, 1)
    return value if where is None else torch.where(where, value, neutral)


def tiny(like: Tensor) -> float:
    """What counts as more than nothing in a division: below the smallest normal number 1 / x overflows."""
    return torch.finfo(like.dtype).tiny


def per_head(value: Tensor | int) -> Tensor | int:
    """A number per head as ``[1, H|1, 1, 1]``."""
    return value.reshape(1, -1, 1, 1) if isinstance(value, Tensor) else value


def key_one_hot(call: Call, dtype: torch.dtype) -> Tensor:
    """The edit's key groups as ``[B|1, Lk, G]``."""
    # Calls of one kind share it; what inference mode makes, nothing outside may differentiate with.
    name = f"one-hot keys, {dtype}, {torch.is_inference_mode_enabled()}"
    known: Tensor | None = None if call.memo is None else call.memo.get(name)
    if known is not None:
        return known
    groups = call.edit.groups
    if groups is None:
        groups = torch.zeros((1, call.shape[3]), dtype=torch.int8, device=call.k.device)
    table = one_hot(groups, call.edit.key_groups, dtype)
    if call.memo is not None and table.nbytes <= KEPT_TABLE_BYTES:
        call.memo[name] = table
    return table


def per_key(call: Call, table: Tensor) -> Tensor:
    """A value per key group ``[B|1, H|1, Lq|1, G]`` as a value per key ``[B|1, H|1, Lq|1, Lk]``."""
    return table @ key_one_hot(call, table.dtype).mT.unsqueeze(1)
