"""Few query rows against many keys: which launches compute such a call.

One launch over parts of the keys and one that puts the parts together give z, row statistics and the weights of key groups
that depend on a row's masses. Whatever else is read comes from the rows of p themselves, which a last launch writes down:
with few rows the map is no larger than the keys.

A decoding step is bound by the host: what calls of one kind share (every layer of a step) is prepared once, and a new step
finds the variants compiled for the one before.
"""

from __future__ import annotations

import functools
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from interp.attention import measure, reference
from interp.attention.call import Call
from interp.attention.edits import GroupWeights, Redistribute, Uniform
from interp.attention.kinds import Short
from interp.attention.mask import Visible
from interp.attention.readouts import Readings
from interp.attention.triton.decode_arguments import Work
from interp.attention.triton.decode_joined import Joined
from interp.attention.triton.decode_launch import MOST_ROWS, Given, Live, MapPass, Pass, parts_at
from interp.attention.triton.tables import Tables, row_major

MAP_BYTES = 256 << 20
"""Largest map written for readings that are taken from it."""


def supports_decode(call: Call) -> str | None:
    """Why a call that the kernels can compute is none of decoding, or None."""
    batch, heads, n_queries, n_keys = call.shape
    rows = n_queries * (heads // call.k.shape[1])
    if rows > MOST_ROWS:
        return f"{rows} rows a key-value head are more than {MOST_ROWS}"
    if _reads_map(call) and batch * heads * n_queries * n_keys * 4 > MAP_BYTES:
        return f"its readings need a map of more than {MAP_BYTES >> 20} MiB"
    return None


def decode(call: Call, shared: Tables | None = None) -> tuple[Tensor | None, Readings]:
    """z ``[B, Lq, H, Dv]`` in q's dtype (None where not wanted) and the readings; see :class:`Decoding`."""
    return Decoding(call, shared).run(call)


class Decoding:
    """Everything about a call that calls of its kind share.

    Args:
        call: one of the kind; both the backend's ``supports`` and :func:`supports_decode` accept it.
        shared: its tables where they exist already; they are made only for edits that need them.
    """

    def __init__(self, call: Call, shared: Tables | None = None) -> None:
        asked, edit = call.readout, call.edit
        self.work, self.asked = Work.of(call, shared), asked
        self.from_map = _reads_map(call)
        self.stats = asked.row_stats
        self.in_turn = len(edit.of(GroupWeights, Redistribute)) > 1
        self.plain_lse = bool(edit.of(Uniform)) and asked.row_stats
        self.launches = call.want_output or self.stats or self.from_map
        wanted: dict[str, Any] = {"output": call.want_output, "row_stats": self.stats, "known": self.from_map}
        self.wanted = wanted
        self.main = Pass(self.work, asked, **wanted)
        plain = call.want_output and not (self.stats or self.from_map or self.in_turn)
        self.rows_in_order = all(x.stride(3) == 1 for x in (call.q, call.k, call.v))
        self.short: Short | None = self._shortest() if plain else None
        self.one_launch = self.short == self._joined
        self.by_parts: dict[int, Joined] = {}
        """Launches of calls on a growing cache, by the number of parts."""
        if plain and self.main.joined is not None:
            self.by_parts[self.main.joined.parts] = self.main.joined

    def _shortest(self) -> Short:
        """The way of later calls, whose operands lie as those of this one."""
        return self._joined if self.main.joined is not None and self.rows_in_order and _one_gpu() else self._output

    def _joined(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, groups: Tensor | None
    ) -> Tensor:
        """As :meth:`_output` where one launch can do it: on every line of it a token waits once a layer."""
        assert self.main.joined is not None
        z = self.main.joined(q, k, v, groups)
        return self._output(q, k, v, sinks, bias, groups) if z is None else z

    def _output(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, groups: Tensor | None
    ) -> Tensor:
        """z of a call of this kind, of which nothing else is wanted."""
        x = Live(row_major(q), row_major(k), row_major(v), sinks, None if bias is None else row_major(bias))
        index = q.device.index
        if index is None or _one_gpu() or index == torch.cuda.current_device():
            return self.main.output_of(x, groups)
        with torch.cuda.device(index):
            return self.main.output_of(x, groups)

    def of_length(self, k: Tensor, v: Tensor, groups: Tensor | None) -> Short | None:
        """The short way of calls that differ in the length of the cache alone, see :meth:`Work.of_length`."""
        if self.short is None:
            return None
        if not self.one_launch:
            made = self._of_length(k, v, groups)
            return None if made is None else made.short
        units = self.work.shape[0] * self.work.shape[2]
        parts = parts_at(units, k.shape[2], self.work.device)
        known = self.by_parts.get(parts)
        joined = None if known is None else known.grown(k, v, groups, parts)
        if joined is None:
            made = self._of_length(k, v, groups)
            if made is not None and made.main.joined is not None:
                self.by_parts[parts] = made.main.joined
            return None if made is None else made.short

        def way(
            q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, groups: Tensor | None
        ) -> Tensor:
            z = joined(q, k, v, groups)
            if z is not None:
                return z
            made = self._of_length(k, v, joined.groups[0] if groups is None else groups)
            assert made is not None
            return made._output(q, k, v, sinks, bias, groups)

        return way

    def _of_length(self, k: Tensor, v: Tensor, groups: Tensor | None) -> Decoding | None:
        work = self.work.of_length(k, v, groups)
        if work is None:
            return None
        made = copy(self)
        made.work, made.main = work, Pass(work, self.asked, output=True)
        made.short = made._shortest()
        return made

    def run(self, call: Call) -> tuple[Tensor | None, Readings]:
        """z and readings of a call of this kind."""
        device = call.q.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._run(call)
        return self._run(call)

    def _run(self, call: Call) -> tuple[Tensor | None, Readings]:
        asked = call.readout
        bias = None if call.bias is None else row_major(call.bias)
        x = Live(row_major(call.q), row_major(call.k), row_major(call.v), call.sinks, bias)
        readings = Readings(pooled_edge=call.pooled_edge or None)
        if not self.launches:
            return None, readings
        main, share = self.main, None
        if self.in_turn:
            # Weights of several operations in turn: by the specification's own functions, from the masses.
            masses = Pass(self.work, asked, masses=True)(x)
            share = masses.share if call.sinks is not None else None
            weights, share = reference.total_weights(call, _there(masses.mass), share)
            main = Pass(self.work.weighted_by(weights.contiguous()), asked, **self.wanted)
        given = main(x)
        if not (self.stats or self.from_map):
            return given.z, readings
        lse = given.lse
        if self.plain_lse:
            # The reading is of the softmax that the uniform rows replace.
            lse = Pass(self.work.before_step_4(), asked, known=True)(x).lse
        share = given.share if share is None else share
        if self.from_map:
            readings = self._from_map(call, x, given, lse, share)
        if not self.stats:
            return given.z, readings
        rows = Readings()
        rows.lse, rows.sink_share, rows.entropy = lse, share, given.entropy
        rows.top_weight, rows.top_key, rows.mass = given.top_weight, given.top_key, given.mass
        for name, reading in rows.tensors().items():
            setattr(readings, name, reading if asked.heads is None else reading[:, asked.heads])
        return given.z, readings

    def _from_map(self, call: Call, x: Live, given: Given, lse: Tensor | None, share: Tensor | None) -> Readings:
        """Every reading but row statistics from the rows of p, by the specification's own functions."""
        counted = call.readout.received
        p = MapPass(self.work, -1.0 if counted else 0.0, given.used is not None)(x, given)
        _, _, n_queries, n_keys = call.shape
        visible = Visible(p >= 0 if counted else None, None, None, n_queries, n_keys)
        if counted:
            p = p.clamp_min(0.0)
        share = None if call.sinks is None else share
        call = replace(call, readout=replace(call.readout, row_stats=False))
        readings = measure.read(call, p, lse, share, visible, reference.gain(call))
        readings.pooled_edge = call.pooled_edge or None
        if readings.received is not None and readings.received_rows is not None:
            readings.received_rows = readings.received_rows.expand_as(readings.received)
        return readings


@functools.cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() < 2


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _reads_map(call: Call) -> bool:
    """Whether anything is read that is taken from the rows of p."""
    asked = call.readout
    return bool(
        asked.received or asked.pooled or asked.topk or asked.rows is not None or asked.attention
        or asked.group_output is not None or asked.offset is not None or asked.distance is not None
    )  # fmt: skip
