"""What a task is: samples, how a model answers them in batches, and what the answers say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp.models.model import pad_id
from interp.tracing.calls import Intervention
from interp.tracing.session import Session
from probes.intervals import LEVEL, RESAMPLES, Estimate
from probes.samples import ProbeError

Record = dict[str, Any]
Pairs = Sequence[tuple["Sample", Record]]
Image = Callable[[], Any]


@dataclass(frozen=True)
class Sample:
    """One thing to answer.

    Attributes:
        id: unique in its task; what is done is known by it.
        unit: the image or document that intervals resample.
        content: the task's own.
        image: makes what ``model.encode`` takes, when it is needed.
        group: the part it belongs to, where results are told by parts (POPE's splits).
    """

    id: str
    unit: Hashable
    content: Any = None
    image: Image | None = field(default=None, compare=False)
    group: str = ""


@dataclass
class Call:
    """One batch under one setting.

    Attributes:
        session: open, with the setting's interventions.
        interventions: of the setting.
        beams: of beam search.
        shared: kept between the settings of one batch, for inputs that are made once.
        trial: a try before anything is measured: one token is enough.
    """

    model: Any
    session: Session
    interventions: Sequence[Intervention]
    beams: int = 1
    shared: dict[Any, Any] = field(default_factory=dict[Any, Any])
    trial: bool = False


@dataclass(frozen=True)
class Statistics:
    """Of the bootstrap."""

    n_resamples: int = RESAMPLES
    level: float = LEVEL
    seed: int = 0

    def options(self) -> dict[str, Any]:
        return {"n_resamples": self.n_resamples, "level": self.level, "seed": self.seed}


class Task(ABC):
    """A probe as :func:`~interp.evaluation.evaluate` takes it.

    Attributes:
        name: as the command knows it.
        primary: the figure that is drawn and tested first.
        shown: figures of the printed table, in order.
        lower_is_better: figures that a better model has lower; all others are higher, or neither.
        records_text: answers are generated, so tokens per second mean something.
    """

    name: ClassVar[str] = ""
    primary: ClassVar[str] = ""
    shown: ClassVar[tuple[str, ...]] = ()
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    records_text: ClassVar[bool] = False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides the answers, JSON-able; a folder of results is of one description."""

    def check(self, model: Any) -> None:  # noqa: B027  # most models can
        """Raise ValueError where the model cannot do the task."""

    @abstractmethod
    def samples(self, model: Any) -> list[Sample]:
        """All of them, those that share an image beside each other."""

    @abstractmethod
    def run(self, call: Call, samples: Sequence[Sample]) -> list[Record]:
        """Answers, JSON-able, one a sample."""

    @abstractmethod
    def figures(self, found: Pairs, how: Statistics) -> dict[str, Estimate]:
        """What the answers say, with intervals that resample units."""

    @abstractmethod
    def differences(self, a: Pairs, b: Pairs, how: Statistics) -> dict[str, Estimate]:
        """Paired differences a - b of two settings' answers to the same samples."""

    def more(self, found: Pairs, baseline: Pairs, how: Statistics) -> dict[str, Any]:
        """Further results, JSON-able."""
        return {}

    def values(self, found: Pairs) -> tuple[list[Hashable], list[float]]:
        """Unit and primary value of every sample, for tests over many settings."""
        return [s.unit for s, _ in found], [float(r[self.primary]) for _, r in found]


def images(call: Call, samples: Sequence[Sample]) -> list[Any]:
    """Images of the samples, each made once a batch; samples of one unit and image share it."""
    kept: dict[Any, Any] = call.shared.setdefault("images", {})
    new = {s.unit: s.image for s in samples if s.image is not None and s.unit not in kept}
    scenes = {unit: made.scene for unit, made in new.items() if isinstance(made, SceneImage)}
    if scenes:
        from probes.scenes import draw

        drawn = draw(list(scenes.values()), call.model.device).permute(0, 2, 3, 1).cpu().numpy()
        kept.update(zip(scenes, drawn, strict=True))
    kept.update({unit: made() for unit, made in new.items() if unit not in scenes})
    return [None if s.image is None else kept[s.unit] for s in samples]


def greedy(call: Call, inputs: Mapping[str, Tensor], max_new_tokens: int) -> tuple[Tensor, list[int]]:
    """Continuations ``[B, n]`` and how many tokens each has, the end token included."""
    tokens = 1 if call.trial else max_new_tokens
    with torch.inference_mode():
        out: Tensor = call.model.generate(
            inputs, max_new_tokens=tokens, do_sample=False, num_beams=call.beams, return_dict_in_generate=False
        )
    encoder_decoder = bool(getattr(call.model.config, "is_encoder_decoder", False))
    new = out[:, 0 if encoder_decoder else inputs["input_ids"].shape[1] :]
    ends = getattr(call.model.module.generation_config, "eos_token_id", None)
    stops = torch.tensor([] if ends is None else ends, device=new.device).flatten().to(new.dtype)
    ended = torch.isin(new, stops)
    lengths = torch.where(ended.any(-1), ended.int().argmax(-1) + 1, new.shape[1])
    return new, lengths.tolist()


def padded(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Token ids of several lengths as one batch, padded on the left."""
    longest = max(len(row) for row in rows)
    fill = pad_id(model.tokenizer)
    ids = [[fill] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=model.device), "attention_mask": torch.tensor(mask, device=model.device)
    }  # fmt: skip


def needs_images(model: Any, task: str) -> None:
    """Raise ProbeError for a model without eyes."""
    import inspect

    takes = inspect.signature(model.module.forward).parameters
    if not model.is_generative or "pixel_values" not in takes or model.processor is None:
        raise ProbeError(
            f"probe {task} shows images, so the model must take images and write text; {model.name} is a "
            f"{type(model.module).__name__}"
        )


def opener(path: Path) -> Image:
    """An image file, checked when it is opened."""

    def read() -> Any:
        from PIL import Image as Pillow

        with Pillow.open(path) as file:
            return file.convert("RGB")

    return read


@dataclass(frozen=True)
class SceneImage:
    """The picture of a scene; a batch of them is drawn at once."""

    scene: Any

    def __call__(self) -> Any:
        from probes.scenes import picture

        return picture(self.scene)
