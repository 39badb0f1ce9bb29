"""The recall world: a small vocabulary, and three tasks in it that only looking back can solve.

`recall-lm` is trained on it (``data/build/recall.py``), and the probes here ask it. Texts are words split at spaces:

- repeated: ``<bos> x x x ...``, x uniformly random over all ordinary words;
- key-value: ``<bos> k3 : v7 v90 ; k81 : v4 v4 v15 ; ... ? k3 : v7 v90 ;``;
- needle: ``<bos> w5 w9 ... needle k3 is v7 v90 v2 . w1 ... ? needle k3 is v7 v90 v2 .``, the hay Zipf-distributed words
  of which half follow their predecessor by a fixed table of bigrams.

The generators are vectorised and know of every answer token which earlier position it copies.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.needle import NeedleSample
from probes.samples import ProbeError, tokenizer_of

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
MARKS = (":", ";", "?", "=", "needle", "is", ".", "->")
N_KEYS, N_VALUES = 192, 128
N_WORDS = 512 - len(SPECIAL) - len(MARKS) - N_KEYS - N_VALUES
VOCABULARY = (
    *SPECIAL, *MARKS, *(f"k{i}" for i in range(N_KEYS)), *(f"v{i}" for i in range(N_VALUES)), *(f"w{i}" for i in range(N_WORDS)),
)  # fmt: skip
"""Word of each id."""

PAD, BOS, EOS, UNK = range(len(SPECIAL))
COLON, SEMICOLON, QUESTION, EQUALS, NEEDLE, IS, STOP, ARROW = range(len(SPECIAL), len(SPECIAL) + len(MARKS))
FIRST_KEY = len(SPECIAL) + len(MARKS)
FIRST_VALUE, FIRST_WORD = FIRST_KEY + N_KEYS, FIRST_KEY + N_KEYS + N_VALUES

SUCCESSORS, FOLLOWS = 4, 0.5
SENTENCE, ASKED = 7, 8
"""Tokens of ``needle k is v v v .`` and of its question with the answer."""

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """``n`` sequences of one task, all of one length, with the truth of every position.

    Attributes:
        ids: int32 ``[n, position]``, from ``<bos>`` on.
        answer: bool ``[n, position]``: this token can be told from earlier ones by recall, and from nothing else.
        end: bool ``[n, position]``: the mark behind an answer, which only a model that recalled its length can tell.
        source: int32 ``[n, position]``: the position that an answer token copies, -1 elsewhere.
        question: int32 ``[n, position]``: number of the question that an answer token belongs to, -1 elsewhere.
    """

    ids: Ints
    answer: Bools
    end: Bools
    source: Ints
    question: Ints


def tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast`` of the vocabulary: words split at white space, ``<bos>`` put in front."""
    from transformers import PreTrainedTokenizerFast

    bos, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    front = {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}
    whole = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<bos>": front},
        },
        # Joins words with a space.
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(VOCABULARY)}, "unk_token": SPECIAL[UNK]},
    }
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    with TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(json.dumps(whole), encoding="utf-8")
        return PreTrainedTokenizerFast(
            tokenizer_file=str(file), padding_side="left", clean_up_tokenization_spaces=False, model_max_length=1024, **names
        )  # fmt: skip


def repeated(rng: np.random.Generator, n: int, length: int, *, period: int | None = None) -> Batch:
    """``<bos> x x ...`` up to ``length``. x has ``period`` tokens; None draws 4 up to half the length by sequence."""
    longest = (length - 1) // 2
    if period is not None and not 1 <= period <= longest:
        raise ProbeError(f"period must be 1 to {longest} for length {length}, got {period}")
    _check(n, length, 9)
    drawn = rng.integers(4, longest + 1, (n, 1)) if period is None else np.full((n, 1), period)
    place = np.arange(length - 1)
    x = rng.integers(len(SPECIAL), len(VOCABULARY), (n, longest))
    ids = np.full((n, length), BOS, np.int32)
    ids[:, 1:] = np.take_along_axis(x, place % drawn, 1)
    batch = _empty(ids)
    batch.answer[:, 1:] = place >= drawn
    batch.source[:, 1:] = np.where(place >= drawn, place + 1 - drawn, -1)
    batch.question[:, 1:] = np.where(place >= drawn, place // drawn - 1, -1)
    return batch


def key_values(rng: np.random.Generator, n: int, length: int, *, questions: int = 1) -> Batch:
    """As many pairs as fit, all keys different, values of 2 or 3 tokens, then ``questions`` of different keys.

    What is left over (up to 13 tokens, more where the keys run out) is filled with words of the hay in front of the pairs.
    """
    room = length - 1 - 7 * questions
    if questions < 1 or room < 6 * questions:
        raise ProbeError(f"questions must be at least 1 and leave room for their pairs: {questions} in {length} tokens")
    _check(n, length, 14)
    keys = np.argsort(rng.random((n, N_KEYS)), 1)
    sizes = rng.integers(2, 4, (n, N_KEYS))
    values = rng.integers(FIRST_VALUE, FIRST_WORD, (n, N_KEYS, 3))
    ends = np.cumsum(sizes + 3, 1)
    used = ends <= room
    chosen = np.argsort(np.where(used, rng.random((n, N_KEYS)), 2.0), 1)[:, :questions]
    asked = np.take_along_axis(sizes, chosen, 1)
    asked_ends = np.cumsum(asked + 4, 1)
    total = (ends * used).max(1) + asked_ends[:, -1]
    ids = np.full((n, length), BOS, np.int32)
    ids[:, 1:] = _hay(rng, n, length - 1)
    batch = _empty(ids)
    begin = length - total[:, None]
    pair = ends - sizes - 3 + begin
    rows = np.broadcast_to(np.arange(n)[:, None], (n, N_KEYS))
    for offset, token in ((0, keys + FIRST_KEY), (1, COLON)):
        ids[rows[used], (pair + offset)[used]] = np.broadcast_to(token, (n, N_KEYS))[used]
    for part in range(3):
        there = used & (part < sizes)
        ids[rows[there], (pair + 2 + part)[there]] = values[..., part][there]
    ids[rows[used], (pair + 2 + sizes)[used]] = SEMICOLON
    ask = (ends * used).max(1)[:, None] + begin + asked_ends - asked - 4
    rows = rows[:, :questions]
    for offset, token in ((0, QUESTION), (1, np.take_along_axis(keys, chosen, 1) + FIRST_KEY), (2, COLON)):
        ids[rows, ask + offset] = token
    found = np.take_along_axis(pair, chosen, 1) + 2
    _answer(batch, rows, ask + 3, found, asked, SEMICOLON)
    return batch


def needles(
    rng: np.random.Generator, n: int, length: int, *, count: int = 1, questions: int = 1, depth: float | None = None
) -> Batch:
    """Hay with ``count`` needles of different keys, then ``questions`` of them.

    Args:
        rng: source of chance.
        n: sequences.
        length: tokens of a sequence.
        count: needles; more than the questions are distractors.
        questions: how many of them are asked for.
        depth: where the needle stands, 0 (before all hay) to 1 (after it), for ``count`` 1; None draws it.
    """
    hay = length - 1 - SENTENCE * count - ASKED * questions
    if not 1 <= questions <= count <= N_KEYS or hay < count:
        raise ProbeError(f"questions and count must fit: {questions} of {count} needles in {length} tokens")
    if depth is not None and (count != 1 or not 0 <= depth <= 1):
        raise ProbeError(f"depth must lie in [0, 1] and needs count=1, got {depth} with {count}")
    _check(n, length, 17)
    keys = np.argsort(rng.random((n, N_KEYS)), 1)[:, :count] + FIRST_KEY
    values = rng.integers(FIRST_VALUE, FIRST_WORD, (n, count, 3))
    # Distinct gaps: two needles never touch.
    gaps = np.sort(np.argsort(rng.random((n, hay + 1)), 1)[:, :count], 1)
    if depth is not None:
        gaps = np.full((n, 1), round(depth * hay))
    begin = 1 + gaps + SENTENCE * np.arange(count)
    ids = np.full((n, length), BOS, np.int32)
    rows = np.broadcast_to(np.arange(n)[:, None], (n, count))
    for offset, token in enumerate((NEEDLE, keys, IS, *(values[..., part] for part in range(3)), STOP)):
        ids[rows, begin + offset] = token
    batch = _empty(ids)
    chosen = np.argsort(rng.random((n, count)), 1)[:, :questions]
    ask = np.tile(length - ASKED * (questions - np.arange(questions)), (n, 1))
    rows = rows[:, :questions]
    for offset, token in enumerate((QUESTION, NEEDLE, np.take_along_axis(keys, chosen, 1), IS)):
        ids[rows, ask + offset] = token
    found = np.take_along_axis(begin, chosen, 1) + 3
    _answer(batch, rows, ask + 4, found, np.full((n, questions), 3), STOP)
    ids[:, 1:][ids[:, 1:] == BOS] = _hay(rng, n, hay).ravel()
    return batch


TASKS: dict[str, Callable[..., Batch]] = {"repeated": repeated, "key_value": key_values, "needle": needles}


@dataclass(frozen=True)
class KeyValueRecall:
    """Pairs of keys and values, and the question for one of them: prompts for `recall-lm`.

    The samples are those of :class:`~probes.needle.NeedleInHaystack`, so every score of that probe can be computed: the
    needle is the pair, the answer its value.

    Args:
        lengths: tokens of prompt and answer together.
        n: samples of each length.
        seed: of keys, values and hay. Training uses seeds from 2**32 up.
    """

    lengths: tuple[int, ...] = (64, 256)
    n: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self.lengths, self.n, self.seed)

    def build(self, model_or_tokenizer: Any) -> list[NeedleSample]:
        """The samples, by length.

        Raises:
            ProbeError: a tokenizer with another vocabulary, or a length too short for a pair and its question.
        """
        words = _known(model_or_tokenizer)
        samples: list[NeedleSample] = []
        for length in self.lengths:
            batch = key_values(np.random.default_rng((self.seed, 1, length)), self.n, length)
            samples += [_sample(words, batch, row, back=2, share=None) for row in range(self.n)]
        return samples

    def judge(self, sample: NeedleSample, generated: str) -> bool:
        """Does the generated text begin with exactly this value?"""
        return _said(generated) == sample.answer


@dataclass(frozen=True)
class NeedleStrings:
    """``needle k3 is v7 v90 v2 .`` in hay at every depth and length, and the question: prompts for `recall-lm`.

    Args:
        lengths: tokens of prompt and answer together.
        depths: 0 (before the hay) to 1 (after it).
        n: samples of each length and depth.
        seed: of keys, values and hay. Training uses seeds from 2**32 up.
    """

    lengths: tuple[int, ...] = (64, 256)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    n: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self.lengths, self.n, self.seed)
        if not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise ProbeError(f"depths must lie in [0, 1], got {self.depths}")

    def build(self, model_or_tokenizer: Any) -> list[NeedleSample]:
        """The samples, by length, then depth.

        Raises:
            ProbeError: a tokenizer with another vocabulary, or a length too short for needle and question.
        """
        words = _known(model_or_tokenizer)
        samples: list[NeedleSample] = []
        for length in self.lengths:
            for number, depth in enumerate(self.depths):
                batch = needles(np.random.default_rng((self.seed, 2, length, number)), self.n, length, depth=depth)
                samples += [_sample(words, batch, row, back=3, share=depth) for row in range(self.n)]
        return samples

    def judge(self, sample: NeedleSample, generated: str) -> bool:
        """Does the generated text begin with exactly this value?"""
        return _said(generated) == sample.answer


@cache
def _bigrams() -> tuple[NDArray[np.float64], Ints]:
    """Zipf probabilities ``[word]`` and the table of successors ``[word, SUCCESSORS]``: one world, whatever the seed."""
    zipf = 1 / np.arange(1, N_WORDS + 1)
    table = np.random.default_rng(20240501).integers(0, N_WORDS, (N_WORDS, SUCCESSORS))
    return zipf / zipf.sum(), table.astype(np.int32)


def _hay(rng: np.random.Generator, n: int, length: int) -> Ints:
    """Words ``[n, length]``: each follows its predecessor by the table with probability FOLLOWS, else it is a Zipf draw."""
    zipf, table = _bigrams()
    words = np.searchsorted(np.cumsum(zipf)[:-1], rng.random((n, length)))
    follows = rng.random((n, length)) < FOLLOWS
    follows[:, :1] = False
    which = rng.integers(0, SUCCESSORS, (n, length))
    # A word depends on those before it back to the last free draw: all words equally far from theirs are made at once.
    place = np.broadcast_to(np.arange(length), (n, length))
    age = place - np.maximum.accumulate(np.where(follows, 0, place), 1)
    for step in range(1, int(age.max(initial=0)) + 1):
        row, at = np.nonzero(age == step)
        words[row, at] = table[words[row, at - 1], which[row, at]]
    return (words + FIRST_WORD).astype(np.int32)


def _answer(batch: Batch, rows: Any, start: Any, found: Any, sizes: Any, end: int) -> None:
    """Write the answers ``[n, question]`` of ``sizes`` tokens at ``start``, copied from ``found``, and their end marks."""
    number = np.broadcast_to(np.arange(sizes.shape[1]), sizes.shape)
    for part in range(3):
        there = part < sizes
        at = (rows[there], (start + part)[there])
        batch.ids[at] = batch.ids[rows[there], (found + part)[there]]
        batch.answer[at] = True
        batch.source[at] = (found + part)[there]
        batch.question[at] = number[there]
    batch.ids[rows, start + sizes] = end
    batch.end[rows, start + sizes] = True


def _empty(ids: Ints) -> Batch:
    no = np.full(ids.shape, -1, np.int32)
    return Batch(ids, np.zeros(ids.shape, np.bool_), np.zeros(ids.shape, np.bool_), no, no.copy())


def _sample(words: Any, batch: Batch, row: int, *, back: int, share: float | None) -> NeedleSample:
    """The only question of a sequence as a prompt; its fact begins ``back`` tokens before the value."""
    at = np.flatnonzero(batch.answer[row])
    ids = batch.ids[row]
    first, last = int(batch.source[row, at[0]]), int(batch.source[row, at[-1]]) + 1
    asked = int(np.flatnonzero(ids == QUESTION)[-1])
    prompt, answer = ids[: at[0]].tolist(), ids[at].tolist()
    text = words.decode(prompt[1:])
    return NeedleSample(
        tuple(prompt), text, words.decode(ids[first - back : last + 1].tolist()), words.decode(prompt[asked:]),
        words.decode(answer), (first - back, last + 1), (first, last), tuple(answer),
        share if share is not None else (first - back - 1) / max(1, asked - 1 - (last + 1 - first + back)), len(ids),
    )  # fmt: skip


def _said(generated: str) -> str:
    """The values in front of the first word that is none, which ends an answer."""
    said: list[str] = []
    for word in generated.split():
        if not (word.startswith("v") and word[1:].isdigit()):
            break
        said.append(word)
    return " ".join(said)


def _known(model_or_tokenizer: Any) -> Any:
    words = tokenizer_of(model_or_tokenizer)
    if len(words) != len(VOCABULARY) or words.convert_ids_to_tokens([BOS, NEEDLE, FIRST_WORD]) != [
        "<bos>",
        "needle",
        "w0",
    ]:
        raise ProbeError(f"the tokenizer must be that of recall-lm ({len(VOCABULARY)} words), got one of {len(words)}")
    return words


def _check(n: int, length: int, least: int) -> None:
    if n < 1 or length < least:
        raise ProbeError(f"n must be at least 1 and length at least {least}, got n={n}, length={length}")


def _check_settings(lengths: tuple[int, ...], n: int, seed: int) -> None:
    if not lengths or n < 1 or not 0 <= seed < 2**32:
        raise ProbeError(f"lengths must not be empty, n at least 1, seed 0 to 2**32 - 1; got {lengths}, {n}, {seed}")
