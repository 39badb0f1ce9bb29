"""A needle that shares no content word with its question: finding it takes world knowledge (:class:`NonLiteral`)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from probes.gate import first_of
from probes.haystack import Haystack, Span, write
from probes.needle import NeedleSample
from probes.samples import ProbeError

Form = Literal["one-hop", "two-hop", "direct"]

# Landmark, its city, its country. Wording and choice are ours; no landmark names its place.
PLACES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "detect": (
        ("the Eiffel Tower", "Paris", "France"),
        ("the Colosseum", "Rome", "Italy"),
        ("the Brandenburg Gate", "Berlin", "Germany"),
        ("the Acropolis", "Athens", "Greece"),
        ("the Taj Mahal", "Agra", "India"),
        ("the Kremlin", "Moscow", "Russia"),
        ("the Sagrada Familia", "Barcelona", "Spain"),
        ("the Rijksmuseum", "Amsterdam", "the Netherlands"),
    ),
    "test": (
        ("Buckingham Palace", "London", "England"),
        ("the Forbidden City", "Beijing", "China"),
        ("the Hagia Sophia", "Istanbul", "Turkey"),
        ("the Charles Bridge", "Prague", "the Czech Republic"),
        ("the Petronas Towers", "Kuala Lumpur", "Malaysia"),
        ("the statue of Christ the Redeemer", "Rio de Janeiro", "Brazil"),
        ("the Burj Khalifa", "Dubai", "the United Arab Emirates"),
        ("the Lincoln Memorial", "Washington", "the United States"),
    ),
}
NAMES: dict[str, tuple[str, ...]] = {
    "detect": ("Yuki", "Stuart", "Veronica", "Caleb", "Mandy", "Diana", "Gary", "Megan"),
    "test": ("Calvin", "Gwen", "Tanya", "Kyle", "Emma", "Rachel", "Victor", "Nora"),
}


@dataclass(frozen=True)
class NonLiteralSample(NeedleSample):
    """One haystack; ``answer`` is the name in the needle.

    Attributes:
        landmark: what the needle names.
        landmark_span: its token positions: where the hop must land.
        place: what the question names instead (the landmark itself where the form is direct).
        distractors: sentences about other people and landmarks, in the order of the prompt.
        distractor_spans: token positions of each.
        distractor_answers: the name in each.
    """

    landmark: str = ""
    landmark_span: Span = (0, 0)
    place: str = ""
    distractors: tuple[str, ...] = ()
    distractor_spans: tuple[Span, ...] = ()
    distractor_answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class NonLiteral(Haystack[NonLiteralSample]):
    """A needle "Yuki lives next to the Colosseum." in prose, and the question which person has been to Rome.

    As NoLiMa: needle and question share no content word, so matching words does not find it. The facts are our own. The prose
    names nobody, so without the distractors (other people at other landmarks, which NoLiMa has in an extension only) any name
    would be the right one. The splits share neither names, landmarks nor places.

    When not to use it: a model that does not know where the landmarks are; gate on ``form="direct"`` and ``"one-hop"`` both.

    Args:
        lengths: tokens of the whole prompt, question included.
        depths: of the needle, 0 (before the first filler sentence) to 1 (after the last).
        n: samples of each length and depth.
        split: ``"detect"`` or ``"test"``.
        seed: of filler, names, landmarks and places in the text.
        chat: put the prompt in the model's chat template (needs an :class:`interp.Model`).
        form: ``"one-hop"`` asks for the city, ``"two-hop"`` for the country, ``"direct"`` for the landmark itself (the literal
            control: the same prompt but for the question).
        inverted: "The Colosseum is next to where Yuki lives.": the name behind the landmark, where a causal model can no
            longer bind the landmark to a name that it has read.
        n_distractors: other people, 0 to 7.
    """

    paper: ClassVar[str] = "Modarressi et al. 2025, https://arxiv.org/abs/2502.05167"
    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)
    max_new_tokens: ClassVar[int] = 16

    form: Form = "one-hop"
    inverted: bool = False
    n_distractors: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("one-hop", "two-hop", "direct"):
            raise ProbeError(f"form must be 'one-hop', 'two-hop' or 'direct', got {self.form!r}")
        most = len(NAMES[self.split]) - 1
        if not 0 <= self.n_distractors <= most:
            raise ProbeError(f"n_distractors must lie in [0, {most}], got {self.n_distractors}")

    def judge(self, sample: NonLiteralSample, generated: str) -> bool:
        """Is it the right name, with no other person's before it?"""
        return first_of(generated, sample.answer, sample.distractor_answers, ignore_case=True)

    def sample_at(self, model_or_tokenizer: Any, length: int, depth: float, k: int) -> NonLiteralSample:
        # The form is no part of the seed: the three forms ask different questions of one text.
        seed = f"non-literal {self.split} {self.seed} {length} {depth} {k}"
        rng = random.Random(seed)
        names = rng.sample(NAMES[self.split], self.n_distractors + 1)
        landmarks = rng.sample(PLACES[self.split], self.n_distractors + 1)
        landmark, city, country = landmarks[0]
        others = sorted(
            (rng.random(), name, self._sentence(name, there[0]))
            for name, there in zip(names[1:], landmarks[1:], strict=True)
        )
        needle = self._sentence(names[0], landmark)
        asked = "lives next to" if self.form == "direct" else "has been to"
        place = {"one-hop": city, "two-hop": country, "direct": landmark}[self.form]
        question = f"Which person {asked} {place}?"

        def ask(body: str) -> str:
            if self.chat:
                return f"{body}\n\n{question} Answer with the name only."
            return f"{body}\n\nQuestion: {question}\nAnswer: The name of the person who {asked} {place} is"

        places = [(depth, needle), *((d, text) for d, _, text in others)]
        written = write(model_or_tokenizer, places, ask, length, seed, chat=self.chat)
        span = written.span(needle, names[0])
        bare = landmark.removeprefix("the ")
        return NonLiteralSample(
            written.ids, written.text, needle, question, names[0], written.span(needle), span, written.ids[slice(*span)],
            written.depth(depth), length, bare, written.span(needle, bare), place,
            tuple(text for _, _, text in others), tuple(written.span(text) for _, _, text in others),
            tuple(name for _, name, _ in others),
        )  # fmt: skip

    def _sentence(self, name: str, landmark: str) -> str:
        if self.inverted:
            return f"{landmark[0].upper()}{landmark[1:]} is next to where {name} lives."
        return f"{name} lives next to {landmark}."
