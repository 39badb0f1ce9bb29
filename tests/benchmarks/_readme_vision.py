"""Vision scores against the ablation's effect on the hallucination margin, as the README shows them."""

from __future__ import annotations

from typing import Any

from _results import table, where

WORDS = {
    "resample": "another picture, all rows",
    "mean": "mean over scenes, all rows",
    "row": "another picture, the row that decides",
}


def vision(content: dict[str, Any]) -> str:
    """Every score and every kind of effect, whoever wins; pooled over training seeds where there are several."""
    models = [row for row in content["rows"] if row["what"] == "model"]
    found = [row for row in content["rows"] if row["what"] == "correlation"]
    shown = [row for row in found if row["model"] == ("pooled" if len(models) > 1 else models[0]["model"])]
    seeds = [row["model"] for row in models]
    of = (
        f"{len(models)} trainings ({', '.join(seeds)}), their mean, in brackets behind it the trainings"
        if len(models) > 1
        else f"one training ({seeds[0]})"
    )
    lines = [
        f"**scenes-lvlm** ({where(content)}; `{content['command']}`, recorded in `tests/benchmarks/results/proof_vision.json`).",
        "",
        (
            f"Does a vision score tell which heads hold hallucination down? {shown[0]['n']} points of mention whose typical companion "
            "is missing, teacher-forced; effect: rise of the margin, log p(absent) - log p(present), when the head's output is "
            f"replaced; {of}. Rank correlation over heads within layers [95 % by scene], p by permutation of the heads of each layer "
            "(max-T over the five scores):"
        ),
        "",
    ]
    body = [
        [
            WORDS[row["effect"]],
            row["score"],
            _value(row["rho"]) + _each(row.get("rho by seed")),
            f"{row['p max-T']:.3g}",
            _value(row["partial rho"]) if "partial rho" in row else "-",
            _value(row["size rho"]),
            f"{row['reliability of the score']:.2f} / {row['reliability of the effect']:.2f}",
        ]
        for row in shown
    ]
    header = [
        "effect",
        "score",
        "rank correlation",
        "p",
        "write norm taken off",
        "with the effect's size",
        "reliability: score / effect",
    ]
    lines += table(header, body)
    return "\n".join([*lines, "", _strongest(content["rows"])])


def _value(values: list[float]) -> str:
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*values)


def _each(seeds: list[float] | None) -> str:
    return "" if seeds is None else f" ({', '.join(f'{v:+.2f}' for v in seeds)})"


def _strongest(rows: list[dict[str, Any]]) -> str:
    """Which heads they are, and how many differ from nothing."""
    parts = [
        f"{row['model']}: {', '.join(row['largest and smallest'][:3])} nats; {row['heads with |mean| > 4 se']} of {row['of']} heads "
        "differ from 0 by more than 4 se"
        for row in rows
        if row["what"] == "heads" and row["effect"] == "resample"
    ]
    return f"Heads that hold the margin down most (another picture, all rows): {'. '.join(parts)}."
