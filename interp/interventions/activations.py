"""What heads did in another run: z, q, k, v and patterns, the source of patching and of resample ablation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.attention import Readout, attend, combine
from interp.heads import HeadError, Heads
from interp.interventions.selection import (
    heads_at,
    in_decoder,
    positions_in_sample,
    read_heads,
    real_rows,
    resolve_heads,
)
from interp.models.anatomy import Anatomy, Site
from interp.models.model import unwrap
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked
from interp.tracing.trace import Trace

WHAT = ("z", "q", "k", "v", "pattern")
KEYED = ("k", "v")
"""Indexed by key position; the others are by query position."""


@dataclass(frozen=True, eq=False)
class SiteActivations:
    """Activations of one site, aligned at each sample's first real token.

    Attributes:
        values: by name. ``z [S, P, H, Dv]``, ``q [S, P, H, D]``, ``k [S, Pk, Hkv, D]``, ``v [S, Pk, Hkv, Dv]``,
            ``pattern [S, P, H, Pk]``; NaN for heads that were not kept.
        lengths: int64 ``[S]``, real query positions of each sample.
        key_lengths: int64 ``[S]``, real key positions.
        origins: int64 ``[S]``, the position that the model gave each sample's first real token: q and k carry it.
    """

    values: Mapping[str, Tensor]
    lengths: Tensor
    key_lengths: Tensor
    origins: Tensor | None = None

    def count(self, what: str) -> Tensor:
        return self.key_lengths if what in KEYED else self.lengths


@dataclass(frozen=True, eq=False)
class HeadActivations:
    """z, q, k, v or the pattern of heads in one run.

    A sample's positions are counted from its first real token, so that left pads of this run and of the patched one need
    not agree.

    Attributes:
        sites: by ``(stack, layer)``.
        what: which were kept.
    """

    sites: Mapping[tuple[str, int], SiteActivations]
    what: tuple[str, ...]

    @classmethod
    def collect(
        cls, model: Any, inputs: Mapping[str, Any], *, heads: Any = None, what: Collection[str] = ("z",)
    ) -> HeadActivations:
        """Run the model on ``inputs``, without gradients, and keep what chosen heads did.

        Args:
            model: as :func:`interp.hooked` takes. Interventions of a session that is open on it apply.
            inputs: keyword arguments of one forward.
            heads: what :func:`interp.heads.as_heads` takes: their layers are kept; None is all.
            what: any of ``z``, ``q``, ``k``, ``v`` (as attention gets them, after position encoding), ``pattern`` (whole maps:
                quadratic in the length).

        Raises:
            ValueError: an unknown name in ``what``, or no such head ever ran.
            HeadError: heads that the model does not have.
        """
        wanted = (what,) if isinstance(what, str) else tuple(what)
        if not wanted or any(w not in WHAT for w in wanted):
            raise ValueError(f"what must name some of {WHAT}, got {wanted}")
        collector = _Collector(None if heads is None else read_heads(heads), wanted)
        module = unwrap(model)
        with hooked(model, interventions=[collector]), torch.no_grad():
            module(**inputs)
        if not collector.pieces:
            raise ValueError(f"inputs must make the heads run, but none of {heads} did")
        return cls({key: _assembled(pieces, wanted) for key, pieces in collector.pieces.items()}, wanted)

    @classmethod
    def from_trace(cls, trace: Trace) -> HeadActivations:
        """Take z and patterns from a trace with ``Capture(z=True)`` or ``Capture(attention=True)``.

        Raises:
            ValueError: the trace has neither.
        """
        names = {"z": "z", "pattern": "attention"}
        sites: dict[tuple[str, int], SiteActivations] = {}
        found: set[str] = set()
        for stack in trace:
            data = trace[stack]
            have = {w: v for w, v in names.items() if v in data.variables}
            found |= set(have)
            for layer in data["layer"].values.tolist() if have else ():
                site = _from_dataset(data.sel(layer=layer), have, cross="cross" in stack)
                if site is not None:
                    sites[stack, layer] = site
        if not found:
            raise ValueError("trace must hold z or attention: trace with Capture(z=True) or Capture(attention=True)")
        return cls(sites, tuple(w for w in WHAT if w in found))

    def require(self, heads: Heads, what: str, name: str) -> None:
        """Raise unless every head is there.

        Raises:
            ValueError: ``what`` was not kept.
            HeadError: a head was not.
        """
        if what not in self.what:
            raise ValueError(
                f"{name} must hold {what!r}: HeadActivations.collect(..., what=[{what!r}]); it holds {self.what}"
            )
        for head in heads:
            site = self.sites.get((head.stack, head.layer))
            kept = site is not None and (what in KEYED or _has_head(site.values[what], head.head))
            if not kept:
                raise HeadError(f"{name} must hold every head, got none of {head}; it has layers {sorted(self.sites)}")

    def describe(self) -> dict[str, Any]:
        """Sizes, JSON-able."""
        stacks: dict[str, Any] = {}
        for (stack, _), site in self.sites.items():
            stacks[stack] = {"samples": len(site.lengths), "positions": int(site.lengths.max())}
        return {"what": list(self.what), "stacks": stacks}


def last_outputs(model: Any, inputs_list: Sequence[Mapping[str, Any]], heads: Any) -> dict[Any, Tensor]:
    """z of each head in the last real row of every sample: ``{head: [N, Dv]}``, fp32 on the CPU."""
    inputs_list = [inputs_list] if isinstance(inputs_list, Mapping) else list(inputs_list)
    if not inputs_list:
        raise ValueError("inputs must have at least one entry, got none")
    found: dict[Any, list[Tensor]] = {}
    for inputs in inputs_list:
        run = HeadActivations.collect(model, inputs, heads=heads)
        for head in resolve_heads(read_heads(heads), _anatomy(model)):
            site = run.sites[head.stack, head.layer]
            z = site.values["z"][
                torch.arange(len(site.lengths)), site.lengths.to(site.values["z"].device) - 1, head.head
            ]
            found.setdefault(head, []).append(z.float().cpu())
    return {head: torch.cat(parts) for head, parts in found.items()}


def _anatomy(model: Any) -> Anatomy:
    from interp.models.anatomy import anatomy

    return anatomy(unwrap(model))


def first_sample(call: SiteCall, counts: dict[str, int]) -> int:
    """Number of the call's first sample: towers run over images or tiles may be called several times in a run."""
    if in_decoder(call):
        return 0
    seen = counts.get(call.site.name, 0)
    if call.mask.q_offset == 0 and call.mask.kv_offset == 0:
        counts[call.site.name] = seen + call.q.shape[0]
        return seen
    return seen - call.q.shape[0]


def left_pads(call: SiteCall) -> Tensor:
    """Absolute position of each sample's first real token in the query sequence, int64 ``[B|1]``."""
    return call.query_positions()[0] - positions_in_sample(call)[:, 0]


def position_origin(call: SiteCall) -> Tensor:
    """Position that the model's position encoding gives each sample's first real token, int64 ``[B|1]``.

    ``generate`` counts from it; a plain forward counts pads too unless it is given ``position_ids``.
    """
    pads = left_pads(call)
    if not in_decoder(call) or call.site.cross:
        return torch.zeros_like(pads)
    given = call.run.inputs.get("position_ids")
    if isinstance(given, Tensor) and given.ndim == 2 and int(pads.max()) < given.shape[1]:
        given = given.to(pads.device)
        return given[0, pads] if len(given) == 1 else given.gather(1, pads.expand(len(given))[:, None])[:, 0]
    return torch.zeros_like(pads) if call.run.generating else pads


def key_positions(call: SiteCall) -> tuple[Tensor, Tensor]:
    """Position of every key counted from its sample's first real one, int64 ``[B|1, Lk]``, and whether it is real, bool."""
    slots = torch.arange(call.k.shape[2], device=call.k.device) + call.mask.kv_offset
    padding = call.mask.padding
    if call.site.cross:
        # The other sequence: its positions are counted as they stand.
        real = (
            torch.ones(1, len(slots), dtype=torch.bool, device=slots.device)
            if padding is None
            else padding.to(slots.device)
        )
        return slots[None], real
    positions = slots[None] - left_pads(call)[:, None]
    real = positions >= 0
    return positions, real if padding is None else real & padding.to(slots.device)


def _has_head(values: Tensor, head: int) -> bool:
    return head < values.shape[2] and not bool(values[:, 0, head].isnan().all())


class _Piece:
    """One call's activations ``[B, L, ...]`` by name, with their positions and which of them are real."""

    def __init__(
        self,
        sample: int,
        values: dict[str, Tensor],
        rows: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        origins: Tensor,
    ) -> None:
        self.sample, self.values, self.rows, self.keys, self.origins = sample, values, rows, keys, origins


class _Collector(Intervention):
    def __init__(self, heads: Any, what: tuple[str, ...]) -> None:
        self.heads, self.what = heads, what
        self.pieces: dict[tuple[str, int], list[_Piece]] = {}
        self.counts: dict[str, int] = {}
        self.chosen: Heads | None = None

    def prepare(self, anatomy: Anatomy) -> None:
        self.chosen = None if self.heads is None else resolve_heads(self.heads, anatomy)

    def acts_on(self, site: Site, run: RunState) -> bool:
        return self.chosen is None or bool(self.chosen.at(site.layer, site.stack))

    def after(self, call: SiteCall, z: Tensor) -> None:
        if self.chosen is not None and not heads_at(call, self.chosen):
            return
        batch, rows = z.shape[:2]
        values: dict[str, Tensor] = {}
        for name in self.what:
            if name == "z":
                values[name] = z.detach().clone()
            elif name == "pattern":
                values[name] = call_pattern(call).transpose(1, 2)
            else:
                values[name] = getattr(call, name).detach().clone().transpose(1, 2)
        positions = positions_in_sample(call).expand(batch, rows), real_rows(call).expand(batch, rows)
        key_at, key_real = key_positions(call)
        keys = key_at.expand(batch, -1), key_real.expand(batch, -1)
        origins = position_origin(call).expand(batch)
        piece = _Piece(first_sample(call, self.counts), values, positions, keys, origins)
        self.pieces.setdefault((call.site.stack, call.site.layer), []).append(piece)


def call_pattern(call: SiteCall, heads: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """``p [B, n|H, R|Lq, Lk]`` of a call at int64 ``heads [n]`` and ``rows [R]``, as edited so far."""
    out = attend(
        call.q.detach(), call.k.detach(), call.v.detach(), scale=call.scale, mask=call.mask, softcap=call.softcap,
        sinks=call.sinks, bias=call.bias, edit=combine(*call.edits), want_output=False,
        readout=Readout(heads=heads, rows=rows, attention=rows is None),
    )  # fmt: skip
    p = out.readings.attention if rows is None else out.readings.rows
    assert p is not None
    return p


def _assembled(pieces: list[_Piece], what: tuple[str, ...]) -> SiteActivations:
    """The pieces of one site put where their samples and positions are."""
    samples = max(p.sample + p.rows[0].shape[0] for p in pieces)
    counts = {name: torch.zeros(samples, dtype=torch.int64) for name in ("rows", "keys")}
    for piece in pieces:
        for name, total in counts.items():
            where, real = getattr(piece, name)
            ends = torch.where(real, where + 1, 0).amax(-1).cpu()
            span = slice(piece.sample, piece.sample + len(ends))
            total[span] = torch.maximum(total[span], ends)
    values: dict[str, Tensor] = {}
    for name in what:
        first = pieces[0].values[name]
        axis = "keys" if name in KEYED else "rows"
        tail = list(first.shape[2:])
        if name == "pattern":
            tail[-1] = int(counts["keys"].max())
        full = torch.zeros((samples, int(counts[axis].max()), *tail), dtype=first.dtype, device=first.device)
        for piece in pieces:
            where, real = getattr(piece, axis)
            value = piece.values[name]
            for b in range(len(where)):
                row = value[b][real[b]]
                if name == "pattern":
                    key_at, key_real = piece.keys[0][b], piece.keys[1][b]
                    wide = torch.zeros((*row.shape[:-1], tail[-1]), dtype=row.dtype, device=row.device)
                    wide[..., key_at[key_real]] = row[..., key_real]
                    row = wide
                full[piece.sample + b, where[b][real[b]]] = row
        values[name] = full
    origins = torch.zeros(samples, dtype=torch.int64)
    for piece in pieces:
        origins[piece.sample : piece.sample + len(piece.origins)] = piece.origins.cpu()
    return SiteActivations(values, counts["rows"], counts["keys"], origins)


def _from_dataset(data: Any, have: Mapping[str, str], *, cross: bool) -> SiteActivations | None:
    """One layer of a trace; None where no row is real."""
    heads = data["head"].values.tolist()
    values: dict[str, Tensor] = {}
    lengths = key_lengths = torch.zeros(0, dtype=torch.int64)
    for name, variable in have.items():
        array = torch.from_numpy(data[variable].values)  # [S, head, query, dim or key]
        real = ~array.isnan().all(-1).all(1)
        lengths = real.sum(1)
        if not int(lengths.max()):
            return None
        width = array.shape[-1]
        key_lengths = torch.full_like(lengths, width) if cross else lengths
        full = torch.full((len(array), int(lengths.max()), max(heads) + 1, width), torch.nan)
        for b, rows in enumerate(array.transpose(1, 2)):
            kept = rows[real[b]]
            if name == "pattern" and not cross:
                # The keys are the rows, pads at the same places.
                places = real[b].nonzero().flatten()
                kept = torch.nn.functional.pad(kept[..., places], (0, width - len(places)))
            full[b, : len(kept), heads] = kept
        values[name] = full
    return SiteActivations(values, lengths, key_lengths)
