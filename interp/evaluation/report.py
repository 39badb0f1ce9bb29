"""A table of settings as rows for a terminal, CSV, JSON and a figure."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from interp._version import __version__
from interp.evaluation.running import Evaluation, Row
from interp.files import jsonable, write_whole
from interp.vector_figures import KEY

FORMATS = (".json", ".csv", ".html", ".svg", ".pdf")
COLUMNS = (
    "setting", "figure", "value", "low", "high", "n", "difference", "difference_low", "difference_high",
    "tokens_per_second", "samples_per_second", "extra_passes", "problem",
)  # fmt: skip


def header(result: Evaluation) -> list[str]:
    """Columns of :func:`cells`."""
    speed = "tokens/s" if result.task.records_text else "samples/s"
    return ["setting", *(name.replace("_", " ") for name in result.task.shown), speed, "extra passes"]


def cells(result: Evaluation, row: Row) -> list[str]:
    """A row of the printed table: value [interval], below it the paired difference to the plain model."""
    if row.problem:
        return [row.setting.name, f"cannot act: {row.problem}", *[""] * (len(result.task.shown) + 1)]
    speed = row.tokens_per_second if result.task.records_text else row.samples_per_second
    name = row.setting.name if not row.heads else f"{row.setting.name} ({row.heads})"
    told: list[str] = []
    for figure in result.task.shown:
        if figure not in row.figures:
            told.append("")
            continue
        value = row.figures[figure]
        text = f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
        if figure in row.differences:
            d = row.differences[figure]
            text += f"\n{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
        told.append(text)
    return [name, *told, f"{speed:.1f}", f"{row.extra_passes:.1f}"]


def as_json(result: Evaluation) -> dict[str, Any]:
    """Everything but the answers themselves; NaN is null."""
    rows = [
        {
            "setting": r.setting.name, "key": r.setting.key, **r.setting.describe(), "heads": r.heads, "n": r.n,
            "figures": {k: list(v) for k, v in r.figures.items()},
            "differences": {k: list(v) for k, v in r.differences.items()},
            "tokens_per_second": r.tokens_per_second, "samples_per_second": r.samples_per_second,
            "extra_passes": r.extra_passes, "problem": r.problem, **r.more,
        }
        for r in result.rows
    ]  # fmt: skip
    told: dict[str, Any] = _finite(jsonable({**result.about, "resumed": result.resumed, "rows": rows}, "evaluation"))
    return told


def as_csv(result: Evaluation) -> str:
    """A line a setting and figure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in result.rows:
        cost = [row.tokens_per_second, row.samples_per_second, row.extra_passes]
        for name, v in row.figures.items() or [("", None)]:
            d = row.differences.get(name)
            value = ["", "", "", ""] if v is None else [v.value, v.low, v.high, v.n]
            difference = ["", "", ""] if d is None else [d.value, d.low, d.high]
            line = [row.setting.name, name, *value, *difference, *cost, row.problem]
            writer.writerow(["" if isinstance(x, float) and not math.isfinite(x) else x for x in line])
    return out.getvalue()


def figure(result: Evaluation) -> Any:
    """A plotly figure: every shown figure with its interval, setting under setting, the plain model as a line."""
    from plotly.subplots import make_subplots

    rows = [r for r in result.rows if not r.problem]
    shown = [n for n in result.task.shown if n in rows[0].figures]
    frontier = "frontier" in rows[0].more
    columns = min(3, len(shown) + frontier)
    lines = -(-(len(shown) + frontier) // columns)
    titles = [n.replace("_", " ") for n in shown] + (["CHAIR_I over recall, texts cut"] if frontier else [])
    made: Any = make_subplots(rows=lines, cols=columns, subplot_titles=titles, horizontal_spacing=0.16)
    names = [r.setting.name for r in rows]
    for k, name in enumerate(shown):
        at = {"row": k // columns + 1, "col": k % columns + 1}
        values = [r.figures[name] for r in rows]
        made.add_scatter(
            x=[v.value for v in values], y=names, mode="markers", marker={"color": "#0072b2", "size": 8}, showlegend=False,
            error_x={
                "type": "data", "symmetric": False, "array": [v.high - v.value for v in values],
                "arrayminus": [v.value - v.low for v in values],
            },
            **at,
        )  # fmt: skip
        made.add_vline(x=values[0].value, line={"color": "#999999", "dash": "dot"}, **at)
        made.update_yaxes(autorange="reversed", showticklabels=k % columns == 0, automargin=True, **at)
    if frontier:
        k = len(shown)
        for row in rows:
            points = list(row.more["frontier"].items())
            made.add_scatter(
                x=[p["recall"][0] for _, p in points], y=[p["chair_i"][0] for _, p in points], mode="lines+markers",
                name=row.setting.name, text=[f"{n} words" for n, _ in points], row=k // columns + 1, col=k % columns + 1,
            )  # fmt: skip
    about = f"{result.task.name}, {result.about['model']}, n = {rows[0].n}, 95 % intervals by image"
    made.update_layout(
        title={"text": about}, template="simple_white", width=420 * columns + 160,
        height=140 + lines * max(200, 30 * len(names) + 80),
        meta={KEY: _finite(jsonable({"name": about, **result.about, "headscope": __version__}, "evaluation"))},
    )  # fmt: skip
    return made


def write(result: Evaluation, path: Path) -> None:
    """Write one of :data:`FORMATS`, by the name's end; .html has all that it needs.

    Raises:
        ValueError: another format.
    """
    if path.suffix == ".json":
        write_whole(path, json.dumps(as_json(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    elif path.suffix == ".csv":
        write_whole(path, as_csv(result))
    elif path.suffix == ".html":
        write_whole(path, figure(result).to_html(include_plotlyjs=True))
    elif path.suffix in (".svg", ".pdf"):
        from interp.scores_files import write_image

        write_image(figure(result), path, "svg" if path.suffix == ".svg" else "pdf")
    else:
        raise ValueError(f"a result must be written to one of {', '.join(FORMATS)}, got {path}")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
