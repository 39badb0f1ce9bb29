"""Gradients of a metric with respect to what heads do: gates, z, q, k, v. One forward and one backward for all heads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from interp.analysis.reading import forward_options, logits_of
from interp.analysis.running import AnalysisError
from interp.analysis.targets import Target
from interp.models.anatomy import Site
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked

Key = tuple[str, int]


class Leaves(Intervention):
    """Adds 0 to (or multiplies by 1) what heads do, by tensors that gradients are taken to.

    Attributes:
        leaves: by ``(what, layer)``: ``gate [H]``, ``z [B, Lq, H, Dv]``, ``q``, ``k``, ``v [B, H|H_kv, L, D]``.
        values: of z, q, k, v, in the same shapes.
    """

    def __init__(self, stack: str, what: Collection[str]) -> None:
        self.stack, self.what = stack, tuple(what)
        self.leaves: dict[Key, Tensor] = {}
        self.values: dict[Key, Tensor] = {}

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == self.stack

    def before(self, call: SiteCall) -> None:
        if call.site.stack != self.stack:
            return
        for name in ("q", "k", "v"):
            if name in self.what:
                setattr(call, name, self._added((name, call.site.layer), getattr(call, name)))

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        if call.site.stack != self.stack:
            return None
        layer = call.site.layer
        if "gate" in self.what:
            # One gate for all calls: a packed tower is called window by window.
            key = ("gate", layer)
            if key not in self.leaves:
                self.leaves[key] = torch.ones(z.shape[2], device=z.device, dtype=torch.float32, requires_grad=True)
            z = (z * self.leaves[key][:, None]).to(z.dtype)
        return self._added(("z", layer), z) if "z" in self.what else z

    def _added(self, key: Key, value: Tensor) -> Tensor:
        if key in self.leaves:
            raise AnalysisError(f"stack {self.stack!r} must be called once a forward, and layer {key[1]} was not")
        self.leaves[key] = torch.zeros_like(value, requires_grad=True)
        self.values[key] = value.detach()
        return value + self.leaves[key]


def gradients(
    model: Model,
    inputs: Mapping[str, Any],
    target: Target,
    function: Callable[[Tensor, Tensor, Target], Tensor],
    *,
    stack: str,
    what: Collection[str],
) -> tuple[float, dict[Key, Tensor], Leaves]:
    """Value of a metric, its gradients by ``(what, layer)``, and the leaves.

    Args:
        model: whose; parameters get no gradient.
        inputs: of one sample.
        target: read-out positions and right ids.
        function: ``(logits [1, position, class], clean [position, class], target) -> [1]``, as a :class:`Measure` has it.
        stack: whose heads.
        what: any of ``gate``, ``z``, ``q``, ``k``, ``v``.

    Raises:
        AnalysisError: logits that are not finite, or a metric without a gradient (an accuracy, a rank).
    """
    leaves = Leaves(stack, what)
    given = {k: v for k, v in inputs.items() if k != "labels"}
    with hooked(model.module, interventions=[leaves]), torch.enable_grad():
        output = model.module(**given, **forward_options(model, given, target.positions))
        logits = logits_of(model, output, target.positions)
        clean = logits[0].detach()
        value = function(logits, clean, target.resolved(clean)).sum()
        if not leaves.leaves:
            raise AnalysisError(f"these inputs do not reach the stack {stack!r}: the model did not call it")
        if not value.requires_grad:
            raise AnalysisError(
                "metric must have a gradient, and this one has none: take loss, logit or logit_difference"
            )
        # Of the leaves alone: weights would need as much memory again.
        found = torch.autograd.grad(value, list(leaves.leaves.values()), allow_unused=True)
    made = {
        k: torch.zeros_like(leaf) if g is None else g for (k, leaf), g in zip(leaves.leaves.items(), found, strict=True)
    }
    return float(value.detach()), made, leaves
