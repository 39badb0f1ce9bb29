"""How long a caption is and how much it repeats itself.

A caption that loops over a few right objects has a low CHAIR_I, for its denominator grows: captions published with one
attention method had 38 % of their 4-grams repeated at its best CHAIR. So length and repetition stand beside every CHAIR.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probes.samples import ProbeError

TOKEN = re.compile(r"\w+(?:['\u2019]\w+)*")


class Loop(NamedTuple):
    """A block of a text that repeats one unit.

    Attributes:
        start: index of its first token.
        length: tokens of the whole block, 0 where nothing repeats.
        period: tokens of the unit.
        times: ``length / period``: how often the unit stands there, at least 2, with a fraction for a last one cut short.
    """

    start: int = 0
    length: int = 0
    period: int = 0

    @property
    def times(self) -> float:
        return self.length / self.period if self.period else 0.0


@dataclass(frozen=True)
class CaptionMeasures:
    """Length and repetition of one text.

    Attributes:
        words: pieces between spaces (``len(text.split())``, as the code of VHR counts length).
        distinct_1: different words / words; NaN for a text without words. Of tokens in small letters without punctuation.
        distinct_2: the same of pairs; NaN below two words.
        repeated_4: share of 4-grams that stood before, 1 - different / all; NaN below four words.
        loop: the longest block that repeats one unit.
    """

    words: int
    distinct_1: float
    distinct_2: float
    repeated_4: float
    loop: Loop


def measure(text: str) -> CaptionMeasures:
    """Length and repetition of one text."""
    tokens = tokenize(text)
    repeated = repeated_share(tokens, 4)
    return CaptionMeasures(count_words(text), distinct(tokens, 1), distinct(tokens, 2), repeated, longest_loop(tokens))


def count_words(text: str) -> int:
    """Pieces between spaces."""
    return len(text.split())


def tokenize(text: str) -> list[str]:
    """Words in small letters without punctuation; "don't" is one."""
    return [word.casefold() for word in TOKEN.findall(text)]


def distinct(tokens: Sequence[Hashable], n: int) -> float:
    """Distinct-n (Li et al. 2016): different n-grams / n-grams; NaN for fewer than n tokens.

    Raises:
        ProbeError: n < 1.
    """
    if n < 1:
        raise ProbeError(f"n must be at least 1, got {n}")
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repeated_share(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of n-grams that stood before: 1 - :func:`distinct`; NaN for fewer than n tokens."""
    return 1.0 - distinct(tokens, n)


def longest_loop(tokens: Sequence[Hashable]) -> Loop:
    """The most tokens in a row that repeat one unit at least twice; of equal ones, that with the shortest unit.

    A block of period p is a run of i with ``tokens[i] == tokens[i + p]`` of length r >= p; it has r + p tokens. Time is
    quadratic in the number of tokens: 512 tokens take about a millisecond.
    """
    numbers: dict[Hashable, int] = {}
    ids = np.array([numbers.setdefault(token, len(numbers)) for token in tokens], dtype=np.int64)
    best = Loop()
    for period in range(1, len(ids) // 2 + 1):
        same = np.concatenate([[False], ids[:-period] == ids[period:], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        if edges.size == 0:
            continue
        starts, runs = edges[::2], edges[1::2] - edges[::2]
        longest = int(runs.argmax())
        if runs[longest] >= period and runs[longest] + period > best.length:
            best = Loop(int(starts[longest]), int(runs[longest]) + period, period)
    return best
