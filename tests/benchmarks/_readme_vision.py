"""Vision scores against the ablation's effect on the hallucination margin, as the README shows them."""

from __future__ import annotations

import json
from typing import Any

from _results import RESULTS, result, table, where

WORDS = {
    "resample": "another picture, all rows",
    "mean": "mean over scenes, all rows",
    "row": "another picture, the row that decides",
}
KINDS = {
    "": "rank correlation",
    "partial ": "write norm taken off",
    "size ": "with the effect's size",
    "size partial ": "the same, write norm taken off",
}
LEVEL = 0.05


def vision(content: dict[str, Any]) -> str:
    """Every score and every kind of effect, whoever wins; pooled over training seeds where there are several."""
    models = [row for row in content["rows"] if row["what"] == "model"]
    found = [row for row in content["rows"] if row["what"] == "correlation"]
    shown = [row for row in found if row["model"] == ("pooled" if len(models) > 1 else models[0]["model"])]
    of = f"one training ({models[0]['model']})"
    if len(models) > 1:
        of = f"mean over {len(models)} trainings, behind it in brackets each of them"
    place = f"{where(content)}, commit {content['versions']['commit']}"
    lines = [
        f"**scenes-lvlm** ({place}; `{content['command']}`, recorded in `tests/benchmarks/results/proof_vision.json`).",
        "",
        (
            f"Does a vision score tell which heads hold hallucination down? {shown[0]['n']} points of mention whose typical companion "
            "is missing, teacher-forced; effect: rise of the margin, log p(absent) - log p(present), when the head's output is "
            f"replaced. Rank correlation over heads within layers, {of}; [95 % by scene]; p by permutation of the heads of each layer, "
            "max-T over the five scores of an effect and column (the smallest there is: 0.0001). Reliability: split halves of the scenes, "
            "stepped up:"
        ),
        "",
    ]
    body = [
        [
            WORDS[row["effect"]],
            row["score"],
            *(_cell(row, kind) for kind in KINDS),
            f"{row['reliability of the score']:.2f} / {row['reliability of the effect']:.2f}",
        ]
        for row in shown
    ]
    lines += table(["effect", "score", *KINDS.values(), "reliability: score / effect"], body)
    lines += ["", _came_out(shown), "", _failed(shown, found, models)]
    return "\n".join([*lines, "", *_trainings(content["rows"], models)])


def _cell(row: dict[str, Any], kind: str) -> str:
    if f"{kind}rho" not in row:
        return "-"
    seeds = row.get("rho by seed") if not kind else None
    each = "" if seeds is None else f" ({', '.join(f'{v:+.2f}' for v in seeds)})"
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[f"{kind}rho"]) + f"{each}, p {row[f'{kind}p max-T']:.2g}"


def _passing(rows: list[dict[str, Any]], effect: str, kind: str) -> str:
    names = [row["score"] for row in rows if row["effect"] == effect and row.get(f"{kind}p max-T", 1) < LEVEL]
    return ", ".join(names) or "none"


def _came_out(shown: list[dict[str, Any]]) -> str:
    """Which scores pass, by a rule, and how much they say."""
    best = max(shown, key=lambda row: abs(row["rho"][0]))
    parts = [
        f"{WORDS[effect]}: {_passing(shown, effect, '')} (write norm taken off: {_passing(shown, effect, 'partial ')})"
        for effect in WORDS
    ]
    return (
        f"What came out, at p < {LEVEL}: {'; '.join(parts)}. The largest correlation is {best['rho'][0]:+.2f} ({best['score']}), "
        f"{best['rho'][0] ** 2:.0%} of the variance of ranks; the reliabilities leave room for far more. "
        "A change of picture moves both the exchanged picture and two of the effects, so agreement there is partly built in."
    )


def _failed(shown: list[dict[str, Any]], found: list[dict[str, Any]], models: list[dict[str, Any]]) -> str:
    never = [name for name in _scores(shown) if all(_p(r) >= LEVEL for r in shown if r["score"] == name)]
    mean = max((row for row in shown if row["effect"] == "mean"), key=lambda row: abs(row["rho"][0]))
    norm, vhd = ([f"{r['size rho'][0]:.2f}" for r in shown if r["score"] == name] for name in ("write norm", "VHD"))
    text = (
        f"What failed: {' and '.join(never) or 'no score'} pass{'es' if len(never) == 1 else ''} nowhere in the first column. With "
        f"the mean in place of another picture, where nothing is built in, the largest correlation is {mean['rho'][0]:+.2f} "
        f"({mean['score']}, p {_p(mean):.2g}). Where VHD goes with the *size* of an effect ({', '.join(vhd)}), so does the plain "
        f"write norm ({', '.join(norm)})."
    )
    if len(models) > 1:
        single = [row for row in found if row["model"] != "pooled"]
        text += (
            f" In one training alone {sum(_p(r) < LEVEL for r in single)} of {len(single)} correlations pass (5 scores, {len(WORDS)} "
            f"effects, {len(models)} trainings). Intervals and p are of these trainings, corrected neither over effects nor over columns."
        )
    return text


def _p(row: dict[str, Any]) -> float:
    return row["p max-T"]


def _scores(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["score"] for row in rows))


def _trainings(rows: list[dict[str, Any]], models: list[dict[str, Any]]) -> list[str]:
    """How good each training is, which heads they are, and where the effects are."""
    body = []
    for model in models:
        name = model["model"]
        heads = {r["effect"]: r for r in rows if r["what"] == "heads" and r["model"] == name}
        layers = {
            r["effect"]: r["mean |effect| by layer"] for r in rows if r["what"] == "layers" and r["model"] == name
        }
        agree = next(r for r in rows if r["what"] == "agreement of effects" and r["model"] == name)
        check = _check(name)
        body.append(
            [
                name,
                *("{:.3f} [{:.3f}, {:.3f}]".format(*check[s]["yes_no_accuracy"]) for s in ("test", "against")),
                "{:.2f} [{:.2f}, {:.2f}]".format(*check["against"]["captions"]["chair_s"]),
                f"{model['margin']:.2f} ({model['prefers absent']:.2f})",
                ", ".join(heads["resample"]["largest and smallest"][:2]),
                "; ".join(heads["mean"]["largest and smallest"][k] for k in (0, -1)),
                f"{heads['resample']['heads with |mean| > 4 se']} / {heads['mean']['heads with |mean| > 4 se']}",
                ", ".join(f"{v:.2f}" for v in layers["resample"]),
                f"{agree['resample, mean']:+.2f}",
            ]
        )
    header = [
        "training", "yes/no right", "against the prior", "CHAIR_S there", "margin (prefers absent)",
        "hold it down most: another picture, nats", "mean: largest; smallest",
        f"heads beyond 4 se of {_heads(rows)}: another picture / mean", "mean size by layer, another picture",
        "order of the two effects: rank correlation",
    ]  # fmt: skip
    lines = table(header, body)
    if len(models) > 1:
        lines += [
            "",
            (
                f"Made again by `{result('proof_vision_trainings')['command']}`; the bundled one has seed 0 and was trained on an H100, "
                "the others on an H200 (`proof_vision_trainings.json`). In every training the first three layers have "
                f"{min(_first(rows)):.0%} or more of the summed size of the effects (another picture), so the order of heads in the "
                "other five is an order of small ones."
            ),
        ]
    return lines


def _first(rows: list[dict[str, Any]], layers: int = 3) -> list[float]:
    """Share of the first layers in the effect's summed size, by training."""
    found = [r["mean |effect| by layer"] for r in rows if r["what"] == "layers" and r["effect"] == "resample"]
    return [sum(values[:layers]) / sum(values) for values in found]


def _heads(rows: list[dict[str, Any]]) -> int:
    return next(row["of"] for row in rows if row["what"] == "heads")


def _check(name: str) -> dict[str, Any]:
    """What a training's own check found: of the bundled model from its folder, of the others as recorded."""
    for row in result("proof_vision_trainings")["rows"]:
        if row["what"] == name:
            return row["check"]
    bundled = RESULTS.parents[2] / "data" / "models" / name / "metrics.json"
    if not bundled.is_file():
        raise ValueError(f"{name} must be a bundled model or a row of proof_vision_trainings.json")
    return json.loads(bundled.read_text())["check"]
