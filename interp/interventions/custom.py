"""The escape hatch: any function of a call, or of z."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Edit, GivenRows
from interp.interventions.selection import heads_at, read_heads, resolve_heads
from interp.models.anatomy import Anatomy
from interp.tracing.calls import Intervention, SiteCall


@dataclass(frozen=True, eq=False)
class Custom(Intervention):
    """Change attention by functions of your own.

    >>> Custom(after=lambda site, z: z * 0.5, heads="L0H1").describe()["heads"]
    'L0H1'

    When not to use it: where a named method exists; a trace can only note the function's name.

    Args:
        before: ``before(call) -> Edit | None`` sees ``call.q``, ``call.k``, ``call.v`` (see
            :class:`~interp.tracing.calls.SiteCall`) and may replace them.
        after: ``after(call, z) -> z | None`` with z ``[batch, query, head, dim]``; ``call.site`` says where. None leaves z.
        heads: what :func:`interp.heads.as_heads` takes: the functions are called at sites with such a head only, and what
            they return acts on these heads only (what ``before`` does to ``call.q``, ``k``, ``v`` is not limited). None is all.

    Raises:
        TypeError: neither function given, one that cannot be called, or (in the model) a result of another type.
        HeadError: heads that cannot be read, or (on opening a session) that the model does not have.
    """

    before_function: Callable[[SiteCall], Edit | None] | None
    after_function: Callable[[SiteCall, Tensor], Tensor | None] | None
    heads: Any

    unit: ClassVar[str] = ""
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    needs: ClassVar[str] = "a function"

    def __init__(
        self,
        before: Callable[[SiteCall], Edit | None] | None = None,
        after: Callable[[SiteCall, Tensor], Tensor | None] | None = None,
        heads: Any = None,
    ) -> None:
        if before is None and after is None:
            raise TypeError("before or after must be given, got neither")
        for name, function in (("before", before), ("after", after)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, got {type(function).__name__}")
        object.__setattr__(self, "before_function", before)
        object.__setattr__(self, "after_function", after)
        object.__setattr__(self, "heads", None if heads is None else read_heads(heads))

    @classmethod
    def example(cls, model: Any, *, strength: Literal["on", "off"]) -> Custom:
        def after(call: SiteCall, z: Tensor) -> Tensor | None:
            # A factor for each head: a model that normalises after attention would undo a common one.
            return z * torch.linspace(0, 1, z.shape[2], device=z.device)[:, None] if strength == "on" else None

        return cls(after=after)

    def prepare(self, anatomy: Anatomy) -> None:
        if self.heads is not None:
            resolve_heads(self.heads, anatomy)

    def before(self, call: SiteCall) -> Edit | None:
        where = self._where(call)
        if self.before_function is None or where is None:
            return None
        edit = self.before_function(call)
        if edit is not None and not isinstance(edit, Edit):
            raise TypeError(f"before must return an interp.attention.Edit or None, got {type(edit).__name__}")
        return edit if edit is None or self.heads is None else _limited(edit, where)

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        where = self._where(call)
        if self.after_function is None or where is None:
            return None
        changed = self.after_function(call, z.clone() if self.heads is not None else z)
        if changed is None or (isinstance(changed, Tensor) and (self.heads is None or changed.shape != z.shape)):
            return changed
        if not isinstance(changed, Tensor):
            raise TypeError(f"after must return a tensor or None, got {type(changed).__name__}")
        return torch.where(where.transpose(1, 2).unsqueeze(-1), changed.to(z.dtype), z)

    def _where(self, call: SiteCall) -> Tensor | None:
        """Bool ``[1, H, 1]``; None where no head of the site is meant."""
        if self.heads is None:
            return call.heads(list(range(call.site.n_heads)))
        state = call.run.of(self)
        if "heads" not in state:
            state["heads"] = resolve_heads(self.heads, call.run.anatomy)
        mine = heads_at(call, state["heads"])
        return call.heads(mine) if mine else None

    def describe(self) -> dict[str, Any]:
        heads = None if self.heads is None else str(self.heads)
        return {
            "name": "Custom",
            "before": _name(self.before_function),
            "after": _name(self.after_function),
            "heads": heads,
        }


def _limited(edit: Edit, where: Tensor) -> Edit:
    """The same edit on the heads of ``where [1, H, 1]`` only."""
    operations: list[Any] = []
    for op in edit.operations:
        if isinstance(op, GivenRows):
            kept = where[0, :, 0].to(op.heads.device)[op.heads]
            operations.append(replace(op, heads=op.heads[kept], p=op.p[:, kept]))
        else:
            operations.append(replace(op, where=where if op.where is None else op.where & where))
    return replace(edit, operations=tuple(operations))


def _name(function: Any) -> str | None:
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
