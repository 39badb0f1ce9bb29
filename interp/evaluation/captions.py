"""Captions: what they make up (CHAIR), how much of the image they name, how long they are and how much they repeat."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from interp.evaluation.tasks import (
    Call,
    Pairs,
    Record,
    Sample,
    SceneImage,
    Statistics,
    Task,
    greedy,
    images,
    needs_images,
    opener,
)
from probes.captions import measure
from probes.chair import CaptionRow, Chair, summarise
from probes.chair_compare import compare, frontier, matched
from probes.intervals import Estimate, mean_interval, paired_difference
from probes.mentions import Matcher
from probes.samples import ProbeError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CUTS = (10, 20, 30, 40, 60, 80)
BARE = ("words", "repetition", "empty")


@dataclass(frozen=True)
class CaptionTask(Task):
    """Captions of images, judged by CHAIR where it is known what is in them.

    Args:
        items: image id to what makes the image.
        truth: image id to the names of its objects; None judges length and repetition alone.
        matcher: finds the names in a caption; needed with truth.
        request: what the model is asked.
        max_new_tokens: of a caption.
        chat: as for ``model.encode``.
        source: where the images come from, for the record.
    """

    items: Mapping[Hashable, Any]
    truth: Mapping[Hashable, Any] | None = None
    matcher: Matcher | None = None
    request: str = "Please describe this image in detail."
    max_new_tokens: int = 128
    chat: bool | None = None
    source: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _judged: dict[Any, CaptionRow] = field(init=False, repr=False, compare=False, default_factory=dict[Any, CaptionRow])

    name: ClassVar[str] = "chair"
    primary: ClassVar[str] = "chair_i"
    lower_is_better: ClassVar[tuple[str, ...]] = ("chair_s", "chair_i", "repetition", "empty")
    records_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.items:
            raise ProbeError("items must be at least one image, got none")
        if (self.truth is None) != (self.matcher is None):
            raise ProbeError("truth and matcher must be given together")

    @property
    def shown(self) -> tuple[str, ...]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        return BARE if self.truth is None else ("chair_s", "chair_i", "recall", "f1", "words", "repetition")

    def describe(self) -> dict[str, Any]:
        return {
            "probe": self.name, "request": self.request, "max_new_tokens": self.max_new_tokens, "chat": self.chat,
            "judged": self.truth is not None, **self.source,
        }  # fmt: skip

    def check(self, model: Any) -> None:
        needs_images(model, self.name)

    def samples(self, model: Any) -> list[Sample]:
        return [Sample(str(i), i, None, image) for i, image in self.items.items()]

    def run(self, call: Call, samples: Sequence[Sample]) -> list[Record]:
        if "inputs" not in call.shared:
            pictures = images(call, samples)
            call.shared["inputs"] = call.model.encode([self.request] * len(samples), image=pictures, chat=self.chat)
        new, lengths = greedy(call, call.shared["inputs"], self.max_new_tokens)
        texts = call.model.decode(new)
        return [{"text": t.strip(), "tokens": n} for t, n in zip(texts, lengths, strict=True)]

    def rows(self, found: Pairs, how: Statistics) -> list[CaptionRow]:
        assert self.truth is not None
        assert self.matcher is not None
        judge = Chair(self.truth, self.matcher, **how.options())
        for sample, record in found:
            key = (sample.unit, record["text"])
            if key not in self._judged:
                self._judged[key] = judge.row(*key)
        return [self._judged[s.unit, r["text"]] for s, r in found]

    def figures(self, found: Pairs, how: Statistics) -> dict[str, Estimate]:
        if self.truth is not None:
            return summarise(self.rows(found, how), **how.options()).figures
        units = [s.unit for s, _ in found]
        return {name: mean_interval(v, units, **how.options()) for name, v in _bare(found).items()}

    def differences(self, a: Pairs, b: Pairs, how: Statistics) -> dict[str, Estimate]:
        if self.truth is not None:
            return compare(self.rows(a, how), self.rows(b, how), **how.options()).differences
        one, two, units = _bare(a), _bare(b), [s.unit for s, _ in a]
        return {name: paired_difference(one[name], two[name], units, **how.options()) for name in BARE}

    def more(self, found: Pairs, baseline: Pairs, how: Statistics) -> dict[str, Any]:
        """CHAIR at the same length and at the same recall as the baseline's captions, and as captions grow."""
        same = [a[1]["text"] == b[1]["text"] for a, b in zip(found, baseline, strict=True)]
        result: dict[str, Any] = {"same_texts": sum(same) / len(same)}
        if self.truth is None:
            return result
        mine, other = self.rows(found, how), self.rows(baseline, how)
        for on in ("words", "recall"):
            try:
                both = matched(mine, other, on=on, **how.options())
            except ProbeError:
                continue
            result[f"matched_{on}"] = {
                "left_out": both.n_left_out,
                "figures": {n: list(both.a.figures[n]) for n in ("chair_s", "chair_i", "recall", "words")},
                "baseline": {n: list(both.b.figures[n]) for n in ("chair_s", "chair_i", "recall", "words")},
                "differences": {n: list(both.differences[n]) for n in ("chair_s", "chair_i", "recall", "words")},
            }
        few = Statistics(min(how.n_resamples, 200), how.level, how.seed).options()
        result["frontier"] = {
            str(n): {name: list(r.figures[name]) for name in ("chair_i", "recall", "words")}
            for n, r in frontier(mine, CUTS, **few).items()
        }
        return result

    def values(self, found: Pairs) -> tuple[list[Hashable], list[float]]:
        """CHAIR_S, a number a caption; the repeated share of 4-grams without truth."""
        units = [s.unit for s, _ in found]
        if self.truth is None:
            return units, _bare(found)["repetition"]
        return units, [float(row.hallucinated > 0) for row in self.rows(found, Statistics())]


def _bare(found: Pairs) -> dict[str, list[float]]:
    measured = [measure(r["text"]) for _, r in found]
    return {
        "words": [float(m.words) for m in measured], "repetition": [m.repeated_4 for m in measured],
        "empty": [float(not m.words) for m in measured],
    }  # fmt: skip


def scene_captions(split: str, n: int, *, seed: int = 0, start: int = 0, max_new_tokens: int = 160) -> CaptionTask:
    """Captions of the bundled world's scenes."""
    from probes.mentions import WordMatcher
    from probes.scenes import DESCRIBE, World, surface_forms

    scenes = World(split, seed).scenes(n, start)  # type: ignore[arg-type]
    return CaptionTask(
        {s.id: SceneImage(s) for s in scenes}, {s.id: s.names for s in scenes}, WordMatcher(surface_forms()),
        request=DESCRIBE[0], max_new_tokens=max_new_tokens, source={"data": "scenes", "split": split, "n": n, "seed": seed, "start": start},
    )  # fmt: skip


def coco_captions(
    instances: Path, folder: Path, n: int | None, *, captions: Path | None = None, seed: int = 0, **options: Any
) -> CaptionTask:
    """Captions of COCO images: those of ``instances_*.json`` that lie in ``folder``.

    Args:
        captions: of ``captions_*.json``: what the reference captions name counts as there, too.
        options: of :class:`CaptionTask`.

    Raises:
        ProbeError: damaged files, no image of the file in the folder.
    """
    import random

    from probes.coco import coco_truth, read_captions, read_instances
    from probes.coco_words import coco_matcher

    found = read_instances(instances)
    there = [i for i, file in found.files.items() if (folder / file).is_file()]
    if not there:
        raise ProbeError(
            f"the image folder must have images of {instances}, got none of {len(found.files)} in {folder}"
        )
    chosen = sorted(random.Random(f"coco {seed}").sample(there, min(n or len(there), len(there))))
    matcher = coco_matcher()
    truth = coco_truth(found, None if captions is None else read_captions(captions), matcher=matcher, images=chosen)
    source = {"data": "coco", "instances": instances.name, "captions": None if captions is None else captions.name,
              "n": len(chosen), "seed": seed}  # fmt: skip
    return CaptionTask(
        {i: opener(folder / found.files[i]) for i in chosen},
        dict[Hashable, Any](truth.items()),
        matcher,
        source=source,
        **options,
    )


def folder_captions(folder: Path, n: int | None, **options: Any) -> CaptionTask:
    """Captions of a folder's images, without a truth: length and repetition.

    Raises:
        ProbeError: no images.
    """
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in SUFFIXES)[:n]
    if not files:
        raise ProbeError(f"the image folder must have images ({', '.join(SUFFIXES)}), got none in {folder}")
    return CaptionTask(
        {f.name: opener(f) for f in files}, source={"data": "folder", "n": len(files)}, **options
    )  # fmt: skip
