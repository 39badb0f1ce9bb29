"""One launch for a token: the program that ends last puts the parts of its key-value head together.

A token's forward is bound by the host, where a launch costs what its arguments cost. This one is for calls with little to say:
one query row a head, nothing but z wanted, no edit or a redistribution. It takes a third of the arguments of the general
kernels, and is these kernels.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.attention.triton import tuned
from interp.attention.triton.decode import REDISTRIBUTED, combine_row, decode_kernel
from interp.attention.triton.decode_arguments import UNEDITED_FLAGS, Work, aligned_to_16, with_batch_stride
from interp.attention.triton.devices import interpreted
from interp.attention.triton.launching import Start
from interp.attention.triton.tables import next_power, row_major

if TYPE_CHECKING:
    from interp.attention.triton.decode_launch import Tile

T = TypeVar("T")

MOST_ROWS = 8
"""Query heads of a key-value head at most: one program puts the rows of all together, one after the other."""
COUNTERS = 1 << 14
"""Samples times key-value heads at most."""
ROOM = 1 << 21
"""Numbers that all parts leave, up to which launches of a stream share their room."""

UNSPECIALISED = [
    "groups_ptr", "groups_b", "counts_ptr", "n_splits", "scale", "factor", "n_heads", "n_keys", "n_rows", "from_row", "to_row",
    "class_map", "fraction", "source", "target", "gate", "share_of", "summ", "rho",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def joined_kernel(
    q_ptr, k_ptr, v_ptr, z_ptr, part_ptr, groups_ptr, counts_ptr,
    groups_b, n_splits, q_b, q_h, k_b, k_h, k_n, v_b, v_h, v_n, scale, factor, n_heads, n_keys, n_rows, from_row, to_row,
    class_map, fraction, source, target, gate, share_of, summ, rho,
    BM: tl.constexpr, BN: tl.constexpr, ROW_BLOCKS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, KV_GROUP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    EIGHTS: tl.constexpr, DIRECT: tl.constexpr, CLASSES: tl.constexpr, HOW: tl.constexpr, PARTS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """:func:`decode_kernel`, and after the last part of a key-value head what :func:`combine_kernel` does with its rows.

    ``counts_ptr`` has a 0 for each sample and key-value head before and after.
    """
    decode_kernel(
        q_ptr=q_ptr, k_ptr=k_ptr, v_ptr=v_ptr, sinks_ptr=None, bias_ptr=None, z_ptr=z_ptr, part_ptr=part_ptr,
        stats_ptr=None, key_ptr=None, mass_ptr=None, map_ptr=None, used_ptr=None, hide=0.0, n_splits=n_splits,
        q_b=q_b, q_h=q_h, q_m=0, k_b=k_b, k_h=k_h, k_n=k_n, v_b=v_b, v_h=v_h, v_n=v_n, scale=scale, softcap=0.0,
        factor=factor, n_heads=n_heads, n_queries=1, n_keys=n_keys, n_rows=n_rows, from_row=from_row,
        to_row=to_row, kv_offset=0, row_scale_ptr=None, row_scale_b=0, row_scale_h=0, row_scale_q=0,
        gain_ptr=None, gain_b=0, gain_h=0, gain_q=0, padding_ptr=None, padding_b=0, first_ptr=None, first_b=0,
        groups_ptr=None, groups_b=0, edit_groups_ptr=groups_ptr, edit_groups_b=groups_b, class_map=class_map,
        q_offset=0, delta=0, bits_ptr=None, bits_b=0, bits_h=0, bits_q=0, bits_all=0, bias_b=0, bias_h=0,
        bias_q=0, bias_hidden=0.0, dense_ptr=None, dense_b=0, dense_h=0, dense_q=0, sw_sink_ptr=None,
        sw_window_ptr=None, sw_h=0, sw_window_h=0, blocks_ptr=None, blocks_h=0, blocks_q=0, blocks_size=0,
        near_radius_ptr=None, near_h=0, near_q_ptr=None, near_qb=0, near_k_ptr=None, near_kb=0,
        threshold_ptr=None, threshold_b=0, threshold_h=0, threshold_q=0, drop_ptr=None, drop_b=0, drop_h=0,
        drop_q=0, beta_ptr=None, beta_b=0, beta_h=0, beta_q=0, BM=BM, BN=BN, ROW_BLOCKS=ROW_BLOCKS,
        HEAD_DIM=HEAD_DIM, V_DIM=V_DIM, D=D, DV=DV, KV_GROUP=KV_GROUP, UPCAST=UPCAST, PRECISION=PRECISION,
        OUTPUT=True, ROW_STATS=False, LSE=False, MAP=False, DIRECT=DIRECT, GROUPS=False, N_GROUPS=1,
        CLASSES=CLASSES, WEIGHTED=False, RANGES=False, PADDING=False, FIRST=False, SOFTCAP=False, SINKS=False,
        ROW_SCALE=False, GAIN=False, EIGHTS=EIGHTS, EDITED=False, BITS=False, UNIFORM=False, BIAS=False,
        DENSE=False, SINK_WINDOW=False, BLOCKS=False, N_COORDS=False, THRESHOLD=False, N_DROP=False, BETA=False,
        EDIT_GROUPS=False,
    )  # fmt: skip
    if not DIRECT:
        unit = tl.program_id(0) // n_splits // ROW_BLOCKS
        # All threads have stored their part before one of them says so.
        tl.debug_barrier()
        before = tl.atomic_add(counts_ptr + unit, 1, sem="acq_rel")
        if before == n_splits * ROW_BLOCKS - 1:
            tl.store(counts_ptr + unit, 0)
            for i in range(KV_GROUP):
                combine_row(
                    row=unit.to(tl.int64) * KV_GROUP + i, sinks_ptr=None, z_ptr=z_ptr, part_ptr=part_ptr,
                    stats_ptr=None, key_ptr=None, mass_ptr=None, used_ptr=None, n_parts=n_splits * CLASSES,
                    n_heads=n_heads, n_queries=1, n_rows=n_rows, factor=factor, gain_ptr=None, gain_b=0,
                    gain_h=0, gain_q=0, bits_ptr=None, bits_b=0, bits_h=0, bits_q=0, bits_all=0,
                    weight_ptr=None, weight_b=0, weight_h=0, weight_q=0, fraction=fraction, fraction_ptr=None,
                    fraction_b=0, fraction_h=0, fraction_q=0, source=source, target=target, gate=gate,
                    share_of=share_of, summ=summ, rho=rho, PARTS=PARTS, STEP=STEP, DV=DV, V_DIM=V_DIM,
                    CLASSES=CLASSES, HOW=HOW, OUTPUT=True, ROW_STATS=False, LSE=False, MASSES=False, USED=False,
                    N_GROUPS=1, SINKS=False, GAIN=False, BITS=False, UNIFORM=False, FRACTIONS=False,
                )  # fmt: skip


class Joined:
    """The launch of one kind of call.

    Args:
        work: what of; :meth:`able` has said yes.
        n_splits: parts of the keys.
        part_size: numbers that all parts leave.
        tile: of the general kernel.
        direct: there is one part only, which leaves z.
    """

    def __init__(self, work: Work, n_splits: int, part_size: int, tile: "Tile", *, direct: bool) -> None:
        batch, heads, n_kv, n_queries, _ = work.shape
        weights, values = work.weights, work.values
        self.z_shape, self.device = (batch, n_queries, heads, work.widths[1]), work.device
        self.part_size, self.groups = 1 if direct else part_size, work.groups
        self.parts, self.bucket = n_splits, tuned.bucket(max(work.span, 1))
        parts = next_power(n_splits * weights.n_classes)
        constants = (
            tile.bm, tile.config.keys, tile.row_blocks, *work.widths, max(next_power(work.widths[0]), 16), tile.dv, heads // n_kv,
            interpreted(), "ieee", work.flags[-1], direct, weights.n_classes, weights.how, parts, min(parts, 32),
        )  # fmt: skip
        fixed = (
            work.groups[1], n_splits, *values[:2], *values[3:10], work.factor, heads, values[14], values[15], values[16], values[17],
            weights.class_map, weights.values[4], *weights.values[9:],
        )  # fmt: skip
        grid = (batch * n_kv * tile.row_blocks * n_splits, 1, 1)
        _, warps, stages = tile.config
        variant = ("joined", work.device.index, work.dtypes, constants, warps, stages)
        self.start = Start(joined_kernel, grid, (*fixed, *constants), warps, stages, variant)

    def grown(self, k: Tensor, v: Tensor, groups: Tensor | None, parts: int) -> "Joined | None":
        """The same on a cache of another length, all of which the row sees; None where it would be another launch.

        A token would otherwise wait for what is known of its last one but for a few numbers.
        """
        steps = (*k.stride()[:3], *v.stride()[:3])
        together = functools.reduce(int.__or__, steps)
        same = (
            parts == self.parts and not together & 15 and together < 1 << 31 and k.stride(3) == 1 and v.stride(3) == 1
        )
        fits = (groups is None) == (self.groups[0] is None) and aligned_to_16(groups)
        if not same or not fits or tuned.bucket(k.shape[2]) != self.bucket:
            return None
        made, start = _like(self), _like(self.start)
        if groups is not None:
            made.groups = with_batch_stride(row_major(groups))
        fixed = self.start.fixed
        start.fixed = (made.groups[1], *fixed[1:4], *steps, *fixed[10:13], k.shape[2], *fixed[14:])
        made.start = start
        return made

    @staticmethod
    def able(work: Work) -> bool:
        """Whether the launch can say what the call is about."""
        batch, heads, n_kv, n_queries, _ = work.shape
        moves = work.weights.how == REDISTRIBUTED.value and not work.weights.fractions
        fixed = moves or work.weights.how == 0
        # The last flag is about strides, those before it about what the launch cannot say.
        plain = work.dtypes is not None and work.edited == UNEDITED_FLAGS and not any(work.flags[:-1])
        return plain and fixed and n_queries == 1 and heads // n_kv <= MOST_ROWS and batch * n_kv <= COUNTERS

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, groups: Tensor | None) -> Tensor | None:
        """z ``[B, 1, H, Dv]``; None where the general kernels must do it.

        Args:
            groups: the edit's key groups where they are not those of ``work``, with the same strides.
        """
        room = shared_room(self.device)
        if room is None:
            return None
        counts, part = room
        if self.part_size > ROOM:
            part = torch.empty(self.part_size, dtype=torch.float32, device=self.device)
        at = q.data_ptr() | k.data_ptr() | v.data_ptr()
        if groups is None:
            groups = self.groups[0]
        if groups is not None:
            at |= groups.data_ptr()
        z = q.new_empty(self.z_shape)
        self.start((q, k, v, z, part, groups, counts), not at & 15)
        return z


def _like(thing: T) -> T:
    """A shallow copy, at a tenth of what :func:`copy.copy` takes."""
    made = object.__new__(type(thing))
    vars(made).update(vars(thing))
    return made


_rooms: dict[tuple[int | None, int], tuple[Tensor, Tensor]] = {}


def shared_room(device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Zeros to count on and room for :data:`ROOM` numbers, for launches on one stream, which come one after the other.

    None while a CUDA graph is captured: it may be replayed beside whatever then runs on the stream.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        active: Any = triton.runtime.driver.active
        stream = active.get_current_stream(device.index)
    found = _rooms.get((device.index, stream))
    if found is None:
        with torch.inference_mode(False):
            counts = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
            found = counts, torch.empty(ROOM, dtype=torch.float32, device=device)
        _rooms[device.index, stream] = found
    return found
