"""Row and column statistics of a finished softmax, together in one walk over the keys.

A tile is held transposed, keys down and queries across. Column sums are then sums inside a thread, with no exchange between
warps, and row statistics are kept per thread for each query until the walk ends. Compared with two passes this saves the second
product q.k and the second exponential; compared with the row-stationary kernel it saves the exchange for every tile.

Rows are read against their log-sum-exp, which SDPA's kernels return beside the output.

The two keys ``r`` and ``r + 8`` of a 16-row slab lie in the same thread of a matrix product's result, so tiles are split there:
statistics per query are kept for the pair, at half the registers.
"""

# pyright: basic, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from interp.attention.triton.tiles import (
    HIDDEN,
    LN2,
    LOG2E,
    add_mixed_tile,
    add_whole_tile,
    capped,
    product,
    seen_keys,
    whole_tiles,
)

BEYOND = tl.constexpr(2.0**100)
"""How far below 0 each key beyond the last one that a row sees is put; whole numbers times it stay exact below 2**24."""

RUNNING_INTS = [
    "n_queries", "n_keys", "delta", "kv_offset", "left", "right", "row_scale_b", "row_scale_h", "row_scale_q", "padding_b",
    "first_b", "groups_b", "query_groups_b", "n_parts", "first_block", "pool_h", "pool_q", "table_b",
]  # fmt: skip


@triton.jit
def halves(x, BN: tl.constexpr, BM: tl.constexpr):
    """A tile's keys ``r`` and ``r + 8`` of every 16, as two tiles ``[BN / 2, BM]``."""
    split = tl.permute(tl.reshape(x, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
    low, high = tl.split(split)
    return tl.reshape(low, (BN // 2, BM)), tl.reshape(high, (BN // 2, BM))


@triton.jit
def scores(
    first_tile, k_n, n0, qt, row_scale, lse2, softcap, n_keys, BN: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    SOFTCAP: tl.constexpr, CHECK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``log2 p [BN, BM]`` of one tile before its mask; ``CHECK`` where it may reach beyond the last key.

    ``first_tile`` are the places ``[BN, D]`` of the first tile's keys.
    """
    dims = tl.arange(0, D)
    in_tile = tl.arange(0, BN)
    k_at = first_tile + tl.cast(n0, tl.int64) * k_n
    if CHECK:
        k = tl.load(k_at, mask=(in_tile < n_keys - n0)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif D != HEAD_DIM:
        k = tl.load(k_at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
    x = product(k, qt, UPCAST, PRECISION) * row_scale
    if SOFTCAP:
        x = capped(x, softcap) * LOG2E
    return x - lse2[None, :]


@triton.jit
def gather(p, x, surprise, top, top_key, n0, BM: tl.constexpr, BN: tl.constexpr):
    """Row statistics of one more tile."""
    p0, p1 = halves(p, BN, BM)
    x0, x1 = halves(x, BN, BM)
    surprise += p0 * x0
    surprise += p1 * x1
    larger = tl.maximum(p0, p1)
    rises = larger > top
    top = tl.maximum(top, larger)
    # Keys themselves, which differ by thread: numbers that are alike in all threads would be copied for each comparison.
    pair = tl.arange(0, BN // 2)
    first = n0 + pair // 8 * 16 + pair % 8
    top_key = tl.where(rises, tl.where(p1 > p0, (first + 8)[:, None], first[:, None]), top_key)
    return surprise, top, top_key


@triton.jit
def store_blocks(
    parted, pool_at, pool_q, block, n0, n_queries, n_keys, BM: tl.constexpr, BN: tl.constexpr, ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of WIDE keys by ``BM / ACROSS`` rows, from the sums ``[BN, ACROSS]`` of single keys."""
    column = n0 // WIDE + tl.arange(0, BN // WIDE)
    row = block * ACROSS + tl.arange(0, ACROSS)
    slabs = tl.sum(tl.reshape(parted, (BN // WIDE, WIDE, ACROSS)), 1)
    at = pool_at + row[None, :] * pool_q + column[:, None]
    inside = (column < tl.cdiv(n_keys, WIDE))[:, None] & (row < tl.cdiv(n_queries, BM // ACROSS))[None, :]
    tl.store(at, slabs, mask=inside)


@triton.jit
def masses(
    rest, run, qt, lse2, alive, row_scale, rows, row_ok, row_at, lo, hi, k_at, k_n, softcap, n_keys, delta, left, right, b, h,
    padding_ptr, padding_b, sinks_ptr, groups_ptr, groups_b, table_ptr, table_b, mass_ptr, share_ptr,
    BM: tl.constexpr, BN: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDING: tl.constexpr, SOFTCAP: tl.constexpr,
    ROW_SCALE: tl.constexpr, SINKS: tl.constexpr, GROUPS: tl.constexpr, N_GROUPS: tl.constexpr,
):  # fmt: skip
    """Mass per key group and the sink's share of the rows of a block, whose keys are ``lo`` to ``hi``.

    The group with most tiles to itself (the "rest" of the table) is what the others leave of ``1 - share``, so only tiles
    with a key of another group are visited: a prompt's first tile where only its first token is special, or an image's.
    Keys are across here, and sums over them stay in a warp. ``rest``, and ``run`` of the first tile, are the table's.
    """
    share = tl.zeros([BM], tl.float32)
    if SINKS:
        share = tl.exp2(tl.load(sinks_ptr + h).to(tl.float32) * LOG2E - lse2)
        share = tl.where(alive, tl.minimum(share, 1.0), 0.0)
    tl.store(share_ptr + row_at, share, mask=row_ok)
    if ROW_SCALE:
        row_scale = tl.trans(row_scale)
    whole = tl.where(alive, 1.0 - share, 0.0)
    mass0 = tl.zeros([BM], tl.float32)
    mass1, mass2, mass3, mass4, mass5, mass6, mass7 = mass0, mass0, mass0, mass0, mass0, mass0, mass0
    if GROUPS:
        dims = tl.arange(0, D)
        q = tl.trans(qt)
        q_slot = (rows + delta)[:, None]
        run_at = table_ptr + b * table_b + tl.cdiv(n_keys, BN) + 1
        tile = lo // BN
        # The other walk's tiles may go on where the table ends.
        stop = tl.cdiv(tl.minimum(hi, n_keys), BN)
        while tile < stop:
            first = tile
            length = -run
            if run > 0:
                first = tile + run
                length = 0
                if first < stop:
                    length = -tl.load(run_at + first)
            last = tl.minimum(stop, first + length)
            for at in tl.range(first, last):
                cols = at * BN + tl.arange(0, BN)
                col_ok = cols < n_keys
                kt_at = k_at + cols.to(tl.int64)[None, :] * k_n + dims[:, None]
                kt = tl.load(kt_at, mask=col_ok[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
                x = product(q, kt, UPCAST, PRECISION) * row_scale
                if SOFTCAP:
                    x = capped(x, softcap) * LOG2E
                visible = col_ok[None, :]
                if CAUSAL:
                    visible = visible & (cols[None, :] <= q_slot)
                if LEFT:
                    visible = visible & (cols[None, :] >= q_slot - left)
                if RIGHT:
                    visible = visible & (cols[None, :] <= q_slot + right)
                if PADDING:
                    real = tl.load(padding_ptr + b * padding_b + cols, mask=col_ok, other=0)
                    visible = visible & (real != 0)[None, :]
                p = tl.exp2(tl.where(visible, x - lse2[:, None], HIDDEN))
                only = tl.load(table_ptr + b * table_b + at).to(tl.int32)
                if only != -2:
                    in_tile = tl.sum(p, 1)
                    mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7 = add_whole_tile(
                        N_GROUPS, only, in_tile, mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7
                    )  # fmt: skip
                else:
                    kind = tl.load(groups_ptr + b * groups_b + cols, mask=col_ok, other=-1).to(tl.int32)
                    mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7 = add_mixed_tile(
                        N_GROUPS, kind, p, mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7
                    )  # fmt: skip
            tile = last
            run = 0
            if tile < stop:
                run = tl.load(run_at + tile)
    for g in tl.static_range(N_GROUPS):
        mass = mass0
        if g == 1:
            mass = mass1
        elif g == 2:
            mass = mass2
        elif g == 3:
            mass = mass3
        elif g == 4:
            mass = mass4
        elif g == 5:
            mass = mass5
        elif g == 6:
            mass = mass6
        elif g == 7:
            mass = mass7
        if rest == g:
            others = mass0 + mass1 + mass2 + mass3 + mass4 + mass5 + mass6 + mass7 - mass
            mass = tl.maximum(whole - others, 0.0)
        tl.store(mass_ptr + row_at * N_GROUPS + g, mass, mask=row_ok)


@triton.jit(do_not_specialize=RUNNING_INTS)
def statistics_kernel(
    q_ptr, k_ptr, lse_ptr, q_b, q_h, q_m, k_b, k_h, k_n, heads_ptr,
    scale, softcap, n_samples, n_heads, n_heads_read, n_queries, n_keys, delta, kv_offset, left, right,
    row_scale_ptr, row_scale_b, row_scale_h, row_scale_q, padding_ptr, padding_b, first_ptr, first_b,
    query_groups_ptr, query_groups_b, sinks_ptr, groups_ptr, groups_b, table_ptr, table_b,
    top_weight_ptr, top_key_ptr, entropy_ptr, mass_ptr, share_ptr, part_ptr, n_parts, first_block, pool_ptr, pool_h, pool_q,
    BM: tl.constexpr, BN: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, KV_GROUP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PADDING: tl.constexpr, SOFTCAP: tl.constexpr, ROW_SCALE: tl.constexpr, ROW_STATS: tl.constexpr, COLUMNS: tl.constexpr,
    ACROSS: tl.constexpr, WIDE: tl.constexpr, HEAD_LIST: tl.constexpr,
    N_QUERY_GROUPS: tl.constexpr, QUERY_GROUPS: tl.constexpr, SINKS: tl.constexpr, GROUPS: tl.constexpr, N_GROUPS: tl.constexpr,
    MASS_BN: tl.constexpr, MASS_FIRST: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head.

    ``ACROSS`` is the number of block sums across the rows of a tile, 0 for none, ``MASS_BN`` the keys of a tile of the table of
    groups, which divides ``BN``. ``MASS_FIRST`` says whether masses are summed before the walk or after it.

    Tiles that need no mask and whose rows all count run in a loop of their own: a branch in it would cost it its registers.
    """
    n_bh = n_samples * n_heads_read
    pid = tl.program_id(0)
    bh = pid % n_bh
    block = first_block + tl.num_programs(0) // n_bh - 1 - pid // n_bh
    b = (bh // n_heads_read).to(tl.int64)
    hs = bh % n_heads_read
    h = hs.to(tl.int64)
    if HEAD_LIST:
        h = tl.load(heads_ptr + hs)
    kv = h // KV_GROUP
    first_row = block * BM
    last_row = tl.minimum(first_row + BM, n_queries) - 1
    rows = first_row + tl.arange(0, BM)
    row_ok = rows < n_queries
    dims = tl.arange(0, D)
    qt_at = q_ptr + b * q_b + h * q_h + rows.to(tl.int64)[None, :] * q_m + dims[:, None]
    qt = tl.load(qt_at, mask=row_ok[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    # Places in a tile stay the same from tile to tile; only its first key's is new.
    first_tile = k_ptr + b * k_b + kv * k_h + (tl.arange(0, BN).to(tl.int64)[:, None] * k_n + dims[None, :])
    lse2 = tl.load(lse_ptr + (b * n_heads + h) * n_queries + rows, mask=row_ok, other=float("-inf")) * LOG2E
    # Rows that see nothing, and rows beyond the last one: p = 0.
    alive = lse2 != float("-inf")
    lse2 = tl.where(alive, lse2, -HIDDEN)
    row_scale = scale
    if not SOFTCAP:
        row_scale = row_scale * LOG2E
    if ROW_SCALE:
        divisor_at = row_scale_ptr + b * row_scale_b + h * row_scale_h + rows * row_scale_q
        divisor = tl.load(divisor_at, mask=row_ok, other=1.0).to(tl.float32)
        row_scale = row_scale / divisor[None, :]

    # Do all rows of the block count, in one query group?
    lowest = 0
    highest = 0
    if QUERY_GROUPS:
        group_at = query_groups_ptr + b * query_groups_b + rows
        of_rows = tl.load(group_at, mask=row_ok, other=-1).to(tl.int32)
        lowest = tl.min(tl.where(row_ok, of_rows, 127), 0)
        highest = tl.max(of_rows, 0)
    uniform = (lowest == highest) & (lowest >= 0)

    first_real = 0
    if PADDING:
        first_real = tl.load(first_ptr + b * first_b) - kv_offset
    lo, hi, all_lo, all_hi = seen_keys(
        first_row, last_row, n_keys, delta, left, right, first_real, CAUSAL, LEFT, RIGHT, PADDING
    )
    lo = lo // BN * BN
    if not LEFT:
        all_lo = lo
    hi = tl.maximum(tl.cdiv(hi, BN) * BN, lo)
    all_lo, all_hi = whole_tiles(lo, hi, all_lo, all_hi, BN)
    if PADDING or not uniform:
        all_hi = all_lo

    row_at = bh.to(tl.int64) * n_queries + rows
    rest = 0
    run = 0
    if ROW_STATS and GROUPS:
        # Long before they are needed, so that nobody waits for them.
        groups_at = table_ptr + b * table_b + tl.cdiv(n_keys, MASS_BN)
        rest = tl.load(groups_at)
        run = tl.load(groups_at + 1 + lo // MASS_BN, mask=lo < n_keys, other=0)
    if ROW_STATS and MASS_FIRST:
        masses(
            rest, run, qt, lse2, alive, row_scale, rows, row_ok, row_at, lo, hi, k_ptr + b * k_b + kv * k_h, k_n, softcap, n_keys,
            delta, left, right, b, h, padding_ptr, padding_b, sinks_ptr, groups_ptr, groups_b, table_ptr, table_b, mass_ptr, share_ptr,
            BM, MASS_BN, HEAD_DIM, D, UPCAST, PRECISION, CAUSAL, LEFT, RIGHT, PADDING, SOFTCAP, ROW_SCALE, SINKS, GROUPS, N_GROUPS,
        )  # fmt: skip

    surprise = tl.zeros([BN // 2, BM], tl.float32)
    top = tl.zeros([BN // 2, BM], tl.float32)
    top_key = tl.zeros([BN // 2, BM], tl.int32)
    part_at = part_ptr + (bh.to(tl.int64) * N_QUERY_GROUPS * n_parts + block - first_block) * n_keys
    pool_at = pool_ptr + bh.to(tl.int64) * pool_h

    for phase in tl.static_range(3):
        # 0: before a window's left edge is passed; 1: no mask needed; 2: the right edge
        if phase == 1:
            for n0 in tl.range(all_lo, all_hi, BN):
                x = scores(
                    first_tile, k_n, n0, qt, row_scale, lse2, softcap, n_keys, BN, HEAD_DIM, D, SOFTCAP, False, UPCAST, PRECISION,
                )  # fmt: skip
                p = tl.exp2(x)
                if ROW_STATS:
                    surprise, top, top_key = gather(p, x, surprise, top, top_key, n0, BM, BN)
                if COLUMNS:
                    group_part = part_at + tl.cast(n_parts, tl.int64) * n_keys * lowest + n0 + tl.arange(0, BN)
                    if ACROSS:
                        parted = tl.sum(tl.reshape(p, (BN, ACROSS, BM // ACROSS)), 2)
                        store_blocks(parted, pool_at, pool_q, block, n0, n_queries, n_keys, BM, BN, ACROSS, WIDE)
                        tl.store(group_part, tl.sum(parted, 1))
                    else:
                        tl.store(group_part, tl.sum(p, 1))
        elif (phase == 2) | LEFT:
            start, stop = lo, all_lo
            if phase == 2:
                start, stop = all_hi, hi
            # The last key that a row sees: one comparison for the end of the keys, of the rows, and what is later.
            last_seen = tl.where(row_ok, n_keys - 1, -1)
            if CAUSAL:
                last_seen = tl.minimum(last_seen, rows + delta)
            if RIGHT:
                last_seen = tl.minimum(last_seen, rows + delta + right)
            # NaN where the row's log-sum-exp is: the smaller of a NaN and a number would be the number.
            last_seen = last_seen.to(tl.float32) * BEYOND + (lse2 - lse2)
            for n0 in tl.range(start, stop, BN):
                cols = n0 + tl.arange(0, BN)
                col_ok = cols < n_keys
                x = scores(
                    first_tile, k_n, n0, qt, row_scale, lse2, softcap, n_keys, BN, HEAD_DIM, D, SOFTCAP, True, UPCAST, PRECISION,
                )  # fmt: skip
                # As the smaller of two numbers: comparisons would be made while the product runs, all of them, and held.
                x = tl.minimum(x, last_seen[None, :] - (cols.to(tl.float32) * BEYOND)[:, None])
                if LEFT:
                    x = tl.where(cols[:, None] >= (rows + delta - left)[None, :], x, HIDDEN)
                if PADDING:
                    real = tl.load(padding_ptr + b * padding_b + cols, mask=col_ok, other=0)
                    x = tl.where((real != 0)[:, None], x, HIDDEN)
                p = tl.exp2(x)
                if ROW_STATS:
                    surprise, top, top_key = gather(p, x, surprise, top, top_key, n0, BM, BN)
                if COLUMNS:
                    if QUERY_GROUPS:
                        of_row = tl.load(query_groups_ptr + b * query_groups_b + rows, mask=row_ok, other=-1).to(
                            tl.int32
                        )
                        for g in tl.static_range(N_QUERY_GROUPS):
                            if (g >= lowest) & (g <= highest):
                                summed = tl.sum(tl.where((of_row == g)[None, :], p, 0.0), 1)
                                tl.store(part_at + tl.cast(n_parts, tl.int64) * n_keys * g + cols, summed, mask=col_ok)
                        p = tl.where((of_row >= 0)[None, :], p, 0.0)
                    else:
                        tl.store(part_at + cols, tl.sum(p, 1), mask=col_ok)
                    if ACROSS:
                        parted = tl.sum(tl.reshape(p, (BN, ACROSS, BM // ACROSS)), 2)
                        store_blocks(parted, pool_at, pool_q, block, n0, n_queries, n_keys, BM, BN, ACROSS, WIDE)

    if ROW_STATS:
        tl.store(entropy_ptr + row_at, tl.sum(surprise, 0) * -LN2, mask=row_ok)
        best = tl.max(top, 0)
        which = tl.min(tl.where(top == best[None, :], top_key, 2147483647), 0)
        tl.store(top_weight_ptr + row_at, best, mask=row_ok)
        tl.store(top_key_ptr + row_at, tl.where(best > 0, which + kv_offset, -1), mask=row_ok)
    if ROW_STATS and not MASS_FIRST:
        masses(
            rest, run, qt, lse2, alive, row_scale, rows, row_ok, row_at, lo, hi, k_ptr + b * k_b + kv * k_h, k_n, softcap, n_keys,
            delta, left, right, b, h, padding_ptr, padding_b, sinks_ptr, groups_ptr, groups_b, table_ptr, table_b, mass_ptr, share_ptr,
            BM, MASS_BN, HEAD_DIM, D, UPCAST, PRECISION, CAUSAL, LEFT, RIGHT, PADDING, SOFTCAP, ROW_SCALE, SINKS, GROUPS, N_GROUPS,
        )  # fmt: skip
