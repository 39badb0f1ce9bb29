"""Whether tensors inside frozen objects have been changed in place since they were looked at.

PyTorch counts the changes of a tensor, but not of one made in inference mode; of such a tensor the values are kept.
"""

from __future__ import annotations

import functools
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor

Seen = list[tuple[Tensor, int | Tensor]]
"""Tensors, each with its count of changes or (where it has none) with a copy of its values."""


def versions(*things: Any) -> Seen:
    """The tensors of dataclasses, as they are now."""
    return [(tensor, _stamp(tensor)) for thing in things for tensor in tensors(thing)]


def unchanged(seen: Seen) -> bool:
    """Whether all are as they were seen. A GPU must be waited for where a tensor was made in inference mode."""
    for tensor, stamp in seen:
        if isinstance(stamp, int):
            if tensor._version != stamp:
                return False
        elif not _same(tensor, stamp):
            return False
    return True


def _stamp(tensor: Tensor) -> int | Tensor:
    return tensor.detach().clone() if tensor.is_inference() else tensor._version


def _same(tensor: Tensor, copy: Tensor) -> bool:
    if tensor.device.type == "meta":
        return True
    # Nothing can be read while a CUDA graph is captured, which replays what was prepared now in any case.
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return torch.equal(tensor, copy)


def tensors(thing: Any) -> list[Tensor]:
    """The tensors in a dataclass or tuple, however deep."""
    found: list[Tensor] = []
    _collect(thing, found)
    return found


def _collect(thing: Any, found: list[Tensor]) -> None:
    if isinstance(thing, Tensor):
        found.append(thing)
    elif isinstance(thing, tuple):
        for part in cast(tuple[Any, ...], thing):
            if type(part) not in PLAIN:
                _collect(part, found)
    else:
        for name in _names(type(thing)):
            part = getattr(thing, name)
            if type(part) not in PLAIN:
                _collect(part, found)


PLAIN = frozenset((type(None), bool, int, float, str))
"""What holds no tensor, which most fields are. Every call of a new kind looks at all of them."""


@functools.lru_cache(maxsize=256)
def _names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind)) if is_dataclass(kind) else ()
