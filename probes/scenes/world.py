"""Scenes with known contents: sampled from a prior, against it, and with one object taken away (:class:`World`)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from probes.samples import ProbeError
from probes.scenes.catalog import (
    ANYWHERE,
    AT_HOME,
    BY_PARTNER,
    BY_SETTING,
    BY_TRIGGER,
    MATS,
    NAMES,
    PLACES,
    SETTINGS,
    Pair,
)

SIZE = 112
"""Pixels of a scene's edge."""
MOST = 6
"""Objects in one scene, at most."""
TYPICAL, ALONE, ANY, STRANGE = 0.3, 0.08, 0.08, 0.008
"""Chances of an object: typical of the setting; a partner without its trigger; at home anywhere; of another setting."""

Split = Literal["train", "dev", "test", "against"]
SPLITS = ("train", "dev", "test", "against")
Kind = Literal["image", "text"]


@dataclass(frozen=True)
class Placed:
    """One object in a scene.

    Attributes:
        name: what it is.
        cell: 0 to 8, row by row: where it stands (:data:`~probes.scenes.catalog.PLACES`).
        centre: ``(x, y)`` in pixels.
        size: edge of its box, pixels.
        contrast: opacity of its drawing, 0 (cannot be seen) to 1.
        hidden: share of its box that something stands in front of.
        side: which side is hidden: 0 left, 1 right, 2 top, 3 bottom.
        tilt: radians.
        mirrored: left and right exchanged.
        mat: colour of the mat under it, or None.
        prior: chance of this object in the scene by the world's prior, given the setting and the trigger's presence.
    """

    name: str
    cell: int
    centre: tuple[float, float]
    size: float
    contrast: float = 1.0
    hidden: float = 0.0
    side: int = 0
    tilt: float = 0.0
    mirrored: bool = False
    mat: str | None = None
    prior: float = 0.0

    @property
    def box(self) -> tuple[float, float, float, float]:
        """``(left, top, right, bottom)`` in pixels."""
        (x, y), half = self.centre, self.size / 2
        return x - half, y - half, x + half, y + half

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def big(self) -> bool:
        return self.size >= 28


@dataclass(frozen=True)
class Scene:
    """A picture's whole content.

    Attributes:
        id: unique, and enough to make the scene again: split, seed and number.
        setting: name of the setting.
        objects: what is in it, in no order of importance.
        clarity: 1 is clear air; less is fog and noise over everything.
        bright: the light is bright, else dim.
        paint: seed of the background's colours and texture.
    """

    id: str
    setting: str
    objects: tuple[Placed, ...]
    clarity: float = 1.0
    bright: bool = True
    paint: int = 0

    @property
    def names(self) -> frozenset[str]:
        """The ground truth: every object that is there, however faint."""
        return frozenset(thing.name for thing in self.objects)

    @property
    def absent_partners(self) -> tuple[Pair, ...]:
        """Pairs whose trigger is there and whose partner is not: where the prior is wrong."""
        names = self.names
        return tuple(
            pair for name in sorted(names) if (pair := BY_TRIGGER.get(name)) is not None and pair.partner not in names
        )

    @property
    def present_pairs(self) -> tuple[Pair, ...]:
        """Pairs of which both are there."""
        names = self.names
        return tuple(
            pair for name in sorted(names) if (pair := BY_TRIGGER.get(name)) is not None and pair.partner in names
        )

    def count(self, name: str) -> int:
        return sum(thing.name == name for thing in self.objects)

    def evidence(self, name: str) -> float:
        """How well an object can be seen, 0 to 1: contrast x visible share x size (full from 28 pixels) x clarity.

        The best of several of one kind; 0 for an object that is not there. An index that orders pictures, no probability.
        """
        seen = (t.contrast * (1 - t.hidden) * min(1.0, t.size / 28) for t in self.objects if t.name == name)
        return max(seen, default=0.0) * self.clarity

    def patches(self, name: str, grid: int = 14) -> NDArray[np.bool_]:
        """Patches of which the object's boxes cover at least a quarter, bool ``[row, column]``."""
        edges = np.arange(grid + 1) * (SIZE / grid)
        mask = np.zeros((grid, grid), dtype=bool)
        for thing in self.objects:
            if thing.name == name:
                left, top, right, bottom = thing.box
                wide = np.clip(np.minimum(edges[1:], right) - np.maximum(edges[:-1], left), 0, None)
                high = np.clip(np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top), 0, None)
                mask |= np.outer(high, wide) >= 0.25 * (SIZE / grid) ** 2
        return mask

    def without(self, name: str) -> Scene:
        """The counterfactual: the same picture with every ``name`` taken away.

        Raises:
            ProbeError: it is not there.
        """
        if name not in self.names:
            raise ProbeError(f"name must be an object of the scene, {sorted(self.names)}, got {name!r}")
        rest = tuple(thing for thing in self.objects if thing.name != name)
        return replace(self, id=f"{self.id} without {name}", objects=rest)

    def seen_with(
        self, *, contrast: float | None = None, clarity: float | None = None, name: str | None = None
    ) -> Scene:
        """The same scene with the dials of evidence set: contrast of one object (or all), clarity of the air.

        Raises:
            ProbeError: a value outside [0, 1], or an object that is not there.
        """
        for what, value in (("contrast", contrast), ("clarity", clarity)):
            if value is not None and not 0 <= value <= 1:
                raise ProbeError(f"{what} must lie in [0, 1], got {value}")
        if name is not None and name not in self.names:
            raise ProbeError(f"name must be an object of the scene, {sorted(self.names)}, got {name!r}")
        things = self.objects
        if contrast is not None:
            things = tuple(replace(t, contrast=contrast) if name in (None, t.name) else t for t in things)
        clear = self.clarity if clarity is None else clarity
        return replace(self, id=f"{self.id} seen {contrast} {clarity} {name}", objects=things, clarity=clear)


@dataclass(frozen=True)
class World:
    """Scenes drawn from one prior, unlimited and seeded.

    A setting is drawn, then every object by itself: typical ones with chance 0.3, partners of a present trigger with their
    pair's prior, partners alone 0.08, objects at home anywhere 0.08, those of other settings 0.008; scenes with nothing or
    more than six objects are drawn again, which bends these chances a little. One scene in eight has several of a kind.

    Args:
        split: ``"train"``, ``"dev"`` and ``"test"`` follow the prior; in ``"against"`` every present trigger lacks its
            partner, and there is at least one.
        seed: of all draws.
        prior: ``"image"``, or ``"text"``, the prior of the texts that the language model first learned from.
        strength: 1 leaves the pairs' priors; less draws them towards 0.5: ``0.5 + strength * (prior - 0.5)``.
        clear: draw only well-visible objects in clear air.

    Raises:
        ProbeError: an unknown split or prior, a strength outside [0, 1].
    """

    split: Split = "train"
    seed: int = 0
    prior: Kind = "image"
    strength: float = 1.0
    clear: bool = False
    _pairs: dict[str, float] = field(init=False, repr=False, compare=False, default_factory=dict[str, float])

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ProbeError(f"split must be one of {list(SPLITS)}, got {self.split!r}")
        if self.prior not in ("image", "text"):
            raise ProbeError(f"prior must be 'image' or 'text', got {self.prior!r}")
        if not 0 <= self.strength <= 1:
            raise ProbeError(f"strength must lie in [0, 1], got {self.strength}")
        for pair in BY_TRIGGER.values():
            p = pair.prior if self.prior == "image" else pair.text_prior
            self._pairs[pair.trigger] = 0.5 + self.strength * (p - 0.5)

    def scenes(self, n: int, start: int = 0) -> list[Scene]:
        """Scenes ``start`` to ``start + n``."""
        return [self.scene(number) for number in range(start, start + n)]

    def __iter__(self) -> Iterator[Scene]:
        number = 0
        while True:
            yield self.scene(number)
            number += 1

    def scene(self, number: int) -> Scene:
        """Scene ``number`` of this world; always the same one."""
        if number < 0:
            raise ProbeError(f"number must be at least 0, got {number}")
        name = f"{self.split}-{self.prior}-{self.seed}-{number}"
        if self.strength != 1.0:
            name += f"-{self.strength:g}"
        return self.draw(random.Random(f"{name} {self.clear}"), name)

    def draw(self, rng: random.Random, name: str = "") -> Scene:
        """One scene from a generator of the caller's."""
        return self._compose(rng, name, rng.choice(SETTINGS).name)

    def with_pair(
        self, pair: Pair, number: int, *, partner: bool, contrast: float = 1.0, clarity: float = 1.0
    ) -> Scene:
        """A scene with a pair's trigger, its dials set: is the partner there, how well is it and everything seen.

        The same ``number`` gives the same scene for every setting of the dials, but for what they change: with
        ``partner=False`` it is the counterfactual. Trigger and partner stand alone of their kind.

        Args:
            pair: whose trigger is there.
            number: which scene.
            partner: is the partner there, too?
            contrast: of the partner; all other objects are drawn in full.
            clarity: of the air.
        """
        name = f"pair-{pair.trigger}-{self.seed}-{number}"
        setting = next(s.name for s in SETTINGS if pair in s.pairs)
        scene = self._compose(random.Random(name), name, setting, (pair.trigger, pair.partner))
        scene = scene.seen_with(contrast=1.0).seen_with(contrast=contrast, clarity=clarity, name=pair.partner)
        scene = replace(scene, objects=tuple(replace(thing, hidden=0.0) for thing in scene.objects))
        scene = replace(scene, id=f"{name} {contrast:g} {clarity:g}")
        return scene if partner else scene.without(pair.partner)

    def _compose(self, rng: random.Random, name: str, setting: str, forced: tuple[str, ...] = ()) -> Scene:
        chances: dict[str, float] = {}
        while not 1 <= len(chances) <= MOST:
            chances = self._contents(rng, setting, forced)
        counts = dict.fromkeys(chances, 1)
        if rng.random() < 0.3 and (not forced or set(counts) - set(forced)):
            thing = rng.choice(sorted(set(counts) - set(forced)))
            counts[thing] = min(rng.choice((2, 2, 3)), MOST - len(counts) + 1)
        cells = rng.sample(range(9), sum(counts.values()))
        clear = self.clear or rng.random() < 0.75
        clarity = rng.uniform(0.85, 1.0) if clear else rng.uniform(0.25, 0.85)
        things: list[Placed] = []
        for thing, count in counts.items():
            things += [self._place(rng, thing, cells.pop(), chances[thing]) for _ in range(count)]
        return Scene(name, setting, tuple(things), clarity, rng.random() < 0.7, rng.randrange(2**31))

    def chance(self, name: str, setting: str, *, trigger: bool = False) -> float:
        """Chance of an object in a scene of a setting, with or without its trigger there."""
        pair = BY_PARTNER.get(name)
        if pair is not None and trigger:
            return self._pairs[pair.trigger]
        if name in ANYWHERE:
            return ANY
        if name not in AT_HOME[setting]:
            return STRANGE
        return ALONE if pair is not None else TYPICAL

    def _contents(self, rng: random.Random, setting: str, forced: tuple[str, ...] = ()) -> dict[str, float]:
        against = self.split == "against" and not forced
        if against:
            forced = (rng.choice(BY_SETTING[setting].pairs).trigger,)
        found: dict[str, float] = {}
        for name in NAMES:
            if name in BY_PARTNER:
                continue
            chance = self.chance(name, setting)
            if name in forced or rng.random() < chance:
                found[name] = chance
        for name, pair in BY_PARTNER.items():
            trigger = pair.trigger in found
            chance = self.chance(name, setting, trigger=trigger)
            if name in forced or (not (against and trigger) and rng.random() < chance):
                found[name] = chance
        return found

    def _place(self, rng: random.Random, name: str, cell: int, prior: float) -> Placed:
        size = rng.uniform(18, 36)
        step, slack = SIZE / 3, max(0.0, (SIZE / 3 - size) / 2)
        x = (cell % 3 + 0.5) * step + rng.uniform(-slack, slack)
        y = (cell // 3 + 0.5) * step + rng.uniform(-slack, slack)
        plain = self.clear or rng.random() < 0.7
        contrast = rng.uniform(0.8, 1.0) if plain else rng.uniform(0.03, 0.8)
        hidden = rng.uniform(0.2, 0.75) if not self.clear and rng.random() < 0.15 else 0.0
        mat = rng.choice(tuple(MATS)) if rng.random() < 0.25 else None
        return Placed(
            name, cell, (x, y), size, contrast, hidden, rng.randrange(4), rng.uniform(-0.3, 0.3), rng.random() < 0.5,
            mat, prior,
        )  # fmt: skip
