"""What others' tools read, made from our traces and models; none of these tools is imported.

>>> head_view(**bertviz_inputs(run.trace))  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "PruneError": "prune_plan", "Pruned": "prune", "prune_heads": "prune",
    "ExportError": "maps", "bertviz_inputs": "bertviz", "circuitsvis_inputs": "circuitsvis", "write_headvis": "headvis",
}  # fmt: skip

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
