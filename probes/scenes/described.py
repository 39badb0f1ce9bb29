"""Scenes to describe, with a true description to force and where each object stands on the patch grid."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from probes.samples import ImagePrompt, ProbeError, image_prompt
from probes.scenes.language import DESCRIBE, caption
from probes.scenes.painting import picture
from probes.scenes.world import Scene, Split, World


@dataclass(frozen=True)
class DescribedScene(ImagePrompt):
    """A picture, a request, and a true answer.

    Attributes:
        scene: what the picture shows.
        answer: the description.
        answer_ids: its tokens, which follow ``ids`` under teacher forcing.
        mentions: ``(token of the answer, name)`` of the first mention of every object that stands alone of its kind.
    """

    scene: Scene | None = field(default=None, compare=False)
    answer: str = ""
    answer_ids: tuple[int, ...] = ()
    mentions: tuple[tuple[int, str], ...] = ()

    def forced(self, device: Any = None) -> dict[str, Any]:
        """Inputs of the prompt with its answer."""
        import torch

        inputs = self.inputs(device)
        count = len(self.answer_ids)
        length = inputs["input_ids"].shape[1]
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and tuple(value.shape) == (1, length):
                tail = torch.full_like(value[:, :1], int(name == "attention_mask")).expand(1, count)
                tail = torch.tensor([self.answer_ids], device=value.device) if name == "input_ids" else tail
                inputs[name] = torch.cat([value, tail.to(value.dtype)], 1)
        return inputs

    def targets(self, length: int, grid: tuple[int, int]) -> list[tuple[int, NDArray[np.bool_]]]:
        """``(row, mask [row, column])`` of every mention: the row that predicts its first token, and the object's patches.

        Args:
            length: positions of the prompt in the text stack.
            grid: rows and columns of the patch grid; scenes are square.
        """
        assert self.scene is not None
        found = ((length + at - 1, self.scene.patches(name, grid[0])) for at, name in self.mentions)
        return [(row, mask) for row, mask in found if mask.any() and not mask.all()]


@dataclass(frozen=True)
class SceneDescriptions:
    """``n`` scenes with the request to describe them.

    Args:
        n: scenes.
        split: of the world; see :class:`~probes.scenes.world.World`.
        seed: of the world and of the descriptions.
        start: number of the first scene.
        clear: well-visible objects in clear air.
        request: the user's words.
        chat: in the model's chat template.
    """

    needs: ClassVar[tuple[str, ...]] = ("tokenizer", "images", "model")

    n: int = 8
    split: Split = "test"
    seed: int = 0
    start: int = 0
    clear: bool = True
    request: str = DESCRIBE[0]
    chat: bool = True

    def __post_init__(self) -> None:
        if self.n < 1 or self.start < 0:
            raise ProbeError(f"n must be at least 1 and start at least 0, got n={self.n}, start={self.start}")

    def build(self, model: Any) -> list[DescribedScene]:
        """The samples for one model.

        Raises:
            ProbeError: not an :class:`interp.Model`.
            ModelInputError: a model that takes no images.
        """
        world = World(self.split, self.seed, clear=self.clear)
        return [self._sample(model, scene) for scene in world.scenes(self.n, self.start)]

    def _sample(self, model: Any, scene: Scene) -> DescribedScene:
        base = image_prompt(model, self.request, picture(scene), chat=self.chat)
        answer = caption(scene, random.Random(f"description {self.seed} {scene.id}"))
        ids = tuple(model.tokenizer(answer, add_special_tokens=False)["input_ids"])
        starts = _starts(model.tokenizer, ids)
        mentions: list[tuple[int, str]] = []
        for name in sorted(scene.names):
            found = re.search(rf"\b{re.escape(name)}\b", answer)
            if found is None or scene.count(name) != 1:
                continue
            # The token that brings the word's first letter.
            at = max(n for n, place in enumerate(starts) if place <= found.start())
            mentions.append((at, name))
        return DescribedScene(
            base.ids, base.text, base.image, base.model, base.chat, scene=scene, answer=answer, answer_ids=ids,
            mentions=tuple(sorted(mentions)),
        )  # fmt: skip


def _starts(tokenizer: Any, ids: tuple[int, ...]) -> list[int]:
    """Character of the answer at which each token begins, by decoding longer and longer beginnings."""

    def length(n: int) -> int:
        return len(tokenizer.decode(ids[:n], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return [0, *(length(n) for n in range(1, len(ids)))]
