"""The gradient of softmax attention under plain masks and sink-and-window rules, as FlashAttention-2 computes it.

With ``p`` recomputed from the log-sum-exp of the forward pass, ``u_ij = scale * q_i.k_j / T_i`` and ``dP_ij = dz_i.v_j``::

    mean_i = sum_j p_ij dP_ij = dz_i.z_i
    du_ij  = p_ij (dP_ij - mean_i) * (1 - (s_ij / c)^2 under a softcap c)
    dq_i = sum_j du_ij scale k_j / T_i     dk_j = sum_i du_ij scale q_i / T_i     dv_j = sum_i p_ij dz_i

(Dao 2023, "FlashAttention-2", algorithm 2, where ``mean`` is called D). The query-stationary kernel here gives dq, the
key-stationary one in :mod:`~interp.attention.triton.backward_keys` dk and dv.
"""

# Triton's loops have no iterator that a type checker could follow.
# pyright: basic, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from interp.attention.triton.tiles import (
    HIDDEN,
    LOG2E,
    SINK_WINDOW_BIT,
    capped,
    product,
    product_add,
    seen_keys,
    whole_tiles,
)

RUNNING_INTS = [
    "n_queries", "n_keys", "delta", "kv_offset", "left", "right", "row_scale_b", "row_scale_h", "row_scale_q", "bits_b",
    "bits_h", "bits_q", "dense_b", "dense_h", "dense_q", "padding_b", "first_b", "sw_h", "sw_window_h",
]  # fmt: skip
"""Arguments whose value must not choose a specialisation: lengths and strides that change from call to call."""

FAR = tl.constexpr(1 << 30)


@triton.jit(do_not_specialize=["n_queries"])
def rows_before_kernel(
    z_ptr, dz_ptr, lse_ptr, lse2_ptr, mean_ptr, n_heads, n_queries,
    BM: tl.constexpr, V_DIM: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """``mean = z.dz`` (both contiguous ``[B, Lq, H, Dv]``), and the log-sum-exp in units of log2.

    Rows that see nothing get a huge one, which makes their p 0.
    """
    n_blocks = tl.cdiv(n_queries, BM)
    bh = tl.program_id(0) // n_blocks
    b = (bh // n_heads).to(tl.int64)
    h = (bh % n_heads).to(tl.int64)
    rows = tl.program_id(0) % n_blocks * BM + tl.arange(0, BM)
    row_ok = rows < n_queries
    dims = tl.arange(0, DV)
    inside = row_ok[:, None] & (dims < V_DIM)[None, :]
    z_at = ((b * n_queries + rows.to(tl.int64)) * n_heads + h)[:, None] * V_DIM + dims[None, :]
    z = tl.load(z_ptr + z_at, mask=inside, other=0.0).to(tl.float32)
    dz = tl.load(dz_ptr + z_at, mask=inside, other=0.0).to(tl.float32)
    at = bh.to(tl.int64) * n_queries + rows
    lse = tl.load(lse_ptr + at, mask=row_ok, other=0.0)
    tl.store(lse2_ptr + at, tl.where(lse == float("-inf"), -HIDDEN, lse * LOG2E), mask=row_ok)
    tl.store(mean_ptr + at, tl.sum(z * dz, 1), mask=row_ok)


@triton.jit
def probability(x, unit, lse2, softcap, SOFTCAP: tl.constexpr):
    """p from q.k, and the softcap's slope (anything without one)."""
    y = x * unit
    slope = y
    if SOFTCAP:
        y = capped(y, softcap)
        slope = 1.0 - (y / softcap) * (y / softcap)
        y = y * LOG2E
    return tl.exp2(y - lse2), slope


@triton.jit
def sees(
    inside, q_slot, cols, left, right, first_real, sw_sink, sw_window, bits, dense_at,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SINK_WINDOW: tl.constexpr, BITS: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """``inside`` less what is hidden, in either orientation of a tile: ``q_slot``, ``bits`` and ``cols`` are broadcast to it."""
    visible = inside
    if CAUSAL:
        visible = visible & (cols <= q_slot)
    if LEFT:
        visible = visible & (cols >= q_slot - left)
    if RIGHT:
        visible = visible & (cols <= q_slot + right)
    if SINK_WINDOW:
        kept = (cols - first_real < sw_sink) | (q_slot - cols < sw_window)
        if BITS:
            kept = kept | ((bits & SINK_WINDOW_BIT) == 0)
        visible = visible & kept
    if DENSE:
        visible = visible & (tl.load(dense_at, mask=visible, other=0) != 0)
    return visible


@triton.jit(do_not_specialize=RUNNING_INTS)
def queries_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dz_ptr, lse2_ptr, mean_ptr, dq_ptr, turned_ptr,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n,
    scale, softcap, n_samples, n_heads, n_queries, n_keys, delta, kv_offset, left, right,
    row_scale_ptr, row_scale_b, row_scale_h, row_scale_q, bits_ptr, bits_b, bits_h, bits_q,
    dense_ptr, dense_b, dense_h, dense_q, padding_ptr, padding_b, first_ptr, first_b,
    sw_sink_ptr, sw_window_ptr, sw_h, sw_window_h,
    BM: tl.constexpr, BN: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    KV_GROUP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DENSE: tl.constexpr, PADDING: tl.constexpr, ROW_SCALE: tl.constexpr,
    SINK_WINDOW: tl.constexpr, BITS: tl.constexpr, DIVISOR_GRADIENT: tl.constexpr,
):  # fmt: skip
    """dq of one block of rows of one head, contiguous ``[B, H, Lq, D]``, and ``sum_j du_ij u_ij``, which is ``-T dT``."""
    n_bh = n_samples * n_heads
    pid = tl.program_id(0)
    bh = pid % n_bh
    # The longest rows first, as in the forward pass.
    block = tl.num_programs(0) // n_bh - 1 - pid // n_bh
    b = (bh // n_heads).to(tl.int64)
    h = (bh % n_heads).to(tl.int64)
    kv = h // KV_GROUP
    first_row = block * BM
    last_row = tl.minimum(first_row + BM, n_queries) - 1
    rows = first_row + tl.arange(0, BM)
    row_ok = rows < n_queries
    far_rows = rows.to(tl.int64)
    q_slot = rows + delta
    dims = tl.arange(0, D)
    v_dims = tl.arange(0, DV)
    q_ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + b * q_b + h * q_h + far_rows[:, None] * q_m + dims[None, :], mask=q_ok, other=0.0)
    dz_at = dz_ptr + ((b * n_queries + far_rows) * n_heads + h)[:, None] * V_DIM + v_dims[None, :]
    dz = tl.load(dz_at, mask=row_ok[:, None] & (v_dims < V_DIM)[None, :], other=0.0)
    row_at = (b * n_heads + h) * n_queries + rows
    lse2 = tl.load(lse2_ptr + row_at, mask=row_ok, other=-HIDDEN)[:, None]
    mean = tl.load(mean_ptr + row_at, mask=row_ok, other=0.0)[:, None]
    row_scale = tl.zeros([BM], tl.float32) + scale
    if ROW_SCALE:
        divisor_at = row_scale_ptr + b * row_scale_b + h * row_scale_h + rows * row_scale_q
        row_scale = scale / tl.load(divisor_at, mask=row_ok, other=1.0).to(tl.float32)
    unit = row_scale[:, None]
    if not SOFTCAP:
        unit = unit * LOG2E
    bits = tl.zeros([BM], tl.int32)
    if BITS:
        bits = tl.load(bits_ptr + b * bits_b + h * bits_h + rows * bits_q, mask=row_ok, other=0).to(tl.int32)
    dq = tl.zeros([BM, D], tl.float32)
    turned = tl.zeros([BM], tl.float32)

    # Which keys some row of the block sees, and which all rows see
    first_real = 0
    if PADDING or SINK_WINDOW:
        first_real = tl.load(first_ptr + b * first_b) - kv_offset
    lo, hi, all_lo, all_hi = seen_keys(
        first_row, last_row, n_keys, delta, left, right, first_real, CAUSAL, LEFT, RIGHT, PADDING
    )
    sink_stop = 0
    sw_sink = 0
    sw_window = 0
    if SINK_WINDOW:
        sw_sink = tl.minimum(tl.load(sw_sink_ptr + h * sw_h), FAR)
        sw_window = tl.minimum(tl.load(sw_window_ptr + h * sw_window_h), FAR)
        everywhere = True
        somewhere = True
        if BITS:
            acts = (bits & SINK_WINDOW_BIT) != 0
            everywhere = tl.min((acts | (row_ok == 0)).to(tl.int32), 0) == 1
            somewhere = tl.max(acts.to(tl.int32), 0) == 1
        if everywhere:
            sink_stop = tl.cdiv(tl.minimum(tl.maximum(first_real + sw_sink, 0), hi), BN) * BN
            lo = tl.maximum(lo, tl.maximum(first_row + delta - sw_window + 1, sink_stop))
            all_lo = tl.maximum(all_lo, last_row + delta - sw_window + 1)
        elif somewhere:
            all_hi = 0
    lo = lo // BN * BN
    hi = tl.maximum(hi, lo)
    all_lo, all_hi = whole_tiles(lo, hi, all_lo, all_hi, BN)

    k_base = k_ptr + b * k_b + kv * k_h
    v_base = v_ptr + b * v_b + kv * v_h
    for phase in tl.static_range(4):
        # 0: the sink of a sink-and-window rule; 1: the left edge of a window; 2: no mask needed; 3: the right edge
        narrowed = ((phase == 1) & (LEFT | SINK_WINDOW)) | (phase == 2)
        if ((phase == 0) & SINK_WINDOW) | (narrowed & (not (DENSE | PADDING))) | (phase == 3):
            if phase == 0:
                start, stop = 0, sink_stop
            elif phase == 1:
                start, stop = lo, all_lo
            elif phase == 2:
                start, stop = all_lo, all_hi
            else:
                start, stop = all_hi, hi
                if DENSE | PADDING:
                    start = lo
            for n0 in tl.range(start, stop, BN):
                cols = n0 + tl.arange(0, BN)
                col_ok = cols < n_keys
                far_cols = cols.to(tl.int64)
                kt_at = k_base + far_cols[None, :] * k_n + dims[:, None]
                vt_at = v_base + far_cols[None, :] * v_n + v_dims[:, None]
                if phase != 2:
                    kt = tl.load(kt_at, mask=col_ok[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
                elif D != HEAD_DIM:
                    kt = tl.load(kt_at, mask=(dims < HEAD_DIM)[:, None], other=0.0)
                else:
                    kt = tl.load(kt_at)
                if phase != 2:
                    vt = tl.load(vt_at, mask=col_ok[None, :] & (v_dims < V_DIM)[:, None], other=0.0)
                elif DV != V_DIM:
                    vt = tl.load(vt_at, mask=(v_dims < V_DIM)[:, None], other=0.0)
                else:
                    vt = tl.load(vt_at)
                x = product(q, kt, UPCAST, PRECISION)
                p, slope = probability(x, unit, lse2, softcap, SOFTCAP)
                if phase != 2:
                    inside = row_ok[:, None] & col_ok[None, :]
                    if PADDING:
                        real = tl.load(padding_ptr + b * padding_b + cols, mask=col_ok, other=0) != 0
                        inside = inside & real[None, :]
                    dense_at = dense_ptr + b * dense_b + h * dense_h + far_rows[:, None] * dense_q + cols[None, :]
                    visible = sees(
                        inside, q_slot[:, None], cols[None, :], left, right, first_real, sw_sink, sw_window, bits[:, None],
                        dense_at, CAUSAL, LEFT, RIGHT, SINK_WINDOW, BITS, DENSE,
                    )  # fmt: skip
                    p = tl.where(visible, p, 0.0)
                dp = product(dz, vt, UPCAST, PRECISION)
                du = p * (dp - mean)
                if SOFTCAP:
                    du *= slope
                if DIVISOR_GRADIENT:
                    turned += tl.sum(du * x, 1)
                if UPCAST:
                    dq = product_add(du, tl.trans(kt), dq, UPCAST, PRECISION)
                else:
                    dq = product_add(du.to(kt.dtype), tl.trans(kt), dq, UPCAST, PRECISION)

    dq *= row_scale[:, None]
    tl.store(dq_ptr + row_at[:, None] * HEAD_DIM + dims[None, :], dq.to(dq_ptr.dtype.element_ty), mask=q_ok)
    if DIVISOR_GRADIENT:
        tl.store(turned_ptr + row_at, turned * row_scale, mask=row_ok)
