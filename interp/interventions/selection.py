"""Which heads and rows of a call an intervention acts on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.heads import Heads, as_heads
from interp.models.anatomy import Anatomy
from interp.tracing.calls import SiteCall


def read_heads(heads: Any) -> Any:
    """Heads as far as they can be read without a model: ``Heads``, or what was given where a ``*`` awaits one.

    Raises:
        HeadError: not readable.
    """
    return heads if "*" in str(heads) else as_heads(heads)


def resolve_heads(heads: Any, anatomy: Anatomy) -> Heads:
    """The heads on one model.

    Raises:
        HeadError: naming a head that the model does not have, and what it has.
    """
    counts = {stack: [0] * anatomy.shape(stack)[0] for stack in anatomy.stacks}
    for site in anatomy.sites:
        counts[site.stack][site.layer] = site.n_heads
    return as_heads(heads, {stack: (len(layers), layers) for stack, layers in counts.items()})


def heads_at(call: SiteCall, heads: Heads) -> tuple[int, ...]:
    """Head numbers of the set at the call's site, ascending."""
    return heads.at(call.site.layer, call.site.stack)


def in_decoder(call: SiteCall) -> bool:
    """Is the query sequence the one that generation extends?"""
    return call.site.stack == "text" or call.site.cross


def first_key(call: SiteCall) -> Tensor:
    """Absolute position of each sample's first real key, int64 ``[B|1]``; at most the first key slot where none was shown.

    Pads are told by the mask of the call, by the run's ``attention_mask`` where the model hands over a dense mask.
    """
    if call.mask.first is not None:
        return call.mask.first.to(call.q.device).long()
    given = None if call.site.cross else _padding(call)
    if given is not None:
        return given.int().argmax(-1).to(call.q.device)
    if call.mask.dense is not None and call.q.shape[2] > 1:
        return call.mask.dense.to(call.q.device).any(1).any(1).int().argmax(-1) + call.mask.kv_offset
    start = 0 if in_decoder(call) else call.mask.kv_offset
    return torch.full((1,), start, device=call.q.device, dtype=torch.int64)


def positions_in_sample(call: SiteCall) -> Tensor:
    """Position of each row counted from its sample's first real token, int64 ``[B|1, Lq]``; negative on left pads."""
    first: Tensor | None = None
    if not call.site.cross:
        first = call.mask.first
    if first is None:
        given = _padding(call)
        first = None if given is None else given.int().argmax(-1)
    rows = call.query_positions()[None]
    return rows if first is None else rows - first.to(rows.device)[:, None]


def real_rows(call: SiteCall) -> Tensor:
    """Bool ``[B|1, Lq]``, False on pad rows."""
    rows, padding, start = call.query_positions(), None, 0
    if not call.site.cross:
        padding, start = call.mask.padding, call.mask.kv_offset
    if padding is None:
        padding, start = _padding(call), 0
    if padding is None:
        return torch.ones(1, len(rows), dtype=torch.bool, device=rows.device)
    slots = rows - start
    known = (slots >= 0) & (slots < padding.shape[-1])
    return padding.to(rows.device)[:, slots.clamp(0, padding.shape[-1] - 1)] | ~known


def _padding(call: SiteCall) -> Tensor | None:
    """The run's own padding mask of the call's query sequence, bool ``[B, L]``, where it was given as one."""
    encoder_decoder = bool(getattr(call.run.module.config, "is_encoder_decoder", False))
    if in_decoder(call):
        name = "decoder_attention_mask" if encoder_decoder else "attention_mask"
    elif call.site.stack == "encoder":
        name = "attention_mask"
    else:
        return None
    given = call.run.inputs.get(name)
    if not isinstance(given, Tensor) or given.ndim != 2 or call.q.shape[0] % len(given):
        return None
    # Beams repeat each sample.
    return given.bool().repeat_interleave(call.q.shape[0] // len(given), 0)
