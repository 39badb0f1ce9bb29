"""From a call with few query rows to what the decoding kernels take, but for what changes from call to call of one kind."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.attention.call import Call
from interp.attention.edits import Edit, Gain, GroupWeights, Redistribute, SinkWindow, Temperature
from interp.attention.triton.decode import GIVEN_WEIGHTS, REDISTRIBUTED, RENORMALISED
from interp.attention.triton.devices import interpreted
from interp.attention.triton.tables import Tables, operands, row_major, row_weights, strides, tables

Values = tuple[Any, ...]

FAR = 1 << 30
EDITED_VALUES = (
    "q_offset", "delta", "bits_ptr", "bits_b", "bits_h", "bits_q", "bits_all", "bias_b", "bias_h", "bias_q", "bias_hidden",
    "dense_ptr", "dense_b", "dense_h", "dense_q", "sw_sink_ptr", "sw_window_ptr", "sw_h", "sw_window_h", "blocks_ptr",
    "blocks_h", "blocks_q", "blocks_size", "near_radius_ptr", "near_h", "near_q_ptr", "near_qb", "near_k_ptr", "near_kb",
    "threshold_ptr", "threshold_b", "threshold_h", "threshold_q", "drop_ptr", "drop_b", "drop_h", "drop_q", "beta_ptr",
    "beta_b", "beta_h", "beta_q",
)  # fmt: skip
EDITED_FLAGS = (
    "BITS", "UNIFORM", "BIAS", "DENSE", "SINK_WINDOW", "BLOCKS", "N_COORDS", "THRESHOLD", "N_DROP", "BETA", "EDIT_GROUPS",
)  # fmt: skip
UNEDITED_VALUES: Values = tuple(
    None if name.endswith("_ptr") else 0.0 if name == "bias_hidden" else 0 for name in EDITED_VALUES
)
UNEDITED_FLAGS: Values = (False,) * len(EDITED_FLAGS)
BITS = slice(EDITED_VALUES.index("bits_ptr"), EDITED_VALUES.index("bits_all") + 1)
NO_ROWS: Values = (None, 0, 0, 0)
UNWEIGHTED: Values = (*NO_ROWS, 0.0, *NO_ROWS, 0, 0, 0, 0, 0.0, 0.0)
PLAIN = frozenset((Gain, Temperature, GroupWeights, Redistribute))
"""Edits that need no tables."""


class Weights(NamedTuple):
    """How classes of keys are weighted.

    Attributes:
        how: as in the kernel, 0 for not at all.
        values: arguments of the combining kernel.
        n_classes: number of classes.
        class_map: the class of each key group, 4 bits a group.
        fractions: whether a redistribution's fraction is a table.
    """

    how: int = 0
    values: Values = UNWEIGHTED
    n_classes: int = 1
    class_map: int = 0
    fractions: bool = False


NO_WEIGHTS = Weights()


@dataclass(eq=False)
class Work:
    """What every launch about calls of one kind shares.

    Attributes:
        shape: batch, query heads, key-value heads, query rows, keys.
        widths: head dims of q and k, and of v.
        values: arguments of ``decode_kernel`` from ``q_b`` up to those of padding.
        groups: the edit's key groups and their batch stride, where the kernel looks at any.
        tail: those after them.
        flags: constants about ``values``, from ``RANGES`` to ``EIGHTS``.
        edited: constants about edits that need tables, by :data:`EDITED_FLAGS`.
        rows: gain (pointer and strides) and the bits of each row, as the combining kernel takes them.
        factor: a gain that is a number.
        dtypes: dtypes of what a variant of the kernels depends on; None where its strides or pointers call for a closer look.
        span: most keys that a row may have to read.
        weights: of key groups.
    """

    shape: tuple[int, int, int, int, int]
    widths: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    values: Values
    groups: Values
    tail: Values
    flags: tuple[bool, ...]
    edited: Values
    rows: Values
    factor: float
    dtypes: Hashable | None
    span: int
    weights: Weights

    @classmethod
    def of(cls, call: Call, shared: Tables | None) -> Work:
        mask, edit = call.mask, call.edit
        q, k, v = operands(call)
        (batch, heads, n_queries, width), n_keys = q.shape, k.shape[2]
        lowest, highest = -FAR, FAR
        delta = mask.q_offset - mask.kv_offset
        if mask.causal:
            highest = delta + 1
        if mask.window is not None:
            left, right = mask.window
            lowest = lowest if left is None else delta - left
            highest = highest if right is None else min(highest, delta + right + 1)
        span = min(n_keys, n_queries - 1 + highest) - max(lowest, 0)

        scale, factor, row_scale, gain, weights = call.scale, 1.0, NO_ROWS, NO_ROWS, NO_WEIGHTS
        exotic = call.bias is not None or mask.dense is not None or mask.rule is not None
        if edit.operations:
            exotic = exotic or any(type(op) not in PLAIN for op in edit.operations)
            divisor, row_scale = _by_row(edit.of(Temperature))
            factor, gain = _by_row(edit.of(Gain))
            scale /= divisor
            weights = _weights(call)
        edited_values, edited, boosted = UNEDITED_VALUES, UNEDITED_FLAGS, False
        if exotic:
            a = (tables(call, interpreted()) if shared is None else shared).arguments
            edited_values, edited = tuple(a[n] for n in EDITED_VALUES), tuple(a[n] for n in EDITED_FLAGS)
            span, boosted = _short(edit, span), bool(a["BETA"])
        groups: Values = (None, 0)
        if weights.n_classes > 1 or boosted:
            of_keys = edit.groups
            if of_keys is None:
                of_keys = torch.zeros((1, n_keys), dtype=torch.int8, device=q.device)
            groups = with_batch_stride(row_major(of_keys))

        padding, first = mask.padding, mask.first
        pads: Values = (None, 0)
        if padding is not None:
            pads = with_batch_stride(row_major(padding.to(q.device)).view(torch.uint8))
        reads_first = first is not None and (padding is not None or bool(edit.of(SinkWindow)))
        firsts: Values = with_batch_stride(first.to(q.device)) if first is not None and reads_first else (None, 0)

        steps = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        together = functools.reduce(int.__or__, steps)
        values = (
            *steps, scale, call.softcap or 0.0, factor, heads, n_queries, n_keys, batch * heads * n_queries, lowest, highest,
            mask.kv_offset, *row_scale, *gain, *pads, *firsts,
        )  # fmt: skip
        flags = (
            n_queries > 1 and (lowest > -FAR or highest < FAR), padding is not None, reads_first, call.softcap is not None,
            call.sinks is not None, row_scale[0] is not None, gain[0] is not None, not together & 7,
        )  # fmt: skip
        dtypes = None
        if not exotic and not together & 15 and together < 1 << 31 and aligned_to_16(groups[0]):
            pointers = (call.sinks, row_scale[0], gain[0], firsts[0], groups[0], weights.values[0], weights.values[5])
            dtypes = (q.dtype, *(None if x is None else x.dtype for x in pointers))
        return cls(
            shape=(batch, heads, k.shape[1], n_queries, n_keys), widths=(width, v.shape[3]), dtype=q.dtype, device=q.device,
            values=values, groups=groups, tail=(weights.class_map, *edited_values), flags=flags, edited=edited,
            rows=(*gain, *edited_values[BITS]), factor=factor, dtypes=dtypes, span=span, weights=weights,
        )  # fmt: skip

    def weighted_by(self, table: Tensor) -> Work:
        """The same work under weights ``[B, H, Lq, G]`` that are known."""
        values = (table, *strides(table), *UNWEIGHTED[4:])
        weights = self.weights._replace(how=GIVEN_WEIGHTS.value, values=values)
        return replace(self, weights=weights, dtypes=None)

    def of_length(self, k: Tensor, v: Tensor, groups: Tensor | None) -> Work | None:
        """The same work on a cache of another length, all of which its one query row sees; None where it must be looked at.

        Args:
            groups: the edit's key groups, where the kernel looks at any.
        """
        if self.dtypes is None or (groups is None) != (self.groups[0] is None):
            return None
        n_keys = k.shape[2]
        # q is the same kind of tensor as before.
        steps = (*self.values[:3], *k.stride()[:3], *v.stride()[:3])
        together = functools.reduce(int.__or__, steps)
        of_keys: Values = (None, 0) if groups is None else with_batch_stride(row_major(groups))
        if (
            together & 15
            or together >= 1 << 31
            or k.stride(3) != 1
            or v.stride(3) != 1
            or not aligned_to_16(of_keys[0])
        ):
            return None
        values = (*steps, *self.values[9:14], n_keys, *self.values[15:])
        shape = (*self.shape[:4], n_keys)
        return replace(self, shape=shape, values=values, groups=of_keys, span=n_keys)

    def before_step_4(self) -> Work:
        """The same work without uniform rows and weights."""
        at = EDITED_FLAGS.index("UNIFORM")
        edited = (*self.edited[:at], False, *self.edited[at + 1 :])
        return replace(self, edited=edited, weights=NO_WEIGHTS)


def with_batch_stride(table: Tensor) -> Values:
    """A table ``[B|1, ...]`` and its stride, 0 where it stands for all samples."""
    return table, table.stride(0) if table.shape[0] > 1 else 0


def aligned_to_16(table: Tensor | None) -> bool:
    """Whether a table starts where a variant compiled for wide loads may read it."""
    return table is None or not table.data_ptr() & 15


def _by_row(operations: list[Any]) -> tuple[float, Values]:
    """The product of all values of gains or temperatures: a number, and a table by row with its strides."""
    number, table = 1.0, None
    for op in operations:
        value: Tensor | float = op.value
        if op.where is not None:
            value = torch.where(op.where, value, 1.0)
        if not isinstance(value, Tensor):
            number *= value
        else:
            table = value if table is None else table * value
    return number, NO_ROWS if table is None else (table, *strides(table))


def _short(edit: Edit, span: int) -> int:
    """Keys that a row reads at most, given a window that is the same for all rows and heads."""
    for op in edit.of(SinkWindow):
        if op.where is None and not isinstance(op.sink, Tensor) and not isinstance(op.window, Tensor):
            return min(span, op.sink + op.window)
    return span


def _weights(call: Call) -> Weights:
    edit = call.edit
    operations = edit.of(GroupWeights, Redistribute)
    if not operations:
        return NO_WEIGHTS
    n, identity = edit.key_groups, 0x76543210
    op = operations[0]
    if len(operations) > 1:
        return Weights(0, UNWEIGHTED, n, identity)
    if isinstance(op, GroupWeights):
        table = row_major(row_weights(op, call))
        values = (table, *strides(table), *UNWEIGHTED[4:])
        return Weights(RENORMALISED.value if op.renormalise else GIVEN_WEIGHTS.value, values, n, identity)
    roles = (tuple(op.source), tuple(op.target), tuple(op.gate_mass), tuple(op.gate_share))
    n, class_map, sets = _classes(n, *roles)
    # Moving nothing is what a row does that is not selected.
    fraction = op.fraction if op.where is None else torch.where(op.where, op.fraction, 0.0)
    number, table = (
        (0.0, (fraction, *strides(fraction))) if isinstance(fraction, Tensor) else (float(fraction), NO_ROWS)
    )
    values = (*NO_ROWS, number, *table, *sets, float(op.summ), float(op.rho))
    return Weights(REDISTRIBUTED.value, values, n, class_map, table[0] is not None)


@functools.lru_cache(maxsize=256)
def _classes(n_groups: int, *roles: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """Groups that play the same parts in one class: the number of classes, their map, and each role's set as bits."""
    parts = [tuple(group in role for role in roles) for group in range(n_groups)]
    kinds = list(dict.fromkeys(parts))
    class_map = sum(kinds.index(part) << (4 * group) for group, part in enumerate(parts))
    return len(kinds), class_map, tuple(sum(kind[i] << at for at, kind in enumerate(kinds)) for i in range(len(roles)))
