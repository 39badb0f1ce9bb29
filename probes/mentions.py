"""Which objects a text names, and where (:class:`WordMatcher`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from probes.samples import ProbeError


class Mention(NamedTuple):
    """One place where a text names an object.

    Attributes:
        name: the object's canonical name.
        start: first character of what was written.
        stop: the character after its last.
    """

    name: str
    start: int
    stop: int


Matcher = Callable[[str], list[Mention]]

WORD = re.compile(r"[^\W_]+")
GAP = re.compile(r"[\s_\-\u2010\u2011'\u2019]+")
"""What may stand between the words of one form: "hot dog" and "hot-dog", but not "hot, dog" nor "hot. Dog"."""

IRREGULAR = {
    "man": "men", "person": "people", "child": "children", "mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth",
    "ox": "oxen", "louse": "lice", "calf": "calves", "half": "halves", "knife": "knives", "leaf": "leaves", "life": "lives",
    "loaf": "loaves", "scarf": "scarves", "shelf": "shelves", "thief": "thieves", "wife": "wives", "wolf": "wolves",
    "die": "dice", "cactus": "cacti", "sheep": "sheep", "fish": "fish", "deer": "deer", "moose": "moose", "bison": "bison",
    "aircraft": "aircraft",
}  # fmt: skip
DECOY = ""
"""Stands for the name of a form that takes up its words and names nothing."""


def plurals(form: str) -> set[str]:
    """Plural forms of a noun or compound, by its last word: regular English ones, and irregular ones beside them.

    "child" gives both "children" and "childs": a text is read, not judged, and forms nobody writes cost nothing.
    """
    head, space, last = form.rpartition(" ")
    found = {f"{last}s"}
    if last.endswith(("s", "x", "z", "ch", "sh")):
        found = {f"{last}es"}
    elif re.search("[^aeiou]y$", last):
        found = {f"{last[:-1]}ies"}
    elif last.endswith("o"):
        found.add(f"{last}es")
    # Compounds too: "fireman", "bookshelf". That "human" also gives "humen" costs nothing.
    found |= {last.removesuffix(single) + several for single, several in IRREGULAR.items() if last.endswith(single)}
    return {head + space + p for p in found}


class WordMatcher:
    """A matcher by lists of words, as CHAIR uses one: longest form first, whole words, any case, singular and plural.

    Hyphens and underscores count as spaces, a possessive ('s) as its noun. It is a list of words, not understanding: "an
    orange wall" names the orange, "no dog" the dog. All published CHAIR numbers share that.
    """

    def __init__(
        self,
        names: Mapping[str, Sequence[str]],
        *,
        ignore: Sequence[str] = (),
        unless: Mapping[str, str] | None = None,
        plural: bool = True,
    ) -> None:
        """Make the table.

        Args:
            names: canonical name to its surface forms of one or more words, singular. The canonical name is one of them.
            ignore: forms that take up their words and name nothing ("home plate" is no plate).
            unless: form to canonical name: the form does not count in a text that also names that object (CHAIR's rule that
                a "seat" is no chair beside a toilet).
            plural: also find :func:`plurals`. A form that is written in ``names`` or ``ignore`` goes before a derived one.

        Raises:
            ProbeError: one form for two objects, a form without a word, ``unless`` with a form or name that is not there.
        """
        if not names:
            raise ProbeError("names must have at least one object, got none")
        self.names: tuple[str, ...] = tuple(names)
        written = [(form, name) for name, forms in names.items() for form in (name, *_several(name, forms))]
        written += [(form, DECOY) for form in _several("ignore", ignore)]
        derived = [(several, name) for form, name in written for several in sorted(plurals(form))] if plural else []
        self._forms: dict[tuple[str, ...], str] = {}
        explicit: dict[tuple[str, ...], str] = {}
        for form, name in written:
            _enter(explicit, form, name)
        for form, name in derived:
            if _key(form) not in explicit:
                _enter(self._forms, form, name)
        self._forms |= explicit
        self._lengths: dict[str, list[int]] = {}
        for key in self._forms:
            lengths = self._lengths.setdefault(key[0], [])
            if len(key) not in lengths:
                lengths.append(len(key))
                lengths.sort(reverse=True)
        self._unless = self._exceptions(unless or {}, plural)

    def __call__(self, text: str) -> list[Mention]:
        """Every mention, in the order of the text."""
        found = list(self._find(text))
        if not self._unless:
            return [mention for mention, _ in found if mention.name != DECOY]
        named = {mention.name for mention, _ in found}
        return [m for m, key in found if m.name != DECOY and self._unless.get(key) not in named]

    def _find(self, text: str) -> Iterator[tuple[Mention, tuple[str, ...]]]:
        spans = [m.span() for m in WORD.finditer(text)]
        words = [text[a:b].casefold() for a, b in spans]
        # Word i + 1 may continue a form that has word i.
        joined = [GAP.fullmatch(text, a[1], b[0]) is not None for a, b in pairwise(spans)]
        i = 0
        while i < len(words):
            for length in self._lengths.get(words[i], ()):
                key = tuple(words[i : i + length])
                if len(key) == length and key in self._forms and all(joined[i : i + length - 1]):
                    yield Mention(self._forms[key], spans[i][0], spans[i + length - 1][1]), key
                    i += length
                    break
            else:
                i += 1

    def _exceptions(self, unless: Mapping[str, str], plural: bool) -> dict[tuple[str, ...], str]:
        out: dict[tuple[str, ...], str] = {}
        for form, name in unless.items():
            if _key(form) not in self._forms:
                raise ProbeError(f"unless must be about forms of names, got {form!r}")
            if name not in self.names:
                raise ProbeError(f"unless must lead to one of names, got {name!r} for {form!r}")
            out |= {_key(f): name for f in (form, *(plurals(form) if plural else ()))}
        return out


def _several(name: str, forms: Sequence[str]) -> Sequence[str]:
    if isinstance(forms, str) or not all(isinstance(form, str) for form in forms):
        raise ProbeError(f"the forms of {name!r} must be a sequence of texts, got {forms!r}")
    return forms


def _key(form: str) -> tuple[str, ...]:
    key = tuple(word.casefold() for word in WORD.findall(form))
    if not key:
        raise ProbeError(f"a form must have at least one word, got {form!r}")
    return key


def _enter(table: dict[tuple[str, ...], str], form: str, name: str) -> None:
    other = table.setdefault(_key(form), name)
    if other != name:
        both = sorted(n or "ignore" for n in (other, name))
        raise ProbeError(f"a form must stand for one object, got {form!r} for {both[0]!r} and {both[1]!r}")
