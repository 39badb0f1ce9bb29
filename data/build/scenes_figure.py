"""Draw hallucination over evidence and prior: ``python data/build/scenes_figure.py data/models/scenes-lvlm`` -> ``surface.svg``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDE, HIGH, LEFT, TOP, GAP = 300, 220, 60, 46, 96
RAMP = ("#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#440154")
"""From weak priors to strong ones (viridis, reversed), told apart without colour by their labels."""


def figure(found: dict[str, Any]) -> str:
    """Two panels of lines with their intervals, as SVG."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 330" font-family="sans-serif" font-size="12">',
        '<rect width="860" height="330" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">How often a caption names the partner, by the pair\'s prior</text>',
    ]
    panels = (("absent", "not there", "clarity of the air"), ("present", "there", "contrast of its drawing"))
    for number, (kind, title, axis) in enumerate(panels):
        parts += _panel(found[kind], LEFT + number * (WIDE + GAP), f"the partner is {title}", axis)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(rows: list[dict[str, Any]], left: float, title: str, axis: str) -> list[str]:
    def x(level: float) -> float:
        return left + WIDE * (1 - level)

    def y(rate: float) -> float:
        return TOP + HIGH * (1 - rate)

    parts = [f'<text x="{left}" y="{TOP - 8}">{title}</text>']
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line x1="{left}" x2="{left + WIDE}" y1="{y(tick)}" y2="{y(tick)}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{x(tick)}" y="{TOP + HIGH + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{left + WIDE / 2}" y="{TOP + HIGH + 36}" text-anchor="middle">{axis} (better seen on the left)</text>'
    )
    priors = sorted({row["prior"] for row in rows})
    for colour, prior in zip(RAMP, priors, strict=True):
        parts += _line([row for row in rows if row["prior"] == prior], x, y, colour, prior)
    return parts


def _line(
    rows: list[dict[str, Any]], x: Callable[[float], float], y: Callable[[float], float], colour: str, prior: float
) -> list[str]:
    rows = sorted(rows, key=lambda row: -row["level"])
    upper = [f"{x(r['level']):.1f},{y(r['named'][2]):.1f}" for r in rows]
    lower = [f"{x(r['level']):.1f},{y(r['named'][1]):.1f}" for r in reversed(rows)]
    middle = " ".join(f"{x(r['level']):.1f},{y(r['named'][0]):.1f}" for r in rows)
    last = rows[-1]
    return [
        f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" opacity="0.15"/>',
        f'<polyline points="{middle}" fill="none" stroke="{colour}" stroke-width="2"/>',
        f'<text x="{x(last["level"]) + 6:.1f}" y="{y(last["named"][0]) + 4:.1f}" font-size="10" fill="#333">{prior:g}</text>',
    ]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        folder = Path(name)
        (folder / "surface.svg").write_text(figure(json.loads((folder / "measured.json").read_text())["surface"]))
        print(folder / "surface.svg")
