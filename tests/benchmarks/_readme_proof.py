"""The proof section of the README, from the recorded results."""

from __future__ import annotations

from typing import Any

import _readme_deit
import _readme_real
import _readme_vision
from _results import RESULTS, recorded, result, table

DOSES = (0, 1, 3, 10, 30)


def section() -> str:
    head = (
        "Heads are found by what they attend to on some inputs and tested by masking them on others: attention is not causation, the "
        "masking is the evidence. All figures are of these models and these inputs."
    )
    parts = [
        smollm2(result("proof_smollm2")),
        _readme_real.real(
            result("proof_real"),
            result("proof_real_massive") if (RESULTS / "proof_real_massive.json").exists() else None,
        ),
        gemma(result("proof_gemma")),
        _readme_deit.deit(result("proof_deit")),
    ]
    if (RESULTS / "proof_vision.json").exists():
        parts.append(_readme_vision.vision(result("proof_vision")))
    return "\n\n".join([head, *parts])


def smollm2(content: dict[str, Any]) -> str:
    rows = {row["what"]: row for row in content["rows"]}
    found, first = rows["detection"], rows["zero, 1 heads"]
    doses = [
        [
            what,
            f"{row['top change of log-probability']:.2f} ({row['se']:.2f})",
            f"{row['layer-matched mean']:.2f} ({row['layer-matched worst set']:.2f})",
            f"{row['norm-matched mean']:.2f} ({row['norm-matched worst set']:.2f})",
            f"{row['top exact match']:.0%} / {row['layer-matched exact match']:.0%} / {row['norm-matched exact match']:.0%}",
            f"{row['p against layer-matched']:.3f} / {row['p against norm-matched']:.3f}",
        ]
        for what, row in rows.items()
        if "top change of log-probability" in row
    ]
    broken = []
    for k in DOSES:
        row = rows[f"control, zero, {k} heads, every row"]
        pair = [
            f"{row[n]:.2f}" + (f" / {row[n + ', layer-matched mean']:.2f}" if k else "")
            for n in ("prose loss", "closed-book loss")
        ]
        broken.append([str(k), *pair])
    lines = [
        f"**SmolLM2-135M-Instruct** ({recorded(content)}).",
        "",
        (f"Heads found on {found['n']} detection needles: {found['top']}; {found['share at least 0.1']:.1%} of the heads score "
        f"0.1 or more. On {first['n']} other needles (other cities, other numbers) the plain model copies "
        f"{found['plain exact match']:.0%} of the answers. Masking acts on the rows that produce the answer; change of the "
        "answer's log-probability in nats, mean over needles (se), and exact match:"),
        "",
        *table(
            ["masked", "found heads", "layer-matched sets (worst)", "norm-matched sets (worst)",
             "exact match: found / layer / norm", "p layer / norm"],
            doses,
        ),
        "",
        (f"{first['sets of each control']} random sets of each control, so the smallest p there is is "
        f"1/{first['sets of each control'] + 1}. What failed: at 30 heads the layer-matched control breaks the model as well (few "
        "other heads are left in those layers), so only the norm-matched one speaks there. Is the model broken? The same heads "
        "zeroed at every row, loss in nats per token:"),
        "",
        *table(["heads", "prose: found / layer-matched", "closed-book answers: found / layer-matched"], broken),
        "",
        "Up to 10 heads ordinary prose is untouched while the needle is lost; 30 heads hurt everything.",
    ]  # fmt: skip
    return "\n".join(lines)


def gemma(content: dict[str, Any]) -> str:
    rows = {row["what"]: row for row in content["rows"]}
    found = rows["detection"]
    zero, uniform = rows["zero, 4 of 12 heads"], rows["uniform, 4 of 12 heads"]
    ranking = [
        [
            row["what"].split(",")[0],
            f"{row['change of log-probability']:.2f} ({row['se']:.2f})",
            f"{row['mean of all sets']:.2f} / {row['median of all sets']:.2f}",
            f"{row['worst change']:.2f}, {row['worst set']}",
            f"**{row['rank (1 is worst)']} of {row['of']}** (p = {row['exact p']:.3f})",
            f"{row['exact match']:.0%} / {row['mean exact match']:.0%}",
            f"{row['rank correlation of summed score and change']:.2f}",
        ]
        for row in (zero, uniform)
    ]
    header = [
        "masked as", "found set: change in nats (se)", "all sets: mean / median", "worst set", "rank of the found set",
        "exact match: found / all", "rank correlation, summed score and change",
    ]  # fmt: skip
    intro = (
        f"Needles stand at least {found['shortest distance']} tokens back, beyond the window of {found['window']}, so only the 12 "
        f"heads of the three layers with full attention can see them. Found on {found['n']} detection needles: {found['heads']}. "
        f"On {zero['n']} other needles (plain model: {found['plain exact match']:.0%} copied) the four best, {found['chosen']}, "
        f"are ranked exactly against all {zero['of']} sets of 4 of the 12:"
    )
    return "\n".join(
        [
            f"**Gemma 3 270M** ({recorded(content)}).",
            "",
            intro,
            "",
            *table(header, ranking),
            "",
            _what_came_out(zero, uniform),
            "",
            _what_failed(rows, zero, uniform),
        ]
    )


def _what_came_out(zero: dict[str, Any], uniform: dict[str, Any]) -> str:
    alone = [row["each head alone"].split(", ")[0].split(" ") for row in (zero, uniform)]
    return (
        f"What came out: with the retrieval-head paper's kind (`uniform`: only the choice of keys is removed) no set is worse than "
        f"the found one. One head, {alone[1][0]}, carries the copy: alone it costs {alone[1][1]} nats (`zero`: {alone[0][0]} "
        f"{alone[0][1]}), and exact match is {uniform['exact match, sets with it']:.1%} in the {uniform['sets with it']} sets with it, "
        f"{uniform['exact match, sets without it']:.1%} in the others."
    )


def _what_failed(rows: dict[str, dict[str, Any]], zero: dict[str, Any], uniform: dict[str, Any]) -> str:
    plain, masked = rows["control, zero, no head"], rows["control, zero, the chosen heads, every row"]
    closed = {kind: rows[f"control, {kind}, closed-book answers"] for kind in ("zero", "uniform")}
    parts = [
        f"`{kind}` {row['change of log-probability']:.2f} (se {row['se']:.2f}; {row['sets of each control']} other sets "
        f"{row['mean of other sets']:.2f}, worst {row['worst other set']:.2f})"
        for kind, row in closed.items()
    ]
    return (
        f"What failed: with `zero` the found set is only number {zero['rank among sets with it']} of the {zero['sets with it']} with "
        f"that head: whole outputs of its neighbours matter more there than the three other heads found, with which the loss is "
        f"{zero['change of log-probability']:.2f} nats ({zero['each head alone'].split(', ')[0]} alone). Is the model "
        "broken? In the same scope, on "
        f"{closed['zero']['n']} closed-book answers (nothing to copy) the found set changes the answer's log-probability by "
        f"{' and '.join(parts)} nats. Zeroed at every row it does break the model: prose "
        f"{masked['prose loss'] - plain['prose loss']:+.2f} nats per token (other sets "
        f"{masked['prose loss, other sets mean'] - plain['prose loss']:+.2f}); 4 of 72 heads, three of them in layer 5, are too many here."
    )
