"""One head's attention map as the page draws it: derived maps and what is read off them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dashboards.pictures import Pyramid

Floats = NDArray[np.float32]
CACHE_BYTES = 768 * 2**20


@dataclass(frozen=True)
class Look:
    """How a map is shown.

    Attributes:
        normalise: every row divided by its largest value (after hiding).
        hide: key positions whose columns are blank.
    """

    normalise: bool = False
    hide: tuple[int, ...] = ()

    @classmethod
    def parse(cls, normalise: str | None, hide: str | None) -> Look:
        """Of the page's words: ``"1"``, and positions such as ``"0,5"``."""
        from dashboards.errors import PageError

        parts = [part for part in (hide or "").split(",") if part]
        if len(parts) > 64 or not all(part.isdigit() and len(part) < 8 for part in parts):
            raise PageError(f"hide must be at most 64 positions joined by commas, got {hide!r}")
        return cls(normalise == "1", tuple(sorted({int(part) for part in parts})))


def looked(values: Floats, look: Look) -> Floats:
    """``[query, key]`` as a look wants it."""
    if look.hide:
        values = values.copy()
        values[:, [k for k in look.hide if k < values.shape[1]]] = np.nan
    if look.normalise:
        with np.errstate(invalid="ignore", divide="ignore"):
            largest = np.fmax.reduce(values, axis=1, keepdims=True)
            values = np.where(largest > 0, values / largest, values).astype(np.float32)
    return values


def sink_columns(received: Floats, rows: Floats, threshold: float = 0.3, at_most: int = 8) -> list[int]:
    """Keys that receive more than ``threshold`` on average over the rows that see them, the strongest first.

    Args:
        received: column sums ``[key]``.
        rows: rows that see each key ``[key]``; keys seen by fewer than 4 say nothing.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(rows >= 4, received / rows, 0.0)
    order = np.argsort(-mean, kind="stable")[:at_most]
    return [int(k) for k in order if mean[k] > threshold]


class MapCache:
    """Pyramids by key, the least recently used forgotten beyond ``limit`` bytes."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self._held: OrderedDict[Hashable, Pyramid] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Floats]) -> Pyramid:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = Pyramid(make())
        with self._lock:
            self._held[key] = made
            while sum(p.nbytes for p in self._held.values()) > self.limit and len(self._held) > 1:
                self._held.popitem(last=False)
        return made

    def __len__(self) -> int:
        return len(self._held)


def rings(
    attention: Floats, row: Sequence[int] | NDArray[Any], column: Sequence[int] | NDArray[Any]
) -> tuple[list[int], list[float]]:
    """k-hop profile: mean attention mass of a patch on the patches exactly k steps away (Chebyshev), over query patches.

    Args:
        attention: ``[query, key]`` of one picture's patches, the same on both sides.
        row: patch row of each position; column likewise.

    Returns:
        k, and the mass at each; masses sum to the share of attention that stays on patches.
    """
    rows, columns = np.asarray(row), np.asarray(column)
    hops = np.maximum(np.abs(rows[:, None] - rows[None]), np.abs(columns[:, None] - columns[None]))
    sums = np.bincount(hops.ravel(), weights=np.nan_to_num(attention).ravel())
    return list(range(len(sums))), [float(v) for v in sums / max(1, len(rows))]
