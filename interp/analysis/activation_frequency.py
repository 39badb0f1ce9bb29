"""How often a retrieval head is active, and whether that depends on the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from interp.analysis.retrieval import Retrieval
from interp.analysis.running import AnalysisError, Floats
from interp.analysis.sink import above
from interp.models.model import Model


@dataclass(frozen=True)
class ActivationFrequency(Retrieval):
    """Activation frequency of Wu et al. 2025, https://arxiv.org/abs/2404.15574, section 3.

    Formula: share of samples in which the head copies at least one of the needle's tokens (retrieval score above 0).

    Unit: fraction of samples. Settings, probe, control and gate are those of ``retrieval``; ``by_context`` splits it.
    When not to use: with few samples, 1.0 is soon reached; look at the number of samples beside it.
    """

    name: ClassVar[str] = "activation_frequency"
    summary: ClassVar[str] = "share of samples in which a head copies any token of a hidden fact"
    unit: ClassVar[str] = "fraction of samples"

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        value, null = super().values(model, sample, probe)
        return above(value, 0.0), None if null is None else above(null, 0.0)


def by_context(score: xr.Dataset, by: str = "length") -> xr.Dataset:
    """A retrieval score or activation frequency split by what its prompts have in common.

    The paper calls retrieval heads *intrinsic* (the same ones in every context) and *dynamically activated* (each in some contexts).

    Args:
        score: of ``retrieval`` or ``activation_frequency``, samples kept.
        by: a coordinate of its samples: ``"length"`` or ``"depth"``.

    Returns:
        ``value (context, layer, head)``, ``n (context)`` samples that count, ``frequency`` (share of samples above 0), ``null``
        likewise where there is one; ``agreement (context, other)`` Spearman's rho over heads of two contexts' values (intrinsic:
        near 1), ``dynamic``: of the heads active in some sample, the share that is not active in every one.

    Raises:
        AnalysisError: no samples kept, or no such coordinate.
    """
    if "value_by_sample" not in score or by not in score.coords or score[by].dims != ("sample",):
        have = [str(c) for c in score.coords if score[c].dims == ("sample",)]
        raise AnalysisError(f"by must be a coordinate of the samples, one of {have}, got {by!r}")
    samples = score["value_by_sample"].transpose("sample", "layer", "head").values
    labels = score[by].values
    contexts = np.unique(labels)
    groups = [np.flatnonzero(labels == c) for c in contexts]

    def split(array: Floats) -> Floats:
        return np.stack([_mean(array[at]) for at in groups])

    value, frequency = split(samples), split(above(samples, 0.0))
    active = above(samples, 0.0)
    counted = np.asarray(np.isfinite(samples).any(axis=(1, 2)))
    ever: Floats = _mean(active)
    sometimes: Floats = np.extract(ever > 0, ever)
    agreement = np.array([[_spearman(a, b) for b in value] for a in value])
    out = xr.Dataset(
        {
            "value": (("context", "layer", "head"), value),
            "frequency": (("context", "layer", "head"), frequency),
            "n": ("context", [int(counted[at].sum()) for at in groups]),
            "agreement": (("context", "other"), agreement),
            "dynamic": float(np.mean(sometimes < 1)) if sometimes.size else float("nan"),
        },
        coords={"context": contexts, "other": contexts, "layer": score["layer"].values, "head": score["head"].values},
        attrs={"by": by, "name": score.attrs.get("name", ""), "unit": score.attrs.get("unit", "")},
    )
    if "null_by_sample" in score:
        null = score["null_by_sample"].transpose("sample", "layer", "head").values
        out["null"] = (("context", "layer", "head"), split(null))
    return out


def _mean(array: Floats) -> Floats:
    there = ~np.isnan(array)
    with np.errstate(invalid="ignore"):
        return np.where(there, array, 0).sum(0) / there.sum(0)


def _spearman(a: Floats, b: Floats) -> float:
    import pandas as pd

    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 2 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return np.nan
    x, y = (pd.Series(v[both]).rank().to_numpy() for v in (a, b))
    return float(np.corrcoef(x, y)[0, 1])
