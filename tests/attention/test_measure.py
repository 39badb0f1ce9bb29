"""What is read off p, function by function: the largest of short rows, and which way offsets are counted."""

from __future__ import annotations

import pytest
import torch

from interp.attention import OffsetBins, measure
from interp.attention.measure import (
    _consecutive,  # pyright: ignore[reportPrivateUsage]
    _pair_histogram,  # pyright: ignore[reportPrivateUsage]
    largest,
    offset_histogram,
)


def test_the_largest_of_a_row_shorter_than_k() -> None:
    p = torch.tensor([[[[0.0, 0.25, 0.75], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]]])
    weights, keys = largest(p, 5)
    assert weights[0, 0].tolist() == [[0.75, 0.25, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0, 0.0], [0.0] * 5]
    # Ties, and keys without mass, by slot; then slots that are no key's.
    assert keys[0, 0].tolist() == [[2, 1, 0, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def line(*coordinates: int) -> torch.Tensor:
    return torch.tensor(coordinates, dtype=torch.int32)[None, :, None]


@pytest.mark.parametrize(
    ("queries", "keys", "first"),
    [
        (line(0, 1, 2), line(0, 1, 2), 0),
        (line(7, 8, 9), line(4, 5, 6), 3),
        (line(7, -1, 9), line(-1, -1, 6), 3),  # specials keep their place in line
        (line(0, 1, 3), line(0, 1, 2), None),
        (line(0, 1, 2), line(2, 1, 0), None),
        (line(-1, -1, -1), line(0, 1, 2), None),
        (line(0, 1, 2).expand(2, 3, 1), line(0, 1, 2), None),
        (line(0, 1, 2).expand(1, 3, 2), line(0, 1, 2).expand(1, 3, 2), None),
    ],
    ids=str,
)
def test_tokens_in_line_are_counted_by_diagonals(
    queries: torch.Tensor, keys: torch.Tensor, first: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = queries.shape[2]
    bins = OffsetBins(queries, keys, (-9,) * n, (9,) * n)
    assert _consecutive(bins) == first
    p = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = _pair_histogram(p, bins)
    monkeypatch.setattr(
        measure, "_pair_histogram", lambda *given: wanted if first is None else pytest.fail("pair by pair")
    )
    torch.testing.assert_close(offset_histogram(p, bins, None), wanted, atol=1e-14, rtol=0)
