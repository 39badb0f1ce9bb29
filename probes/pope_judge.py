"""Judging answers to yes/no questions about objects (:func:`judge_pope`), as words and by margins."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from probes.intervals import LEVEL, RESAMPLES, Estimate, Floats, Statistic, bootstrap, ratio, unit_index
from probes.pope import Question
from probes.samples import ProbeError

Rule = Literal["official", "strict"]
Answer = Literal["yes", "no", "invalid"]
Bools = NDArray[np.bool_]

FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio", "invalid", "empty")
MARGIN_FIGURES = ("auroc", "d_prime", "criterion")


@dataclass(frozen=True)
class PopeRow:
    """One question with its answer.

    Attributes:
        question: the question.
        answer: the text; None where only a margin was given.
        said: what it was taken for.
        margin: log p(yes) - log p(no) in nats, or None.
    """

    question: Question
    answer: str | None
    said: Answer
    margin: float | None


@dataclass(frozen=True)
class PopeResult:
    """The figures of a set of answers. Positive is yes: precision is of the yes answers, recall of the objects that are there.

    Attributes:
        figures: name to estimate, each with an interval that resamples images:
            ``accuracy``, ``yes_ratio``, ``invalid`` and ``empty`` of all questions; ``precision`` of the yes answers (NaN
            without any); ``recall`` of the questions with label yes; ``f1`` (NaN where precision or recall is; n questions).
            An invalid answer is wrong and no yes. With margins: ``auroc`` (chance that an object that is there has the larger
            margin, ties half), ``d_prime`` = z(H) - z(F) and ``criterion`` = -(z(H) + z(F)) / 2 at margin 0, with
            H = (hits + .5) / (positives + 1) and F = (false alarms + .5) / (negatives + 1), the log-linear correction
            (Hautus 1995); a criterion below 0 leans to yes. NaN without positives or negatives; n questions.
        rows: question by question; empty for an average.
        n_invalid: answers that are neither yes nor no (rule "strict").
        n_empty: answers without a word. The official rule takes them for yes.
        n_images: how many images.
    """

    figures: dict[str, Estimate]
    rows: tuple[PopeRow, ...]
    n_invalid: int
    n_empty: int
    n_images: int

    def __getitem__(self, name: str) -> Estimate:
        return self.figures[name]


def parse_answer(text: str, rule: Rule = "official") -> Answer:
    """What an answer says.

    - "official" (POPE's evaluate.py): of the text before the first ".", without commas, cut at spaces: no if one of the words
      is "No", "not" or "no", **else yes**, also for an empty or garbled answer, "NO" or "None".
    - "strict": the first word, in any case and without punctuation, is yes or no, else invalid.

    Raises:
        ProbeError: an unknown rule.
    """
    if rule == "official":
        words = text.split(".", 1)[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"} & set(words) else "yes"
    if rule != "strict":
        raise ProbeError(f"rule must be one of {get_args(Rule)}, got {rule!r}")
    first = re.search(r"\w+", text)
    word = first[0].casefold() if first else ""
    return "yes" if word == "yes" else "no" if word == "no" else "invalid"


def judge_pope(
    questions: Sequence[Question],
    answers: Sequence[str] | Mapping[int, str] | None = None,
    *,
    margins: Sequence[float] | None = None,
    rule: Rule = "official",
    n_resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> PopeResult:
    """Judge answers.

    Args:
        questions: of :meth:`probes.pope.Pope.build` or :func:`probes.pope.read_questions`.
        answers: a text a question, in their order or by question id. None: yes where the margin is above 0.
        margins: log p(yes) - log p(no) in nats, one a question.
        rule: see :func:`parse_answer`.
        n_resamples: see :func:`probes.intervals.bootstrap`, as are ``level`` and ``seed``.

    Raises:
        ProbeError: neither answers nor margins, not one a question, an answer that is no text, a margin that is not finite.
    """
    if not questions:
        raise ProbeError("questions must be at least one, got none")
    if isinstance(answers, Mapping):
        if without := [q.question_id for q in questions if q.question_id not in answers]:
            raise ProbeError(f"answers must be one a question, got none for {len(without)}, first {without[0]}")
        answers = [answers[q.question_id] for q in questions]
    if answers is None and margins is None:
        raise ProbeError("answers or margins must be given, got neither")
    for name, given in (("answers", answers), ("margins", margins)):
        if given is not None and len(given) != len(questions):
            raise ProbeError(f"{name} must be one a question ({len(questions)}), got {len(given)}")
    if margins is not None and (bad := int((~np.isfinite(np.asarray(margins, dtype=np.float64))).sum())):
        raise ProbeError(f"margins must be finite, got NaN or infinity for {bad} questions")
    rows: list[PopeRow] = []
    for n, question in enumerate(questions):
        margin = None if margins is None else float(margins[n])
        text = None if answers is None else answers[n]
        if answers is not None and not isinstance(text, str):
            raise ProbeError(f"an answer must be a text, got {text!r} for question {question.question_id}")
        said = parse_answer(text, rule) if text is not None else "yes" if margin is not None and margin > 0 else "no"
        rows.append(PopeRow(question, text, said, margin))
    return _result([rows], rows, n_resamples=n_resamples, level=level, seed=seed)


def average_splits(
    results: Sequence[PopeResult], *, n_resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> PopeResult:
    """The mean of each figure over several results (POPE's three splits), with intervals that draw the same images for all.

    Raises:
        ProbeError: no results, or margins in some of them only.
    """
    groups = [list(result.rows) for result in results]
    if not groups or not all(groups):
        raise ProbeError("results must be at least one result of judge_pope, with its rows")
    if len({tuple(result.figures) for result in results}) > 1:
        raise ProbeError("results must all have margins or none of them")
    return _result(groups, [], n_resamples=n_resamples, level=level, seed=seed)


def _result(
    groups: list[list[PopeRow]], keep: list[PopeRow], *, n_resamples: int, level: float, seed: int
) -> PopeResult:
    units, _ = unit_index([row.question.image for rows in groups for row in rows])
    number = {image: k for k, image in enumerate(units)}
    statistics = [_statistic(rows, number) for rows in groups]
    found = bootstrap(
        lambda w: np.mean([statistic(w) for statistic in statistics], axis=0),
        len(units),
        n_resamples=n_resamples,
        level=level,
        seed=seed,
        width=max(len(rows) for rows in groups),
    )
    rows = [row for group in groups for row in group]
    n, n_yes = len(rows), sum(row.said == "yes" for row in rows)
    counts = dict.fromkeys((*FIGURES, *MARGIN_FIGURES), n)
    counts |= {"precision": n_yes, "recall": sum(row.question.label for row in rows)}
    names = FIGURES if rows[0].margin is None else (*FIGURES, *MARGIN_FIGURES)
    return PopeResult(
        {name: found.estimate(k, counts[name]) for k, name in enumerate(names)},
        tuple(keep),
        sum(row.said == "invalid" for row in rows),
        sum(_is_empty(row) for row in rows),
        len(units),
    )


def _statistic(rows: list[PopeRow], number: Mapping[Hashable, int]) -> Statistic:
    """Weights of images ``[resample, image]`` to figures ``[resample, figure]``."""
    image = np.array([number[row.question.image] for row in rows], dtype=np.int64)
    label = np.array([row.question.label for row in rows])
    said = np.array([row.said for row in rows])
    yes, no = said == "yes", said == "no"
    columns = [label, yes, label & yes, ~label & no, said == "invalid", np.array([_is_empty(row) for row in rows])]
    sums = np.zeros((len(number), len(columns) + 1))
    np.add.at(sums, image, np.stack([*columns, np.ones_like(label)], axis=1).astype(np.float64))
    margins = None if rows[0].margin is None else np.array([row.margin for row in rows], dtype=np.float64)

    def statistic(weights: Floats) -> Floats:
        there, said_yes, hits, rejections, invalid, empty, n = (weights @ sums).T
        precision, recall = ratio(hits, said_yes), ratio(hits, there)
        f1 = np.where((said_yes > 0) & (there > 0), ratio(2 * hits, said_yes + there), np.nan)
        figures = [
            ratio(hits + rejections, n), precision, recall, f1, ratio(said_yes, n), ratio(invalid, n), ratio(empty, n),
        ]  # fmt: skip
        if margins is not None:
            by_question = weights[:, image]
            figures += [auroc(margins, label, by_question), *detection(margins > 0, label, by_question)]
        return np.stack(figures, axis=1)

    return statistic


def auroc(margins: Floats, label: Bools, weights: Floats) -> Floats:
    """Area under the ROC curve ``[resample]``: P(margin of a positive > of a negative) + P(equal) / 2; NaN without one of them.

    Args:
        margins: ``[question]``, finite.
        label: ``[question]``, True for positives.
        weights: how often each question counts, ``[resample, question]``.
    """
    order = np.argsort(margins, kind="stable")
    edges = np.flatnonzero(np.diff(margins[order], prepend=-np.inf))
    sorted_weights, positive = weights[:, order], label[order]
    # Per distinct margin, from the lowest.
    above = np.add.reduceat(sorted_weights * positive, edges, axis=1)
    below = np.add.reduceat(sorted_weights * ~positive, edges, axis=1)
    wins = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
    return ratio(wins, above.sum(axis=1) * below.sum(axis=1))


def detection(yes: Bools, label: Bools, weights: Floats) -> tuple[Floats, Floats]:
    """d' and criterion c, ``[resample]`` each, with the log-linear correction; see :class:`PopeResult`.

    Args:
        yes: ``[question]``: the decision.
        label: ``[question]``: the truth.
        weights: ``[resample, question]``.
    """
    positives, negatives = weights @ label, weights @ ~label
    hit = _z((weights @ (yes & label) + 0.5) / (positives + 1))
    alarm = _z((weights @ (yes & ~label) + 0.5) / (negatives + 1))
    there = (positives > 0) & (negatives > 0)
    return np.where(there, hit - alarm, np.nan), np.where(there, -(hit + alarm) / 2, np.nan)


def _z(share: Floats) -> Floats:
    """The standard normal quantile; few of its arguments are different, for they are ratios of counts."""
    values, where = np.unique(share, return_inverse=True)
    normal = NormalDist()
    return np.array([normal.inv_cdf(v) for v in values])[where.reshape(share.shape)]


def _is_empty(row: PopeRow) -> bool:
    return row.answer is not None and not row.answer.strip()
