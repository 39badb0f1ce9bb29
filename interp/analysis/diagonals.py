"""Scores that are the mean of one diagonal of the map: previous-token, duplicate-token and induction heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import xarray as xr

from interp.analysis.running import AnalysisError, Floats, HeadScore, forward, inputs_of, on_grid
from interp.models.model import Model
from interp.tracing.capture import Capture

DEMOS = "Elhage et al. 2021, https://transformer-circuits.pub/2021/framework; TransformerLens demos"


def diagonal_mean(histogram: xr.DataArray, offsets: Sequence[int], rows: int) -> xr.DataArray:
    """Mean over ``rows`` query rows of the weight at any of ``offsets`` back.

    Args:
        histogram: ``offset`` of a trace, summed p ``[sample, layer, head, offset]`` with coordinate ``offset_position``.
        offsets: distances ``query - key``.
        rows: number of rows the histogram was summed over, all of which have these keys.
    """
    places = histogram["offset_position"].isin(list(offsets))
    return histogram.isel(offset=places.values.nonzero()[0]).sum("offset", skipna=False) / rows


@dataclass(frozen=True)
class DiagonalScore(HeadScore):
    """Weight on given offsets, averaged over given rows, of random repeated tokens."""

    unit: ClassVar[str] = "fraction of row mass"
    probe: ClassVar[str] = "RepeatedTokens"
    control: ClassVar[str] = "the same offsets and rows in an un-repeated random sequence of the same length"

    def default_probe(self) -> Any:
        from probes.repeated import RepeatedTokens

        return RepeatedTokens()

    def offsets(self, sample: Any) -> list[int]:
        raise NotImplementedError

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        self.check(sample)
        return self._mean(model, sample, sample), self._mean(model, sample.control, sample)

    def check(self, sample: Any) -> None:
        if not hasattr(sample, "last_copy"):
            raise AnalysisError(f"{self.name} needs samples of RepeatedTokens, got {type(sample).__name__}")

    def _mean(self, model: Model, text: Any, sample: Any) -> Floats:
        rows = sample.last_copy
        found = histogram(model, text, rows)
        return on_grid(diagonal_mean(found, self.offsets(sample), len(rows)), model, "text")


def histogram(model: Model, sample: Any, rows: range) -> xr.DataArray:
    """Summed weight per offset over ``rows``, ``[sample, layer, head, offset]``: linear in length, no map is made."""
    capture = Capture(offset=True, queries=tuple(rows), stacks=("text",))
    return forward(model, inputs_of(sample, model), capture, "text")["offset"]


@dataclass(frozen=True)
class PreviousToken(DiagonalScore):
    """Previous-token heads, Elhage et al. 2021, https://transformer-circuits.pub/2021/framework (TransformerLens demos' form).

    Formula: mean of ``A[i, i - 1]`` over the rows i whose previous token is an ordinary one (TransformerLens also counts the row
    behind BOS). From ``offset [sample, layer, head, offset]``, linear in length, to ``[sample, layer, head]``.

    Unit: fraction of row mass, 0 to 1. A uniform causal head has the mean of ``1 / (i + 1)``.
    Probe: ``RepeatedTokens``: random tokens, so that nothing but position tells which token is the previous one.
    Control: two back, the mean of ``A[i, i - 2]`` over the rows that have it: a head that only likes near keys scores on both.
    When not to use: thresholds of others (0.4 in course material) belong to other rows and other text.
    """

    name: ClassVar[str] = "previous_token"
    summary: ClassVar[str] = "mean attention to the token just before"
    paper: ClassVar[str] = DEMOS
    control: ClassVar[str] = "the same rows, two tokens back"

    def offsets(self, sample: Any) -> list[int]:
        return [1]

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        self.check(sample)
        rows = range(sample.start + 1, sample.last_copy.stop)
        found = histogram(model, sample, rows)
        # Row start + 1 has nothing ordinary two back: BOS is counted apart from all offsets.
        means = (diagonal_mean(found, [1], len(rows)), diagonal_mean(found, [2], len(rows) - 1))
        value, null = (on_grid(mean, model, "text") for mean in means)
        return value, null


@dataclass(frozen=True)
class DuplicateToken(DiagonalScore):
    """Duplicate-token heads, Wang et al. 2022, https://arxiv.org/abs/2211.00593, section 3 (TransformerLens demos' form).

    Formula, S tokens a copy: mean over the rows i of the last copy of ``sum_c A[i, i - c S]``, c over the earlier copies. With two
    copies that is the mean of ``diag(A, -S)``. From ``offset [sample, layer, head, offset]`` of those rows, linear in length.

    Unit: fraction of row mass, 0 to 1.
    Probe: ``RepeatedTokens``. Control: the same offsets and rows in an un-repeated random sequence of the same length.
    When not to use: on natural text, where a token's earlier occurrences are also what it is about.
    """

    name: ClassVar[str] = "duplicate_token"
    summary: ClassVar[str] = "mean attention to earlier occurrences of the same token"
    paper: ClassVar[str] = "Wang et al. 2022, https://arxiv.org/abs/2211.00593"

    def offsets(self, sample: Any) -> list[int]:
        return [c * sample.length for c in range(1, sample.repeats)]


@dataclass(frozen=True)
class Induction(DiagonalScore):
    """Induction heads, Olsson et al. 2022, https://arxiv.org/abs/2209.11895 (prefix matching; TransformerLens demos' form).

    Formula, S tokens a copy: mean over the rows i of the last copy of ``sum_c A[i, i - (c S - 1)]``, the tokens that followed the
    earlier occurrences of token i (c over the earlier copies). With two copies that is ``diag(A, -(S - 1))`` without its first entry,
    a row of the first copy, which TransformerLens averages in. From ``offset [sample, layer, head, offset]`` of those rows.

    Unit: fraction of row mass, 0 to 1. Olsson's mean per entry with r copies is this divided by about ``r - 1``.
    Probe: ``RepeatedTokens`` (two copies; the paper has ``length=25, repeats=4``).
    Control: the same offsets and rows in an un-repeated random sequence of the same length.
    When not to use: it shows where a head looks; whether it copies what it finds is another score.
    """

    name: ClassVar[str] = "induction"
    summary: ClassVar[str] = "mean attention to the token after an earlier occurrence of the current one"
    paper: ClassVar[str] = "Olsson et al. 2022, https://arxiv.org/abs/2209.11895"

    def offsets(self, sample: Any) -> list[int]:
        return [c * sample.length - 1 for c in range(1, sample.repeats)]


@dataclass(frozen=True)
class PrefixMatching(DiagonalScore):
    """Prefix matching of Olsson et al. 2022, https://arxiv.org/abs/2209.11895, appendix: the mean of the entries themselves.

    Formula, S tokens a copy, r copies: mean of ``A[i, j + 1]`` over all pairs of a row i behind the first copy and an earlier occurrence j
    of its token (the token *after* it counts: erratum of 2022-09-20). A head that splits its weight over the occurrences scores 0.5 at
    r = 4, where ``induction``, the sum over occurrences, gives 1. From ``offset`` of the rows of each copy.

    Unit: fraction of row mass an entry.
    Probe: ``RepeatedTokens(length=25, repeats=4)``. Control: the same entries of an un-repeated random sequence.
    When not to use: to compare with TransformerLens, whose sum is ``induction``.
    """

    name: ClassVar[str] = "prefix_matching"
    summary: ClassVar[str] = "mean weight on each token that followed an earlier occurrence of the current one"
    paper: ClassVar[str] = "Olsson et al. 2022, https://arxiv.org/abs/2209.11895"

    def default_probe(self) -> Any:
        from probes.repeated import RepeatedTokens

        return RepeatedTokens(length=25, repeats=4)

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        self.check(sample)
        means: list[Floats] = []
        for text in (sample, sample.control):
            total: xr.DataArray | float = 0.0
            for copy in range(1, sample.repeats):
                start = sample.start + copy * sample.length
                # The offset behind the first token of copy c reaches c occurrences back.
                found = histogram(model, text, range(start, start + sample.length))
                total = total + diagonal_mean(found, [c * sample.length - 1 for c in range(1, copy + 1)], sample.length)
            entries = sum(range(1, sample.repeats))
            means.append(on_grid(xr.DataArray(total) / entries, model, "text"))
        return means[0], means[1]
