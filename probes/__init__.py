"""Tasks that elicit a behaviour, with their ground truth sample by sample.

:func:`probes` lists them. A probe is in the list by existing: a module of this package that defines a public dataclass with
``build(model)``. Its class variables say the rest: ``paper``, ``needs`` (among ``"tokenizer"``, ``"images"``, ``"model"``).
"""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any, NamedTuple

__all__ = ["ProbeInfo", "probe", "probes"]


class ProbeInfo(NamedTuple):
    """One entry of :func:`probes`.

    Attributes:
        name: of the class, for :func:`probe`.
        summary: one line.
        paper: reference with link; empty where there is none.
        needs: what the model must bring: ``"tokenizer"``, ``"images"`` (an image processor), ``"model"`` (not a tokenizer alone).
        judged: it has ``judge(sample, answer)``, so :func:`probes.gate.gate` takes it.
        settings: keyword arguments and their defaults; ``"required"`` where there is none.
        module: where it is defined.
    """

    name: str
    summary: str
    paper: str
    needs: tuple[str, ...]
    judged: bool
    settings: dict[str, Any]
    module: str


def probes() -> list[ProbeInfo]:
    """Every probe that there is, by name."""
    return [_describe(cls) for _, cls in sorted(_classes().items())]


def probe(name: str) -> type:
    """The class of one probe.

    Raises:
        ValueError: there is none of that name.
    """
    found = _classes()
    if name not in found:
        raise ValueError(f"name must be one of {sorted(found)}, got {name!r}")
    return found[name]


def _modules() -> list[str]:
    """Modules of this package and of the packages in it."""
    found = pkgutil.walk_packages(__path__, f"{__name__}.")
    return [entry.name for entry in found if not any(part.startswith("_") for part in entry.name.split("."))]


def _is_dataclass(cls: type) -> bool:
    # Apart from the scan: the library's annotation would make an instance of every class.
    return is_dataclass(cls)


def _classes() -> dict[str, type]:
    found: dict[str, type] = {}
    for module in map(import_module, _modules()):
        for name, value in vars(module).items():
            if not isinstance(value, type) or value.__module__ != module.__name__ or name.startswith("_"):
                continue
            # A form that several probes share is abstract.
            task = _is_dataclass(value) and callable(getattr(value, "build", None))
            if task and not inspect.isabstract(value):
                found[name] = value
    return found


def _describe(cls: Any) -> ProbeInfo:
    settings: dict[str, Any] = {}
    for field in fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.init:
            settings[field.name] = "required" if default is MISSING else default
    return ProbeInfo(
        name=cls.__name__,
        summary=inspect.cleandoc(cls.__doc__ or "").partition("\n")[0],
        paper=getattr(cls, "paper", ""),
        needs=tuple(getattr(cls, "needs", ())),
        judged=callable(getattr(cls, "judge", None)),
        settings=settings,
        module=cls.__module__,
    )
