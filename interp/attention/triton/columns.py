"""Small kernels around the row-stationary one: adding up partial column sums, and which blocks of keys are of one group."""

# pyright: basic, reportGeneralTypeIssues=false

import triton
import triton.language as tl

RUNNING_INTS = [
    "n_parts", "first_block", "n_chunks", "n_queries", "n_keys", "n_heads", "delta", "left", "right", "first_b", "groups_b", "kv_offset",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNNING_INTS)
def sum_parts_kernel(
    part_ptr, out_ptr, pool_ptr, query_groups_ptr, groups_b, first_ptr, first_b,
    n_parts, first_block, n_chunks, n_queries, n_keys, n_heads, delta, kv_offset, left, right,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDING: tl.constexpr, ZEROED: tl.constexpr,
    N_QUERY_GROUPS: tl.constexpr, QUERY_GROUPS: tl.constexpr, BLOCKS: tl.constexpr, RECEIVED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """``received [B * H, Gq, Lk]`` from parts ``[B * H, Gq, n_parts, Lk]`` of the row blocks from ``first_block`` on.

    Parts that no program wrote (its rows see nothing there) are left out by the same arithmetic that made it skip them, so
    that the buffer need not be cleared first; ``ZEROED`` says that it was.
    """
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    bhg = tl.program_id(1).to(tl.int64)
    g = (bhg % N_QUERY_GROUPS).to(tl.int32)
    b = bhg // N_QUERY_GROUPS // n_heads
    tile_start = cols // BN * BN
    col_ok = cols < n_keys
    total = tl.zeros([BK], tl.float32)
    start = 0
    if CAUSAL and not ZEROED:
        start = tl.maximum((tl.program_id(0) * BK // BN * BN - delta) // BM - first_block, 0) // PARTS * PARTS
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
                row = (part[:, None] + first_block) * BM + tl.arange(0, BM)[None, :]
                row_ok = row < n_queries
                if QUERY_GROUPS:
                    group = tl.load(query_groups_ptr + b * groups_b + row, mask=row_ok, other=-1).to(tl.int32)
                else:
                    group = tl.where(row_ok, 0, -1)
                lowest = tl.min(tl.where(group >= 0, group, 127), axis=1)
                highest = tl.max(group, axis=1)
                written = written & ((g >= lowest) & (g <= highest))[:, None]
        at = part_ptr + (bhg * n_parts + part.to(tl.int64)[:, None]) * n_keys + cols[None, :]
        chunk = tl.sum(tl.load(at, mask=written, other=0.0), 0)
        total += chunk
        if BLOCKS:
            pool_at = pool_ptr + (bhg * n_chunks + (first_block + first) // PARTS) * tl.num_programs(0)
            tl.store(pool_at + tl.program_id(0), tl.sum(chunk, 0))
    if RECEIVED:
        out_at = out_ptr + bhg * n_keys + cols
        if ADD:
            total += tl.load(out_at, mask=col_ok, other=0.0)
        tl.store(out_at, total, mask=col_ok)


@triton.jit(do_not_specialize=["n_keys", "groups_b"])
def block_groups_kernel(groups_ptr, groups_b, out_ptr, n_keys, BN: tl.constexpr):
    """About blocks of BN keys, int16 ``[B|1, 2 n + 1]`` for n blocks; one program a sample.

    First the group of each block, -2 where it holds several. Then the group with most blocks of its own, the "rest". Then for
    each block how many from it on are of the rest, or minus how many are not.
    """
    base = out_ptr + tl.program_id(0).to(tl.int64) * (2 * tl.cdiv(n_keys, BN) + 1)
    groups_at = groups_ptr + tl.program_id(0).to(tl.int64) * groups_b
    n_blocks = tl.cdiv(n_keys, BN)
    numbers = tl.arange(0, 8)
    blocks = tl.zeros([8], tl.int32)
    for block in tl.range(0, n_blocks):
        one = block_group(groups_at, block, n_keys, BN)
        blocks += tl.where(numbers == one, 1, 0)
        tl.store(base + block, one.to(tl.int16))
    most = tl.max(blocks, 0)
    rest = tl.min(tl.where(blocks == most, numbers, 8), 0)
    tl.store(base + n_blocks, rest.to(tl.int16))
    run = 0
    for back in tl.range(0, n_blocks):
        block = n_blocks - 1 - back
        if block_group(groups_at, block, n_keys, BN) == rest:
            run = tl.maximum(run, 0) + 1
        else:
            run = tl.minimum(run, 0) - 1
        tl.store(base + n_blocks + 1 + block, tl.minimum(tl.maximum(run, -32768), 32767).to(tl.int16))


@triton.jit
def block_group(groups_at, block, n_keys, BN: tl.constexpr):
    cols = block * BN + tl.arange(0, BN)
    ok = cols < n_keys
    group = tl.load(groups_at + cols, mask=ok, other=0).to(tl.int32)
    lowest = tl.min(tl.where(ok, group, 127), 0)
    highest = tl.max(tl.where(ok, group, -128), 0)
    return tl.where(lowest == highest, lowest, -2)
