"""Effective number of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from interp.analysis.entropy import Entropy, largest_entropy
from interp.analysis.running import Floats, forward, on_grid
from interp.models.anatomy import anatomy
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class EffectiveKeys(Entropy):
    """Effective number of keys: the exponential of attention entropy (Hill 1973, https://doi.org/10.2307/1934352, order 1).

    Formula: mean over rows of ``exp(H_i)``, ``H_i = -sum_j A_ij ln A_ij``: n for a row spread evenly over n keys, 1 for one key.
    Unlike the exponential of the mean entropy it is not moved by a few sharp rows. Linear in length.

    Unit: keys. Args: as for ``entropy``; ``normalise`` divides by the number of visible keys.
    Probe: ``Passages``, or an iterable of inputs. Control: the same tokens in a random order.
    When not to use: for models with a learned sink logit, whose rows sum to less than 1, the number is too small.
    """

    name: ClassVar[str] = "effective_keys"
    summary: ClassVar[str] = "how many keys a row looks at (exponential of its entropy)"
    paper: ClassVar[str] = "Hill 1973, https://doi.org/10.2307/1934352"
    unit: ClassVar[str] = "keys"

    @property
    def result_unit(self) -> str:
        return "fraction of the visible keys" if self.normalise else self.unit

    def mean(self, model: Model, inputs: Mapping[str, Any]) -> Floats:
        data = forward(model, inputs, Capture(row_stats=True, stacks=(self.stack,)), self.stack)
        keys = xr.apply_ufunc(np.exp, data["entropy"])
        if self.normalise:
            causal = all(site.causal for site in anatomy(model.module).stacks[self.stack])
            keys = keys / xr.apply_ufunc(np.exp, largest_entropy(data, causal))
        return on_grid(keys.mean("query", skipna=True), model, self.stack)
