"""A small world of pictures in which visual evidence and language prior are dials, with exact ground truth.

:class:`World` draws :class:`Scene` objects; :func:`picture` and :func:`draw` paint them; :mod:`probes.scenes.language` says
what is in them and asks about it. Importing this package imports torch only where pictures are drawn.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "World": "world", "Scene": "world", "Placed": "world", "SIZE": "world", "NAMES": "catalog", "PAIRS": "catalog",
    "SETTINGS": "catalog", "Pair": "catalog", "draw": "painting", "picture": "painting", "caption": "language",
    "question": "language", "prompt": "language", "DESCRIBE": "language", "surface_forms": "language",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
