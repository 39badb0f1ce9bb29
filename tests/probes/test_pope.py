"""POPE: the building rule, the official files, both parsing rules, hand-computed figures."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from probes.pope import (
    SPLITS,
    Pope,
    Question,
    read_answers,
    read_questions,
    with_suffix,
    write_answers,
    write_questions,
)
from probes.pope_judge import auroc, average_splits, judge_pope, parse_answer
from probes.samples import ProbeError

# In most images first: a (6), b (5), c (4), d, e (3), f (2), g (1).
TRUTH = {
    "1.jpg": ("a", "b", "c"),
    "2.jpg": ("c", "a", "b", "d"),
    "3.jpg": ("a", "e", "d"),
    "4.jpg": ("b", "a", "f"),
    "5.jpg": ("e", "c", "b"),
    "6.jpg": ("a", "g"),
    "7.jpg": ("d", "e", "a", "b", "c"),
    "8.jpg": ("f",),
}


def asked(questions: list[Question], image: str) -> list[tuple[str, bool]]:
    return [(q.object, q.label) for q in questions if q.image == image]


def test_every_split_is_built_by_its_rule() -> None:
    probe = Pope(TRUTH, n=5, per_image=2, seed=3, template="Is there a {} in the image?")
    counts = Counter(name for objects in TRUTH.values() for name in objects)
    together = {a: Counter(b for objects in TRUTH.values() if a in objects for b in objects if b != a) for a in counts}
    built = {split: probe.build(split) for split in SPLITS}
    for split, questions in built.items():
        assert [q.question_id for q in questions] == list(range(1, 21))
        assert [q.label for q in questions] == [True, False] * 10
        images = list(dict.fromkeys(q.image for q in questions))
        assert len(images) == 5 and "8.jpg" not in images
        for image in images:
            pairs = asked(questions, image)
            used = set(TRUTH[image])
            for (present, _), (absent, _) in zip(pairs[::2], pairs[1::2], strict=True):
                assert absent not in used
                free = {name for name in counts if name not in used}
                if split == "popular":
                    assert counts[absent] == max(counts[name] for name in free)
                if split == "adversarial":
                    best = max(together[present][name] for name in free)
                    fallback = next(q.fallback for q in questions if (q.image, q.object) == (image, absent))
                    assert fallback == (best == 0)
                    assert fallback or together[present][absent] == best
                used.add(absent)
            assert [present for present, _ in pairs[::2]] == list(TRUTH[image][:2])
        assert probe.build(split) == questions
    assert len({tuple(q.image for q in questions) for questions in built.values()}) == 1
    assert built["random"] != Pope(TRUTH, n=5, per_image=2, seed=4).build("random")


def test_popular_and_adversarial_by_hand() -> None:
    probe = Pope(TRUTH, n=7, per_image=2)
    popular = probe.build("popular")
    assert asked(popular, "1.jpg") == [("a", True), ("d", False), ("b", True), ("e", False)]
    assert asked(popular, "6.jpg") == [("a", True), ("b", False), ("g", True), ("c", False)]
    adversarial = probe.build("adversarial")
    # With a, of those not in image 1: d 3, e 2, f 1, g 1. Then with b: d is used; e 2.
    assert asked(adversarial, "1.jpg") == [("a", True), ("d", False), ("b", True), ("e", False)]
    # With a: b 4. With g only a stands, which is in the image: one at random, and it says so.
    six = [q for q in adversarial if q.image == "6.jpg"]
    assert six[1].object == "b" and not six[1].fallback and six[3].fallback and six[3].object in "cdef"
    # Image 7 has all objects that ever stood with d or e, twice.
    assert Counter(q.image for q in adversarial if q.fallback) == {"6.jpg": 1, "7.jpg": 2}
    assert not any(q.fallback for q in popular)


def test_random_negatives_are_uniform() -> None:
    truth = dict.fromkeys(range(400), ("x", "y", "z")) | {1000: tuple("abcdef")}
    found = Counter(q.object for q in Pope(truth, n=400, per_image=3, seed=0).build("random") if not q.label)
    assert set(found) >= set("abcdef")
    # 1200 draws of six objects without replacement within an image: 200 each, standard deviation 10.
    assert all(150 < found[name] < 250 for name in "abcdef")


def test_positives_of_unordered_images_are_drawn() -> None:
    truth = {k: frozenset("abcdef") for k in range(100)} | {1000: frozenset("ghi")}
    found = Counter(q.object for q in Pope(truth, n=100).build("random") if q.label)
    assert set(found) == set("abcdefghi") - set("ghi") or set(found) == set("abcdefghi")
    assert max(found.values()) < 80
    ordered = {k: tuple("abcdef") for k in range(100)} | {1000: tuple("ghi")}
    assert {q.object for q in Pope(ordered, n=100).build("random") if q.label} <= set("abcghi")
    drawn = {q.object for q in Pope(ordered, n=100, positives="random").build("random") if q.label}
    assert drawn >= set("abcdef")


def test_a_vocabulary_adds_objects_nobody_has() -> None:
    truth = {1: ("a", "b", "c")}
    with pytest.raises(
        ProbeError, match="must have n = 1 images with at least 3 objects and 3 of the 3 objects absent, got 0 of 1"
    ):
        Pope(truth, n=1).build("random")
    questions = Pope(truth, n=1, vocabulary=("d", "e", "f", "a")).build("popular")
    assert [q.object for q in questions] == ["a", "d", "b", "e", "c", "f"]
    assert all(q.fallback for q in Pope(truth, n=1, vocabulary=("d", "e", "f")).build("adversarial") if not q.label)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dog", "Is there a dog in the image?"),
        ("apple", "Is there an apple in the image?"),
        ("umbrella", "Is there an umbrella in the image?"),
        ("Oven", "Is there an Oven in the image?"),
        ("unicorn", "Is there a unicorn in the image?"),
        ("ukulele", "Is there a ukulele in the image?"),
        ("hourglass", "Is there an hourglass in the image?"),
        ("onion", "Is there an onion in the image?"),
        ("house", "Is there a house in the image?"),
        ("utensil", "Is there a utensil in the image?"),
        ("urn", "Is there an urn in the image?"),
    ],
)
def test_articles(name: str, text: str) -> None:
    # "image" keeps its letters: the original's replace("a", "an") gave "imange".
    assert Pope(TRUTH).ask(name) == text


def test_templates() -> None:
    assert Pope(TRUTH, template="A {}?").ask("apple") == "An apple?"
    assert Pope(TRUTH, template="Any {} here?").ask("apple") == "Any apple here?"
    assert with_suffix([Question(1, "x", "Is it?", True)], " Yes or no?")[0].text == "Is it? Yes or no?"


def test_bad_probes() -> None:
    with pytest.raises(ProbeError, match="template must have one {}"):
        Pope(TRUTH, template="Is there a dog?")
    with pytest.raises(ProbeError, match="n and per_image must be at least 1"):
        Pope(TRUTH, n=0)
    with pytest.raises(ProbeError, match="positives must be one of"):
        Pope(TRUTH, positives="last")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ProbeError, match="split must be one of .* got 'hard'"):
        Pope(TRUTH).build("hard")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ProbeError, match=r"n = 500 images with at least 3 objects and 3 of the 7 objects absent, got 5 of 8"
    ):
        Pope(TRUTH).build("random")
    with pytest.raises(ProbeError, match="got a text for 1"):
        Pope({1: "dog"})


OFFICIAL = (
    '{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?", "label": "yes"}\n'
    '{"question_id": 2, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dining table in the image?", "label": "no"}\n'
    "\n"
)


def test_official_files(tmp_path: Path) -> None:
    path = tmp_path / "coco_pope_random.json"
    path.write_text(OFFICIAL, encoding="utf-8")
    questions = read_questions(path)
    image = "COCO_val2014_000000310196.jpg"
    assert questions == [
        Question(1, image, "Is there a snowboard in the image?", label=True),
        Question(2, image, "Is there a dining table in the image?", label=False),
    ]
    write_questions(tmp_path / "again.json", questions)
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == OFFICIAL.removesuffix("\n")
    write_answers(tmp_path / "answers.json", questions, ["Yes, \u2028 there is.", ""], [1.5, -2.0])
    lines = [json.loads(line) for line in (tmp_path / "answers.json").read_text(encoding="utf-8").strip().split("\n")]
    assert lines[0] == {
        "question_id": 1, "question": "Is there a snowboard in the image?", "answer": "Yes, \u2028 there is.", "margin": 1.5,
    }  # fmt: skip
    assert read_answers(tmp_path / "answers.json", questions[::-1]) == ["", "Yes, \u2028 there is."]
    # Without ids, as the official code writes them, line by line.
    (tmp_path / "plain.json").write_text(
        '{"question": "a", "answer": "yes"}\n{"question": "b", "answer": "no"}', encoding="utf-8"
    )
    assert read_answers(tmp_path / "plain.json", questions) == ["yes", "no"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"question_id": 1, "image": "x", "text": "t", "label": "maybe"}',
            "label must be yes or no, got 'maybe' in line 1",
        ),
        ('{"question_id": 1, "image": "x", "label": "no"}', r"a question must have \['text'\], got .* in line 1"),
        ('{"question_id": 1, "image": "x", "te', "line 1 of .* must be one JSON object, and is damaged"),
        ("[1]", "line 1 of .* must be one JSON object, got a list"),
        (
            '{"question_id": "1", "image": "x", "text": "t", "label": "no"}',
            "question_id must be a whole number of its own, got '1'",
        ),
        (
            '{"question_id": 1, "image": null, "text": "t", "label": "no"}',
            "image and text must be texts, got None, 't'",
        ),
        ("", "must have at least one question"),
    ],
)
def test_damaged_questions(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.json"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ProbeError, match=message):
        read_questions(path)


def test_damaged_answers(tmp_path: Path) -> None:
    questions = [Question(1, "x", "t", label=True), Question(2, "x", "u", label=False)]
    path = tmp_path / "answers.json"
    for text, message in (
        ('{"question_id": 1, "answer": "yes"}', "answers must be one a question, got none for 1, first 2"),
        ('{"answer": "yes"}', r"answers must be one a question \(2\), got 1"),
        ('{"answer": 1}', "answer must be a text, got 1 in line 1"),
        (
            '{"question_id": 1, "answer": "a"}\n{"question_id": 1, "answer": "b"}',
            "question_id must come once, got 2 lines with 1",
        ),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ProbeError, match=message):
            read_answers(path, questions)
    with pytest.raises(ProbeError, match="readable jsonl"):
        read_questions(tmp_path / "none.json")
    with pytest.raises(ProbeError, match=r"margins must be one a question \(2\), got 1"):
        write_answers(path, questions, ["yes", "no"], [1.0])


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("Yes, there is a dog.", "yes", "yes"),
        ("No, there is no dog.", "no", "no"),
        ("no", "no", "no"),
        ("There is not a dog.", "no", "invalid"),
        ("Yes. No, wait.", "yes", "yes"),  # Only what stands before the first full stop.
        ("NO", "yes", "no"),  # The official rule knows No, not and no.
        ("None", "yes", "invalid"),
        ("no!", "yes", "no"),  # It does not take off other marks.
        ("I do not know", "no", "invalid"),
        ("Well, no,", "no", "invalid"),
        ("**Yes**", "yes", "yes"),
        ("", "yes", "invalid"),
        (" ", "yes", "invalid"),
        ("...", "yes", "invalid"),
        ("gibberish", "yes", "invalid"),
        ("Yesterday", "yes", "invalid"),
    ],
)
def test_parsing_rules(text: str, official: str, strict: str) -> None:
    assert parse_answer(text) == official and parse_answer(text, "strict") == strict


def questions_of(labels: str, images: str | None = None) -> list[Question]:
    return [
        Question(n, (images or labels)[n] + str(n if not images else ""), "?", label=x == "y")
        for n, x in enumerate(labels)
    ]


def test_figures_by_hand() -> None:
    questions = questions_of("yyyynnnn")
    answers = ["Yes", "Yes", "Yes", "No", "Yes", "No", "", "maybe"]
    found = judge_pope(questions, answers)
    # The official rule: the last two are yes. TP 3, FP 3, TN 1, FN 1.
    assert found["accuracy"].value == 4 / 8 and found["precision"].value == 3 / 6 and found["recall"].value == 3 / 4
    assert found["f1"].value == pytest.approx(2 * 0.5 * 0.75 / 1.25) and found["yes_ratio"].value == 6 / 8
    assert (found["precision"].n, found["recall"].n, found["accuracy"].n) == (6, 4, 8)
    assert (found.n_empty, found.n_invalid, found["empty"].value, found["invalid"].value) == (1, 0, 1 / 8, 0.0)
    strict = judge_pope(questions, answers, rule="strict")
    # Two are neither: wrong, and no yes. TP 3, FP 1, TN 1.
    assert strict["accuracy"].value == 4 / 8 and strict["precision"].value == 3 / 4 and strict["recall"].value == 3 / 4
    assert strict["yes_ratio"].value == 4 / 8 and strict.n_invalid == 2 and strict["invalid"].value == 2 / 8
    assert [row.said for row in strict.rows[-2:]] == ["invalid", "invalid"] and "auroc" not in strict.figures
    by_id = {q.question_id: a for q, a in zip(questions, answers, strict=True)}
    assert judge_pope(questions, by_id).figures == found.figures


def test_margins_by_hand() -> None:
    questions = questions_of("yyynnnn")
    margins = [2.0, 0.5, -1.0, 0.5, -1.0, -2.0, -3.0]
    found = judge_pope(questions, margins=margins)
    # Pairs of 3 x 4: 2.0 beats all 4; 0.5 beats 3 and ties 1; -1.0 beats 2 and ties 1.
    assert found["auroc"].value == pytest.approx((4 + 3.5 + 2.5) / 12)
    hit, alarm = (NormalDist().inv_cdf(x) for x in ((2 + 0.5) / (3 + 1), (1 + 0.5) / (4 + 1)))
    assert found["d_prime"].value == pytest.approx(hit - alarm) and found["criterion"].value == pytest.approx(
        -(hit + alarm) / 2
    )
    # Without answers the margins decide: yes to 2.0, 0.5 and the negative 0.5.
    assert found["accuracy"].value == 5 / 7 and found["yes_ratio"].value == 3 / 7 and found.n_empty == 0
    spoken = judge_pope(questions, ["no"] * 7, margins=margins)
    assert spoken["yes_ratio"].value == 0 and spoken["auroc"] == found["auroc"]
    assert math.isnan(spoken["precision"].value) and math.isnan(spoken["f1"].value) and spoken["precision"].n == 0


def test_perfect_answers_have_a_finite_d_prime_and_bias_has_its_sign() -> None:
    questions = questions_of("yyyynnnn")
    perfect = judge_pope(questions, margins=[1.0] * 4 + [-1.0] * 4)
    assert perfect["d_prime"].value == pytest.approx(2 * NormalDist().inv_cdf(0.9)) and perfect["auroc"].value == 1
    assert perfect["criterion"].value == pytest.approx(0)
    eager = judge_pope(questions, margins=[1.0] * 8)
    assert eager["criterion"].value < 0 and eager["d_prime"].value == pytest.approx(0) and eager["auroc"].value == 0.5
    shy = judge_pope(questions, margins=[0.0] * 8)
    assert shy["criterion"].value == pytest.approx(-eager["criterion"].value) and shy["yes_ratio"].value == 0


def test_one_kind_of_question_only() -> None:
    found = judge_pope(questions_of("yyy"), ["No", "No", "No"], margins=[-1.0, 1.0, 2.0])
    for name in ("precision", "f1", "auroc", "d_prime", "criterion"):
        assert math.isnan(found[name].value) and math.isnan(found[name].low)
    assert found["recall"].value == 0
    negatives = judge_pope(questions_of("nn"), ["Yes", "No"])
    assert math.isnan(negatives["recall"].value) and negatives["recall"].n == 0 and negatives["precision"].value == 0


def test_auroc_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    margins, label = rng.integers(-4, 5, size=60).astype(float), rng.random(60) < 0.4
    weights = rng.integers(0, 4, size=(5, 60)).astype(float)
    for row, found in zip(weights, auroc(margins, label, weights), strict=True):
        wins = pairs = 0.0
        for i in np.flatnonzero(label):
            for j in np.flatnonzero(~label):
                pairs += row[i] * row[j]
                wins += row[i] * row[j] * ((margins[i] > margins[j]) + 0.5 * (margins[i] == margins[j]))
        assert found == pytest.approx(wins / pairs)


def test_images_are_resampled() -> None:
    questions = questions_of("ynyn", "aabb")
    found = judge_pope(questions, ["Yes", "No", "No", "Yes"])
    assert (
        found["accuracy"].value == 0.5
        and (found["accuracy"].low, found["accuracy"].high) == (0, 1)
        and found.n_images == 2
    )
    # By margins: one image twice is all right, the other twice all wrong.
    margins = judge_pope(questions, margins=[1.0, -1.0, -1.0, 1.0])
    assert margins["auroc"].value == 0.5 and (margins["auroc"].low, margins["auroc"].high) == (0, 1)
    assert margins["d_prime"].high == pytest.approx(2 * NormalDist().inv_cdf(2.5 / 3)) == -margins["d_prime"].low
    # Drawn with their questions as one: of independent questions the interval is narrower.
    many = questions_of("yn" * 40, "".join(chr(200 + k // 8) for k in range(80)))
    wrong = [q.image in {chr(200), chr(201), chr(202)} for q in many]
    answers = ["Yes" if q.label != bad else "No" for q, bad in zip(many, wrong, strict=True)]
    clustered = judge_pope(many, answers)["accuracy"]
    alone = judge_pope(questions_of("yn" * 40), answers)["accuracy"]
    assert clustered.value == alone.value == 0.7
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)


def test_average_over_splits() -> None:
    one = judge_pope(questions_of("ynyn", "aabb"), ["Yes", "No", "Yes", "No"], margins=[1, -1, 1, -1])
    two = judge_pope(questions_of("ynyn", "aabb"), ["Yes", "Yes", "No", "No"], margins=[1, 1, -1, -1])
    mean = average_splits([one, two])
    assert mean["accuracy"].value == 0.75 and mean["f1"].value == pytest.approx((1 + 0.5) / 2)
    assert mean["auroc"].value == pytest.approx((1 + 0.5) / 2) and mean["accuracy"].n == 8 and mean.n_images == 2
    assert mean.rows == ()
    # F1 of the mean is not the mean of F1: pooled it would be 3 / 4 of 8 questions.
    same = average_splits([one, one])
    assert all(same[name] == one[name]._replace(n=same[name].n) for name in one.figures)
    with pytest.raises(ProbeError, match="results must be at least one"):
        average_splits([])
    with pytest.raises(ProbeError, match="with its rows"):
        average_splits([mean])
    with pytest.raises(ProbeError, match="all have margins or none"):
        average_splits([one, judge_pope(questions_of("yn"), ["Yes", "No"])])


def test_bad_answers() -> None:
    questions = questions_of("yn")
    cases: list[tuple[Any, Any, str]] = [
        (None, None, "answers or margins must be given"),
        (["Yes"], None, r"answers must be one a question \(2\), got 1"),
        ({0: "Yes"}, None, "answers must be one a question, got none for 1, first 1"),
        (["Yes", None], None, "an answer must be a text, got None for question 1"),
        (None, [1.0], r"margins must be one a question \(2\), got 1"),
        (None, [1.0, float("nan")], "margins must be finite, got NaN or infinity for 1"),
    ]
    for answers, margins, message in cases:
        with pytest.raises(ProbeError, match=message):
            judge_pope(questions, answers, margins=margins)
    with pytest.raises(ProbeError, match="questions must be at least one"):
        judge_pope([], [])
    with pytest.raises(ProbeError, match="rule must be one of"):
        judge_pope(questions, ["Yes", "No"], rule="loose")  # pyright: ignore[reportArgumentType]
