"""Scales of a model's normalisations in one run, and a run with them frozen: what a direct effect is measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.anatomy import anatomy
from interp.models.model import unwrap


@dataclass(frozen=True)
class _Norm:
    """How one normalisation divides: by the root of the mean square (of the centred input) plus ``eps``."""

    name: str
    eps: float
    centred: bool

    def scale(self, x: Tensor) -> Tensor:
        """``sqrt(mean (x - mean x)^2 + eps)`` or ``sqrt(mean x^2 + eps)``, fp32 ``[..., 1]``."""
        x = x.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


@dataclass(frozen=True, eq=False)
class NormScales:
    """Denominators of every LayerNorm and RMSNorm on the residual stream in one forward.

    With them frozen (``MaskHeads(..., norms=scales)``) a norm is the linear map ``b + w * (x - mean x) / s_clean``: what a
    head is missing reaches the logits undistorted by rescaling, as in direct logit attribution. Norms of queries and keys
    inside attention are left alone. Attention and MLPs downstream still answer, so only for a path of norms alone (a head
    of the last layer, up to its MLP) is the effect the direct one to the last digit.

    Attributes:
        scales: by module path, one ``[..., 1]`` tensor for each call in the forward.
        norms: how each divides.
    """

    scales: Mapping[str, list[Tensor]]
    norms: Mapping[str, _Norm]

    @classmethod
    def collect(cls, model: Any, inputs: Mapping[str, Any]) -> NormScales:
        """Run the model on ``inputs`` without gradients, as it is, and keep the scales.

        Raises:
            ValueError: a normalisation that does not divide by a root mean square, or none at all.
        """
        module = unwrap(model)
        norms: dict[str, _Norm] = {}
        scales: dict[str, list[Tensor]] = {}

        def keep(name: str, sub: nn.Module, x: Tensor) -> None:
            if name not in norms:
                norms[name] = _recognise(name, sub, x)
            scales.setdefault(name, []).append(norms[name].scale(x))

        def watch(name: str) -> Any:
            return lambda sub, args: keep(name, sub, args[0]) if args else None

        handles = [sub.register_forward_pre_hook(watch(name)) for name, sub in _on_the_residual(module).items()]
        try:
            with torch.no_grad():
                module(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not scales:
            raise ValueError(
                f"model must have LayerNorm or RMSNorm modules, got none that ran in {type(module).__name__}"
            )
        return cls(scales, norms)

    def freeze(self, module: nn.Module) -> None:
        """Freeze the norms of ``module`` until its running forward ends.

        Raises:
            ValueError: it has not the modules that were seen; in the forward: inputs of another shape.
        """
        known = dict(module.named_modules())
        missing = [name for name in self.norms if name not in known]
        if missing:
            raise ValueError(f"norms must come from the model that runs; {type(module).__name__} has no {missing[0]}")
        handles: list[Any] = []
        for name, norm in self.norms.items():
            handles.append(known[name].register_forward_hook(_frozen(norm, iter(self.scales[name]))))

        def end(*_: Any) -> None:
            for handle in handles:
                handle.remove()

        handles.append(module.register_forward_hook(end, always_call=True))

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return {"norms": len(self.norms)}


def _on_the_residual(module: nn.Module) -> dict[str, nn.Module]:
    """Leaf normalisations outside attention; a gated one takes two inputs and stands inside a layer."""
    inside = tuple(f"{site.name}." for site in anatomy(module).sites)
    return {
        name: sub
        for name, sub in module.named_modules()
        if type(sub).__name__.endswith("Norm") and not name.startswith(inside) and not list(sub.children()) and _eps(sub) is not None
    }  # fmt: skip


def _eps(sub: nn.Module) -> float | None:
    for name in ("eps", "variance_epsilon"):
        value = getattr(sub, name, None)
        if isinstance(value, float):
            return value
    return None


def _recognise(name: str, sub: nn.Module, x: Tensor) -> _Norm:
    """Tell by its answers whether it centres, and that it divides by what we think."""
    forward: Any = sub.forward
    with torch.no_grad():
        y = forward(x).float()
        reach = float(x.abs().max()) + 1.0
        centred = bool(torch.allclose(forward(x + reach).float(), y, atol=1e-2, rtol=1e-2))
        norm = _Norm(name, _eps(sub) or 0.0, centred)
        bias = _bias(sub)
        linear, doubled = (y - bias) * norm.scale(x), (forward(2 * x).float() - bias) * norm.scale(2 * x)
        tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
        if not torch.allclose(doubled, 2 * linear, rtol=tolerance, atol=tolerance * float(linear.abs().max() + 1e-6)):
            raise ValueError(
                f"norms must divide by a root mean square, but {name} ({type(sub).__name__}) does something else: it cannot be frozen"
            )
    return norm


def _bias(sub: nn.Module) -> Tensor | float:
    bias = getattr(sub, "bias", None)
    return bias.float() if isinstance(bias, Tensor) else 0.0


def _frozen(norm: _Norm, scales: Any) -> Any:
    def hook(sub: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        clean: Tensor | None = next(scales, None)
        own = norm.scale(args[0])
        if clean is None or clean.shape != own.shape:
            got = "one call more" if clean is None else f"an input {tuple(args[0].shape)}"
            raise ValueError(f"norms must come from inputs like those that run, got {got} at {norm.name}")
        ratio = own / clean.to(own.device)
        bias = _bias(sub)
        # Where nothing has changed the output stays as it is, to the bit.
        return torch.where(ratio == 1, output, (bias + (output.float() - bias) * ratio).to(output.dtype))

    return hook
