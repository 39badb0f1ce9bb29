"""The output projection of each attention, and the down-projection of each MLP, found by the order in which modules run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp.analysis.replay import layer_path
from interp.models.anatomy import Site, anatomy
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked


@dataclass(eq=False)
class Matrix:
    """One projection of one layer.

    Attributes:
        name: path of the module.
        module: it.
        given: its inputs, one for each call in the forward.
    """

    name: str
    module: nn.Module
    given: list[Tensor] = field(default_factory=list[Tensor])


class _Marker(Intervention):
    """Says which layers have attended."""

    def __init__(self, stack: str, mark: Callable[[int], None]) -> None:
        self.stack, self.mark = stack, mark

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == self.stack

    def after(self, call: SiteCall, z: Tensor) -> None:
        if call.site.stack == self.stack:
            self.mark(call.site.layer)


def out_projections(model: Model, inputs: dict[str, Any], stack: str) -> dict[int, Matrix]:
    """In one forward: of each layer the first matrix that runs behind the attention, with its inputs."""
    return _matrices(model, inputs, stack)[0]


def down_projections(model: Model, inputs: dict[str, Any], stack: str) -> dict[int, Matrix]:
    """In one forward: of each layer the last matrix that runs behind the attention, but for the output projection.

    Layers whose MLP is of experts, each with some of the tokens, are left out.
    """
    first, last = _matrices(model, inputs, stack)
    return {n: m for n, m in last.items() if m.name != first[n].name and not _of_experts(model.module, m.name)}


def _matrices(model: Model, inputs: dict[str, Any], stack: str) -> tuple[dict[int, Matrix], dict[int, Matrix]]:
    first: dict[int, Matrix] = {}
    last: dict[int, Matrix] = {}
    attended: set[int] = set()
    handles: list[Any] = []

    def watch(site: Site, name: str, module: nn.Module) -> None:
        def hook(sub: nn.Module, args: tuple[Any, ...]) -> None:
            if site.layer not in attended or not args or not isinstance(args[0], Tensor):
                return
            mine = first.setdefault(site.layer, Matrix(name, module))
            if mine.name == name:
                mine.given.append(args[0].detach())
            if site.layer not in last or last[site.layer].name != name:
                last[site.layer] = Matrix(name, module)
            last[site.layer].given.append(args[0].detach())

        handles.append(module.register_forward_pre_hook(hook))

    for site in anatomy(model.module).stacks[stack]:
        path = layer_path(site)
        for name, module in model.module.get_submodule(path).named_modules(prefix=path):
            if name not in (path, site.name) and not site.name.startswith(f"{name}.") and _is_matrix(module):
                watch(site, name, module)
    try:
        with hooked(model.module, interventions=[_Marker(stack, attended.add)]), torch.no_grad():
            model.module(**{k: v for k, v in inputs.items() if k != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return first, last


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    # A wrapper (LoRA) shows the weight of what it holds, and begins before it: it is the projection. Packed 4-bit
    # weights are [n, 1].
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _of_experts(root: nn.Module, name: str) -> bool:
    parent = root.get_submodule(name.rpartition(".")[0])
    return "expert" in name.lower() or any("expert" in part for part, _ in parent.named_children())
