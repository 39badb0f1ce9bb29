"""Token-selection margin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from interp.analysis.entropy import Entropy
from interp.analysis.running import AnalysisError, Floats, forward, on_grid
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class SelectionMargin(Entropy):
    """Token-selection margin, after Tarzanagh et al. 2023, https://arxiv.org/abs/2306.13596 (attention as a max-margin selector).

    Formula: mean over rows of ``ln A_i(1) - ln A_i(2)``, the two largest weights: the difference of their scores, which is the margin by
    which the selected token wins. Rows whose second key has no weight (a single key, or one out of fp32's range) are left out. From
    ``topk``, linear in length.

    Unit: nats (logits of attention). Args: ``stack``, ``shuffle_seed`` as for ``entropy``.
    Probe: ``Passages``, or an iterable of inputs. Control: the same tokens in a random order.
    When not to use: as the SVM's margin itself, which is over a training set; a head with two equal sinks has margin 0.
    """

    name: ClassVar[str] = "selection_margin"
    summary: ClassVar[str] = "by how much a row's first key beats its second (difference of scores)"
    paper: ClassVar[str] = "Tarzanagh et al. 2023, https://arxiv.org/abs/2306.13596"
    unit: ClassVar[str] = "nats"

    def __post_init__(self) -> None:
        if self.normalise:
            raise AnalysisError("normalise must be False: selection_margin has no largest value")

    def mean(self, model: Model, inputs: Mapping[str, Any]) -> Floats:
        weights = forward(model, inputs, Capture(topk=2, stacks=(self.stack,)), self.stack)["topk_weight"]
        second = weights.isel(k=1)
        logs = xr.apply_ufunc(np.log, weights.where(second > 0))
        return on_grid((logs.isel(k=0) - logs.isel(k=1)).mean("query", skipna=True), model, self.stack)
