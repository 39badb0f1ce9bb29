"""POPE as a task: yes/no questions about objects, answered by margins."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from interp.evaluation.forced import forced_margins, maker
from interp.evaluation.tasks import (
    Call,
    Pairs,
    Record,
    Sample,
    SceneImage,
    Statistics,
    Task,
    images,
    needs_images,
    opener,
)
from probes import pope_judge
from probes.coco import read_instances
from probes.intervals import Estimate, bootstrap, unit_index
from probes.margin import MarginItem
from probes.pope import SPLITS, Pope, Question, read_questions
from probes.pope_judge import FIGURES, MARGIN_FIGURES, PopeResult, average_splits, judge_pope
from probes.samples import ProbeError

ANSWERS = (("Yes", "No"), (" Yes", " No"))
"""How a model may write its answers: behind a template that ends in a space, or in none."""


@dataclass(frozen=True)
class PopeTask(Task):
    """Yes/no questions about objects, answered by log p(yes) - log p(no): so accuracy is told from the leaning to yes.

    Args:
        questions: by split; figures are their mean over the splits.
        pictures: image id to what makes the image.
        prompt: with ``{}`` for the question, where no chat template is used.
        chat: use the template; None is the model's own way.
        answers: how the model writes yes and no; None tries the forms of :data:`ANSWERS` on the first question and takes the
            more probable.
        batch: rows of one forward.
        source: where they come from, for the record.
    """

    questions: Mapping[str, Sequence[Question]]
    pictures: Mapping[Hashable, Any]
    prompt: str = "{}"
    chat: bool | None = None
    answers: tuple[str, str] | None = None
    batch: int = 8
    source: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _forms: dict[str, tuple[str, str]] = field(init=False, repr=False, default_factory=dict[str, tuple[str, str]])

    name: ClassVar[str] = "pope"
    primary: ClassVar[str] = "accuracy"
    shown: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "auroc", "d_prime", "criterion", "yes_ratio")
    lower_is_better: ClassVar[tuple[str, ...]] = ("invalid", "empty")

    def __post_init__(self) -> None:
        if not any(self.questions.values()):
            raise ProbeError("questions must be at least one, got none")
        if self.prompt.count("{}") != 1:
            raise ProbeError(f"prompt must have one {{}} for the question, got {self.prompt!r}")
        asked = {q.image for some in self.questions.values() for q in some}
        if without := [i for i in asked if i not in self.pictures]:
            raise ProbeError(
                f"the image of every question must be there, got none for {len(without)}, such as {without[0]!r}"
            )

    def describe(self) -> dict[str, Any]:
        return {"probe": self.name, "prompt": self.prompt, "chat": self.chat, "answers": self.answers, **self.source}

    def check(self, model: Any) -> None:
        needs_images(model, self.name)
        self._forms["found"] = self.answers or self._likelier(model)

    def samples(self, model: Any) -> list[Sample]:
        found = [
            Sample(f"{split} {q.question_id}", q.image, q, maker(self.pictures[q.image]), split)
            for split, some in self.questions.items()
            for q in some
        ]
        order = {image: n for n, image in enumerate(dict.fromkeys(s.unit for s in found))}
        return sorted(found, key=lambda s: order[s.unit])

    def run(self, call: Call, samples: Sequence[Sample]) -> list[Record]:
        pictures = images(call, samples)
        chat = call.model.chat if self.chat is None else self.chat
        yes, no = self._forms["found"]
        items = [
            MarginItem(self.prompt.replace("{}", s.content.text), "", no, yes, picture, s.unit, chat)
            for s, picture in zip(samples, pictures, strict=True)
        ]
        return [{"margin": m} for m in forced_margins(call, items, self.batch)]

    def _likelier(self, model: Any) -> tuple[str, str]:
        question = next(q for some in self.questions.values() for q in some)
        picture = maker(self.pictures[question.image])()
        inputs = model.encode(
            self.prompt.replace("{}", question.text), image=picture, chat=model.chat if self.chat is None else self.chat
        )
        with torch.inference_mode():
            logits: Tensor = model(inputs).logits[0, -1]
        first = [[model.tokenizer(a, add_special_tokens=False)["input_ids"][0] for a in form] for form in ANSWERS]
        return ANSWERS[int(np.argmax([float(logits[ids].logsumexp(0)) for ids in first]))]

    def figures(self, found: Pairs, how: Statistics) -> dict[str, Estimate]:
        results = list(self.results(found, how).values())
        return results[0].figures if len(results) == 1 else average_splits(results, **how.options()).figures

    def results(self, found: Pairs, how: Statistics) -> dict[str, PopeResult]:
        """By split."""
        out: dict[str, PopeResult] = {}
        for split in self.questions:
            mine = [(s, r) for s, r in found if s.group == split]
            if mine:
                options = how.options()
                out[split] = judge_pope([s.content for s, _ in mine], margins=[r["margin"] for _, r in mine], **options)
        return out

    def differences(self, a: Pairs, b: Pairs, how: Statistics) -> dict[str, Estimate]:
        few = Statistics(1, how.level, how.seed)
        sides = [[list(r.rows) for r in self.results(found, few).values()] for found in (a, b)]
        units, _ = unit_index([row.question.image for rows in sides[0] for row in rows])
        number = {unit: n for n, unit in enumerate(units)}
        statistic: Any = pope_judge._statistic  # pyright: ignore[reportPrivateUsage]  # the figures' own sums, drawn for both
        one, two = ([statistic(rows, number) for rows in side] for side in sides)
        found = bootstrap(
            lambda w: np.mean([s(w) for s in one], axis=0) - np.mean([s(w) for s in two], axis=0), len(units),
            width=max(len(rows) for rows in sides[0]), **how.options(),
        )  # fmt: skip
        return {name: found.estimate(k, len(units)) for k, name in enumerate((*FIGURES, *MARGIN_FIGURES))}

    def more(self, found: Pairs, baseline: Pairs, how: Statistics) -> dict[str, Any]:
        few = Statistics(min(how.n_resamples, 500), how.level, how.seed)
        by_split = self.results(found, few)
        return {"splits": {s: {k: list(v) for k, v in r.figures.items()} for s, r in by_split.items()}}

    def values(self, found: Pairs) -> tuple[list[Hashable], list[float]]:
        """Right or wrong, question by question."""
        return [s.unit for s, _ in found], [float((r["margin"] > 0) == s.content.label) for s, r in found]


def scene_pope(
    n: int, *, split: str = "test", seed: int = 0, batch: int = 8, splits: Sequence[str] = SPLITS
) -> PopeTask:
    """POPE on scenes of at least three kinds of objects, six questions an image and split.

    Raises:
        ProbeError: as :class:`probes.pope.Pope`.
    """
    from probes.scenes import NAMES, World

    scenes: list[Any] = []
    for scene in World(split, seed):  # type: ignore[arg-type]
        if len(scenes) == n:
            break
        if len(scene.names) >= 3:
            scenes.append(scene)
    builder = Pope({s.id: s.names for s in scenes}, n=n, seed=seed, vocabulary=tuple(NAMES))
    return PopeTask(
        {s: builder.build(s) for s in splits}, {s.id: SceneImage(s) for s in scenes}, batch=batch,  # type: ignore[arg-type]
        source={"data": "scenes", "split": split, "n": n, "seed": seed, "splits": list(splits)},
    )  # fmt: skip


def file_pope(
    folder: Path,
    *,
    questions: Path | None = None,
    coco: Path | None = None,
    n: int | None = None,
    seed: int = 0,
    **options: Any,
) -> PopeTask:
    """POPE on pictures of a folder: from the official ``.jsonl``, or built from COCO's ``instances_*.json``.

    Args:
        n: images at most.
        options: of :class:`PopeTask`.

    Raises:
        ProbeError: neither or both files, damaged ones, no picture of theirs in the folder, too few objects.
    """
    if (questions is None) == (coco is None):
        raise ProbeError("POPE on a folder needs its questions (.jsonl) or COCO's instances_*.json, one of the two")
    if questions is not None:
        asked = read_questions(questions)
        names = list(dict.fromkeys(q.image for q in asked))[:n]
        pictures: dict[Hashable, Any] = {name: opener(folder / str(name)) for name in names}
        if without := [name for name in names if not (folder / str(name)).is_file()]:
            raise ProbeError(
                f"the image folder must have the image of every question, got none for {len(without)}, such as {without[0]!r}"
            )
        kept = {"all": [q for q in asked if q.image in pictures]}
        return PopeTask(kept, pictures, source={"data": questions.name, "n": len(names)}, **options)
    assert coco is not None
    found = read_instances(coco)
    there = {i: names for i, names in found.objects.items() if (folder / found.files[i]).is_file()}
    able = sum(len(names) >= 3 for names in there.values())
    if not able:
        raise ProbeError(f"the image folder must have images of {coco} with three objects, got none in {folder}")
    builder = Pope(cast(Any, there), n=min(n or able, able), seed=seed, vocabulary=found.categories)
    built = {s: builder.build(s) for s in SPLITS}
    pictures = {q.image: opener(folder / found.files[int(str(q.image))]) for q in built["random"]}
    return PopeTask(built, pictures, source={"data": coco.name, "n": builder.n, "seed": seed}, **options)
