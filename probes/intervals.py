"""Bootstrap intervals that resample whole units (images, documents), for any figure that is a function of sums.

Captions of one image and questions about one image are not independent: what is drawn with replacement is the image, with
everything that belongs to it. Intervals are percentile intervals (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probes.samples import ProbeError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""How often each unit was drawn, ``[resample, unit]``, to the figures ``[resample, figure]``; NaN where undefined."""

RESAMPLES = 2000
LEVEL = 0.95
BLOCK = 2**21  # Numbers in one temporary array: 16 MB.


class Estimate(NamedTuple):
    """A figure with its interval.

    Attributes:
        value: on all of the data; NaN where its denominator is 0.
        low: lower end; NaN where there are fewer than two units, or no resample has a value.
        high: upper end, likewise.
        n: what the value is out of: its denominator, or the number of values of a mean.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"


class Resampled(NamedTuple):
    """Several figures of the same resamples: each array ``[figure]``."""

    value: Floats
    low: Floats
    high: Floats

    def estimate(self, figure: int, n: int) -> Estimate:
        """One of them."""
        return Estimate(float(self.value[figure]), float(self.low[figure]), float(self.high[figure]), n)


def bootstrap(
    statistic: Statistic,
    n_units: int,
    *,
    n_resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    width: int | None = None,
) -> Resampled:
    """Percentile intervals of ``statistic`` over draws of ``n_units`` units with replacement.

    Resamples in which a figure is NaN (nothing to divide by) do not count for that figure.

    Args:
        statistic: see :data:`Statistic`; the value is its answer to all ones.
        n_units: how many there are.
        n_resamples: draws.
        level: of the interval, in (0, 1).
        seed: the same seed and number of units give the same draws, so two statistics of the same units are paired.
        width: numbers that ``statistic`` needs in one temporary array for one resample, if more than ``n_units``.

    Raises:
        ProbeError: ``level`` or ``n_resamples`` out of range, no units.
    """
    if not 0 < level < 1:
        raise ProbeError(f"level must lie between 0 and 1, got {level}")
    if n_resamples < 1 or n_units < 0:
        raise ProbeError(f"n_resamples must be at least 1 and n_units at least 0, got {n_resamples} and {n_units}")
    value = statistic(np.ones((1, n_units)))[0]
    if n_units < 2:
        nothing = np.full(value.shape, np.nan)
        return Resampled(value, nothing, nothing)
    rows = max(1, BLOCK // max(n_units, width or 0))
    drawn = np.concatenate([statistic(w) for w in _draws(n_units, n_resamples, seed, rows)])
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    for k in range(len(value)):
        there = drawn[:, k][~np.isnan(drawn[:, k])]
        if there.size and not np.isnan(value[k]):
            low[k], high[k] = np.quantile(there, tails)
    return Resampled(value, low, high)


def _draws(n_units: int, n_resamples: int, seed: int, rows: int) -> Iterator[Floats]:
    """Blocks of how often each unit was drawn; the draws do not depend on the size of the blocks."""
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples, rows):
        count = min(rows, n_resamples - start)
        drawn = rng.integers(n_units, size=(count, n_units))
        flat = drawn + np.arange(count)[:, None] * n_units
        yield np.bincount(flat.ravel(), minlength=count * n_units).reshape(count, n_units).astype(np.float64)


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Floats:
    """``numerator / denominator``, NaN where the denominator is 0."""
    a, b = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)


def ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    units: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """sum(numerator) / sum(denominator) of values ``[value]``; n is the sum of the denominator.

    Args:
        numerator: one a value.
        denominator: one a value.
        units: the image each value belongs to; None is one unit a value.
        n_resamples: see :func:`bootstrap`, as are ``level`` and ``seed``.
    """
    a, b = _values("numerator", numerator), _values("denominator", denominator)
    if a.shape != b.shape:
        raise ProbeError(f"numerator and denominator must have the same length, got {a.size} and {b.size}")
    _, sums = sums_by_unit(np.stack([a, b], axis=1), units)
    found = bootstrap(lambda w: _ratio_of(w @ sums), len(sums), n_resamples=n_resamples, level=level, seed=seed)
    return found.estimate(0, round(float(b.sum())))


def mean_interval(
    values: ArrayLike,
    units: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Mean of values ``[value]`` (booleans: a rate); NaNs do not count, and n is how many do."""
    x = _values("values", values)
    there = ~np.isnan(x)
    return ratio_interval(np.where(there, x, 0.0), there, units, n_resamples=n_resamples, level=level, seed=seed)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    units: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Mean of ``a - b`` over pairs ``[value]``; pairs with a NaN do not count. Arguments as :func:`mean_interval`.

    Raises:
        ProbeError: different lengths.
    """
    x, y = _values("a", a), _values("b", b)
    if x.shape != y.shape:
        raise ProbeError(f"a and b must be pairs, got {x.size} and {y.size} values")
    return mean_interval(x - y, units, n_resamples=n_resamples, level=level, seed=seed)


def sums_by_unit(columns: Floats, units: Sequence[Hashable] | None) -> tuple[list[Hashable], Floats]:
    """Units in order of appearance, and the sums ``[unit, column]`` of rows ``[value, column]`` that belong to each."""
    if units is None:
        return list(range(len(columns))), columns
    names, index = unit_index(units)
    if len(index) != len(columns):
        raise ProbeError(f"units must have one entry a value, got {len(index)} for {len(columns)} values")
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, index, columns)
    return names, sums


def unit_index(units: Sequence[Hashable]) -> tuple[list[Hashable], NDArray[np.int64]]:
    """Units in order of appearance, and the number of each value's unit ``[value]``."""
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(unit, len(numbers)) for unit in units], dtype=np.int64)
    return list(numbers), index


def _ratio_of(sums: Floats) -> Floats:
    return ratio(sums[:, :1], sums[:, 1:])


def _values(name: str, values: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ProbeError(f"{name} must be one number a value, [value], got an array {list(x.shape)}")
    return x
