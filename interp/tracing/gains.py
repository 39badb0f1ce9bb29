"""Gains on the output of the model's own attention function."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from interp.attention import Gain
from interp.attention.versions import Seen, unchanged, versions


def scaled(z: Tensor, gain: Gain) -> Tensor:
    """``z * value`` where the gain says so, z elsewhere: ``[B, Lq, H, Dv]`` in z's dtype.

    The product is rounded once, as that of z and the value in float32.
    """
    known = _factors.get(gain)
    if known is None or known[0].dtype != z.dtype or known[0].device != z.device or not unchanged(known[2]):
        factor, seen = _factor(gain, z), versions(gain)
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x, _ in seen)
        # Whether a tensor of inference mode has changed could be told by its values alone, for which a GPU must be waited for.
        if differentiated or any(x.is_inference() for x, _ in seen):
            return (z * factor).to(z.dtype)
        low = factor.to(z.dtype)
        # Kept in z's dtype where it is the same number there: one launch a layer and token.
        known = (low, None if bool((low == factor).all()) else factor, seen)
        _factors[gain] = known
    low, wide, _ = known
    return z * low if wide is None else (z * wide).to(z.dtype)


_factors: WeakKeyDictionary[Gain, tuple[Tensor, Tensor | None, Seen]] = WeakKeyDictionary()


def _factor(gain: Gain, z: Tensor) -> Tensor:
    """``[B|1, Lq|1, H|1, 1]`` in float32, or in float64 for such a z; 1 where the gain does not act."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    value = torch.as_tensor(gain.value, dtype=dtype, device=z.device)
    if gain.where is not None:
        value = torch.where(gain.where.to(z.device), value, 1.0)
    return value.transpose(1, 2).unsqueeze(-1) if value.ndim == 3 else value
