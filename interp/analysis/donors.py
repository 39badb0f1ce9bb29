"""What stands in the place of a head's output: nothing, its mean over the samples, or what it gave on another sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from interp.analysis.replay import ReplayError
from interp.analysis.running import AnalysisError, inputs_of
from interp.attention import Edit, Uniform
from interp.models.anatomy import Site
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked

Kind = Literal["resample", "mean", "zero", "uniform"]
KINDS = ("resample", "mean", "zero", "uniform")


class _Outputs(Intervention):
    """Keeps z ``[entry, position, H, Dv]`` of every site of a stack."""

    def __init__(self, stack: str) -> None:
        self.stack = stack
        self.found: dict[int, Tensor] = {}

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == self.stack

    def after(self, call: SiteCall, z: Tensor) -> None:
        if call.site.stack != self.stack:
            return
        layer, z = call.site.layer, z.detach()
        before = self.found.get(layer)
        if before is None:
            # A copy: models may write into what attention gave them.
            self.found[layer] = z.clone()
        elif call.mask.q_offset and len(z) == len(before) == 1:
            self.found[layer] = torch.cat([before, z], dim=1)
        else:
            raise ReplayError(
                f"stack {self.stack!r} must be called once a forward (or packed), and layer {layer} was not"
            )


def outputs_of(model: Model, inputs: dict[str, Any], stack: str) -> dict[int, Tensor]:
    """z of every head in one forward, by layer ``[entry, position, H, Dv]``; entries are the images or tiles of a sample."""
    collector = _Outputs(stack)
    with hooked(model.module, interventions=[collector]), torch.no_grad():
        model.module(**{k: v for k, v in inputs.items() if k != "labels"})
    if not collector.found:
        raise AnalysisError(f"these inputs do not reach the stack {stack!r}: the model did not call it")
    return collector.found


def means_of(model: Model, samples: Sequence[Any], stack: str) -> dict[int, Tensor]:
    """Mean z over samples, by layer ``[1, position, H, Dv]``: by position where all samples have it, else of what have it.

    Entries of a sample (tiles) count as samples.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    for sample in samples:
        for layer, z in outputs_of(model, inputs_of(sample, model), stack).items():
            # fp64 on the CPU: a mean of low-precision sums would not be one.
            part, n = z.double().cpu().sum(0), len(z)
            total, count = sums.get(layer), counts.get(layer)
            if total is None or count is None:
                sums[layer], counts[layer] = part, torch.full((len(part),), float(n), dtype=torch.float64)
                continue
            longer = max(len(total), len(part))
            sums[layer] = _longer(total, longer) + _longer(part, longer)
            counts[layer] = _longer(count, longer) + _longer(torch.full((len(part),), float(n)).double(), longer)
    return {layer: (sums[layer] / counts[layer][:, None, None])[None].to(model.module.dtype) for layer in sums}


def _longer(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])


def donor_of(samples: Sequence[Any], index: int, seed: int) -> Any:
    """The sample that another one's heads are taken from: a pair's corrupt half, else another sample, drawn at random.

    Raises:
        AnalysisError: a pair that is not aligned, or a sample without others.
    """
    sample = samples[index]
    corrupt = getattr(sample, "corrupt", None)
    if corrupt is not None:
        if getattr(sample, "ids", ()) and not sample.aligned:
            raise AnalysisError(f"pairs must be aligned token by token for resampling, and sample {index} is not")
        return corrupt
    if len(samples) < 2:
        raise AnalysisError(
            "kind 'resample' takes heads from another sample, or from a pair's corrupt half: give at least two samples, or "
            "kind='mean' or 'zero'; got one"
        )
    others = [n for n in range(len(samples)) if n != index]
    return samples[others[int(np.random.default_rng([seed, index]).integers(len(others)))]]


def fitted(values: dict[int, Tensor], length: int, seed: int) -> dict[int, Tensor]:
    """z of another sample for one of ``length`` positions: the same positions, and from its end on rows drawn at random."""
    out: dict[int, Tensor] = {}
    for layer, z in values.items():
        have = z.shape[1]
        index = np.arange(length)
        beyond = index >= have
        index[beyond] = np.random.default_rng(seed).integers(have, size=int(beyond.sum()))
        out[layer] = z[:, torch.from_numpy(index).to(z.device)]
    return out


def given_rows(values: Tensor, call: SiteCall, rows: int) -> Tensor:
    """Values ``[entry, position, H, Dv]`` of one sample as z of a call ``[B|1, Lq, H, Dv]``."""
    values = values.to(call.q.device)
    length = call.q.shape[2]
    if values.shape[1] != length:
        # A packed tower's chunk.
        start = call.mask.q_offset % values.shape[1]
        return values[:, start : start + length]
    if len(values) == 1:
        return values
    return values.repeat(call.q.shape[0] // len(values), 1, 1, 1)


def replacing(heads: Tensor, values: Tensor | None, rows: int) -> Callable[[SiteCall, Tensor, Tensor], Tensor]:
    """A change that puts other values in the place of some heads' z.

    Args:
        heads: bool ``[rows, H]``.
        values: ``[entry, position, H, Dv]``; None is 0.
        rows: of the batch.
    """

    def change(call: SiteCall, z: Tensor, row: Tensor) -> Tensor:
        where = heads.to(z.device)[row][:, None, :, None]
        if values is None:
            return z.masked_fill(where, 0)
        return torch.where(where, given_rows(values, call, rows).to(z.dtype), z)

    return change


def uniform(heads: Tensor) -> Callable[[SiteCall, Tensor], Edit]:
    """An edit that has some heads attend to all visible keys alike; bool ``heads [rows, H]``."""
    return lambda call, row: Edit((Uniform(heads.to(call.q.device)[row][:, :, None]),))
