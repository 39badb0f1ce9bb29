"""The row-stationary kernel: one program holds some query rows of one head and walks over the keys they may see.

It runs in two ways. *Online* (``GIVEN_LSE`` off) it is a flash attention with a running maximum: z, the row's
log-sum-exp and row statistics. With ``GIVEN_LSE`` the softmax is known, so every probability is final the moment it is
computed, and the same walk also gives what needs final probabilities: column sums, block sums, maps, the largest k, and z
under row-wise group weights.

Column sums leave a program as one partial sum per block of rows, added up by :mod:`~interp.attention.triton.columns`: no
atomics, so repeated runs agree to the bit, at 1 / BM of the map's memory.
"""

# pyright: basic, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from interp.attention.triton.tiles import (
    BLOCKS_BIT,
    DEAD,
    HIDDEN,
    LN2,
    LOG2E,
    NEIGHBOURHOOD_BIT,
    SINK_WINDOW_BIT,
    UNIFORM_BIT,
    add_mixed_tile,
    add_whole_tile,
    apart,
    by_group,
    capped,
    dropped,
    finished,
    in_groups,
    near,
    product,
    product_add,
    seen_keys,
    whole_tiles,
)

RUNNING_INTS = [
    "n_queries", "n_keys", "n_rows", "delta", "q_offset", "kv_offset", "left", "right", "blocks_size",
    "row_scale_b", "row_scale_h", "row_scale_q", "gain_b", "gain_h", "gain_q", "bits_b", "bits_h", "bits_q", "bits_all",
    "bias_b", "bias_h", "bias_q", "dense_b", "dense_h", "dense_q", "padding_b", "threshold_b", "threshold_h", "threshold_q",
    "beta_b", "beta_h", "beta_q", "weight_b", "weight_h", "weight_q", "drop_b", "drop_h", "drop_q", "sw_h", "sw_window_h",
    "blocks_h", "blocks_q", "near_h", "near_qb", "near_kb", "edit_groups_b", "groups_b", "query_groups_b", "list_h",
    "list_q", "first_b", "table_b", "edit_table_b", "fraction_b", "fraction_h", "fraction_q", "pool_h", "pool_q",
    "part_rows", "first_block", "map_h", "query_places_b", "key_places_b",
]  # fmt: skip
"""Arguments whose value must not choose a specialisation: lengths and strides that change from call to call."""


@triton.jit(do_not_specialize=RUNNING_INTS)
def rows_kernel(
    q_ptr, k_ptr, v_ptr, z_ptr, lse_ptr,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, z_b, z_h, z_m, z_g,
    heads_ptr, rows_ptr, lists_ptr, list_h, list_q,
    scale, softcap, n_samples, n_heads, n_heads_read, n_queries, n_keys, n_rows, delta, q_offset, kv_offset, left, right,
    row_scale_ptr, row_scale_b, row_scale_h, row_scale_q,
    gain_ptr, gain_b, gain_h, gain_q,
    bits_ptr, bits_b, bits_h, bits_q, bits_all,
    sinks_ptr,
    bias_ptr, bias_b, bias_h, bias_q, bias_hidden,
    dense_ptr, dense_b, dense_h, dense_q,
    padding_ptr, padding_b, first_ptr, first_b,
    sw_sink_ptr, sw_window_ptr, sw_h, sw_window_h,
    blocks_ptr, blocks_h, blocks_q, blocks_size,
    near_radius_ptr, near_h, near_q_ptr, near_qb, near_k_ptr, near_kb,
    threshold_ptr, threshold_b, threshold_h, threshold_q,
    drop_ptr, drop_b, drop_h, drop_q,
    edit_groups_ptr, edit_groups_b, edit_table_ptr, edit_table_b,
    beta_ptr, beta_b, beta_h, beta_q,
    weight_ptr, weight_b, weight_h, weight_q,
    groups_ptr, groups_b, table_ptr, table_b,
    query_groups_ptr, query_groups_b,
    fraction_ptr, fraction_b, fraction_h, fraction_q, summ, rho,
    top_weight_ptr, top_key_ptr, entropy_ptr, mass_ptr, share_ptr, topk_weight_ptr, topk_key_ptr,
    part_ptr, part_rows, first_block, pool_ptr, pool_h, pool_q, map_ptr, map_h,
    query_places_ptr, query_places_b, key_places_ptr, key_places_b, distance_ptr, distance_mass_ptr,
    BM: tl.constexpr, BN: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    KV_GROUP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, FAR: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ALWAYS_MASK: tl.constexpr, LISTS: tl.constexpr,
    PHASES: tl.constexpr, MERGED: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, DENSE: tl.constexpr, PADDING: tl.constexpr, SINKS: tl.constexpr,
    ROW_SCALE: tl.constexpr, GAIN: tl.constexpr, BITS: tl.constexpr, UNIFORM: tl.constexpr, SINK_WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr, N_COORDS: tl.constexpr, THRESHOLD: tl.constexpr, N_DROP: tl.constexpr,
    EDIT_GROUPS: tl.constexpr, BETA: tl.constexpr, WEIGHT: tl.constexpr,
    GIVEN_LSE: tl.constexpr, OUTPUT: tl.constexpr, OUTPUT_GROUPS: tl.constexpr, ROW_STATS: tl.constexpr,
    N_GROUPS: tl.constexpr, GROUPS: tl.constexpr, TOPK: tl.constexpr, COLUMNS: tl.constexpr, POOL: tl.constexpr,
    POOL_COLS: tl.constexpr, POOL_ROWS: tl.constexpr, FOLD: tl.constexpr, IN_TILE: tl.constexpr,
    MAP: tl.constexpr, COUNT: tl.constexpr, HEAD_LIST: tl.constexpr, ROW_LIST: tl.constexpr,
    N_QUERY_GROUPS: tl.constexpr, QUERY_GROUPS: tl.constexpr,
    MASS: tl.constexpr, MOVE: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr, GATE_MASS: tl.constexpr,
    GATE_SHARE: tl.constexpr, DISTANCE: tl.constexpr, HOP: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head.

    ``FAR`` is set where a key may lie 2**31 elements behind the first of its head, or where 64 bits are faster. ``WEIGHT`` is 0
    (none), 1 (the logarithm of weights is added to the scores: they act inside the softmax), 2 (p is multiplied). ``FOLD``
    leaves the scale to the exponent's multiply-add, where nothing between them needs scores in their own unit. ``COUNT``
    replaces p by 1 on visible keys, for ``received_rows``. ``OUTPUT_GROUPS`` restricts the product with v to the keys of group
    ``program_id(1)``.
    ``DISTANCE`` is the number of coordinates of a place, 0 for no distances.

    ``MOVE`` redistributes (SOURCE, TARGET and the gates are sets of the edit's groups, as bits) in one walk: the masses that
    decide it are there at its end, when only the tiles with a source or target key are visited once more, to add
    ``(weight - 1) p v``. The longest run of tiles that are all source or all target (an image) is walked first and its part of
    the output kept apart, so that it need not be visited again.

    ``MERGED`` puts the tiles at all edges of what is visible in one loop after the others, where a window or a sink leaves edges
    on both sides: a loop costs its start. Tiles then no longer come in the order of their keys.
    """
    # Heads of one block of rows run side by side (they share keys and values in L2), the longest rows first: under a causal
    # mask the last programs to start are then the shortest.
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

    # Rows
    place = block * BM + tl.arange(0, BM)
    if ROW_LIST:
        row_ok = place < n_rows
        rows = tl.load(rows_ptr + place, mask=row_ok, other=0).to(tl.int32)
        first_row = tl.min(tl.where(row_ok, rows, n_queries), axis=0)
        last_row = tl.max(tl.where(row_ok, rows, 0), axis=0)
    else:
        row_ok = place < n_queries
        rows = place
        first_row = block * BM
        last_row = tl.minimum(first_row + BM, n_queries) - 1
    rows = tl.where(row_ok, rows, 0)
    q_slot = rows + delta
    head_row = bh.to(tl.int64) * n_queries

    dims = tl.arange(0, D)
    if (not COUNT) | THRESHOLD:
        q_at = q_ptr + b * q_b + h * q_h + rows.to(tl.int64)[:, None] * q_m + dims[None, :]
        q = tl.load(q_at, mask=row_ok[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    k_base = k_ptr + b * k_b + kv * k_h
    v_base = v_ptr + b * v_b + kv * v_h
    v_dims = tl.arange(0, DV)

    if ROW_SCALE:
        divisor = tl.load(
            row_scale_ptr + b * row_scale_b + h * row_scale_h + rows * row_scale_q, mask=row_ok, other=1.0
        )
        row_scale = scale / divisor.to(tl.float32)
    else:
        row_scale = tl.zeros([BM], tl.float32) + scale
    if not SOFTCAP:
        row_scale = row_scale * LOG2E
    bits = tl.zeros([BM], tl.int32) + bits_all
    if BITS:
        bits = bits | tl.load(bits_ptr + b * bits_b + h * bits_h + rows * bits_q, mask=row_ok, other=0).to(tl.int32)
    if UNIFORM:
        uniform = (bits & UNIFORM_BIT) != 0
    if THRESHOLD:
        threshold_at = threshold_ptr + b * threshold_b + h * threshold_h + rows * threshold_q
        threshold = tl.load(threshold_at, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
    if QUERY_GROUPS:
        query_group = tl.load(query_groups_ptr + b * query_groups_b + rows, mask=row_ok, other=-1).to(tl.int32)
    else:
        query_group = tl.where(row_ok, 0, -1)
    counted = tl.where(query_group >= 0, 1.0, 0.0)
    if N_QUERY_GROUPS > 1:
        lowest_group = tl.min(tl.where(query_group >= 0, query_group, 127), axis=0)
        highest_group = tl.max(query_group, axis=0)

    # The last key that a row sees: one comparison for the end of the keys, of the rows, and what is later.
    last_seen = tl.where(row_ok, n_keys - 1, -1)
    if CAUSAL:
        last_seen = tl.minimum(last_seen, q_slot)
    if RIGHT:
        last_seen = tl.minimum(last_seen, q_slot + right)

    # State
    if GIVEN_LSE:
        lse2 = tl.load(lse_ptr + (b * n_heads + h) * n_queries + rows, mask=row_ok, other=float("-inf"))
        lse2 = tl.where(lse2 == float("-inf"), -HIDDEN, lse2 * LOG2E)
        top = tl.zeros([BM], tl.float32)
    else:
        top = tl.zeros([BM], tl.float32) + float("-inf")
    total = tl.zeros([BM], tl.float32)
    surprise = tl.zeros([BM], tl.float32)
    top_key = tl.zeros([BM], tl.int32) - 1
    mass0 = tl.zeros([BM], tl.float32)
    mass1, mass2, mass3, mass4, mass5, mass6, mass7 = mass0, mass0, mass0, mass0, mass0, mass0, mass0
    if OUTPUT:
        acc = tl.zeros([BM, DV], tl.float32)
    if TOPK:
        slots = tl.arange(0, 8)
        best = tl.zeros([BM, 8], tl.float32)
        best_key = tl.zeros([BM, 8], tl.int32) - 1 - slots[None, :]
        worst = tl.zeros([BM], tl.float32)
    if DISTANCE:
        reach = tl.zeros([BM], tl.float32)
        reach_mass = tl.zeros([BM], tl.float32)
        query_at = query_places_ptr + b * query_places_b + rows * DISTANCE
        q_first = tl.load(query_at, mask=row_ok, other=-1).to(tl.float32)
        q_second = tl.load(query_at + (DISTANCE - 1), mask=row_ok, other=-1).to(tl.float32)

    # Which keys
    first_real = 0
    if PADDING or SINK_WINDOW:
        first_real = tl.load(first_ptr + b * first_b) - kv_offset
    lo, hi, all_lo, all_hi = seen_keys(
        first_row, last_row, n_keys, delta, left, right, first_real, CAUSAL, LEFT, RIGHT, PADDING
    )
    sink_stop = 0
    if SINK_WINDOW:
        sw_sink = tl.load(sw_sink_ptr + h * sw_h)
        sw_window = tl.load(sw_window_ptr + h * sw_window_h)
        inside = tl.where(row_ok, bits & SINK_WINDOW_BIT, SINK_WINDOW_BIT) != 0
        everywhere = tl.min(inside.to(tl.int32), axis=0) == 1
        somewhere = tl.max((inside & row_ok).to(tl.int32), axis=0) == 1
        if everywhere:
            sink_stop = tl.minimum(tl.maximum(first_real + sw_sink, 0), hi)
            sink_stop = tl.cdiv(sink_stop, BN) * BN
            lo = tl.maximum(lo, tl.maximum(first_row + delta - sw_window + 1, sink_stop))
            all_lo = tl.maximum(all_lo, last_row + delta - sw_window + 1)
        elif somewhere:
            all_hi = 0
    lo = lo // BN * BN
    if SINK_WINDOW:
        lo = tl.maximum(lo, sink_stop)
    hi = tl.maximum(hi, lo)
    all_lo, all_hi = whole_tiles(lo, hi, all_lo, all_hi, BN)

    sink = 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
    if not UNIFORM:
        uniform = row_ok

    if MOVE:
        n_tiles = tl.cdiv(n_keys, BN)
        # What moves lies behind the groups of tiles, see GroupTiles.
        moved_at = table_ptr + b * table_b + 2 * n_tiles + 1
        run_lo = 0
        run_hi = 0
        kept_acc = acc
        kept_top = top
        if PHASES & 1:
            run_lo = tl.minimum(tl.maximum(tl.load(moved_at + 2 * n_tiles + 1) * BN, all_lo), all_hi)
            run_hi = tl.maximum(tl.minimum(tl.load(moved_at + 2 * n_tiles + 2) * BN, all_hi), run_lo)
    n_sink = sink_stop // BN
    n_early = n_sink
    late = all_hi
    if ALWAYS_MASK:
        late = lo
    else:
        n_early += (all_lo - lo) // BN

    for phase in tl.static_range(6):
        # 0: the run of tiles whose mass moves alike; 1: the sink of a sink-and-window rule, and the left edge of a window;
        # 2: no mask needed; 3: the right edge, or all edges; 5: once more the tiles whose mass moves. Odd ones have masks.
        if (PHASES >> phase) & 1:
            if phase == 5:
                alive, _, lse2, norm = finished(top, total, sink, uniform, SINKS, UNIFORM)
                mass0 *= norm
                mass1 *= norm
                mass2 *= norm
                mass3 *= norm
                mass4 *= norm
                mass5 *= norm
                mass6 *= norm
                mass7 *= norm
                from_mass = in_groups(SOURCE, mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7)
                to_mass = in_groups(TARGET, mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7)
                gate = in_groups(GATE_MASS, mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7)
                gate_share = in_groups(GATE_SHARE, mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7)
                opens = (gate >= summ) & (gate_share >= rho * gate) & (from_mass > 0) & (to_mass >= 1.2e-38)
                fraction_at = fraction_ptr + b * fraction_b + h * fraction_h + rows * fraction_q
                fraction = tl.load(fraction_at, mask=row_ok, other=0.0).to(tl.float32)
                fraction = tl.where(opens, fraction, 0.0)
                gained = fraction * from_mass / tl.where(opens, to_mass, 1.0)
                acc *= norm[:, None]
                final = tl.where(alive, lse2, -HIDDEN)
                before_run = n_tiles
                if PHASES & 1:
                    before_run = tl.load(moved_at + run_lo // BN)
                    more = tl.where(tl.load(moved_at + 2 * n_tiles + 3) == 1, gained, -fraction)
                    acc += kept_acc * (tl.exp2(kept_top - final) * (1.0 + more))[:, None]
            if LISTS & (phase != 5):
                start, stop, step = 0, tl.load(lists_ptr + h * list_h + block * list_q), 1
            elif phase == 5:
                start, stop, step = 0, tl.load(moved_at + tl.cdiv(hi, BN)) - (run_hi - run_lo) // BN, 1
            elif phase == 0:
                start, stop, step = run_lo, run_hi, BN
            elif phase == 1:
                start, stop, step = 0, n_early, 1
            elif phase == 2:
                start, stop, step = all_lo, all_hi, BN
                if PHASES & 1:
                    stop -= run_hi - run_lo
            elif MERGED:
                start, stop, step = 0, n_early + tl.maximum(tl.cdiv(hi - late, BN), 0), 1
            else:
                start, stop, step = late, hi, BN
            for at in tl.range(start, stop, step):
                n0 = at
                if phase == 5:
                    listed = at
                    if PHASES & 1:
                        listed += tl.where(at >= before_run, (run_hi - run_lo) // BN, 0)
                    n0 = tl.load(moved_at + n_tiles + 1 + listed) * BN
                elif LISTS:
                    n0 = tl.load(lists_ptr + h * list_h + block * list_q + 1 + at) * BN
                elif (phase == 1) | (MERGED & (phase == 3)):
                    n0 = at * BN
                    if SINK_WINDOW:
                        n0 += tl.where(at < n_sink, 0, lo - n_sink * BN)
                    else:
                        n0 += lo
                    if phase == 3:
                        n0 = tl.where(at < n_early, n0, late + (at - n_early) * BN)
                elif (phase == 2) & (PHASES & 1):
                    n0 += tl.where(at >= run_lo, run_hi - run_lo, 0)
                cols = n0 + tl.arange(0, BN)
                col_ok = cols < n_keys
                # Half of the arithmetic of an address where 32 bits hold it.
                col_places = cols
                if FAR:
                    col_places = cols.to(tl.int64)
                if EDIT_GROUPS:
                    # Most tiles lie in one group, whose table entry is then one number a row.
                    edit_only = tl.load(edit_table_ptr + b * edit_table_b + n0 // BN).to(tl.int32)
                    edit_group = tl.load(edit_groups_ptr + b * edit_groups_b + cols, mask=col_ok, other=-1).to(tl.int32)

                # Scores
                if COUNT & (not THRESHOLD):
                    x = tl.zeros([BM, BN], tl.float32)
                else:
                    k_at = k_base + (col_places[None, :] * k_n + dims[:, None])
                    if (phase % 2) and (D != HEAD_DIM):
                        kt = tl.load(k_at, mask=col_ok[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
                    elif phase % 2:
                        kt = tl.load(k_at, mask=col_ok[None, :], other=0.0)
                    elif D != HEAD_DIM:
                        kt = tl.load(k_at, mask=(dims < HEAD_DIM)[:, None], other=0.0)
                    else:
                        kt = tl.load(k_at)
                    x = product(q, kt, UPCAST, PRECISION)
                    if not FOLD:
                        x *= row_scale[:, None]
                    if SOFTCAP:
                        x = capped(x, softcap) * LOG2E

                # Visibility and what changes scores
                if phase % 2:
                    visible = cols[None, :] <= last_seen[:, None]
                    if LEFT:
                        visible = visible & (cols[None, :] >= q_slot[:, None] - left)
                    if PADDING:
                        real = tl.load(padding_ptr + b * padding_b + cols, mask=col_ok, other=0)
                        visible = visible & (real != 0)[None, :]
                    if DENSE:
                        dense_at = dense_ptr + b * dense_b + h * dense_h + rows.to(tl.int64)[:, None] * dense_q
                        seen = tl.load(dense_at + cols[None, :], mask=visible, other=0)
                        visible = visible & (seen != 0)
                    if SINK_WINDOW:
                        kept = (cols - first_real < sw_sink)[None, :] | (q_slot[:, None] - cols[None, :] < sw_window)
                        if BITS:
                            kept = kept | ((bits & SINK_WINDOW_BIT) == 0)[:, None]
                        visible = visible & kept
                    if BLOCKS:
                        block_at = blocks_ptr + h * blocks_h + ((rows + q_offset) // blocks_size)[:, None] * blocks_q
                        allowed = tl.load(
                            block_at + ((cols + kv_offset) // blocks_size)[None, :], mask=visible, other=0
                        )
                        visible = visible & ((allowed != 0) | ((bits & BLOCKS_BIT) == 0)[:, None])
                    if N_COORDS:
                        close = near(
                            near_q_ptr, near_k_ptr, b * near_qb, b * near_kb, rows, row_ok, cols, col_ok,
                            tl.load(near_radius_ptr + h * near_h), N_COORDS,
                        )  # fmt: skip
                        visible = visible & (close | ((bits & NEIGHBOURHOOD_BIT) == 0)[:, None])
                    if N_DROP:
                        drop_row = b * drop_b + h * drop_h + rows * drop_q
                        visible = visible & ~dropped(drop_ptr, drop_row, row_ok, cols + kv_offset, N_DROP)
                    if BIAS:
                        bias_at = bias_ptr + b * bias_b + h * bias_h + rows.to(tl.int64)[:, None] * bias_q
                        bias = tl.load(bias_at + cols[None, :], mask=visible, other=0.0).to(tl.float32)
                        visible = visible & (bias > bias_hidden)
                        x = x + tl.where(bias > bias_hidden, bias, 0.0) * LOG2E
                if BETA:
                    beta_row = b * beta_b + h * beta_h + rows * beta_q
                    if edit_only >= 0:
                        beta = tl.load(beta_ptr + beta_row + edit_only, mask=row_ok, other=0.0).to(tl.float32)
                        x = x + beta[:, None] * tl.abs(x)
                    else:
                        x = x + by_group(beta_ptr, beta_row, row_ok, edit_group, EDIT_GROUPS, 0.0) * tl.abs(x)
                if phase % 2:
                    if THRESHOLD:
                        visible = visible & (x >= threshold[:, None])
                    if UNIFORM:
                        x = tl.where(uniform[:, None], 0.0, x)
                    x = tl.where(visible, x, HIDDEN)
                elif UNIFORM:
                    x = tl.where(uniform[:, None], 0.0, x)
                if WEIGHT:
                    weight_row = b * weight_b + h * weight_h + rows * weight_q
                    if edit_only >= 0:
                        weight = tl.load(weight_ptr + weight_row + edit_only, mask=row_ok, other=1.0).to(tl.float32)
                        weight = weight[:, None] + tl.zeros([BM, BN], tl.float32)
                    else:
                        weight = by_group(weight_ptr, weight_row, row_ok, edit_group, EDIT_GROUPS, 1.0)
                    if WEIGHT == 1:
                        # These come as logarithms, HIDDEN for a weight of 0.
                        x = tl.maximum(x + weight, HIDDEN)

                # Probabilities: final, or relative to the largest score so far
                if COUNT:
                    p = tl.where(x > DEAD, 1.0, 0.0)
                elif GIVEN_LSE:
                    if FOLD:
                        x = x * row_scale[:, None] - lse2[:, None]
                    else:
                        x = x - lse2[:, None]
                    p = tl.exp2(x)
                    if WEIGHT == 2:
                        p = p * weight
                    if ROW_STATS:
                        if WEIGHT == 2:
                            surprise -= tl.sum(p * tl.where(weight > 0, x + tl.log2(weight), 0.0), 1)
                        else:
                            surprise -= tl.sum(p * x, 1)
                elif phase == 5:
                    if FOLD:
                        p = tl.exp2(x * row_scale[:, None] - final[:, None])
                    else:
                        p = tl.exp2(x - final[:, None])
                    source_key = tl.where(edit_group >= 0, (SOURCE >> edit_group) & 1, 0).to(tl.float32)
                    target_key = tl.where(edit_group >= 0, (TARGET >> edit_group) & 1, 0).to(tl.float32)
                    p *= gained[:, None] * target_key[None, :] - fraction[:, None] * source_key[None, :]
                else:
                    largest_raw = tl.max(x, 1)
                    largest = largest_raw
                    if FOLD:
                        largest *= row_scale
                    new_top = tl.maximum(top, largest)
                    if ROW_STATS:
                        rises = largest > top
                        # Skipping this where no row rises costs more than it saves: all warps would have to agree first.
                        which = tl.min(tl.where(x == largest_raw[:, None], cols[None, :], 2147483647), 1)
                        if MERGED:
                            rises = rises | ((largest == top) & (which < top_key))
                        top_key = tl.where(rises, which, top_key)
                    # A row that has seen nothing yet is measured against 0: against its own huge negative score, a fused
                    # multiply-add would leave the rounding error of that score.
                    against = tl.where(new_top > DEAD, new_top, 0.0)
                    if FOLD:
                        x = x * row_scale[:, None] - against[:, None]
                    else:
                        x = x - against[:, None]
                    p = tl.exp2(x)
                    fade = tl.exp2(top - new_top)
                    if ROW_STATS:
                        # (top - new_top) * total is 0 * 0 with an infinite factor in the first tile.
                        shift = tl.where(total > 0, (top - new_top) * total, 0.0)
                        surprise = fade * (surprise + shift) + tl.sum(p * x, 1)
                    if MASS:
                        mass0 *= fade
                        if N_GROUPS > 1:
                            mass1 *= fade
                        if N_GROUPS > 2:
                            mass2 *= fade
                        if N_GROUPS > 3:
                            mass3 *= fade
                        if N_GROUPS > 4:
                            mass4 *= fade
                        if N_GROUPS > 5:
                            mass5 *= fade
                        if N_GROUPS > 6:
                            mass6 *= fade
                        if N_GROUPS > 7:
                            mass7 *= fade
                    total *= fade
                    top = new_top
                    if OUTPUT:
                        acc *= fade[:, None]
                    if WEIGHT == 2:
                        total += tl.sum(p, 1)
                        p = p * weight

                # What is read off the tile
                if IN_TILE & (phase != 5):
                    in_tile = tl.sum(p, 1)
                    total += in_tile
                    if MASS and (not GROUPS):
                        mass0 += in_tile
                    elif MASS:
                        only = tl.load(table_ptr + b * table_b + n0 // BN).to(tl.int32)
                        if only != -2:
                            mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7 = add_whole_tile(
                                N_GROUPS, only, in_tile, mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7
                            )  # fmt: skip
                        else:
                            kind = tl.load(groups_ptr + b * groups_b + cols, mask=col_ok, other=-1).to(tl.int32)
                            mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7 = add_mixed_tile(
                                N_GROUPS, kind, p, mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7
                            )  # fmt: skip
                if GIVEN_LSE and (ROW_STATS or TOPK):
                    largest = tl.max(p, 1)
                    if ROW_STATS:
                        rises = largest > top
                        which = tl.min(tl.where(p == largest[:, None], cols[None, :], 2147483647), 1)
                        if MERGED:
                            rises = rises | ((largest == top) & (which < top_key))
                        top_key = tl.where(rises, which, top_key)
                        top = tl.maximum(top, largest)
                    if TOPK:
                        left_over = p
                        rises = largest > worst
                        while tl.max(rises.to(tl.int32), 0) > 0:
                            which = tl.min(tl.where(left_over == largest[:, None], cols[None, :], 2147483647), 1)
                            # Of equal entries the one with the highest key gives way.
                            leaves = tl.max(tl.where(best == worst[:, None], best_key, -2147483648), 1)
                            replaced = (best_key == leaves[:, None]) & (best == worst[:, None]) & rises[:, None]
                            best = tl.where(replaced, largest[:, None], best)
                            best_key = tl.where(replaced, which[:, None], best_key)
                            worst = tl.min(tl.where((slots < TOPK)[None, :], best, 2.0e38), 1)
                            taken = (cols[None, :] == which[:, None]) & rises[:, None]
                            left_over = tl.where(taken, -1.0, left_over)
                            largest = tl.max(left_over, 1)
                            rises = largest > worst
                if DISTANCE:
                    key_at = key_places_ptr + b * key_places_b + cols * DISTANCE
                    away, placed = apart(q_first, q_second, key_at, col_ok, DISTANCE, HOP)
                    near_p = tl.where(placed[None, :], p, 0.0)
                    reach += tl.sum(near_p * away, 1)
                    reach_mass += tl.sum(near_p, 1)
                if COLUMNS:
                    part_at = (
                        part_ptr + (bh.to(tl.int64) * N_QUERY_GROUPS * part_rows + block - first_block) * n_keys + cols
                    )
                    if N_QUERY_GROUPS == 1:
                        tl.store(part_at, tl.sum(p * counted[:, None], 0), mask=col_ok)
                    else:
                        for g in tl.static_range(N_QUERY_GROUPS):
                            if (g >= lowest_group) & (g <= highest_group):
                                chosen = tl.where(query_group == g, 1.0, 0.0)
                                summed = tl.sum(p * chosen[:, None], 0)
                                tl.store(part_at + tl.cast(part_rows, tl.int64) * n_keys * g, summed, mask=col_ok)
                if POOL:
                    if POOL_COLS == BN:
                        across = (in_tile * counted)[:, None]
                    else:
                        across = tl.sum(tl.reshape(p * counted[:, None], (BM, BN // POOL_COLS, POOL_COLS)), 2)
                    pooled = tl.sum(tl.reshape(across, (BM // POOL_ROWS, POOL_ROWS, BN // POOL_COLS)), 1)
                    pool_row = block * (BM // POOL_ROWS) + tl.arange(0, BM // POOL_ROWS)
                    pool_col = n0 // POOL_COLS + tl.arange(0, BN // POOL_COLS)
                    pool_at = pool_ptr + bh.to(tl.int64) * pool_h + pool_row[:, None] * pool_q + pool_col[None, :]
                    tl.store(pool_at, pooled, mask=(pool_col < tl.cdiv(n_keys, POOL_COLS))[None, :])
                if MAP:
                    map_at = map_ptr + bh.to(tl.int64) * map_h + place.to(tl.int64)[:, None] * n_keys + cols[None, :]
                    tl.store(map_at, p, mask=row_ok[:, None] & col_ok[None, :])
                if OUTPUT:
                    if OUTPUT_GROUPS:
                        member = tl.load(groups_ptr + b * groups_b + cols, mask=col_ok, other=-1).to(tl.int32)
                        p = tl.where((member == tl.program_id(1))[None, :], p, 0.0)
                    v_at = v_base + (col_places[:, None] * v_n + v_dims[None, :])
                    if (phase % 2) and (DV != V_DIM):
                        v = tl.load(v_at, mask=col_ok[:, None] & (v_dims < V_DIM)[None, :], other=0.0)
                    elif phase % 2:
                        v = tl.load(v_at, mask=col_ok[:, None], other=0.0)
                    elif DV != V_DIM:
                        v = tl.load(v_at, mask=(v_dims < V_DIM)[None, :], other=0.0)
                    else:
                        v = tl.load(v_at)
                    if UPCAST:
                        acc = product_add(p, v, acc, UPCAST, PRECISION)
                    else:
                        acc = product_add(p.to(v.dtype), v, acc, UPCAST, PRECISION)
            if phase == 0:
                kept_acc = acc
                kept_top = top
                acc = tl.zeros([BM, DV], tl.float32)

    # The end of the softmax
    row_at = head_row + rows
    if not GIVEN_LSE and not COUNT:
        alive, top, lse2, norm = finished(top, total, sink, uniform, SINKS, UNIFORM)
        total = tl.where(alive, total, 0.0)
        tl.store(lse_ptr + (b * n_heads + h) * n_queries + rows, lse2 * LN2, mask=row_ok)
        if ROW_STATS:
            whole = total * norm
            surprise = tl.where(alive, ((lse2 - top) * whole - surprise * norm), 0.0)
            tl.store(top_weight_ptr + row_at, norm, mask=row_ok)
            has_mass = norm > 0
            mass0 *= norm
            mass1 *= norm
            mass2 *= norm
            mass3 *= norm
            mass4 *= norm
            mass5 *= norm
            mass6 *= norm
            mass7 *= norm
        if OUTPUT and not MOVE:
            acc *= norm[:, None]
    elif ROW_STATS:
        tl.store(top_weight_ptr + row_at, top, mask=row_ok)
        has_mass = top > 0
    if ROW_STATS:
        tl.store(top_key_ptr + row_at, tl.where(has_mass, top_key + kv_offset, -1), mask=row_ok)
        tl.store(entropy_ptr + row_at, surprise * LN2, mask=row_ok)
        if SINKS:
            share = tl.exp2(sink - lse2)
            if UNIFORM:
                share = tl.where(uniform, 0.0, share)
            tl.store(share_ptr + row_at, share, mask=row_ok)
        mass_at = mass_ptr + row_at * N_GROUPS
        tl.store(mass_at, mass0, mask=row_ok)
        if N_GROUPS > 1:
            tl.store(mass_at + 1, mass1, mask=row_ok)
        if N_GROUPS > 2:
            tl.store(mass_at + 2, mass2, mask=row_ok)
        if N_GROUPS > 3:
            tl.store(mass_at + 3, mass3, mask=row_ok)
        if N_GROUPS > 4:
            tl.store(mass_at + 4, mass4, mask=row_ok)
        if N_GROUPS > 5:
            tl.store(mass_at + 5, mass5, mask=row_ok)
        if N_GROUPS > 6:
            tl.store(mass_at + 6, mass6, mask=row_ok)
        if N_GROUPS > 7:
            tl.store(mass_at + 7, mass7, mask=row_ok)
    if TOPK:
        best_at = row_at[:, None] * 8 + slots[None, :]
        tl.store(topk_weight_ptr + best_at, best, mask=row_ok[:, None])
        tl.store(topk_key_ptr + best_at, tl.where(best > 0, best_key + kv_offset, -1), mask=row_ok[:, None])
    if DISTANCE:
        there = (q_first >= 0) & (q_second >= 0)
        tl.store(distance_ptr + row_at, tl.where(there, reach, 0.0), mask=row_ok)
        tl.store(distance_mass_ptr + row_at, tl.where(there, reach_mass, 0.0), mask=row_ok)
    if OUTPUT:
        if GAIN:
            gain_at = gain_ptr + b * gain_b + h * gain_h + rows * gain_q
            acc *= tl.load(gain_at, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        z_at = z_ptr + b * z_b + hs.to(tl.int64) * z_h + place.to(tl.int64)[:, None] * z_m + v_dims[None, :]
        if OUTPUT_GROUPS:
            z_at += tl.program_id(1) * z_g
        tl.store(z_at, acc.to(z_ptr.dtype.element_ty), mask=row_ok[:, None] & (v_dims < V_DIM)[None, :])
