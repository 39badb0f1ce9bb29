"""Indirect-object identification: who gets what the other one gives (:class:`IndirectObject`)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from probes.contrast import ContrastPair, next_id
from probes.samples import ProbeError, Sample, encode, tokenizer_of

Order = Literal["ABBA", "BABA", "both"]
Corrupt = Literal["ABC", "S2"]

# In the forms of the paper, the wording ours. {1} and {2} are the first two names, {3} the one who gives.
TEMPLATES = (
    "When {1} and {2} came to the {place}, {3} gave a {thing} to",
    "Then {1} and {2} met at the {place}, and {3} handed a {thing} to",
    "While {1} and {2} were waiting at the {place}, {3} offered a {thing} to",
    "After {1} and {2} left the {place}, {3} passed a {thing} to",
    "Yesterday {1} and {2} walked to the {place}. There {3} gave a {thing} to",
    "Then {1} and {2} had a long talk at the {place}. Afterwards {3} sent a {thing} to",
    "Our friends {1} and {2} found a {thing} near the {place}. Later {3} gave it to",
    "Because {1} and {2} liked the {place}, {3} bought a {thing} for",
)
PLACES = ("store", "garden", "school", "park", "station", "library", "market", "beach")
THINGS = ("drink", "book", "ring", "ball", "letter", "flower", "box", "picture")
NAMES = (
    "Adam", "Alan", "Alex", "Alice", "Amy", "Andrew", "Anna", "Anne", "Anthony", "Ben", "Bob", "Brian", "Carl",
    "Charles", "Chris", "Claire", "Daniel", "David", "Donald", "Edward", "Emily", "Emma", "Eric", "Eva", "Frank",
    "Fred", "George", "Grace", "Harry", "Helen", "Henry", "Ian", "Jack", "Jacob", "James", "Jane", "Jason", "Jeff",
    "Jim", "Joe", "John", "Jose", "Joseph", "Julia", "Karen", "Kate", "Kevin", "Laura", "Lily", "Linda", "Lisa",
    "Lucy", "Mark", "Martin", "Mary", "Matthew", "Max", "Michael", "Mike", "Nick", "Oliver", "Oscar", "Paul", "Peter",
    "Philip", "Rachel", "Richard", "Robert", "Rose", "Ruth", "Ryan", "Sam", "Sarah", "Scott", "Simon", "Stephen",
    "Steve", "Sue", "Susan", "Thomas", "Tim", "Timmy", "Tom", "Tony", "Victor", "Victoria", "Walter", "William",
)  # fmt: skip


@dataclass(frozen=True)
class IndirectObjectPair(ContrastPair):
    """A sentence and its corrupt twin, equal but for names, token by token.

    ``answer`` is the indirect object (IO), ``foil`` the subject (S). ``position`` knows ``"IO"``, ``"S1"``, ``"S1+1"``,
    ``"S2"`` and ``"end"``.

    Attributes:
        template: the sentence's form.
        order: ``"ABBA"`` (IO first) or ``"BABA"`` (S first).
        names: IO and S.
        corrupt_names: what stands at IO, S1 and S2 in the corrupt sentence.
    """

    template: str = ""
    order: str = ""
    names: tuple[str, str] = ("", "")
    corrupt_names: tuple[str, str, str] = ("", "", "")


@dataclass(frozen=True)
class IndirectObject:
    """Contrast pairs "When Mary and John came to the store, John gave a drink to" -> " Mary".

    Names are those that are one token for the tokenizer, behind a space, so clean and corrupt sentence are aligned. The
    paper's measure is the logit difference, ``evaluate(model, pairs)``.

    When not to use it: a model that prefers the right name in few of the clean sentences; look at the metric ``"preference"``
    first.

    Args:
        n: pairs.
        order: ``"ABBA"`` (When Mary and John ..., John), ``"BABA"`` (When John and Mary ..., John) or ``"both"`` in turn.
        corrupt: ``"ABC"``, the paper's: three unrelated names at IO, S1 and S2; or ``"S2"``: only the second subject is
            replaced by a third name, which leaves everything in place but the repetition that tells IO from S.
        names: names to draw from; None is a list of common English ones.
        seed: of the draw.
    """

    paper: ClassVar[str] = "Wang et al. 2022, https://arxiv.org/abs/2211.00593"
    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)
    max_new_tokens: ClassVar[int] = 3

    n: int = 16
    order: Order = "both"
    corrupt: Corrupt = "ABC"
    names: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ProbeError(f"n must be at least 1, got {self.n}")
        if self.order not in ("ABBA", "BABA", "both"):
            raise ProbeError(f"order must be 'ABBA', 'BABA' or 'both', got {self.order!r}")
        if self.corrupt not in ("ABC", "S2"):
            raise ProbeError(f"corrupt must be 'ABC' or 'S2', got {self.corrupt!r}")

    def build(self, model_or_tokenizer: Any) -> list[IndirectObjectPair]:
        """The pairs for one model.

        Raises:
            ProbeError: no tokenizer, or fewer names of one token than a pair needs (5 for ``"ABC"``, 3 for ``"S2"``).
        """
        names = self.usable(model_or_tokenizer)
        needed = 5 if self.corrupt == "ABC" else 3
        if len(names) < needed:
            raise ProbeError(f"names must have at least {needed} that are one token for this tokenizer, got {names}")
        rng = random.Random(f"indirect object {self.seed}")
        orders = ("ABBA", "BABA") if self.order == "both" else (self.order,)
        return [self._pair(model_or_tokenizer, rng, names, orders[k % len(orders)]) for k in range(self.n)]

    def usable(self, model_or_tokenizer: Any) -> list[str]:
        """The names that are one token behind a space."""
        tokenizer_of(model_or_tokenizer)
        found: dict[str, int] = {}
        for name in dict.fromkeys(NAMES if self.names is None else self.names):
            try:
                found[name] = next_id(model_or_tokenizer, "When", f" {name}")
            except ProbeError:
                continue
        # One id for several names is an unknown token, which tells nobody apart.
        ids = list(found.values())
        return [name for name, i in found.items() if ids.count(i) == 1]

    def judge(self, sample: IndirectObjectPair, generated: str) -> bool:
        """Is the first word the indirect object?"""
        words = re.findall(r"\w+", generated)
        return bool(words) and words[0] == sample.names[0]

    def _pair(self, model: Any, rng: random.Random, names: list[str], order: str) -> IndirectObjectPair:
        template = rng.choice(TEMPLATES)
        blanks = {"place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        io, s, *others = rng.sample(names, 5 if self.corrupt == "ABC" else 3)
        changed = (others[0], others[1], others[2]) if self.corrupt == "ABC" else (io, s, others[0])

        def sample(names: tuple[str, str, str]) -> Sample:
            first, second, third = names if order == "ABBA" else (names[1], names[0], names[2])
            text = template.format("", first, second, third, **blanks)
            return Sample(encode(model, text), text)

        clean, corrupt = sample((io, s, s)), sample(changed)
        ids = {name: next_id(model, "When", f" {name}") for name in (io, s, *changed)}
        # In the sentence a name must be the very token that it is alone: then its places are where that token stands.
        subject = [n for n, i in enumerate(clean.ids) if i == ids[s]]
        object_ = [n for n, i in enumerate(clean.ids) if i == ids[io]]
        if len(clean.ids) != len(corrupt.ids) or len(subject) != 2 or len(object_) != 1:
            raise ProbeError(f"names must stay one token in a sentence, and do not in {clean.text!r}")
        at = (object_[0], *subject)
        if any(corrupt.ids[n] != ids[name] for n, name in zip(at, changed, strict=True)):
            raise ProbeError(f"names must stay one token in a sentence, and do not in {corrupt.text!r}")
        last = len(clean.ids) - 1
        places = (("IO", at[0]), ("S1", at[1]), ("S1+1", at[1] + 1), ("S2", at[2]), ("end", last))
        return IndirectObjectPair(
            clean, corrupt, ids[io], ids[s], None, places, f" {io}", f" {s}", template, order, (io, s), changed
        )
