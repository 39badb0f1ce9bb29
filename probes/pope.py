"""POPE: "Is there a dog in the image?", with objects that are there and objects that are not (:class:`Pope`).

Li et al. 2023, https://arxiv.org/abs/2305.10355; the building rule is that of RUCAIBox/POPE. Answers are judged in
:mod:`probes.pope_judge`.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from probes.samples import ProbeError

Split = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Split, ...] = get_args(Split)
Positives = Literal["first", "random"]

VOWEL_SOUND = re.compile(r"(?!uni|uku|urin|us[eu]|ut[ei]|eu|ewe|one\b)[aeiou]|hour|honest|honou?r|heir")


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        question_id: its number, from 1.
        image: the image's id or file name.
        text: the question.
        label: the object is there.
        object: what is asked for; empty for questions that were read from a file.
        fallback: a negative object that was drawn at random because the split's own rule had none left.
    """

    question_id: int
    image: Hashable
    text: str
    label: bool
    object: str = ""
    fallback: bool = False


@dataclass(frozen=True)
class Pope:
    """Builds questions from the truth, by the official rule.

    Of ``n`` images with at least ``per_image`` objects, ``per_image`` of these are asked for, and behind each of them one
    object that is neither in the image nor was asked for before:

    - random: drawn from all objects;
    - popular: the one that is in most images (of ``truth``);
    - adversarial: the one that most often stands in an image together with the object just asked for; where all of those
      are used up, one at random, and the question's ``fallback`` is True.

    Equal counts are ordered by name. All splits have the same images and the same positive questions.

    Args:
        truth: image id (or file name) to the names of its objects.
        n: images.
        per_image: positive questions an image, and as many negative ones.
        positives: "first" takes the first objects of the image in their order, as the official code does, and draws them
            for an unordered set; "random" always draws.
        template: with ``{}`` for the object; an "a" before it becomes "an" where the object asks for it.
        vocabulary: more objects that may be asked for, beside all those in ``truth``.
        seed: of images, positives and random negatives.
    """

    truth: Mapping[Hashable, Collection[str]]
    n: int = 500
    per_image: int = 3
    positives: Positives = "first"
    template: str = "Is there a {} in the image?"
    vocabulary: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or self.per_image < 1:
            raise ProbeError(f"n and per_image must be at least 1, got {self.n} and {self.per_image}")
        if self.positives not in get_args(Positives):
            raise ProbeError(f"positives must be one of {get_args(Positives)}, got {self.positives!r}")
        if self.template.count("{}") != 1:
            raise ProbeError(f"template must have one {{}} for the object, got {self.template!r}")
        if text := next((image for image, objects in self.truth.items() if isinstance(objects, str)), None):
            raise ProbeError(f"truth must have a collection of names an image, got a text for {text!r}")

    def build(self, split: Split) -> list[Question]:
        """The questions of one split: positive, negative, positive, ... image by image.

        Raises:
            ProbeError: an unknown split, too few images with ``per_image`` objects and as many others to ask for.
        """
        if split not in SPLITS:
            raise ProbeError(f"split must be one of {SPLITS}, got {split!r}")
        counts = Counter(name for objects in self.truth.values() for name in set(objects))
        counts.update(dict.fromkeys(set(self.vocabulary) - counts.keys(), 0))
        popular = _by_count(counts)
        together = self._together() if split == "adversarial" else {}
        rng = random.Random(f"pope {split} {self.seed}")
        questions: list[Question] = []
        for image, present in self._images(len(counts)):
            used = set(self.truth[image])
            for name in present:
                ranked = {"random": [], "popular": popular, "adversarial": together.get(name, [])}[split]
                absent = next((other for other in ranked if other not in used), None)
                fallback = absent is None and split != "random"
                if absent is None:
                    absent = rng.choice([other for other in popular if other not in used])
                used.add(absent)
                number = len(questions) + 1
                questions += [
                    Question(number, image, self.ask(name), label=True, object=name),
                    Question(number + 1, image, self.ask(absent), label=False, object=absent, fallback=fallback),
                ]
        return questions

    def ask(self, name: str) -> str:
        """The question for one object."""
        if VOWEL_SOUND.match(name.casefold()):
            return re.sub(r"\b([Aa])(?= \{\})", r"\1n", self.template).replace("{}", name)
        return self.template.replace("{}", name)

    def _images(self, n_objects: int) -> list[tuple[Hashable, list[str]]]:
        rng = random.Random(f"pope images {self.seed}")
        k = self.per_image
        fit = [image for image, objects in self.truth.items() if k <= len(set(objects)) <= n_objects - k]
        if len(fit) < self.n:
            raise ProbeError(
                f"truth must have n = {self.n} images with at least {k} objects and {k} of the {n_objects} objects absent, "
                f"got {len(fit)} of {len(self.truth)}"
            )
        chosen: list[tuple[Hashable, list[str]]] = []
        for image in rng.sample(fit, self.n):
            objects = self.truth[image]
            ordered = list(dict.fromkeys(objects)) if isinstance(objects, Sequence) else sorted(set(objects))
            draw = self.positives == "random" or not isinstance(objects, Sequence)
            chosen.append((image, rng.sample(ordered, k) if draw else ordered[:k]))
        return chosen

    def _together(self) -> dict[str, list[str]]:
        """For each object, the others that stand in an image with it, most often first."""
        pairs: dict[str, Counter[str]] = {}
        for objects in self.truth.values():
            names = set(objects)
            for name in names:
                pairs.setdefault(name, Counter()).update(names - {name})
        return {name: _by_count(others) for name, others in pairs.items()}


def _by_count(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))


def read_questions(path: str | Path) -> list[Question]:
    """Read the official format: one JSON object a line with ``question_id``, ``image``, ``text`` and ``label`` (yes or no).

    Raises:
        ProbeError: a missing or damaged file, a line that lacks one of these, another label, a question id that comes twice.
    """
    questions: dict[int, Question] = {}
    for n, line in _lines(path):
        missing = [key for key in ("question_id", "image", "text", "label") if key not in line]
        if missing:
            raise ProbeError(f"a question must have {missing}, got {sorted(line)} in line {n} of {path}")
        number, label = line["question_id"], str(line["label"]).strip().casefold()
        if label not in ("yes", "no"):
            raise ProbeError(f"label must be yes or no, got {line['label']!r} in line {n} of {path}")
        if not isinstance(number, int) or number in questions:
            raise ProbeError(f"question_id must be a whole number of its own, got {number!r} in line {n} of {path}")
        if not isinstance(line["image"], str | int) or not isinstance(line["text"], str):
            raise ProbeError(
                f"image and text must be texts, got {line['image']!r}, {line['text']!r} in line {n} of {path}"
            )
        questions[number] = Question(number, line["image"], line["text"], label == "yes")
    if not questions:
        raise ProbeError(f"path must have at least one question, {str(path)!r} has none")
    return list(questions.values())


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Write the official format."""
    _write(
        path,
        [
            {"question_id": q.question_id, "image": q.image, "text": q.text, "label": "yes" if q.label else "no"}
            for q in questions
        ],
    )


def write_answers(
    path: str | Path, questions: Sequence[Question], answers: Sequence[str], margins: Sequence[float] | None = None
) -> None:
    """Write what the official ``evaluate.py`` reads (``question``, ``answer``), with ``question_id`` and margin beside it.

    Raises:
        ProbeError: not one answer (or margin) a question.
    """
    for name, given in (("answers", answers), ("margins", margins)):
        if given is not None and len(given) != len(questions):
            raise ProbeError(f"{name} must be one a question ({len(questions)}), got {len(given)}")
    lines: list[dict[str, Any]] = [
        {"question_id": q.question_id, "question": q.text, "answer": a} for q, a in zip(questions, answers, strict=True)
    ]
    if margins is not None:
        for line, margin in zip(lines, margins, strict=True):
            line["margin"] = float(margin)
    _write(path, lines)


def read_answers(path: str | Path, questions: Sequence[Question]) -> list[str]:
    """The answers of a file, in the order of ``questions``: by ``question_id`` where the lines have one, else by line.

    Raises:
        ProbeError: a missing or damaged file, a question without an answer, a line without a text ``answer``.
    """
    lines = list(_lines(path))
    for n, line in lines:
        if not isinstance(line.get("answer"), str):
            raise ProbeError(f"answer must be a text, got {line.get('answer')!r} in line {n} of {path}")
    if lines and all("question_id" in line for _, line in lines):
        by_id = {line["question_id"]: line["answer"] for _, line in lines}
        if len(by_id) != len(lines):
            raise ProbeError(f"question_id must come once, got {len(lines)} lines with {len(by_id)} ids in {path}")
        if without := [q.question_id for q in questions if q.question_id not in by_id]:
            raise ProbeError(
                f"answers must be one a question, got none for {len(without)}, first {without[0]}, in {path}"
            )
        return [by_id[q.question_id] for q in questions]
    if len(lines) != len(questions):
        raise ProbeError(f"answers must be one a question ({len(questions)}), got {len(lines)} in {path}")
    return [line["answer"] for _, line in lines]


def with_suffix(questions: Iterable[Question], suffix: str) -> list[Question]:
    """The same questions with words behind them (VCD's " Please answer this question with one word.")."""
    return [replace(q, text=q.text + suffix) for q in questions]


def _lines(path: str | Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"path must be a readable jsonl file, got {str(path)!r}: {error}") from error
    # Not splitlines: JSON text may hold a line separator (U+2028), which is no end of line here.
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ProbeError(f"line {n} of {path} must be one JSON object, and is damaged: {error}") from error
        if not isinstance(entry, dict):
            raise ProbeError(f"line {n} of {path} must be one JSON object, got a {type(entry).__name__}")
        yield n, entry


def _write(path: str | Path, lines: Iterable[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
