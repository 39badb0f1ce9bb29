"""Pages of model families: each tiny model is built and its sites listed while the site is built."""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def names() -> list[str]:
    """Every family of ``interp.testing``, those that are not reached too."""
    from interp.testing import families

    return families(reached=None)


@cache
def measured() -> dict[str, dict[str, str]]:
    """Rows of the README's family table, as they were measured when it was written."""
    table = (ROOT / "README.md").read_text().split("<!-- generated: families -->")[1].split("<!-- end -->")[0]
    lines = [line.strip().strip("|").split("|") for line in table.strip().splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0]]
    return {row[0].strip(): dict(zip(header, map(str.strip, row), strict=True)) for row in lines[2:]}


@cache
def found(name: str) -> tuple[Any, Any]:
    """The tiny model and its anatomy."""
    import interp
    from interp.testing import build

    specimen = build(name)
    return specimen, interp.anatomy(specimen.module)


def page(name: str, text: str) -> str:
    """The page of a family around what was written by hand."""
    specimen, shape = found(name)
    title, _, prose = text.strip().partition("\n")
    parts = [title, f"Built here as `{type(specimen.module).__name__}`, small and with random weights.", prose.strip()]
    parts.append(
        "## What is reached\n\n"
        + (_stacks(shape) if shape.sites else "Nothing: no attention of this model can be traced.")
    )
    if shape.without_softmax:
        gaps = "; ".join(f"`{s}` layers {', '.join(map(str, layers))}" for s, layers in shape.without_softmax.items())
        parts.append(
            f"Layers without softmax attention, in this small model: {gaps}. Their values are missing (NaN), never 0."
        )
    missing = sorted({entry.rpartition("(")[2].rstrip(")") for entry in shape.unreached})
    not_reached = (
        ", ".join(f"`{entry}`" for entry in missing) + " computes attention itself, outside transformers' interface."
    )
    if not missing:
        not_reached = "Every attention module is reached." if shape.sites else "There is no attention to reach."
    parts.append("## What is not reached\n\n" + not_reached)
    if specimen.notes:
        parts.append(f"## To know\n\n{specimen.notes}")
    row = measured().get(name)
    if row and shape.sites:
        lines = "\n".join(f"| {html.escape(k)} | {v} |" for k, v in list(row.items())[2:8])
        parts.append(
            "## Measured\n\nLargest absolute errors over all heads, from the README's table "
            "(`python tests/benchmarks/fill_readme.py families`; [what the columns mean](index.md#measured)).\n\n"
            f"| | |\n| --- | --- |\n{lines}"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _stacks(shape: Any) -> str:
    rows = []
    for stack, sites in shape.stacks.items():
        first = sites[0]
        layers, heads = shape.shape(stack)
        kv = f", {first.n_kv_heads} KV" if first.n_kv_heads != first.n_heads else ""
        dims = f"{first.head_dim}" + (f", values {first.v_head_dim}" if first.v_head_dim != first.head_dim else "")
        rows.append(f"| `{stack}` | {layers} x {heads}{kv} | {dims} | `{first.name}` | {_projection(first)} |")
    head = (
        "| stack | layers x heads here | head dim | first site | output projection |\n| --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *rows])


def _projection(site: Any) -> str:
    return f"`{site.out_proj}`" if site.out_proj else "not below the site"


def table() -> str:
    """All families, a row each."""
    rows = []
    for name in names():
        specimen, shape = found(name)
        stacks = ", ".join(f"`{s}`" for s in shape.shapes()) or "none"
        missing = ", ".join(sorted({f"`{e.rpartition('(')[2].rstrip(')')}`" for e in shape.unreached})) or "-"
        rows.append(f"| [{name}]({name}.md) | `{type(specimen.module).__name__}` | {stacks} | {missing} |")
    return "\n".join(["| family | class here | stacks | not reached |", "| --- | --- | --- | --- |", *rows])
