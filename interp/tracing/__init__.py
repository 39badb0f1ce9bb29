"""Sessions on models: captures that become traces, and interventions."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Capture": "capture", "CaptureError": "capture", "CaptureTooLargeError": "capture",
    "Intervention": "calls", "Lasting": "calls", "RunState": "calls", "SiteCall": "calls",
    "Session": "session", "SessionError": "installation", "hooked": "session", "reset": "session",
    "Trace": "trace",
}  # fmt: skip

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
