"""Calls of one kind: the same mask, edit and readout on operands of the same shapes, as every layer of a model makes them.

Checking the arguments, choosing a backend and preparing its launches is done once a kind. Kinds are told apart by the identity
of the mask, edit and readout objects (which are frozen) and by the versions of the tensors in them, so that a tensor changed
in place is looked at again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from interp.attention.backends import Backend
from interp.attention.edits import Edit
from interp.attention.mask import Mask
from interp.attention.readouts import Readout
from interp.attention.versions import Seen, unchanged

KEPT = 64
"""Kinds remembered; a forward of a large vision-language model makes about ten."""


Short = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""z ``[B, Lq, H, Dv]`` from q, k, v, sinks, bias and the edit's key groups where they differ from those of the kind."""
SHORT = "short"
"""Where a backend leaves, in the memo of a kind that nobody reads or differentiates, a shorter way for calls after the first."""


@dataclass(eq=False)
class Kind:
    """What calls of one kind share.

    Attributes:
        holds: the objects whose identity is part of the key: while they are held, no other object has their address.
        versions: tensors inside them, as they were when they were checked.
    """

    holds: tuple[Any, ...]
    mask: Mask
    edit: Edit
    pooled_edge: int
    backend_name: str
    backend: Backend
    versions: Seen
    readout: Readout
    memo: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def short(self) -> Short | None:
        """The way of later calls where the backend has left one."""
        return self.memo.get(SHORT)

    @property
    def current(self) -> bool:
        return unchanged(self.versions)


_kinds: OrderedDict[tuple[Any, ...], Kind] = OrderedDict()
_lock = threading.Lock()
"""Held while kinds are added or let go; looking one up is a single step of the interpreter."""


def known(key: tuple[Any, ...]) -> Kind | None:
    """The kind of that key, unless a tensor of it has changed since."""
    kind = _kinds.get(key)
    return kind if kind is not None and kind.current else None


KEPT_BYTES = 4 << 20
"""A kind whose mask, edit and readout hold more than this is not kept: a dense mask of every layer would fill the memory."""


def remember(key: tuple[Any, ...], kind: Kind) -> None:
    """Keep a kind, unless its tensors are large."""
    if sum(tensor.nbytes for tensor, _ in kind.versions) > KEPT_BYTES:
        return
    with _lock:
        _kinds[key] = kind
        while len(_kinds) > KEPT:
            _kinds.popitem(last=False)


def forget(*holds: Any) -> None:
    """Let go of the kinds with these objects, which nobody will name again."""
    with _lock:
        for key in [
            key for key, kind in _kinds.items() if any(held is thing for held in kind.holds for thing in holds)
        ]:
            del _kinds[key]


def clear() -> None:
    """Let go of all kinds: each is prepared anew when it next comes."""
    with _lock:
        _kinds.clear()


def shape_of(tensor: Tensor | None) -> Any:
    """What of an operand belongs to the key."""
    if tensor is None:
        return None
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
