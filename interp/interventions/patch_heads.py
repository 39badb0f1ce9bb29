"""Activation patching: z, q, k, v or the pattern of chosen heads, taken from another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Edit, GivenRows
from interp.interventions._base import HeadPolicy, Strength, every_head, whole_numbers
from interp.interventions._patching import (
    Match,
    check_origins,
    check_width,
    gathered,
    match_keys,
    match_rows,
    patched_outputs,
)
from interp.interventions.activations import KEYED, WHAT, HeadActivations, SiteActivations, call_pattern, first_sample
from interp.interventions.selection import heads_at, in_decoder
from interp.models.anatomy import Anatomy, anatomy
from interp.models.model import unwrap
from interp.tracing.calls import SiteCall
from interp.tracing.trace import Trace


@dataclass(frozen=True, eq=False)
class PatchHeads(HeadPolicy):
    """Put what heads did in another run in place of what they do in this one (Heimersheim and Nanda 2024, https://arxiv.org/abs/2404.15255).

    Denoising runs the corrupt input and patches from the clean one, noising the other way round; compare the metric by
    ``(m_patched - m_corrupt) / (m_clean - m_corrupt)``. What can be patched:

    - ``z``: the head's output. Everything it does.
    - ``q``: which keys it looks for. ``pattern``: what it looks at, values staying this run's.
    - ``k``, ``v``: of a KV head, so all query heads of the group must be named. They are patched at the prompt's keys, for the
      prompt and for every token after it.

    The other rows of the prompt, and rows after it, are this run's. q and k carry their position: patched from another
    position they keep that one's rotation.

    When not to use it: on inputs of different structure, where the same position is no match.

    Args:
        heads: what :func:`interp.heads.as_heads` takes. An empty set changes nothing.
        source: :class:`~interp.interventions.HeadActivations` of the other run, or its :class:`~interp.tracing.trace.Trace` (z and
            pattern), with one sample or one for each of the batch's. As long as the prompt, sample by sample, pads apart,
            unless rows are named.
        what: ``z``, ``q``, ``k``, ``v`` or ``pattern``.
        rows: absolute positions that are patched, negative ones from the prompt's end; for ``k`` and ``v`` key positions. None is
            all of the prompt.
        source_rows: for each of ``rows`` the position in the source, counted from its sample's first real token, or negative
            from its end; None is the same position. Not for ``k`` and ``v``.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model or the source does not have.
        ValueError: rows and source_rows that do not pair, a split KV group, a source without ``what``; in the run, before the
            first token: a source of another length or width.
        TypeError: a source that is none.
    """

    source: Any
    _: KW_ONLY
    what: Literal["z", "q", "k", "v", "pattern"] = "z"
    source_rows: Sequence[int] | None = None

    paper: ClassVar[str] = "https://arxiv.org/abs/2404.15255"
    unit: ClassVar[str] = "heads patched"
    needs: ClassVar[str] = "HeadActivations or a Trace of another run"
    scopes: ClassVar[tuple[str, ...]] = ("all", "prefill")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in WHAT:
            raise ValueError(f"what must be one of {WHAT}, got {self.what!r}")
        source = HeadActivations.from_trace(self.source) if isinstance(self.source, Trace) else self.source
        if not isinstance(source, HeadActivations):
            raise TypeError(
                f"source must be HeadActivations.collect(model, inputs) or a Trace, got {type(source).__name__}"
            )
        object.__setattr__(self, "source", source)
        if self.source_rows is not None:
            if self.what in KEYED:
                raise ValueError(f"source_rows must be left out for what={self.what!r}, got {self.source_rows!r}")
            pairs = whole_numbers("source_rows", self.source_rows)
            if self.rows is None or len(pairs) != len(self.rows):
                raise ValueError(f"source_rows must pair with rows, got {self.source_rows!r} and rows={self.rows!r}")
            object.__setattr__(self, "source_rows", pairs)

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> PatchHeads:
        """The last row of the prompt takes an output that no run gave."""
        one = torch.ones(1, dtype=torch.int64)
        sites = {
            (s.stack, s.layer): SiteActivations(
                {"z": torch.linspace(-2, 2, s.v_head_dim).expand(1, 1, s.n_heads, -1)}, one, one
            )
            for s in anatomy(unwrap(model)).sites
        }
        heads = every_head(model) if strength == "on" else []
        return cls(heads, HeadActivations(sites, ("z",)), rows=[-1], source_rows=[-1])

    def prepare(self, anatomy: Anatomy) -> None:
        super().prepare(anatomy)
        heads = self.resolve(anatomy)
        self.source.require(heads, self.what, "source")
        if self.what not in KEYED:
            return
        for site in anatomy.sites:
            mine, group = heads.at(site.layer, site.stack), site.n_heads // site.n_kv_heads
            for kv in sorted({h // group for h in mine}):
                missing = sorted(set(range(kv * group, (kv + 1) * group)) - set(mine))
                if missing:
                    raise ValueError(
                        f"heads must be whole KV groups for what={self.what!r}: layer {site.layer} of {site.stack!r} shares KV head "
                        f"{kv} with heads {missing}, which are not named"
                    )

    def before(self, call: SiteCall) -> Edit | None:
        if self.what == "z" or self._nothing(call):
            return None
        site = self.source.sites[call.site.stack, call.site.layer]
        first = first_sample(call, call.run.of(self).setdefault("samples", {}))
        if self.what in ("q", "k") and not call.generated:
            check_origins(call, site, first)
        if self.what in KEYED:
            setattr(call, self.what, self._keyed(call, site, first))
            return None
        rows, source_rows = self._pairs(call)
        match = match_rows(call, site, first, rows, source_rows, named=self.rows is not None)
        if not bool(match.taken.any()):
            return None
        if self.what == "pattern":
            return self._pattern(call, site, first, match.taken, match.source)
        values = gathered(site.values["q"], match, call, first)
        check_width("q", values, call.q.transpose(1, 2))
        where = call.heads(self.mine(call)) & match.taken[:, None]
        call.q = torch.where(where.unsqueeze(-1), values.transpose(1, 2).to(call.q.dtype), call.q)
        return None

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        if self.what != "z" or self._nothing(call):
            return None
        rows, source_rows = self._pairs(call)
        return patched_outputs(
            call, z, call.heads(self.mine(call)), self.source, call.run.of(self), rows=rows, source_rows=source_rows,
            named=self.rows is not None,
        )  # fmt: skip

    def _nothing(self, call: SiteCall) -> bool:
        """Generated rows have no match, but their keys do."""
        return not self.mine(call) or (call.generated and self.what not in KEYED)

    def _pairs(self, call: SiteCall) -> tuple[list[int] | None, list[int] | None]:
        """Rows of the call and their positions in the source."""
        if self.rows is None:
            return None, None
        start, count = call.mask.q_offset, call.q.shape[2]
        end = (call.run.prompt_length or 0) if in_decoder(call) else count
        pairs = [
            ((row + end if row < 0 else row) - start, other)
            for row, other in zip(self.rows, self.source_rows or self.rows, strict=True)
        ]
        inside = [(row, other) for row, other in pairs if 0 <= row < count]
        return [row for row, _ in inside], [other for _, other in inside] if self.source_rows is not None else None

    def _keyed(self, call: SiteCall, site: SiteActivations, first: int) -> Tensor:
        """k or v ``[B, H_kv, Lk, D]`` with the source's."""
        own: Tensor = getattr(call, self.what)
        end = (call.run.prompt_length or 0) if in_decoder(call) and not call.site.cross else own.shape[2]
        match = match_keys(call, site, first, self.rows, end)
        values = gathered(site.values[self.what], match, call, first)
        check_width(self.what, values, own.transpose(1, 2))
        group = call.site.n_heads // call.site.n_kv_heads
        heads = torch.zeros(1, call.site.n_kv_heads, 1, dtype=torch.bool, device=own.device)
        heads[:, sorted({h // group for h in self.mine(call)})] = True
        where = (heads & match.taken[:, None]).unsqueeze(-1)
        # Never in place: this may be the cache itself.
        return torch.where(where, values.transpose(1, 2).to(own.dtype), own)

    def _pattern(self, call: SiteCall, site: SiteActivations, first: int, taken: Tensor, source: Tensor) -> Edit:
        """Rows of p from the source; its keys are found by their position in the sample."""
        mine = heads_at(call, self.heads_of(call.run))
        rows = taken.any(0).nonzero().flatten()
        keys = match_keys(call, site, first, None, int(call.k.shape[2]) + call.mask.kv_offset)
        p = gathered(site.values["pattern"], Match(source, taken), call, first)[:, rows][:, :, mine]
        if p.shape[2] != len(mine):
            raise ValueError(f"source must have the pattern of heads {mine}, got {p.shape[2]} heads")
        index = keys.source.clamp_max(p.shape[-1] - 1)[:, None, None].expand(-1, len(rows), len(mine), -1)
        aligned = torch.where(keys.taken[:, None, None], p.gather(-1, index), 0.0).transpose(1, 2).contiguous()
        heads = torch.tensor(mine, device=rows.device)
        if not bool(taken[:, rows].all()):
            # Rows that are patched in some samples and are pads in others, which keep theirs.
            aligned = torch.where(taken[:, None, rows, None], aligned, call_pattern(call, heads, rows))
        return Edit((GivenRows(heads, rows, aligned),))
