"""LayerNorm and RMSNorm as the linear maps that they are once their scale is that of a given run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.analysis.running import AnalysisError


def is_norm(module: nn.Module) -> bool:
    """A normalisation over the last axis, with an epsilon, that holds no other module."""
    named = type(module).__name__.endswith("Norm")
    return named and _eps(module) is not None and not list(module.children())


@dataclass(frozen=True, eq=False)
class LinearNorm:
    """``y = b + w * (x - mean x) / s`` with the ``s`` of a given run (without the mean for RMSNorm).

    Attributes:
        weight, bias: fp32 ``[width]``. A weight that the module adds 1 to (Gemma) has it here.
        scale: ``sqrt(mean (x - mean x)^2 + eps)`` of the given run, fp32 ``[..., 1]``.
        centred: LayerNorm.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    centred: bool

    @classmethod
    def of(cls, module: nn.Module, x: Tensor) -> LinearNorm:
        """Of a module, at the scale that it has for ``x [..., width]``; what it does is asked of the module itself.

        Raises:
            AnalysisError: it is no LayerNorm or RMSNorm.
        """
        forward: Any = module.forward
        eps = _eps(module) or 0.0
        width = x.shape[-1]
        one = torch.ones(1, width, device=x.device, dtype=torch.float32)
        # Rows of mean 0 and mean square 1 have the scale sqrt(1 + eps), centred or not.
        signs = one.clone()
        signs[:, 1::2] = -1
        with torch.no_grad():
            bias = forward(torch.zeros_like(x[..., :1, :]).reshape(-1, width)[:1]).float()[0]
            weight = (forward(signs.to(x.dtype)).float()[0] - bias) * signs[0] * (1 + eps) ** 0.5
            centred = bool(torch.allclose(forward(one.to(x.dtype)).float()[0], bias, atol=1e-3, rtol=1e-3))
            flat = x.float()
            flat = flat - flat.mean(-1, keepdim=True) if centred else flat
            made = cls(weight, bias, (flat.pow(2).mean(-1, keepdim=True) + eps).sqrt(), centred)
            wanted, own = forward(x).float(), made(x).float()
            tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
            if not torch.allclose(own, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max() + 1e-6)):
                raise AnalysisError(f"norms must be LayerNorm or RMSNorm; {type(module).__name__} does something else")
        return made

    def __call__(self, x: Tensor, rows: int = 1) -> Tensor:
        """``[rows * n, ...]`` for a scale of ``[n, ...]``."""
        flat = x.float()
        flat = flat - flat.mean(-1, keepdim=True) if self.centred else flat
        scale = self.scale
        if rows > 1 and scale.shape[0] > 1:
            scale = scale.repeat(rows, *[1] * (scale.ndim - 1))
        return (self.bias + self.weight * flat / scale).to(x.dtype)

    def pull_back(self, directions: Tensor, rows: list[int]) -> Tensor:
        """``[row, n, width]`` on the CPU: where x must go for ``y . u`` to grow, u of ``directions [n, width]`` or ``[row, n, width]``.

        Of the first sequence of the given run, at its positions ``rows``.
        """
        moved = (self.weight / self.scale[0, rows]).cpu()[:, None] * directions.float().cpu()
        return moved - moved.mean(-1, keepdim=True) if self.centred else moved


def _eps(module: nn.Module) -> float | None:
    for name in ("eps", "variance_epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None
