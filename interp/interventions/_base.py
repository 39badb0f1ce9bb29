"""What the interventions on chosen heads share: heads, scope and rows, values per head, and edits kept from token to token."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from interp.attention import Gain
from interp.heads import Heads
from interp.interventions.selection import (
    heads_at,
    in_decoder,
    positions_in_sample,
    read_heads,
    real_rows,
    resolve_heads,
)
from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.model import unwrap
from interp.tracing.calls import NOTHING_LASTS, Intervention, Lasting, RunState, SiteCall

T = TypeVar("T")
Scope = Literal["all", "prefill", "decode", "next"]
Strength = Literal["on", "off"]
SCOPES = ("all", "prefill", "decode", "next")


@dataclass(frozen=True, eq=False)
class HeadPolicy(Intervention):
    """An intervention on chosen heads in chosen rows.

    Args:
        heads: what :func:`interp.heads.as_heads` takes. An empty set changes nothing: the tokens stay identical.
        scope: rows of the prompt (``prefill``), rows after it (``decode``), ``all``, or those whose output decides the next
            token (``next``: the last real row of the prompt and every row after). Encoder and vision rows are prefill.
        rows: absolute positions in the head's query sequence in place of a scope; pads count, negative ones from the
            prompt's end.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model does not have.
        ValueError: an unknown scope, rows with a scope, a scope that no chosen head can meet.
    """

    heads: Any
    _: KW_ONLY
    scope: Scope = "all"
    rows: Sequence[int] | None = None

    paper: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    needs: ClassVar[str] = ""
    scopes: ClassVar[tuple[str, ...]] = SCOPES

    def __post_init__(self) -> None:
        if self.scope not in self.scopes:
            raise ValueError(f"scope must be one of {self.scopes} (or give rows=), got {self.scope!r}")
        if self.rows is not None:
            if self.scope != "all":
                raise ValueError(f"rows must stand alone, got rows={self.rows!r} with scope={self.scope!r}")
            object.__setattr__(self, "rows", whole_numbers("rows", self.rows))
        object.__setattr__(self, "heads", self.read(self.heads))

    def read(self, heads: Any) -> Any:
        """Heads as far as they can be read without a model."""
        return read_heads(heads)

    def resolve(self, anatomy: Anatomy) -> Heads:
        """The heads on one model.

        Raises:
            HeadError: naming a head that the model does not have, and what it has.
        """
        return resolve_heads(self.heads, anatomy)

    def prepare(self, anatomy: Anatomy) -> None:
        for head in self.resolve(anatomy):
            site = anatomy.site(head.stack, head.layer)
            if self.scope not in ("all", "prefill") and not (site.stack == "text" or site.cross):
                raise ValueError(
                    f"scope must be 'all' or 'prefill' for a stack that never decodes, got {self.scope!r} with {head}"
                )

    def acts_on(self, site: Site, run: RunState) -> bool:
        return bool(self.heads_of(run).at(site.layer, site.stack))

    def heads_of(self, run: RunState) -> Heads:
        """The heads on the run's model."""
        state = run.of(self)
        if "heads" not in state:
            state["heads"] = self.resolve(run.anatomy)
        return state["heads"]

    def mine(self, call: SiteCall) -> tuple[int, ...]:
        """Chosen head numbers at the call's site, ascending."""
        return heads_at(call, self.heads_of(call.run))

    def where(self, call: SiteCall) -> Tensor | None:
        """Bool ``[B|1, H, Lq|1]``, or None where nothing of the call is meant; one object as long as it stays the same."""
        mine = self.mine(call)
        if not mine or self.scope not in ("all", "next", call.phase, "cached" if call.run.past_length else ""):
            return None
        key = (mine, call.site.n_heads, call.q.device)
        heads = self.kept(call, ("heads", *key), lambda: call.heads(mine))
        if self.scope == "next" and not call.generated:
            return self.kept(call, ("next", *key), lambda: heads & deciding_row(call)[:, None], lasting=False)
        inside = self.rows_inside(call)
        if inside is None:
            return heads
        start, count = call.mask.q_offset, call.q.shape[2]
        return (
            self.kept(call, ("rows", start, count, *inside, *key), lambda: heads & rows_mask(call, inside))
            if inside
            else None
        )

    def unvarying(self, call: SiteCall) -> Lasting | None:
        """``lasting`` of a policy whose ``before`` has one edit for all rows still to come."""
        if self.rows is not None or self.scope == "next":
            return None
        edit = self.before(call)
        if edit is None:
            return NOTHING_LASTS
        gains = edit.of(Gain)
        return Lasting(tuple(gains)) if len(gains) == len(edit.operations) else Lasting(template=edit)

    def rows_inside(self, call: SiteCall) -> list[int] | None:
        """Those of ``rows`` that the call has, counted from its first row; None where rows are not named."""
        if self.rows is None:
            return None
        start, count = call.mask.q_offset, call.q.shape[2]
        end = (call.run.prompt_length or 0) if in_decoder(call) else count
        return [r for r in ((row + end if row < 0 else row) - start for row in self.rows) if 0 <= r < count]

    def kept(
        self, call: SiteCall, key: Hashable, make: Callable[[], T], *, of: tuple[Any, ...] = (), lasting: bool = True
    ) -> T:
        """What was made for the same key and the same objects ``of`` in this run (or, unless lasting, in this forward).

        ``attend`` knows calls of one kind by the identity of their edit, so sites and tokens that are edited alike must
        be handed the same object.
        """
        state = call.run.of(self)
        if state.setdefault("forward", call.run.forwards) != call.run.forwards:
            state.update(forward=call.run.forwards, brief={})
        store: dict[Hashable, Any] = state.setdefault("lasting" if lasting else "brief", {})
        key = (key, *map(id, of))
        if key not in store:
            # The objects are held, so that their addresses stay theirs.
            store[key] = (of, make())
        return store[key][1]

    def describe(self) -> dict[str, Any]:
        settings = {f.name: _said(getattr(self, f.name)) for f in fields(self) if not f.name.startswith("_")}
        return {"name": type(self).__name__, **settings}


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """A tuple of ints.

    Raises:
        ValueError: anything else.
    """
    wrong = isinstance(values, str) or not isinstance(values, Sequence | Tensor)
    values = values.tolist() if isinstance(values, Tensor) else values
    if wrong or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{name} must be whole numbers, got {values!r}")
    return tuple(values)


def rows_mask(call: SiteCall, rows: Sequence[int]) -> Tensor:
    """Bool ``[Lq]``, True at rows of the call."""
    out = torch.zeros(call.q.shape[2], dtype=torch.bool, device=call.q.device)
    out[list(rows)] = True
    return out


def deciding_row(call: SiteCall) -> Tensor:
    """Bool ``[B|1, Lq]``: the last real row of the prompt, whose output decides the first new token."""
    rows = call.query_positions()
    last = (call.run.prompt_length or 0) - 1
    real = real_rows(call)
    if bool(real[:, -1].all()):
        # Drafts fed with the prompt decide tokens too.
        return (rows >= last)[None]
    # Padded on the right: each sample's own last real row.
    places = torch.arange(len(rows), device=rows.device)
    return places == torch.where(real, places, -1).amax(-1, keepdim=True)


def expanded(values: Tensor, batch: int, what: str) -> Tensor:
    """Values by sample ``[S, ...]`` for the rows of a call's batch: beams and returned sequences repeat each sample.

    Raises:
        ValueError: the batch is no multiple of S.
    """
    if values.shape[0] in (1, batch):
        return values
    if batch % values.shape[0]:
        raise ValueError(
            f"{what} must be for 1 sample, or for each of the batch's; got {values.shape[0]} for a batch of {batch}"
        )
    return values.repeat_interleave(batch // values.shape[0], 0)


class HeadValues:
    """A number for each head, and if wanted for each sample and position.

    Args:
        name: of the argument, for errors.
        value: a number, ``[n]`` (one for each of ``heads``, in their order), ``[S|1, n|1]`` (by sample) or ``[S|1, n|1, P]``
            (by position counted from the sample's first real token, ``neutral`` from P on).
        neutral: the value that changes nothing.
        least: values must be larger.

    Raises:
        ValueError: of another shape, not finite, or too small.
    """

    def __init__(self, name: str, value: Any, neutral: float, least: float | None = None) -> None:
        self.name, self.neutral = name, neutral
        table = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float32)
        if table.ndim > 3 or not table.numel() or table.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise ValueError(
                f"{name} must be a number, [head], [sample, head] or [sample, head, position], got shape {tuple(table.shape)}"
            )
        seen = table.detach()
        if not bool(torch.isfinite(seen).all()) or (least is not None and not bool((seen > least).all())):
            rule = "finite" if least is None else f"finite and > {least:g}"
            raise ValueError(f"{name} must be {rule}, got values {float(seen.min())} .. {float(seen.max())}")
        self.differentiable = table.requires_grad
        self.is_neutral = not self.differentiable and bool((seen == neutral).all())
        self.number = float(seen) if table.ndim == 0 and not self.differentiable else None
        self.by_position = table.ndim == 3
        table = table.float()
        # [S, n, P]
        self.table = (
            table.reshape(1, 1, 1)
            if table.ndim == 0
            else table[None, :, None]
            if table.ndim == 1
            else table[..., None]
            if table.ndim == 2
            else table
        )

    def check(self, heads: Heads) -> None:
        """Raise ValueError unless there is one value, or one for each head."""
        if self.table.shape[1] not in (1, len(heads)):
            raise ValueError(
                f"{self.name} must have one value or {len(heads)}, one for each of heads; got {self.table.shape[1]}"
            )

    def at(self, call: SiteCall, heads: Heads) -> Tensor:
        """``[S|B|1, H, Lq|1]``, neutral at other heads."""
        device, n_heads = call.q.device, call.site.n_heads
        table = expanded(self.table.to(device), call.q.shape[0], self.name)
        if self.by_position:
            positions = positions_in_sample(call)
            batch = max(table.shape[0], positions.shape[0])
            inside = (positions >= 0) & (positions < table.shape[2])
            index = positions.clamp(0, table.shape[2] - 1)[:, None].expand(batch, table.shape[1], -1)
            table = torch.where(inside[:, None], table.expand(batch, -1, -1).gather(2, index), self.neutral)
        mine = [(n, h.head) for n, h in enumerate(heads) if (h.stack, h.layer) == (call.site.stack, call.site.layer)]
        out = torch.full((table.shape[0], n_heads, table.shape[2]), self.neutral, dtype=table.dtype, device=device)
        taken = table if table.shape[1] == 1 else table[:, [n for n, _ in mine]]
        places = torch.tensor([h for _, h in mine], device=device)
        return out.index_copy(1, places, taken.expand(-1, len(mine), -1).contiguous())

    def key(self, call: SiteCall, heads: Heads) -> tuple[Any, ...]:
        """Sites of the same key have the same values (unless they vary by position)."""
        alike = self.table.shape[1] == 1
        names = heads_at(call, heads) if alike else (call.site.stack, call.site.layer)
        return (names, call.site.n_heads, call.q.shape[0], call.q.device)


def every_head(model: Any, *, cross: bool = True) -> Heads:
    """All heads of a model, for examples; ``cross=False`` leaves out cross attention."""
    shape = anatomy(unwrap(model))
    stacks = [stack for stack, sites in shape.stacks.items() if cross or not sites[0].cross]
    return resolve_heads(",".join(f"{stack}.L*H*" for stack in stacks), shape)


def _said(value: Any) -> Any:
    """A setting as JSON can hold it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Heads):
        return str(value)
    described = getattr(value, "describe", None)
    if callable(described):
        return described()
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 64 else f"tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(k): _said(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [_said(v) for v in value]
    shape = getattr(value, "shape", None)
    return str(value) if shape is None else f"array {tuple(shape)}"
