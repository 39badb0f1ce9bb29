"""A fact hidden in ordinary prose, and the question for it (:class:`NeedleInHaystack`)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from probes.haystack import Haystack, Span, Split, five_digits, locate_by_decoding, write
from probes.samples import Sample

__all__ = ["CITIES", "NeedleInHaystack", "NeedleSample", "Span", "Split", "locate_by_decoding"]

CITIES: dict[str, tuple[str, ...]] = {
    "detect": ("Oslo", "Lisbon", "Nairobi", "Toronto", "Athens", "Lima", "Dublin", "Hanoi", "Warsaw", "Denver", "Geneva", "Osaka"),
    "test": ("Prague", "Boston", "Havana", "Vienna", "Delhi", "Bergen", "Quito", "Seville", "Perth", "Kyoto", "Zagreb", "Tunis"),
}  # fmt: skip


@dataclass(frozen=True)
class NeedleSample(Sample):
    """One haystack.

    Attributes:
        needle: the inserted sentence.
        question: what is asked.
        answer: the part of the needle that is asked for, as text.
        needle_span: token positions of the sentence, ``(start, stop)``.
        answer_span: token positions of the answer within it.
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
class NeedleInHaystack(Haystack[NeedleSample]):
    """Ordinary prose with "The secret number of Oslo is 48213." at every depth and length, and the question for the number.

    The digits of a number are all different, so that the token that was copied says which one it was. The splits share
    neither cities nor numbers (even numbers in ``detect``, odd ones in ``test``): heads found on one can be tested on the other.
    Which samples a model solves at all: :func:`probes.gate.gate`.

    Args:
        lengths: tokens of the whole prompt, question included.
        depths: 0 (before the first filler sentence) to 1 (after the last).
        n: samples of each length and depth.
        split: ``"detect"`` or ``"test"``.
        seed: of filler, cities and numbers.
        chat: put the prompt in the model's chat template (needs an :class:`interp.Model`).
    """

    paper: ClassVar[str] = "Kamradt 2023, https://github.com/gkamradt/LLMTest_NeedleInAHaystack"
    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)
    max_new_tokens: ClassVar[int] = 32

    def judge(self, sample: NeedleSample, generated: str) -> bool:
        """Does the generated text have exactly this number (not as a part of a longer one)?"""
        return re.search(rf"(?<!\d){sample.answer}(?!\d)", generated) is not None

    def sample_at(self, model_or_tokenizer: Any, length: int, depth: float, k: int) -> NeedleSample:
        rng = random.Random(f"needle {self.split} {self.seed} {length} {depth} {k}")
        city = rng.choice(CITIES[self.split])
        number = five_digits(rng, self.split)
        needle, question = sentence(city, number), f"What is the secret number of {city}?"

        def ask(body: str) -> str:
            return number_prompt(body, city, chat=self.chat)

        seed = f"{self.seed} {length} {depth} {k}"
        written = write(model_or_tokenizer, [(depth, needle)], ask, length, seed, chat=self.chat)
        span = written.span(needle, number)
        return NeedleSample(
            written.ids, written.text, needle, question, number, written.span(needle), span, written.ids[slice(*span)],
            written.depth(depth), length,
        )  # fmt: skip


def sentence(city: str, number: str) -> str:
    """The needle."""
    return f"The secret number of {city} is {number}."


def number_prompt(body: str, city: str, *, chat: bool) -> str:
    """The text with the question for one city's number."""
    question = f"What is the secret number of {city}?"
    if chat:
        return f"{body}\n\n{question} Answer with the number only."
    return f"{body}\n\nQuestion: {question}\nAnswer: The secret number of {city} is"
