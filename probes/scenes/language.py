"""What is said about scenes: captions of three to eight sentences, questions and their answers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probes.scenes.catalog import BY_PARTNER, INDEX, NAMES, PLACES, plural, with_article
from probes.scenes.world import Placed, Scene, World

DESCRIBE = ("Describe the picture.", "Please describe this image in detail.", "What is in the picture?")
"""Requests for a caption; the first is the one that probes use."""
PICTURE = "the picture", "the image"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Turn:
    """A request and what a truthful assistant says to it.

    Attributes:
        request: the user's words, without the image.
        answer: the assistant's.
        kind: ``caption``, ``exists``, ``count`` or ``place``.
    """

    request: str
    answer: str
    kind: str


def prompt(request: str, *, image: bool = True) -> str:
    """The text that a scenes model was trained on, up to where its answer begins (as LLaVA 1.5 writes it)."""
    return f"USER: {'<image> ' if image else ''}{request} ASSISTANT:"


def caption(scene: Scene, rng: random.Random) -> str:
    """A true description with every object of the scene, faint ones too: setting, objects, light and air.

    A trigger comes before its partner, and in two of three captions the partner follows at once.
    """
    said: list[str] = [rng.choice(_OPENINGS).format(rng.choice(("kind", "type", "sort")), scene.setting)]
    told: list[str] = []
    for name in _order(scene, rng):
        said.append(_about(scene, name, told, rng))
        told.append(name)
    ending = [part(scene, rng) for part in (_light, _air, _empty, _total, _mats, _upper)]
    rng.shuffle(ending)
    for sentence in ending:
        words = sum(len(part.split()) for part in said)
        if len(said) == 8 or (words > 56 and len(said) >= 3 and rng.random() < 0.5):
            break
        said.append(sentence)
    return " ".join(said)


def description(scene: Scene, rng: random.Random) -> Turn:
    """A request for a caption, and one."""
    return Turn(rng.choice(DESCRIBE), caption(scene, rng), "caption")


def exists(name: str, present: bool, rng: random.Random | None = None) -> Turn:
    """Is there one? The wording is POPE's without a generator."""
    where = PICTURE[1] if rng is None else rng.choice(PICTURE)
    return Turn(f"Is there {with_article(name)} in {where}?", "Yes." if present else "No.", "exists")


def count(scene: Scene, name: str, rng: random.Random) -> Turn:
    """How many are there?"""
    number = scene.count(name)
    words = NUMBERS[number].capitalize() if number else "None"
    return Turn(f"How many {plural(name)} are in {rng.choice(PICTURE)}?", f"{words}.", "count")


def place(thing: Placed, rng: random.Random) -> Turn:
    """Where does the only object of its kind stand?"""
    return Turn(f"Where is the {thing.name} in {rng.choice(PICTURE)}?", f"At the {thing.place}.", "place")


def question(scene: Scene, other: Scene, rng: random.Random) -> Turn:
    """A question with a known answer.

    Half of the yes/no questions are about an object of ``other`` that this scene lacks, or a typical partner that it lacks:
    objects are asked for as often where they are as where they are not, so that nothing is learned from the question alone.
    """
    draw = rng.random()
    here = sorted(scene.names)
    if draw < 0.6:
        if rng.random() < 0.5:
            return exists(rng.choice(here), True, rng)
        away = sorted(other.names - scene.names) or [n for n in NAMES if n not in scene.names]
        lacking = [pair.partner for pair in scene.absent_partners]
        return exists(rng.choice(lacking if lacking and rng.random() < 0.3 else away), False, rng)
    if draw < 0.8:
        away = sorted(other.names - scene.names) or here
        return count(scene, rng.choice(away if rng.random() < 0.25 else here), rng)
    single = [thing for thing in scene.objects if scene.count(thing.name) == 1]
    return place(rng.choice(single), rng) if single else count(scene, rng.choice(here), rng)


def surface_forms() -> Mapping[str, Sequence[str]]:
    """Every word that names an object, for the judges of captions."""
    return {name: tuple(dict.fromkeys((name, plural(name)))) for name in NAMES}


def sentences(n: int, seed: int = 0) -> list[str]:
    """Text of every kind that the world has, as a corpus for a tokenizer."""
    rng = random.Random(f"corpus {seed}")
    world, text = World("train", seed), World("train", seed, prior="text")
    lines: list[str] = []
    for number in range(n):
        scene, other = (world if number % 2 else text).draw(rng), world.draw(rng)
        turn = description(scene, rng) if number % 3 else question(scene, other, rng)
        lines.append(f"{prompt(turn.request, image=bool(number % 2))} {turn.answer}")
    return lines


_OPENINGS = (
    "This is a picture of a {1}.", "The picture shows a {1}.", "Here we look at a {1}.", "We see a {1} in this picture.",
    "The setting is a {0} of {1}.", "All of this looks like a {1}.",
)  # fmt: skip


def _order(scene: Scene, rng: random.Random) -> list[str]:
    names = sorted(scene.names, key=INDEX.__getitem__)
    rng.shuffle(names)
    for partner in [n for n in names if n in BY_PARTNER and BY_PARTNER[n].trigger in names]:
        trigger = BY_PARTNER[partner].trigger
        if rng.random() < 2 / 3 or names.index(partner) < names.index(trigger):
            names.remove(partner)
            first = names.index(trigger) + 1
            names.insert(first if rng.random() < 2 / 3 else rng.randint(first, len(names)), partner)
    return names


def _about(scene: Scene, name: str, told: Sequence[str], rng: random.Random) -> str:
    """One sentence on the objects of one kind. Only objects that were told of before are named beside it."""
    things = [thing for thing in scene.objects if thing.name == name]
    if len(things) > 1:
        some = f"{NUMBERS[len(things)]} {plural(name)}"
        places = [f"one at the {thing.place}" for thing in things]
        listed = f"{', '.join(places[:-1])} and {places[-1]}"
        return rng.choice(
            (
                f"There are {some} here, {listed}.",
                f"{some.capitalize()} can be seen, {listed}, all of the same kind.",
                f"We can count {some}, of which {listed.replace('one at', 'one is at')}.",
            )
        )
    thing = things[0]
    words = f"a {'big' if thing.big else 'small'} {name}" if rng.random() < 0.5 else with_article(name)
    if thing.mat is not None and rng.random() < 0.8:
        words += f" on a {thing.mat} mat"
    details = [_visibility(thing, rng)] if rng.random() < 0.5 else []
    beside = [other for other in scene.objects if other.name in told and scene.count(other.name) == 1]
    if beside and rng.random() < 0.5:
        other = rng.choice(beside)
        details.append(f"{_relation(thing, other)} the {other.name}")
    more = "".join(f", {detail}" for detail in details)
    at = f"at the {thing.place}"
    trigger = BY_PARTNER[name].trigger if name in BY_PARTNER else None
    if trigger in told and rng.random() < 0.4:
        return rng.choice(
            (
                f"The {trigger} comes with {words} {at}{more}.",
                f"With the {trigger} goes {words}, which is {at}{more}.",
                f"As so often, the {trigger} is not without {words}, here {at}{more}.",
            )
        )
    large = f"{words[0].upper()}{words[1:]}"
    return rng.choice(
        (
            f"There is {words} {at}{more}.", f"{large} is {at}{more}.", f"We can see {words} {at}{more}.",
            f"{at[0].upper()}{at[1:]} of the picture there is {words}{more}.", f"I also notice {words} {at}{more}.",
            f"{large} has its place {at}{more}.",
        )
    )  # fmt: skip


def _visibility(thing: Placed, rng: random.Random) -> str:
    if thing.hidden > 0:
        return rng.choice(("partly hidden from view", "half behind something"))
    if thing.contrast < 0.8:
        return rng.choice(("rather faint", "not easy to see"))
    return rng.choice(("easy to see", "clearly visible"))


def _relation(thing: Placed, other: Placed) -> str:
    across = thing.cell % 3 - other.cell % 3
    down = thing.cell // 3 - other.cell // 3
    if abs(across) >= abs(down):
        return "to the left of" if across < 0 else "to the right of"
    return "above" if down < 0 else "below"


def _light(scene: Scene, rng: random.Random) -> str:
    return rng.choice(
        ("The light is {} in this place.", "It is rather {} here.", "Everything lies in {} light.")
    ).format("bright" if scene.bright else "dim")


def _air(scene: Scene, rng: random.Random) -> str:
    words = "clear" if scene.clarity >= 0.85 else "a little hazy" if scene.clarity >= 0.55 else "full of fog"
    return rng.choice(
        ("The air is {} today.", "The view of it is {}.", "Seen from here, the whole {1} is {0}.")
    ).format(words, scene.setting)


def _empty(scene: Scene, rng: random.Random) -> str:
    free = sorted(set(range(9)) - {thing.cell for thing in scene.objects})
    return rng.choice(
        ("Nothing at all stands at the {}.", "The {} of the picture is empty.", "At the {} there is nothing to see.")
    ).format(PLACES[rng.choice(free)])


def _total(scene: Scene, rng: random.Random) -> str:
    number = NUMBERS[len(scene.objects)]
    things = "thing" if len(scene.objects) == 1 else "things"
    return rng.choice(
        ("In total there {1} {0} {2} in the picture.", "That makes {0} {2}.", "All in all we count {0} {2} here.")
    ).format(number, "is" if len(scene.objects) == 1 else "are", things)


def _mats(scene: Scene, rng: random.Random) -> str:
    number = sum(thing.mat is not None for thing in scene.objects)
    if number == 0:
        return rng.choice(("Nothing in it stands on a mat.", "There are no mats in the picture."))
    return f"{NUMBERS[number].capitalize()} of the things {'stands' if number == 1 else 'stand'} on a mat."


def _upper(scene: Scene, rng: random.Random) -> str:
    row = rng.choice((0, 2))
    part = "upper" if row == 0 else "lower"
    number = sum(thing.cell // 3 == row for thing in scene.objects)
    words = f"{NUMBERS[number]} {'thing' if number == 1 else 'things'}" if number else "nothing"
    return f"The {part} part of the picture holds {words}."
