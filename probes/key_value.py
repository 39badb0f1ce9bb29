"""Keys with values, and the question for one of them: as JSON (:class:`KeyValue`) or as bare ids (:class:`KeyValueTokens`)."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from probes.haystack import Span, Written
from probes.needle import NeedleSample
from probes.samples import ProbeError, bos_id, encode, special_ids, tokenizer_of
from probes.text import chat_ids

PAPER = "Liu et al. 2023, https://arxiv.org/abs/2307.03172"


@dataclass(frozen=True)
class KeyValueSample(NeedleSample):
    """One list of pairs. ``needle`` is the pair that is asked for, ``answer`` its value, ``depth`` its place in the list.

    Attributes:
        key: as text; empty where ids were drawn and there is no tokenizer.
        key_span: token positions of the key in its pair.
        query_span: token positions of the key in the question.
        n_pairs: pairs in the list.
        index: number of the pair that is asked for.
    """

    key: str = ""
    key_span: Span = (0, 0)
    query_span: Span = (0, 0)
    n_pairs: int = 0
    index: int = 0


@dataclass(frozen=True)
class KeyValue:
    """A JSON object of random UUIDs, and the question for the value of one key, at every size and place.

    The synthetic task of "Lost in the middle": nothing but the key tells the pairs apart, and nothing in a UUID is ordinary
    language. One pair takes about 50 to 80 tokens.

    When not to use it: small models and small vocabularies; see :class:`KeyValueTokens`.

    Args:
        n_pairs: sizes of the object; 75, 140 and 300 in the paper.
        positions: place of the pair that is asked for, 0 (first) to 1 (last).
        n: samples of each size and place.
        seed: of keys and values.
        chat: put the prompt in the model's chat template (needs an :class:`interp.Model`).
    """

    paper: ClassVar[str] = PAPER
    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)
    max_new_tokens: ClassVar[int] = 64

    n_pairs: tuple[int, ...] = (10,)
    positions: tuple[float, ...] = (0.0, 0.5, 1.0)
    n: int = 1
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        _check(self.n_pairs, self.positions, self.n)

    def build(self, model_or_tokenizer: Any) -> list[KeyValueSample]:
        """The samples for one model, by size, then place.

        Raises:
            ProbeError: no tokenizer, or a pair that the tokenizer's ids do not give back.
        """
        tokenizer_of(model_or_tokenizer)
        cells = [(size, place, k) for size in self.n_pairs for place in self.positions for k in range(self.n)]
        return [self._sample(model_or_tokenizer, *cell) for cell in cells]

    def judge(self, sample: KeyValueSample, generated: str) -> bool:
        """Is the value in the generated text, whatever its case (the paper's rule)?"""
        return sample.answer.lower() in generated.lower()

    def _sample(self, model_or_tokenizer: Any, size: int, place: float, k: int) -> KeyValueSample:
        # Size and place are no part of the seed but for the pair that is asked for: the same list, another question.
        rng = random.Random(f"key-value {self.seed} {size} {k}")
        pairs = [(_uuid(rng), _uuid(rng)) for _ in range(size)]
        index = round(place * (size - 1))
        key, value = pairs[index]
        body = ",\n ".join(f'"{a}": "{b}"' for a, b in pairs)
        question = f'Key: "{key}"'
        text = (
            "Here is a JSON object. Give the value that belongs to the key below it.\n\n"
            f"JSON:\n{{{body}}}\n\n{question}\nValue:"
        )
        ids = chat_ids(model_or_tokenizer, text) if self.chat else encode(model_or_tokenizer, text)
        written = Written(model_or_tokenizer, ids, text, self.chat, 0)
        needle = f'"{key}": "{value}"'
        span = written.span(needle, value)
        return KeyValueSample(
            ids, text, needle, question, value, written.span(needle), span, ids[slice(*span)], _depth(index, size), len(ids),
            key, written.span(needle, key), written.span(question, key), size, index,
        )  # fmt: skip


@dataclass(frozen=True)
class KeyValueTokens:
    """``[BOS] k1 v1 k2 v2 ... k2`` -> ``v2``: pairs of bare ids, for small vocabularies and models without a tokenizer.

    Keys of one sample are all different, and so are values where their alphabet allows it.

    Args:
        keys: ids that keys are made of.
        values: ids that values are made of; None is the same alphabet, and then no id is in both a key and a value of one
            sample where it is large enough.
        n_pairs: sizes of the list.
        positions: place of the pair that is asked for, 0 (first) to 1 (last).
        n: samples of each size and place.
        key_length: ids of a key.
        value_length: ids of a value.
        between: ids between key and value, also in the question.
        after: ids behind each pair.
        question: ids before the key that is asked for.
        seed: of the draw.
        bos: put the model's BOS token, if it has one, in front.
    """

    paper: ClassVar[str] = PAPER
    judges: ClassVar[str] = "ids"

    keys: Sequence[int]
    values: Sequence[int] | None = None
    n_pairs: tuple[int, ...] = (8,)
    positions: tuple[float, ...] = (0.0, 0.5, 1.0)
    n: int = 1
    key_length: int = 1
    value_length: int = 1
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    question: tuple[int, ...] = ()
    seed: int = 0
    bos: bool = True

    def __post_init__(self) -> None:
        _check(self.n_pairs, self.positions, self.n)
        if self.key_length < 1 or self.value_length < 1:
            raise ProbeError(
                f"key_length and value_length must be at least 1, got {self.key_length}, {self.value_length}"
            )
        n_keys = len(set(self.keys)) ** self.key_length
        if n_keys < max(self.n_pairs):
            raise ProbeError(f"keys must give {max(self.n_pairs)} different keys, and give {n_keys}")
        if self.values is not None and not self.values:
            raise ProbeError("values must have at least one id, got none")

    @property
    def max_new_tokens(self) -> int:
        return self.value_length

    def build(self, model_or_tokenizer: Any) -> list[KeyValueSample]:
        """The samples for one model, by size, then place.

        Raises:
            ProbeError: special tokens among keys or values.
        """
        has_words = hasattr(model_or_tokenizer, "convert_ids_to_tokens")
        tokenizer = model_or_tokenizer if has_words else getattr(model_or_tokenizer, "tokenizer", None)
        special = special_ids(tokenizer, getattr(model_or_tokenizer, "config", None))
        wrong = sorted(special.intersection([*self.keys, *(self.values or ())]))
        if wrong:
            raise ProbeError(f"keys and values must be without the model's special tokens, got {wrong}")
        first = bos_id(model_or_tokenizer) if self.bos else None
        front = () if first is None else (first,)
        cells = [(size, place, k) for size in self.n_pairs for place in self.positions for k in range(self.n)]
        return [self._sample(tokenizer, front, *cell) for cell in cells]

    def judge(self, sample: KeyValueSample, generated: Sequence[int] | str) -> bool:
        """Do the generated ids begin with exactly this value (of a text: does it)?"""
        if isinstance(generated, str):
            return bool(sample.answer) and generated.strip().startswith(sample.answer)
        return tuple(generated[: len(sample.answer_ids)]) == sample.answer_ids

    def _sample(self, tokenizer: Any, front: tuple[int, ...], size: int, place: float, k: int) -> KeyValueSample:
        rng = random.Random(f"key-value tokens {self.seed} {size} {k}")
        keys = _draw(rng, sorted(set(self.keys)), self.key_length, size)
        alphabet = sorted(set(self.keys if self.values is None else self.values))
        used = {i for key in keys for i in key}
        free = [i for i in alphabet if i not in used] or alphabet
        values = _draw(rng, free, self.value_length, size)
        index = round(place * (size - 1))
        ids, starts = list(front), list[int]()
        for key, value in zip(keys, values, strict=True):
            starts.append(len(ids))
            ids += [*key, *self.between, *value, *self.after]
        asked = len(ids) + len(self.question)
        ids += [*self.question, *keys[index], *self.between]
        start = starts[index]
        first = start + self.key_length + len(self.between)
        stop = first + self.value_length

        def text(part: Sequence[int]) -> str:
            return "" if tokenizer is None else tokenizer.decode(list(part)).strip()

        return KeyValueSample(
            tuple(ids), "", text(ids[start:stop]), text(ids[asked:]), text(values[index]), (start, stop), (first, stop),
            values[index], _depth(index, size), len(ids), text(keys[index]), (start, start + self.key_length),
            (asked, asked + self.key_length), size, index,
        )  # fmt: skip


def _check(n_pairs: tuple[int, ...], positions: tuple[float, ...], n: int) -> None:
    if not n_pairs or min(n_pairs) < 1 or n < 1:
        raise ProbeError(f"n_pairs and n must be at least 1, got {n_pairs}, {n}")
    if not positions or not all(0 <= p <= 1 for p in positions):
        raise ProbeError(f"positions must lie in [0, 1], got {positions}")


def _depth(index: int, size: int) -> float:
    return index / (size - 1) if size > 1 else 0.0


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _draw(rng: random.Random, alphabet: list[int], length: int, count: int) -> list[tuple[int, ...]]:
    """Words of ``length`` ids, all different where the alphabet allows it."""
    if length == 1 and count <= len(alphabet):
        return [(i,) for i in rng.sample(alphabet, count)]
    different = count <= len(alphabet) ** length
    words: list[tuple[int, ...]] = []
    seen: set[tuple[int, ...]] = set()
    while len(words) < count:
        word = tuple(rng.choices(alphabet, k=length))
        if not different or word not in seen:
            words.append(word)
            seen.add(word)
    return words
