"""The surface's cells are means of paired differences with their intervals, and both pictures are drawn from what is recorded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import proof_surface
from _frontier import method_of

from interp.evaluation import parse_setting


def evaluated(values: dict[str, list[float]], problem: str = "") -> Any:
    """What an evaluation gives ``cells_of``: rows, and by key the values."""
    rows = [SimpleNamespace(setting=parse_setting(name), problem="") for name in values]
    rows += [SimpleNamespace(setting=parse_setting("VAR(.6)"), problem=problem)] if problem else []
    found = {parse_setting(name).key: v for name, v in values.items()}
    task = SimpleNamespace(values=lambda v: (list(range(len(v))), v))
    return SimpleNamespace(task=task, rows=rows, found=found)


def test_cells_are_paired_differences_with_intervals() -> None:
    rng = np.random.default_rng(0)
    cells = [(0.5, 1.0)] * 12 + [(0.9, 0.4)] * 12
    plain = rng.normal(size=24)
    moved = plain + np.repeat([-0.5, 0.0], 12) + 0.1 * rng.normal(size=24)
    rows = proof_surface.cells_of(evaluated({"greedy": plain.tolist(), "PAI(.5)": moved.tolist()}, "no sinks"), cells)
    assert [(r["prior"], r["clarity"], r["n"]) for r in rows] == [(0.5, 1.0, 12), (0.9, 0.4, 12)]
    for row, mine in zip(rows, (slice(0, 12), slice(12, 24)), strict=True):
        value, low, high = row["PAI(.5)"]
        assert value == pytest.approx(float((moved - plain)[mine].mean())) and low < value < high
        assert row["greedy margin"][0] == pytest.approx(float(plain[mine].mean()))
    assert rows[0]["PAI(.5)"][2] < 0 and rows[0]["PAI(.5) p max-T"] < 0.05 < rows[1]["PAI(.5) p max-T"]
    assert "VAR(.6)" not in rows[0]


def test_both_pictures_are_drawn_from_what_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    proof_surface.draw(tmp_path)
    for name in ("surface_methods.png", "chair_frontier.png"):
        with Image.open(tmp_path / name) as drawn, Image.open(proof_surface.PICTURES / name) as kept:
            assert drawn.size == kept.size, (
                f"run python tests/benchmarks/proof_surface.py --draw: {name} is of another result"
            )
            assert len(set(drawn.convert("L").tobytes())) > 50
    titles = proof_surface.tuned(proof_surface.result("proof_scenes")["rows"])
    assert {"VHR(1.5)", "PAI(.5)"} <= set(titles) and not any(name.startswith("beam") for name in titles)


def test_strengths_of_a_method_are_joined() -> None:
    assert method_of({"setting": "VHR(2)", "kind": "default"}) == method_of({"setting": "VHR(1.5)", "kind": "tuned"})
    assert method_of({"setting": "MaskHeads('L2H4')+random=0", "kind": "random heads"}) == "random heads"
