"""Rank correlation of two scores over heads within layers, with intervals by sample and by head, and permutation tests.

Depth alone makes many scores agree, and scales differ between layers: ranks are taken within each layer and the layer's mean
rank is taken off, so that only the order of heads of one layer counts. All arrays end in ``[layer, head]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def centred_ranks(values: Floats) -> Floats:
    """Ranks among the heads of a layer, ties at their mean rank, minus the layer's mean rank; ``[..., layer, head]``.

    Raises:
        ValueError: a value is NaN.
    """
    if np.isnan(values).any():
        raise ValueError(f"values must not be NaN, got {int(np.isnan(values).sum())} of {values.size}")
    one, other = values[..., :, None], values[..., None, :]
    # Below minus above: of average ranks, the centred one is half of it.
    return ((one > other).sum(-1) - (one < other).sum(-1)) / 2.0


def correlation(a: Floats, b: Floats, given: Floats | None = None) -> Floats:
    """Correlation ``[...]`` of centred ranks over all heads; NaN where one of them has no order.

    Args:
        a, b: ``[..., layer, head]``, broadcast against each other.
        given: a third score whose share in both is taken off: the partial correlation.
    """
    x, y = centred_ranks(a), centred_ranks(b)
    if given is None:
        return _pearson(x, y)
    z = centred_ranks(given)
    xy, xz, yz = _pearson(x, y), _pearson(x, z), _pearson(y, z)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))


def _pearson(x: Floats, y: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum((-1, -2)) / np.sqrt((x**2).sum((-1, -2)) * (y**2).sum((-1, -2)))


def draws_of_samples(n: int, resamples: int, seed: int) -> Floats:
    """Weights ``[resample, sample]`` of as many bootstrap draws, each row's sum 1."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n


def resampled(values: Floats, weights: Floats) -> Floats:
    """Means ``[resample, layer, head]`` of ``[sample, layer, head]``."""
    return (weights @ values.reshape(len(values), -1)).reshape(len(weights), *values.shape[1:])


def by_heads(scores: Sequence[Floats], resamples: int, seed: int) -> list[Floats]:
    """The scores ``[layer, head]`` with the heads of each layer drawn with replacement, the same for all: ``[resample, layer, head]``."""
    layers, heads = scores[0].shape
    index = np.random.default_rng(seed).integers(heads, size=(resamples, layers, heads))
    return [np.take_along_axis(np.broadcast_to(s, index.shape), index, -1) for s in scores]


def shuffled(values: Floats, permutations: int, seed: int) -> Floats:
    """``[permutation, layer, head]``: the heads of each layer in random orders."""
    many = np.broadcast_to(values, (permutations, *values.shape))
    return np.random.default_rng(seed).permuted(many, axis=-1)


def reliability(values: Floats, splits: int = 200, seed: int = 0) -> float:
    """Of the order that the mean of ``[sample, layer, head]`` gives: random halves' correlation, stepped up by Spearman and Brown.

    Raises:
        ValueError: fewer than 4 samples.
    """
    if len(values) < 4:
        raise ValueError(f"values must have at least 4 samples, got {len(values)}")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = rng.permutation(len(values))
        halves = [values[part].mean(0) for part in np.array_split(order, 2)]
        found.append(correlation(*halves))
    rho = float(np.mean(found))
    return 2 * rho / (1 + rho)


def interval(draws: Floats, level: float = 0.95) -> list[float]:
    """Percentile interval of the last axis; draws without a value are left out."""
    tail = 50 * (1 - level)
    return [float(v) for v in np.nanpercentile(draws, [tail, 100 - tail])]
