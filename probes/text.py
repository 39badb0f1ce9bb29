"""Ordinary English prose (:class:`Passages`), filler made of its sentences, and easy questions (:class:`ClosedBook`)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from probes.samples import ProbeError, Sample, encode, tokenizer_of

QUESTIONS: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of Germany?", "Berlin"),
    ("Which planet do we live on?", "Earth"),
    ("Which animal barks?", "dog"),
    ("Which animal says meow?", "cat"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What colour is fresh snow?", "white"),
    ("What colour is grass?", "green"),
    ("Which insects make honey?", "bees"),
    ("What is frozen water called?", "ice"),
    ("Which season comes after winter?", "spring"),
    ("Which day comes after Monday?", "Tuesday"),
    ("Which month comes after January?", "February"),
    ("What is the opposite of hot?", "cold"),
    ("Which language is spoken in Brazil?", "Portuguese"),
)


@cache
def paragraphs() -> tuple[str, ...]:
    """The paragraphs of ``data/text/*.txt``, in the order of files and lines.

    Raises:
        ProbeError: the text is not where the package or the checkout keeps it.
    """
    # A wheel carries the text inside the package, a checkout beside it.
    here = Path(__file__).resolve().parent
    for folder in (here / "_text", here.parent / "data" / "text"):
        files = sorted(folder.glob("*.txt"))
        if files:
            blocks = [b for f in files for b in re.split(r"\n\s*\n", f.read_text(encoding="utf-8"))]
            return tuple(" ".join(b.split()) for b in blocks if b.strip())
    raise ProbeError(
        f"the bundled prose must be in {here / '_text'} or in data/text beside it; neither has a .txt file"
    )


@cache
def sentences() -> tuple[str, ...]:
    """Every sentence of :func:`paragraphs`."""
    return tuple(s for p in paragraphs() for s in re.split(r"(?<=[.!?]) +", p))


def filler(seed: int | str) -> Iterator[str]:
    """Sentences without end: all of them in a random order, then again in another."""
    rng = random.Random(f"filler {seed}")
    while True:
        order = list(sentences())
        rng.shuffle(order)
        yield from order


@dataclass(frozen=True)
class Passages:
    """``n`` passages of ordinary prose.

    Args:
        n: passages.
        length: tokens of each, special tokens included, cut exactly; None keeps whole paragraphs.
        seed: of the order of paragraphs.
    """

    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)

    n: int = 16
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or (self.length is not None and self.length < 1):
            raise ProbeError(f"n and length must be at least 1, got n={self.n}, length={self.length}")

    def build(self, model_or_tokenizer: Any) -> list[Sample]:
        """The samples for one model; past the last paragraph they begin again at the first of another order.

        Raises:
            ProbeError: no tokenizer.
        """
        tokenizer_of(model_or_tokenizer)
        rng = random.Random(f"passages {self.seed}")
        order: list[str] = []
        while len(order) < self.n:
            block = list(paragraphs())
            rng.shuffle(block)
            order += block
        return [self._sample(model_or_tokenizer, order, n) for n in range(self.n)]

    def _sample(self, model_or_tokenizer: Any, order: list[str], n: int) -> Sample:
        text = order[n]
        ids = encode(model_or_tokenizer, text)
        following = n + 1
        while self.length is not None and len(ids) < self.length:
            text = f"{text} {order[following % len(order)]}"
            ids = encode(model_or_tokenizer, text)
            following += 1
        return Sample(ids[: self.length], text)


@dataclass(frozen=True)
class ClosedBookSample(Sample):
    """A question with its one-word answer."""

    question: str = ""
    answer: str = ""


@dataclass(frozen=True)
class ClosedBook:
    """Easy questions with one-word answers that are not in the prompt: a control for what needs the context.

    Args:
        chat: put the question in the model's chat template (needs an :class:`interp.Model`).
    """

    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)
    max_new_tokens: ClassVar[int] = 16

    chat: bool = False

    def build(self, model_or_tokenizer: Any) -> list[ClosedBookSample]:
        """One sample a question.

        Raises:
            ProbeError: no tokenizer.
        """
        tokenizer_of(model_or_tokenizer)
        samples: list[ClosedBookSample] = []
        for question, answer in QUESTIONS:
            if self.chat:
                text = f"{question} Answer with one word."
                ids = chat_ids(model_or_tokenizer, text)
            else:
                text = f"Question: {question}\nAnswer:"
                ids = encode(model_or_tokenizer, text)
            samples.append(ClosedBookSample(ids, text, question, answer))
        return samples

    def judge(self, sample: ClosedBookSample, generated: str) -> bool:
        """Is the answer a word of the first line that was generated?"""
        lines = generated.strip().splitlines() or [""]
        return re.search(rf"\b{re.escape(sample.answer)}\b", lines[0], re.IGNORECASE) is not None


def chat_ids(model: Any, text: str) -> tuple[int, ...]:
    """Ids of ``text`` as a user turn, up to where the answer starts.

    Raises:
        ProbeError: ``model`` is a tokenizer: chats go through the model's ``encode``.
    """
    if not hasattr(model, "encode") or hasattr(model, "convert_ids_to_tokens"):
        raise ProbeError(
            f"chat=True needs an interp.Model, whose encode knows the template, got {type(model).__name__}"
        )
    return tuple(int(i) for i in model.encode(text, chat=True)["input_ids"][0])
