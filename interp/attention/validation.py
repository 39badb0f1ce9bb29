"""Checks of the op's arguments, apart from its mathematics.

Every message names the argument, the rule, and what was got. Checks that read tensor values touch only small tensors
(groups, coordinates' shapes, per-row values), never anything of size queries x keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from interp.attention.call import AXES
from interp.attention.edits import (
    MAX_DROPPED_KEYS,
    MAX_GROUPS,
    STAGES,
    Blocks,
    Boost,
    DropKeys,
    Edit,
    GivenRows,
    GroupWeights,
    Neighbourhood,
    Operation,
    Redistribute,
    SinkWindow,
    Temperature,
    TopKeys,
)
from interp.attention.mask import Mask
from interp.attention.readouts import MAX_TOPK, Distances, OffsetBins, Readout

Sizes = dict[str, int]
AXIS_NAMES = {"b": "B", "h": "H", "q": "Lq", "k": "Lk", "Q": "Lq", "K": "Lk"}


class AttentionArgumentError(ValueError):
    """An argument of the op breaks a rule; the message names the argument, the rule and what was got."""


def fail(argument: str, rule: str, got: object) -> NoReturn:
    raise AttentionArgumentError(f"{argument}: {rule}; got {got}")


def describe(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Mask,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    edit: Edit,
    readout: Readout,
    lse: Tensor | None = None,
) -> None:
    """Raise :class:`AttentionArgumentError` unless the arguments of a call fit together."""
    sizes = check_tensors(q, k, v)
    for name, given, kind in (("mask", mask, Mask), ("edit", edit, Edit), ("readout", readout, Readout)):
        if not isinstance(given, kind):
            fail(name, f"must be None or {kind.__name__}(...)", f"a {type(given).__name__}")
    if not isinstance(scale, float | int) or not math.isfinite(scale):
        fail("scale", "must be a finite number", repr(scale))
    if softcap is not None and (not math.isfinite(softcap) or softcap <= 0):
        fail("softcap", "must be None or a finite number > 0", softcap)
    if sinks is not None:
        check_shape("sinks", sinks, "H", sizes, "float")
    if bias is not None:
        check_shape("bias", bias, "bhqK", sizes, "float")
    if lse is not None and (lse.dtype != torch.float32 or lse.shape != q.shape[:3] or not lse.is_contiguous()):
        fail("lse", f"must be contiguous float32 {tuple(q.shape[:3])}", describe(lse))
    check_mask(mask, sizes)
    check_edit(edit, mask, sizes)
    check_readout(readout, mask, sizes)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            fail(name, "must have 4 dimensions [batch, head, position, dim]", describe(x))
        if 0 in x.shape:
            fail(name, "must not be empty", describe(x))
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            fail(
                name,
                f"must be floating point, with q's dtype and device ({q.dtype}, {q.device})",
                f"{x.dtype}, {x.device}",
            )
    batch, heads, n_queries, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        fail("k", f"must have q's batch {batch} and head dim {dim}", describe(k))
    if v.shape[:3] != k.shape[:3]:
        fail("v", f"must have k's batch, heads and length {tuple(k.shape[:3])}", describe(v))
    if heads % k.shape[1]:
        fail("k", f"its number of heads must divide q's {heads}", k.shape[1])
    return {"B": batch, "H": heads, "Lq": n_queries, "Lk": k.shape[2]}


# Shapes


def check_shape(name: str, x: object, axes: str, sizes: Sizes, kind: str) -> None:
    """Axes as in :data:`interp.attention.call.AXES` (H also for an axis that is not broadcast)."""
    # The words are put together only where something is wrong: every token makes calls of a new kind.
    if isinstance(x, Tensor) and x.ndim == len(axes) and KINDS[kind](x):
        for axis, size in zip(axes, x.shape, strict=True):
            if axis != "." and size != sizes[AXIS_NAMES.get(axis, axis)] and not (size == 1 and axis in "bhq"):
                break
        else:
            return
    wanted = "[" + ", ".join(_axis(axis) for axis in axes) + "]"
    numbers = {AXIS_NAMES.get(a, a): sizes[AXIS_NAMES.get(a, a)] for a in axes if a != "."}
    rule = f"must be {'an' if kind == 'int' else 'a'} {kind} tensor {wanted} with " + ", ".join(
        f"{n} = {size}" for n, size in numbers.items()
    )
    fail(name, rule, describe(x))


KINDS: dict[str, Callable[[Tensor], bool]] = {
    "float": lambda t: t.is_floating_point(),
    "bool": lambda t: t.dtype == torch.bool,
    "int": lambda t: not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool,
}


def _axis(axis: str) -> str:
    if axis == ".":
        return "n"
    return f"{AXIS_NAMES[axis]}|1" if axis in "bhq" else AXIS_NAMES.get(axis, axis)


def check_numbers(name: str, x: Tensor | Sequence[int], low: float, high: float) -> None:
    """All values within ``low .. high``, inclusive."""
    if isinstance(x, Tensor):
        if x.numel() == 0:
            return
        # Together: a GPU is waited for once.
        least, most = map(float, torch.stack(torch.aminmax(x.detach())).tolist())
    else:
        least, most = min(x, default=low), max(x, default=low)
    if not (low <= least and most <= high):
        fail(name, f"values must lie within {low} .. {high}", f"{least} .. {most}")


def check_index(name: str, x: object, below: int, *, unique: bool = False) -> None:
    """A 1-D int tensor of numbers ``0 .. below - 1``."""
    if not isinstance(x, Tensor) or x.ndim != 1 or x.dtype != torch.int64:
        fail(name, "must be an int64 tensor [n]", describe(x))
    check_numbers(name, x, 0, below - 1)
    if unique and len(torch.unique(x)) < len(x):
        fail(name, "must not name one twice", x.tolist())


def check_groups(name: str, groups: object, axes: str, sizes: Sizes, n_groups: int, lowest: int = 0) -> None:
    check_shape(name, groups, axes, sizes, "int")
    assert isinstance(groups, Tensor)
    check_numbers(name, groups, lowest, n_groups - 1)


def check_group_number(name: str, n_groups: object) -> None:
    if not isinstance(n_groups, int) or not 1 <= n_groups <= MAX_GROUPS:
        fail(name, f"must be an int within 1 .. {MAX_GROUPS}", n_groups)


# Mask


def check_mask(mask: Mask, sizes: Sizes) -> None:
    for name in ("q_offset", "kv_offset"):
        value = getattr(mask, name)
        if not isinstance(value, int) or value < 0:
            fail(f"mask.{name}", "must be an int >= 0", repr(value))
    if mask.window is not None and (
        len(mask.window) != 2 or any(side is not None and not isinstance(side, int) for side in mask.window)
    ):
        fail("mask.window", "must be (left, right), each an int or None", mask.window)
    if mask.cross and (mask.causal or mask.window is not None):
        fail(
            "mask.causal, window",
            "cross attention has none: its positions cannot be compared",
            f"{mask.causal}, {mask.window}",
        )
    if mask.padding is not None:
        check_shape("mask.padding", mask.padding, "bK", sizes, "bool")
    if mask.dense is not None:
        check_shape("mask.dense", mask.dense, "bhQK", sizes, "bool")
    if mask.first is not None:
        check_shape("mask.first", mask.first, "b", sizes, "int")


# Edit


def check_edit(edit: Edit, mask: Mask, sizes: Sizes) -> None:
    check_group_number("edit.n_groups", edit.key_groups)
    check_group_number("edit.query_groups (from the weights' third axis)", edit.row_groups)
    if edit.groups is not None:
        if edit.family is None:
            check_groups("edit.groups", edit.groups, "bK", sizes, edit.key_groups)
        else:
            check_shape("edit.groups", edit.groups, "bK", sizes, "int")
    elif edit.key_groups > 1 and edit.of(Boost, GroupWeights, Redistribute):
        fail("edit.groups", f"must be given where operations speak of {edit.key_groups} key groups", None)
    if edit.query_groups is not None:
        check_shape("edit.query_groups", edit.query_groups, "bQ", sizes, "int")
    if edit.row_groups > 1:
        if edit.query_groups is None:
            fail("edit.query_groups", f"must be given where weights differ by {edit.row_groups} query groups", None)
        check_numbers("edit.query_groups", edit.query_groups, 0, edit.row_groups - 1)
    for number, op in enumerate(edit.operations):
        if type(op) not in STAGES:
            fail(
                f"edit.operations[{number}]",
                "must be one of " + ", ".join(t.__name__ for t in STAGES),
                type(op).__name__,
            )
        check_operation(f"edit.{type(op).__name__}", op, edit, mask, sizes)


FIELD_KINDS = {
    **dict.fromkeys(("where", "allowed"), "bool"),
    **dict.fromkeys(("query_coords", "key_coords", "keys", "sink", "window", "radius"), "int"),
}


def check_operation(name: str, op: Operation, edit: Edit, mask: Mask, sizes: Sizes) -> None:
    """Shapes and dtypes by the table of axes, then the rules of each kind."""
    if isinstance(op, GivenRows):
        check_given_rows(name, op, sizes)
        return
    for field, axes in AXES[type(op)].items():
        value = getattr(op, field)
        if isinstance(value, Tensor):
            check_shape(f"{name}.{field}", value, axes, sizes, FIELD_KINDS.get(field, "float"))
        elif not (value is None and field in ("where", "draws")) and not isinstance(
            value, int if FIELD_KINDS.get(field) == "int" else float | int
        ):
            fail(f"{name}.{field}", f"must be a number or a tensor {axes}", describe(value))
    match op:
        case Temperature():
            check_positive(f"{name}.value", op.value)
        case Boost():
            check_width(f"{name}.beta", op.beta.shape[-1], edit)
        case SinkWindow():
            if mask.cross:
                fail(
                    name,
                    "needs self attention: positions of queries and keys cannot be compared",
                    "a cross attention call",
                )
            check_not_negative(f"{name}.sink", op.sink)
            check_not_negative(f"{name}.window", op.window)
        case Blocks():
            check_blocks(name, op, mask, sizes)
        case Neighbourhood():
            check_not_negative(f"{name}.radius", op.radius)
            check_coords(name, op, (1, 2))
        case DropKeys():
            if op.keys.shape[-1] > MAX_DROPPED_KEYS:
                fail(f"{name}.keys", f"at most {MAX_DROPPED_KEYS} keys a row", op.keys.shape[-1])
        case TopKeys():
            check_top_keys(name, op)
        case GroupWeights():
            check_width(f"{name}.weight", op.weight.shape[-1], edit)
            if op.weight.shape[2] not in (1, edit.row_groups):
                fail(f"{name}.weight", f"its query-group axis must be 1 or {edit.row_groups} wide", describe(op.weight))
            check_not_negative(f"{name}.weight", op.weight)
        case Redistribute():
            check_redistribute(name, op, edit)
        case _:
            pass


def check_given_rows(name: str, op: GivenRows, sizes: Sizes) -> None:
    check_index(f"{name}.heads", op.heads, sizes["H"], unique=True)
    check_index(f"{name}.rows", op.rows, sizes["Lq"], unique=True)
    check_shape(f"{name}.p", op.p, "bnRK", {**sizes, "n": len(op.heads), "R": len(op.rows)}, "float")


def check_blocks(name: str, op: Blocks, mask: Mask, sizes: Sizes) -> None:
    if op.block < 1:
        fail(f"{name}.block", "must be >= 1", op.block)
    needed = (
        (mask.q_offset + sizes["Lq"] - 1) // op.block + 1,
        (mask.kv_offset + sizes["Lk"] - 1) // op.block + 1,
    )
    if op.allowed.shape[1] < needed[0] or op.allowed.shape[2] < needed[1]:
        fail(f"{name}.allowed", f"must cover absolute blocks [H|1, {needed[0]}, {needed[1]}]", describe(op.allowed))


def check_top_keys(name: str, op: TopKeys) -> None:
    if isinstance(op.k, bool) or not isinstance(op.k, int) or op.k < 1:
        fail(f"{name}.k", "must be a whole number >= 1", repr(op.k))
    if op.draws is not None and op.draws.shape[-1] != op.k:
        fail(f"{name}.draws", f"its last axis must be k = {op.k} wide", describe(op.draws))
    if isinstance(op.share, bool) or not isinstance(op.share, float | int) or not 0 <= op.share <= 1:
        fail(f"{name}.share", "must be a number within 0 .. 1", repr(op.share))


def check_redistribute(name: str, op: Redistribute, edit: Edit) -> None:
    for field in ("source", "target", "gate_mass", "gate_share"):
        check_numbers(f"{name}.{field}", getattr(op, field), 0, edit.key_groups - 1)
    if not op.source or not op.target:
        fail(f"{name}.source, target", "must each name a group", f"{op.source}, {op.target}")
    if set(op.source) & set(op.target):
        fail(f"{name}.source, target", "must be disjoint", f"{op.source}, {op.target}")
    fraction = op.fraction if isinstance(op.fraction, Tensor) else [op.fraction]
    check_numbers(f"{name}.fraction", fraction, 0.0, 1.0)  # pyright: ignore[reportArgumentType]


def check_width(name: str, width: int, edit: Edit) -> None:
    if width != edit.key_groups:
        fail(name, f"its last axis must have the edit's {edit.key_groups} key groups", width)


def check_positive(name: str, value: Tensor | float) -> None:
    if not (bool((value > 0).all()) if isinstance(value, Tensor) else value > 0):
        fail(name, "must be > 0", f"a smallest value of {float(value.min()) if isinstance(value, Tensor) else value}")


def check_not_negative(name: str, value: Tensor | float) -> None:
    if not (bool((value >= 0).all()) if isinstance(value, Tensor) else value >= 0):
        fail(
            name,
            "must not be negative",
            f"a smallest value of {float(value.min()) if isinstance(value, Tensor) else value}",
        )


def check_coords(name: str, thing: Neighbourhood | OffsetBins | Distances, dimensions: tuple[int, ...]) -> None:
    widths = thing.query_coords.shape[-1], thing.key_coords.shape[-1]
    if widths[0] != widths[1] or widths[0] not in dimensions:
        fail(f"{name}.query_coords, key_coords", f"must have the same last axis, of {dimensions}", widths)


# Readout


def check_readout(readout: Readout, mask: Mask, sizes: Sizes) -> None:
    check_group_number("readout.n_groups", readout.n_groups)
    check_group_number("readout.n_query_groups", readout.n_query_groups)
    if readout.heads is not None:
        check_index("readout.heads", readout.heads, sizes["H"], unique=True)
    if readout.groups is not None:
        check_groups("readout.groups", readout.groups, "bK", sizes, readout.n_groups)
    if readout.query_groups is not None:
        check_groups("readout.query_groups", readout.query_groups, "bQ", sizes, readout.n_query_groups, lowest=-1)
    if not isinstance(readout.topk, int) or not 0 <= readout.topk <= MAX_TOPK:
        fail("readout.topk", f"must be an int within 0 .. {MAX_TOPK}", readout.topk)
    if not isinstance(readout.pooled, int) or readout.pooled < 0:
        fail("readout.pooled", "must be an int >= 0", readout.pooled)
    for name in ("rows", "group_output"):
        rows = getattr(readout, name)
        if rows is not None:
            check_index(f"readout.{name}", rows, sizes["Lq"])
    for name, asked in (("readout.offset", readout.offset), ("readout.distance", readout.distance)):
        if asked is None:
            continue
        if mask.cross:
            fail(name, "needs self attention: queries and keys are different sequences", "a cross attention call")
        for field, axes in AXES[type(asked)].items():
            check_shape(f"{name}.{field}", getattr(asked, field), axes, sizes, "int")
        check_coords(name, asked, (1, 2))
    if readout.offset is not None:
        check_bins(readout.offset)


def check_bins(bins: OffsetBins) -> None:
    n = bins.query_coords.shape[-1]
    if len(bins.lo) != n or len(bins.hi) != n or any(low > high for low, high in zip(bins.lo, bins.hi, strict=True)):
        fail("readout.offset.lo, hi", f"must have {n} entries each, lo <= hi", f"{bins.lo}, {bins.hi}")
