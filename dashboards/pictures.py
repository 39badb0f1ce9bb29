"""Arrays to PNG: palettes, one sprite of all heads, and tiles of a max-pooled pyramid."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
PALETTES = Path(__file__).parent / "assets" / "a_palettes.js"
MISSING = 255
"""Palette index of missing cells, transparent; colours take 0..254."""
TILE = 800
"""Largest edge of a tile, pixels."""


@cache
def palette(name: str) -> NDArray[np.uint8]:
    """255 colours ``[255, 3]`` between the anchors of ``assets/a_palettes.js``, and one for missing cells.

    Raises:
        ValueError: no such palette.
    """
    text = PALETTES.read_text(encoding="utf-8")
    known: dict[str, list[str]] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    if name not in known:
        raise ValueError(f"palette must be one of {sorted(known)}, got {name!r}")
    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in known[name]], float)
    at = np.linspace(0, len(anchors) - 1, MISSING)
    return (
        np.stack([np.interp(at, np.arange(len(anchors)), anchors[:, c]) for c in range(3)], 1).round().astype(np.uint8)
    )


def indices(values: Floats, top: float, gamma: float = 1.0) -> NDArray[np.uint8]:
    """Palette indices: ``254 * (v / top) ** gamma`` clipped to 0..254, 255 where v is NaN.

    Args:
        values: any shape.
        top: value of the last colour.
        gamma: below 1 shows small values.
    """
    scaled = np.clip(values * np.float32(1 / top if top > 0 else 0.0), 0, 1)
    if gamma != 1.0:
        scaled = scaled ** np.float32(gamma)
    with np.errstate(invalid="ignore"):
        out = (scaled * 254 + np.float32(0.5)).astype(np.uint8)
    out[np.isnan(values)] = MISSING
    return out


def png(codes: NDArray[np.uint8], name: str = "viridis") -> bytes:
    """An 8-bit palette PNG of codes ``[row, column]``; code 255 is transparent."""
    image = Image.fromarray(np.ascontiguousarray(codes), "P")
    image.putpalette([*palette(name).ravel().tolist(), 128, 128, 128])
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1, transparency=MISSING)
    return out.getvalue()


def sprite(pooled: Floats, top: float, gamma: float = 0.5, name: str = "viridis") -> bytes:
    """Every head's pooled map in one PNG: ``[layer, head, row, column]`` to ``layer * row`` by ``head * column`` pixels.

    One scale for all: two heads of the same colour have the same weight.
    """
    layers, heads, rows, columns = pooled.shape
    codes = indices(pooled, top, gamma).transpose(0, 2, 1, 3).reshape(layers * rows, heads * columns)
    return png(codes, name)


@dataclass(frozen=True)
class Tile:
    """A picture of a part of a map, and which part: rows ``y0 .. y1`` and columns ``x0 .. x1``, the ends not included."""

    data: bytes
    x0: int
    x1: int
    y0: int
    y1: int
    step: int


class Pyramid:
    """A map and its halvings by the **largest** of four cells: a sink column one cell wide stays visible.

    Args:
        values: fp32 ``[query, key]``; NaN is missing.
    """

    def __init__(self, values: Floats) -> None:
        self.levels: list[Floats] = [np.ascontiguousarray(values, dtype=np.float32)]
        while max(self.levels[-1].shape) > TILE:
            self.levels.append(_halved(self.levels[-1]))
        self.top = float(np.nanmax(self.levels[-1], initial=0.0))

    @property
    def shape(self) -> tuple[int, int]:
        return self.levels[0].shape[0], self.levels[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(level.nbytes for level in self.levels)

    def tile(
        self,
        x0: int,
        x1: int,
        y0: int,
        y1: int,
        width: int = TILE,
        *,
        top: float,
        gamma: float = 0.5,
        name: str = "viridis",
    ) -> Tile:
        """The smallest picture that is sharp at ``width`` pixels; what it covers may be a little more than was asked for."""
        rows, columns = self.shape
        x0, y0 = min(max(x0, 0), columns - 1), min(max(y0, 0), rows - 1)
        x1, y1 = min(max(x1, x0 + 1), columns), min(max(y1, y0 + 1), rows)
        level = 0
        while (
            level + 1 < len(self.levels)
            and max(x1 - x0, y1 - y0) >> (level + 1) >= width // 2
            and (max(x1 - x0, y1 - y0) >> level > width)
        ):
            level += 1
        step = 1 << level
        left, upper = x0 // step, y0 // step
        right, lower = -(-x1 // step), -(-y1 // step)
        part = self.levels[level][upper:lower, left:right]
        return Tile(
            png(indices(part, top, gamma), name), left * step, min(right * step, columns), upper * step,
            min(lower * step, rows), step,
        )  # fmt: skip


def _halved(values: Floats) -> Floats:
    rows, columns = values.shape
    padded = values
    if rows % 2 or columns % 2:
        padded = np.pad(values, ((0, rows % 2), (0, columns % 2)), constant_values=np.nan)
    # fmax, and pairwise on views: NaN loses against any number, and no copy of the map is made.
    across = np.fmax(padded[:, ::2], padded[:, 1::2])
    return np.fmax(across[::2], across[1::2])
