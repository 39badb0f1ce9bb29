"""CHAIR: hand-computed figures, what is counted where nothing is there, comparisons at equal length and recall."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probes.chair import Chair, ChairResult, summarise
from probes.chair_compare import compare, frontier, matched
from probes.mentions import WordMatcher
from probes.samples import ProbeError

MATCHER = WordMatcher({"dog": ["puppy"], "cat": [], "cup": [], "fork": [], "knife": [], "hot dog": []})
TRUTH = {1: {"dog", "cup"}, 2: ["fork"], 3: (), 4: frozenset({"cat"})}
CAPTIONS = {
    1: "A dog and a cat. The puppy looks at the cat.",  # dog, cat*, dog, cat*: 11 words.
    2: "A fork beside a knife",  # fork, knife*: 5 words.
    3: "",
    4: "What a nice picture of nothing here",  # 7 words, names nothing.
}


def test_figures_by_hand() -> None:
    found = Chair(TRUTH, MATCHER).judge(CAPTIONS)
    assert (found.chair_s.value, found.chair_s.n) == (2 / 4, 4)
    assert (found.chair_i.value, found.chair_i.n) == (3 / 6, 6)
    # Truth has 2 + 1 + 0 + 1 objects, dog and fork are named; named are dog, cat, fork, knife.
    assert (found.recall.value, found.recall.n) == (2 / 4, 4)
    assert (found.precision.value, found.precision.n) == (2 / 4, 4)
    assert found.f1.value == 0.5 and found.f1.n == 4
    assert found.words.value == (11 + 5 + 0 + 7) / 4
    # 4-grams of at least four words: three captions, none repeats one.
    assert (found.repetition.value, found.repetition.n) == (0.0, 3)
    assert (found.empty.value, found.without_objects.value) == (1 / 4, 2 / 4)
    assert (found.n_captions, found.n_images, found.n_empty, found.n_without_objects, found.n_unknown) == (
        4,
        4,
        1,
        2,
        0,
    )
    assert set(found.figures) == {
        "chair_s", "chair_i", "recall", "precision", "f1", "words", "repetition", "empty", "without_objects",
    }  # fmt: skip


def test_rows() -> None:
    first, second, third, fourth = Chair(TRUTH, MATCHER).judge(CAPTIONS).rows
    assert [(m.name, m.word, m.hallucinated) for m in first.mentions] == [
        ("dog", 1, False), ("cat", 4, True), ("dog", 6, False), ("cat", 10, True),
    ]  # fmt: skip
    assert first.text[first.mentions[2].start : first.mentions[2].stop] == "puppy"
    assert (first.hallucinated, first.hits, first.chair_i, first.recall) == (2, 1, 0.5, 0.5)
    assert (second.chair_i, second.recall) == (0.5, 1.0)
    assert third.words == 0 and math.isnan(third.chair_i) and math.isnan(third.recall)
    assert fourth.recall == 0.0 and math.isnan(fourth.chair_i) and fourth.truth == {"cat"}


def test_words_of_mentions_inside_pieces() -> None:
    (row,) = Chair({1: ["dog"]}, MATCHER).judge({1: 'dog/cat  "cup" -fork- hot dog'}).rows
    assert [(m.name, m.word) for m in row.mentions] == [("dog", 0), ("cat", 0), ("cup", 1), ("fork", 2), ("hot dog", 3)]


def test_chair_i_is_a_ratio_of_sums_and_lineage_objects_counts_a_loop_once() -> None:
    loop = {1: "dog cup " * 9 + "cat", 2: "knife"}
    assert Chair(TRUTH, MATCHER).judge(loop).chair_i.value == 2 / 20
    objects = Chair(TRUTH, MATCHER, lineage="objects").judge(loop)
    assert objects.chair_i.value == 2 / 4 and objects.chair_i.n == 4
    both = Chair(TRUTH, MATCHER).judge(loop)
    assert objects.recall == both.recall and objects.precision == both.precision and objects.chair_s == both.chair_s
    # 19 words, 16 4-grams: dog-cup-dog-cup, cup-dog-cup-dog, dog-cup-dog-cat... three different ones.
    assert both.repetition.value == pytest.approx(1 - 3 / 16)


def test_nothing_divides_by_zero() -> None:
    found = Chair({1: [], 2: []}, MATCHER).judge({1: "", 2: " "})
    assert found.chair_s.value == 0.0 and found.chair_s.n == 2
    for name in ("chair_i", "recall", "precision", "f1", "repetition"):
        estimate = found.figures[name]
        assert math.isnan(estimate.value) and math.isnan(estimate.low) and math.isnan(estimate.high), name
        assert estimate.n == (2 if name == "f1" else 0)
    assert found.empty.value == found.without_objects.value == 1.0
    wrong = Chair({1: ["dog"]}, MATCHER).judge({1: "a cat"})
    assert (wrong.precision.value, wrong.recall.value, wrong.f1.value) == (0.0, 0.0, 0.0)
    # One image has no interval.
    assert math.isnan(wrong.chair_i.low)


def test_images_are_resampled_with_all_their_captions() -> None:
    truth = {1: ["dog"], 2: ["dog"]}
    found = Chair(truth, MATCHER).judge({1: ["a dog", "the dog"], 2: ["a cat", "one cat"]})
    assert (found.chair_i.value, found.chair_i.low, found.chair_i.high) == (0.5, 0.0, 1.0)
    assert found.n_captions == 4 and found.n_images == 2
    pairs = [(1, "a dog"), (2, "a cat"), (1, "the dog"), (2, "one cat")]
    again = Chair(truth, MATCHER).judge(pairs)
    assert repr(again.figures) == repr(found.figures)  # NaN is not equal to itself.


def test_seeds_and_levels() -> None:
    rng = np.random.default_rng(0)
    truth = {k: ["dog"] for k in range(60)}
    captions = {k: " ".join(rng.choice(["dog", "cat", "cup"], size=rng.integers(1, 6))) for k in range(60)}
    one = Chair(truth, MATCHER).judge(captions)
    assert one.figures == Chair(truth, MATCHER).judge(captions).figures
    assert one.chair_i != Chair(truth, MATCHER, seed=1).judge(captions).chair_i
    narrow = Chair(truth, MATCHER, level=0.5).judge(captions).chair_i
    assert one.chair_i.low < narrow.low < narrow.value < narrow.high < one.chair_i.high
    # The interval is about that of a proportion of independent captions.
    rate = one.chair_s.value
    width = 1.96 * math.sqrt(rate * (1 - rate) / 60)
    assert one.chair_s.high - one.chair_s.low == pytest.approx(2 * width, rel=0.2)


def test_unknown_images() -> None:
    with pytest.raises(ProbeError, match=r"got 2 unknown image ids \('1', 9\); are they of the same kind"):
        Chair(TRUTH, MATCHER).judge([(1, "a dog"), ("1", "a dog"), (9, "a dog"), (9, "a cat")])
    found = Chair(TRUTH, MATCHER, missing="empty").judge({1: "a dog", 9: "a dog"})
    assert found.n_unknown == 1 and found.chair_i.value == 0.5 and [row.known for row in found.rows] == [True, False]


def test_first_words() -> None:
    chair = Chair(TRUTH, MATCHER)
    found = chair.judge(CAPTIONS, max_words=5)
    assert [row.text for row in found.rows] == [
        "A dog and a cat.",
        "A fork beside a knife",
        "",
        "What a nice picture of",
    ]
    assert found.words.value == (5 + 5 + 0 + 5) / 4 and found.chair_i.value == 2 / 4
    # A name that is cut in two is no other name: "hot" of "hot dog", and no dog either.
    (row,) = chair.judge({1: " a  cup,  hot dog  "}, max_words=3).rows
    assert row.text == " a  cup,  hot" and [m.name for m in row.mentions] == ["cup"] and row.words == 3
    (whole,) = chair.judge({1: " a  cup,  hot dog  "}, max_words=4).rows
    assert [m.name for m in whole.mentions] == ["cup", "hot dog"]
    assert whole.first(0).words == 0 and whole.first(0).mentions == ()


def test_frontier() -> None:
    found = frontier(Chair(TRUTH, MATCHER).judge(CAPTIONS).rows, [2, 5, 100])
    assert [found[n].recall.value for n in (2, 5, 100)] == [2 / 4, 2 / 4, 2 / 4]
    assert [found[n].chair_i.value for n in (2, 5, 100)] == [0.0, 2 / 4, 3 / 6]
    assert found[2].words.value == (2 + 2 + 0 + 2) / 4
    with pytest.raises(ProbeError, match="words must be numbers from 1 on"):
        frontier(Chair(TRUTH, MATCHER).judge(CAPTIONS).rows, [0])


def judged(captions: dict[int, str]) -> ChairResult:
    truth = {1: ["dog", "cup"], 2: ["fork", "knife"], 3: ["cat"]}
    return Chair(truth, MATCHER).judge(captions)


def test_compare_is_paired() -> None:
    a = judged({1: "dog", 2: "fork cat", 3: "cup"})
    b = judged({3: "cat", 2: "fork", 1: "dog"})
    found = compare(a.rows, b.rows)
    assert repr(found.a.figures) == repr(a.figures) and found.n_left_out == 0
    # CHAIR_I 2 of 4 against 0 of 3.
    assert found.differences["chair_i"].value == 0.5 and found.differences["chair_i"].n == 3
    assert found.differences["recall"].value == pytest.approx(2 / 5 - 3 / 5)
    same = compare(a.rows, a.rows).differences
    assert all((d.value, d.low, d.high) == (0, 0, 0) for name, d in same.items() if name != "repetition")
    assert math.isnan(same["repetition"].value)  # No caption has four words.


def test_matched_on_words() -> None:
    a = judged({1: "a dog, a cat and a fork", 2: "a fork", 3: ""})
    b = judged({1: "a dog, a cup", 2: "a fork and a cup and a dog", 3: "a cat"})
    found = matched(a.rows, b.rows)
    assert [row.text for row in found.a.rows] == ["a dog, a cat", "a fork", ""]
    assert [row.text for row in found.b.rows] == ["a dog, a cup", "a fork", ""]
    assert found.differences["words"].value == 0 and found.differences["chair_i"].value == 1 / 3


def test_matched_on_recall() -> None:
    a = judged({1: "a cat, a dog, a fork, a cup, a knife", 2: "a knife", 3: "a dog"})
    b = judged({1: "a cup and a knife", 2: "a cat, a fork, a knife", 3: "a cat"})
    found = matched(a.rows, b.rows, on="recall")
    # One hit each: what comes behind it goes. Image 3, where a has no hit, is left out.
    assert [row.text for row in found.a.rows] == ["a cat, a dog", "a knife"]
    assert [row.text for row in found.b.rows] == ["a cup", "a cat, a fork"]
    assert found.n_left_out == 1 and found.differences["recall"].value == 0
    assert found.a.recall.value == found.b.recall.value == 2 / 4
    assert found.a.chair_i.value == 1 / 3 and found.b.chair_i.value == 1 / 3


def test_bad_comparisons() -> None:
    a = judged({1: "dog", 2: "fork"})
    with pytest.raises(ProbeError, match="of the same images, got 1 of one only, first 2"):
        compare(a.rows, judged({1: "dog"}).rows)
    with pytest.raises(ProbeError, match="as many captions an image, got 1 and 2 for 1"):
        compare(judged({1: "dog"}).rows, judged({1: "dog"}).rows * 2)
    with pytest.raises(ProbeError, match="judged by one truth, got two for image 1"):
        compare(judged({1: "dog"}).rows, Chair({1: ["cat"]}, MATCHER).judge({1: "dog"}).rows)
    with pytest.raises(ProbeError, match=r"on must be one of \('words', 'recall'\), got 'length'"):
        matched(a.rows, a.rows, on="length")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ProbeError, match="in at least one pair of captions"):
        matched(judged({1: "cat"}).rows, a.rows[:1], on="recall")


def test_bad_arguments() -> None:
    chair = Chair(TRUTH, MATCHER)
    for captions in ({}, []):
        with pytest.raises(ProbeError, match="captions must be at least one caption, got none"):
            chair.judge(captions)
    with pytest.raises(ProbeError, match="at least one an image, '' where it is empty, got none for 2"):
        chair.judge({1: "a dog", 2: []})
    with pytest.raises(ProbeError, match="a caption must be a text, got None for image 1"):
        chair.judge([(1, None)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ProbeError, match="max_words must be at least 1, got 0"):
        chair.judge(CAPTIONS, max_words=0)
    with pytest.raises(ProbeError, match="rows must be at least one caption"):
        summarise([])
    with pytest.raises(ProbeError, match="lineage must be one of"):
        Chair(TRUTH, MATCHER, lineage="vhr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ProbeError, match="missing must be one of"):
        Chair(TRUTH, MATCHER, missing="skip")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ProbeError, match="a collection of names an image, got 'dog' for 1"):
        Chair({1: "dog"}, MATCHER)
    with pytest.raises(ProbeError, match=r"names that the matcher knows, got \['zebra'\] for 1"):
        Chair({1: ["zebra", "dog"]}, MATCHER)
    # Any function will do; then nothing is known of its names.
    assert Chair({1: ["zebra"]}, lambda _: []).judge({1: "a zebra"}).without_objects.value == 1.0
