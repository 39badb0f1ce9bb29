"""Scores: known answers first, then properties, pictures and files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from interp import scores_files
from interp.heads import Head, Heads
from interp.scores import (
    ScoreError,
    ScoreFileError,
    adjust_p_values,
    bootstrap_ci,
    make_score,
    open_score,
    paired_test,
    rank_agreement,
    read_duo_attention_tsv,
    read_retrieval_head_json,
    save_score,
    stack_scores,
    write_duo_attention_tsv,
    write_retrieval_head_json,
)
from interp.scores_student import t_p_value, t_quantile

NAN = math.nan
LABELS = {"name": "toy", "unit": "nats", "paper": "Nobody 2026"}


def score_of(values: Any, **settings: Any) -> xr.Dataset:
    arguments: dict[str, Any] = LABELS | settings
    return make_score(values, **arguments)


def random_score(n: int = 12, shape: tuple[int, int] = (3, 4), seed: int = 0, **settings: Any) -> xr.Dataset:
    return score_of(np.random.default_rng(seed).normal(size=(n, *shape)), **settings)


# make_score


def test_mean_standard_error_and_count() -> None:
    # Head 0: 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, se sqrt(7 / 3). Head 1: one of three samples. Head 2: none.
    score = score_of([[[1, NAN, NAN]], [[2, 5, NAN]], [[6, NAN, NAN]]])
    np.testing.assert_array_equal(score.value, [[3, 5, NAN]])
    np.testing.assert_allclose(score.se, [[math.sqrt(7 / 3), NAN, NAN]])
    np.testing.assert_array_equal(score.n, [[3, 1, 0]])
    assert score.n.dtype.kind == "i"


def test_a_score_without_samples() -> None:
    score = score_of([[0.25, 0.5]])
    np.testing.assert_array_equal(score.value, [[0.25, 0.5]])
    np.testing.assert_array_equal(score.n, [[1, 1]])
    assert np.isnan(score.se).all()


def test_attributes_and_labels() -> None:
    samples = xr.DataArray(
        np.ones((2, 3, 4)), dims=("head", "sample", "layer"), coords={"layer": [0, 1, 5, 9], "sample": ["a", "b", "c"]}
    )
    score = score_of(samples, stack="vision", settings={"alpha": np.float64(2), "heads": (1, 2)})
    assert dict(score.value.sizes) == {"layer": 4, "head": 2}
    assert score.layer.values.tolist() == [0, 1, 5, 9]
    assert score["head"].values.tolist() == [0, 1]
    assert score.value_by_sample.dims == ("sample", "layer", "head")
    assert score.sample.values.tolist() == ["a", "b", "c"]
    assert score.attrs == LABELS | {"stack": "vision", "settings": {"alpha": 2.0, "heads": [1, 2]}}


def test_samples_are_dropped_on_request() -> None:
    score = score_of([[[1.0]], [[3.0]]], null_by_sample=[[[0.0]], [[2.0]]], keep_samples=False)
    assert set(score.variables) == {"layer", "head", "value", "se", "n", "null", "null_se"}
    assert score.null.item() == 1
    assert score.null_se.item() == 1


def test_a_control_of_as_many_samples_is_paired_and_another_is_not() -> None:
    paired = score_of([[[1.0]], [[3.0]]], null_by_sample=[[[0.0]], [[2.0]]])
    assert paired.null_by_sample.dims == ("sample", "layer", "head")
    other = score_of([[[1.0]], [[3.0]]], null_by_sample=[[[0.0]], [[2.0]], [[7.0]]])
    assert other.null_by_sample.dims == ("null_sample", "layer", "head")
    assert other.null.item() == 3
    constant = score_of([[[1.0]], [[3.0]]], null_by_sample=[[0.125]])
    assert constant.null.item() == 0.125


@pytest.mark.parametrize(
    ("values", "settings", "error"),
    [
        ([1.0, 2.0], {}, r"must be \[sample, layer, head\] or \[layer, head\], got shape \(2,\)"),
        ([[["a"]]], {}, "must hold numbers, got dtype"),
        (np.zeros((0, 2, 2)), {}, "at least one sample, layer and head"),
        (xr.DataArray([[1.0]], dims=("layer", "query")), {}, r"must have the dims .*got \('layer', 'query'\)"),
        ([[1.0]], {"name": ""}, "name must be a text that is not empty"),
        ([[1.0]], {"null_by_sample": [[1.0, 2.0]]}, r"null_by_sample must have the layers and heads"),
    ],
)
def test_what_make_score_refuses(values: Any, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ScoreError, match=error):
        score_of(values, **settings)


# Student's t, against closed forms and the printed table


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 1.0, 3.0, 50.0, 1e6])
def test_t_p_values_against_closed_forms(t: float) -> None:
    # For one and two degrees of freedom the integral is elementary.
    assert t_p_value(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9, abs=1e-15)
    assert t_p_value(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-4 if t > 1e3 else 1e-9, abs=1e-15)
    # In the limit it is the normal distribution.
    assert t_p_value(t, 1e9) == pytest.approx(math.erfc(t / math.sqrt(2)), rel=1e-5, abs=1e-300)


@pytest.mark.parametrize(("df", "t"), [(1, 12.706), (4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)])
def test_t_quantiles_against_the_printed_table(df: int, t: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(t, abs=6e-4)
    assert t_quantile(0.5, df) == pytest.approx(0, abs=1e-12)


def test_t_p_values_at_the_edges() -> None:
    p = t_p_value([np.inf, -np.inf, -2.0, 2.0, NAN, 2.0], [3, 3, 5, 5, 5, 0])
    assert p[0] == p[1] == 0
    assert p[2] == p[3]
    assert np.isnan(p[4:]).all()


def test_t_p_values_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    t, df = np.meshgrid(np.linspace(-9, 9, 41), [1, 2, 3, 7, 29, 585, 1e4])
    np.testing.assert_allclose(t_p_value(t, df), 2 * stats.t.sf(np.abs(t), df), rtol=1e-9, atol=1e-15)


# Paired tests


def test_paired_test_by_hand() -> None:
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 2 sqrt 3, df 2, p = 1 - t / sqrt(2 + t^2) = 1 - 2 sqrt 3 / sqrt 14.
    # Of the 8 sign assignments only +++ and --- reach |sum| = 6: p = 1/4.
    # Differences 3, -1, -1 (second head): sum 1; sums 1, 5, 3, ... all reach 1: p = 1.
    a = score_of([[[1.0, 3.0]], [[4.0, 0.0]], [[8.0, 0.0]]])
    b = score_of([[[0.0, 0.0]], [[2.0, 1.0]], [[5.0, 1.0]]])
    test = paired_test(a, b, correction="none")
    np.testing.assert_allclose(test.difference, [[2, 1 / 3]])
    np.testing.assert_allclose(test.se[0, 0], 1 / math.sqrt(3))
    np.testing.assert_allclose(test.t[0, 0], 2 * math.sqrt(3))
    np.testing.assert_allclose(test.p_t[0, 0], 1 - 2 * math.sqrt(3) / math.sqrt(14))
    np.testing.assert_array_equal(test.p_permutation, [[0.25, 1.0]])
    np.testing.assert_array_equal(test.p_permutation_adjusted, test.p_permutation)
    holm = paired_test(a, b).p_permutation_adjusted
    np.testing.assert_array_equal(holm, [[0.5, 1.0]])


def brute_force(differences: np.ndarray) -> float:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    observed = abs(differences.sum())
    return float(np.mean([s >= observed - 1e-9 for s in sums]))


def test_exact_permutation_p_against_brute_force_with_missing_pairs() -> None:
    differences = np.random.default_rng(1).normal(0.4, 1, size=(7, 2, 3))
    differences[2, 0, 0] = differences[5, 0, 0] = differences[0, 1, 1] = NAN
    differences[:, 1, 2] = NAN
    test = paired_test(score_of(differences), score_of(np.zeros((7, 2, 3))))
    for i, j in np.ndindex(2, 3):
        kept = differences[:, i, j][~np.isnan(differences[:, i, j])]
        assert test.n[i, j] == len(kept)
        if len(kept):
            assert test.p_permutation[i, j] == brute_force(kept)
        else:
            assert np.isnan(test.p_permutation[i, j])


def test_a_drawn_permutation_p_is_near_the_exact_one_and_repeats() -> None:
    a, b = random_score(12, seed=1), random_score(12, seed=2)
    exact = paired_test(a, b, n_permutations=2**12).p_permutation
    drawn = paired_test(a, b, n_permutations=4000, seed=5).p_permutation
    # Standard error of a share among 4000 draws is at most 0.008.
    assert float(np.abs(exact - drawn).max()) < 0.04
    assert float(np.abs(exact - drawn).max()) > 0
    xr.testing.assert_identical(drawn, paired_test(a, b, n_permutations=4000, seed=5).p_permutation)
    assert not drawn.equals(paired_test(a, b, n_permutations=4000, seed=6).p_permutation)


def test_a_drawn_p_is_never_0() -> None:
    a, b = score_of(np.full((20, 1, 1), 9.0)), score_of(np.zeros((20, 1, 1)))
    assert paired_test(a, b, n_permutations=999).p_permutation.item() == pytest.approx(1 / 1000, abs=1.1e-3)
    assert paired_test(a, b, n_permutations=999).p_permutation.item() >= 1 / 1000


def test_equal_differences() -> None:
    test = paired_test(score_of([[[2.0, 1.0]], [[3.0, 1.0]]]), score_of([[[1.0, 1.0]], [[2.0, 1.0]]]))
    assert test.t.values.tolist() == [[math.inf, 0.0]]
    assert test.p_t.values.tolist() == [[0.0, 1.0]]
    assert test.p_permutation.values.tolist() == [[0.5, 1.0]]


def test_p_values_are_uniform_without_an_effect() -> None:
    # 4000 heads without an effect: the share of p <= 0.05 must be 0.05 up to 5 standard errors of sqrt(.05 * .95 / 4000).
    test = paired_test(random_score(10, (40, 100), 3), random_score(10, (40, 100), 4), n_permutations=1024)
    for name in ("p_t", "p_permutation"):
        assert float((test[name] <= 0.05).mean()) == pytest.approx(0.05, abs=0.0173)
    assert int((test.p_permutation_adjusted <= 0.05).sum()) == 0


def test_a_score_against_its_own_control() -> None:
    values = np.random.default_rng(0).normal(size=(6, 2, 2))
    score = score_of(values, null_by_sample=values - 1)
    test = paired_test(score)
    np.testing.assert_allclose(test.difference, 1)
    np.testing.assert_array_equal(test.p_permutation, 2 / 64)
    assert test.attrs["name"] == "toy - the control of toy"


def test_paired_tests_match_heads_by_their_labels() -> None:
    a = random_score(5, (4, 2))
    b = a.isel(layer=[3, 1], head=[1, 0])
    test = paired_test(a, b)
    assert test.layer.values.tolist() == [1, 3]
    np.testing.assert_array_equal(test.difference, 0)


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        (random_score(4), random_score(5), "same samples, got 4 and 5"),
        (random_score(4), random_score(4, stack="vision"), "of one stack, got 'text' and 'vision'"),
        (random_score(4, keep_samples=False), random_score(4), "has no value_by_sample"),
        (random_score(4), None, "has no null_by_sample"),
        (random_score(4), random_score(4).assign_coords(layer=[7, 8, 9]), "heads in common"),
        (xr.Dataset({"x": 1}), random_score(4), "has no value_by_sample"),
    ],
)
def test_what_a_paired_test_refuses(a: xr.Dataset, b: xr.Dataset | None, error: str) -> None:
    with pytest.raises(ScoreError, match=error):
        paired_test(a, b)


def test_samples_with_other_labels_are_not_paired() -> None:
    a, b = (random_score(2).assign_coords(sample=labels) for labels in (["x", "y"], ["y", "x"]))
    with pytest.raises(ScoreError, match="other labels"):
        paired_test(a, b)


# Corrections


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, made monotone: .04 .06 .06 .06.
    np.testing.assert_allclose(adjust_p_values([0.03, 0.01, 0.04, 0.02], "holm"), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(adjust_p_values([0.5, 0.9], "holm"), [1.0, 1.0])


def test_benjamini_hochberg_by_hand() -> None:
    # Sorted .01 .02 .06 .5 times 4/1 4/2 4/3 4/4: .04 .04 .08 .5.
    np.testing.assert_allclose(adjust_p_values([0.06, 0.01, 0.5, 0.02], "benjamini-hochberg"), [0.08, 0.04, 0.5, 0.04])
    # Not monotone before: .04 * 2 = .08 and .05 * 1: both .05.
    np.testing.assert_allclose(adjust_p_values([0.04, 0.05], "benjamini-hochberg"), [0.05, 0.05])


def test_corrections_leave_missing_heads_out_and_keep_the_shape() -> None:
    p = np.array([[0.01, NAN], [NAN, 0.02]])
    np.testing.assert_allclose(adjust_p_values(p, "holm"), [[0.02, NAN], [NAN, 0.02]])
    np.testing.assert_array_equal(adjust_p_values(p, "none"), p)
    assert np.isnan(adjust_p_values([NAN], "holm")).all()


def test_what_corrections_refuse() -> None:
    with pytest.raises(ValueError, match=r"correction must be one of .*got 'bonferroni'"):
        adjust_p_values([0.1], "bonferroni")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        adjust_p_values([1.5])


# Bootstrap


def test_bootstrap_of_two_samples_by_hand() -> None:
    # Of two samples 0 and 1 the resampled mean is 0, .5, 1 with chances 1/4, 1/2, 1/4: the 95 % interval is [0, 1], the
    # 40 % interval [.5, .5].
    score = score_of([[[0.0, 3.0, NAN]], [[1.0, 3.0, 1.0]]])
    wide, narrow = bootstrap_ci(score), bootstrap_ci(score, level=0.4)
    np.testing.assert_array_equal(wide.ci_low, [[0, 3, NAN]])
    np.testing.assert_array_equal(wide.ci_high, [[1, 3, NAN]])
    np.testing.assert_array_equal(narrow.ci_low[0, 0], 0.5)
    np.testing.assert_array_equal(narrow.ci_high[0, 0], 0.5)
    assert wide.attrs["ci"] == {"method": "percentile bootstrap", "level": 0.95, "n_resamples": 2000, "seed": 0}
    assert "ci" not in score.attrs


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    ci = bootstrap_ci(random_score(50, (20, 40)), level=0.9, n_resamples=500)
    covered = float(((ci.ci_low <= 0) & (ci.ci_high >= 0)).mean())
    # 800 heads: 0.9 less the known undercoverage of about 0.01 at n = 50; standard error 0.011.
    assert covered == pytest.approx(0.885, abs=0.04)


def test_bootstrap_repeats_and_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from interp import scores_statistics

    whole = bootstrap_ci(random_score(), seed=3)
    monkeypatch.setattr(scores_statistics, "BLOCK", 5000)
    xr.testing.assert_allclose(whole, bootstrap_ci(random_score(), seed=3), rtol=1e-12)
    assert not whole.ci_low.equals(bootstrap_ci(random_score(), seed=4).ci_low)


@pytest.mark.parametrize(("settings", "error"), [({"level": 95}, "level"), ({"n_resamples": 0}, "n_resamples")])
def test_what_bootstrap_refuses(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        bootstrap_ci(random_score(), **settings)


# Rank agreement


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: sum d^2 = 4, rho = 1 - 6 * 4 / (5 * 24) = 0.8.
    a, b = score_of([[10.0, 20.0, 30.0, 40.0, 500.0]]), score_of([[2.0, 1.0, 4.0, 3.0, 5.0]])
    agreement = rank_agreement(a, b)
    assert agreement.rho == pytest.approx(0.8)
    assert agreement.n == 5
    assert agreement.ci_low < 0.8 <= agreement.ci_high
    assert rank_agreement(a, -b.assign_attrs(a.attrs)).rho == pytest.approx(-0.8)


def test_spearman_with_ties_and_missing_heads() -> None:
    # Without the missing head: ranks 1.5 1.5 3 against 1 2 3: covariance 1.5, variances 1.5 and 2: rho = sqrt(3) / 2.
    a, b = score_of([[1.0, 1.0, 2.0, 9.0]]), score_of([[1.0, 2.0, 3.0, NAN]])
    assert rank_agreement(a, b).rho == pytest.approx(math.sqrt(3) / 2)
    assert rank_agreement(a, b).n == 3


def test_no_agreement_without_two_heads_or_with_equal_values() -> None:
    assert np.isnan(rank_agreement(score_of([[1.0]]), score_of([[1.0]])).rho)
    assert np.isnan(rank_agreement(score_of([[1.0, 1.0]]), score_of([[1.0, 2.0]])).rho)


def test_agreement_over_samples() -> None:
    noisy = random_score(20, (4, 5), 7)
    same = rank_agreement(noisy, noisy, over="samples")
    # The same samples are resampled together, so a score agrees with itself in every resample.
    assert same == (pytest.approx(1), pytest.approx(1), pytest.approx(1), 20)
    trend = np.linspace(0, 20, 20).reshape(4, 5)
    sure = rank_agreement(score_of(noisy.value_by_sample + trend), random_score(20, (4, 5), 8), over="samples")
    assert sure.ci_low <= sure.rho <= sure.ci_high
    assert sure.ci_high - sure.ci_low > 0.05
    a, b = (score_of(random_score(20, (4, 5), seed).value_by_sample + trend) for seed in (1, 2))
    assert rank_agreement(a, b, over="samples").ci_low > 0.95


def test_agreement_refuses_other_stacks_and_words() -> None:
    with pytest.raises(ScoreError, match="of one stack"):
        rank_agreement(random_score(), random_score(stack="vision"))
    with pytest.raises(ValueError, match="over must be"):
        rank_agreement(random_score(), random_score(), over="layers")  # type: ignore[arg-type]


# Ranking and tables


@pytest.fixture
def ranked() -> xr.Dataset:
    samples = np.array([[[0.2, NAN, 0.9], [0.9, -0.5, 0.0]], [[0.4, NAN, 0.9], [0.9, -0.5, 0.2]]])
    array = xr.DataArray(samples, dims=("sample", "layer", "head"), coords={"layer": [3, 7]})
    return score_of(array, null_by_sample=np.stack([[[0.0, 0.0, 0.9], [0.0, -1.0, 0.0]]] * 2))


def test_top_bottom_and_above(ranked: xr.Dataset) -> None:
    assert ranked.heads.top(3) == Heads.parse("L3H2,L7H0,L3H0")
    assert ranked.heads.top(99) == Heads.parse("L3H2,L7H0,L3H0,L7H2,L7H1")
    assert ranked.heads.top(0) == Heads()
    assert ranked.heads.bottom(2) == Heads.parse("L7H1,L7H2")
    assert ranked.heads.above(0.9) == Heads.parse("L3H2,L7H0")
    assert ranked.heads.above(2) == Heads()
    assert ranked.heads.top(1, by="difference") == Heads.parse("L7H0")
    assert ranked.heads.bottom(1, by="difference") == Heads.parse("L3H2")
    assert ranked.heads.top(1, by="se") == Heads.parse("L3H0")


def test_heads_of_another_stack() -> None:
    assert score_of([[1.0, 2.0]], stack="vision").heads.top(1)[0] == Head(0, 1, "vision")


def test_ties_do_not_depend_on_the_order_of_the_labels(ranked: xr.Dataset) -> None:
    assert ranked.isel(layer=[1, 0], head=[2, 0, 1]).heads.top(5) == ranked.heads.top(5)


@pytest.mark.parametrize("k", [-1, 1.5, "3", True])
def test_k_must_be_a_count(ranked: xr.Dataset, k: Any) -> None:
    with pytest.raises(ScoreError, match="k must be a whole number"):
        ranked.heads.top(k)


def test_by_names_what_there_is(ranked: xr.Dataset) -> None:
    with pytest.raises(ScoreError, match=r"by must be one of \['value', 'se', 'n', 'null', 'null_se'\].*got 'z'"):
        ranked.heads.top(1, by="z")


def test_a_dataset_that_is_no_score() -> None:
    with pytest.raises(ScoreError, match="expected a score"):
        xr.Dataset({"x": ("layer", [1.0])}).heads.top(1)


def test_table(ranked: xr.Dataset) -> None:
    table = ranked.heads.table()
    assert table.columns.tolist()[:9] == ["id", "layer", "head", "value", "se", "n", "ci_low", "ci_high", "null"]
    assert table["id"].tolist() == ["L3H2", "L7H0", "L3H0", "L7H2", "L7H1"]
    row = table.set_index("id").loc["L3H0"]
    # Samples .2 and .4: se .1, t of one degree of freedom 12.706.
    assert (row["layer"], row["head"], row["n"]) == (3, 0, 2)
    assert row["value"] == pytest.approx(0.3)
    assert row["se"] == pytest.approx(0.1)
    assert row["ci_low"] == pytest.approx(0.3 - 1.2706, abs=1e-4)
    assert row["ci_high"] == pytest.approx(0.3 + 1.2706, abs=1e-4)


def test_the_table_takes_the_bootstrap_interval_where_there_is_one(ranked: xr.Dataset) -> None:
    row = bootstrap_ci(ranked).heads.table().set_index("id").loc["L3H0"]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((0.2, 0.4))


# Stacks of scores


def test_stack_scores() -> None:
    one = score_of([[[1.0, 2.0]], [[3.0, 2.0]]], name="one", null_by_sample=[[0.0, 0.0]], settings={"k": 1})
    two = make_score(
        xr.DataArray([[5.0, 6.0]], dims=("layer", "head"), coords={"layer": [4]}), name="two", unit="bits", paper="B"
    )
    both = stack_scores([one, two])
    assert dict(both.value.sizes) == {"score": 2, "layer": 2, "head": 2}
    np.testing.assert_array_equal(both.value.sel(score="one"), [[2, 2], [NAN, NAN]])
    np.testing.assert_array_equal(both.value.sel(score="two"), [[NAN, NAN], [5, 6]])
    np.testing.assert_array_equal(both.n, [[[2, 2], [0, 0]], [[0, 0], [1, 1]]])
    assert np.isnan(both.null.sel(score="two")).all()
    assert both.unit.values.tolist() == ["nats", "bits"]
    assert json.loads(both.settings.values[0]) == {"k": 1}
    selected = both.sel(score="two")
    assert selected.heads.top(1) == Heads.parse("L4H1")
    assert selected.heads.grid().layout.title.text.startswith("two")
    with pytest.raises(ScoreError, match=r"several scores are stacked here \(one, two\)"):
        both.heads.top(1)


@pytest.mark.parametrize(
    ("scores", "error"),
    [
        ([], "got none"),
        ([random_score(), random_score()], "different names, got toy, toy"),
        ([random_score(), random_score(name="b", stack="vision")], "of one stack, got text, vision"),
        ([xr.Dataset()], "expected a score"),
    ],
)
def test_what_stacking_refuses(scores: list[xr.Dataset], error: str) -> None:
    with pytest.raises(ScoreError, match=error):
        stack_scores(scores)


# Pictures


def test_grid(ranked: xr.Dataset) -> None:
    figure = ranked.heads.grid()
    heat, hatching = figure.data
    np.testing.assert_allclose(np.array(heat.z, dtype=float), ranked.value)
    assert heat.zmid == 0, "values of both signs need a diverging scale around 0"
    assert heat.text[0][0].startswith("<b>L3H0</b><br>value 0.3<br>se 0.1<br>n 2<br>null 0<br>unit nats<br>Nobody 2026")
    assert heat.text[0][1] == "<b>L3H1</b><br>missing: no such head, or not measured"
    # The one missing head, row 0 column 1, and no other, is hatched.
    x, y = ([v for v in axis if v is not None] for axis in (hatching.x, hatching.y))
    assert (min(x), max(x), min(y), max(y)) == (0.5, 1.5, -0.5, 0.5)
    assert list(figure.layout.yaxis.ticktext) == ["3", "7"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1], "layer 0 stands on top"
    assert ranked.heads.grid(by="null").data[0].z[0][2] == 0.9


def test_a_grid_without_missing_heads_has_no_hatching_and_a_sequential_scale() -> None:
    figure = score_of([[0.0, 1.0]]).heads.grid()
    assert len(figure.data) == 1
    assert figure.data[0].zmid is None


def test_a_grid_with_missing_heads_only() -> None:
    assert len(score_of([[NAN]]).heads.grid().data[1].x) == 9


def test_a_large_grid_labels_some_layers() -> None:
    assert len(random_score(1, (80, 64)).heads.grid().layout.yaxis.tickvals) == 27


def test_hover_text_is_escaped() -> None:
    figure = score_of([[1.0]], paper="<script>", unit="<b>").heads.grid()
    assert "&lt;script&gt;" in figure.data[0].text[0][0]
    assert figure.data[0].colorbar.title.text == "&lt;b&gt;"


def test_scatter(ranked: xr.Dataset) -> None:
    other = ranked.assign(value=2 * ranked.value).isel(layer=[1, 0])
    other.attrs = ranked.attrs | {"name": "other", "unit": "bits"}
    points = ranked.heads.scatter(other).data[0]
    assert list(points.text) == ["L3H0", "L3H2", "L7H0", "L7H1", "L7H2"]
    np.testing.assert_allclose(points.y, 2 * np.array(points.x))
    np.testing.assert_allclose(points.error_x.array, [0.1, 0, 0, 0, 0.1])
    assert ranked.heads.scatter(other).layout.yaxis.title.text == "other (bits)"
    with pytest.raises(ScoreError, match="of one stack"):
        ranked.heads.scatter(random_score(stack="vision"))
    with pytest.raises(ScoreError, match="in common"):
        ranked.heads.scatter(random_score())


# Files: our own


@pytest.mark.parametrize(
    "make",
    [
        lambda: random_score(seed=5, null_by_sample=np.ones((12, 3, 4)) / 3, settings={"a": [1, {"b": None}]}),
        lambda: score_of([[NAN, np.inf], [-np.inf, 5e-324]]),
        lambda: score_of(
            xr.DataArray(np.ones((2, 1, 1)), dims=("sample", "layer", "head"), coords={"sample": ["é", ""]})
        ),
        lambda: stack_scores([random_score(), random_score(name="b")]),
        lambda: bootstrap_ci(random_score(), n_resamples=10),
        lambda: random_score().astype(np.float32),
    ],
)
def test_saved_scores_come_back_bit_for_bit(tmp_path: Path, make: Callable[[], xr.Dataset]) -> None:
    score = make()
    back = open_score(save_score(score, tmp_path / "deep" / "score.json"))
    xr.testing.assert_identical(back, score)
    for name in score.data_vars:
        assert back[name].dtype == score[name].dtype
        assert back[name].values.tobytes() == score[name].values.tobytes() or np.isnan(score[name]).any()
    assert back.attrs == score.attrs
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["score.json"]


def test_a_saved_score_is_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    path = save_score(score_of([[NAN, np.inf]]), tmp_path / "s.json")
    json.loads(path.read_text(), parse_constant=refuse)


def test_a_damaged_score_file(tmp_path: Path) -> None:
    path = save_score(random_score(), tmp_path / "s.json")
    data = path.read_bytes()
    for position in range(0, len(data), 97):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        try:
            back = open_score(path)
        except ScoreFileError:
            continue
        # A changed blank or sign in the layout may do no harm; a changed number must not pass.
        xr.testing.assert_identical(back, random_score())
    path.write_bytes(data[:-40])
    with pytest.raises(ScoreFileError, match="is not a score, or is damaged"):
        open_score(path)


def test_a_changed_number_is_seen(tmp_path: Path) -> None:
    path = save_score(score_of([[0.125]]), tmp_path / "s.json")
    path.write_text(path.read_text().replace("0.125", "0.225"))
    with pytest.raises(ScoreFileError, match="SHA-256"):
        open_score(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{}", "does not name the format"),
        ("[1]", "does not name the format"),
        ('{"format": "headscope-score", "version": 2}', "format version 2"),
        ('{"format": "headscope-score", "version": "x"}', "version 'x'"),
        ('{"format": "headscope-score", "version": 1}', "SHA-256"),
        ("\x89PNG", "is not a score, or is damaged"),
    ],
)
def test_files_that_are_no_scores(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ScoreFileError, match=error):
        open_score(tmp_path / "s.json")


def test_a_failed_save_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_score(score_of([[1.0]]), tmp_path / "s.json")
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        real(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_score(score_of([[2.0]]), path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]
    assert open_score(path).value.item() == 1


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'when' must hold numbers"):
        save_score(score_of([[1.0]]).assign(when=np.datetime64("2026-01-01", "ns")), tmp_path / "s.json")
    with pytest.raises(TypeError, match=r"settings\['f'\]"):
        score_of([[1.0]], settings={"f": len})


# Files: tables and pictures


def test_csv(ranked: xr.Dataset, tmp_path: Path) -> None:
    ranked.heads.to_csv(tmp_path / "s.csv")
    table = pd.read_csv(tmp_path / "s.csv")
    assert table.columns.tolist()[:5] == ["score", "stack", "id", "layer", "head"]
    pd.testing.assert_frame_equal(table.drop(columns=["score", "stack"]), ranked.heads.table(), check_dtype=False)
    assert set(table["score"]) == {"toy"}


def test_parquet(ranked: xr.Dataset, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="to_parquet needs pyarrow")
    ranked.heads.to_parquet(tmp_path / "s.parquet")
    table = pd.read_parquet(tmp_path / "s.parquet")
    pd.testing.assert_frame_equal(table.drop(columns=["score", "stack"]), ranked.heads.table(), check_dtype=False)


@pytest.mark.parametrize(("export", "package"), [("parquet", "pyarrow"), ("pdf", "matplotlib"), ("svg", "matplotlib")])
def test_exports_name_the_package_they_lack(
    ranked: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: str, package: str
) -> None:
    monkeypatch.setattr(scores_files, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"to_{export} needs the package {package}"):
        getattr(ranked.heads, f"to_{export}")(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_latex(ranked: xr.Dataset, tmp_path: Path) -> None:
    text = ranked.assign_attrs(name="a_b", unit="50% $").heads.to_latex(tmp_path / "s.tex", k=3)
    assert (tmp_path / "s.tex").read_text() == text
    lines = text.splitlines()
    assert lines[:2] == [r"\begin{tabular}{lrrr}", r"\toprule"]
    assert lines[2] == r"Head & a\_b (50\% \$) & $n$ & Control \\"
    assert lines[4:7] == [
        r"L3H2 & 0.900 $\pm$ 0.000 & 2 & 0.900 \\",
        r"L7H0 & 0.900 $\pm$ 0.000 & 2 & 0.000 \\",
        r"L3H0 & 0.300 $\pm$ 0.100 & 2 & 0.000 \\",
    ]
    assert lines[7:] == [r"\bottomrule", r"\end{tabular}"]
    assert "pm" not in score_of([[1.0]]).heads.to_latex()


# Files: Retrieval_Head


def test_retrieval_head_file(tmp_path: Path) -> None:
    path = tmp_path / "llama.json"
    text = '{"0-0": [0.0, 0.5, 1.25], "0-1": [1.0, 1.0, 1.0], "1-0": [0.1, 0.2, 0.30000000000000004], "1-1": [0.0, 0.0, 0.0]}'
    path.write_text(text)
    score = read_retrieval_head_json(path)
    np.testing.assert_allclose(score.value, [[1.75 / 3, 1], [0.2, 0]])
    np.testing.assert_array_equal(score.n, 3)
    assert score.heads.top(2) == Heads.parse("L0H1,L0H0")
    assert score.heads.above(0.1) == Heads.parse("L0H1,L0H0,L1H0")
    assert score.attrs["name"] == "retrieval"
    assert write_retrieval_head_json(score, tmp_path / "back.json").read_text() == text


def test_retrieval_head_files_with_heads_left_out(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"2-1": [0.5], "0-0": [1]}\nwhat follows is not read')
    score = read_retrieval_head_json(path)
    np.testing.assert_array_equal(score.value, [[1, NAN], [NAN, NAN], [NAN, 0.5]])
    assert write_retrieval_head_json(score, path).read_text() == '{"0-0": [1.0], "2-1": [0.5]}'


def test_retrieval_head_keys_are_in_layer_order_whatever_the_labels(tmp_path: Path) -> None:
    score = random_score(2, (11, 2)).isel(layer=slice(None, None, -1))
    table = json.loads(write_retrieval_head_json(score, tmp_path / "s.json").read_text())
    assert list(table) == [f"{layer}-{head}" for layer in range(11) for head in range(2)]
    assert table["10-1"] == score.value_by_sample.sel(layer=10, head=1).values.tolist()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no Retrieval_Head score file"),
        ("[]", "no Retrieval_Head score file"),
        ("{}", "no Retrieval_Head score file"),
        ('{"L0H1": [1]}', "the key 'L0H1' is not"),
        ('{"0-1": ["a"]}', "no Retrieval_Head score file"),
        ('{"0-1": [1], "0-2": [1, 2]}', "all of one length"),
        ('{"0-1": []}', "non-empty"),
        ('{"0-1": 3}', "non-empty"),
    ],
)
def test_files_that_are_no_retrieval_head_files(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ScoreFileError, match=error):
        read_retrieval_head_json(tmp_path / "s.json")


def test_what_the_retrieval_head_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="keep_samples"):
        write_retrieval_head_json(random_score(keep_samples=False), tmp_path / "s.json")
    with pytest.raises(ScoreError, match="1 NaN in L0H1"):
        write_retrieval_head_json(score_of([[[1.0, NAN]], [[1.0, 2.0]]]), tmp_path / "s.json")
    assert list(tmp_path.iterdir()) == []


# Files: DuoAttention


@pytest.fixture
def duo(tmp_path: Path) -> Path:
    gates = np.array([[0.951171875, 1.0, -1.4e-3], [0.5, 1.0000001, 1 / 3]])
    path = tmp_path / "full_attention_heads.tsv"
    np.savetxt(path, gates, delimiter="\t")
    return path


def test_duo_attention_file(duo: Path) -> None:
    score = read_duo_attention_tsv(duo, group_size=2)
    np.testing.assert_array_equal(score.value[0], [0.951171875, 0.951171875, 1, 1, 0, 0])
    np.testing.assert_array_equal(score.value[1], [0.5, 0.5, 1, 1, 1 / 3, 1 / 3])
    assert score.gate[0, 2] == -1.4e-3
    assert score.heads.bottom(2) == Heads.parse("L0H4,L0H5")
    assert dict(read_duo_attention_tsv(duo, group_size=1).value.sizes) == {"layer": 2, "head": 3}


def test_an_unchanged_duo_attention_file_keeps_its_bytes(duo: Path, tmp_path: Path) -> None:
    score = read_duo_attention_tsv(duo, group_size=4)
    assert write_duo_attention_tsv(score, tmp_path / "back.tsv", group_size=4).read_bytes() == duo.read_bytes()


def test_a_changed_gate_changes_its_line_only(duo: Path, tmp_path: Path) -> None:
    score = read_duo_attention_tsv(duo, group_size=2)
    score.value[1, 0:2] = 0.25
    before = duo.read_text().splitlines()
    after = write_duo_attention_tsv(score, tmp_path / "back.tsv", group_size=2).read_text().splitlines()
    assert after[0] == before[0]
    assert after[1].split("\t") == ["2.500000000000000000e-01", *before[1].split("\t")[1:]]


def test_duo_attention_from_any_score(tmp_path: Path) -> None:
    score = score_of([[0.25, 0.75, 0.5, 0.5]])
    with pytest.raises(ScoreError, match=r"one value, got \[0.25, 0.75\] in layer 0, KV head 0"):
        write_duo_attention_tsv(score, tmp_path / "s.tsv", group_size=2)
    for reduce, expected in (("mean", [0.5, 0.5]), ("max", [0.75, 0.5])):
        path = write_duo_attention_tsv(score, tmp_path / "s.tsv", group_size=2, reduce=reduce)  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.loadtxt(path, delimiter="\t"), expected)


@pytest.mark.parametrize(
    ("score", "group_size", "error"),
    [
        (score_of([[0.5, NAN]]), 1, "no place for missing heads, got 1 NaN"),
        (score_of([[0.5, 0.5, 0.5]]), 2, "group_size must divide the 3 heads, got 2"),
        (random_score().isel(layer=[0, 2]), 1, r"needs every layer from 0, got \[0, 2\]"),
    ],
)
def test_what_the_duo_attention_format_cannot_hold(
    tmp_path: Path, score: xr.Dataset, group_size: int, error: str
) -> None:
    with pytest.raises(ScoreError, match=error):
        write_duo_attention_tsv(score, tmp_path / "s.tsv", group_size=group_size, reduce="mean")


@pytest.mark.parametrize("text", ["", "0.5\tx\n", "0.5\t0.5\n0.5\n", "nan\n"])
def test_files_that_are_no_duo_attention_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.tsv").write_text(text)
    with pytest.raises(ScoreFileError):
        read_duo_attention_tsv(tmp_path / "s.tsv", group_size=1)


@pytest.mark.parametrize("group_size", [0, -1, 1.5, True])
def test_the_group_size_must_be_a_count(duo: Path, group_size: Any) -> None:
    with pytest.raises(ValueError, match="group_size must be a whole number"):
        read_duo_attention_tsv(duo, group_size=group_size)
