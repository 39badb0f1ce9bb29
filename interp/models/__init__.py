"""Models: loading them, their attention sites (``anatomy``), and what their positions are (``layout``).

Names are resolved on first use, so that importing this package does not import transformers' modelling code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.models.errors import LoadError, ModelInputError
    from interp.models.loading import load
    from interp.models.model import Model, unwrap

__all__ = ["LoadError", "Model", "ModelInputError", "load", "unwrap"]

_HOMES = {"LoadError": "errors", "ModelInputError": "errors", "load": "loading", "Model": "model", "unwrap": "model"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
