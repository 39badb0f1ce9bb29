"""What every module about scores shares: the dims, the summary over samples, and access with errors that explain."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HEAD_DIMS = ("layer", "head")
SAMPLE_DIMS = ("sample", *HEAD_DIMS)


class ScoreError(ValueError):
    """A Dataset that is no score, or scores that do not go together."""


class Summary(NamedTuple):
    """Mean, standard error of the mean and count of samples, each ``[layer, head]``."""

    value: Floats
    se: Floats
    n: NDArray[np.int64]


def summarise(samples: Floats) -> Summary:
    """Mean over axis 0 without NaN; se = sd / sqrt(n) with n - 1 in the variance, NaN for n < 2.

    Args:
        samples: ``[sample, layer, head]``.
    """
    there = ~np.isnan(samples)
    n = there.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, samples, 0.0).sum(axis=0) / n
        squares = np.where(there, (samples - mean) ** 2, 0.0).sum(axis=0)
        se = np.where(n > 1, np.sqrt(squares / (n - 1) / n), np.nan)
    return Summary(mean, se, n)


def values_of(score: xr.Dataset, by: str) -> xr.DataArray:
    """The variable ``by (layer, head)`` of a score, or ``"difference"``: value - null.

    Raises:
        ScoreError: the Dataset has no such variable, or several scores are stacked in it.
    """
    if not isinstance(score, xr.Dataset) or ("value" not in score and by not in score):
        raise ScoreError("expected a score, a Dataset with the variable 'value' (layer, head), as make_score gives")
    if "score" in score.dims:
        names = ", ".join(map(str, score["score"].values)) if "score" in score.coords else "several"
        raise ScoreError(f"several scores are stacked here ({names}): select one, as in scores.sel(score=...)")
    if by == "difference" and by not in score and "null" in score:
        return (score["value"] - score["null"]).transpose(*HEAD_DIMS)
    if by not in score or set(score[by].dims) != set(HEAD_DIMS):
        usable = [str(name) for name, array in score.data_vars.items() if set(array.dims) == set(HEAD_DIMS)]
        raise ScoreError(f"by must be one of {usable} (or 'difference' where there is a null), got {by!r}")
    return score[by].transpose(*HEAD_DIMS)


def metadata(score: xr.Dataset, key: str) -> Any:
    """An attribute of a score, or of the one selected from a stack of scores."""
    if key in score.attrs:
        return score.attrs[key]
    coordinate = {"name": "score"}.get(key, key)
    if coordinate in score.coords and score[coordinate].ndim == 0:
        return score[coordinate].item()
    return "text" if key == "stack" else ""
