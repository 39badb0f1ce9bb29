"""The family table of the README: every tiny model is built, traced and checked while the table is written."""

from __future__ import annotations

import sys
from importlib.metadata import version

import interp
from interp.testing import Specimen, agreement, build, families

HEADER = (
    "family", "sites (layers x heads of the tiny model)", "map, eager", "map, fp64", "row statistics", "column statistics",
    "bit-equal", "check", "not reached",
)  # fmt: skip


def table() -> str:
    rows = []
    for name in families(reached=None):
        specimen = build(name)
        shape = interp.anatomy(specimen.module)
        stacks = ", ".join(f"{s} {a} x {b}" for s, (a, b) in shape.shapes().items()) or "none"
        for stack, layers in shape.without_softmax.items():
            stacks += f" ({stack} layers {', '.join(map(str, layers))} have no softmax attention)"
        missing = ", ".join(sorted({entry.split("(")[-1].rstrip(")") for entry in shape.unreached}))
        missing = missing or ("-" if shape.sites else "no attention")
        measured = checked(specimen) if shape.sites else ["-"] * 6
        rows.append([name, stacks, *measured, missing])
        print("; ".join(rows[-1]), file=sys.stderr, flush=True)
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\nMeasured with transformers {version('transformers')}, torch {version('torch').split('+')[0]}, fp32 on a CPU."


def checked(specimen: Specimen) -> list[str]:
    """Largest errors of one traced forward, and the outcome of :func:`interp.check` on the same input."""
    found = agreement(specimen)
    report = interp.check(specimen.module, specimen.inputs)
    recomputed = max(row.figure for row in report.rows if row.check.startswith("maps"))
    verdicts = [row.passed for row in report.rows if row.passed is not None]
    return [
        "-" if found.eager is None else f"{found.eager:.0e}",
        f"{recomputed:.0e}",
        f"{found.row_statistics:.0e}",
        f"{found.column_statistics:.0e}",
        "yes" if found.bit_equal else "NO",
        f"{sum(verdicts)} of {len(verdicts)}",
    ]
