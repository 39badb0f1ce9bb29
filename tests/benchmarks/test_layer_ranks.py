"""Rank correlation within layers, against values worked out by hand and against pandas."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from _layer_ranks import (
    by_heads,
    centred_ranks,
    correlation,
    draws_of_samples,
    interval,
    reliability,
    resampled,
    shuffled,
)


def test_ranks_are_centred_in_each_layer_and_ties_share_theirs() -> None:
    ranks = centred_ranks(np.array([[10.0, 30.0, 20.0], [5.0, 5.0, 1.0]]))
    assert ranks.tolist() == [[-1, 1, 0], [0.5, 0.5, -1]]


def test_what_differs_between_layers_does_not_count() -> None:
    a = np.array([[1.0, 2.0, 3.0], [101.0, 102.0, 103.0]])
    b = np.array([[3.0, 2.0, 1.0], [303.0, 302.0, 301.0]])
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99
    assert correlation(a, b) == -1


def test_one_layer_is_spearman() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 1, 12)).astype(float)
    assert correlation(a, b) == pytest.approx(pd.Series(a[0]).corr(pd.Series(b[0]), method="spearman"), abs=1e-12)


def test_the_partial_correlation_is_that_of_the_residuals() -> None:
    rng = np.random.default_rng(1)
    a, b, c = rng.normal(size=(3, 4, 6))
    x, y, z = (centred_ranks(v).ravel() for v in (a, b, c))
    left = [v - z * (v @ z) / (z @ z) for v in (x, y)]
    assert correlation(a, b, c) == pytest.approx(np.corrcoef(left[0], left[1])[0, 1], abs=1e-12)


def test_draws_keep_samples_and_heads_together() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(9, 3, 5))
    weights = draws_of_samples(9, 40, 0)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(correlation(resampled(a, weights), resampled(3 * a, weights)), 1)
    one, two = by_heads((a[0], -a[0]), 40, 0)
    assert (one == -two).all() and set(one[0, 1]) <= set(a[0, 1])
    mixed = shuffled(a[0], 40, 0)
    assert (np.sort(mixed, -1) == np.sort(a[0], -1)).all() and not (mixed == a[0]).all()


def test_reliability_is_near_one_without_noise_and_near_zero_in_noise() -> None:
    rng = np.random.default_rng(3)
    heads = rng.normal(size=(1, 8, 8))
    assert reliability(heads + 1e-3 * rng.normal(size=(40, 8, 8))) > 0.99
    assert abs(reliability(rng.normal(size=(40, 8, 8)))) < 0.4


def test_permutations_of_an_unrelated_score_cover_it() -> None:
    rng = np.random.default_rng(4)
    p = []
    for seed in range(60):
        a, b = rng.normal(size=(2, 8, 8))
        null = np.abs(correlation(a, shuffled(b, 200, seed)))
        p.append((1 + (null >= abs(correlation(a, b))).sum()) / 201)
    assert 0.35 < np.mean(p) < 0.65


def test_an_interval_leaves_missing_draws_out() -> None:
    assert interval(np.array([0.0, 1.0, np.nan])) == pytest.approx([0.025, 0.975])


@pytest.mark.parametrize(("call", "words"), [
    (lambda: centred_ranks(np.array([[np.nan, 1.0]])), "must not be NaN, got 1 of 2"),
    (lambda: reliability(np.zeros((3, 2, 2))), "at least 4 samples, got 3"),
])  # fmt: skip
def test_what_cannot_be_ranked_is_refused(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
