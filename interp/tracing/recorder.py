"""Collects readings call by call and makes a :class:`~interp.tracing.trace.Trace` of them when the run ends."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.attention import Distances, Edit, OffsetBins, Readout, attend
from interp.attention.call import Tile, tile_edit
from interp.models.layout import KINDS, Layout
from interp.tracing.assembly import Piece, assemble_stack
from interp.tracing.calls import RunState, SiteCall
from interp.tracing.capture import Capture, Selection, check_fits, estimate_bytes, select_rows
from interp.tracing.runs import Sequences
from interp.tracing.trace import Trace


@dataclass(eq=False)
class Recorder:
    """The readings of one run. They stay on their layer's device until :meth:`trace` moves them once."""

    capture: Capture
    selection: Selection
    run: RunState
    tokenizer: Any = None
    pieces: dict[str, list[Piece]] = field(default_factory=dict[str, list[Piece]])
    samples: dict[str, int] = field(default_factory=dict[str, int])
    checked: set[str] = field(default_factory=set[str])
    last_readouts: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def wants(self, call: SiteCall) -> bool:
        return self.selection.of(call.site) is not None and bool(self._runs(call))

    def _runs(self, call: SiteCall) -> list[tuple[int, int]]:
        return self._select(self.capture.queries, call)

    def _select(self, rows: Any, call: SiteCall) -> list[tuple[int, int]]:
        prompt, first, count = self.run.prompt_length or 0, call.mask.q_offset, call.q.shape[2]
        # The first forward of prompt-lookup decoding feeds the prompt and drafts at once.
        own = count if not self._has_drafts(call) else prompt - first
        runs = [] if call.generated else select_rows(rows, first, own, False, prompt)
        after = 0 if call.generated else own
        late = select_rows(rows, first + after, count - after, True, prompt) if after < count else []
        # Drafts may be rejected later, so their rows are kept apart.
        return runs + [(after + row, after + row + 1) for start, stop in late for row in range(start, stop)]

    def _has_drafts(self, call: SiteCall) -> bool:
        prompt, first = self.run.prompt_length, call.mask.q_offset
        decoder = call.site.stack == "text" or call.site.cross
        return self.run.generating and decoder and prompt is not None and first < prompt < first + call.q.shape[2]

    def _is_generated(self, call: SiteCall, row: int) -> bool:
        return call.generated or (self._has_drafts(call) and call.mask.q_offset + row >= (self.run.prompt_length or 0))

    def read(self, call: SiteCall, edit: Edit | None, backend: str, lse: Tensor | None = None) -> set[str]:
        """Take the readings of one call; raises before anything large is made where they would not fit.

        Gives the backends that computed them, none where only z is kept.
        ``lse [B, H, Lq]`` is the call's log-sum-exp where the kernel that made its output gave it.
        """
        heads, backends = self.selection.of(call.site), set[str]()
        if heads is None:
            return backends
        self._check(call, len(heads))
        sample = self._first_sample(call)
        batch, n_heads, n_queries, _ = call.q.shape
        n_keys = call.k.shape[2]
        for start, stop in self._runs(call):
            whole = (start, stop) == (0, n_queries)
            readout, row_places, output_places = self._shared_readout(call, heads, start, stop, sample)
            readings = None
            if not readout.empty:
                part = edit
                if edit is not None and not whole:
                    part = tile_edit(edit, Tile((0, batch), (0, n_heads), (start, stop), (0, n_keys)))
                bias = call.bias
                if bias is not None and not whole and bias.shape[2] > 1:
                    bias = bias[:, :, start:stop]
                readings = attend(
                    call.q[:, :, start:stop].detach(), call.k.detach(), call.v.detach(), scale=call.scale,
                    mask=call.mask if whole else call.mask.rows(start, stop), softcap=call.softcap, sinks=call.sinks, bias=bias,
                    edit=part, readout=readout, want_output=False, backend="auto" if backend == "sdpa" else backend,
                    lse=lse if whole else None,
                ).readings  # fmt: skip
                backends.add(str(readings.backend))
            piece = Piece(
                layer=call.site.layer, heads=heads, n_heads=n_heads, sample=sample, batch=batch,
                start=call.mask.q_offset + start, stop=call.mask.q_offset + stop, key_start=call.mask.kv_offset, n_keys=n_keys,
                generated=self._is_generated(call, start), readings=readings, rows=row_places, output_rows=output_places,
                offsets=readout.offset, pooled=readout.pooled, z=None, forward=self.run.forwards,
            )  # fmt: skip
            self.pieces.setdefault(call.site.stack, []).append(piece)
        return backends

    def keep_z(self, call: SiteCall, z: Tensor) -> None:
        if not self.capture.z:
            return
        heads = self.selection.of(call.site) or []
        runs = self._runs(call)
        for piece, (start, stop) in zip(self.pieces[call.site.stack][-len(runs) :], runs, strict=True):
            piece.z = z[:, start:stop, heads].detach().float().transpose(1, 2)

    def _check(self, call: SiteCall, heads: int) -> None:
        if call.site.stack in self.checked:
            return
        self.checked.add(call.site.stack)
        n_queries = sum(stop - start for start, stop in self._runs(call))
        sizes = estimate_bytes(self.capture, call.site, call.q.shape[0], heads, n_queries, call.k.shape[2])
        check_fits(self.capture, sizes, len(self.selection.layers[call.site.stack]))

    def _first_sample(self, call: SiteCall) -> int:
        """Number of the call's first sample: towers run over images or tiles may be called several times in a run."""
        if call.site.stack == "text" or call.site.cross:
            return 0
        seen = self.samples.get(call.site.name, 0)
        if call.mask.q_offset == 0 and call.mask.kv_offset == 0:
            self.samples[call.site.name] = seen + call.q.shape[0]
            return seen
        return seen - call.q.shape[0]

    def _shared_readout(
        self, call: SiteCall, heads: list[int], start: int, stop: int, sample: int
    ) -> tuple[Readout, list[int], list[int]]:
        """One readout for all layers that are asked the same: the op prepares for each readout once."""
        lay = self.layout_of(call.site.stack)
        key = (
            call.site.stack, call.site.cross, tuple(heads), call.site.n_heads, start, stop, sample, tuple(call.q.shape),
            call.k.shape[2], call.mask.q_offset, call.mask.kv_offset, call.generated, call.q.device, id(lay), id(call.mask),
        )  # fmt: skip
        if self.last_readouts.get("forward") != self.run.forwards:
            self.last_readouts = {"forward": self.run.forwards}
        if key not in self.last_readouts:
            # The mask is held so that its address stays its own.
            self.last_readouts[key] = (self._readout(call, heads, start, stop, sample), call.mask)
        return self.last_readouts[key][0]

    def _readout(
        self, call: SiteCall, heads: list[int], start: int, stop: int, sample: int
    ) -> tuple[Readout, list[int], list[int]]:
        capture, device = self.capture, call.q.device
        decoder = call.site.stack == "text" or call.site.cross
        groups, n_groups = self.key_groups(call, sample)
        chunked = not decoder and (call.mask.q_offset > 0 or self._longer(call))
        rows = _within(self._select(capture.rows, call) if capture.rows is not None else [], start, stop)
        output_rows = _within(
            self._select(capture.group_output, call) if capture.group_output is not None else [], start, stop
        )
        pool_now = (
            bool(capture.pooled)
            and not self._is_generated(call, start)
            and (chunked or call.mask.q_offset + start == 0)
        )
        bins = self._offset_bins(call, start, stop, sample) if capture.offset or capture.distance else None
        distance = None
        if bins is not None and capture.distance:
            distance = Distances(bins.query_coords, bins.key_coords, hop=capture.distance == "hop")
        readout = Readout(
            heads=None if len(heads) == call.site.n_heads else torch.tensor(heads, device=device),
            groups=groups,
            n_groups=n_groups,
            query_groups=self._query_groups(call, start, stop, sample),
            n_query_groups=2 if decoder else 1,
            row_stats=capture.row_stats,
            topk=min(capture.topk, call.k.shape[2]),
            group_output=torch.tensor(output_rows, device=device) if output_rows else None,
            received=capture.received,
            pooled=0 if chunked or not pool_now else capture.pooled,
            offset=bins if capture.offset else None,
            distance=distance,
            rows=torch.tensor(rows, device=device) if rows else None,
            # Windows and images of a packed tower are small beside the whole; they are pooled when the whole is known.
            attention=capture.attention or (chunked and pool_now),
        )
        first = call.mask.q_offset + start
        return readout, [first + r for r in rows], [first + r for r in output_rows]

    def _longer(self, call: SiteCall) -> bool:
        lay = self.run.layouts.get(call.site.stack)
        return lay is not None and lay.shape[1] > call.q.shape[2] and not call.site.cross

    def layout_of(self, stack: str) -> Layout | None:
        return self.run.layouts.get(stack)

    def _codes(
        self, stack: str, values: np.ndarray[Any, Any], sample: int, batch: int, first: int, count: int, tail: int
    ) -> np.ndarray[Any, Any]:
        """Values of positions ``first .. first + count`` for a call's batch, ``tail`` beyond the known ones."""
        known = values[sample : sample + batch] if len(values) >= sample + batch else values
        if len(known) != batch:
            # Beams and returned sequences repeat each prompt.
            known = (
                np.repeat(known, batch // len(known), 0)
                if len(known) and batch % len(known) == 0
                else np.repeat(known[:1], batch, 0)
            )
        out = np.full((batch, count, *known.shape[2:]), tail, known.dtype)
        part = known[:, first : first + count]
        out[:, : part.shape[1]] = part
        return out

    def key_groups(self, call: SiteCall, sample: int) -> tuple[Tensor | None, int]:
        """int8 ``[B, Lk]`` and the number of groups."""
        stack, batch = call.site.stack, call.q.shape[0]
        if self.capture.groups is not None and stack == "text":
            codes = np.atleast_2d(np.asarray(torch.as_tensor(self.capture.groups))).astype(np.int8)
            tail, n_groups = int(codes.max()), int(codes.max()) + 1
        else:
            lay = self.layout_of(stack)
            if lay is None:
                return None, len(KINDS)
            codes, n_groups = lay.groups(), len(KINDS)
            tail = KINDS.index("generated") if stack == "text" else 0
        values = self._codes(stack, codes, sample, batch, call.mask.kv_offset, call.k.shape[2], tail)
        return torch.from_numpy(values).to(call.q.device), n_groups

    def _query_groups(self, call: SiteCall, start: int, stop: int, sample: int) -> Tensor:
        batch, count = call.q.shape[0], stop - start
        first = call.mask.q_offset + start
        group = 1 if self._is_generated(call, start) else 0
        lay = self.layout_of("text" if call.site.cross else call.site.stack)
        pads = None
        if lay is not None:
            pads = torch.from_numpy(
                self._codes("", lay.kind, 0 if call.site.cross else sample, batch, first, count, 0) < 0
            )
        elif call.mask.padding is not None and not call.site.cross:
            slots = torch.arange(first, first + count, device=call.mask.padding.device) - call.mask.kv_offset
            pads = ~call.mask.padding[:, slots].expand(batch, -1)
        out = torch.full((batch, count), group, dtype=torch.int8, device=call.q.device)
        return out if pads is None else out.masked_fill(pads.to(out.device), -1)

    def _offset_bins(self, call: SiteCall, start: int, stop: int, sample: int) -> OffsetBins | None:
        """1-D over tokens; 2-D over patches in a stack of image patches; none across sequences."""
        if call.site.cross:
            return None
        batch, n_keys = call.q.shape[0], call.k.shape[2]
        lay = self.layout_of(call.site.stack)
        if lay is not None and call.site.stack not in ("text", "encoder") and (lay.row >= 0).any():
            cells = np.stack([lay.row, lay.column], -1)
            q = self._codes("", cells, sample, batch, call.mask.q_offset + start, stop - start, -1)
            k = self._codes("", cells, sample, batch, call.mask.kv_offset, n_keys, -1)
            reach = [int(lay.row.max()), int(lay.column.max())]
            lo, hi = tuple(-r for r in reach), tuple(reach)
        else:
            q = np.arange(call.mask.q_offset + start, call.mask.q_offset + stop)[None, :, None]
            k = np.arange(call.mask.kv_offset, call.mask.kv_offset + n_keys)[None, :, None]
            if lay is not None:
                special = self._codes("", lay.kind, sample, batch, call.mask.kv_offset, n_keys, 3) == KINDS.index(
                    "special"
                )
                k = np.where(special[..., None], -1, k)
                own = self._codes(
                    "", lay.kind, sample, batch, call.mask.q_offset + start, stop - start, 3
                ) == KINDS.index("special")
                q = np.where(own[..., None], -1, q)
            lowest = 0 if call.mask.causal or call.generated else -(call.mask.kv_offset + n_keys - 1)
            lo, hi = (lowest,), (call.mask.q_offset + stop - 1 - call.mask.kv_offset,)
        device = call.q.device
        return OffsetBins(
            torch.from_numpy(q.astype(np.int32)).to(device), torch.from_numpy(k.astype(np.int32)).to(device), lo, hi
        )

    def trace(self, sequences: Sequences | None, attrs: dict[str, Any]) -> Trace:
        """Everything recorded, with its coordinates."""
        stacks = {}
        for stack, pieces in self.pieces.items():
            layers = self.selection.layers[stack]
            lay = self.layout_of(stack)
            stacks[stack] = assemble_stack(
                stack,
                layers,
                pieces,
                run=self.run,
                layout=lay,
                sequences=sequences,
                tokenizer=self.tokenizer,
                capture=self.capture,
            )
        versions = {"python": platform.python_version(), "torch": torch.__version__, **_versions()}
        attrs = {
            **attrs,
            "capture": self.capture.describe(),
            "versions": versions,
            "torch_seed": torch.initial_seed() % 2**63,
        }
        if self.run.layout_problem:
            attrs["layout_problem"] = self.run.layout_problem
        self.pieces = {}
        return Trace(stacks, attrs)


def _within(runs: list[tuple[int, int]], start: int, stop: int) -> list[int]:
    """Rows of ``runs`` inside a run, counted from its start."""
    return [r - start for first, last in runs for r in range(max(first, start), min(last, stop))]


@cache
def _versions() -> dict[str, str]:
    # Kept: reading a distribution's metadata takes milliseconds.
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in ("transformers", "xarray", "headscope"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out
