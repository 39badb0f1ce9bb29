"""Sites whose interventions have said what they do to every row still to be generated (:class:`~interp.tracing.calls.Lasting`).

A token's forward is bound by the host, and asking every intervention at every call costs a layer a tenth of its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from interp.attention import Edit, Gain, attend, combine
from interp.tracing import dispatch
from interp.tracing.calls import Grouping, Intervention, SiteCall
from interp.tracing.gains import scaled
from interp.tracing.masks import LazyMask


@dataclass(frozen=True, eq=False)
class Settled:
    """What is done to each generated row of a site, by all interventions of a session together."""

    batch: int
    device: torch.device
    scale: float
    gains: tuple[Gain, ...]
    template: Edit | None
    groups: Grouping | None
    backend: str

    def fits(self, query: Tensor, key: Tensor, mask: Any) -> bool:
        """Whether a call is one of those that were spoken of; the others must be looked at."""
        same = query.shape[0] == self.batch and query.device == self.device
        return same and (self.template is None or (isinstance(mask, LazyMask) and mask.n_keys == key.shape[2]))

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> tuple[Tensor, Any, str]:
        """z ``[B, 1, H, Dv]``, the second result of the model's function, and how it was made (see ``Session.report``)."""
        if self.template is None:
            z, second = dispatch.call_original(module, query, key, value, mask, **options)
            how = "gain" if self.gains else "untouched"
        else:
            seen = cast(LazyMask, mask).describe()
            edit = self.template
            if self.groups is not None:
                edit = self.groups.edit_at(self.batch, seen.kv_offset, key.shape[2], query.device, edit)
            out = attend(query, key, value, scale=self.scale, mask=seen, edit=edit, backend=self.backend)
            z, second, how = cast(Tensor, out.output), None, f"edited by {out.readings.backend}"
        for gain in self.gains:
            z, second = scaled(z, gain), None
        return z.contiguous(), second, how


def settle(call: SiteCall, interventions: Sequence[Intervention], backend: str) -> Settled | None:
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
    if template is not None:
        plain = call.softcap is None and call.sinks is None and call.bias is None and call.mask.dense is None
        if not plain or call.site.cross:
            return None  # what such a call needs beside q, k, v and the mask is worked out at every call
        # The kernel applies gains, too, and rounds once.
        now = template
        if groups is not None:
            now = groups.edit_at(call.q.shape[0], call.mask.kv_offset, call.k.shape[2], call.q.device, template)
        together = combine(now, Edit(tuple(gains)))
        template, gains = together if together is None or groups is None else together.family, []
    return Settled(call.q.shape[0], call.q.device, call.scale, tuple(gains), template, groups, backend)
