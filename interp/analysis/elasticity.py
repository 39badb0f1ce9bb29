"""Elasticity: does a head's reach grow with the text?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from interp.analysis.attention_distance import row_sums
from interp.analysis.entropy import shuffle
from interp.analysis.running import AnalysisError, Floats, HeadScore, forward, inputs_of, on_grid
from interp.analysis.sink import cut
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class Elasticity(HeadScore):
    """Elasticity of a head's span, the question of Fu et al. 2024 (MoA), https://arxiv.org/abs/2406.14909; the measure is ours.

    Formula: text cut to each of ``lengths``; reach = mean of ``i - j`` under A over the last ``rows`` rows, special tokens left out and the
    rest renormalised; elasticity = least-squares slope of ``ln(reach + 1)`` on ``ln(length)``. 0: a fixed span; 1: a span in proportion
    to the text (a uniform head). From ``distance`` and ``distance_mass`` of those rows, linear in length; one
    forward a length.

    Unit: exponent.

    Args:
        lengths: at least two, rising; every sample must have as many tokens as the longest.
        rows: at the end of each cut.
        shuffle_seed: of the control.

    Probe: ``Passages`` of the longest length. Control: the same tokens in a random order.
    When not to use: for heads with a sink on an ordinary first token, whose reach is the length whatever else they do.
    """

    name: ClassVar[str] = "elasticity"
    summary: ClassVar[str] = "does a head's reach stay (0) or grow with the text (1)?"
    paper: ClassVar[str] = "Fu et al. 2024, https://arxiv.org/abs/2406.14909"
    unit: ClassVar[str] = "exponent"
    probe: ClassVar[str] = "Passages"
    control: ClassVar[str] = "shuffled tokens"

    lengths: tuple[int, ...] = (64, 128, 256)
    rows: int = 16
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.lengths, self.lengths[1:], strict=False))
        if len(self.lengths) < 2 or not rising or not 1 <= self.rows <= self.lengths[0]:
            raise AnalysisError(
                f"lengths must be at least two, rising, and rows within the shortest, got {self.lengths}, rows={self.rows}"
            )

    def default_probe(self) -> Any:
        from probes.text import Passages

        return Passages(n=8, length=self.lengths[-1])

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        inputs = inputs_of(sample, model)
        shuffled = shuffle(inputs, model, self.shuffle_seed)
        return self._slope(model, inputs), None if shuffled is None else self._slope(model, shuffled)

    def _slope(self, model: Model, inputs: Mapping[str, Any]) -> Floats:
        reach = np.stack([self._reach(model, inputs, length) for length in self.lengths])
        return slope(np.log(self.lengths), np.log(reach + 1))

    def _reach(self, model: Model, inputs: Mapping[str, Any], length: int) -> Floats:
        rows = tuple(range(length - self.rows, length))
        capture = Capture(distance="euclidean", queries=rows, stacks=("text",))
        found = forward(model, cut(inputs, length), capture, "text")
        weighted, total = row_sums(found["distance"]), row_sums(found["distance_mass"])
        return on_grid(weighted / total.where(total > 0), model, "text")


def slope(x: Floats, y: Floats) -> Floats:
    """Least-squares slope of ``y [point, ...]`` on ``x [point]``."""
    centred = x - x.mean()
    return np.tensordot(centred, y - y.mean(0), 1) / (centred**2).sum()
