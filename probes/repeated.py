"""Random tokens, repeated: what induction and duplicate-token heads are found with (:class:`RepeatedTokens`)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from probes.samples import ProbeError, Sample, bos_id, config_of, special_ids, tokenizer_of

SPECIAL_LOOK = re.compile(r"<[^<>]*>|\[[A-Za-z]+\d*\]")


@dataclass(frozen=True)
class RepeatedSample(Sample):
    """``[BOS] x x ...`` and its control, an un-repeated random sequence of the same length.

    Attributes:
        start: position of the first token of x (1 with a BOS, else 0).
        length: tokens in x.
        repeats: copies of x.
        control_ids: ids of the control ``[position]``, as many as ``ids``.
    """

    start: int = 0
    length: int = 0
    repeats: int = 2
    control_ids: tuple[int, ...] = ()

    @property
    def last_copy(self) -> range:
        """Positions of the last copy. Each of its rows has every earlier copy whole before it."""
        stop = self.start + self.length * self.repeats
        return range(stop - self.length, stop)

    @property
    def control(self) -> Sample:
        return Sample(self.control_ids)


@dataclass(frozen=True)
class RepeatedTokens:
    """``n`` sequences ``[BOS] x x`` of random tokens x, as in the TransformerLens demos and Olsson et al. 2022.

    Tokens are drawn without replacement where the vocabulary allows it, so that a token's earlier occurrence is unique (the
    TransformerLens demos draw with replacement). Special tokens and tokens that look like markup are left out.

    Args:
        n: sequences.
        length: tokens in one copy.
        repeats: copies, at least 2.
        seed: of the draw.
        vocabulary: ids to draw from; None is the tokenizer's ordinary vocabulary. A model without a tokenizer needs it.
        bos: put the model's BOS token, if it has one, before the first copy.
    """

    paper: ClassVar[str] = "Olsson et al. 2022, https://arxiv.org/abs/2209.11895"
    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)

    n: int = 8
    length: int = 48
    repeats: int = 2
    seed: int = 0
    vocabulary: Sequence[int] | None = None
    bos: bool = True

    def __post_init__(self) -> None:
        if self.n < 1 or self.length < 2 or self.repeats < 2:
            got = f"n={self.n}, length={self.length}, repeats={self.repeats}"
            raise ProbeError(f"n must be at least 1, length and repeats at least 2, got {got}")

    def build(self, model_or_tokenizer: Any) -> list[RepeatedSample]:
        """The samples for one model.

        Raises:
            ProbeError: no tokenizer and no ``vocabulary``, or special tokens in it.
        """
        config = config_of(model_or_tokenizer)
        if self.vocabulary is not None:
            tokenizer = getattr(model_or_tokenizer, "tokenizer", None)
            vocabulary = list(self.vocabulary)
            # Traces count special tokens apart from all offsets, so a copy with one in it would lose weight unseen.
            special = sorted(special_ids(tokenizer, config).intersection(vocabulary))
            if special:
                raise ProbeError(f"vocabulary must be without the model's special tokens, got {special}")
        else:
            tokenizer = tokenizer_of(model_or_tokenizer)
            vocabulary = ordinary_ids(tokenizer, config)
        if len(vocabulary) < 2:
            raise ProbeError(f"vocabulary must have at least two ids, got {len(vocabulary)}")
        first = bos_id(model_or_tokenizer)
        front = (first,) if self.bos and first is not None else ()
        rng = random.Random(f"repeated tokens {self.seed}")
        samples: list[RepeatedSample] = []
        for _ in range(self.n):
            copy = _draw(rng, vocabulary, self.length)
            control = _draw(rng, vocabulary, self.length * self.repeats)
            ids = front + copy * self.repeats
            samples.append(RepeatedSample(ids, "", len(front), self.length, self.repeats, control_ids=front + control))
        return samples


def ordinary_ids(tokenizer: Any, config: Any = None) -> list[int]:
    """Ids of the vocabulary that are neither special nor look like markup (``<0x0A>``, ``<unused3>``, ``[MASK]``)."""
    size = len(tokenizer)
    rows = getattr(_text_config(config), "vocab_size", None)
    special = special_ids(tokenizer, config)
    ids = range(min(size, rows) if isinstance(rows, int) else size)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [i for i, p in zip(ids, pieces, strict=True) if i not in special and p and not SPECIAL_LOOK.fullmatch(p)]


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _draw(rng: random.Random, vocabulary: list[int], count: int) -> tuple[int, ...]:
    if count <= len(vocabulary):
        return tuple(rng.sample(vocabulary, count))
    return tuple(rng.choice(vocabulary) for _ in range(count))
