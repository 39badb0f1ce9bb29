"""Recorded results, as the README shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def where(content: dict[str, Any]) -> str:
    """Machine and versions, in a few words."""
    machine, versions = content["machine"], content["versions"]
    cpu = f"{machine['cpu']}, {machine.get('torch_threads', machine['cores'])} threads"
    torch = f"torch {versions['torch'].split('+')[0]}"
    return f"{machine.get('gpu') or cpu}, {torch}, transformers {versions['transformers']}"


def recorded(content: dict[str, Any]) -> str:
    """Machine, versions, command and file of a result."""
    return f"{where(content)}; `{content['command']}`, recorded in `tests/benchmarks/results/{content['name']}.json`"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]
