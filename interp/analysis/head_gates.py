"""Gradient of the loss with respect to a gate on each head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from interp.analysis.entropy import shuffle
from interp.analysis.gradients import gradients
from interp.analysis.running import AnalysisError, Floats, HeadScore, inputs_of
from interp.analysis.targets import MEASURES, Positions, measure, target_of
from interp.models.anatomy import anatomy
from interp.models.model import Model


@dataclass(frozen=True)
class HeadGates(HeadScore):
    """Gate importance of Michel et al. 2019, https://arxiv.org/abs/1905.10650, section 4.1.

    Formula: ``I_h = E_x |d m(x) / d xi_h|`` at ``xi = 1`` with ``z_h -> xi_h z_h``, which is ``|sum_i z_i . dm/dz_i|``. To first order
    the change when the head is set to zero is ``-dm/dxi``: ``signed=True`` gives that, as the damage of
    :class:`~interp.analysis.ablation.Ablation` with ``kind="zero"``. One forward and one backward for all heads.

    Unit: that of the metric, for a whole head. The released code takes the gradient of a batch's loss (so the batch's size changes
    the estimate), here each sample has its own; its normalisation is :func:`normalised`.

    Args:
        stack: whose heads.
        metric: ``loss``, ``logit``, ``logit_difference``, ``probability``, or a function as for the ablation.
        signed: without the absolute value.
        positions: read-out positions, see :func:`~interp.analysis.targets.target_of`.
        shuffle_seed: of the control.

    Probe: ``Passages(n=8, length=64)``, contrast pairs, or an iterable of inputs.
    Control: the same tokens in a random order. None for inputs without ids.
    When not to use it: in place of an ablation that can be afforded: it is the first order of a change that is not small. As a
    shortlist for one (``interp.sweeps``), look at the rank correlation that the sweep reports.
    """

    name: ClassVar[str] = "head_gates"
    summary: ClassVar[str] = "gradient of the loss with respect to a gate on the head"
    paper: ClassVar[str] = "Michel et al. 2019, https://arxiv.org/abs/1905.10650"
    unit: ClassVar[str] = "nats"
    control: ClassVar[str] = "shuffled tokens"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "Passages"

    stack: str = "text"
    metric: str | Callable[..., Any] = "loss"
    signed: bool = False
    positions: Positions = "all"
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        measure(self.metric)
        if self.metric in ("accuracy", "jsd"):
            usable = sorted(set(MEASURES) - {"accuracy", "jsd"})
            raise AnalysisError(
                f"metric must have a gradient at the clean run, {usable} or a function, got {self.metric!r}"
            )

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
        value = self._gates(model, sample, inputs)
        other = shuffle(inputs, model, self.shuffle_seed) if "labels" not in inputs else None
        if other is None or (isinstance(getattr(sample, "answer", None), int) and self.stack != "text"):
            return value, None
        # A pair keeps its answer; a text is asked for its own tokens in their new order.
        return value, self._gates(model, sample, other)

    def _gates(self, model: Model, sample: Any, inputs: dict[str, Any]) -> Floats:
        chosen = measure(self.metric)
        target = target_of(sample, inputs, model, self.positions)
        _, found, _ = gradients(model, inputs, target, chosen.function, stack=self.stack, what=("gate",))
        out = np.full((1, *anatomy(model.module).shape(self.stack)), np.nan)
        for (_, layer), gradient in found.items():
            damage = -chosen.sign * gradient.double().cpu().numpy()
            out[0, layer, : len(damage)] = damage if self.signed else np.abs(damage)
        return out


def normalised(score: xr.Dataset) -> xr.DataArray:
    """``value`` as the released code ranks it: of unit L2 norm within each layer, then 0 to 1 over all heads."""
    value = score["value"]
    unit = value / (np.sqrt((value**2).sum("head", skipna=True)) + 1e-20)
    low, high = float(unit.min()), float(unit.max())
    return (unit - low) / (high - low) if high > low else unit * 0
