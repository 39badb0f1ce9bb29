"""Tasks that force texts and read their probabilities: hallucination margins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from interp.evaluation.baselines import scoring
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
from probes.intervals import Estimate, mean_interval, paired_difference
from probes.margin import MarginItem, margins
from probes.samples import ProbeError


class _Tokenizer:
    """A tokenizer that reads each text once a batch."""

    def __init__(self, tokenizer: Any, kept: dict[Any, Any]) -> None:
        self._tokenizer, self._kept = tokenizer, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        key = (text, add_special_tokens)
        if key not in self._kept:
            self._kept[key] = self._tokenizer(text, add_special_tokens=add_special_tokens)
        return self._kept[key]


class _Seen:
    """A model as :func:`probes.margin.margins` takes it: inputs encoded once a batch, decoding methods applied to logits."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._kept: dict[Any, Any] = call.shared.setdefault("encoded", {})
        self.tokenizer = _Tokenizer(call.model.tokenizer, call.shared.setdefault("tokens", {}))
        self._scoring = scoring(call.interventions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.model, name)

    def encode(self, text: str, image: Any = None, *, chat: bool | None = None) -> Any:
        # Images live in the batch's own table for as long as this one, so their addresses stay theirs.
        key = (text, id(image), chat)
        if key not in self._kept:
            self._kept[key] = self._call.model.encode(text, image=image, chat=chat)
        return self._kept[key]

    def __call__(self, inputs: Any, **options: Any) -> Any:
        out = self._call.model(inputs, **options)
        for method in self._scoring:
            logits, extra = method.forced(self._call.model, inputs, out.logits, options)
            self._call.session.extra_forwards += extra
            out.logits = logits
        return out


def forced_margins(call: Call, items: Sequence[MarginItem], batch: int) -> list[float]:
    """Margins, nats, where what follows each item's prompt counts as generated."""
    seen: Any = _Seen(call)
    by_prompt: dict[int, list[int]] = {}
    for n, item in enumerate(items):
        prompt = seen.encode(item.prompt, image=item.image, chat=item.chat)
        by_prompt.setdefault(prompt["input_ids"].shape[1], []).append(n)
    found = np.zeros(len(items))
    for length, numbers in by_prompt.items():
        call.session.prompt_length = length
        with torch.inference_mode():
            values = margins(seen, [items[n] for n in numbers], batch)
        found[numbers] = [m.value for m in values]
    return found.tolist()


@dataclass(frozen=True)
class MarginTask(Task):
    """Teacher-forced margins: log p(absent object) - log p(present object) at the point of mention, nats.

    Args:
        items: with their own image ids; images may be functions that make them.
        batch: rows of one forward.
        source: where they come from, for the record.
    """

    items: Sequence[MarginItem]
    batch: int = 8
    source: Mapping[str, Any] = field(default_factory=dict[str, Any])

    name: ClassVar[str] = "margin"
    primary: ClassVar[str] = "margin"
    shown: ClassVar[tuple[str, ...]] = ("margin", "prefers_absent")
    lower_is_better: ClassVar[tuple[str, ...]] = ("margin", "prefers_absent")

    def __post_init__(self) -> None:
        if not self.items:
            raise ProbeError("items must be at least one, got none")

    def describe(self) -> dict[str, Any]:
        return {"probe": self.name, **self.source}

    def check(self, model: Any) -> None:
        if any(item.image is not None for item in self.items):
            needs_images(model, self.name)

    def samples(self, model: Any) -> list[Sample]:
        units = [n if item.image_id is None else item.image_id for n, item in enumerate(self.items)]
        return [
            Sample(f"{n} {unit}", unit, replace(item, image=None), maker(item.image))
            for n, (unit, item) in enumerate(zip(units, self.items, strict=True))
        ]

    def run(self, call: Call, samples: Sequence[Sample]) -> list[Record]:
        pictures = images(call, samples)
        items = [replace(s.content, image=picture) for s, picture in zip(samples, pictures, strict=True)]
        return [{"margin": m} for m in forced_margins(call, items, self.batch)]

    def figures(self, found: Pairs, how: Statistics) -> dict[str, Estimate]:
        units, values = self.values(found)
        return {
            "margin": mean_interval(values, units, **how.options()),
            "prefers_absent": mean_interval([float(v > 0) for v in values], units, **how.options()),
        }

    def differences(self, a: Pairs, b: Pairs, how: Statistics) -> dict[str, Estimate]:
        (units, x), (_, y) = self.values(a), self.values(b)
        return {
            "margin": paired_difference(x, y, units, **how.options()),
            "prefers_absent": paired_difference([float(v > 0) for v in x], [float(v > 0) for v in y], units, **how.options()),
        }  # fmt: skip


def maker(image: Any) -> Any:
    return None if image is None else image if callable(image) else lambda: image


def scene_margins(split: str, n: int, *, seed: int = 0, start: int = 0, batch: int = 8) -> MarginTask:
    """Points of mention in scenes of which a typical companion is missing; see :class:`probes.scenes.pairs.SceneMargins`.

    In ``test`` and ``dev`` most scenes lack none and are passed over.
    """
    from probes.scenes import World

    items: list[MarginItem] = []
    number = start
    world = World(split, seed)  # type: ignore[arg-type]
    while len(items) < n:
        item = mention_point(world.scene(number))
        number += 1
        if item is not None:
            items.append(item)
    return MarginTask(items, batch, {"data": "scenes", "split": split, "n": n, "seed": seed, "start": start})


def mention_point(scene: Any) -> MarginItem | None:
    """The point where a scene's missing companion would be named, beside the best seen object not named yet.

    None where no companion is missing, or nothing else is there.
    """
    from probes.scenes import DESCRIBE
    from probes.scenes.catalog import with_article

    for pair in scene.absent_partners:
        rest = [thing for thing in scene.objects if thing.name != pair.trigger]
        if not rest or scene.count(pair.trigger) != 1:
            continue
        trigger = next(thing for thing in scene.objects if thing.name == pair.trigger)
        present = max(rest, key=lambda thing: scene.evidence(thing.name)).name
        prefix = f" The picture shows a {scene.setting}. There is {with_article(trigger.name)} at the {trigger.place}. There is"
        return MarginItem(
            DESCRIBE[0], prefix, with_article(present), with_article(pair.partner), SceneImage(scene), scene.id, True
        )
    return None


def file_margins(path: Path, n: int | None = None, *, chat: bool = False, batch: int = 8) -> MarginTask:
    """Margins of a JSONL file: ``prompt``, ``prefix``, ``present``, ``absent``, and maybe ``image`` (a file beside it), a line.

    Raises:
        ProbeError: a damaged line, one that lacks an entry, an image that is not there.
    """
    items: list[MarginItem] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            held: Any = json.loads(line)
            texts = [held[key] for key in ("prompt", "prefix", "present", "absent")]
        except (ValueError, KeyError, TypeError) as error:
            raise ProbeError(
                f"line {number} of {path} must be JSON with prompt, prefix, present and absent: {error!r}"
            ) from error
        if not all(isinstance(text, str) for text in texts):
            raise ProbeError(f"line {number} of {path} must have texts, got {texts!r}")
        image = held.get("image")
        if image is not None and not (path.parent / str(image)).is_file():
            raise ProbeError(f"line {number} of {path} must name an image file beside it, got {image!r}")
        made = None if image is None else opener(path.parent / str(image))
        prompt, prefix, present, absent = texts
        items.append(MarginItem(prompt, prefix, present, absent, made, image, bool(held.get("chat", chat))))
    return MarginTask(items[:n], batch, {"data": path.name, "n": len(items[:n])})
