"""What an intervention sees: the run it is in (:class:`RunState`) and one attention call of it (:class:`SiteCall`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from interp.attention import Edit, Mask
from interp.models.anatomy import Anatomy, Site
from interp.models.layout import Layout, layout


@dataclass(eq=False)
class RunState:
    """One top-level forward or generate.

    Attributes:
        module: the ``PreTrainedModel`` that was called.
        anatomy: its sites.
        inputs: keyword arguments it was called with.
        generating: True inside ``generate``.
        tokenizer: for readable tokens, None where the session was given a bare model.
        prompt_length: length of the prompt in positions of the text stack (cached positions included); None before the
            first forward.
        past_length: positions already in the cache when the current forward began.
        forwards: number of forwards so far, the current one included.
        state: a dictionary for each intervention, new for every run.
        touched: by site, whether any intervention of the session may act there.
    """

    module: nn.Module
    anatomy: Anatomy
    inputs: dict[str, Any]
    generating: bool
    tokenizer: Any = None
    prompt_length: int | None = None
    past_length: int = 0
    forwards: int = 0
    layout_problem: str = ""
    state: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    touched: dict[str, bool] = field(default_factory=dict[str, bool])

    def of(self, intervention: Any) -> dict[str, Any]:
        """The dictionary of one intervention, for what it fixes at prefill and reuses in decode."""
        return self.state.setdefault(id(intervention), {})

    @cached_property
    def layouts(self) -> Mapping[str, Layout]:
        """Layout of each stack's prompt, empty where it could not be told (see ``layout_problem``)."""
        try:
            return layout(self.module, self.inputs, self.tokenizer)
        except Exception as error:
            # A layout is a convenience; a trace without one still holds every number.
            self.layout_problem = f"{type(error).__name__}: {error}"
            return {}


@dataclass(eq=False)
class SiteCall:
    """One call of one site; ``q``, ``k``, ``v`` may be replaced by an intervention's ``before``.

    Attributes:
        site: which one.
        run: the top-level call it belongs to.
        q: ``[B, H, Lq, D]``; k: ``[B, H_kv, Lk, D]``; v: ``[B, H_kv, Lk, Dv]``.
        mask: visibility, with absolute offsets.
        scale, softcap, sinks, bias: as the model passed them (see :func:`interp.attention.attend`).
        generated: the rows come after the prompt (one new position at a time, or drafts of assisted decoding).
    """

    site: Site
    run: RunState
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None
    generated: bool

    @property
    def phase(self) -> str:
        return "decode" if self.generated else "prefill"

    def query_positions(self) -> Tensor:
        """Absolute position of every row, int64 ``[Lq]``."""
        return torch.arange(self.q.shape[2], device=self.q.device) + self.mask.q_offset

    def heads(self, heads: list[int]) -> Tensor:
        """A bool tensor ``[1, H, 1]``, True at the given heads."""
        out = torch.zeros(1, self.site.n_heads, 1, dtype=torch.bool, device=self.q.device)
        out[:, heads] = True
        return out


class Intervention:
    """A policy that edits attention call by call. Subclass it and override what you need.

    The order in a call: ``before`` of every intervention (in the order of sessions and lists), the attention with all their
    edits, then ``after`` of every intervention.
    """

    def start(self, run: RunState) -> None:
        """Called once when a top-level forward or generate begins."""

    def prepare(self, anatomy: Anatomy) -> None:
        """Called when a session opens: check heads and scopes against the model, and raise early."""

    def acts_on(self, site: Site, run: RunState) -> bool:
        """Whether calls of this site may be changed in this run. A site that nothing touches costs next to nothing."""
        return True

    def before(self, call: SiteCall) -> Edit | None:
        """The edit of this call, or None. May replace ``call.q``, ``call.k``, ``call.v``."""
        return None

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        """A replacement of z ``[B, Lq, H, Dv]``, or None to leave it."""
        return None

    def describe(self) -> dict[str, Any]:
        """Name and settings, JSON-able, for the trace's attributes."""
        settings = {
            k: v if isinstance(v, str | int | float | bool | type(None)) else str(v) for k, v in vars(self).items()
        }
        return {"name": type(self).__name__, **settings}
