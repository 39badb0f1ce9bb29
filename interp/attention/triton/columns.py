"""Adding up the partial column sums that programs leave by block of rows."""

# pyright: basic, reportGeneralTypeIssues=false

import triton
import triton.language as tl

RUNNING_INTS = [
    "n_parts", "first_block", "n_chunks", "n_cols", "n_queries", "n_keys", "n_heads", "delta", "left", "right", "first_b",
    "groups_b", "kv_offset",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNNING_INTS)
def sum_parts_kernel(
    part_ptr, out_ptr, pool_ptr, query_groups_ptr, groups_b, first_ptr, first_b,
    n_parts, first_block, n_chunks, n_cols, n_queries, n_keys, n_heads, delta, kv_offset, left, right,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDING: tl.constexpr, ZEROED: tl.constexpr,
    N_QUERY_GROUPS: tl.constexpr, QUERY_GROUPS: tl.constexpr, BLOCKS: tl.constexpr, RECEIVED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """``received [B * H, Gq, Lk]`` from parts ``[B * H, Gq, n_parts, Lk]`` of the row blocks from ``first_block`` on.

    Parts that no program wrote (its rows see nothing there) are left out by the same arithmetic that made it skip them, so
    that the buffer need not be cleared first; ``ZEROED`` says that it was. ``PARTS`` are read at a time, and every ``CHUNK`` of
    them make a row of block sums.
    """
    # All in one axis of the grid: the others end at 65535.
    col = tl.program_id(0) % n_cols
    cols = col * BK + tl.arange(0, BK)
    bhg = (tl.program_id(0) // n_cols).to(tl.int64)
    g = (bhg % N_QUERY_GROUPS).to(tl.int32)
    b = bhg // N_QUERY_GROUPS // n_heads
    tile_start = cols // BN * BN
    col_ok = cols < n_keys
    total = tl.zeros([BK], tl.float32)
    start = 0
    if CAUSAL and not ZEROED:
        start = tl.maximum((col * BK // BN * BN - delta) // BM - first_block, 0) // PARTS * PARTS
    for first in tl.range(start, n_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        written = (part < n_parts)[:, None] & col_ok[None, :]
        if not ZEROED:
            first_row = (part + first_block) * BM
            last_row = tl.minimum(first_row + BM, n_queries) - 1
            lo = part * 0
            hi = part * 0 + n_keys
            if CAUSAL:
                hi = tl.minimum(hi, last_row + delta + 1)
            if RIGHT:
                hi = tl.minimum(hi, last_row + delta + right + 1)
            if LEFT:
                lo = tl.maximum(lo, first_row + delta - left)
            if PADDING:
                lo = tl.maximum(lo, tl.load(first_ptr + b * first_b) - kv_offset)
            lo = lo // BN * BN
            written = written & (tile_start[None, :] >= lo[:, None]) & (tile_start[None, :] < hi[:, None])
            if (N_QUERY_GROUPS > 1) | QUERY_GROUPS:
                query = (part[:, None] + first_block) * BM + tl.arange(0, BM)[None, :]
                row_ok = query < n_queries
                if QUERY_GROUPS:
                    group = tl.load(query_groups_ptr + b * groups_b + query, mask=row_ok, other=-1).to(tl.int32)
                else:
                    group = tl.where(row_ok, 0, -1)
                lowest = tl.min(tl.where(group >= 0, group, 127), axis=1)
                highest = tl.max(group, axis=1)
                written = written & ((g >= lowest) & (g <= highest))[:, None]
        at = part_ptr + (bhg * n_parts + part.to(tl.int64)[:, None]) * n_keys + cols[None, :]
        parts = tl.load(at, mask=written, other=0.0)
        total += tl.sum(parts, 0)
        if BLOCKS:
            sums = tl.sum(tl.reshape(tl.sum(parts, 1), (PARTS // CHUNK, CHUNK)), 1)
            row = (first_block + first) // CHUNK + tl.arange(0, PARTS // CHUNK)
            tl.store(pool_ptr + (bhg * n_chunks + row) * n_cols + col, sums, mask=row < n_chunks)
    if RECEIVED:
        out_at = out_ptr + bhg * n_keys + cols
        if ADD:
            total += tl.load(out_at, mask=col_ok, other=0.0)
        tl.store(out_at, total, mask=col_ok)
