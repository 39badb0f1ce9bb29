# ruff: noqa: E501, ISC004 - sentences of the README stand here as they are printed
"""Write the generated sections of the README: the family table from tiny models, the proof from the recorded results.

python tests/benchmarks/fill_readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

import interp
from interp.testing import build, families

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"


def family_table() -> str:
    lines = ["| family | sites (layers x heads of the tiny model) | not reached |", "|---|---|---|"]
    for name in families(reached=None):
        specimen = build(name)
        shape = interp.anatomy(specimen.module)
        stacks = ", ".join(f"{s} {a} x {b}" for s, (a, b) in shape.shapes().items()) or "none"
        for stack, layers in shape.without_softmax.items():
            stacks += f" ({stack} layers {', '.join(map(str, layers))} have no softmax attention)"
        classes = sorted({entry.split("(")[-1].rstrip(")") for entry in shape.unreached})
        lines.append(f"| {name} | {stacks} | {', '.join(classes) or '-'} |")
    return "\n".join(lines)


def proof() -> str:
    content = json.loads((RESULTS / "proof_smollm2.json").read_text())
    rows = {row["what"]: row for row in content["rows"]}
    found, machine, versions = rows["detection"], content["machine"], content["versions"]
    lines = [
        f"SmolLM2-135M-Instruct on {machine.get('gpu') or machine['cpu']}, torch {versions['torch']}, transformers {versions['transformers']}"
        f" (`{content['command']}`, recorded in `tests/benchmarks/results/proof_smollm2.json`).",
        "",
        f"Heads found on {found['n']} detection needles: {found['top']}; {found['share at least 0.1']:.1%} of the heads score 0.1 or more. "
        f"On {rows['zero, 1 heads']['n']} other needles (other cities, other numbers) the plain model copies "
        f"{found['plain exact match']:.0%} of the answers. Masking acts on the rows that produce the answer; change of the answer's "
        "log-probability in nats, mean over needles (se), and exact match:",
        "",
        "| masked | found heads | layer-matched sets (worst) | norm-matched sets (worst) | exact match: found / layer / norm | p layer / norm |",
        "|---|---|---|---|---|---|",
    ]
    for what, row in rows.items():
        if "top change of log-probability" not in row:
            continue
        lines.append(
            f"| {what} | {row['top change of log-probability']:.2f} ({row['se']:.2f}) "
            f"| {row['layer-matched mean']:.2f} ({row['layer-matched worst set']:.2f}) "
            f"| {row['norm-matched mean']:.2f} ({row['norm-matched worst set']:.2f}) "
            f"| {row['top exact match']:.0%} / {row['layer-matched exact match']:.0%} / {row['norm-matched exact match']:.0%} "
            f"| {row['p against layer-matched']:.3f} / {row['p against norm-matched']:.3f} |"
        )
    lines += [
        "",
        f"{rows['zero, 1 heads']['sets of each control']} random sets of each control, so the smallest p there is is 1/51. What failed: at "
        "30 heads the layer-matched control breaks the model as well (few other heads are left in those layers), so only the "
        "norm-matched one speaks there. Is the model broken? The same heads zeroed at every row, loss in nats per token:",
        "",
        "| heads | prose: found / layer-matched | closed-book answers: found / layer-matched |",
        "|---|---|---|",
    ]
    for k in (0, 1, 3, 10, 30):
        row = rows[f"control, zero, {k} heads, every row"]
        pair = [
            f"{row[n]:.2f}" + (f" / {row[n + ', layer-matched mean']:.2f}" if k else "")
            for n in ("prose loss", "closed-book loss")
        ]
        lines.append(f"| {k} | {pair[0]} | {pair[1]} |")
    lines += [
        "",
        "Up to 10 heads ordinary prose is untouched while the needle is lost; 30 heads hurt everything. On this model and these "
        "prompts; attention is not causation, the masking is the evidence.",
    ]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    path = ROOT / "README.md"
    text = path.read_text()
    for name, content in {"families": family_table(), "proof": proof()}.items():
        section = f"<!-- generated: {name} -->\n{content}\n<!-- end -->"
        text = re.sub(rf"<!-- generated: {name} -->.*?<!-- end -->", lambda _, s=section: s, text, flags=re.S)
    path.write_text(text)


if __name__ == "__main__":
    main()
