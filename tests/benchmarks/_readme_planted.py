"""The README's table of scores judged by planted models, from the recorded result."""

from __future__ import annotations

import json
from typing import Any

from _results import RESULTS, where


def section() -> str:
    """Every score that was tried, whoever wins."""
    content = json.loads((RESULTS / "planted.json").read_text())
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["model"] == model]
        first = next(row for row in rows if "heads" in row)
        lines += [f"`{model}`: {first['heads']} of {first['of']} heads can do the job.", ""]
        lines += ["| score | kind | area under ROC | samples |", "|---|---|---|---|"]
        rows.sort(key=lambda row: -row.get("area", -1.0))
        lines += [f"| {row['score']} | {row['kind']} | {_area(row)} | {row.get('n', '-')} |" for row in rows]
        lines.append("")
    return "\n".join([*lines, f"*{where(content)}; `planted.json`*"])


def _area(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    value = f"{row['area']:.3f}"
    return f"{value} [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else value
