"""Whether tensors inside frozen objects have been changed in place since they were looked at.

PyTorch counts the changes of a tensor, but not of one made in inference mode; of such a tensor the values are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

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
