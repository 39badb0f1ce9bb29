"""CHAIR against recall and length, and its differences to greedy at matched recall and length: a picture of recorded rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f3c8d",
    "#8c564b",
    "#b5bd00",
    "#777777",
    "#2f4b7c",
)
BEYOND = 1.35
"""Times greedy's CHAIR_I at which the axes end."""
SPAN = 0.065
MATCHED = (("recall", "o"), ("words", "s"))


def method_of(row: dict[str, Any]) -> str:
    """What a row's strengths are joined under."""
    if row["kind"] == "random heads":
        return "random heads"
    return row["setting"].split("(")[0]


def picture(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """A line of panels a split: CHAIR_I over recall, over words, and paired differences to greedy at matched recall and length.

    Args:
        rows: of :mod:`proof_scenes`; those of what could not act are left out. Greedy's own curve, its captions cut at a number of
            words, is drawn where its row has a ``frontier``.
        title: above it all.
        path: of the PNG.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["what"] == "confirmed" and "cannot act" not in r]
    splits = list(dict.fromkeys(r["split"] for r in rows))
    methods = [m for m in dict.fromkeys(method_of(r) for r in rows) if m != "greedy"]
    colour = {m: COLOURS[n % len(COLOURS)] for n, m in enumerate(methods)}
    figure, axes = plt.subplots(len(splits), 3, figsize=(13, 4.3 * len(splits)), squeeze=False, layout="constrained")
    for line, split in enumerate(splits):
        mine = [r for r in rows if r["split"] == split]
        greedy = next(r for r in mine if r["setting"] == "greedy")
        for axis, name, label in ((axes[line][0], "recall", "recall"), (axes[line][1], "words", "words a caption")):
            _points(axis, mine, greedy, name, colour)
            axis.set_xlabel(label)
            axis.set_ylabel(f"{split}: CHAIR_I")
            axis.grid(color="#eeeeee")
        _forest(axes[line][2], [r for r in mine if r is not greedy], colour)
    axes[0][0].set_title("down and right is better", fontsize=10)
    axes[0][2].set_title("CHAIR_I, method minus greedy: left of 0 is better", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=10.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75, metadata={"Software": None})
    plt.close(figure)


def _points(
    axis: Any, rows: Sequence[dict[str, Any]], greedy: dict[str, Any], name: str, colour: dict[str, str]
) -> None:
    x, y = f"chair {name}", "chair chair_i"
    for method, hue in colour.items():
        mine = sorted((r for r in rows if method_of(r) == method), key=lambda r: r[x][0])
        joined = method != "random heads"
        axis.errorbar(
            [r[x][0] for r in mine], [r[y][0] for r in mine], xerr=_arms(mine, x), yerr=_arms(mine, y),
            color=hue, fmt="o-" if joined else "x", markersize=5, linewidth=1, elinewidth=0.6, alpha=0.9, label=method,
        )  # fmt: skip
    axis.plot(greedy[x][0], greedy[y][0], "*", color="black", markersize=14, label="greedy", zorder=5)
    # One setting far above all others would press the rest flat: it is named instead.
    top = BEYOND * greedy[y][0]
    for n, row in enumerate(r for r in rows if r[y][0] > top):
        axis.annotate(
            f"above: {_short(row['setting'])}, {row[y][0]:.2f} at {row[x][0]:.3g}", (0.98, 0.97 - 0.06 * n),
            xycoords="axes fraction", ha="right", va="top", fontsize=8, color=colour[method_of(row)],
        )  # fmt: skip
    inside = [r for r in rows if r[y][0] <= top]
    axis.set_ylim(0.9 * min(r[y][1] for r in inside), top)
    low, high = min(r[x][1] for r in inside), max(r[x][2] for r in inside)
    axis.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    cut = list(greedy.get("frontier", {}).values())
    if cut:
        axis.plot(
            [p[name][0] for p in cut],
            [p["chair_i"][0] for p in cut],
            ":",
            color="black",
            label="greedy, cut at 10 .. 80 words",
        )


def _arms(rows: Sequence[dict[str, Any]], name: str) -> Any:
    return [[r[name][0] - r[name][1] for r in rows], [r[name][2] - r[name][0] for r in rows]]


def _forest(axis: Any, rows: Sequence[dict[str, Any]], colour: dict[str, str]) -> None:
    for n, row in enumerate(rows):
        for k, (on, sign) in enumerate(MATCHED):
            value = row.get(f"chair_i difference at matched {on}")
            if value is not None and abs(value[0]) > SPAN:
                axis.text(
                    SPAN * 0.97,
                    n,
                    f"{value[0]:+.2f} at matched {'recall' if on == 'recall' else 'length'}",
                    ha="right",
                    va="center",
                    fontsize=8,
                )
            elif value is not None:
                axis.errorbar(
                    value[0], n + 0.18 * (2 * k - 1), xerr=[[value[0] - value[1]], [value[2] - value[0]]], fmt=sign,
                    color=colour[method_of(row)], fillstyle="full" if on == "recall" else "none", markersize=5, linewidth=1,
                )  # fmt: skip
    axis.set_xlim(-SPAN, SPAN)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [_short(r["setting"]) for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("full: at matched recall; open: at matched length")
    axis.grid(color="#eeeeee", axis="x")


def _short(name: str) -> str:
    """Names that fit beside an axis."""
    for long, short in (
        ("dims=[44,247,201]", "named sinks"),
        ("layers=[4,5,6,7]", "4-7"),
        ("generated", "gen."),
        ("L2H4,L3H5,L1H4,L3H4", "top 4"),
    ):
        name = name.replace(long, short)
    return name
