"""One walk over the modules of a model that keeps those an anatomy is made of, and what is known on the way to them."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

Places = tuple[tuple[str, int], ...]
"""The layer lists on the way to a module, outermost first: (path of the list, number in it)."""


class Walked(NamedTuple):
    """A module where ``named_modules`` first meets it.

    Attributes:
        name: its dotted path, empty for the root.
        module: the module.
        owner: the innermost ``PreTrainedModel`` that it is or lies in, else the root.
        owner_path: that one's dotted path.
        places: its layer lists.
    """

    name: str
    module: nn.Module
    owner: nn.Module
    owner_path: str
    places: Places


class Walk:
    """Modules in the order and under the names of ``named_modules``.

    Attributes:
        sites: those that ask the attention interface for a function.
        attention: others that look like attention.
        lists: module lists by path.
    """

    def __init__(self, root: nn.Module) -> None:
        from transformers import PreTrainedModel

        self.sites: list[Walked] = []
        self.attention: list[Walked] = []
        self.lists: dict[str, nn.ModuleList | nn.Sequential] = {}
        self._pretrained = PreTrainedModel
        # Of a class: is it a site, does it look like attention, is it a list, is it an owner; and does any of it matter.
        self._kinds: dict[type, tuple[bool, bool, bool, bool, bool]] = {}
        self._seen: set[nn.Module] = {root}
        self._note(Walked("", root, root, "", ()), self._kind(type(root)))
        self._below(root, "", root, "", ())

    def _kind(self, cls: type) -> tuple[bool, bool, bool, bool, bool]:
        site, owner = dispatches(cls), issubclass(cls, self._pretrained)
        attention, series = _looks_like_attention(cls), issubclass(cls, nn.ModuleList | nn.Sequential)
        found = self._kinds[cls] = site, attention, series, owner, site or attention or series
        return found

    def _note(self, here: Walked, kind: tuple[bool, bool, bool, bool, bool]) -> None:
        site, attention, series, _, _ = kind
        if site:
            self.sites.append(here)
        elif attention:
            self.attention.append(here)
        if series:
            members: Any = here.module
            self.lists[here.name] = members

    def _below(self, module: nn.Module, prefix: str, owner: nn.Module, owner_path: str, places: Places) -> None:
        # Private, as in named_modules: what is registered, whatever the class makes of attribute access.
        members: dict[str, nn.Module | None] = module._modules  # pyright: ignore[reportPrivateUsage]
        for key, child in members.items():
            if child is None:
                continue
            kind = self._kinds.get(type(child)) or self._kind(type(child))
            inside: bool = bool(child._modules)  # pyright: ignore[reportPrivateUsage]
            if not (inside or kind[4]) or child in self._seen:
                continue
            self._seen.add(child)
            name = prefix + key
            here = (child, name) if kind[3] else (owner, owner_path)
            numbers = (*places, (prefix[:-1], int(key))) if key.isdigit() else places
            if kind[4]:
                self._note(Walked(name, child, *here, numbers), kind)
            if inside:
                self._below(child, f"{name}.", *here, numbers)

    def unreached(self) -> tuple[str, ...]:
        """Path and class of modules that look like attention and neither contain a site nor lie in one or in each other."""
        if not self.attention:
            return ()
        sites = {site.name for site in self.sites}
        around = {above for name in sites for above in _above(name)}
        missing: dict[str, str] = {}
        for name, sub, *_ in self.attention:
            if name not in around and not any(above in sites or above in missing for above in _above(name)):
                missing[name] = f"{name} ({type(sub).__name__})"
        return tuple(missing.values())


def _above(name: str) -> list[str]:
    """Paths of the modules around one, without the root."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _looks_like_attention(cls: type) -> bool:
    if issubclass(cls, nn.MultiheadAttention):
        return True
    name = cls.__name__
    return bool(re.search(r"Attention|SelfAttn", name)) and not re.search(r"Linear[A-Z]|Pool$", name)


@cache
def dispatches(cls: type) -> bool:
    """Does a method of ``cls`` itself ask the attention interface for a function?"""
    if not issubclass(cls, nn.Module) or cls.__module__.startswith("torch."):
        return False
    return any(_names_interface(inspect.unwrap(member)) for member in _methods(cls))


def _methods(cls: type) -> Iterable[Any]:
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "builtins")) or base.__name__ == "PreTrainedModel":
            continue
        yield from (member for member in vars(base).values() if isinstance(member, types.FunctionType))


def _names_interface(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    pending = [code] if code is not None else []
    while pending:
        current = pending.pop()
        if "ALL_ATTENTION_FUNCTIONS" in current.co_names:
            return True
        pending.extend(c for c in current.co_consts if isinstance(c, types.CodeType))
    return False


def every(root: nn.Module) -> list[nn.Module]:
    """As ``list(root.modules())``, without a generator for each level on the way."""
    found: dict[nn.Module, None] = {}
    pending = [root]
    while pending:
        module = pending.pop()
        if module not in found:
            found[module] = None
            parts: dict[str, nn.Module | None] = module._modules  # pyright: ignore[reportPrivateUsage]
            if parts:
                pending.extend([part for part in reversed(parts.values()) if part is not None])
    return list(found)


def having(root: nn.Module, name: str) -> list[Any]:
    """The modules of ``root`` that have an attribute; where few do, faster than asking each (a failed look-up is slow)."""
    found: list[Any] = []
    asked: dict[type, bool] = {}
    for module in every(root):
        cls = type(module)
        ask = asked.get(cls)
        if ask is None:
            usual = cls.__getattr__ is nn.Module.__getattr__ and cls.__getattribute__ is object.__getattribute__
            ask = asked[cls] = not usual or hasattr(cls, name)
        held = vars(module)
        if ask:
            there = hasattr(module, name)
        else:
            there = name in held or name in held["_buffers"] or name in held["_parameters"] or name in held["_modules"]
        if there:
            found.append(module)
    return found
