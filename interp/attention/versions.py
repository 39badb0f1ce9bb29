"""Whether tensors inside frozen objects have been changed in place since they were looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def versions(*things: Any) -> list[tuple[Tensor, int]]:
    """Tensors of dataclasses with their versions; one made in inference mode has none, and cannot be changed outside it."""
    return [(tensor, tensor._version) for thing in things for tensor in tensors(thing) if not tensor.is_inference()]


def tensors(thing: Any) -> Iterator[Tensor]:
    """The tensors in a dataclass or tuple, however deep."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, tuple):
        for part in thing:
            yield from tensors(part)
    elif is_dataclass(thing) and not isinstance(thing, type):
        for f in fields(thing):
            yield from tensors(getattr(thing, f.name))
