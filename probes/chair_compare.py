"""Two sets of captions of the same images, as they are and at equal length or recall; and CHAIR as captions grow.

Longer captions name more objects, right and wrong ones, so two methods that write texts of different length cannot be told
apart by CHAIR alone. All of it works on the judged rows: nothing is matched again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from probes.chair import FIGURES, CaptionRow, ChairResult, columns_of, figures_of, summarise
from probes.intervals import LEVEL, RESAMPLES, Estimate, bootstrap, unit_index
from probes.samples import ProbeError

On = Literal["words", "recall"]


@dataclass(frozen=True)
class Comparison:
    """Two results of the same images.

    Attributes:
        a: of the first captions.
        b: of the second.
        differences: figure to a - b, with an interval that draws the same images for both; n is the number of images.
        n_left_out: pairs of captions that could not be matched.
    """

    a: ChairResult
    b: ChairResult
    differences: dict[str, Estimate]
    n_left_out: int = 0


def compare(
    a: Sequence[CaptionRow],
    b: Sequence[CaptionRow],
    *,
    n_resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Comparison:
    """Both sets of figures, and their paired differences.

    Args:
        a: ``ChairResult.rows`` of the first captions.
        b: of the second: as many captions of the same images.
        n_resamples: see :func:`probes.intervals.bootstrap`, as are ``level`` and ``seed``.

    Raises:
        ProbeError: not the same images, or another number of captions of one, or judged by another truth.
    """
    return _compare(_paired(a, b), 0, n_resamples=n_resamples, level=level, seed=seed)


def matched(
    a: Sequence[CaptionRow],
    b: Sequence[CaptionRow],
    *,
    on: On = "words",
    n_resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Comparison:
    """:func:`compare` after cutting both captions of each pair to the same length, or at the same recall.

    - "words": both to the number of words of the shorter one.
    - "recall": with k the smaller number of the image's objects that one of the two names, both right behind the mention that
      brings them to k. What is compared is what each made up on its way there; what follows does not count. Pairs with k = 0
      are left out and counted.

    Args:
        a: as for :func:`compare`.
        b: likewise.
        on: what is made equal.
        n_resamples: see :func:`probes.intervals.bootstrap`, as are ``level`` and ``seed``.

    Raises:
        ProbeError: as :func:`compare`; no pair can be matched.
    """
    if on not in get_args(On):
        raise ProbeError(f"on must be one of {get_args(On)}, got {on!r}")
    pairs = _paired(a, b)
    if on == "words":
        kept = [(x.first(n), y.first(n)) for x, y in pairs for n in [min(x.words, y.words)]]
    else:
        found = [(x, y, min(x.hits, y.hits)) for x, y in pairs]
        kept = [(_until_hit(x, k), _until_hit(y, k)) for x, y, k in found if k]
    if not kept:
        raise ProbeError("a and b must name an object of the image in at least one pair of captions, got none that do")
    return _compare(kept, len(pairs) - len(kept), n_resamples=n_resamples, level=level, seed=seed)


def frontier(
    rows: Sequence[CaptionRow],
    words: Sequence[int],
    *,
    n_resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[int, ChairResult]:
    """The figures of the first so many words of each caption: number of words to result, for curves of CHAIR over recall."""
    if not words or min(words) < 1:
        raise ProbeError(f"words must be numbers from 1 on, got {list(words)}")
    return {
        n: summarise([row.first(n) for row in rows], n_resamples=n_resamples, level=level, seed=seed) for n in words
    }


def _until_hit(row: CaptionRow, k: int) -> CaptionRow:
    seen: set[str] = set()
    for mention in row.mentions:
        if not mention.hallucinated:
            seen.add(mention.name)
        if len(seen) == k:
            return row.until(mention.stop)
    raise AssertionError(f"a caption with {row.hits} hits has no hit {k}")


def _paired(a: Sequence[CaptionRow], b: Sequence[CaptionRow]) -> list[tuple[CaptionRow, CaptionRow]]:
    mine, other = _by_image(a), _by_image(b)
    if strange := [i for i in mine if i not in other] or [i for i in other if i not in mine]:
        raise ProbeError(f"a and b must be of the same images, got {len(strange)} of one only, first {strange[0]!r}")
    pairs: list[tuple[CaptionRow, CaptionRow]] = []
    for image, rows in mine.items():
        if len(rows) != len(other[image]):
            raise ProbeError(
                f"a and b must have as many captions an image, got {len(rows)} and {len(other[image])} for {image!r}"
            )
        if rows[0].truth != other[image][0].truth:
            raise ProbeError(f"a and b must be judged by one truth, got two for image {image!r}")
        pairs += zip(rows, other[image], strict=True)
    return pairs


def _by_image(rows: Sequence[CaptionRow]) -> dict[Hashable, list[CaptionRow]]:
    found: dict[Hashable, list[CaptionRow]] = {}
    for row in rows:
        found.setdefault(row.image_id, []).append(row)
    return found


def _compare(
    pairs: list[tuple[CaptionRow, CaptionRow]], left_out: int, *, n_resamples: int, level: float, seed: int
) -> Comparison:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    units, index = unit_index([row.image_id for row in a])
    sums = np.zeros((2, len(units), columns_of(a[:1]).shape[1]))
    for k, rows in enumerate((a, b)):
        np.add.at(sums[k], index, columns_of(rows))
    found = bootstrap(
        lambda w: figures_of(w @ sums[0]) - figures_of(w @ sums[1]),
        len(units),
        n_resamples=n_resamples,
        level=level,
        seed=seed,
    )
    one, two = (summarise(rows, n_resamples=n_resamples, level=level, seed=seed) for rows in (a, b))
    differences = {name: found.estimate(k, len(units)) for k, name in enumerate(FIGURES)}
    return Comparison(one, two, differences, left_out)
