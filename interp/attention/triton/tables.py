"""From a :class:`~interp.attention.call.Call` to what the kernels take: pointers, strides and flags."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from interp.attention import reference
from interp.attention.call import Call
from interp.attention.edits import (
    Blocks,
    Boost,
    DropKeys,
    Edit,
    GroupWeights,
    Neighbourhood,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    Uniform,
)
from interp.attention.triton import tiles
from interp.attention.triton.launching import Arguments, placeholder


def strides(tensor: Tensor, axes: int = 3) -> tuple[int, ...]:
    """Strides of the leading axes, 0 along those that are 1 wide and stand for all."""
    return tuple(0 if tensor.shape[axis] == 1 else tensor.stride(axis) for axis in range(axes))


def per_row(name: str, table: Tensor | None, placeholder: Tensor) -> Arguments:
    """Pointer and strides of a table ``[B|1, H|1, Lq|1]`` (further axes are contiguous)."""
    if table is None:
        return {f"{name}_ptr": placeholder, f"{name}_b": 0, f"{name}_h": 0, f"{name}_q": 0}
    b, h, q = strides(table)
    return {f"{name}_ptr": table, f"{name}_b": b, f"{name}_h": h, f"{name}_q": q}


def per_head(value: Tensor | int, device: torch.device) -> tuple[Tensor, int]:
    """An int per head as int32 ``[H|1]`` and its stride."""
    if isinstance(value, Tensor):
        return value.to(torch.int32).contiguous(), 0 if value.numel() == 1 else 1
    return torch.full((1,), min(value, 2**30), dtype=torch.int32, device=device), 0


def row_major(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def next_power(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


@dataclass(eq=False)
class Tables:
    """The arguments that every launch about calls of one kind shares; what changes from call to call is left out.

    Attributes:
        call: such a call, with stand-ins that have no data for its operands.
        arguments: pointers, strides, numbers and flags by the kernels' names.
        always_mask: every tile needs its mask evaluated, whatever causality and windows say of it.
        lists: whether visible blocks come as lists (block patterns) instead of ranges.
        fraction: ``[B|1, H|1, Lq|1]`` of a single redistribution, 0 where it does not act.
    """

    call: Call
    device: torch.device
    arguments: Arguments = field(default_factory=dict[str, Any])
    always_mask: bool = False
    lists: bool = False
    fraction: Tensor | None = None

    @property
    def edit_groups(self) -> Tensor:
        """The edit's key groups int8 ``[B|1, Lk]``; one group where it names none."""
        return self.arguments["edit_groups_ptr"]

    def scaled_only(self, uniform: bool) -> bool:
        """Whether scores are only scaled, by positive factors, so that the scale can move into the exponent."""
        a = self.arguments
        return a["scale"] > 0 and not (a["SOFTCAP"] or a["BIAS"] or a["BETA"] or a["THRESHOLD"] or uniform)


def operands(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the kernels take them: contiguous along the head dim."""
    return row_major(call.q), row_major(call.k), row_major(call.v)


def tables(call: Call, upcast: bool) -> Tables:
    """Read a call; tiny tensor operations at most, nothing of size queries x keys unless the mask is dense already."""
    q, k, v = operands(call)
    _, heads, n_queries, n_keys = call.shape
    mask, edit, device = call.mask, call.edit, q.device
    nothing = placeholder(device)
    standin = {name: torch.empty_like(x, device="meta") for name, x in (("q", q), ("k", k), ("v", v))}
    bias = None if call.bias is None else row_major(call.bias)
    out = Tables(
        replace(
            call, **standin, memo=None, lse=None, bias=None if bias is None else torch.empty_like(bias, device="meta")
        ),
        device,
    )
    left, right = mask.window or (None, None)
    scale = call.scale
    divisor: Tensor | None = None
    for op in edit.of(Temperature):
        if isinstance(op.value, Tensor) or op.where is not None:
            factor = reference.selected(op.value, op.where, 1.0, call)
            divisor = factor if divisor is None else divisor * factor
        else:
            scale /= op.value
    gain = reference.gain(call)
    dense = mask.dense
    if mask.rule is not None:
        # `supports` has seen to it that this is small.
        dense = mask.visible(q.shape[0], n_queries, n_keys, device)
    a = out.arguments
    a.update(
        q_b=q.stride(0), q_h=q.stride(1), q_m=q.stride(2), k_b=k.stride(0), k_h=k.stride(1),
        k_n=k.stride(2), v_b=v.stride(0), v_h=v.stride(1), v_n=v.stride(2), scale=scale, softcap=call.softcap or 0.0,
        n_samples=q.shape[0], n_heads=heads, n_queries=n_queries, n_keys=n_keys, delta=mask.q_offset - mask.kv_offset,
        q_offset=mask.q_offset, kv_offset=mask.kv_offset, left=left or 0, right=right or 0, v_dtype=q.dtype,
        HEAD_DIM=q.shape[3], V_DIM=v.shape[3], D=max(next_power(q.shape[3]), 16), DV=max(next_power(v.shape[3]), 16),
        KV_GROUP=heads // k.shape[1], UPCAST=upcast, PRECISION="ieee", CAUSAL=mask.causal, LEFT=left is not None,
        RIGHT=right is not None, SOFTCAP=call.softcap is not None, BIAS=call.bias is not None, DENSE=dense is not None,
        PADDING=mask.padding is not None, SINKS=call.sinks is not None, ROW_SCALE=divisor is not None, GAIN=gain is not None,
        **per_row("row_scale", divisor, nothing), **per_row("gain", gain, nothing), **per_row("bias", bias, nothing),
        **per_row("dense", None if dense is None else row_major(dense).view(torch.uint8), nothing),
        bias_hidden=0.0 if bias is None else torch.finfo(bias.dtype).min / 2,
    )  # fmt: skip
    padding, first = mask.padding, mask.first
    a.update(
        padding_ptr=nothing if padding is None else row_major(padding.to(device)).view(torch.uint8),
        padding_b=0 if padding is None else strides(padding, 1)[0],
    )
    if padding is not None or edit.of(SinkWindow):
        first = torch.zeros(1, dtype=torch.int32, device=device) if first is None else first.to(device, torch.int32)
        a.update(first_ptr=first, first_b=strides(first, 1)[0])
    else:
        a.update(first_ptr=nothing, first_b=0)
    _restrictions(out, edit, device)
    _weights(out, call, nothing)
    out.always_mask = bool(
        out.lists or bias is not None or dense is not None or padding is not None or a["THRESHOLD"]
        or a["N_DROP"] > 0 or a["N_COORDS"] > 0 or a["BLOCKS"]
    )  # fmt: skip
    return out


def _restrictions(out: Tables, edit: Edit, device: torch.device) -> None:
    a, nothing = out.arguments, placeholder(device)
    bits_all, bits = 0, None
    acting: list[tuple[Any, int]] = [(op, tiles.UNIFORM_BIT.value) for op in edit.of(Uniform)]
    acting += [(op, tiles.SINK_WINDOW_BIT.value) for op in edit.of(SinkWindow)]
    acting += [(op, tiles.BLOCKS_BIT.value) for op in edit.of(Blocks)]
    acting += [(op, tiles.NEIGHBOURHOOD_BIT.value) for op in edit.of(Neighbourhood)]
    for op, bit in acting:
        if op.where is None:
            bits_all |= bit
        else:
            chosen = op.where.to(torch.int32) * bit
            bits = chosen if bits is None else bits | chosen
    a.update(per_row("bits", bits, nothing), bits_all=bits_all, BITS=bits is not None, UNIFORM=bool(edit.of(Uniform)))
    windows, blocks, near = edit.of(SinkWindow), edit.of(Blocks), edit.of(Neighbourhood)
    a.update(SINK_WINDOW=bool(windows), BLOCKS=bool(blocks), N_COORDS=0)
    a.update(sw_sink_ptr=nothing, sw_window_ptr=nothing, sw_h=0, sw_window_h=0)
    if windows:
        (a["sw_sink_ptr"], a["sw_h"]) = per_head(windows[0].sink, device)
        (a["sw_window_ptr"], a["sw_window_h"]) = per_head(windows[0].window, device)
    a.update(blocks_ptr=nothing, blocks_h=0, blocks_q=0, blocks_size=1)
    if blocks:
        allowed = blocks[0].allowed.contiguous().view(torch.uint8)
        a.update(
            blocks_ptr=allowed, blocks_h=strides(allowed, 1)[0], blocks_q=allowed.stride(1), blocks_size=blocks[0].block
        )
    a.update(near_radius_ptr=nothing, near_h=0, near_q_ptr=nothing, near_qb=0, near_k_ptr=nothing, near_kb=0)
    if near:
        (a["near_radius_ptr"], a["near_h"]) = per_head(near[0].radius, device)
        queries, keys = (x.to(torch.int32).contiguous() for x in (near[0].query_coords, near[0].key_coords))
        a.update(near_q_ptr=queries, near_qb=strides(queries, 1)[0], near_k_ptr=keys, near_kb=strides(keys, 1)[0])
        a["N_COORDS"] = queries.shape[-1]
    out.lists = bool((blocks and blocks[0].where is None) or (near and near[0].where is None))
    thresholds, drops = edit.of(Threshold), edit.of(DropKeys)
    value = None
    if thresholds:
        value = thresholds[0].value
        value = value if thresholds[0].where is None else torch.where(thresholds[0].where, value, -torch.inf)
    a.update(per_row("threshold", value, nothing), THRESHOLD=value is not None)
    keys = None
    if drops:
        keys = drops[0].keys.to(torch.int32)
        keys = keys if drops[0].where is None else torch.where(drops[0].where.unsqueeze(-1), keys, -1)
        keys = keys.contiguous()
    a.update(per_row("drop", keys, nothing), N_DROP=0 if keys is None else keys.shape[-1])


def _weights(out: Tables, call: Call, nothing: Tensor) -> None:
    a, edit = out.arguments, call.edit
    groups = edit.groups
    speaks = bool(edit.of(Boost, GroupWeights)) or bool(edit.of(Redistribute))
    if groups is None and speaks:
        groups = torch.zeros((1, out.call.shape[3]), dtype=torch.int8, device=nothing.device)
    groups = None if groups is None else row_major(groups)
    a.update(
        edit_groups_ptr=nothing if groups is None else groups,
        edit_groups_b=0 if groups is None else strides(groups, 1)[0],
        EDIT_GROUPS=0,
    )
    moves = edit.of(Redistribute)
    if len(moves) == 1:
        out.fraction = reference.selected(moves[0].fraction, moves[0].where, 0.0, call).float()
    boosts = edit.of(Boost)
    beta = None
    if boosts:
        beta = boosts[0].beta
        beta = beta if boosts[0].where is None else torch.where(boosts[0].where.unsqueeze(-1), beta, 0.0)
        beta = beta.contiguous()
        a["EDIT_GROUPS"] = edit.key_groups
    a.update(per_row("beta", beta, nothing), BETA=beta is not None)
    a.update(per_row("weight", None, nothing), WEIGHT=0)


def row_weights(op: GroupWeights, call: Call) -> Tensor:
    """An operation's table by row, ``[B|1, H|1, Lq|1, G]``: 1 where it does not act."""
    weight = op.weight
    if weight.shape[2] > 1:
        assert call.edit.query_groups is not None
        rows = call.edit.query_groups.long()[:, None, :, None]
        batch = max(weight.shape[0], rows.shape[0])
        rows = rows.expand(batch, weight.shape[1], -1, weight.shape[3])
        weight = weight.expand(batch, -1, -1, -1).gather(2, rows)
    return weight if op.where is None else torch.where(op.where.unsqueeze(-1), weight, 1.0)


def visible_lists(call: Call, bm: int, bn: int, device: torch.device) -> Tensor:
    """Blocks of keys that a block of rows may see at all: int32 ``[H|1, row blocks, 1 + n]``, a count and then numbers.

    Worked out on block numbers and on the boxes around coordinates, never on single pairs, so it may list a block in which
    nothing is visible after all.
    """
    _, _, n_queries, n_keys = call.shape
    n_rows, n_cols = -(-n_queries // bm), -(-n_keys // bn)
    row = torch.arange(n_rows, device=device)
    col = torch.arange(n_cols, device=device)
    active = torch.ones(1, n_rows, n_cols, dtype=torch.bool, device=device)
    delta = call.mask.q_offset - call.mask.kv_offset
    last_row = torch.clamp((row + 1) * bm, max=n_queries) - 1
    if call.mask.causal:
        active &= (col * bn)[None] <= (last_row + delta)[:, None]
    left, right = call.mask.window or (None, None)
    if left is not None:
        active &= (col * bn + bn - 1)[None] >= (row * bm + delta - left)[:, None]
    if right is not None:
        active &= (col * bn)[None] <= (last_row + delta + right)[:, None]
    for op in call.edit.of(Blocks):
        if op.where is None:
            active = active & _covered(op, call, bm, bn)
    for op in call.edit.of(Neighbourhood):
        if op.where is None:
            reach = op.radius.view(-1, 1, 1) if isinstance(op.radius, Tensor) else op.radius
            active = active & (_box_distance(op, bm, bn) <= reach)
    order = torch.where(active, col, n_cols).sort(-1).values
    count = active.sum(-1, keepdim=True)
    return torch.cat([count, order], -1).to(torch.int32).contiguous()


def _covered(op: Blocks, call: Call, bm: int, bn: int) -> Tensor:
    """Whether any allowed pattern block meets a tile, ``[H|1, row blocks, key blocks]``, by a summed-area table."""
    _, _, n_queries, n_keys = call.shape
    area = torch.nn.functional.pad(op.allowed.int().cumsum(1).cumsum(2), (1, 0, 1, 0))

    def spans(length: int, step: int, offset: int, blocks: int) -> tuple[Tensor, Tensor]:
        first = torch.arange(-(-length // step), device=area.device) * step
        last = torch.clamp(first + step, max=length) - 1
        return (first + offset) // op.block, torch.clamp((last + offset) // op.block, max=blocks - 1) + 1

    top, bottom = spans(n_queries, bm, call.mask.q_offset, op.allowed.shape[1])
    left, right = spans(n_keys, bn, call.mask.kv_offset, op.allowed.shape[2])
    corner = lambda r, c: area[:, r][:, :, c]  # noqa: E731
    return (corner(bottom, right) - corner(top, right) - corner(bottom, left) + corner(top, left)) > 0


def _box_distance(op: Neighbourhood, bm: int, bn: int) -> Tensor:
    """Least Chebyshev distance between the boxes around two blocks' coordinates, 0 where either has a placeless token.

    ``[1, row blocks, key blocks]``, the least over the batch.
    """
    boxes = []
    for coords, step in ((op.query_coords, bm), (op.key_coords, bn)):
        places = coords.int()
        short = -places.shape[1] % step
        padded = torch.cat([places, places[:, -1:].expand(-1, short, -1)], 1) if short else places
        split = padded.unflatten(1, (-1, step))
        low, high = split.amin(2), split.amax(2)
        boxes.append((low, high, (low < 0).any(-1)))
    (q_low, q_high, q_free), (k_low, k_high, k_free) = boxes
    gap = torch.maximum(k_low[:, None] - q_high[:, :, None], q_low[:, :, None] - k_high[:, None]).clamp_min(0).amax(-1)
    gap = torch.where(q_free[:, :, None] | k_free[:, None], 0, gap)
    return gap.amin(0, keepdim=True)
