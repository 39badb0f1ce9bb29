"""The README's tables of methods applied to the bundled LLaVA, from the recorded result."""

from __future__ import annotations

from typing import Any

from _results import RESULTS, result, table, where


def section() -> str:
    """Every setting that was confirmed, whatever it did."""
    from proof_scenes import markdown

    content = result("proof_scenes")
    lines = [
        *markdown(content["rows"]),
        f"*{where(content)}; `{content['command']}`; `proof_scenes.json`*",
        "",
        *pictures(),
    ]
    if (RESULTS / "proof_smol_methods.json").exists():
        lines += ["", *smol(result("proof_smol_methods"))]
    return "\n".join(lines)


def pictures() -> list[str]:
    """Both pictures; what they say of intervals is what the record has."""
    from proof_surface import recorded

    bounded = recorded()["rows"][0]["greedy margin"][1] is not None
    marks = "bold where the interval leaves 0 out" if bounded else "means, no intervals by cell were recorded"
    return [
        (
            f"How each method shifts the margin over visual evidence (the clarity of the air) and the strength of the prior ({marks}; "
            "methods at their tuned strength):"
        ),
        "",
        "![Change of the margin by method, prior and clarity](docs/assets/surface_methods.png)",
        "",
        (
            "CHAIR_I against recall and against length, and its difference to greedy where both captions of a picture are cut to the same "
            "recall or the same length (greedy cut to a method's length is the length-matched baseline):"
        ),
        "",
        "![CHAIR over recall and length](docs/assets/chair_frontier.png)",
        "",
        (
            "`python tests/benchmarks/proof_surface.py --draw` draws both from the recorded results "
            f"(`proof_surface.json`: `{recorded()['command']}`, {where(recorded())}; greedy's own curve, `proof_greedy.py`, is made on a "
            "CPU, whose greedy captions have the figures of the GPU's)."
        ),
    ]


def smol(content: dict[str, Any]) -> list[str]:
    """SmolLM2-135M: every confirmed setting on needles and closed-book questions."""
    rows = [r for r in content["rows"] if r["what"] == "confirmed"]
    by = {(r["split"], r["setting"]): r for r in rows}
    body: list[list[str]] = []
    for name in dict.fromkeys(r["setting"] for r in rows):
        needle, book = by["needles", name], by["closed book", name]
        label = f"{name} ({needle['kind']})"
        if "cannot act" in needle:
            body.append([label, f"cannot act: {needle['cannot act'][:120]}", "", "", "", "", ""])
            continue
        cells = [label, f"{needle['logprob'][0]:.2f}"]
        for row in (needle, book):
            d = row.get("logprob difference")
            cells += [
                "" if d is None else f"{d[0]:+.2f} [{d[1]:+.2f}, {d[2]:+.2f}]",
                f"{row['p max-T']:.3g}" if d else "",
            ]
        body.append([*cells[:4], f"{needle['exact'][0]:.2f}", *cells[4:]])
    found = next(r for r in content["rows"] if r["what"] == "detection")
    n, books = by["needles", "greedy"]["n"], by["closed book", "greedy"]["n"]
    header = ["setting", "log p(answer), nats", "change", "p, max-T", "exact", "closed book: change", "p, max-T"]
    return [
        (
            f"**SmolLM2-135M-Instruct**: {n} needles, {books} closed-book questions as control; heads found on {found['n']} other needles "
            f"({found['top'].split(', ')[0]} first); methods act on the rows that produce the answer. DoLa is scored without its "
            "cutoff, below which a forced token would have probability 0: unlikely tokens then have the largest contrast, and its "
            "row says little."
        ),
        "",
        *table(header, body),
        "",
        f"*{where(content)}; `{content['command']}`; `{content['name']}.json`*",
    ]
