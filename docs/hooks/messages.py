"""Every message that the sources can raise or warn with, as templates: what is filled in stands as ``{}``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("interp", "probes", "dashboards")
# Shorter ones are separators and formats.
MIN_TEXT = 8


@dataclass(frozen=True)
class Message:
    """A template, what it is raised as (``""`` where it is put together elsewhere), and the file."""

    text: str
    error: str
    file: str


@cache
def messages() -> tuple[Message, ...]:
    """All of them, in the order of files."""
    paths = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
    return tuple(m for path in [ROOT / "headscope.py", *paths] for m in _of(path))


@cache
def _strings() -> str:
    return "\n".join(message.text for message in messages())


def exists(quoted: str) -> bool:
    """Does a message quoted on a page, with ``{name}`` for what is filled in, stand in the sources?"""
    return normal(re.sub(r"\{[^}]*\}", "{}", quoted)) in _strings()


def normal(text: str) -> str:
    return " ".join(text.split())


def _of(path: Path) -> Iterator[Message]:
    file = str(path.relative_to(ROOT))
    tree = ast.parse(path.read_text())
    inside: dict[ast.AST, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            inside |= dict.fromkeys(ast.walk(node.exc), name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn"):
            inside |= dict.fromkeys(ast.walk(node), "warning")
    parts: set[ast.AST] = set()
    for node in ast.walk(tree):
        if node in parts:
            continue
        if isinstance(node, ast.JoinedStr):
            parts |= set(node.values)
            yield Message(normal(_template(node)), inside.get(node, ""), file)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield Message(normal(node.value), inside.get(node, ""), file)


def _template(node: ast.JoinedStr) -> str:
    return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)


def table() -> str:
    """Every message that is raised or warned with, file by file."""
    parts: list[str] = []
    for file in dict.fromkeys(m.file for m in messages()):
        rows = {
            f"| `{m.error}` | {_escaped(m.text)} |"
            for m in messages()
            if m.file == file and m.error and len(m.text) > MIN_TEXT
        }
        if rows:
            parts.append("\n".join([f"## {file}", "", "| raised as | message |", "| --- | --- |", *sorted(rows)]))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    # Not as code: long messages must wrap.
    return re.sub(r"([\\`*_{}\[\]<>|$&])", lambda m: f"&#{ord(m.group())};", text)
