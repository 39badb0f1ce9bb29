"""Influence of single attention entries on the loss, and of heads as their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.entropy import shuffle
from interp.analysis.gradients import Leaves
from interp.analysis.pairs import pattern
from interp.analysis.reading import forward_options, logits_of
from interp.analysis.running import AnalysisError, Floats, HeadScore, as_model, inputs_of, require_stack
from interp.analysis.targets import Positions, measure, target_of
from interp.models.anatomy import anatomy
from interp.models.model import Model
from interp.tracing.calls import SiteCall
from interp.tracing.session import hooked

EPSILON = 1e-6


@dataclass(frozen=True)
class EntryInfluence(HeadScore):
    """Influence of attention entries, as in MoA (Fu et al. 2024), https://arxiv.org/abs/2406.14909.

    Formula: ``E_ij = A_ij |g_ij - sum_n A_in g_in| / (1 - A_ij + eps)`` with ``g = dL/dA``: to first order the change of the loss
    when row i drops key j and the other keys take its mass (``A_in -> A_in / (1 - A_ij)``). A row that sees one key has nothing to
    drop to: ``|A g|``. A head's value is ``sum_ij E_ij``; :func:`influence_blocks` gives the sums over blocks, from which MoA plans spans.

    ``dL/dz`` comes from one backward of the model as it runs; ``dL/dA = (dL/dz) V^T`` is exact and made one layer at a time, so one
    layer's maps are in memory (a learned sink logit takes its share of ``A`` and none of the gradient).

    Unit: that of the metric, summed over entries: nats.

    Args:
        stack: whose heads.
        metric: ``loss``, ``logit``, ``logit_difference``, ``probability`` or a function.
        positions: read-out positions, see :func:`~interp.analysis.targets.target_of`; the paper: those of the response.
        shuffle_seed: of the control.

    Probe: ``Passages(n=8, length=64)``, contrast pairs, or an iterable of inputs. The paper: profiles at 2k, 4k and 8k tokens.
    Control: the same tokens in a random order.
    When not to use it: for lengths at which one layer's maps do not fit; for keys that are dropped together, whose changes do not add.
    """

    name: ClassVar[str] = "entry_influence"
    summary: ClassVar[str] = (
        "first-order change of the loss when single attention entries are dropped, summed over a head"
    )
    paper: ClassVar[str] = "Fu et al. 2024, MoA, https://arxiv.org/abs/2406.14909"
    unit: ClassVar[str] = "nats"
    control: ClassVar[str] = "shuffled tokens"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "Passages"

    stack: str = "text"
    metric: str | Callable[..., Any] = "loss"
    positions: Positions = "all"
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        measure(self.metric)

    @property
    def result_unit(self) -> str:
        return measure(self.metric).unit

    def default_probe(self) -> Any:
        if self.stack != "text":
            raise AnalysisError(
                f"probe must be given for stack {self.stack!r}: an iterable of inputs, as model.encode makes them"
            )
        from probes.text import Passages

        return Passages(n=8, length=64)

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        inputs = inputs_of(sample, model)
        value = self._heads(model, sample, inputs)
        other = shuffle(inputs, model, self.shuffle_seed) if "labels" not in inputs else None
        return value, None if other is None else self._heads(model, sample, other)

    def _heads(self, model: Model, sample: Any, inputs: dict[str, Any]) -> Floats:
        out = np.full((1, *anatomy(model.module).shape(self.stack)), np.nan)

        def take(layer: int, influence: Tensor) -> None:
            heads = influence.double().sum(dim=(0, 2, 3)).cpu().numpy()
            out[0, layer, : len(heads)] = heads

        influences(model, sample, inputs, take, self.stack, self.metric, self.positions)
        return out


def influence_blocks(
    model: Any, sample: Any, *, block: int = 64, stack: str = "text", metric: str | Callable[..., Any] = "loss",
    positions: Positions = "all",
) -> xr.DataArray:  # fmt: skip
    """Sums of E over blocks of queries and keys, ``[layer, head, query_block, key_block]``, in the metric's unit.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        sample: of a probe, or inputs.
        block: edge, 64 in the paper's code; the last block of a length that is no multiple is smaller.
        stack, metric, positions: as for :class:`EntryInfluence`.
    """
    if block < 1:
        raise AnalysisError(f"block must be at least 1, got {block}")
    model = as_model(model)
    require_stack(model, stack)
    found: dict[int, Tensor] = {}

    def take(layer: int, influence: Tensor) -> None:
        n, m = influence.shape[-2:]
        padded = torch.nn.functional.pad(influence.float().sum(0), (0, -m % block, 0, -n % block))
        found[layer] = padded.unflatten(2, (-1, block)).sum(-1).unflatten(1, (-1, block)).sum(2).cpu()

    influences(model, sample, inputs_of(sample, model), take, stack, metric, positions)
    n_layers, n_heads = anatomy(model.module).shape(stack)
    first = next(iter(found.values()))
    out = np.full((n_layers, n_heads, *first.shape[1:]), np.nan)
    for layer, sums in found.items():
        out[layer, : len(sums)] = sums.numpy()
    return xr.DataArray(
        out, dims=("layer", "head", "query_block", "key_block"),
        coords={"layer": range(n_layers), "head": range(n_heads)},
        attrs={"name": "entry influence", "unit": measure(metric).unit, "paper": EntryInfluence.paper, "block": block},
    )  # fmt: skip


def influences(
    model: Model, sample: Any, inputs: Mapping[str, Any], take: Callable[[int, Tensor], None], stack: str,
    metric: str | Callable[..., Any], positions: Positions,
) -> None:  # fmt: skip
    """Call ``take(layer, E [B, H, Lq, Lk])`` for each layer in turn.

    Raises:
        AnalysisError: a metric without a gradient, logits that are not finite.
    """
    target = target_of(sample, inputs, model, positions)
    given = {k: v for k, v in inputs.items() if k != "labels"}
    leaves = _Kept(stack)
    with hooked(model.module, interventions=[leaves]), torch.enable_grad():
        output = model.module(**given, **forward_options(model, given, target.positions))
        logits = logits_of(model, output, target.positions)
        clean = logits[0].detach()
        value = measure(metric).function(logits, clean, target.resolved(clean)).sum()
        if not value.requires_grad:
            raise AnalysisError(
                "metric must have a gradient, and this one has none: take loss, logit or logit_difference"
            )
        names = list(leaves.leaves)
        found = torch.autograd.grad(value, [leaves.leaves[n] for n in names], allow_unused=True)
    for name, gradient in zip(names, found, strict=True):
        call = leaves.calls.pop(name[1])
        if gradient is not None:
            take(name[1], influence(pattern(call), gradient.transpose(1, 2), _by_query_head(call)))


def influence(p: Tensor, dz: Tensor, v: Tensor) -> Tensor:
    """E ``[B, H, Lq, Lk]`` of a pattern ``[B, H, Lq, Lk]``, ``dL/dz [B, H, Lq, Dv]`` and values ``[B, H, Lk, Dv]``."""
    p = p.float()
    g = dz.float() @ v.float().transpose(-1, -2)
    centred = g - (p * g).sum(-1, keepdim=True)
    out = p * centred.abs() / (1 - p + EPSILON)
    alone = (p > 0).sum(-1, keepdim=True) == 1
    return torch.where(alone, (p * g).abs(), out)


def _by_query_head(call: SiteCall) -> Tensor:
    return call.v.detach().repeat_interleave(call.site.n_heads // call.site.n_kv_heads, 1)


class _Kept(Leaves):
    """Leaves at z that keep the calls as well."""

    def __init__(self, stack: str) -> None:
        super().__init__(stack, ("z",))
        self.calls: dict[int, SiteCall] = {}

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        if call.site.stack == self.stack:
            self.calls[call.site.layer] = call
        return super().after(call, z)
