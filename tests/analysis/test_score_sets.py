"""Matched sets, max-T, split halves, discovery and confirmation: hand computations, and what must not be found."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from interp.heads import Heads
from interp.scores import (
    ScoreError,
    discover_and_confirm,
    make_score,
    matched_random_sets,
    max_t_test,
    paired_test,
    split_half,
)


def made(value: Any, null: Any = None, name: str = "toy") -> Any:
    null = np.zeros_like(value) if null is None else null
    return make_score(value, name=name, unit="nats", paper="none", null_by_sample=null)


def t(d: np.ndarray) -> np.ndarray:
    return d.mean(0) / (d.std(0, ddof=1) / np.sqrt(len(d)))


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_max_t_counts_all_sign_assignments(alternative: Any) -> None:
    d = np.random.default_rng(0).normal(0.4, 1, (6, 2, 3))
    got = max_t_test(made(d), alternative=alternative)["p_max_t"].values
    size = np.abs if alternative == "two-sided" else np.asarray
    largest = [size(t(d * np.array(signs)[:, None, None])).max() for signs in itertools.product((1, -1), repeat=6)]
    wanted = [[np.mean([x >= size(v) - 1e-9 for x in largest]) for v in row] for row in t(d)]
    np.testing.assert_allclose(got, wanted)


def test_max_t_is_never_below_the_test_of_one_head_and_equal_for_one() -> None:
    d = np.random.default_rng(1).normal(0.5, 1, (7, 1, 5))
    many = max_t_test(made(d))["p_max_t"].values
    for head in range(5):
        one = max_t_test(made(d[:, :, head : head + 1]))["p_max_t"].values
        assert many[0, head] >= one[0, 0]
    single = paired_test(made(d[:, :, :1]))["p_permutation"].values
    np.testing.assert_allclose(max_t_test(made(d[:, :, :1]))["p_max_t"].values, single)


def test_max_t_keeps_its_promise_under_no_effect() -> None:
    """Of 200 data sets without any effect, at most about 5 % show a head at 0.05; heads go together here."""
    rng = np.random.default_rng(2)
    hits = 0
    for n in range(200):
        shared = rng.normal(size=(12, 1, 1))
        d = shared + 0.5 * rng.normal(size=(12, 2, 10))
        hits += bool((max_t_test(made(d), n_permutations=400, seed=n)["p_max_t"] <= 0.05).any())
    assert hits <= 20
    strong = made(rng.normal(size=(12, 2, 10)) + np.where(np.arange(10) == 3, 3.0, 0.0))
    assert float(max_t_test(strong)["p_max_t"][0, 3]) < 0.01


def test_max_t_misses_what_it_cannot_test() -> None:
    d = np.random.default_rng(3).normal(size=(5, 1, 4))
    d[:, 0, 1] = np.nan
    d[1:, 0, 2] = np.nan
    d[:, 0, 3] = 2.0  # no variation: t is infinite
    got = max_t_test(made(d))["p_max_t"].values[0]
    assert not np.isnan(got[0]) and np.isnan(got[1:]).all()


def test_matched_sets_have_the_layers_and_sizes_of_the_set() -> None:
    shapes = {"text": (3, 8)}
    sizes = np.tile(np.arange(8.0), (3, 1))
    norms = make_score(sizes, name="write_norm", unit="L1", paper="none")
    heads = Heads.parse("L1H0,L1H7,L2H3")
    sets = matched_random_sets(heads, shapes, 50, by=norms, bins=4)
    for drawn in sets:
        assert [h.layer for h in drawn] == [1, 1, 2] and not set(drawn) & set(heads) and len(set(drawn)) == 3
        # Bins of two: head 0 goes with 1, 7 with 6, 3 with 2.
        assert [h.head for h in drawn] == [1, 6, 2]
    halves = matched_random_sets(heads, shapes, 50, by=norms, bins=2)
    assert {s[0].head for s in halves} == {1, 2, 3} and {s[1].head for s in halves} == {4, 5, 6}
    free = matched_random_sets(heads, shapes, 200)
    assert {h.head for s in free for h in s if h.layer == 2} == {0, 1, 2, 4, 5, 6, 7}


def test_a_layer_without_others_lends_the_set_itself() -> None:
    (drawn,) = matched_random_sets(Heads.parse("L0H0,L0H1"), {"text": (1, 2)}, 1)
    assert set(drawn) == set(Heads.parse("L0H0-1"))
    with pytest.raises(ScoreError, match="in the pool"):
        matched_random_sets(Heads.parse("L5H0"), {"text": (1, 2)})
    with pytest.raises(ScoreError, match="at least 1"):
        matched_random_sets(Heads(), {"text": (1, 2)})


def test_split_halves_of_signal_and_of_noise() -> None:
    rng = np.random.default_rng(4)
    signal = rng.normal(size=(1, 4, 8))
    sure = split_half(made(signal + 0.01 * rng.normal(size=(20, 4, 8))))
    assert sure.rho > 0.99 and sure.reliability > 0.99 and sure.ci_low > 0.99
    noise = split_half(made(rng.normal(size=(20, 4, 8))))
    assert abs(noise.rho) < 0.35 and noise.n_splits == 200
    half = split_half(made(signal + 1.5 * rng.normal(size=(8, 4, 8))))
    assert half.reliability == pytest.approx(2 * half.rho / (1 + half.rho)) and half.rho < half.reliability < 1


def test_depth_alone_is_no_agreement_within_layers() -> None:
    rng = np.random.default_rng(5)
    depth = np.arange(6.0)[None, :, None] + rng.normal(size=(20, 6, 8)) * 0.5
    assert split_half(made(depth)).rho > 0.8
    assert abs(split_half(made(depth), within_layers=True).rho) < 0.35
    with pytest.raises(ScoreError, match="at least 4 samples"):
        split_half(made(depth[:3]))


def test_confirmation_tests_only_what_was_found_on_the_rest() -> None:
    rng = np.random.default_rng(6)
    value = rng.normal(size=(20, 2, 6))
    value[:, 1, 4] += 3
    found = discover_and_confirm(made(value), k=2)
    assert found.heads[0].layer == 1 and found.heads[0].head == 4
    assert set(found.discovery) | set(found.confirmation) == set(range(20)) and not set(found.discovery) & set(
        found.confirmation
    )
    tested = ~np.isnan(found.test["p_max_t"].values)
    assert tested.sum() == 2 and tested[1, 4] and float(found.test["p_max_t"][1, 4]) < 0.01
    by_hand = value[list(found.confirmation), 1, 4].mean()
    assert float(found.test["difference"][1, 4]) == pytest.approx(by_hand)


def test_what_is_chosen_from_noise_does_not_confirm() -> None:
    """The best of 60 heads of noise: significant on the samples it was chosen on, and seldom on others."""
    rng = np.random.default_rng(7)
    naive = confirmed = 0
    for n in range(60):
        score = made(rng.normal(size=(16, 6, 10)))
        naive += bool(paired_test(score)["p_t"].min() < 0.05)
        confirmed += bool(np.nanmin(discover_and_confirm(score, 1, seed=n, n_permutations=500).test["p_max_t"]) <= 0.05)
    assert naive >= 50 and confirmed <= 9


def test_bad_arguments_are_named() -> None:
    score = made(np.random.default_rng(8).normal(size=(3, 2, 2)))
    with pytest.raises(ValueError, match="alternative must be"):
        max_t_test(score, alternative="less")  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="k must be at least 1"):
        discover_and_confirm(score, 0)
    with pytest.raises(ScoreError, match="confirmation 2"):
        discover_and_confirm(score, 1, share=0.9)
