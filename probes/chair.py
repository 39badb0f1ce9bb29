"""CHAIR: which objects a caption names that are not in its image (:class:`Chair`).

Rohrbach et al. 2018, https://arxiv.org/abs/1809.02156. With M the mentions of objects in all captions and M_h those of objects
that are not in the image of their caption:

    CHAIR_S = captions with a mention in M_h / captions            CHAIR_I = |M_h| / |M|      (ratios of corpus sums)

A model that says less, or the same again, has a lower CHAIR; hence recall, precision and F1 on sets, length and repetition
beside it, in every result, and :mod:`probes.chair_compare` for comparisons at equal length or recall.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from probes.captions import count_words, measure
from probes.intervals import LEVEL, RESAMPLES, Estimate, Floats, bootstrap, ratio, sums_by_unit
from probes.mentions import Matcher
from probes.samples import ProbeError

Truth = Mapping[Hashable, Collection[str]]
Captions = Mapping[Hashable, str | Sequence[str]] | Iterable[tuple[Hashable, str]]
Lineage = Literal["mentions", "objects"]
Missing = Literal["error", "empty"]


@dataclass(frozen=True)
class JudgedMention:
    """A mention in a caption.

    Attributes:
        name: canonical object name.
        start: first character.
        stop: the character after its last.
        word: number of the word (between spaces) it begins in, from 0.
        hallucinated: the object is not in the image.
    """

    name: str
    start: int
    stop: int
    word: int
    hallucinated: bool


@dataclass(frozen=True)
class CaptionRow:
    """One caption, judged.

    Attributes:
        image_id: its image.
        text: the caption.
        words: pieces between spaces.
        mentions: in the order of the text; with lineage "objects" only the first one of each object.
        truth: what is in the image.
        repeated: share of its 4-grams that stood before; NaN below four words.
        known: truth has the image; else it was taken to be empty.
    """

    image_id: Hashable
    text: str
    words: int
    mentions: tuple[JudgedMention, ...]
    truth: frozenset[str]
    repeated: float
    known: bool = True

    @property
    def hallucinated(self) -> int:
        """Mentions of objects that are not in the image."""
        return sum(m.hallucinated for m in self.mentions)

    @property
    def hits(self) -> int:
        """Objects of the image that it names."""
        return len({m.name for m in self.mentions if not m.hallucinated})

    @property
    def chair_i(self) -> float:
        """Share of its mentions that are hallucinated; NaN without mentions. (The corpus figure is no mean of these.)"""
        return self.hallucinated / len(self.mentions) if self.mentions else math.nan

    @property
    def recall(self) -> float:
        """Share of the image's objects that it names; NaN where the image has none."""
        return self.hits / len(self.truth) if self.truth else math.nan

    def until(self, stop: int) -> CaptionRow:
        """The caption up to character ``stop``, with the mentions that end there: half a "baby elephant" is no baby."""
        text = self.text[:stop]
        mentions = tuple(m for m in self.mentions if m.stop <= stop)
        return replace(self, text=text, words=count_words(text), mentions=mentions, repeated=measure(text).repeated_4)

    def first(self, max_words: int) -> CaptionRow:
        """The caption up to the end of its ``max_words``-th word."""
        if self.words <= max_words:
            return self
        rest = self.text.split(None, max_words)[-1] if max_words else self.text
        return self.until(len(self.text[: len(self.text.rstrip()) - len(rest.rstrip())].rstrip()))


FIGURES = (
    "chair_s", "chair_i", "recall", "precision", "f1", "words", "repetition", "empty", "without_objects",
)  # fmt: skip


@dataclass(frozen=True)
class ChairResult:
    """The figures of a set of captions, each with an interval that resamples images.

    Attributes:
        chair_s: captions that hallucinate; n captions, empty ones and those without objects among them.
        chair_i: mentions that are hallucinated; n mentions; NaN where no caption names an object.
        recall: named objects of the image / objects of the image, sums over captions; n the latter.
        precision: named objects of the image / named objects, sums over captions; n the latter. Not 1 - CHAIR_I: on sets.
        f1: their harmonic mean; NaN where one of them is, 0 where both are 0. n captions.
        words: mean number of words; n captions.
        repetition: mean share of repeated 4-grams; n captions of at least four words.
        empty: share of captions without a word; n captions.
        without_objects: share of captions that name no object, empty ones among them; n captions.
        n_captions: how many.
        n_images: of how many images.
        n_empty: captions without a word.
        n_without_objects: captions that name no object.
        n_unknown: captions of images that truth has not (with ``missing="empty"``).
        rows: caption by caption.
    """

    chair_s: Estimate
    chair_i: Estimate
    recall: Estimate
    precision: Estimate
    f1: Estimate
    words: Estimate
    repetition: Estimate
    empty: Estimate
    without_objects: Estimate
    n_captions: int
    n_images: int
    n_empty: int
    n_without_objects: int
    n_unknown: int
    rows: tuple[CaptionRow, ...]

    @property
    def figures(self) -> dict[str, Estimate]:
        """The estimates by name."""
        return {name: getattr(self, name) for name in FIGURES}


@dataclass(frozen=True)
class Chair:
    """The judge of captions.

    The published codes differ; their differences are options here and in the making of the truth
    (:func:`probes.coco.coco_truth`: instances alone or with reference captions). All of them count mentions, with
    repetition. Recall, precision and F1 are those of the PAI and OPERA code; length is VHR's ``len(caption.split())``.

    Args:
        truth: image id to the names of the objects in it.
        matcher: finds mentions, e.g. :func:`probes.coco_words.coco_matcher` or a :class:`probes.mentions.WordMatcher`.
        lineage: "mentions" counts every mention, "objects" each object once a caption, so that a loop weighs nothing.
        missing: a caption of an image that ``truth`` has not is an error (the original, VHR), or its image is taken to be
            empty, so that all of its mentions are hallucinated (PAI, OPERA, PAINT).
        n_resamples: of the bootstrap, as ``level`` and ``seed``.
    """

    truth: Truth
    matcher: Matcher
    lineage: Lineage = "mentions"
    missing: Missing = "error"
    n_resamples: int = RESAMPLES
    level: float = LEVEL
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lineage not in get_args(Lineage):
            raise ProbeError(f"lineage must be one of {get_args(Lineage)}, got {self.lineage!r}")
        if self.missing not in get_args(Missing):
            raise ProbeError(f"missing must be one of {get_args(Missing)}, got {self.missing!r}")
        known = getattr(self.matcher, "names", None)
        for image, objects in self.truth.items():
            if isinstance(objects, str):
                raise ProbeError(f"truth must have a collection of names an image, got {objects!r} for {image!r}")
            if known is not None and (strange := set(objects).difference(known)):
                raise ProbeError(f"truth must have names that the matcher knows, got {sorted(strange)} for {image!r}")

    def judge(self, captions: Captions, *, max_words: int | None = None) -> ChairResult:
        """Judge captions.

        Args:
            captions: image id to its caption or captions, or pairs (image id, caption).
            max_words: only the first words of each caption, so that texts of different length can be compared.

        Raises:
            ProbeError: no captions, a caption that is no text, an image id that ``truth`` has not (see ``missing``).
        """
        if max_words is not None and max_words < 1:
            raise ProbeError(f"max_words must be at least 1, got {max_words}")
        pairs = _pairs(captions)
        unknown = list(dict.fromkeys(image for image, _ in pairs if image not in self.truth))
        if unknown and self.missing == "error":
            first = ", ".join(repr(image) for image in unknown[:3])
            raise ProbeError(
                f"captions must be of images in truth, got {len(unknown)} unknown image ids ({first}); are they of the same "
                'kind (310196 is not "310196")? missing="empty" counts such an image as empty'
            )
        rows = [self.row(image, text) for image, text in pairs]
        if max_words is not None:
            rows = [row.first(max_words) for row in rows]
        return summarise(rows, n_resamples=self.n_resamples, level=self.level, seed=self.seed)

    def row(self, image_id: Hashable, text: str) -> CaptionRow:
        """Judge one caption."""
        truth = frozenset(self.truth.get(image_id, ()))
        mentions: list[JudgedMention] = []
        for name, start, stop in self.matcher(text):
            if self.lineage == "objects" and any(m.name == name for m in mentions):
                continue
            # The word a mention begins in: one more piece than the text before it has, unless it begins inside a piece.
            before = text[:start]
            word = count_words(before) - (bool(before) and not before[-1].isspace())
            mentions.append(JudgedMention(name, start, stop, word, name not in truth))
        known = image_id in self.truth
        return CaptionRow(image_id, text, count_words(text), tuple(mentions), truth, measure(text).repeated_4, known)


def summarise(
    rows: Sequence[CaptionRow], *, n_resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> ChairResult:
    """The figures of judged captions.

    Raises:
        ProbeError: no rows.
    """
    if not rows:
        raise ProbeError("rows must be at least one caption, got none")
    units, sums = sums_by_unit(columns_of(rows), [row.image_id for row in rows])
    found = bootstrap(lambda w: figures_of(w @ sums), len(units), n_resamples=n_resamples, level=level, seed=seed)
    captions, _, mentions, _, objects, _, named, _, _, long, empty, bare = (int(total) for total in sums.sum(axis=0))
    counts = (captions, mentions, objects, named, captions, captions, long, captions, captions)
    return ChairResult(
        *(found.estimate(k, n) for k, n in enumerate(counts)),
        n_captions=captions,
        n_images=len(units),
        n_empty=empty,
        n_without_objects=bare,
        n_unknown=sum(not row.known for row in rows),
        rows=tuple(rows),
    )


def columns_of(rows: Sequence[CaptionRow]) -> Floats:
    """What is summed, ``[caption, column]``; :func:`figures_of` takes the sums apart."""
    return np.array([_columns(row) for row in rows], dtype=np.float64)


def _columns(row: CaptionRow) -> list[float]:
    long = not math.isnan(row.repeated)
    named = len({m.name for m in row.mentions})
    return [
        1, row.hallucinated > 0, len(row.mentions), row.hallucinated, len(row.truth), row.hits, named, row.words,
        row.repeated if long else 0.0, long, row.words == 0, not row.mentions,
    ]  # fmt: skip


def figures_of(sums: Floats) -> Floats:
    """:data:`FIGURES` ``[resample, figure]`` of sums of :func:`_columns` ``[resample, column]``."""
    captions, bad, mentions, hallucinated, objects, hits, named, words, repeated, long, empty, bare = sums.T
    recall, precision = ratio(hits, objects), ratio(hits, named)
    f1 = np.where((objects > 0) & (named > 0), ratio(2 * hits, objects + named), np.nan)
    return np.stack(
        [
            ratio(bad, captions), ratio(hallucinated, mentions), recall, precision, f1, ratio(words, captions),
            ratio(repeated, long), ratio(empty, captions), ratio(bare, captions),
        ],
        axis=1,
    )  # fmt: skip


def _pairs(captions: Captions) -> list[tuple[Hashable, str]]:
    if isinstance(captions, Mapping):
        given = [(i, [texts] if isinstance(texts, str) else list(texts)) for i, texts in captions.items()]
        if without := [image for image, texts in given if not texts]:
            raise ProbeError(
                f"captions must be at least one an image, '' where it is empty, got none for {without[0]!r}"
            )
        pairs: list[tuple[Hashable, str]] = [(image, text) for image, texts in given for text in texts]
    else:
        pairs = [(image, text) for image, text in captions]
    for image, text in pairs:
        if not isinstance(text, str):
            raise ProbeError(f"a caption must be a text, got {text!r} for image {image!r}")
    if not pairs:
        raise ProbeError("captions must be at least one caption, got none")
    return pairs
