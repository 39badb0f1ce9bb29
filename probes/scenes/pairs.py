"""Counterfactual pictures as contrast pairs, and points of mention where prior and picture disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from probes.samples import ProbeError
from probes.scenes.catalog import PAIRS, with_article
from probes.scenes.language import DESCRIBE, exists
from probes.scenes.world import Scene, World

if TYPE_CHECKING:
    from probes.contrast import ContrastPair
    from probes.margin import MarginItem


@dataclass(frozen=True)
class ScenePairs:
    """The same picture with and without one object, asked for that object: does the answer hang on its pixels?

    Clean is the picture with it (" Yes" is right), corrupt without (" No"). The objects are the partners of the world's pairs,
    in turn, so that the prior says yes to both.

    Args:
        n: pairs.
        seed: of the scenes.
        clarity: of the air, 0 to 1.
        contrast: of the object, 0 to 1.
    """

    needs: ClassVar[tuple[str, ...]] = ("tokenizer", "images", "model")

    n: int = 18
    seed: int = 0
    clarity: float = 1.0
    contrast: float = 1.0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ProbeError(f"n must be at least 1, got {self.n}")

    def scenes(self) -> list[tuple[Scene, Scene, str]]:
        """``(with, without, name)`` of every pair."""
        world = World("test", self.seed)
        found: list[tuple[Scene, Scene, str]] = []
        for number in range(self.n):
            pair = PAIRS[number % len(PAIRS)]
            full = world.with_pair(pair, number, partner=True, contrast=self.contrast, clarity=self.clarity)
            found.append((full, full.without(pair.partner), pair.partner))
        return found

    def build(self, model: Any) -> list[ContrastPair]:
        """The pairs for one model.

        Raises:
            ProbeError: not a model that takes images, or one to which " Yes" or " No" is not one token.
        """
        from probes.contrast import image_pair
        from probes.scenes.painting import picture

        return [
            image_pair(
                model, exists(name, True).request, (picture(full), picture(bare)), " Yes", " No", chat=_chats(model)
            )
            for full, bare, name in self.scenes()
        ]


@dataclass(frozen=True)
class SceneMargins:
    """At the point of mention: does the model say the typical partner that is absent, or the object that is there?

    The answer is given up to "There is", with the setting and the trigger named; what could follow is an object of the scene
    that was not named yet, or the absent partner. The margin is ``log p(absent) - log p(present)`` in nats
    (:func:`probes.margin.margins`): above 0 the prior wins. Scenes without another object are passed over.

    Args:
        n: points, one a scene.
        seed: of the scenes.
        start: number of the first scene that is looked at.
        chat: put the request in the chat template.
    """

    needs: ClassVar[tuple[str, ...]] = ("tokenizer", "images", "model")

    n: int = 64
    seed: int = 0
    start: int = 0
    chat: bool = True

    def __post_init__(self) -> None:
        if self.n < 1 or self.start < 0:
            raise ProbeError(f"n must be at least 1 and start at least 0, got {self.n} and {self.start}")

    def points(self) -> list[tuple[Scene, str, str]]:
        """``(scene, present, absent)`` of every point."""
        world = World("against", self.seed)
        found: list[tuple[Scene, str, str]] = []
        number = self.start
        while len(found) < self.n:
            scene = world.scene(number)
            number += 1
            pair = scene.absent_partners[0]
            rest = [thing for thing in scene.objects if thing.name != pair.trigger]
            if rest and scene.count(pair.trigger) == 1:
                # The best seen of the others: what is compared is belief in a partner, not in something faint.
                found.append((scene, max(rest, key=lambda t: scene.evidence(t.name)).name, pair.partner))
        return found

    def build(self, model: Any = None) -> list[MarginItem]:
        """The points; the same for every model."""
        from probes.margin import MarginItem
        from probes.scenes.painting import picture

        found: list[MarginItem] = []
        for scene, present, absent in self.points():
            trigger = next(t for t in scene.objects if t.name == scene.absent_partners[0].trigger)
            prefix = f" The picture shows a {scene.setting}. There is {with_article(trigger.name)} at the {trigger.place}. There is"
            found.append(
                MarginItem(
                    DESCRIBE[0],
                    prefix,
                    with_article(present),
                    with_article(absent),
                    picture(scene),
                    scene.id,
                    self.chat,
                )
            )
        return found


def _chats(model: Any) -> bool:
    return bool(getattr(model, "chat", False))
