"""Groups of keys and rows: one-hot tables and sums over groups."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(groups: Tensor, n_groups: int, dtype: torch.dtype) -> Tensor:
    """``[B|1, L]`` group numbers as ``[B|1, L, G]``; a number outside ``0 .. G - 1`` (such as -1) belongs to none."""
    numbers = torch.arange(n_groups, dtype=groups.dtype, device=groups.device)
    return (groups.unsqueeze(-1) == numbers).to(dtype)


def group_sums(p: Tensor, groups: Tensor) -> Tensor:
    """Sum of ``p [B, H, L, Lk]`` per key group, ``[B, H, L, G]``, for one-hot ``groups [B|1, Lk, G]``."""
    if groups.shape[-1] == 1:
        return p.sum(-1, keepdim=True)
    # A table shared by the batch is left 2-D: matmul then runs one product instead of one per head.
    return p @ (groups[0] if groups.shape[0] == 1 else groups.unsqueeze(1))
