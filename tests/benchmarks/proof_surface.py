"""How does each method shift hallucination, over visual evidence and strength of the prior? On the bundled LLaVA.

    python tests/benchmarks/proof_surface.py --n 15            # measures and draws; a GPU: a minute
    python tests/benchmarks/proof_surface.py --draw            # draws what is recorded: docs/assets/surface_methods.png, chair_frontier.png

The scenes are made for it: the trigger of a pair is there, its typical companion is not. The pair's prior is how strongly the
world joins the two; the clarity of the air is how well anything is seen. In every cell the teacher-forced margin of
:mod:`proof_scenes`, method minus greedy on the same scenes. Methods are those recorded there, at the strength tuned on dev, and
random heads beside the chosen ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _frontier
import torch
from _record import record
from _results import RESULTS, result, where

import interp
from interp.evaluation import Evaluation, MarginTask, Setting, evaluate, parse_setting
from interp.evaluation.correction import max_t
from interp.evaluation.forced import mention_point
from interp.evaluation.tasks import Statistics

CLARITIES = (1.0, 0.7, 0.4)
PICTURES = Path(__file__).resolve().parents[2] / "docs" / "assets"
FIXED = ("what", "prior", "clarity", "n")
SPAN = 1.0
"""Change, in nats, at which the colours end."""
Cell = tuple[float, float]


def points(n: int, batch: int) -> tuple[MarginTask, list[Cell]]:
    """``n`` scenes a pair and clarity in which the companion is missing, and the (prior, clarity) of each."""
    from probes.scenes import PAIRS, World

    world = World("test")
    items, cells = [], []
    for pair in PAIRS:
        for level in CLARITIES:
            for k in range(n):
                item = mention_point(world.with_pair(pair, k, partner=False, clarity=level))
                if item is not None:
                    items.append(item)
                    cells.append((pair.prior, level))
    return MarginTask(items, batch, {"data": "scenes", "split": "pairs"}), cells


def cells_of(result: Evaluation, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row a cell: greedy's margin and each setting's change, ``[value, low, high]`` by image, with p over all cells and settings."""
    how, (_, plain) = Statistics(1000), result.task.values(result.found[result.rows[0].setting.key])
    able = [row.setting for row in result.rows[1:] if not row.problem]
    values = {s.name: result.task.values(result.found[s.key])[1] for s in able}
    where_is = {cell: [k for k, c in enumerate(cells) if c == cell] for cell in sorted(set(cells))}
    tests = max_t(
        {
            str(cell): {name: _array([found[k] - plain[k] for k in mine]) for name, found in values.items()}
            for cell, mine in where_is.items()
            if len(mine) > 1
        }
    )
    rows: list[dict[str, Any]] = []
    for cell, mine in where_is.items():
        row: dict[str, Any] = {"what": "surface", "prior": cell[0], "clarity": cell[1], "n": len(mine)}
        row["greedy margin"] = _interval([plain[k] for k in mine], how)
        for name, found in values.items():
            row[name] = _interval([found[k] - plain[k] for k in mine], how)
            tested = tests.get((str(cell), name))
            row[f"{name} p max-T"] = None if tested is None else tested.p_max_t
        rows.append(row)
    return rows


def _array(values: Sequence[float]) -> Any:
    import numpy as np

    return np.asarray(values, np.float64)


def _interval(values: Sequence[float], how: Statistics) -> list[float | None]:
    from probes.intervals import mean_interval

    found = mean_interval(values, **how.options())
    return [None if math.isnan(x) else float(x) for x in found[:3]]


def tuned(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Setting to title: each method's tuned strength, and the random heads, of what :mod:`proof_scenes` confirmed."""
    titles: dict[str, str] = {}
    for row in rows:
        if row["what"] == "confirmed" and row["split"] == "test" and "cannot act" not in row:
            name, kind = row["setting"], row["kind"]
            if "tuned" in kind:
                titles[name] = name
            elif kind == "random heads":
                titles[name] = f"{name.split('+random=')[0].split('(')[0]}, random heads {name[-1]}"
    return titles


def picture(rows: Sequence[dict[str, Any]], titles: dict[str, str], source: str, path: Path) -> None:
    """A panel a method, prior by clarity, colours centred on no change; bold where the interval leaves 0 out, * by max-T."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    priors = sorted({row["prior"] for row in rows})
    levels = sorted({row["clarity"] for row in rows}, reverse=True)
    at = {(row["prior"], row["clarity"]): row for row in rows}
    shown = ["greedy margin", *(name for name in titles if name in rows[0])]
    columns = 5
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(13, 3.3 * lines + 0.9), squeeze=False, layout="constrained")
    bars: dict[str, Any] = {}
    for k, name in enumerate(shown):
        axis = axes[k // columns][k % columns]
        own = name == "greedy margin"
        values = [[at[p, c][name][0] for c in levels] for p in priors]
        span = max(abs(v) for line in values for v in line) if own else SPAN
        image = axis.imshow(
            values, cmap="PuOr_r" if own else "RdBu_r", vmin=-span, vmax=span, aspect="auto", origin="lower"
        )
        bars["margin" if own else "change"] = (image, axis)
        for i, p in enumerate(priors):
            for j, c in enumerate(levels):
                row = at[p, c]
                value, low, high = row[name]
                sure = low is None or not low <= 0 <= high
                bold = low is not None and sure and not own
                star = "*" if (row.get(f"{name} p max-T") or 1) < 0.05 else ""
                dark = abs(value) > 0.62 * span
                text = f"{value:+.2f}{star}" + (f"\nn={row['n']}" if own else "")
                axis.text(
                    j, i, text, ha="center", va="center", fontsize=7 if own else 8.5, linespacing=0.95,
                    color="white" if dark else "black" if sure or own else "#666666", weight="bold" if bold else "normal",
                )  # fmt: skip
        axis.set_title("greedy: the margin itself" if own else _short(titles[name]), fontsize=10)
        axis.set_xticks(range(len(levels)), [f"{c:g}" for c in levels])
        axis.set_yticks(range(len(priors)), [f"{p:g}" for p in priors])
        axis.tick_params(length=0, labelsize=8.5)
        if k % columns == 0:
            axis.set_ylabel("prior of the pair")
        if k >= len(shown) - columns:
            axis.set_xlabel("clarity of the air")
    for k in range(len(shown), lines * columns):
        axes[k // columns][k % columns].axis("off")
    figure.colorbar(
        bars["change"][0],
        ax=axes,
        shrink=0.6,
        extend="both",
        label="change of the margin, nats (blue: less hallucination)",
    )
    bounded = rows[0]["greedy margin"][1] is not None
    marks = (
        "Bold: the 95 % bootstrap interval by scene leaves 0 out; *: p < 0.05 by max-T over all cells and methods."
        if bounded
        else "Means; this run recorded no intervals by cell."
    )
    figure.suptitle(
        "Change of log p(absent companion) - log p(present object), nats: method minus greedy on the same n scenes\n"
        f"{marks} {source}",
        fontsize=10.5,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _short(title: str) -> str:
    return title.replace("dims=[44,247,201]", "named sinks") if len(title) > 24 else title


def recorded() -> dict[str, Any]:
    """The surface with intervals where it was measured; else the means that :mod:`proof_scenes` recorded before there were any."""
    scenes = result("proof_scenes")
    if (RESULTS / "proof_surface.json").exists():
        return result("proof_surface")
    rows = [r for r in scenes["rows"] if r["what"] == "surface"]
    return {**scenes, "rows": [{k: v if k in FIXED else _bare(v) for k, v in r.items()} for r in rows]}


def _bare(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value, None, None]


def draw(folder: Path = PICTURES) -> None:
    """Both pictures of the recorded results."""
    scenes, content = result("proof_scenes"), recorded()
    picture(content["rows"], tuned(scenes["rows"]), where(content), folder / "surface_methods.png")
    n = next(r["n"] for r in scenes["rows"] if r["what"] == "confirmed" and "n" in r)
    if (RESULTS / "proof_greedy.json").exists():
        curves = {r["split"]: r["frontier"] for r in result("proof_greedy")["rows"]}
        for row in scenes["rows"]:
            if row.get("setting") == "greedy":
                row.setdefault("frontier", curves[row["split"]])
    title = f"Captions of {n} scenes a split, default and tuned strength joined, 95 % bootstrap intervals by image. {where(scenes)}"
    _frontier.picture(scenes["rows"], title, folder / "chair_frontier.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-lvlm")
    parser.add_argument("--n", type=int, default=15, help="scenes a pair and clarity")
    parser.add_argument("--random", type=int, default=3, help="of the sets of random heads")
    parser.add_argument("--batch", type=int, default=None, help="16 on a CPU, 750 on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", type=Path, help="a folder of the answers: a run that was cut off goes on")
    parser.add_argument("--draw", action="store_true", help="draw what is recorded, measure nothing")
    o = parser.parse_args()
    if not o.draw:
        batch = o.batch or (16 if o.device == "cpu" else 750)
        names = list(tuned(result("proof_scenes")["rows"]))
        names = [n for n in names if "+random=" not in n or int(n[-1]) < o.random]
        settings: list[Setting] = [parse_setting(name) for name in names]
        model = interp.load(o.model, device=o.device, dtype="float32")
        task, cells = points(o.n, batch)
        found = evaluate(model, task, settings, folder=o.keep, batch=batch, how=Statistics(100), refuse=False)
        note = (
            "Margins in nats: [value, low, high], 95 % bootstrap intervals by scene within the pairs there are (2 or 3 a prior); "
            "settings: method minus greedy; p: sign flips by scene, max-T over all cells and settings."
        )
        record("proof_surface", cells_of(found, cells), note=note)
    draw()


if __name__ == "__main__":
    main()
