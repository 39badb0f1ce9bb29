"""Top-K concentration of attention rows."""

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

MAX_STREAMED = 8


@dataclass(frozen=True)
class TopKMass(Entropy):
    """Top-K concentration, Zhang et al. 2024 (ACMIL), https://arxiv.org/abs/2311.07125.

    Formula: ``T_K(i) = sum of the K largest A_ij``; value = mean over rows that see more than K keys (others have all of their mass
    there). Up to K = 8 it comes from ``topk``, linear in length; beyond, from exact rows of the last ``rows`` positions.

    Unit: fraction of row mass. ACMIL takes the attention of a slide's only row; its "top 10 take over 85 %" is of that.

    Args:
        stack: which heads.
        shuffle_seed: of the control.
        k: K; 10 in the paper.
        rows: how many of the last rows are read exactly where ``k > 8``.

    Probe: ``Passages``, or an iterable of inputs. Control: the same tokens in a random order.
    When not to use: to compare samples of different length; ``normalise`` of entropy is refused.
    """

    name: ClassVar[str] = "top_k_mass"
    summary: ClassVar[str] = "share of a row's attention on its K largest keys"
    paper: ClassVar[str] = "Zhang et al. 2024, https://arxiv.org/abs/2311.07125"
    unit: ClassVar[str] = "fraction of row mass"

    k: int = 8
    rows: int = 64

    def __post_init__(self) -> None:
        if self.k < 1 or self.rows < 1:
            raise AnalysisError(f"k and rows must be at least 1, got k={self.k}, rows={self.rows}")
        if self.normalise:
            raise AnalysisError("normalise must be False: top_k_mass is a share already")

    def mean(self, model: Model, inputs: Mapping[str, Any]) -> Floats:
        if self.k <= MAX_STREAMED:
            data = forward(model, inputs, Capture(topk=self.k, stacks=(self.stack,)), self.stack)
            mass = data["topk_weight"].sum("k", skipna=False)
            seen = _visible(data, model, self.stack)
            return on_grid(mass.where(seen > self.k).mean("query", skipna=True), model, self.stack)
        data = forward(model, inputs, Capture(rows=tuple(range(-self.rows, 0)), stacks=(self.stack,)), self.stack)
        weights = data["row_attention"].transpose(..., "key")
        largest = np.sort(weights.values, axis=-1)[..., -self.k :].sum(-1)
        mass = xr.DataArray(largest, dims=weights.dims[:-1], coords={n: weights[n] for n in ("layer", "head")})
        seen = xr.DataArray(np.asarray(data["row"].values) + 1, dims="row")
        return on_grid(mass.where(seen > self.k).mean("row", skipna=True), model, self.stack)


def _visible(data: xr.Dataset, model: Model, stack: str) -> xr.DataArray:
    """Keys that each row sees, ``[sample, query]``; a sliding window is not looked at."""
    from interp.models.anatomy import anatomy

    if not all(site.causal for site in anatomy(model.module).stacks[stack]):
        return xr.zeros_like(data["query"]) + data.sizes["query"]
    return data["position_in_sample"] + 1 if "position_in_sample" in data else data["query"] + 1
