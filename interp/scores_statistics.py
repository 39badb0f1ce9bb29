"""Statistics of scores: paired tests, corrections for many heads, bootstrap intervals, rank agreement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike

from interp.scores_base import (
    HEAD_DIMS,
    SAMPLE_DIMS,
    Floats,
    ScoreError,
    Summary,
    metadata,
    summarise,
    values_of,
)
from interp.scores_student import t_p_value, t_quantile

Correction = Literal["holm", "benjamini-hochberg", "none"]
BLOCK = 2**22  # Numbers in one temporary array of a resampling: 32 MB.


def paired_test(
    a: xr.Dataset,
    b: xr.Dataset | None = None,
    *,
    correction: Correction = "holm",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> xr.Dataset:
    """Does ``a`` differ from ``b``, head by head? Two-sided tests of the mean of the paired differences against 0.

    The t test supposes normal differences. The sign-flip permutation test supposes only that they are symmetric around
    0 without an effect: it counts the sign assignments whose mean is at least as far from 0 as the observed one, all
    2^n of them where that is at most ``n_permutations``, else a random draw, with
    p = (1 + count) / (1 + n_permutations).

    Args:
        a: a score with ``value_by_sample``.
        b: another score of the same samples and stack; None is ``a``'s own control (``null_by_sample``).
        correction: over all heads that have a p value, see :func:`adjust_p_values`.
        n_permutations: largest number of sign assignments.
        seed: of the random draw.

    Returns:
        ``(layer, head)``: ``difference`` (mean of a - b), ``se``, ``n`` (pairs without NaN), ``t``, ``p_t``,
        ``p_permutation``, ``p_t_adjusted``, ``p_permutation_adjusted``. p_t is NaN for n < 2, both for n = 0. Where all
        differences are equal, t is infinite, or 0 (p = 1) if they are all 0.

    Raises:
        ScoreError: no samples were kept, or the samples or stacks do not match.
    """
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be at least 1, got {n_permutations}")
    first = samples_of(a, "value_by_sample")
    second = samples_of(a, "null_by_sample") if b is None else samples_of(b, "value_by_sample")
    if b is not None and metadata(a, "stack") != metadata(b, "stack"):
        raise ScoreError(f"scores must be of one stack, got {metadata(a, 'stack')!r} and {metadata(b, 'stack')!r}")
    if not _are_paired(first, second):
        raise ScoreError(
            f"scores must be of the same samples, got {first.sizes['sample']} and {second.sizes['sample']}"
            " samples, or other labels"
        )
    first, second = xr.align(first, second, join="inner", exclude={"sample"})
    if 0 in (first.sizes["layer"], first.sizes["head"]):
        raise ScoreError("scores must have heads in common, got none")
    differences = first.values - second.values
    mean, se, n = summarise(differences)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where((mean == 0) & (se == 0), 0.0, mean / se)
    p_t = t_p_value(t, n - 1)
    p_permutation = _sign_flip(differences, n_permutations, seed)
    variables = {
        "difference": mean,
        "se": se,
        "n": n,
        "t": t,
        "p_t": p_t,
        "p_permutation": p_permutation,
        "p_t_adjusted": adjust_p_values(p_t, correction),
        "p_permutation_adjusted": adjust_p_values(p_permutation, correction),
    }
    names = [metadata(a, "name"), f"the control of {metadata(a, 'name')}" if b is None else metadata(b, "name")]
    return xr.Dataset(
        {name: (HEAD_DIMS, values) for name, values in variables.items()},
        coords={dim: first[dim] for dim in HEAD_DIMS if dim in first.coords},
        attrs={
            "name": f"{names[0]} - {names[1]}",
            "stack": metadata(a, "stack"),
            "correction": correction,
            "n_permutations": n_permutations,
            "seed": seed,
        },
    )


def adjust_p_values(p: ArrayLike, method: Correction = "holm") -> Floats:
    """Correct p values for their number; NaNs are not counted and stay.

    Args:
        p: any shape.
        method: ``"holm"`` (Holm 1979: bounds the chance of any false positive), ``"benjamini-hochberg"`` (1995: bounds
            the expected share of false positives, for independent or positively dependent tests) or ``"none"``.

    Raises:
        ValueError: an unknown method, or a p outside [0, 1].
    """
    if method not in get_args(Correction):
        raise ValueError(f"correction must be one of {get_args(Correction)}, got {method!r}")
    values = np.asarray(p, dtype=np.float64)
    out = values.copy()
    there = ~np.isnan(values)
    known = values[there]
    if known.size and (known.min() < 0 or known.max() > 1):
        raise ValueError(f"p must lie in [0, 1], got values in [{known.min()}, {known.max()}]")
    if method == "none" or not known.size:
        return out
    order = np.argsort(known, kind="stable")
    rank = np.arange(1, known.size + 1)
    adjusted = np.empty_like(known)
    if method == "holm":
        adjusted[order] = np.maximum.accumulate(known[order] * (known.size - rank + 1))
    else:
        adjusted[order] = np.minimum.accumulate((known[order] * known.size / rank)[::-1])[::-1]
    out[there] = np.minimum(adjusted, 1.0)
    return out


def bootstrap_ci(score: xr.Dataset, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> xr.Dataset:
    """The score with ``ci_low`` and ``ci_high (layer, head)``: percentile bootstrap over samples.

    All heads share each resample of the samples. NaN where a head has fewer than two samples. With fewer than about 20
    samples percentile intervals are too narrow.

    Raises:
        ScoreError: no samples were kept.
    """
    _check_level(level, n_resamples)
    samples = samples_of(score, "value_by_sample")
    flat = samples.values.reshape(samples.sizes["sample"], -1)
    counts = _resample_counts(flat.shape[0], n_resamples, seed)
    tail = (1 - level) / 2
    interval = np.full((2, flat.shape[1]), np.nan)
    for columns in _blocks(flat.shape[1], n_resamples):
        interval[:, columns] = _quantiles(_resampled_means(flat[:, columns], counts), [tail, 1 - tail])
    interval[:, (~np.isnan(flat)).sum(axis=0) < 2] = np.nan
    low, high = interval.reshape(2, *samples.shape[1:])
    out = score.assign(ci_low=(HEAD_DIMS, low), ci_high=(HEAD_DIMS, high))
    out.attrs["ci"] = {"method": "percentile bootstrap", "level": level, "n_resamples": n_resamples, "seed": seed}
    return out


class RankAgreement(NamedTuple):
    """Spearman's rho of two scores over the ``n`` heads that both have, and its bootstrap interval."""

    rho: float
    ci_low: float
    ci_high: float
    n: int


def rank_agreement(
    a: xr.Dataset,
    b: xr.Dataset,
    *,
    over: Literal["heads", "samples"] = "heads",
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> RankAgreement:
    """Spearman's rank correlation of two scores over heads (ties take their mean rank), with a percentile interval.

    Args:
        a, b: scores of one stack.
        over: what is resampled. ``"heads"``: how far would rho move with other heads of this kind; ``"samples"``: how
            far is it blurred by the finite number of samples (needs ``value_by_sample``; scores of the same samples are
            resampled together).

    Returns:
        NaNs where fewer than two heads are shared, or all values of one score are equal.

    Raises:
        ScoreError: different stacks, or no samples where they are needed.
    """
    _check_level(level, n_resamples)
    if over not in ("heads", "samples"):
        raise ValueError(f"over must be 'heads' or 'samples', got {over!r}")
    if metadata(a, "stack") != metadata(b, "stack"):
        raise ScoreError(f"scores must be of one stack, got {metadata(a, 'stack')!r} and {metadata(b, 'stack')!r}")
    x, y = (array.values.ravel() for array in xr.align(values_of(a, "value"), values_of(b, "value"), join="inner"))
    shared = ~(np.isnan(x) | np.isnan(y))
    n = int(shared.sum())
    if n < 2:
        return RankAgreement(np.nan, np.nan, np.nan, n)
    rho = float(spearman(x[None, shared], y[None, shared])[0])
    tail = (1 - level) / 2
    rng = np.random.default_rng(seed)
    if over == "heads":
        draws = [
            spearman(x[shared][index], y[shared][index])
            for rows in _blocks(n_resamples, n)
            for index in [rng.integers(n, size=(rows.stop - rows.start, n))]
        ]
        resampled = np.concatenate(draws)
    else:
        first, second = (samples_of(score, "value_by_sample") for score in (a, b))
        paired = _are_paired(first, second)
        first, second = xr.align(first, second, join="inner", exclude={"sample"})
        flat = [s.values.reshape(s.sizes["sample"], -1)[:, shared] for s in (first, second)]
        counts = [_resample_counts(f.shape[0], n_resamples, seed if paired else seed + i) for i, f in enumerate(flat)]
        resampled = spearman(*(_resampled_means(f, c) for f, c in zip(flat, counts, strict=True)))
    low, high = _quantiles(resampled[:, None], [tail, 1 - tail])[:, 0]
    return RankAgreement(rho, float(low), float(high), n)


def t_interval(summary: Summary, level: float) -> tuple[Floats, Floats]:
    """``value -+ t * se`` with Student's t of n - 1 degrees of freedom; NaN for n < 2."""
    _check_level(level, 1)
    width = np.full(summary.se.shape, np.nan)
    for n in np.unique(summary.n[summary.n > 1]):
        here = summary.n == n
        width[here] = t_quantile((1 + level) / 2, int(n) - 1) * summary.se[here]
    return summary.value - width, summary.value + width


def _sign_flip(differences: Floats, n_permutations: int, seed: int) -> Floats:
    n_samples, *shape = differences.shape
    flat = differences.reshape(n_samples, -1)
    there = ~np.isnan(flat)
    # A pair that is missing takes part as 0: whatever its sign, it moves no sum.
    flat = np.where(there, flat, 0.0)
    # Sums of the same numbers in another order differ by rounding; they count as equal.
    limit = np.abs(flat.sum(axis=0)) - 1e-12 * np.abs(flat).sum(axis=0)
    exact = n_samples < 63 and 2**n_samples <= n_permutations
    total = 2**n_samples if exact else n_permutations
    rng = np.random.default_rng(seed)
    count = np.zeros(flat.shape[1], dtype=np.int64)
    for rows in _blocks(total, max(flat.shape)):
        if exact:
            bits = np.arange(rows.start, rows.stop)[:, None] >> np.arange(n_samples) & 1
        else:
            bits = rng.integers(0, 2, size=(rows.stop - rows.start, n_samples))
        count += (np.abs((1.0 - 2.0 * bits) @ flat) >= limit).sum(axis=0)
    p = count / total if exact else (1 + count) / (1 + total)
    return np.where(there.any(axis=0), p, np.nan).reshape(shape)


def spearman(x: Floats, y: Floats) -> Floats:
    """Row by row, ``[resample, head]``; heads missing in either are left out of their row."""
    missing = np.isnan(x) | np.isnan(y)
    ranks = [pd.DataFrame(np.where(missing, np.nan, v)).rank(axis=1).to_numpy() for v in (x, y)]
    n = (~missing).sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = [np.where(missing, 0.0, r - np.nansum(r, axis=1, keepdims=True) / n) for r in ranks]
        products = (centred[0] * centred[1]).sum(axis=1)
        return products / np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))


def _resample_counts(n: int, n_resamples: int, seed: int) -> Floats:
    """How often each sample is drawn, ``[resample, sample]``."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / max(n, 1)), size=n_resamples).astype(np.float64)


def _resampled_means(flat: Floats, counts: Floats) -> Floats:
    there = ~np.isnan(flat)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts @ np.where(there, flat, 0.0)) / (counts @ there.astype(np.float64))


def _quantiles(values: Floats, at: list[float]) -> Floats:
    """Quantiles over axis 0 of ``[resample, column]``, NaN left out; NaN for a column without any number."""
    out = np.full((len(at), values.shape[1]), np.nan)
    some = ~np.isnan(values).all(axis=0)
    if some.any():
        out[:, some] = np.nanquantile(values[:, some], at, axis=0)
    return out


def _blocks(total: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, width))
    for start in range(0, total, step):
        yield slice(start, min(total, start + step))


def _check_level(level: float, n_resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")


def _are_paired(a: xr.DataArray, b: xr.DataArray) -> bool:
    if a.sizes["sample"] != b.sizes["sample"]:
        return False
    labelled = "sample" in a.coords and "sample" in b.coords
    return not labelled or bool((a["sample"].values == b["sample"].values).all())


def samples_of(score: xr.Dataset, variable: str) -> xr.DataArray:
    """A variable by sample, fp64 ``[sample, layer, head]``.

    Raises:
        ScoreError: it was not kept.
    """
    if variable not in score or "sample" not in score[variable].dims:
        why = {
            "value_by_sample": "make it with keep_samples=True",
            "null_by_sample": "make it with null_by_sample= of the same number of samples",
        }
        raise ScoreError(f"the score {metadata(score, 'name')!r} has no {variable}: {why[variable]}")
    return score[variable].transpose(*SAMPLE_DIMS).astype(np.float64)
