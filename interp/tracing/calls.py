"""What an intervention sees: the run it is in (:class:`RunState`) and one attention call of it (:class:`SiteCall`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interp.attention import Edit, Gain, Mask
from interp.models.anatomy import Anatomy, Site
from interp.models.layout import Layout, layout


class InterventionError(ValueError):
    """A policy that cannot act: on this model, on these inputs, or beside another one. Raised before the first token."""


class Grouping(Protocol):
    """Key groups of one site that hand out an edit for any length of the sequence.

    ``at`` gives groups of the keys from ``start`` on, ``n_keys`` of them or more: int8 ``[B, n]``.
    """

    def at(self, batch: int, start: int, n_keys: int, device: torch.device) -> Tensor: ...
    def edit_at(self, batch: int, start: int, n_keys: int, device: torch.device, template: Edit) -> Edit: ...


@dataclass(frozen=True, eq=False)
class Lasting:
    """All that an intervention does at one site to every generated row still to come in a run.

    Attributes:
        gains: on z, in order.
        template: an edit, as it is or with the key groups that ``groups`` gives for the length reached; None for gains alone.
    """

    gains: tuple[Gain, ...] = ()
    template: Edit | None = None
    groups: Grouping | None = None


NOTHING_LASTS = Lasting()

_kept: WeakKeyDictionary[Any, dict[int, tuple[Any, dict[str, Any]]]] = WeakKeyDictionary()


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
        lasting: by site, what its interventions said of all rows still to be generated; None where they must be asked.
        steps: what sites share in a token's forward, see :class:`interp.tracing.lasting.Step`.
        root: the session's model, which holds ``module``.
        cache: the KV cache of the current forward, None where none was given.
        given_prompt_length: the prompt ends there and what follows is a given answer (see ``Session.prompt_length``).
        extra_forwards: forwards of their own that interventions made for this run.
        at_end: called when the run ends, also by an exception.
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
    lasting: dict[str, Any] = field(default_factory=dict[str, Any])
    steps: dict[Any, Any] = field(default_factory=dict[Any, Any])
    root: nn.Module | None = None
    cache: Any = None
    given_prompt_length: int | None = None
    extra_forwards: int = 0
    at_end: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])

    def of(self, intervention: Any) -> dict[str, Any]:
        """The dictionary of one intervention, for what it fixes at prefill and reuses in decode."""
        return self.state.setdefault(id(intervention), {})

    def earlier(self, intervention: Any) -> dict[str, Any]:
        """What it kept in the last run that filled this run's KV cache (an earlier turn, the prompt before an answer).

        Empty where the cache is new, or was filled outside the session.
        """
        return self._kept().get(id(intervention), (None, {}))[1]

    @property
    def cached_length(self) -> int:
        """Positions in the run's KV cache."""
        length: Any = getattr(self.cache, "get_seq_length", None)
        return int(length()) if length is not None else 0

    def _kept(self) -> dict[int, tuple[Any, dict[str, Any]]]:
        try:
            return _kept.get(self.cache, {}) if self.cached_length else {}
        except TypeError:  # a cache of plain tuples takes no weak reference
            return {}

    def keep(self, interventions: Sequence[Any], cache: Any = None) -> None:
        """Remember the interventions' dictionaries for as long as the KV cache lives, for the next run on it."""
        cache = self.cache if cache is None else cache
        held = {id(i): (i, self.state[id(i)]) for i in interventions if self.state.get(id(i))}
        try:
            if cache is not None and held:
                _kept.setdefault(cache, {}).update(held)
        except TypeError:
            pass

    def close(self) -> None:
        """The run has ended: undo what interventions set up for it."""
        while self.at_end:
            self.at_end.pop()()

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
        edits: what interventions before this one in the order gave for this call.
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
    edits: list[Edit | None] = field(default_factory=list[Edit | None])

    @property
    def phase(self) -> str:
        return "decode" if self.generated else "prefill"

    def query_positions(self) -> Tensor:
        """Absolute position of every row, int64 ``[Lq]``."""
        return torch.arange(self.q.shape[2], device=self.q.device) + self.mask.q_offset

    def heads(self, heads: Sequence[int]) -> Tensor:
        """A bool tensor ``[1, H, 1]``, True at the given heads."""
        out = torch.zeros(1, self.site.n_heads, 1, dtype=torch.bool, device=self.q.device)
        out[:, list(heads)] = True
        return out


class Intervention:
    """A policy that edits attention call by call. Subclass it and override what you need.

    The order in a call: ``before`` of every intervention (in the order of sessions and lists), the attention with all their
    edits, then ``after`` of every intervention.

    ``extra_passes`` says in words what it runs beside the model's own forwards.
    """

    extra_passes: ClassVar[str] = "none"

    def start(self, run: RunState) -> None:
        """Called once when a top-level forward or generate begins; its inputs are known.

        What must be undone when the run ends goes into ``run.at_end``.

        Raises:
            InterventionError: it cannot act on this model or these inputs.
        """

    def logits_processors(self, run: RunState) -> list[Any]:
        """Processors that ``generate`` applies to the scores, after those of its caller; asked for after ``start``."""
        return []

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

    def lasting(self, call: SiteCall) -> Lasting | None:
        """What it does at the call's site to every row still to be generated in this run, asked once it has generated one.

        None, the default, has ``before`` and ``after`` asked at every token. A policy that will not change its mind saves most
        of what a token costs the host by saying so.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """Name and settings, JSON-able, for the trace's attributes."""
        settings = {
            k: v if isinstance(v, str | int | float | bool | type(None)) else str(v) for k, v in vars(self).items()
        }
        return {"name": type(self).__name__, **settings}
