"""Other systems' ways to column sums of attention, for the kernel benchmarks."""

# Triton reads annotations, shapes and default arguments of jitted functions itself, which a type checker cannot follow.
# pyright: basic, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def column_sums_kernel(
    q_ptr, k_ptr, lse_ptr, sums_ptr, q_b, q_h, q_n, k_b, k_h, k_n, scale, n_heads, n,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, KV_GROUP: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """A block of keys of one head stays, and all blocks of queries that may see it go by."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    b = (tl.program_id(1) // n_heads).to(tl.int64)
    h = (tl.program_id(1) % n_heads).to(tl.int64)
    dims = tl.arange(0, D)
    k_at = k_ptr + b * k_b + h // KV_GROUP * k_h + cols.to(tl.int64)[None, :] * k_n + dims[:, None]
    k = tl.load(k_at, mask=(cols < n)[None, :], other=0.0)
    total = tl.zeros([BN], tl.float32)
    start = 0
    if CAUSAL:
        start = tl.program_id(0) * BN // BM * BM
    for m0 in tl.range(start, n, BM):
        rows = m0 + tl.arange(0, BM)
        row_ok = rows < n
        q_at = q_ptr + b * q_b + h * q_h + rows.to(tl.int64)[:, None] * q_n + dims[None, :]
        q = tl.load(q_at, mask=row_ok[:, None], other=0.0)
        lse2 = tl.load(lse_ptr + (b * n_heads + h) * n + rows, mask=row_ok, other=0.0) * 1.4426950408889634
        p = tl.exp2(tl.dot(q, k, input_precision="ieee") * (scale * 1.4426950408889634) - lse2[:, None])
        visible = row_ok[:, None]
        if CAUSAL:
            visible = visible & (cols[None, :] <= rows[:, None])
        total += tl.sum(tl.where(visible, p, 0.0), 0)
    tl.store(sums_ptr + (b * n_heads + h) * n + cols, total, mask=cols < n)


def column_sums(q: Tensor, k: Tensor, lse: Tensor, *, scale: float, causal: bool) -> Tensor:
    """``received [B, H, N]`` as FlagAttention's ``total_attention`` computes it, written anew.

    A kernel of its own after the forward pass, from q, k and the natural log-sum-exp ``[B, H, N]``
    (https://github.com/FlagOpen/FlagAttention, flash attention with ``return_total_attention``): no other statistics, no edits,
    queries and keys of one length. Head dims are powers of two.
    """
    batch, heads, n, dim = q.shape
    sums = torch.empty(batch, heads, n, device=q.device)
    bm, bn = (128, 64) if q.is_cuda else (16, 16)
    column_sums_kernel[(triton.cdiv(n, bn), batch * heads)](
        q, k, lse, sums, *q.stride()[:3], *k.stride()[:3], scale, heads, n,
        BM=bm, BN=bn, D=dim, KV_GROUP=heads // k.shape[1], CAUSAL=causal, num_warps=4, num_stages=3,
    )  # fmt: skip
    return sums
