"""The kernels of decoding: few query rows, many keys.

The keys of one sample and key-value head are split over programs. A program packs on the M axis of its products all query
heads of the group, all query rows and, under weights of key groups, all *classes* of keys: the row of a class sees the
keys of that class only, so its partial output, maximum and denominator are those of the class, and the weights can wait
until the masses are known. K and V are thus read once whatever the edit. A second small kernel puts the parts together.

Statistics are kept by element of the tile and summed over its columns once, at the end: with 16 rows a sum over columns
goes through shared memory, and one a tile (the maximum) is enough.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false

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
    by_group,
    capped,
    dropped,
    near,
    product,
    product_add,
)

TINY = tl.constexpr(1.1754943508222875e-38)
NO_KEY = tl.constexpr(2147483647)

GIVEN_WEIGHTS = tl.constexpr(1)
RENORMALISED = tl.constexpr(2)
REDISTRIBUTED = tl.constexpr(3)

UNSPECIALISED = [
    "scale", "softcap", "factor", "n_heads", "n_queries", "n_keys", "n_rows", "n_splits", "from_row", "to_row", "kv_offset",
    "row_scale_ptr", "row_scale_b", "row_scale_h", "row_scale_q", "gain_ptr", "gain_b", "gain_h", "gain_q", "sinks_ptr",
    "padding_ptr", "padding_b", "first_ptr", "first_b", "groups_ptr", "groups_b", "edit_groups_ptr", "edit_groups_b",
    "class_map", "q_offset", "delta", "bits_b", "bits_h", "bits_q", "bits_all", "bias_ptr", "bias_b", "bias_h", "bias_q", "bias_hidden",
    "dense_b", "dense_h", "dense_q", "sw_h", "sw_window_h", "blocks_h", "blocks_q", "blocks_size", "near_h", "near_qb",
    "near_kb", "threshold_b", "threshold_h", "threshold_q", "drop_b", "drop_h", "drop_q", "beta_b", "beta_h", "beta_q",
    "hide",
]  # fmt: skip
"""Arguments whose value or alignment must not choose a variant: all but the large tensors and their strides."""


@triton.jit
def settled(top, total, sink, uniform, SINKS: tl.constexpr, UNIFORM: tl.constexpr):
    """The end of a softmax: ``lse2``, and ``norm`` that turns sums relative to ``top`` into sums of probabilities."""
    alive = top > DEAD
    top = tl.where(alive, top, 0.0)
    lse2 = tl.where(alive, top + tl.log2(tl.where(alive, total, 1.0)), float("-inf"))
    if SINKS:
        higher = tl.maximum(lse2, sink)
        with_sink = higher + tl.log2(tl.exp2(lse2 - higher) + tl.exp2(sink - higher))
        if UNIFORM:
            with_sink = tl.where(uniform, lse2, with_sink)
        lse2 = with_sink
    norm = tl.where(alive, tl.exp2(top - tl.where(alive, lse2, 0.0)), 0.0)
    return lse2, norm


@triton.jit(do_not_specialize=UNSPECIALISED)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, bias_ptr, z_ptr, part_ptr, stats_ptr, key_ptr, mass_ptr, map_ptr, used_ptr,
    hide, n_splits, q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n,
    scale, softcap, factor, n_heads, n_queries, n_keys, n_rows, from_row, to_row, kv_offset,
    row_scale_ptr, row_scale_b, row_scale_h, row_scale_q,
    gain_ptr, gain_b, gain_h, gain_q,
    padding_ptr, padding_b, first_ptr, first_b,
    groups_ptr, groups_b,
    edit_groups_ptr, edit_groups_b, class_map,
    q_offset, delta,
    bits_ptr, bits_b, bits_h, bits_q, bits_all,
    bias_b, bias_h, bias_q, bias_hidden,
    dense_ptr, dense_b, dense_h, dense_q,
    sw_sink_ptr, sw_window_ptr, sw_h, sw_window_h,
    blocks_ptr, blocks_h, blocks_q, blocks_size,
    near_radius_ptr, near_h, near_q_ptr, near_qb, near_k_ptr, near_kb,
    threshold_ptr, threshold_b, threshold_h, threshold_q,
    drop_ptr, drop_b, drop_h, drop_q,
    beta_ptr, beta_b, beta_h, beta_q,
    BM: tl.constexpr, BN: tl.constexpr, ROW_BLOCKS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, KV_GROUP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    OUTPUT: tl.constexpr, ROW_STATS: tl.constexpr, LSE: tl.constexpr, MAP: tl.constexpr, DIRECT: tl.constexpr,
    GROUPS: tl.constexpr, N_GROUPS: tl.constexpr, CLASSES: tl.constexpr, WEIGHTED: tl.constexpr,
    RANGES: tl.constexpr, PADDING: tl.constexpr, FIRST: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    ROW_SCALE: tl.constexpr, GAIN: tl.constexpr, EIGHTS: tl.constexpr, EDITED: tl.constexpr, BITS: tl.constexpr, UNIFORM: tl.constexpr,
    BIAS: tl.constexpr, DENSE: tl.constexpr, SINK_WINDOW: tl.constexpr, BLOCKS: tl.constexpr, N_COORDS: tl.constexpr,
    THRESHOLD: tl.constexpr, N_DROP: tl.constexpr, BETA: tl.constexpr, EDIT_GROUPS: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one sample and key-value head.

    A row sees slots ``row + from_row <= slot < row + to_row``. ``DIRECT`` is the only part: it leaves final results. With
    ``MAP`` the softmax is known (``stats_ptr``, weights of classes in ``used_ptr``) and probabilities themselves are
    stored, ``hide`` where a key is not visible. ``class_map`` has the class of each key group, four bits a group.
    ``EIGHTS``: strides of k and v are multiples of 8, which is all that wide loads need (a head dim of 72 has no more).
    """
    if EIGHTS:
        k_b, k_h, k_n = k_b // 8 * 8, k_h // 8 * 8, k_n // 8 * 8
        v_b, v_h, v_n = v_b // 8 * 8, v_h // 8 * 8, v_n // 8 * 8
    pid = tl.program_id(0)
    split = pid % n_splits
    unit = pid // n_splits
    block = 0
    if ROW_BLOCKS > 1:
        block = unit % ROW_BLOCKS
        unit = unit // ROW_BLOCKS
    n_kv = n_heads // KV_GROUP
    b = (unit // n_kv).to(tl.int64)
    kv = (unit % n_kv).to(tl.int64)

    # Rows: classes of keys, then query heads of the group, then query rows
    group_rows = KV_GROUP * n_queries
    m = block * BM + tl.arange(0, BM)
    within = m % group_rows
    row_ok = m < (group_rows if MAP else CLASSES * group_rows)
    r = within % n_queries
    h = kv * KV_GROUP + within // n_queries
    row = unit.to(tl.int64) * group_rows + within
    dims = tl.arange(0, D)
    v_dims = tl.arange(0, DV)
    q_at = q_ptr + b * q_b + h[:, None] * q_h + r.to(tl.int64)[:, None] * q_m + dims[None, :]
    q = tl.load(q_at, mask=row_ok[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    k_base = k_ptr + b * k_b + kv * k_h
    v_base = v_ptr + b * v_b + kv * v_h
    row_scale = tl.zeros([BM], tl.float32) + scale
    if ROW_SCALE:
        divisor_at = row_scale_ptr + b * row_scale_b + h * row_scale_h + r * row_scale_q
        row_scale = row_scale / tl.load(divisor_at, mask=row_ok, other=1.0).to(tl.float32)
    if not SOFTCAP:
        row_scale = row_scale * LOG2E

    # Keys
    lo = tl.maximum(from_row, 0)
    hi = tl.minimum(n_queries - 1 + to_row, n_keys)
    first_real = 0
    if FIRST:
        first_real = tl.load(first_ptr + b * first_b).to(tl.int32)
    first_real -= kv_offset
    if FIRST and PADDING:
        lo = tl.maximum(lo, first_real)
    hi = tl.maximum(hi, lo)
    tiles = tl.cdiv(hi - lo, BN)
    sink_tiles = 0
    window_lo = lo
    uniform = row_ok
    if EDITED:
        q_slot = r + delta
        bits = tl.zeros([BM], tl.int32) + bits_all
        if BITS:
            bits = bits | tl.load(bits_ptr + b * bits_b + h * bits_h + r * bits_q, mask=row_ok, other=0).to(tl.int32)
        uniform = (bits & UNIFORM_BIT) != 0
        if SINK_WINDOW:
            sw_sink = tl.load(sw_sink_ptr + h * sw_h)
            sw_window = tl.load(sw_window_ptr + h * sw_window_h)
            inside = tl.where(row_ok, bits & SINK_WINDOW_BIT, SINK_WINDOW_BIT) != 0
            if tl.min(inside.to(tl.int32), axis=0) == 1:
                sink_stop = tl.minimum(first_real + tl.max(tl.where(row_ok, sw_sink, 0), axis=0), hi)
                sink_tiles = tl.cdiv(tl.maximum(sink_stop - lo, 0), BN)
                window_lo = tl.min(tl.where(row_ok, q_slot - sw_window + 1, NO_KEY), axis=0)
                window_lo = tl.maximum(window_lo, lo + sink_tiles * BN)
                tiles = sink_tiles + tl.cdiv(tl.maximum(hi - window_lo, 0), BN)
        if THRESHOLD:
            threshold_at = threshold_ptr + b * threshold_b + h * threshold_h + r * threshold_q
            threshold = tl.load(threshold_at, mask=row_ok, other=0.0).to(tl.float32) * LOG2E

    # State. The maximum begins finite, so that differences of maxima times an empty sum are 0.
    top = tl.zeros([BM], tl.float32) + HIDDEN
    total = tl.zeros([BM, BN], tl.float32)
    surprise = total
    best = total + HIDDEN
    best_at = tl.zeros([BM, BN], tl.int32)
    mass0, mass1, mass2, mass3, mass4, mass5, mass6, mass7 = total, total, total, total, total, total, total, total
    acc = tl.zeros([BM, DV], tl.float32)
    if MAP:
        known = tl.load(stats_ptr + 4 * n_rows.to(tl.int64) + row, mask=row_ok, other=float("-inf"))
        known = tl.where(known == float("-inf"), -HIDDEN, known)

    for t in tl.range(tiles * split // n_splits, tiles * (split + 1) // n_splits):
        n0 = lo + t * BN
        if SINK_WINDOW:
            n0 = tl.where(t < sink_tiles, n0, window_lo + (t - sink_tiles) * BN)
        cols = n0 + tl.arange(0, BN)
        col_ok = cols < hi
        k_at = k_base + cols.to(tl.int64)[None, :] * k_n + dims[:, None]
        if D != HEAD_DIM:
            kt = tl.load(k_at, mask=col_ok[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
        else:
            kt = tl.load(k_at, mask=col_ok[None, :], other=0.0)
        x = product(q, kt, UPCAST, PRECISION) * row_scale[:, None]
        if SOFTCAP:
            x = capped(x, softcap) * LOG2E

        visible = col_ok[None, :] & row_ok[:, None]
        if RANGES:
            visible = visible & (cols[None, :] >= (r + from_row)[:, None]) & (cols[None, :] < (r + to_row)[:, None])
        if PADDING:
            real = tl.load(padding_ptr + b * padding_b + cols, mask=col_ok, other=0)
            visible = visible & (real != 0)[None, :]
        if (CLASSES > 1) or BETA:
            edit_group = tl.load(edit_groups_ptr + b * edit_groups_b + cols, mask=col_ok, other=0).to(tl.int32)
        if (CLASSES > 1) and (not MAP):
            visible = visible & (((class_map >> (edit_group * 4)) & 15)[None, :] == (m // group_rows)[:, None])
        if EDITED:
            if DENSE:
                dense_at = dense_ptr + b * dense_b + h[:, None] * dense_h + r.to(tl.int64)[:, None] * dense_q
                visible = visible & (tl.load(dense_at + cols[None, :], mask=visible, other=0) != 0)
            if SINK_WINDOW:
                kept = (cols - first_real)[None, :] < sw_sink[:, None]
                kept = kept | (q_slot[:, None] - cols[None, :] < sw_window[:, None])
                visible = visible & (kept | ((bits & SINK_WINDOW_BIT) == 0)[:, None])
            if BLOCKS:
                block_at = blocks_ptr + (h * blocks_h + ((r + q_offset) // blocks_size) * blocks_q)[:, None]
                allowed = tl.load(block_at + ((cols + kv_offset) // blocks_size)[None, :], mask=visible, other=0)
                visible = visible & ((allowed != 0) | ((bits & BLOCKS_BIT) == 0)[:, None])
            if N_COORDS:
                radius = tl.load(near_radius_ptr + h * near_h)[:, None]
                close = near(
                    near_q_ptr, near_k_ptr, b * near_qb, b * near_kb, r, row_ok, cols, col_ok, radius, N_COORDS
                )
                visible = visible & (close | ((bits & NEIGHBOURHOOD_BIT) == 0)[:, None])
            if N_DROP:
                drop_row = b * drop_b + h * drop_h + r * drop_q
                visible = visible & ~dropped(drop_ptr, drop_row, row_ok, cols + kv_offset, N_DROP)
            if BIAS:
                bias_at = bias_ptr + b * bias_b + h[:, None] * bias_h + r.to(tl.int64)[:, None] * bias_q
                bias = tl.load(bias_at + cols[None, :], mask=visible, other=0.0).to(tl.float32)
                visible = visible & (bias > bias_hidden)
                x = x + tl.where(bias > bias_hidden, bias, 0.0) * LOG2E
            if BETA:
                beta_row = b * beta_b + h * beta_h + r * beta_q
                x = x + by_group(beta_ptr, beta_row, row_ok, edit_group, EDIT_GROUPS, 0.0) * tl.abs(x)
            if THRESHOLD:
                visible = visible & (x >= threshold[:, None])
            if UNIFORM:
                x = tl.where(uniform[:, None], 0.0, x)
        x = tl.where(visible, x, HIDDEN)

        if MAP:
            p = tl.exp2(x - known[:, None])
            if WEIGHTED:
                key_class = tl.zeros([BN], tl.int32)
                if CLASSES > 1:
                    key_class = (class_map >> (edit_group * 4)) & 15
                p = p * by_group(used_ptr, row * CLASSES, row_ok, key_class, CLASSES, 1.0)
            map_at = map_ptr + row[:, None] * n_keys + cols[None, :]
            tl.store(map_at, tl.where(visible, p, hide), mask=row_ok[:, None] & col_ok[None, :])
        else:
            if ROW_STATS:
                rises = x > best
                best = tl.where(rises, x, best)
                best_at = tl.where(rises, n0, best_at)
            new_top = tl.maximum(top, tl.max(x, 1))
            # A row that has seen nothing yet is measured against 0: against its own huge negative score, a fused
            # multiply-add would leave the rounding error of that score.
            against = tl.where(new_top > DEAD, new_top, 0.0)
            x = x - against[:, None]
            p = tl.exp2(x)
            fade = tl.exp2(top - new_top)[:, None]
            if ROW_STATS:
                surprise = fade * (surprise + (top - new_top)[:, None] * total) + p * x
                if GROUPS:
                    kind = tl.load(groups_ptr + b * groups_b + cols, mask=col_ok, other=-1).to(tl.int32)[None, :]
                    mass0 = mass0 * fade + tl.where(kind == 0, p, 0.0)
                    if N_GROUPS > 1:
                        mass1 = mass1 * fade + tl.where(kind == 1, p, 0.0)
                    if N_GROUPS > 2:
                        mass2 = mass2 * fade + tl.where(kind == 2, p, 0.0)
                    if N_GROUPS > 3:
                        mass3 = mass3 * fade + tl.where(kind == 3, p, 0.0)
                    if N_GROUPS > 4:
                        mass4 = mass4 * fade + tl.where(kind == 4, p, 0.0)
                    if N_GROUPS > 5:
                        mass5 = mass5 * fade + tl.where(kind == 5, p, 0.0)
                    if N_GROUPS > 6:
                        mass6 = mass6 * fade + tl.where(kind == 6, p, 0.0)
                    if N_GROUPS > 7:
                        mass7 = mass7 * fade + tl.where(kind == 7, p, 0.0)
            total = total * fade + p
            top = new_top
            if OUTPUT:
                v_at = v_base + cols.to(tl.int64)[:, None] * v_n + v_dims[None, :]
                if DV != V_DIM:
                    v = tl.load(v_at, mask=col_ok[:, None] & (v_dims < V_DIM)[None, :], other=0.0)
                else:
                    v = tl.load(v_at, mask=col_ok[:, None], other=0.0)
                if UPCAST:
                    acc = product_add(p, v, acc * fade, UPCAST, PRECISION)
                else:
                    acc = product_add(p.to(v.dtype), v, acc * fade, UPCAST, PRECISION)

    if not MAP:
        whole = tl.sum(total, 1)
        if ROW_STATS:
            entropy = tl.sum(surprise, 1)
            peak = tl.max(best, 1)
            at = tl.where(best == peak[:, None], best_at + tl.arange(0, BN)[None, :], NO_KEY)
            top_key = tl.min(at, 1) + kv_offset
        if DIRECT:
            sink = top
            if SINKS:
                sink = tl.load(sinks_ptr + h, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
            lse2, norm = settled(top, whole, sink, uniform, SINKS, UNIFORM)
            if OUTPUT:
                gain = norm * factor
                if GAIN:
                    gain_at = gain_ptr + b * gain_b + h * gain_h + r * gain_q
                    gain = gain * tl.load(gain_at, mask=row_ok, other=0.0).to(tl.float32)
                z_at = z_ptr + ((b * n_queries + r)[:, None] * n_heads + h[:, None]) * V_DIM + v_dims[None, :]
                z = acc * gain[:, None]
                tl.store(z_at, z.to(z_ptr.dtype.element_ty), mask=row_ok[:, None] & (v_dims < V_DIM)[None, :])
            plane = n_rows.to(tl.int64)
            if LSE:
                tl.store(stats_ptr + row, lse2 * LN2, mask=row_ok)
                tl.store(stats_ptr + 4 * plane + row, lse2, mask=row_ok)
                share = tl.zeros([BM], tl.float32)
                if SINKS:
                    share = tl.exp2(sink - lse2)
                    if UNIFORM:
                        share = tl.where(uniform, 0.0, share)
                tl.store(stats_ptr + 3 * plane + row, share, mask=row_ok)
            if ROW_STATS:
                tl.store(stats_ptr + plane + row, norm, mask=row_ok)
                above = tl.where(norm > 0, top - lse2, 0.0)
                tl.store(stats_ptr + 2 * plane + row, (entropy + above * whole) * norm * -LN2, mask=row_ok)
                tl.store(key_ptr + row, tl.where(norm > 0, top_key, -1), mask=row_ok)
                mass_at = mass_ptr + row * N_GROUPS
                scaled = norm
                step = 1
        else:
            parts = n_splits * CLASSES
            place = row * parts + split * CLASSES + m // group_rows
            step = n_rows.to(tl.int64) * parts
            planes = part_ptr
            if OUTPUT:
                tl.store(part_ptr + place[:, None] * DV + v_dims[None, :], acc, mask=row_ok[:, None])
                planes = part_ptr + step * DV
            tl.store(planes + place, top, mask=row_ok)
            tl.store(planes + step + place, whole, mask=row_ok)
            if ROW_STATS:
                tl.store(planes + 2 * step + place, entropy, mask=row_ok)
                tl.store(planes + 3 * step + place, top_key.to(tl.float32, bitcast=True), mask=row_ok)
                mass_at = planes + 4 * step + place
                scaled = tl.zeros([BM], tl.float32) + 1.0
        if ROW_STATS:
            if GROUPS:
                tl.store(mass_at, tl.sum(mass0, 1) * scaled, mask=row_ok)
            else:
                tl.store(mass_at, whole * scaled, mask=row_ok)
            if N_GROUPS > 1:
                tl.store(mass_at + step, tl.sum(mass1, 1) * scaled, mask=row_ok)
            if N_GROUPS > 2:
                tl.store(mass_at + 2 * step, tl.sum(mass2, 1) * scaled, mask=row_ok)
            if N_GROUPS > 3:
                tl.store(mass_at + 3 * step, tl.sum(mass3, 1) * scaled, mask=row_ok)
            if N_GROUPS > 4:
                tl.store(mass_at + 4 * step, tl.sum(mass4, 1) * scaled, mask=row_ok)
            if N_GROUPS > 5:
                tl.store(mass_at + 5 * step, tl.sum(mass5, 1) * scaled, mask=row_ok)
            if N_GROUPS > 6:
                tl.store(mass_at + 6 * step, tl.sum(mass6, 1) * scaled, mask=row_ok)
            if N_GROUPS > 7:
                tl.store(mass_at + 7 * step, tl.sum(mass7, 1) * scaled, mask=row_ok)


COMBINE_UNSPECIALISED = [
    "n_heads", "n_queries", "n_rows", "n_parts", "factor", "gain_ptr", "gain_b", "gain_h", "gain_q", "sinks_ptr",
    "bits_ptr", "bits_b", "bits_h", "bits_q", "bits_all", "weight_ptr", "weight_b", "weight_h", "weight_q", "fraction",
    "fraction_ptr", "fraction_b", "fraction_h", "fraction_q", "source", "target", "gate", "share_of", "summ", "rho",
]  # fmt: skip


@triton.jit
def combine_row(
    row, sinks_ptr, z_ptr, part_ptr, stats_ptr, key_ptr, mass_ptr, used_ptr, n_parts, n_heads, n_queries, n_rows, factor,
    gain_ptr, gain_b, gain_h, gain_q, bits_ptr, bits_b, bits_h, bits_q, bits_all,
    weight_ptr, weight_b, weight_h, weight_q,
    fraction, fraction_ptr, fraction_b, fraction_h, fraction_q, source, target, gate, share_of, summ, rho,
    PARTS: tl.constexpr, STEP: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr, CLASSES: tl.constexpr,
    HOW: tl.constexpr, OUTPUT: tl.constexpr, ROW_STATS: tl.constexpr, LSE: tl.constexpr, MASSES: tl.constexpr,
    USED: tl.constexpr, N_GROUPS: tl.constexpr, SINKS: tl.constexpr, GAIN: tl.constexpr, BITS: tl.constexpr,
    UNIFORM: tl.constexpr, FRACTIONS: tl.constexpr,
):  # fmt: skip
    """One row: its parts put together, and the weights of its classes worked out from their masses (``HOW``).

    ``source``, ``target``, ``gate`` and ``share_of`` are sets of classes as bits. ``MASSES`` leaves the masses of classes
    in ``mass_ptr``, before weights.
    """
    r = row % n_queries
    h = row // n_queries % n_heads
    b = row // n_queries // n_heads
    j = tl.arange(0, PARTS)
    j_ok = j < n_parts
    step = n_rows.to(tl.int64) * n_parts
    first = row * n_parts
    planes = part_ptr
    if OUTPUT:
        planes = part_ptr + step * DV
    planes += first
    tops = tl.load(planes + j, mask=j_ok, other=HIDDEN)
    totals = tl.load(planes + step + j, mask=j_ok, other=0.0)
    top = tl.max(tops, 0)
    seen = tops > DEAD
    total = tl.sum(tl.where(seen, tl.exp2(tops - top) * totals, 0.0), 0)
    uniform = top > 0
    if UNIFORM:
        bits = bits_all
        if BITS:
            bits = bits | tl.load(bits_ptr + b * bits_b + h * bits_h + r * bits_q).to(tl.int32)
        uniform = (bits & UNIFORM_BIT) != 0
    sink = top
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
    lse2, norm = settled(top, total, sink, uniform, SINKS, UNIFORM)
    share = norm * 0.0
    if SINKS:
        share = tl.exp2(sink - lse2)
        if UNIFORM:
            share = tl.where(uniform, 0.0, share)
    scales = tl.where(seen, tl.exp2(tops - tl.where(seen, lse2, 0.0)), 0.0)

    c = tl.arange(0, 8)
    if (CLASSES > 1) or (HOW != 0):
        member = (j % CLASSES)[:, None] == c[None, :]
        masses = tl.sum(tl.where(member, (scales * totals)[:, None], 0.0), 0)
        if MASSES:
            tl.store(mass_ptr + row * CLASSES + c, masses, mask=c < CLASSES)
        weights = tl.zeros([8], tl.float32) + 1.0
        if (HOW > 0) and (HOW < REDISTRIBUTED):
            weight_at = weight_ptr + b * weight_b + h * weight_h + r * weight_q + c
            weights = tl.load(weight_at, mask=c < CLASSES, other=0.0).to(tl.float32)
        if HOW == RENORMALISED:
            left = tl.sum(weights * masses, 0) + share
            some = left >= TINY
            rescale = tl.where(some, 1.0 / tl.where(some, left, 1.0), 0.0)
            weights = weights * rescale
            share = share * rescale
        if HOW == REDISTRIBUTED:
            moved = fraction
            if FRACTIONS:
                fraction_at = fraction_ptr + b * fraction_b + h * fraction_h + r * fraction_q
                moved = tl.load(fraction_at).to(tl.float32)
            of_source = (source >> c) & 1
            of_target = (target >> c) & 1
            mass_source = tl.sum(tl.where(of_source != 0, masses, 0.0), 0)
            mass_target = tl.sum(tl.where(of_target != 0, masses, 0.0), 0)
            mass_gate = tl.sum(tl.where(((gate >> c) & 1) != 0, masses, 0.0), 0)
            mass_share = tl.sum(tl.where(((share_of >> c) & 1) != 0, masses, 0.0), 0)
            is_open = (mass_gate >= summ) & (mass_share >= rho * mass_gate)
            is_open = is_open & (mass_source > 0) & (mass_target >= TINY)
            moved = tl.where(is_open, moved, 0.0)
            gained = moved * mass_source / tl.where(is_open, mass_target, 1.0)
            weights = tl.where(of_source != 0, 1.0 - moved, tl.where(of_target != 0, 1.0 + gained, 1.0))
        if USED:
            tl.store(used_ptr + row * CLASSES + c, weights, mask=c < CLASSES)
        each = tl.sum(tl.where(member, weights[None, :], 0.0), 1)
    else:
        each = tl.zeros([PARTS], tl.float32) + 1.0

    plane = n_rows.to(tl.int64)
    if LSE:
        tl.store(stats_ptr + row, lse2 * LN2)
        tl.store(stats_ptr + 3 * plane + row, share)
        tl.store(stats_ptr + 4 * plane + row, lse2)
    if ROW_STATS:
        final = scales * each
        surprises = tl.load(planes + 2 * step + j, mask=j_ok, other=0.0)
        some = final > 0
        above = tl.where(some, tops - lse2 + tl.log2(tl.where(some, each, 1.0)), 0.0)
        entropy = tl.sum(tl.where(some, final * (surprises + above * totals), 0.0), 0)
        tl.store(stats_ptr + 2 * plane + row, entropy * -LN2)
        peak = tl.max(final, 0)
        tl.store(stats_ptr + plane + row, peak)
        keys = tl.load(planes + 3 * step + j, mask=j_ok, other=0.0).to(tl.int32, bitcast=True)
        key = tl.min(tl.where((final == peak) & j_ok, keys, NO_KEY), 0)
        tl.store(key_ptr + row, tl.where(peak > 0, key, -1))
        for g in tl.static_range(N_GROUPS):
            mass = tl.load(planes + (4 + g) * step + j, mask=j_ok, other=0.0)
            tl.store(mass_ptr + row * N_GROUPS + g, tl.sum(final * mass, 0))
    if OUTPUT:
        v_dims = tl.arange(0, DV)
        acc = tl.zeros([DV], tl.float32)
        for start in tl.range(0, n_parts, STEP):
            i = start + tl.arange(0, STEP)
            i_ok = i < n_parts
            level = tl.load(planes + i, mask=i_ok, other=HIDDEN)
            alive = level > DEAD
            weight = tl.where(alive, tl.exp2(level - tl.where(alive, lse2, 0.0)), 0.0)
            if (CLASSES > 1) or (HOW != 0):
                of_class = (i % CLASSES)[:, None] == c[None, :]
                weight = weight * tl.sum(tl.where(of_class, weights[None, :], 0.0), 1)
            part_at = part_ptr + (first + i)[:, None] * DV + v_dims[None, :]
            acc += tl.sum(tl.load(part_at, mask=i_ok[:, None], other=0.0) * weight[:, None], 0)
        acc *= factor
        if GAIN:
            acc *= tl.load(gain_ptr + b * gain_b + h * gain_h + r * gain_q).to(tl.float32)
        z_at = z_ptr + ((b * n_queries + r) * n_heads + h) * V_DIM + v_dims
        tl.store(z_at, acc.to(z_ptr.dtype.element_ty), mask=v_dims < V_DIM)


@triton.jit(do_not_specialize=COMBINE_UNSPECIALISED)
def combine_kernel(
    sinks_ptr, z_ptr, part_ptr, stats_ptr, key_ptr, mass_ptr, used_ptr, n_parts, n_heads, n_queries, n_rows, factor,
    gain_ptr, gain_b, gain_h, gain_q, bits_ptr, bits_b, bits_h, bits_q, bits_all,
    weight_ptr, weight_b, weight_h, weight_q,
    fraction, fraction_ptr, fraction_b, fraction_h, fraction_q, source, target, gate, share_of, summ, rho,
    PARTS: tl.constexpr, STEP: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr, CLASSES: tl.constexpr,
    HOW: tl.constexpr, OUTPUT: tl.constexpr, ROW_STATS: tl.constexpr, LSE: tl.constexpr, MASSES: tl.constexpr,
    USED: tl.constexpr, N_GROUPS: tl.constexpr, SINKS: tl.constexpr, GAIN: tl.constexpr, BITS: tl.constexpr,
    UNIFORM: tl.constexpr, FRACTIONS: tl.constexpr,
):  # fmt: skip
    """Every program puts the parts of one row together, see :func:`combine_row`."""
    combine_row(
        tl.program_id(0).to(tl.int64),
        sinks_ptr, z_ptr, part_ptr, stats_ptr, key_ptr, mass_ptr, used_ptr, n_parts, n_heads, n_queries, n_rows,
        factor, gain_ptr, gain_b, gain_h, gain_q, bits_ptr, bits_b, bits_h, bits_q, bits_all, weight_ptr,
        weight_b, weight_h, weight_q, fraction, fraction_ptr, fraction_b, fraction_h, fraction_q, source,
        target, gate, share_of, summ, rho, PARTS, STEP, DV, V_DIM, CLASSES, HOW, OUTPUT, ROW_STATS, LSE, MASSES,
        USED, N_GROUPS, SINKS, GAIN, BITS, UNIFORM, FRACTIONS,
    )  # fmt: skip
