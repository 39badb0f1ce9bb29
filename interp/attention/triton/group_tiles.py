"""Which tiles of keys are of one key group, and which hold groups whose mass a redistribution moves: tables for the kernels."""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.attention.edits import MAX_GROUPS
from interp.attention.triton.launching import Arguments, Launch
from interp.attention.triton.tables import strides

CHUNK = 64
"""Tiles that a program looks at together; tiles are compared with each other, so its cost grows with the square."""

LAST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["groups_b", "table_b", "n_keys", "source", "target"])
def group_tiles_kernel(
    groups_ptr, groups_b, table_ptr, table_b, n_keys, source, target,
    BN: tl.constexpr, CHUNK: tl.constexpr, N_GROUPS: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """One program a sample writes the table that :class:`GroupTiles` describes.

    Chunks of tiles are walked twice: forwards for the groups of tiles, their counts and all that a redistribution needs, then
    backwards for the runs of the commonest group, which is known only then.
    """
    groups_at = groups_ptr + tl.program_id(0).to(tl.int64) * groups_b
    only_at = table_ptr + tl.program_id(0).to(tl.int64) * table_b
    n_tiles = tl.cdiv(n_keys, BN)
    before_at = only_at + 2 * n_tiles + 1
    order_at = before_at + n_tiles + 1
    lane = tl.arange(0, CHUNK)
    number = tl.arange(0, N_GROUPS)
    count = tl.zeros([N_GROUPS], tl.int32)
    n_before = 0
    # The kind and first tile of the run that a chunk begins in, and the longest run so far.
    run_kind = 0
    run_first = 0
    best_length = 0
    best_first = 0
    best_kind = 0
    if MOVED:
        tl.store(before_at, 0)
    for first in tl.range(0, n_tiles, CHUNK):
        tile = first + lane
        tile_ok = tile < n_tiles
        keys = tl.minimum(tile[:, None] * BN + tl.arange(0, BN)[None, :], n_keys - 1)
        group = tl.load(groups_at + keys).to(tl.int32)
        lowest = tl.min(group, 1)
        only = tl.where(lowest == tl.max(group, 1), lowest, -2)
        tl.store(only_at + tile, only, mask=tile_ok)
        count += tl.sum(((only[:, None] == number[None, :]) & tile_ok[:, None]).to(tl.int32), 0)
        if MOVED:
            shift = tl.maximum(only, 0)
            one = tile_ok & (only >= 0)
            kind = tl.where(one, ((target >> shift) & 1) + 2 * ((source >> shift) & 1), 0)
            moves = (kind > 0) | (tile_ok & (only == -2))
            before = n_before + tl.cumsum(moves.to(tl.int32), 0)
            tl.store(before_at + 1 + tile, before, mask=tile_ok)
            # Tiles that move fill the list from its begin, the others leave n_tiles at its end.
            place = tl.where(moves, before - 1, n_tiles - 1 - tile + before)
            tl.store(order_at + place, tl.where(moves, tile, n_tiles), mask=tile_ok)
            n_before += tl.sum(moves.to(tl.int32), 0)
            # A run starts after the last earlier tile of another kind.
            other = (lane[None, :] < lane[:, None]) & (kind[None, :] != kind[:, None])
            start = tl.max(tl.where(other, tile[None, :] + 1, -1), 1)
            start = tl.where(start < 0, tl.where(kind == run_kind, run_first, first), start)
            length = tl.where(kind > 0, tile + 1 - start, 0)
            longest = tl.max(length, 0)
            end = tl.min(tl.where(length == longest, tile, LAST), 0)
            if longest > best_length:
                best_length = longest
                best_first = end + 1 - longest
                best_kind = tl.sum(tl.where(tile == end, kind, 0), 0)
            run_kind = tl.sum(tl.where(lane == CHUNK - 1, kind, 0), 0)
            run_first = tl.sum(tl.where(lane == CHUNK - 1, start, 0), 0)
    if MOVED:
        tl.store(order_at + n_tiles, best_first)
        tl.store(order_at + n_tiles + 1, best_first + best_length)
        tl.store(order_at + n_tiles + 2, best_kind)

    rest = tl.min(tl.where(count == tl.max(count, 0), number, N_GROUPS), 0)
    tl.store(only_at + n_tiles, rest)
    # Other threads may have written what is read back here.
    tl.debug_barrier()
    n_chunks = tl.cdiv(n_tiles, CHUNK)
    next_kind = -1
    next_stop = 0
    for back in tl.range(0, n_chunks):
        first = (n_chunks - 1 - back) * CHUNK
        tile = first + lane
        tile_ok = tile < n_tiles
        only = tl.load(only_at + tile, mask=tile_ok, other=-2)
        # What lies after the last tile is of a kind of its own.
        kind = tl.where(tile_ok, (only == rest).to(tl.int32), 2)
        other = (lane[None, :] > lane[:, None]) & (kind[None, :] != kind[:, None])
        stop = tl.min(tl.where(other, tile[None, :], LAST), 1)
        stop = tl.where(stop == LAST, tl.where(kind == next_kind, next_stop, first + CHUNK), stop)
        run = stop - tile
        tl.store(only_at + n_tiles + 1 + tile, tl.where(kind == 1, run, -run), mask=tile_ok)
        next_kind = tl.sum(tl.where(lane == 0, kind, 0), 0)
        next_stop = tl.sum(tl.where(lane == 0, stop, 0), 0)


class GroupTiles:
    """The table of key groups by tile, for groups of one shape, prepared once.

    For n tiles of ``bn`` keys it is int32 ``[B|1, 2 n + 1]``: first the group of each tile, -2 where it holds several. Then
    the group with most tiles of its own, the "rest" (of equals the lowest, 0 where there is none). Then for each tile how many
    from it on are of the rest, or minus how many are not.

    With ``source`` or ``target``, the groups of a redistribution as bits, it is ``[B|1, 4 n + 5]``, and there follow: how many
    tiles with a source or target group in them, or with several groups, lie before tile 0, 1, ... n; their numbers, and
    then n for each of the others; the longest run of tiles that are nothing but target, or nothing but source (of equals the
    first): its first tile, the tile after its last, and 1 or 2 for which; three times 0 where there is none.

    Args:
        groups: int8 ``[B|1, Lk]`` such as later ones, contiguous along the keys, -1 for nobody's.
        bn: keys of a tile, a power of two.
        source: groups that give, as bits.
        target: groups that receive, as bits.
    """

    def __init__(self, groups: Tensor, bn: int, source: int = 0, target: int = 0) -> None:
        batch, n_keys = groups.shape
        n_tiles = -(-n_keys // bn)
        moved = bool(source | target)
        # Groups may go on after the last key, and then serve calls on more keys.
        self.key = bn, source, target, n_keys
        self.shape = (batch, 4 * n_tiles + 5 if moved else 2 * n_tiles + 1)
        fixed: Arguments = {
            "groups_b": strides(groups, 1)[0], "table_b": self.shape[1], "n_keys": n_keys, "source": source, "target": target,
            "BN": bn, "CHUNK": CHUNK, "N_GROUPS": MAX_GROUPS, "MOVED": moved,
        }  # fmt: skip
        self.launch = Launch(group_tiles_kernel, (batch,), fixed, num_warps=4, num_stages=1)

    def __call__(self, groups: Tensor) -> Tensor:
        """The table, new or kept on ``groups``, which many layers may share."""
        kept = _kept(groups)
        table = kept.get(self.key)
        if table is None:
            table = torch.empty(self.shape, dtype=torch.int32, device=groups.device)
            self.launch({"groups_ptr": groups, "table_ptr": table})
            kept[self.key] = table
        return table


def _kept(groups: Tensor) -> dict[Any, Tensor]:
    """What is kept on a groups tensor; one made in inference mode does not tell when it changes, so nothing is on it."""
    if groups.is_inference():
        return {}
    held = vars(groups)
    kept = held.get("_interp_tables")
    if kept is None or kept[0] != groups._version:
        kept = held["_interp_tables"] = (groups._version, {})
    return kept[1]


def group_table(groups: Tensor | None, bn: int, nothing: Tensor) -> Arguments:
    """The table without a redistribution and its stride, as the kernels take them; ``nothing`` where there are no groups."""
    if groups is None:
        return {"table_ptr": nothing, "table_b": 0}
    table = GroupTiles(groups, bn)(groups)
    return {"table_ptr": table, "table_b": strides(table, 1)[0]}
