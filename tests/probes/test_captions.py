"""Length and repetition of captions, and the intervals of every judge: hand-computed answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.captions import Loop, count_words, distinct, longest_loop, measure, repeated_share, tokenize
from probes.intervals import bootstrap, mean_interval, paired_difference, ratio, ratio_interval
from probes.samples import ProbeError


def test_words_and_tokens() -> None:
    assert count_words("  A dog, a cat -  and I don't know. ") == 9
    assert tokenize("A dog, a cat -  and I don't know. ") == ["a", "dog", "a", "cat", "and", "i", "don't", "know"]
    assert count_words("") == count_words(" \n") == 0 and tokenize("...") == []


def test_distinct_and_repeated() -> None:
    tokens = ["a", "dog", "and", "a", "dog", "and", "a", "cat"]
    # 8 words, 4 different; pairs: a-dog, dog-and, and-a, a-dog, dog-and, and-a, a-cat: 4 different of 7.
    assert distinct(tokens, 1) == 4 / 8 and distinct(tokens, 2) == 4 / 7
    # 4-grams: adaa.. a-dog-and-a, dog-and-a-dog, and-a-dog-and, a-dog-and-a, dog-and-a-cat: 4 different of 5.
    assert repeated_share(tokens) == pytest.approx(1 / 5)
    assert (
        math.isnan(distinct(["a"], 2)) and math.isnan(repeated_share(["a", "b", "c"])) and math.isnan(distinct([], 1))
    )
    with pytest.raises(ProbeError, match="n must be at least 1, got 0"):
        distinct(tokens, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x a b a b a y", Loop(1, 5, 2)),  # a b a b a: two and a half times.
        ("a a a a b", Loop(0, 4, 1)),  # As long as "a a" twice: the shortest unit counts.
        ("a b c a b", Loop()),  # The unit must stand there twice.
        ("a b c a b c", Loop(0, 6, 3)),
        ("a a x b c b c", Loop(3, 4, 2)),
        ("a b c d", Loop()),
        ("a", Loop()),
        ("", Loop()),
    ],
)
def test_longest_loop(text: str, expected: Loop) -> None:
    assert longest_loop(text.split()) == expected


def test_times() -> None:
    assert Loop(1, 5, 2).times == 2.5 and Loop().times == 0.0


@given(st.lists(st.integers(0, 2), max_size=14))
def test_loops_are_those_found_by_trying_all_blocks(tokens: list[int]) -> None:
    best = Loop()
    for period in range(1, len(tokens) // 2 + 1):
        for start in range(len(tokens)):
            for stop in range(start + 2 * period, len(tokens) + 1):
                block = tokens[start:stop]
                if block[period:] == block[:-period] and len(block) > best.length:
                    best = Loop(start, len(block), period)
    assert longest_loop(tokens) == best


def test_measure() -> None:
    found = measure("A cup. A cup. A cup.")
    assert (found.words, found.distinct_1, found.distinct_2) == (6, 2 / 6, 2 / 5)
    assert found.repeated_4 == pytest.approx(1 / 3) and found.loop == Loop(0, 6, 2)
    empty = measure("")
    assert empty.words == 0 and math.isnan(empty.distinct_1) and math.isnan(empty.repeated_4) and empty.loop == Loop()


def test_ratio_of_sums_and_its_interval_over_two_units() -> None:
    # Units: x with 1 of 2, y with 3 of 4. A resample is x twice (1/2), y twice (3/4) or both (4/6).
    found = ratio_interval([1, 0, 3], [1, 1, 4], ["x", "x", "y"], n_resamples=4000)
    assert (found.value, found.low, found.high, found.n) == (4 / 6, 1 / 2, 3 / 4, 6)
    narrow = ratio_interval([1, 0, 3], [1, 1, 4], ["x", "x", "y"], level=0.3)
    assert (narrow.low, narrow.high) == (
        pytest.approx(4 / 6),
        pytest.approx(4 / 6),
    )  # Quantiles .35 and .65 of 1/4, 1/2, 1/4.


def test_units_are_drawn_whole() -> None:
    values = np.repeat([0.0, 1.0], 50)
    alone = mean_interval(values)
    together = mean_interval(values, ["a"] * 50 + ["b"] * 50)
    assert alone.value == together.value == 0.5
    assert (together.low, together.high) == (0, 1) and 0.38 < alone.low < 0.42 and 0.58 < alone.high < 0.62


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        found = mean_interval(rng.normal(size=60), n_resamples=400, seed=seed)
        hits += found.low <= 0 <= found.high
    # 95 % of 200 is 190, standard deviation 3; percentile intervals of 60 values are a little narrow.
    assert 178 <= hits <= 199


def test_means_leave_nan_out_and_say_so() -> None:
    found = mean_interval([1.0, float("nan"), 3.0])
    assert found.value == 2.0 and found.n == 2
    nothing = mean_interval([float("nan")] * 3)
    assert math.isnan(nothing.value) and math.isnan(nothing.low) and nothing.n == 0
    one = mean_interval([1.0, 2.0], ["x", "x"])
    assert one.value == 1.5 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(mean_interval([]).value)


def test_paired_differences_are_narrower_than_those_of_two_intervals() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=200) * 10
    found = paired_difference(base + 1 + rng.normal(size=200) * 0.1, base)
    assert 0.97 < found.low < found.value < found.high < 1.03 and found.n == 200
    assert paired_difference([1.0, float("nan")], [0.0, 1.0]).n == 1


def test_draws_depend_on_the_seed_and_not_on_the_blocks() -> None:
    values = np.arange(50.0)
    found = [
        bootstrap(lambda w: (w @ values)[:, None] / 50, 50, n_resamples=300, seed=seed, width=width)
        for seed, width in ((0, None), (0, 2**20), (1, None))
    ]
    assert found[0].low == found[1].low and found[0].high == found[1].high
    assert found[0].low != found[2].low


def test_resamples_without_a_denominator_do_not_count() -> None:
    # Only the first of five units has a denominator: a resample without it has no value.
    found = ratio_interval([2, 0, 0, 0, 0], [4, 0, 0, 0, 0])
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert np.isnan(ratio([1.0], [0.0])).all() and ratio(1.0, 2.0) == 0.5


def test_bad_arguments_of_intervals() -> None:
    with pytest.raises(ProbeError, match="level must lie between 0 and 1, got 95"):
        mean_interval([1.0, 2.0], level=95)
    with pytest.raises(ProbeError, match="n_resamples must be at least 1"):
        mean_interval([1.0, 2.0], n_resamples=0)
    with pytest.raises(ProbeError, match="a and b must be pairs, got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ProbeError, match="same length, got 2 and 1"):
        ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(ProbeError, match="one entry a value, got 1 for 2"):
        mean_interval([1.0, 2.0], ["x"])
    with pytest.raises(ProbeError, match=r"values must be one number a value, \[value\], got an array \[1, 2\]"):
        mean_interval(np.ones((1, 2)))
