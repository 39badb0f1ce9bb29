"""Headscope: trace, score and change the attention heads of transformers models.

``import interp`` is light: names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from interp._version import __version__

_HOMES = {
    "load": "interp.models.loading", "Model": "interp.models.model", "anatomy": "interp.models.anatomy",
    "hooked": "interp.tracing.session", "reset": "interp.tracing.session",
    "Capture": "interp.tracing.capture", "Trace": "interp.tracing.trace", "Intervention": "interp.tracing.calls",
    "Head": "interp.heads", "Heads": "interp.heads",
    "score": "interp.analysis", "scores": "interp.analysis",
    "interventions": "interp.interventions", "MaskHeads": "interp.interventions", "Custom": "interp.interventions",
    "VHR": "interp.interventions", "VAR": "interp.interventions", "PAI": "interp.interventions", "PAINT": "interp.interventions",
    "Knockout": "interp.interventions", "InterventionError": "interp.tracing.calls",
    "ScaleHeads": "interp.interventions", "Streaming": "interp.interventions", "Temperature": "interp.interventions",
    "TopKMask": "interp.interventions", "GateHeads": "interp.interventions", "PatchHeads": "interp.interventions",
    "AddToHeads": "interp.interventions",
    "from_activation_cache": "interp.tracing.transformer_lens", "to_activation_cache": "interp.tracing.transformer_lens",
    "heads_from_lens": "interp.scores_lens", "heads_to_lens": "interp.scores_lens",
    "scores_from_lens": "interp.scores_lens", "scores_to_lens": "interp.scores_lens",
    "check": "interp.checking",
}  # fmt: skip

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if name in ("interventions",) and not hasattr(home, name) else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
