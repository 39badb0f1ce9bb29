"""Retrieval scores, sinks and massive activations of SmolLM2 with their controls, as the README shows them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from _results import recorded, table

Row = dict[str, Any]
MEAN = "mean of the model's retrieval heads"


def real(content: dict[str, Any], again: dict[str, Any] | None = None) -> str:
    """Of a run of all parts, and of a later one of massive activations alone, which then counts."""
    later = again is not None and datetime.fromisoformat(again["date"]) > datetime.fromisoformat(content["date"])
    last = again if again is not None and later else content
    retrieval, sinks, massive = (
        [row for row in source["rows"] if row["what"] == what]
        for what, source in (("retrieval", content), ("sinks", content), ("massive activations", last))
    )
    rows = {(row["what"], row["on"]): row for row in [*retrieval, *sinks, *massive]}
    sources = [recorded(content), *([recorded(last)] if later else [])]
    model = rows["retrieval", "model"]
    return "\n".join(
        [
            f"**Scores of SmolLM2-135M-Instruct with their controls** ({'; massive activations: '.join(sources)}).",
            "",
            (
                f"Retrieval score (set form, teacher-forced) on {model['n']} needles: {model['top']}. Gu's sink metric (first token, "
                f"T = 64, epsilon 0.3) on {sinks[0]['n']} passages, the largest entry that enters a layer on {massive[0]['n']}. Controls: "
                "the needle prompts' filler, or the passages' tokens, in random order; a twin with random weights:"
            ),
            "",
            *_table(retrieval, sinks, massive),
            "",
            _what_came_out(rows),
        ]
    )


def _table(*scores: list[Row]) -> list[str]:
    """A column for the model and each of its controls."""
    retrieval, sinks, massive = scores
    lines: list[tuple[str, list[str]]] = [
        ("largest retrieval score (a span elsewhere)", [f"{r['largest']:.2f} ({r['largest, a span elsewhere']:.2f})" for r in retrieval]),
        ("heads with at least 0.1", [f"{r['share of heads at least 0.1']:.1%}" for r in retrieval]),
        ("mean score of the model's retrieval heads", [f"{r[MEAN]:.2f}" for r in retrieval]),
        ("sink metric (the middle key)", [f"{r['sink metric, percent']:.1f} % ({r['the middle key, percent']:.1f} %)" for r in sinks]),
        ("mean mass on the first token", [f"{r['mean mass on the first token']:.2f}" for r in sinks]),
        ("sinks in every text", [f"{r['heads that are sinks in every text']} of {r['of']}" for r in sinks]),
        (
            "largest entry (times the median)",
            [f"{_size(r['largest, mean'])} ({_size(r['ratio to the median, mean'])})" for r in massive],
        ),
        ("texts with a massive one", [f"{r['share of texts with a massive one']:.0%}" for r in massive]),
        ("its dimension (texts), at the first token", [
            f"{r['dimension']} ({r['texts with it']:.0%}), {r['at the first token']:.0%}" for r in massive
        ]),
        ("sink dimensions", [_dims(row["sink dimensions"]) for row in massive]),
    ]  # fmt: skip
    return table(["", "model", "shuffled", "random weights"], [[name, *cells] for name, cells in lines])


def _size(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _dims(found: list[int] | str) -> str:
    return "none" if isinstance(found, str) else ", ".join(map(str, found))


def _what_came_out(rows: dict[tuple[str, str], Row]) -> str:
    sinks, shuffled = rows["sinks", "model"], rows["sinks", "tokens shuffled"]
    one = rows["massive activations", "model"]
    layers = [n for n, share in enumerate(sinks["percent by layer"]) if share < 1]
    massive = [n for n, ratio in enumerate(one["ratio by layer"]) if ratio >= 1000]
    calibrated = (
        f"In dimension {one['sink dimensions'][0]} the sink's |x / RMS| is {one['x / RMS at the sink']:.1f} of at most 24, that of three "
        f"quarters of the tokens up to {one['x / RMS, three quarters of tokens below']:.1f}, so only x itself tells them apart "
        f"({one['times the x of three quarters of tokens']:.0f} times)."
        if isinstance(one["sink dimensions"], list)
        else ""
    )
    return (
        f"What is no sign of reading: shuffling the tokens leaves sinks ({shuffled['sink metric, percent']:.0f} % against "
        f"{sinks['sink metric, percent']:.0f} %) and massive activations nearly as they are, and retrieval heads retrieve from shuffled "
        "filler too; all three are gone with random weights. Sinks are not everywhere: layers "
        f"{', '.join(map(str, layers))} have none. Entries of at least 1000 times the median enter layers {_runs(massive)}. {calibrated}"
    ).strip()


def _runs(numbers: list[int]) -> str:
    """``1 to 3, 5`` for 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in parts)
