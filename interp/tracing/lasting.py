"""Sites whose interventions have said what they do to every row still to be generated (:class:`~interp.tracing.calls.Lasting`).

A token's forward is bound by the host, and asking every intervention at every call costs a layer a tenth of its time. What
is settled for a site is called in the place of all that: the model's own function and the gains on what it gives, or the
attention op, whose way through a step's first layer the later ones take again.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from interp.attention import Edit, Gain, attend
from interp.attention.api import kind_of
from interp.attention.kinds import Longer, Short
from interp.tracing import dispatch
from interp.tracing.calls import Grouping, Intervention, RunState, SiteCall
from interp.tracing.gains import scaled
from interp.tracing.masks import LazyMask

Options = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Own:
    """The model's own function, and gains on what it gives.

    Attributes:
        batch: of the calls, where gains may be by sample.
        used: the site's entry in ``Session.report``.
    """

    function: dispatch.Handler
    gains: tuple[Gain, ...]
    used: dict[str, int]
    batch: int | None = None

    def fits(self, query: Tensor, key: Tensor, mask: Any) -> bool:
        """Whether a call with one query row is one of those that were spoken of; the others must be looked at."""
        return self.batch is None or self.batch == query.shape[0]

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Options
    ) -> tuple[Tensor, Any]:
        """z ``[B, 1, H, Dv]`` and the second result of the model's function."""
        native = mask.native() if isinstance(mask, LazyMask) else mask
        z, second = self.function(module, query, key, value, native, **options)
        if not self.gains:
            self.used["untouched"] = self.used.get("untouched", 0) + 1
            return z, second
        for gain in self.gains:
            z = scaled(z, gain)
        self.used["gain"] = self.used.get("gain", 0) + 1
        return z.contiguous(), None


@dataclass(eq=False)
class Step:
    """The way of the op that a token's first layer has found, for the layers after it whose operands are of the same kind.

    ``longer`` makes the next token's of it: inside ``generate`` a mask that hides nothing of ``cache`` does not begin to. (Guidance
    runs a second branch there, on a cache and with masks of its own.)
    """

    mask: LazyMask | None = None
    cache: Any = None
    layout: tuple[Any, ...] = ()
    short: Short | None = None
    longer: Longer | None = None
    how: str = ""


@dataclass(frozen=True, eq=False)
class Edited:
    """The attention op with one edit, with a site's own key groups where it has any, and gains on what it gives.

    Gains stay apart from the edit, which many sites share: each with its own they would go ways of their own.

    Attributes:
        step: shared by the sites of a run that have the same template, dtype and device.
        run: what they belong to.
        used: the site's entry in ``Session.report``.
    """

    batch: int
    device: torch.device
    dtype: torch.dtype
    scale: float
    gains: tuple[Gain, ...]
    template: Edit
    groups: Grouping | None
    backend: str
    step: Step
    run: weakref.ref[RunState]
    used: dict[str, int] = field(repr=False)

    def fits(self, query: Tensor, key: Tensor, mask: Any) -> bool:
        """Whether a call with one query row is one of those that were spoken of; the others must be looked at."""
        same = query.shape[0] == self.batch and query.device == self.device and query.dtype == self.dtype
        return same and isinstance(mask, LazyMask) and mask.n_keys == key.shape[2]

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Options
    ) -> tuple[Tensor, Any]:
        """z ``[B, 1, H, Dv]``, and None."""
        lazy, step, groups = cast(LazyMask, mask), self.step, None
        if self.groups is not None:
            groups = self.groups.at(self.batch, lazy.kv_offset, key.shape[2], self.device)
        if (
            step.short is not None
            and step.mask is lazy
            and step.layout == _layout(self.scale, query, key, value, groups)
        ):
            z = step.short(query, key, value, None, None, groups)
        else:
            z = self._first(lazy, query, key, value, groups)
        self.used[step.how] = self.used.get(step.how, 0) + 1
        for gain in self.gains:
            z = scaled(z, gain)
        return z.contiguous(), None

    def _first(self, lazy: LazyMask, query: Tensor, key: Tensor, value: Tensor, groups: Tensor | None) -> Tensor:
        step = self.step
        if (short := self._grown(lazy, query, key, value, groups)) is not None:
            step.mask, step.short, step.layout = lazy, short, _layout(self.scale, query, key, value, groups)
            return short(query, key, value, None, None, groups)
        seen, edit = lazy.describe(), self.template
        if self.groups is not None:
            edit = self.groups.edit_at(self.batch, seen.kv_offset, key.shape[2], self.device, edit)
        out = attend(query, key, value, scale=self.scale, mask=seen, edit=edit, backend=self.backend)
        kind = kind_of(query, key, value, scale=self.scale, mask=seen, edit=edit, backend=self.backend)
        step.mask, step.how = lazy, f"edited by {out.readings.backend}"
        step.short = None if kind is None else kind.short
        run = self.run()
        whole = seen.padding is None and seen.window is None and seen.rule is None
        cache = run.cache if run is not None and run.generating and whole else None
        step.longer, step.cache = (kind.longer, cache) if kind is not None and cache is not None else (None, None)
        step.layout = () if kind is None else _layout(self.scale, query, key, value, groups)
        return cast(Tensor, out.output)

    def _grown(self, lazy: LazyMask, q: Tensor, k: Tensor, v: Tensor, groups: Tensor | None) -> Short | None:
        """The way of a token more than the last, where nothing but the length of the cache can be new."""
        step, last, run = self.step, self.step.mask, self.run()
        if step.longer is None or run is None or run.cache is not step.cache or last is None or not lazy.follows(last):
            return None
        fixed, (k_before, _, v_before, _) = step.layout
        sizes = (k.shape[:2], k.shape[3], v.shape[:2], v.shape[3], k.shape[2])
        same = sizes == (k_before[:2], k_before[3], v_before[:2], v_before[3], v.shape[2])
        return step.longer(k, v, groups) if same and fixed == _layout(self.scale, q, k, v, groups)[0] else None


def _layout(scale: float, q: Tensor, k: Tensor, v: Tensor, groups: Tensor | None) -> tuple[Any, ...]:
    """What must be the same for a layer to take the way of the one before, beside the dtype and device of q.

    What does not change as the cache grows, and what does.
    """
    of_groups = None if groups is None else (groups.stride(), groups.dtype)
    fixed = (scale, q.shape, q.stride(), k.dtype, v.dtype, torch.is_grad_enabled(), of_groups)
    return fixed, (k.shape, k.stride(), v.shape, v.stride())


Settled = Own | Edited


def settle(
    call: SiteCall, interventions: Sequence[Intervention], backend: str, module: nn.Module, used: dict[str, int]
) -> Settled | None:
    """What all interventions of a session will do at this call's site, None where one of them must be asked again."""
    gains: list[Gain] = []
    template, groups = None, None
    for intervention in interventions:
        if not intervention.acts_on(call.site, call.run):
            continue
        said = intervention.lasting(call)
        if said is None or (said.template is not None and template is not None):
            return None
        gains += said.gains
        if said.template is not None:
            template, groups = said.template, said.groups
    if template is None:
        return Own(dispatch.original(module), tuple(gains), used, call.q.shape[0] if gains else None)
    plain = call.softcap is None and call.sinks is None and call.bias is None and call.mask.dense is None
    if not plain or call.site.cross:
        return None  # what such a call needs beside q, k, v and the mask is worked out at every call
    device, dtype = call.q.device, call.q.dtype
    step = call.run.steps.setdefault((id(template), device, dtype), Step())
    return Edited(
        call.q.shape[0],
        device,
        dtype,
        call.scale,
        tuple(gains),
        template,
        groups,
        backend,
        step,
        weakref.ref(call.run),
        used,
    )
