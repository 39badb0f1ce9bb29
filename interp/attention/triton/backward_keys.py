"""The key-stationary half of :mod:`~interp.attention.triton.backward`: dk and dv.

A program walks over all query heads of its key-value head, so that nothing is summed by atomics and repeated runs agree to the
bit.

Neither keys beyond the last one nor padded ones need a mask in the walk: such a key changes its own rows of dk and dv only, which
are not stored, or stored as 0.
"""

# Triton's loops have no iterator that a type checker could follow.
# pyright: basic, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from interp.attention.triton.backward import FAR, RUNNING_INTS, probability, sees
from interp.attention.triton.tiles import LOG2E, SINK_WINDOW_BIT, product, product_add


@triton.jit(do_not_specialize=RUNNING_INTS)
def keys_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dz_ptr, lse2_ptr, mean_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n,
    scale, softcap, n_samples, n_heads, n_queries, n_keys, delta, kv_offset, left, right,
    row_scale_ptr, row_scale_b, row_scale_h, row_scale_q, bits_ptr, bits_b, bits_h, bits_q,
    dense_ptr, dense_b, dense_h, dense_q, padding_ptr, padding_b, first_ptr, first_b,
    sw_sink_ptr, sw_window_ptr, sw_h, sw_window_h,
    BM: tl.constexpr, BN: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    KV_GROUP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DENSE: tl.constexpr, PADDING: tl.constexpr, ROW_SCALE: tl.constexpr,
    SINK_WINDOW: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key-value head, contiguous ``[B, Hkv, Lk, D]``.

    Tiles are held keys down, queries across, so that p and du are operands of the products with dz and q as they are.
    """
    n_kv = n_heads // KV_GROUP
    bk = tl.program_id(0) % (n_samples * n_kv)
    n0 = tl.program_id(0) // (n_samples * n_kv) * BN
    b = (bk // n_kv).to(tl.int64)
    kv = (bk % n_kv).to(tl.int64)
    cols = n0 + tl.arange(0, BN)
    col_ok = cols < n_keys
    dims = tl.arange(0, D)
    v_dims = tl.arange(0, DV)
    far_cols = cols.to(tl.int64)[:, None]
    k_ok = col_ok[:, None] & (dims < HEAD_DIM)[None, :]
    v_ok = col_ok[:, None] & (v_dims < V_DIM)[None, :]
    k = tl.load(k_ptr + b * k_b + kv * k_h + far_cols * k_n + dims[None, :], mask=k_ok, other=0.0)
    v = tl.load(v_ptr + b * v_b + kv * v_h + far_cols * v_n + v_dims[None, :], mask=v_ok, other=0.0)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, DV], tl.float32)

    # Which rows see some key of the block, and which see all of them
    first_hi = n_queries
    first_lo = 0
    first_all_lo = 0
    if CAUSAL:
        first_lo = tl.maximum(first_lo, n0 - delta)
        first_all_lo = tl.maximum(first_all_lo, n0 + BN - 1 - delta)
    if RIGHT:
        first_lo = tl.maximum(first_lo, n0 - delta - right)
        first_all_lo = tl.maximum(first_all_lo, n0 + BN - 1 - delta - right)
    first_all_hi = first_hi
    if LEFT:
        first_hi = tl.minimum(first_hi, n0 + BN - delta + left)
        first_all_hi = tl.minimum(first_all_hi, n0 - delta + left + 1)
    first_real = 0
    if PADDING or SINK_WINDOW:
        first_real = tl.load(first_ptr + b * first_b) - kv_offset
    if PADDING:
        real = tl.load(padding_ptr + b * padding_b + cols, mask=col_ok, other=0) != 0
        if tl.max(real.to(tl.int32), 0) == 0:
            first_hi = 0
    unit_of_all = scale
    if not SOFTCAP:
        unit_of_all = unit_of_all * LOG2E

    for member in tl.range(0, KV_GROUP):
        h = kv * KV_GROUP + member
        lo = first_lo
        hi = first_hi
        all_lo = first_all_lo
        all_hi = first_all_hi
        sw_sink = 0
        sw_window = 0
        if SINK_WINDOW:
            sw_sink = tl.minimum(tl.load(sw_sink_ptr + h * sw_h), FAR)
            sw_window = tl.minimum(tl.load(sw_window_ptr + h * sw_window_h), FAR)
            acts_on_all = True
            acts_on_some = True
            if BITS:
                of_first = tl.load(bits_ptr + b * bits_b + h * bits_h).to(tl.int32) & SINK_WINDOW_BIT
                acts_on_all = (bits_q == 0) & (of_first != 0)
                acts_on_some = (bits_q != 0) | (of_first != 0)
            if (n0 + BN - 1 - first_real >= sw_sink) & acts_on_some:
                all_hi = tl.minimum(all_hi, n0 - delta + sw_window)
            if (n0 - first_real >= sw_sink) & acts_on_all:
                hi = tl.minimum(hi, n0 + BN - 1 - delta + sw_window)
        lo = lo // BM * BM
        hi = tl.maximum(hi, lo)
        all_lo = tl.minimum(tl.cdiv(tl.maximum(all_lo, lo), BM) * BM, tl.cdiv(hi, BM) * BM)
        all_hi = tl.maximum(tl.minimum(all_hi, hi) // BM * BM, all_lo)
        q_base = q_ptr + b * q_b + h * q_h
        dz_base = dz_ptr + (b * n_queries * n_heads + h) * V_DIM
        row_base = (b * n_heads + h) * n_queries

        for phase in tl.static_range(3):
            # 0: rows that do not see all keys yet; 1: no mask needed; 2: rows that no longer do, and the last ones
            if (phase == 2) | ((not DENSE) & ((phase == 1) | CAUSAL | RIGHT)):
                if phase == 0:
                    start, stop = lo, all_lo
                elif phase == 1:
                    start, stop = all_lo, all_hi
                else:
                    start, stop = all_hi, hi
                    if DENSE:
                        start = lo
                for m0 in tl.range(start, stop, BM):
                    rows = m0 + tl.arange(0, BM)
                    row_ok = rows < n_queries
                    far_rows = rows.to(tl.int64)
                    qt_at = q_base + far_rows[None, :] * q_m + dims[:, None]
                    if phase != 1:
                        qt = tl.load(qt_at, mask=row_ok[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
                        lse2 = tl.load(lse2_ptr + row_base + rows, mask=row_ok, other=0.0)
                    elif D != HEAD_DIM:
                        qt = tl.load(qt_at, mask=(dims < HEAD_DIM)[:, None], other=0.0)
                        lse2 = tl.load(lse2_ptr + row_base + rows)
                    else:
                        qt = tl.load(qt_at)
                        lse2 = tl.load(lse2_ptr + row_base + rows)
                    x = product(k, qt, UPCAST, PRECISION)
                    if ROW_SCALE:
                        divisor_at = row_scale_ptr + b * row_scale_b + h * row_scale_h + rows * row_scale_q
                        inverse = 1.0 / tl.load(divisor_at, mask=row_ok, other=1.0).to(tl.float32)
                        p, slope = probability(x, (unit_of_all * inverse)[None, :], lse2[None, :], softcap, SOFTCAP)
                    else:
                        p, slope = probability(x, unit_of_all, lse2[None, :], softcap, SOFTCAP)
                    if phase != 1:
                        bits = tl.zeros([BM], tl.int32)
                        if BITS:
                            bits_at = bits_ptr + b * bits_b + h * bits_h + rows * bits_q
                            bits = tl.load(bits_at, mask=row_ok, other=0).to(tl.int32)
                        dense_at = dense_ptr + b * dense_b + h * dense_h + far_rows[None, :] * dense_q + cols[:, None]
                        visible = sees(
                            row_ok[None, :] & col_ok[:, None], (rows + delta)[None, :], cols[:, None], left, right, first_real,
                            sw_sink, sw_window, bits[None, :], dense_at, CAUSAL, LEFT, RIGHT, SINK_WINDOW, BITS, DENSE,
                        )  # fmt: skip
                        p = tl.where(visible, p, 0.0)
                    dz_at = dz_base + far_rows[:, None] * (n_heads * V_DIM) + v_dims[None, :]
                    if phase != 1:
                        dz = tl.load(dz_at, mask=row_ok[:, None] & (v_dims < V_DIM)[None, :], other=0.0)
                        mean = tl.load(mean_ptr + row_base + rows, mask=row_ok, other=0.0)
                    elif DV != V_DIM:
                        dz = tl.load(dz_at, mask=(v_dims < V_DIM)[None, :], other=0.0)
                        mean = tl.load(mean_ptr + row_base + rows)
                    else:
                        dz = tl.load(dz_at)
                        mean = tl.load(mean_ptr + row_base + rows)
                    dp = product(v, tl.trans(dz), UPCAST, PRECISION)
                    du = p * (dp - mean[None, :])
                    if SOFTCAP:
                        du *= slope
                    if ROW_SCALE:
                        du *= inverse[None, :]
                    if UPCAST:
                        dv = product_add(p, dz, dv, UPCAST, PRECISION)
                        dk = product_add(du, tl.trans(qt), dk, UPCAST, PRECISION)
                    else:
                        dv = product_add(p.to(dz.dtype), dz, dv, UPCAST, PRECISION)
                        dk = product_add(du.to(qt.dtype), tl.trans(qt), dk, UPCAST, PRECISION)

    dk *= scale
    if PADDING:
        # Their p is not the softmax's, and may even have overflowed.
        dk = tl.where(real[:, None], dk, 0.0)
        dv = tl.where(real[:, None], dv, 0.0)
    at = (b * n_kv + kv) * n_keys + far_cols
    tl.store(dk_ptr + at * HEAD_DIM + dims[None, :], dk.to(dk_ptr.dtype.element_ty), mask=k_ok)
    tl.store(dv_ptr + at * V_DIM + v_dims[None, :], dv.to(dv_ptr.dtype.element_ty), mask=v_ok)
