"""Statistics that decide what a set of heads shows: matched random sets, max-T, split halves, discovery and confirmation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from interp.heads import Head, Heads
from interp.scores_base import HEAD_DIMS, Floats, ScoreError, metadata, summarise, values_of
from interp.scores_statistics import BLOCK, paired_test, samples_of, spearman


def max_t_test(
    a: xr.Dataset,
    b: xr.Dataset | None = None,
    *,
    alternative: Literal["two-sided", "greater"] = "two-sided",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> xr.Dataset:
    """Does ``a`` differ from ``b`` in any head? Sign-flip max-T over all heads (Westfall and Young 1993): for claims.

    ``t_h = mean(d_h) / se(d_h)`` of the paired differences d; every permutation flips the sign of whole samples, in all heads alike,
    so that the dependence between heads is kept; ``p_h`` is the share of permutations whose largest t over all heads is at least
    t_h. The chance of any false claim is then at most p, with more power than Holm where heads go together. For browsing take
    :func:`interp.scores.paired_test` with ``correction="benjamini-hochberg"``.

    Args:
        a: a score with ``value_by_sample``.
        b: another score of the same samples and stack; None is ``a``'s own control.
        alternative: ``"greater"``: a is larger.
        n_permutations: where all 2^n sign assignments are no more than so many, they are all taken.
        seed: of the draw.

    Returns:
        As :func:`~interp.scores.paired_test`, with ``t`` and ``p_max_t (layer, head)``. NaN where a head has fewer than two pairs, or
        differences that do not vary.

    Raises:
        ScoreError: no samples were kept, or the samples or stacks do not match.
        ValueError: an unknown alternative.
    """
    if alternative not in ("two-sided", "greater"):
        raise ValueError(f"alternative must be 'two-sided' or 'greater', got {alternative!r}")
    tested = paired_test(a, b, correction="none", n_permutations=1, seed=seed)
    first, second = (
        samples_of(a, "value_by_sample"),
        samples_of(a, "null_by_sample") if b is None else samples_of(b, "value_by_sample"),
    )
    first, second = xr.align(first, second, join="inner", exclude={"sample"})
    differences = (first.values - second.values).reshape(first.sizes["sample"], -1)
    usable = (~np.isnan(differences)).sum(0) > 1
    usable &= np.nanstd(np.where(np.isnan(differences), 0.0, differences), axis=0) > 0
    p = np.full(differences.shape[1], np.nan)
    if usable.any():
        p[usable] = _max_t(differences[:, usable], alternative, n_permutations, seed)
    kept = tested[["difference", "se", "n", "t"]]
    out = kept.assign(p_max_t=(HEAD_DIMS, p.reshape(first.shape[1:])))
    out.attrs = {**tested.attrs, "correction": "max-T", "alternative": alternative, "n_permutations": n_permutations}
    return out


def _max_t(differences: Floats, alternative: str, n_permutations: int, seed: int) -> Floats:
    n = len(differences)
    there = ~np.isnan(differences)
    flat, counts = np.where(there, differences, 0.0), there.sum(0)
    squares = (flat**2).sum(0)

    def t_of(sums: Floats) -> Floats:
        # A flip keeps every square, so the standard error follows from the mean alone.
        mean = sums / counts
        variance = np.maximum(squares / counts - mean**2, 0.0) * counts / (counts - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = mean / np.sqrt(variance / counts)
        return np.abs(t) if alternative == "two-sided" else t

    exact = n < 63 and 2**n <= n_permutations
    total = 2**n if exact else n_permutations
    observed = t_of(flat.sum(0))
    rng = np.random.default_rng(seed)
    count = np.zeros(flat.shape[1])
    step = max(1, BLOCK // max(flat.shape))
    for start in range(0, total, step):
        size = min(step, total - start)
        drawn = np.arange(start, start + size)[:, None] >> np.arange(n) & 1 if exact else rng.integers(0, 2, (size, n))
        largest = t_of(((1.0 - 2.0 * drawn) @ flat).astype(np.float64)).max(1)
        # Equal but for rounding counts as equal.
        count += (largest[:, None] >= observed[None] * (1 - 1e-9) - 1e-12).sum(0)
    return count / total if exact else (1 + count) / (1 + total)


def matched_random_sets(
    heads: Heads,
    pool: Any,
    n_sets: int = 100,
    *,
    by: xr.Dataset | None = None,
    bins: int = 4,
    exclude: Heads | None = None,
    seed: int = 0,
) -> list[Heads]:
    """Random sets of heads with as many of each layer as ``heads``, and, with ``by``, of like size (write norm): a fair control.

    Args:
        heads: the set that is claimed to be special.
        pool: what the model has: an anatomy, shapes by stack, or heads.
        n_sets: how many sets.
        by: a score such as ``write_norm``: every head is replaced by one of its layer in the same of ``bins`` equally filled bins of
            this score within the layer. Where the bin holds no other head, any of the layer.
        bins: a layer.
        exclude: heads that no set may have; None is ``heads`` themselves. A layer that has too few others takes what it has,
            then from the excluded.
        seed: of the draw.

    Raises:
        ScoreError: no heads, or fewer than one set or bin.
    """
    if not len(heads) or n_sets < 1 or bins < 1:
        raise ScoreError(f"heads, n_sets and bins must be at least 1, got {len(heads)}, {n_sets}, {bins}")
    everyone = pool if isinstance(pool, Heads) else _all_heads(pool, {h.stack for h in heads})
    heads.check(None)
    missing = [str(h) for h in heads if h not in everyone]
    if missing:
        raise ScoreError(f"heads must be in the pool, and {missing[0]} is not")
    barred = set(heads if exclude is None else exclude)
    bin_of = _bins(everyone, by, bins)
    rng = np.random.default_rng(seed)
    return [_matched(heads, everyone, barred, bin_of, rng) for _ in range(n_sets)]


def _matched(
    heads: Heads, everyone: Heads, barred: set[Head], bin_of: Callable[[Head], int], rng: np.random.Generator
) -> Heads:
    taken: list[Head] = []
    for head in heads:
        layer = [h for h in everyone if (h.stack, h.layer) == (head.stack, head.layer) and h not in taken]
        alike = [h for h in layer if bin_of(h) == bin_of(head) and h not in barred]
        others = alike or [h for h in layer if h not in barred] or layer
        taken.append(others[int(rng.integers(len(others)))])
    return Heads(taken)


def _bins(everyone: Heads, by: xr.Dataset | None, bins: int) -> Callable[[Head], int]:
    if by is None:
        return lambda head: 0
    values, stack = values_of(by, "value"), metadata(by, "stack")
    placed: dict[Head, int] = {}
    for layer in {h.layer for h in everyone if h.stack == stack}:
        mine = [h for h in everyone if h.stack == stack and h.layer == layer]
        sizes = np.array([float(values.sel(layer=h.layer, head=h.head)) for h in mine])
        for place, n in enumerate(np.argsort(sizes, kind="stable")):
            placed[mine[n]] = place * bins // len(mine)
    return lambda head: placed.get(head, 0)


def _all_heads(pool: Any, stacks: set[str]) -> Heads:
    shapes = pool.shapes() if hasattr(pool, "shapes") else pool
    if not isinstance(shapes, dict):
        raise ScoreError(f"pool must be Heads, an Anatomy or shapes by stack, got {type(pool).__name__}")
    return Heads.parse(",".join(f"{stack}.L*H*" for stack in stacks if stack in shapes), shapes)


class SplitHalf(NamedTuple):
    """Reliability of a score's ranking of heads.

    Attributes:
        rho: mean Spearman correlation between two random halves of the samples.
        reliability: of the whole set, by Spearman and Brown: ``2 rho / (1 + rho)``.
        ci_low, ci_high: 2.5 % and 97.5 % of ``reliability`` over splits.
        n_splits: how many.
    """

    rho: float
    reliability: float
    ci_low: float
    ci_high: float
    n_splits: int


def split_half(score: xr.Dataset, *, n_splits: int = 200, seed: int = 0, within_layers: bool = False) -> SplitHalf:
    """How well would the ranking of heads repeat on as many other samples?

    Args:
        score: with ``value_by_sample``, at least 4 samples.
        n_splits: random splits into halves.
        seed: of the splits.
        within_layers: take each layer's mean off first: the depth alone makes many rankings agree.

    Raises:
        ScoreError: too few samples.
    """
    samples = samples_of(score, "value_by_sample")
    n = samples.sizes["sample"]
    if n < 4 or n_splits < 1:
        raise ScoreError(f"split halves need at least 4 samples and one split, got {n} and {n_splits}")
    rng = np.random.default_rng(seed)
    rhos: list[float] = []
    for _ in range(n_splits):
        order = rng.permutation(n)
        halves = [summarise(samples.values[part]).value for part in (order[: n // 2], order[n // 2 :])]
        if within_layers:
            halves = [h - np.nanmean(h, axis=1, keepdims=True) for h in halves]
        rhos.append(float(spearman(halves[0].reshape(1, -1), halves[1].reshape(1, -1))[0]))
    values = np.array(rhos)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = 2 * values / (1 + values)
    low, high = np.nanquantile(whole, [0.025, 0.975]) if not np.isnan(whole).all() else (np.nan, np.nan)
    rho = float(np.nanmean(values)) if not np.isnan(values).all() else np.nan
    return SplitHalf(rho, 2 * rho / (1 + rho), float(low), float(high), n_splits)


class Confirmation(NamedTuple):
    """Heads chosen on one part of the samples, tested on the other.

    Attributes:
        heads: chosen in the discovery part.
        test: their test in the confirmation part, as :func:`max_t_test` gives it, NaN for all other heads.
        discovery, confirmation: numbers of the samples.
    """

    heads: Heads
    test: xr.Dataset
    discovery: tuple[int, ...]
    confirmation: tuple[int, ...]


def discover_and_confirm(
    score: xr.Dataset, k: int, *, share: float = 0.5, alternative: Literal["two-sided", "greater"] = "greater",
    n_permutations: int = 10_000, seed: int = 0,
) -> Confirmation:  # fmt: skip
    """Choose the k top heads on one part of the samples and test these alone on the rest: what is chosen is not also the proof.

    Args:
        score: with ``value_by_sample`` and ``null_by_sample``.
        k: heads chosen, by value - null.
        share: of the samples for discovery.
        alternative, n_permutations: of the test.
        seed: of the split.

    Raises:
        ScoreError: too few samples for either part, or k below 1.
    """
    if k < 1 or not 0 < share < 1:
        raise ScoreError(f"k must be at least 1 and share between 0 and 1, got {k} and {share}")
    value, null = samples_of(score, "value_by_sample"), samples_of(score, "null_by_sample")
    n = value.sizes["sample"]
    first = round(n * share)
    if first < 1 or n - first < 2:
        raise ScoreError(f"discovery needs at least 1 sample and confirmation 2, got {first} and {n - first}")
    order = np.random.default_rng(seed).permutation(n)
    found, rest = np.sort(order[:first]), np.sort(order[first:])
    gain = summarise((value - null).values[found]).value
    scored = score[["value"]].assign(value=(HEAD_DIMS, gain))
    scored.attrs = dict(score.attrs)
    heads: Heads = scored.heads.top(k)
    chosen = np.zeros(gain.shape, dtype=bool)
    for head in heads:
        chosen[list(value["layer"].values).index(head.layer), list(value["head"].values).index(head.head)] = True
    part = score.isel(sample=rest)
    for name in ("value_by_sample", "null_by_sample"):
        part[name] = part[name].transpose("sample", *HEAD_DIMS).where(xr.DataArray(chosen, dims=HEAD_DIMS))
    test = max_t_test(part, alternative=alternative, n_permutations=n_permutations, seed=seed)
    return Confirmation(heads, test, tuple(int(i) for i in found), tuple(int(i) for i in rest))
