"""Which rows a capture takes and how much it will hold: numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from interp import Capture
from interp.tracing.capture import estimate_bytes, select_rows


class Site:
    v_head_dim = 8


# 2 samples, 3 heads, 5 query rows, 7 keys: 30 rows.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "row_stats": ({}, 30 * 10 * 4),  # six numbers a row, of which mass has four to five groups
    "topk": ({"topk": 3}, 30 * 3 * 2 * 4),  # weight and key
    "received": ({"received": True}, 2 * 3 * 7 * 4 * 4),  # values and counts of two query groups
    "pooled": ({"pooled": 6}, 2 * 3 * 5 * 6 * 4),  # the grid is no larger than the map
    "offset": ({"offset": True}, 2 * 3 * 12 * 4),
    "attention": ({"attention": True}, 30 * 7 * 4),
    "z": ({"z": True}, 30 * 8 * 4),
    "rows": ({"rows": "all"}, 30 * 7 * 4),
    "group_output": ({"group_output": "prefill"}, 30 * 4 * 8 * 4),
}


@pytest.mark.parametrize("name", SIZES)
def test_bytes_of_a_readout(name: str) -> None:
    settings, size = SIZES[name]
    got = estimate_bytes(Capture(**({"row_stats": True} if name == "row_stats" else settings)), Site(), 2, 3, 5, 7)  # type: ignore[arg-type]
    assert got == {name: size}


def test_a_few_exact_rows_are_not_worth_counting() -> None:
    assert estimate_bytes(Capture(rows=[1], group_output="last"), Site(), 2, 3, 5, 7) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "start", "generated", "wanted"),
    [
        ("all", 0, False, [(0, 5)]),
        ("prefill", 0, False, [(0, 5)]),
        ("prefill", 5, True, []),
        ("generated", 0, False, []),
        ("generated", 5, True, [(0, 5)]),
        ("last", 0, False, [(4, 5)]),
        ([0], 0, False, [(0, 1)]),  # the first position, not the first after the prompt
        ([0], 5, True, []),
        ([5], 5, True, [(0, 1)]),
        ([-1, 0, 1, 3], 0, False, [(0, 2), (3, 5)]),
        ([-1], 2, False, [(2, 3)]),  # absolute: the call begins at position 2
        ([1, 1, 99], 0, False, [(1, 2)]),
    ],
    ids=str,
)
def test_rows_of_a_call(rows: Any, start: int, generated: bool, wanted: list[tuple[int, int]]) -> None:
    assert select_rows(rows, start, 5, generated, prompt_length=5) == wanted
