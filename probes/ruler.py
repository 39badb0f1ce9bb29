"""Harder needles, in the forms of RULER: several keys (:class:`MultiKey`), chains of variables (:class:`VariableTracking`)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from probes.gate import first_of
from probes.haystack import Haystack, Span, Split, check_split, five_digits, write
from probes.needle import CITIES, NeedleSample, number_prompt, sentence
from probes.samples import ProbeError, Sample, tokenizer_of

PAPER = "Hsieh et al. 2024, https://arxiv.org/abs/2404.06654"
LETTERS = {"detect": "ABCDEFGHIJKLM", "test": "NOPQRSTUVWXYZ"}


@dataclass(frozen=True)
class MultiKeySample(NeedleSample):
    """One haystack with several needles of one form, of which ``needle`` is asked for.

    Attributes:
        distractors: the other sentences, in the order of the prompt.
        distractor_spans: token positions of each.
        distractor_answers: the number of each.
        distractor_answer_spans: token positions of these.
    """

    distractors: tuple[str, ...] = ()
    distractor_spans: tuple[Span, ...] = ()
    distractor_answers: tuple[str, ...] = ()
    distractor_answer_spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class MultiKey(Haystack[MultiKeySample]):
    """A needle among others of the same form: the key must be matched, not only the form found.

    As RULER's multi-key NIAH, with this package's needle. All numbers of a prompt differ; the others stand at random depths.

    Args:
        lengths: tokens of the whole prompt, question included.
        depths: of the needle that is asked for, 0 (before the first filler sentence) to 1 (after the last).
        n: samples of each length and depth.
        split: ``"detect"`` or ``"test"``.
        seed: of filler, cities, numbers and places.
        chat: put the prompt in the model's chat template (needs an :class:`interp.Model`).
        n_keys: needles, the one asked for included: 4 in RULER's ``niah_multikey_1``.
        strict: an answer is wrong where another needle's number comes before the right one; RULER (False) only asks that the
            right one is there, which a list of all numbers fulfils.
    """

    paper: ClassVar[str] = PAPER
    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)
    max_new_tokens: ClassVar[int] = 32

    n_keys: int = 4
    strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        most = len(CITIES[self.split])
        if not 2 <= self.n_keys <= most:
            raise ProbeError(f"n_keys must lie in [2, {most}], got {self.n_keys}")

    def judge(self, sample: MultiKeySample, generated: str) -> bool:
        """Is it the number that was asked for?"""
        return first_of(generated, sample.answer, sample.distractor_answers if self.strict else ())

    def sample_at(self, model_or_tokenizer: Any, length: int, depth: float, k: int) -> MultiKeySample:
        seed = f"multi-key {self.split} {self.seed} {length} {depth} {k} {self.n_keys}"
        rng = random.Random(seed)
        cities = rng.sample(CITIES[self.split], self.n_keys)
        numbers = _different(rng, self.split, self.n_keys)
        # Sorted, so that the others are listed in the order of the prompt.
        others = sorted((rng.random(), city, number) for city, number in zip(cities[1:], numbers[1:], strict=True))
        needle = sentence(cities[0], numbers[0])
        distractors = tuple(sentence(city, number) for _, city, number in others)
        places = [(depth, needle), *((d, text) for (d, _, _), text in zip(others, distractors, strict=True))]
        written = write(
            model_or_tokenizer, places, lambda body: number_prompt(body, cities[0], chat=self.chat), length, seed,
            chat=self.chat,
        )  # fmt: skip
        span = written.span(needle, numbers[0])
        others_numbers = tuple(number for _, _, number in others)
        return MultiKeySample(
            written.ids, written.text, needle, f"What is the secret number of {cities[0]}?", numbers[0],
            written.span(needle), span, written.ids[slice(*span)], written.depth(depth), length,
            distractors, tuple(written.span(text) for text in distractors), others_numbers,
            tuple(written.span(text, number) for text, number in zip(distractors, others_numbers, strict=True)),
        )  # fmt: skip


@dataclass(frozen=True)
class VariableSample(Sample):
    """One haystack with chains of assignments, of which one is asked for.

    Attributes:
        value: the number at the start of the chain.
        variables: names that have it, in the order of the chain; the answer is all of them.
        statements: the chain's sentences, one a variable.
        statement_spans: token positions of each.
        name_spans: token positions of the name that each sentence assigns to.
        source_spans: token positions of what each assigns: the number, then the name before.
        distractors: names of the other chains.
        distractor_spans: token positions of the other chains' sentences.
        target_length: tokens that were asked for.
    """

    value: str = ""
    variables: tuple[str, ...] = ()
    statements: tuple[str, ...] = ()
    statement_spans: tuple[Span, ...] = ()
    name_spans: tuple[Span, ...] = ()
    source_spans: tuple[Span, ...] = ()
    distractors: tuple[str, ...] = ()
    distractor_spans: tuple[Span, ...] = ()
    target_length: int = 0


@dataclass(frozen=True)
class VariableTracking:
    """Chains "VAR AKCDE = 48213." ... "VAR BHJLM = VAR AKCDE." in prose: which variables have the value 48213?

    RULER's variable tracking: each hop must be followed from the last, so no single lookup answers it. Sentences of a chain
    stand in order, at random depths. The splits share neither letters of names nor numbers.

    Args:
        lengths: tokens of the whole prompt, question included.
        n: samples of each length.
        n_hops: assignments after the first; 4 in RULER.
        n_chains: chains with values of their own, the one asked for included; 1 in RULER.
        split: ``"detect"`` or ``"test"``.
        seed: of filler, names, numbers and places.
        chat: put the prompt in the model's chat template (needs an :class:`interp.Model`).
        strict: an answer is wrong where it names a variable of another chain; RULER (False) does not look.
    """

    paper: ClassVar[str] = PAPER
    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)
    max_new_tokens: ClassVar[int] = 64

    lengths: tuple[int, ...] = (512,)
    n: int = 4
    n_hops: int = 4
    n_chains: int = 1
    split: Split = "detect"
    seed: int = 0
    chat: bool = False
    strict: bool = True

    def __post_init__(self) -> None:
        check_split(self.split)
        if not self.lengths or self.n < 1:
            raise ProbeError(f"lengths and n must not be empty, got {self.lengths}, {self.n}")
        if self.n_hops < 1 or self.n_chains < 1:
            raise ProbeError(f"n_hops and n_chains must be at least 1, got {self.n_hops}, {self.n_chains}")

    def build(self, model_or_tokenizer: Any) -> list[VariableSample]:
        """The samples for one model, by length.

        Raises:
            ProbeError: no tokenizer, a length too short for chains and question, or a sentence that the tokenizer's ids do
                not give back.
        """
        tokenizer_of(model_or_tokenizer)
        return [self._sample(model_or_tokenizer, length, k) for length in self.lengths for k in range(self.n)]

    def judge(self, sample: VariableSample, generated: str) -> bool:
        """Are all variables named (and, where strict, none of another chain)?"""
        named = set(re.findall(r"\w+", generated))
        wrong = named.intersection(sample.distractors) if self.strict else set[str]()
        return named.issuperset(sample.variables) and not wrong

    def recall(self, sample: VariableSample, generated: str) -> float:
        """Share of the variables that are named: RULER's score of one sample."""
        named = set(re.findall(r"\w+", generated))
        return sum(name in named for name in sample.variables) / len(sample.variables)

    def _sample(self, model_or_tokenizer: Any, length: int, k: int) -> VariableSample:
        seed = f"variables {self.split} {self.seed} {length} {k} {self.n_hops} {self.n_chains}"
        rng = random.Random(seed)
        each = self.n_hops + 1
        names: list[str] = []
        while len(names) < each * self.n_chains:
            name = "".join(rng.choices(LETTERS[self.split], k=5))
            names += [name] if name not in names else []
        values = _different(rng, self.split, self.n_chains)
        chains = [names[i * each : (i + 1) * each] for i in range(self.n_chains)]
        sources = [[value, *chain[:-1]] for value, chain in zip(values, chains, strict=True)]
        lines = [
            [_assign(n, s, first=not i) for i, (n, s) in enumerate(zip(*pair, strict=True))]
            for pair in zip(chains, sources, strict=True)
        ]
        places = [place for chain in lines for place in zip(sorted(rng.random() for _ in chain), chain, strict=True)]

        def ask(body: str) -> str:
            question = f"Which variables have the value {values[0]}?"
            if self.chat:
                return f"{body}\n\n{question} Answer with the {each} names only."
            return f"{body}\n\nQuestion: {question}\nAnswer: The {each} variables that have the value {values[0]} are:"

        written = write(model_or_tokenizer, places, ask, length, seed, chat=self.chat)
        return VariableSample(
            written.ids, written.text, values[0], tuple(chains[0]), tuple(lines[0]),
            tuple(written.span(line) for line in lines[0]),
            tuple(written.span(line, name) for line, name in zip(lines[0], chains[0], strict=True)),
            tuple(written.span(line, source) for line, source in zip(lines[0], sources[0], strict=True)),
            tuple(name for chain in chains[1:] for name in chain),
            tuple(written.span(line) for chain in lines[1:] for line in chain), length,
        )  # fmt: skip


def _assign(name: str, source: str, *, first: bool) -> str:
    return f"VAR {name} = {source}." if first else f"VAR {name} = VAR {source}."


def _different(rng: random.Random, split: Split, count: int) -> list[str]:
    numbers: list[str] = []
    while len(numbers) < count:
        number = five_digits(rng, split)
        numbers += [number] if number not in numbers else []
    return numbers
