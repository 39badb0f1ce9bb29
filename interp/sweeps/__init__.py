"""Sweeps: a score of every head over many prompts, here or on a cluster, that can be killed and goes on where it was.

>>> sweep("my-model", prompts, folder="out/sweep", kind="mean")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"sweep": "run", "collect": "run", "Plan": "plan", "Task": "plan", "SweepError": "plan", "Worker": "worker"}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
