"""Where the rows and keys of a call find their match in another run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.interventions._base import expanded, rows_mask
from interp.interventions.activations import (
    HeadActivations,
    SiteActivations,
    first_sample,
    key_positions,
    position_origin,
)
from interp.interventions.selection import in_decoder, positions_in_sample, real_rows
from interp.tracing.calls import SiteCall


class Match(NamedTuple):
    """For every row (or key) of a call: the position in the source that it takes, and whether it takes one.

    ``source [B, L]`` int64 and ``taken [B, L]`` bool.
    """

    source: Tensor
    taken: Tensor


def match_rows(
    call: SiteCall, site: SiteActivations, first: int, rows: Sequence[int] | None = None, source_rows: Sequence[int] | None = None,
    *, named: bool = False,
) -> Match:  # fmt: skip
    """Rows of a call by position in their sample.

    Args:
        first: number of the call's first sample in the source.
        rows: rows of the call to match, all where None.
        source_rows: position in the source for each of ``rows``, negative from its end; None is the same position.
        named: whether the user named rows: then the two runs need not be of one length.

    Raises:
        ValueError: a row of the prompt without a match.
    """
    batch, count = call.q.shape[0], call.q.shape[2]
    lengths = source_lengths(call, site.lengths, first, batch)
    own = positions_in_sample(call).expand(batch, count)
    taken = real_rows(call).expand(batch, count)
    if call.generated:
        taken = torch.zeros_like(taken)
    elif in_decoder(call) and call.run.prompt_length is not None:
        # Drafts behind the prompt have no match.
        taken = taken & (call.query_positions() < call.run.prompt_length)
    _check_lengths(call, own, taken, lengths, named)
    if rows is not None:
        taken = taken & rows_mask(call, rows)
    source = own
    if source_rows is not None:
        assert rows is not None
        source = own.clone()
        for row, other in zip(rows, source_rows, strict=True):
            source[:, row] = other + lengths if other < 0 else other
    outside = taken & ((source < 0) | (source >= lengths[:, None]))
    if bool(outside.any()):
        b, r = (int(x) for x in outside.nonzero()[0])
        raise ValueError(
            f"source must have a match for every patched row at {call.site.name}; row {int(source[b, r])} of sample {b} is beyond "
            f"its length {int(lengths[b])}"
        )
    return Match(source.clamp_min(0), taken)


def match_keys(call: SiteCall, site: SiteActivations, first: int, rows: Sequence[int] | None, end: int) -> Match:
    """Keys of a call, those of the prompt alone: they are met again in every later call.

    Args:
        rows: absolute key positions to match, all where None; negative ones from ``end``.
    """
    batch = call.q.shape[0]
    positions, real = (x.expand(batch, -1) for x in key_positions(call))
    lengths = source_lengths(call, site.key_lengths, first, batch)
    absolute = torch.arange(call.k.shape[2], device=call.k.device) + call.mask.kv_offset
    taken = real if call.site.cross else real & (absolute < end)
    if not call.generated:
        _check_lengths(call, positions, taken, lengths, rows is not None)
    if rows is not None:
        wanted = torch.tensor([r + end if r < 0 else r for r in rows], device=absolute.device)
        taken = taken & torch.isin(absolute, wanted)
    if not call.generated and bool((taken & (positions >= lengths[:, None])).any()):
        raise ValueError(
            f"source must have a match for every patched key at {call.site.name}; it is {lengths.tolist()} long"
        )
    return Match(positions.clamp_min(0), taken)


def source_lengths(call: SiteCall, lengths: Tensor, first: int, batch: int) -> Tensor:
    """Length of the source of every row of the call's batch, int64 ``[B]``."""
    return of_batch(call, lengths.to(call.q.device), first, batch).expand(batch)


def of_batch(call: SiteCall, values: Tensor, first: int, batch: int) -> Tensor:
    """The source's samples ``[S, ...]`` that the call's batch is about, ``[B|1, ...]``."""
    if not in_decoder(call) and first + batch <= values.shape[0] and values.shape[0] > 1:
        return values[first : first + batch]
    return expanded(values, batch, "source")


def check_origins(call: SiteCall, site: SiteActivations, first: int) -> None:
    """q and k are rotated by their positions, which must be counted alike in both runs.

    Raises:
        ValueError: they are not.
    """
    if site.origins is None:
        return
    batch = call.q.shape[0]
    there, own = source_lengths(call, site.origins, first, batch), position_origin(call)
    own = own.to(there.device) if len(own) in (1, batch) else expanded(own.to(there.device), batch, "position_ids")
    if bool((there != own).any()):
        raise ValueError(
            f"source must count positions as this run does, for q and k carry them; first tokens stand at {own.expand(batch).tolist()} "
            f"here, at {there.tolist()} there. generate counts from the first real token, a forward counts pads: collect with "
            "position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)"
        )


def _check_lengths(call: SiteCall, positions: Tensor, taken: Tensor, lengths: Tensor, named: bool) -> None:
    """The two runs must be of one length where all rows are matched."""
    if named or not bool(taken.any()):
        return
    own = torch.where(taken, positions + 1, 0).amax(-1)
    whole = call.mask.q_offset == 0 or in_decoder(call)
    wrong = (
        (own != lengths) if whole and (call.run.prompt_length is None or not _more_to_come(call)) else (own > lengths)
    )
    if bool((wrong & (own > 0)).any()):
        raise ValueError(
            f"source must be as long as the run it is matched with, sample by sample (pads apart); at {call.site.name} the run has "
            f"{own.tolist()} positions, the source {lengths.tolist()}. Name rows= where they differ on purpose"
        )


def _more_to_come(call: SiteCall) -> bool:
    """Is this a part of a prompt (or of a packed tower) whose rest comes in later calls?"""
    if in_decoder(call):
        return call.mask.q_offset + call.q.shape[2] < (call.run.prompt_length or 0)
    lay = call.run.layouts.get(call.site.stack)
    return lay is not None and lay.shape[1] > call.q.shape[2]


def gathered(values: Tensor, match: Match, call: SiteCall, first: int) -> Tensor:
    """``[B, L, ...]`` of the source ``[S, P, ...]`` at the matched positions; anything where none is taken."""
    batch, length = match.source.shape
    values = of_batch(call, values.to(call.q.device), first, batch)
    values = values.expand(batch, *values.shape[1:])
    index = match.source.clamp_max(values.shape[1] - 1)
    return values[torch.arange(batch, device=index.device)[:, None], index].reshape(batch, length, *values.shape[2:])


def patched_outputs(
    call: SiteCall, z: Tensor, where: Tensor, source: HeadActivations, state: dict[str, Any], *,
    rows: Sequence[int] | None = None, source_rows: Sequence[int] | None = None, named: bool = False,
) -> Tensor | None:  # fmt: skip
    """z ``[B, Lq, H, Dv]`` with the source's at the heads and rows of ``where [B|1, H, Lq|1]``.

    Raises:
        ValueError: a source of another length or width.
    """
    if call.generated:
        return None
    site = source.sites[call.site.stack, call.site.layer]
    first = first_sample(call, state.setdefault("samples", {}))
    match = match_rows(call, site, first, rows, source_rows, named=named)
    if not bool(match.taken.any()):
        return None
    values = gathered(site.values["z"], match, call, first)
    check_width("z", values, z)
    chosen = where.transpose(1, 2) & match.taken[..., None]
    return torch.where(chosen.unsqueeze(-1), values.to(z.dtype), z)


def check_width(what: str, values: Tensor, own: Tensor) -> None:
    """Raise ValueError unless the source's heads and their size are the call's."""
    if values.shape[2:] != own.shape[2:]:
        raise ValueError(
            f"source must have {what} of [heads, dim] {tuple(own.shape[2:])}, got {tuple(values.shape[2:])}"
        )
