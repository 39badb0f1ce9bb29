"""A fact hidden in ordinary prose, and the question for it (:class:`NeedleInHaystack`)."""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from probes.samples import ProbeError, Sample, encode, tokenizer_of
from probes.text import chat_ids, filler

CITIES: dict[str, tuple[str, ...]] = {
    "detect": ("Oslo", "Lisbon", "Nairobi", "Toronto", "Athens", "Lima", "Dublin", "Hanoi", "Warsaw", "Denver", "Geneva", "Osaka"),
    "test": ("Prague", "Boston", "Havana", "Vienna", "Delhi", "Bergen", "Quito", "Seville", "Perth", "Kyoto", "Zagreb", "Tunis"),
}  # fmt: skip
Split = Literal["detect", "test"]
Span = tuple[int, int]


@dataclass(frozen=True)
class NeedleSample(Sample):
    """One haystack.

    Attributes:
        needle: the inserted sentence.
        question: what is asked.
        answer: the number, as text.
        needle_span: token positions of the sentence, ``(start, stop)``.
        answer_span: token positions of the number within it.
        answer_ids: the prompt's ids at ``answer_span``.
        depth: where the needle stands, as the share of filler sentences before it.
        target_length: tokens that were asked for; ``len(ids)`` is the longest prompt of whole sentences within it.
    """

    needle: str = ""
    question: str = ""
    answer: str = ""
    needle_span: Span = (0, 0)
    answer_span: Span = (0, 0)
    answer_ids: tuple[int, ...] = ()
    depth: float = 0.0
    target_length: int = 0


@dataclass(frozen=True)
class NeedleInHaystack:
    """Ordinary prose with "The secret number of Oslo is 48213." at every depth and length, and the question for the number.

    The digits of a number are all different, so that the token that was copied says which one it was. The splits share
    neither cities nor numbers (even numbers in ``detect``, odd ones in ``test``): heads found on one can be tested on the other.

    Args:
        lengths: tokens of the whole prompt, question included.
        depths: 0 (before the first filler sentence) to 1 (after the last).
        n: samples of each length and depth.
        split: ``"detect"`` or ``"test"``.
        seed: of filler, cities and numbers.
        chat: put the prompt in the model's chat template (needs an :class:`interp.Model`).
    """

    lengths: tuple[int, ...] = (256, 512)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    n: int = 1
    split: Split = "detect"
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        if self.split not in CITIES:
            raise ProbeError(f"split must be one of {list(CITIES)}, got {self.split!r}")
        if not self.lengths or not self.depths or self.n < 1:
            raise ProbeError(f"lengths, depths and n must not be empty, got {self.lengths}, {self.depths}, {self.n}")
        if not all(0 <= d <= 1 for d in self.depths):
            raise ProbeError(f"depths must lie in [0, 1], got {self.depths}")

    def build(self, model_or_tokenizer: Any) -> list[NeedleSample]:
        """The samples for one model, by length, then depth.

        Raises:
            ProbeError: no tokenizer, a length too short for needle and question, or a needle that the tokenizer's ids do not
                give back.
        """
        tokenizer_of(model_or_tokenizer)
        cells = [(length, depth, k) for length in self.lengths for depth in self.depths for k in range(self.n)]
        return [self._sample(model_or_tokenizer, *cell) for cell in cells]

    def judge(self, sample: NeedleSample, generated: str) -> bool:
        """Does the generated text have exactly this number (not as a part of a longer one)?"""
        return re.search(rf"(?<!\d){sample.answer}(?!\d)", generated) is not None

    def _sample(self, model_or_tokenizer: Any, length: int, depth: float, k: int) -> NeedleSample:
        rng = random.Random(f"needle {self.split} {self.seed} {length} {depth} {k}")
        city = rng.choice(CITIES[self.split])
        number = _number(rng, even=self.split == "detect")
        needle = f"The secret number of {city} is {number}."
        question = f"What is the secret number of {city}?"
        stream = filler(f"{self.seed} {length} {depth} {k}")

        def ids_of(text: str) -> tuple[int, ...]:
            return chat_ids(model_or_tokenizer, text) if self.chat else encode(model_or_tokenizer, text)

        def prompt(hay: list[str]) -> str:
            before = round(depth * len(hay))
            body = " ".join([*hay[:before], needle, *hay[before:]])
            if self.chat:
                return f"{body}\n\n{question} Answer with the number only."
            return f"{body}\n\nQuestion: {question}\nAnswer: The secret number of {city} is"

        hay, text, ids = _longest(prompt, ids_of, stream, length)
        spans = [_locate(model_or_tokenizer, ids, text, part, self.chat) for part in (needle, number)]
        (start, stop), (first, last) = spans
        if not start <= first < last <= stop:
            raise ProbeError(
                f"the number {number} was found at {first}..{last}, outside its sentence at {start}..{stop}"
            )
        return NeedleSample(
            ids, text, needle, question, number, (start, stop), (first, last), ids[first:last],
            round(depth * len(hay)) / len(hay) if hay else depth, length,
        )  # fmt: skip


def _number(rng: random.Random, *, even: bool) -> str:
    while True:
        digits = "".join(rng.sample("0123456789", 5))
        if digits[0] != "0" and (int(digits) % 2 == 0) == even:
            return digits


def _longest(
    prompt: Callable[[list[str]], str], ids_of: Callable[[str], tuple[int, ...]], stream: Any, length: int
) -> tuple[list[str], str, tuple[int, ...]]:
    """The most filler sentences with which the prompt still has at most ``length`` tokens."""
    hay: list[str] = []
    least = len(ids_of(prompt(hay)))
    if least > length:
        raise ProbeError(f"lengths must leave room for needle and question, which need {least} tokens; got {length}")
    # More sentences, more tokens: grow until it is too long, then look for the last count that fits.
    while len(ids_of(prompt(hay))) <= length:
        hay += list(islice(stream, max(4, len(hay))))
    fits = bisect.bisect_right(range(len(hay) + 1), length, key=lambda count: len(ids_of(prompt(hay[:count])))) - 1
    hay = hay[:fits]
    text = prompt(hay)
    return hay, text, ids_of(text)


def _locate(model_or_tokenizer: Any, ids: tuple[int, ...], text: str, part: str, chat: bool) -> Span:
    """Token positions of the first occurrence of ``part``, by the tokenizer's offsets, else by decoding."""
    tokenizer = tokenizer_of(model_or_tokenizer)
    if getattr(tokenizer, "is_fast", False) and not chat:
        found = tokenizer(text, return_offsets_mapping=True)
        begin = text.index(part)
        end = begin + len(part)
        inside = [n for n, (a, b) in enumerate(found["offset_mapping"]) if a < end and b > begin]
        # Offsets of some tokenizers drift behind their normaliser: they count only where decoding agrees.
        if tuple(found["input_ids"]) == ids and inside and part in _decoded(tokenizer, ids[inside[0] : inside[-1] + 1]):
            return inside[0], inside[-1] + 1
    return locate_by_decoding(tokenizer, ids, part)


def locate_by_decoding(tokenizer: Any, ids: tuple[int, ...], part: str) -> Span:
    """The shortest run of ids, ending first, whose text contains ``part``.

    Raises:
        ProbeError: the text of the ids does not contain it.
    """
    if part not in _decoded(tokenizer, ids):
        raise ProbeError(f"the prompt's ids must give {part!r} back when decoded, and do not")
    stops = range(1, len(ids) + 1)
    stop = stops[bisect.bisect_left(stops, True, key=lambda b: part in _decoded(tokenizer, ids[:b]))]
    starts = range(stop)
    start = bisect.bisect_left(starts, True, key=lambda a: part not in _decoded(tokenizer, ids[a:stop])) - 1
    return start, stop


def _decoded(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
