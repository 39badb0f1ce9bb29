"""What probes that hide sentences in prose share: the prompt of a wished length, and where its parts are in tokens."""

from __future__ import annotations

import bisect
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeVar, get_args

from probes.samples import ProbeError, Sample, encode, tokenizer_of
from probes.text import chat_ids, filler

Split = Literal["detect", "test"]
Span = tuple[int, int]
S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class Haystack(ABC, Generic[S]):
    """Settings of a probe with one prompt for every length and depth.

    Args:
        lengths: tokens of the whole prompt, question included.
        depths: 0 (before the first filler sentence) to 1 (after the last).
        n: samples of each length and depth.
        split: ``"detect"`` or ``"test"``; the two share no key and no answer, so heads found on one can be tested on the other.
        seed: of filler, keys and answers.
        chat: put the prompt in the model's chat template (needs an :class:`interp.Model`).
    """

    lengths: tuple[int, ...] = (256, 512)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    n: int = 1
    split: Split = "detect"
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        check_split(self.split)
        if not self.lengths or not self.depths or self.n < 1:
            raise ProbeError(f"lengths, depths and n must not be empty, got {self.lengths}, {self.depths}, {self.n}")
        if not all(0 <= d <= 1 for d in self.depths):
            raise ProbeError(f"depths must lie in [0, 1], got {self.depths}")

    def build(self, model_or_tokenizer: Any) -> list[S]:
        """The samples for one model, by length, then depth.

        Raises:
            ProbeError: no tokenizer, a length too short for needles and question, or a needle that the tokenizer's ids do not
                give back.
        """
        tokenizer_of(model_or_tokenizer)
        cells = [(length, depth, k) for length in self.lengths for depth in self.depths for k in range(self.n)]
        return [self.sample_at(model_or_tokenizer, *cell) for cell in cells]

    @abstractmethod
    def sample_at(self, model_or_tokenizer: Any, length: int, depth: float, k: int) -> S:
        """Sample ``k`` of one length and depth."""


@dataclass(frozen=True)
class Written:
    """A prompt with sentences hidden in it.

    Attributes:
        model_or_tokenizer: what encoded it.
        ids: token ids ``[position]``.
        text: what was encoded.
        chat: it stands in a chat template.
        n_filler: filler sentences.
    """

    model_or_tokenizer: Any
    ids: tuple[int, ...]
    text: str
    chat: bool
    n_filler: int

    def span(self, whole: str, part: str | None = None) -> Span:
        """Token positions ``(start, stop)`` of the first ``whole`` in the prompt, or of the first ``part`` within it.

        Raises:
            ProbeError: the ids do not give it back, or the part is not inside the whole.
        """
        start, stop = _locate(self, whole, 0)
        if part is None:
            return start, stop
        offset = whole.index(part)
        first, last = _locate(self, part, self.text.index(whole) + offset, (start, stop))
        if not start <= first < last <= stop:
            raise ProbeError(f"{part!r} was found at {first}..{last}, outside its sentence at {start}..{stop}")
        return first, last

    def depth(self, wished: float) -> float:
        """The share of filler sentences before a sentence that was put at ``wished``."""
        return round(wished * self.n_filler) / self.n_filler if self.n_filler else wished


def write(
    model_or_tokenizer: Any,
    needles: Sequence[tuple[float, str]],
    ask: Callable[[str], str],
    length: int,
    seed: str,
    *,
    chat: bool,
) -> Written:
    """The longest prompt of whole filler sentences with at most ``length`` tokens.

    Args:
        model_or_tokenizer: an :class:`interp.Model`, or a tokenizer where ``chat`` is False.
        needles: ``(depth, sentence)``; sentences of one place stand in the order given.
        ask: the whole prompt of the text with the needles.
        length: tokens, special ones included.
        seed: of the filler.
        chat: as a user turn of the chat template.
    """

    def ids_of(text: str) -> tuple[int, ...]:
        return chat_ids(model_or_tokenizer, text) if chat else encode(model_or_tokenizer, text)

    def prompt(hay: list[str]) -> str:
        return ask(" ".join(_scattered(hay, needles)))

    hay = _longest(prompt, ids_of, filler(seed), length)
    text = prompt(hay)
    return Written(model_or_tokenizer, ids_of(text), text, chat, len(hay))


def check_split(split: str) -> None:
    if split not in get_args(Split):
        raise ProbeError(f"split must be one of {list(get_args(Split))}, got {split!r}")


def five_digits(rng: random.Random, split: Split) -> str:
    """A number of five different digits, even for ``detect`` and odd for ``test``.

    All different, so that the token that was copied says which digit it was.
    """
    while True:
        digits = "".join(rng.sample("0123456789", 5))
        if digits[0] != "0" and (int(digits) % 2 == 0) == (split == "detect"):
            return digits


def _scattered(hay: list[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    at: dict[int, list[str]] = {}
    for depth, sentence in needles:
        at.setdefault(round(depth * len(hay)), []).append(sentence)
    out: list[str] = []
    for n in range(len(hay) + 1):
        out += [*at.get(n, ()), *hay[n : n + 1]]
    return out


def _longest(
    prompt: Callable[[list[str]], str], ids_of: Callable[[str], tuple[int, ...]], stream: Iterator[str], length: int
) -> list[str]:
    """The most filler sentences with which the prompt still has at most ``length`` tokens."""
    hay: list[str] = []
    least = len(ids_of(prompt(hay)))
    if least > length:
        raise ProbeError(f"lengths must leave room for needle and question, which need {least} tokens; got {length}")
    # More sentences, more tokens: grow until it is too long, then look for the last count that fits.
    while len(ids_of(prompt(hay))) <= length:
        hay += list(islice(stream, max(4, len(hay))))
    fits = bisect.bisect_right(range(len(hay) + 1), length, key=lambda count: len(ids_of(prompt(hay[:count])))) - 1
    return hay[:fits]


def _locate(written: Written, part: str, since: int, within: Span | None = None) -> Span:
    """Token positions of the first ``part`` at or after character ``since``, by the tokenizer's offsets, else by decoding."""
    tokenizer = tokenizer_of(written.model_or_tokenizer)
    ids = written.ids
    if getattr(tokenizer, "is_fast", False) and not written.chat:
        found = tokenizer(written.text, return_offsets_mapping=True)
        begin = written.text.index(part, since)
        end = begin + len(part)
        inside = [n for n, (a, b) in enumerate(found["offset_mapping"]) if a < end and b > begin]
        # Offsets of some tokenizers drift behind their normaliser: they count only where decoding agrees.
        if tuple(found["input_ids"]) == ids and inside and part in _decoded(tokenizer, ids[inside[0] : inside[-1] + 1]):
            return inside[0], inside[-1] + 1
    start, stop = within or (0, len(ids))
    first, last = locate_by_decoding(tokenizer, ids[start:stop], part)
    return start + first, start + last


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
