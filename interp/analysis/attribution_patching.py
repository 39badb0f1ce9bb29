"""Attribution patching: activation patching to first order, for all heads in one forward and one backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from interp.analysis.gradients import gradients
from interp.analysis.pairs import KEYED, PairScore, Rows, What, activations, rows_of
from interp.analysis.running import AnalysisError, Floats
from interp.models.anatomy import anatomy
from interp.models.model import Model


@dataclass(frozen=True)
class AttributionPatching(PairScore):
    """Attribution patching (Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching).

    Formula: ``sum (a_source - a_base) . dm/da |_base`` over a head's activation a, the first order of
    :class:`~interp.analysis.activation_patching.ActivationPatching`; divided by ``m(source) - m(base)`` with ``normalise``. With
    ``steps > 0`` the gradient is the mean over inputs that lie on the straight line from base to source embeddings, at
    ``(k - 1/2) / steps`` (integrated gradients; EAP-IG of Hanna et al. 2024, https://arxiv.org/abs/2403.17806, who take the ends):
    better where the metric saturates.

    Unit: fraction of the difference between the runs, or that of the metric with ``normalise=False``.

    Args:
        stack, metric, direction, normalise: see :class:`~interp.analysis.pairs.PairScore`; the metric needs a gradient.
        what: ``z``, ``q``, ``k`` or ``v``. k and v are those of a KV head: every query head of the group has the group's value.
        rows: as for activation patching.
        steps: 0 is the gradient at the base.

    Probe: ``IndirectObject(n=8)``, or any iterable of aligned contrast pairs.
    Control: the same gradient with the source's positions in a random order: a change of the same size in directions that do
    not belong together.
    When not to use it: for activations whose change is large (its errors are largest for q and k, where the softmax saturates:
    Kramar et al. 2024, https://arxiv.org/abs/2403.00745). Check the top heads with activation patching.
    """

    name: ClassVar[str] = "attribution_patching"
    summary: ClassVar[str] = "activation patching to first order: gradient times the difference of the runs"
    paper: ClassVar[str] = "Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching"
    unit: ClassVar[str] = "fraction of the difference between the runs"
    control: ClassVar[str] = "the source's positions in a random order"
    needs: ClassVar[str] = "contrast pairs"

    what: What = "z"
    rows: Rows = None
    steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("z", "q", "k", "v"):
            raise AnalysisError(
                f"what must be 'z', 'q', 'k' or 'v' (a pattern's gradient is of v as well), got {self.what!r}"
            )
        if not isinstance(self.steps, int) or self.steps < 0:
            raise AnalysisError(f"steps must be a whole number of at least 0, got {self.steps!r}")

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        pair, positions = self.pair(model, sample), rows_of(self.rows, sample)
        source = activations(model, pair.source, self.stack, self.what)
        function = self.measured.function

        def at_base() -> Any:
            return gradients(model, pair.base, pair.target, function, stack=self.stack, what=(self.what,))

        value, found, leaves = at_base()
        whole = 1.0
        if self.normalise:
            whole = gradients(model, pair.source, pair.target, function, stack=self.stack, what=("gate",))[0] - value
        own = leaves.values
        if self.steps:
            found = {key: torch.zeros_like(g) for key, g in found.items()}
            for k in range(self.steps):
                with between(model, pair.base, pair.source, (k + 0.5) / self.steps):
                    for key, g in at_base()[1].items():
                        found[key] += g / self.steps
        out, null = (np.full((1, *anatomy(model.module).shape(self.stack)), np.nan) for _ in range(2))
        for (_, layer), gradient in found.items():
            base, other = own[self.what, layer], source[layer]
            if base.shape != other.shape:
                raise AnalysisError(
                    f"both runs must have {self.what} of one shape, got {list(other.shape)}, {list(base.shape)}"
                )
            axis = 1 if self.what == "z" else 2
            order = torch.from_numpy(np.random.default_rng([self.seed, layer]).permutation(base.shape[axis]))
            shuffled = other.index_select(axis, order.to(other.device))
            n_heads = anatomy(model.module).site(self.stack, layer).n_heads
            for target, values in ((out, other), (null, shuffled)):
                change = self._summed((values.double() - base.double()) * gradient.double(), positions)
                change = change.repeat_interleave(n_heads // len(change) if self.what in KEYED else 1)
                target[0, layer, :n_heads] = self.scaled(change, whole)
        return out, null

    def _summed(self, product: Tensor, positions: list[int] | None) -> Tensor:
        """``[H]`` of ``[B, L, H, D]`` (z) or ``[B, H, L, D]``."""
        if self.what == "z":
            product = product.transpose(1, 2)
        if positions is not None:
            product = product[:, :, positions]
        return product.double().sum(dim=(0, 2, 3))


@contextmanager
def between(model: Model, base: dict[str, Any], source: dict[str, Any], share: float) -> Iterator[None]:
    """While it lasts, inputs are embedded at ``base + share (source - base)``: token embeddings and pixels.

    Raises:
        AnalysisError: inputs of different shapes, or a model without input embeddings.
    """
    changed = {k: source[k] for k in base if _differs(base[k], source.get(k))}
    undo: list[Any] = []
    embedding = model.module.get_input_embeddings() if any(k.endswith("_ids") for k in changed) else None

    def mixed(sub: Any, args: tuple[Any, ...], result: Tensor) -> Tensor | None:
        for name, other in changed.items():
            if (
                args
                and isinstance(args[0], Tensor)
                and args[0].shape == other.shape
                and torch.equal(args[0], base[name])
            ):
                with torch.no_grad():
                    there = torch.nn.functional.embedding(other, sub.weight)
                    here = torch.nn.functional.embedding(args[0], sub.weight)
                # By difference: some embeddings scale what they look up.
                scale = _scale(result, here)
                return result + share * scale * (there - here).to(result.dtype)
        return None

    pixels = {k: v for k, v in changed.items() if v.is_floating_point()}

    def replaced(sub: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {k: kwargs[k] + share * (v - kwargs[k]) if k in kwargs else v for k, v in pixels.items()}
        return args, {**kwargs, **given}

    try:
        if embedding is not None:
            undo.append(embedding.register_forward_hook(mixed))
        if pixels:
            undo.append(model.module.register_forward_pre_hook(replaced, with_kwargs=True))
        yield
    finally:
        for handle in undo:
            handle.remove()


def _differs(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if a.shape != b.shape:
        raise AnalysisError(f"both runs must have inputs of one shape, got {list(a.shape)} and {list(b.shape)}")
    return not torch.equal(a, b)


def _scale(result: Tensor, looked_up: Tensor) -> float:
    largest = int(looked_up.abs().argmax())
    return float(result.detach().reshape(-1)[largest] / looked_up.reshape(-1)[largest])
