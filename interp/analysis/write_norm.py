"""How much each head writes to the residual stream, and each neuron of an MLP is active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from interp.analysis.layer_matrices import Matrix, down_projections, out_projections
from interp.analysis.running import AnalysisError, Floats, HeadScore, as_model, build, inputs_of, require_stack, track
from interp.models.anatomy import anatomy
from interp.models.model import Model


@dataclass(frozen=True)
class WriteNorm(HeadScore):
    """Residual-write norm of AMP (Mugnaini et al. 2025), https://arxiv.org/abs/2504.21174.

    Formula: ``I_h = (1 / T) sum_t ||x_th W_O^h||_1``, x the input of the output projection (z itself, or z gated or normalised where
    the model does so), W_O^h the head's slice of it, without its bias; in fp32, token by token over real positions. The
    model's own projection is run on one head at a time where it is no plain linear layer (4-bit, LoRA, offloaded).

    Unit: activation units, summed over the width; with ``norm=2`` the Euclidean norm.

    Args:
        stack: whose heads.
        norm: 1 (the paper) or 2.

    Probe: ``Passages(n=8, length=64)``, or any iterable of inputs. The paper: 50 prompts of an instruction set, prompt pass only.
    Control: none of its own; it is itself the baseline that causal scores must beat (see
    :func:`interp.scores.matched_random_sets`).
    When not to use it: to compare layers of a model that normalises what attention writes (Gemma 2, OLMo 2): the norm behind it
    undoes the scale. For neurons: :func:`neuron_activity`.
    """

    name: ClassVar[str] = "write_norm"
    summary: ClassVar[str] = "norm of what the head writes to the residual stream, averaged over tokens"
    paper: ClassVar[str] = "Mugnaini et al. 2025, https://arxiv.org/abs/2504.21174"
    unit: ClassVar[str] = "L1 norm"
    control: ClassVar[str] = "none: it is a baseline"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "Passages"

    stack: str = "text"
    norm: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise AnalysisError(f"norm must be 1 or 2, got {self.norm!r}")

    @property
    def result_unit(self) -> str:
        return f"L{self.norm} norm"

    def default_probe(self) -> Any:
        if self.stack != "text":
            raise AnalysisError(
                f"probe must be given for stack {self.stack!r}: an iterable of inputs, as model.encode makes them"
            )
        from probes.text import Passages

        return Passages(n=8, length=64)

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        inputs = inputs_of(sample, model)
        found = out_projections(model, inputs, self.stack)
        real = _real(inputs, self.stack)
        out = np.full((1, *anatomy(model.module).shape(self.stack)), np.nan)
        for site in anatomy(model.module).stacks[self.stack]:
            seen = found.get(site.layer)
            if seen is not None:
                out[0, site.layer, : site.n_heads] = head_writes(seen, site.n_heads, self.norm, real).cpu().numpy()
        return out, None


def head_writes(seen: Matrix, n_heads: int, norm: int, real: Tensor | None) -> Tensor:
    """Mean norm of each head's write, fp64 ``[H]``."""
    x = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen.given])
    if real is not None and len(real) == len(x):
        x = x[real.to(x.device)]
    module, width = seen.module, x.shape[-1] // n_heads
    # Conv1D of GPT-2 holds its weight the other way round.
    weight = module.weight.detach() if type(module) is nn.Linear else None
    if weight is None and type(module).__name__ == "Conv1D":
        weight = module.weight.detach().T  # type: ignore[union-attr]
    if weight is not None and weight.device.type == "meta":
        weight = None
    found: list[Tensor] = []
    with torch.no_grad():
        bias = module(torch.zeros_like(x[:1])).float() if weight is None else None
        for head in range(n_heads):
            part = slice(head * width, (head + 1) * width)
            if weight is not None:
                write = x[:, part].float() @ weight[:, part].float().T
            else:
                alone = torch.zeros_like(x)
                alone[:, part] = x[:, part]
                write = module(alone).float() - bias  # type: ignore[operator]
            found.append(torch.linalg.vector_norm(write, ord=norm, dim=-1).double().mean())
    return torch.stack(found)


def neuron_activity(model: Any, probe: Any = None, *, stack: str = "text", progress: bool = True) -> xr.DataArray:
    """AMP's importance of MLP neurons: ``I_u = (1 / T) sum_t |a_tu|``, a the input of the down-projection.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        probe: as for :class:`WriteNorm`.
        stack: whose layers.
        progress: show a progress bar where the output is a terminal.

    Returns:
        ``[layer, neuron]``, activation units; samples count alike. NaN where a layer has fewer neurons, or experts.

    Raises:
        AnalysisError: no layer has a down-projection of one matrix (a mixture of experts).
    """
    model = as_model(model)
    require_stack(model, stack)
    method = WriteNorm(stack=stack)
    samples = build(method.default_probe() if probe is None else probe, model)
    sums: dict[int, Tensor] = {}
    for sample in track(samples, "neuron activity", progress):
        inputs = inputs_of(sample, model)
        real = _real(inputs, stack)
        for layer, seen in down_projections(model, inputs, stack).items():
            a = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen.given]).float().abs()
            a = a[real.to(a.device)] if real is not None and len(real) == len(a) else a
            mean = a.double().mean(0).cpu()
            sums[layer] = sums[layer] + mean if layer in sums else mean
    if not sums:
        raise AnalysisError(
            f"model must have an MLP of one down-projection a layer, {type(model.module).__name__} has none"
        )
    out = np.full((anatomy(model.module).shape(stack)[0], max(len(v) for v in sums.values())), np.nan)
    for layer, total in sums.items():
        out[layer, : len(total)] = (total / len(samples)).numpy()
    attrs = {"name": "neuron activity", "unit": "mean absolute activation", "paper": WriteNorm.paper, "stack": stack}
    return xr.DataArray(out, dims=("layer", "neuron"), coords={"layer": range(len(out))}, attrs=attrs)


def _real(inputs: dict[str, Any], stack: str) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool().reshape(-1) if stack == "text" and isinstance(mask, Tensor) and mask.ndim == 2 else None
