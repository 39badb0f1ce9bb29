"""Calls of one kind: the same mask, edit and readout on operands of the same shapes, as every layer of a model makes them.

Checking the arguments, choosing a backend and preparing its launches is done once a kind. Kinds are told apart by the identity
of the mask, edit and readout objects (which are frozen) and by the versions of the tensors in them, so that a tensor changed
in place is looked at again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from interp.attention.backends import Backend
from interp.attention.edits import Edit
from interp.attention.mask import Mask
from interp.attention.readouts import Readings, Readout
from interp.attention.versions import Seen, unchanged

KEPT = 64
"""Kinds remembered; a forward of a large vision-language model makes about ten."""


Short = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""z ``[B, Lq, H, Dv]`` from q, k, v, sinks, bias and the edit's key groups where they differ from those of the kind; they may go
on after the last key."""
SHORT = "short"
"""Where a backend leaves, in the memo of a kind that nobody reads or differentiates, a shorter way for calls after the first."""
Longer = Callable[[Tensor, Tensor, Tensor | None], Short | None]
"""Of k, v and the edit's groups the short way of a call on a cache that has grown, all of which its one row sees; or None."""
LONGER = "longer"
"""Where it leaves such a function."""
Read = Callable[[Tensor, Tensor, Tensor, Tensor], Readings]
"""The readings from q, k, v and the log-sum-exp."""
READ = "read"
"""Where it leaves a shorter way for calls after the first that nobody edits, whose softmax is known and whose output nobody wants."""


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
    def longer(self) -> Longer | None:
        """What makes the short way of calls on a cache that has grown where the backend has left it."""
        return self.memo.get(LONGER)

    def of_length(self, k: Tensor, v: Tensor, mask: Mask, edit: Edit, readout: Readout) -> Kind | None:
        """The kind of calls that differ from those of this one in the length of the cache alone, where the backend can tell."""
        longer = self.longer
        short = None if longer is None else longer(k, v, edit.groups)
        if short is None:
            return None
        memo = {SHORT: short, LONGER: longer}
        return replace(self, holds=(mask, edit, readout), mask=mask, edit=edit, memo=memo)

    @property
    def read(self) -> Read | None:
        """The way of later calls that give readings alone, where the backend has left one."""
        return self.memo.get(READ)

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


def growing(mask: Mask, edit: Edit, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Any, ...] | None:
    """What calls share that differ in the length of the cache alone, one query row of which sees all of it; else None."""
    whole = mask.padding is None and mask.window is None and mask.dense is None and mask.rule is None
    if not whole or q.shape[2] != 1 or (mask.causal and mask.q_offset - mask.kv_offset != k.shape[2] - 1):
        return None
    # What the checks of a first call would find is left to it.
    if v.shape[:3] != k.shape[:3] or k.device != q.device or v.device != q.device:
        return None
    held, groups, of_groups = edit, edit.groups, None
    if edit.family is not None and groups is not None:
        if groups.shape[-1] != k.shape[2] or groups.device != q.device:
            return None
        held, of_groups = edit.family, (groups.shape[:-1], groups.dtype)
    elif groups is not None:
        return None
    return (
        "growing", id(held), of_groups, shape_of(q), k.shape[:2], k.shape[3], v.shape[3], k.dtype, v.dtype, mask.cross, *others,
    )  # fmt: skip


def shape_of(tensor: Tensor | None) -> Any:
    """What of an operand belongs to the key."""
    if tensor is None:
        return None
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
