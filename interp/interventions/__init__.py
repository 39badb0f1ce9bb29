"""Policies that change attention while a model runs: one paper's method a file, each an ``interp.tracing`` intervention.

In a call the order is fixed by kind, whatever the order of the list: first q, k and v are replaced and edits made, in the
order of sessions and lists (each sees what those before it left); the op then applies all edits stage by stage (temperature,
boost, restrictions such as :class:`Streaming` and :class:`TopKMask`, uniform and given rows, group weights, gains); last z is
replaced or added to, in the order of the list. So a head whose z is patched, or has the mean put in its place, keeps that
whatever gain or mask it was given too, and :class:`AddToHeads` adds to what it finds.

``interp.interventions()`` lists them. A method is in the list by existing: a module of this package that defines a public
subclass of :class:`~interp.tracing.calls.Intervention`.
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_NAMES = {
    "MaskHeads": "mask_heads", "HeadMeans": "head_means", "HeadActivations": "activations", "NormScales": "norm_scales",
    "ScaleHeads": "scale_heads", "Streaming": "streaming", "Temperature": "temperature", "TopKMask": "top_k_mask",
    "SinkRecent": "patterns", "Spans": "patterns", "Shards": "patterns", "Near": "patterns", "KVGates": "streaming",
    "GateHeads": "gate_heads", "PatchHeads": "patch_heads", "AddToHeads": "add_to_heads", "Custom": "custom",
    "VHR": "vhr", "VAR": "var", "PAI": "pai", "PAINT": "paint", "Knockout": "knockout",
}  # fmt: skip


def _modules() -> list[str]:
    return [entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.startswith("_")]


def _classes() -> dict[str, type]:
    """Every public intervention of the package, by name."""
    from interp.tracing.calls import Intervention

    found: dict[str, type] = {}
    for module in (import_module(f"{__name__}.{name}") for name in _modules()):
        for name, value in vars(module).items():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, Intervention) and not name.startswith("_"):
                found[name] = value
    return dict(sorted(found.items()))


def _settings(cls: type) -> dict[str, Any]:
    """Parameters of the constructor and their defaults; ``"required"`` where there is none."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: "required" if p.default is p.empty else p.default for p in parameters}


def _describe(cls: type) -> dict[str, Any]:
    summary = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
    return {
        "name": cls.__name__,
        "summary": summary,
        "paper": getattr(cls, "paper", ""),
        "unit": getattr(cls, "unit", ""),
        "settings": _settings(cls),
        "stacks": getattr(cls, "stacks", ()),
        "needs": getattr(cls, "needs", ""),
    }


class _Package(ModuleType):
    """A package that can be called: importing it binds it to ``interp.interventions``, which users call to list methods."""

    def __call__(self) -> list[dict[str, Any]]:
        """All interventions, by name.

        Returns:
            One dictionary each: ``name``, ``summary`` (one line), ``paper``, ``unit``, ``settings`` (parameter to default),
            ``stacks`` (names, or ``("any",)``) and ``needs`` (what it must be given besides a model).
        """
        return [_describe(cls) for cls in _classes().values()]


interventions: Any = sys.modules[__name__]
interventions.__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    if not name.startswith("_"):
        # A file of one method is named after its class: vhr.py for VHR, spin.py for SPIN.
        for module in _modules():
            if module.replace("_", "") == name.lower():
                found = getattr(import_module(f"{__name__}.{module}"), name, None)
                if found is not None:
                    return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_modules()})
