"""Which calls the kernels can compute, and the order of launches that computes one.

1. A first pass walks over the keys with a running softmax: z where nothing more must be known first, and the log-sum-exp.
2. Weights of key groups that depend on a row's masses (redistribution, several operations in turn) are worked out from the
   masses of the first pass, by the specification's own functions.
3. With the softmax known, a second pass gives what needs final probabilities: columns, block sums, distances, maps, the largest k,
   and z under the weights of step 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from interp.attention import reference, sdpa
from interp.attention.call import Call
from interp.attention.edits import (
    Blocks,
    Boost,
    DropKeys,
    Gain,
    GivenRows,
    GroupWeights,
    Neighbourhood,
    Redistribute,
    SinkWindow,
    Threshold,
    TopKeys,
    Uniform,
)
from interp.attention.kinds import LONGER, READ, SHORT, Short
from interp.attention.readouts import Readings, Readout
from interp.attention.triton import ranked, tiles
from interp.attention.triton.counting import received_rows
from interp.attention.triton.decoding import Decoding, supports_decode
from interp.attention.triton.devices import interpreted, unusable
from interp.attention.triton.gradients import differentiable, lacks_gradient
from interp.attention.triton.offsets import Offsets
from interp.attention.triton.passes import Live, Pass, Wanted
from interp.attention.triton.statistics_pass import StatisticsPass, covers
from interp.attention.triton.tables import operands, row_major, row_weights, tables

RULE_BYTES = 64 << 20
"""Largest dense mask made of a rule."""
DECODE_ROWS = 16
"""Query rows up to which the keys are split over programs instead of the rows."""
HIDDEN_SCORE = float(tiles.HIDDEN.value)

NO_READOUT = Readout()
ONE_OF = (SinkWindow, Blocks, Neighbourhood, Boost, Threshold, DropKeys)


def supports(call: Call) -> str | None:
    """What keeps the kernels from a call, or None."""
    lacking = unusable(call.q.device)
    if lacking is not None:
        return lacking
    if call.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, and q is {call.q.dtype}"
    widest = max(call.q.shape[3], call.v.shape[3])
    if widest > 256:
        return f"its head dims end at 256, and this call has {widest}"
    batch, _, n_queries, n_keys = call.shape
    if call.mask.rule is not None and batch * n_queries * n_keys > RULE_BYTES:
        return f"a mask rule over {n_queries} x {n_keys} would have to be made dense"
    if call.edit.of(GivenRows):
        return "it cannot put given rows in the place of computed ones (GivenRows)"
    for kind in ONE_OF:
        if len(call.edit.of(kind)) > 1:
            return f"it takes one {kind.__name__} at a time"
    lacking = ranked.lacks(call)
    return lacks_gradient(call) if lacking is None and call.needs_grad else lacking


def run(call: Call) -> tuple[Tensor | None, Readings]:
    """z ``[B, Lq, H, Dv]`` in q's dtype (None where not wanted) and the readings."""
    if call.edit.of(TopKeys):
        return ranked.run(call)
    recording = torch.is_grad_enabled()
    if recording and call.needs_grad and call.want_output:
        return differentiable(call), Readings()
    with torch.no_grad():
        memo = {} if call.memo is None else call.memo
        plan = memo.get("triton")
        if plan is None:
            few = call.shape[2] <= DECODE_ROWS and supports_decode(call) is None
            plan = memo["triton"] = Decoding(call) if few else Plan(call)
            if plan.short is not None and not recording:
                memo[SHORT] = plan.short
                if isinstance(plan, Decoding):
                    memo[LONGER] = plan.of_length
        done = plan.run(call)
        if isinstance(plan, Plan) and plan.reads:
            memo[READ] = plan.read
        return done


class Plan:
    """Everything about a call that calls of its kind share: tables, prepared launches, row counts."""

    def __init__(self, call: Call) -> None:
        self.shared = tables(call, upcast=interpreted())
        self.passes: dict[str, Pass | StatisticsPass] = {}
        self.rows_seen: Tensor | None = None
        self.offsets: Offsets | None = None
        self.short: Short | None = None
        """The way of later calls of a redistribution, whose key groups may be others in every layer."""
        asked, edit = call.readout, call.edit
        plain = not edit.operations and call.sinks is None and call.bias is None
        self.reads = plain and call.lse is not None and not call.want_output and _statistics_alone(asked)
        """Whether calls of the kind go to :meth:`read`."""
        weighting = edit.of(GroupWeights, Redistribute)
        if asked.empty and len(weighting) == 1 and isinstance(weighting[0], Redistribute):
            self.move = Wanted(
                output=True, move=weighting[0], groups=self.shared.edit_groups, n_groups=call.edit.key_groups
            )
            self.short = self._moved

    def _moved(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, groups: Tensor | None
    ) -> Tensor:
        x = Live(
            row_major(q), row_major(k), row_major(v), sinks, None if bias is None else row_major(bias),
            groups=None if groups is None else row_major(groups),
        )  # fmt: skip
        return self.walk("moved", x, lambda: self.move)["z"]

    @torch.no_grad()
    def read(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> Readings:
        """Statistics of a softmax whose log-sum-exp is known."""
        call = self.shared.call
        asked = call.readout
        x = Live(row_major(q), row_major(k), row_major(v), lse=lse)
        given = self.walk("statistics", x, lambda: _statistics(asked, Wanted(given=True, heads=asked.heads)))
        if asked.row_stats:
            given["lse"] = lse if asked.heads is None else lse[:, asked.heads]
        readings = Readings(received_rows=self.rows_seen, pooled_edge=call.pooled_edge or None)
        for name, tensor in given.items():
            setattr(readings, name, tensor)
        return readings

    def walk(self, name: str, x: Live, wanted: Callable[[], Wanted]) -> dict[str, Tensor]:
        """Run the pass of that name, preparing it first where this is its first time."""
        found = self.passes.get(name)
        if found is None:
            asked = wanted()
            fast = asked.given and not (asked.output or asked.map or asked.distance) and covers(self.shared, asked)
            found = self.passes[name] = StatisticsPass(self.shared, asked) if fast else Pass(self.shared, asked)
        return found(x)

    def run(self, call: Call) -> tuple[Tensor | None, Readings]:
        asked = call.readout
        if self.reads and call.lse is not None:
            if asked.received and self.rows_seen is None:
                self.rows_seen = received_rows(call, self.shared, Live(*operands(call)))
            return None, self.read(call.q, call.k, call.v, call.lse)
        final = bool(
            asked.received or asked.pooled or asked.topk or asked.rows is not None or asked.attention
            or asked.group_output is not None or asked.offset is not None or asked.distance is not None
        )  # fmt: skip
        q, k, v = operands(call)
        x = Live(q, k, v, call.sinks, None if call.bias is None else row_major(call.bias))
        weighting = call.edit.of(GroupWeights, Redistribute)
        readings = Readings(pooled_edge=call.pooled_edge or None)
        if weighting and len(weighting) == 1 and isinstance(weighting[0], GroupWeights) and asked.empty:
            return self._weighted(weighting[0], call, x), readings
        if self.short is not None:
            return self.short(call.q, call.k, call.v, call.sinks, call.bias, None), readings
        if call.lse is not None and len(call.edit.of(Gain)) < len(call.edit.operations):
            # It is that of the unedited softmax.
            call = replace(call, lse=None)
        if weighting or final or (asked.row_stats and call.lse is not None):
            return self._with_final(call, x, readings), readings
        apart = asked.heads is not None or not asked.row_stats
        z = None
        if apart and call.want_output:
            z = self.walk("output", x, lambda: Wanted(output=True))["z"]
        if asked.row_stats:
            given = self.walk("rows", x, lambda: _row_stats(call, output=call.want_output and not apart))
            self._keep(readings, call, given, x)
            z = given.get("z", z)
        return z, readings

    def _weighted(self, op: GroupWeights, call: Call, x: Live) -> Tensor:
        """One pass: weights act inside the softmax where they renormalise, on p where they do not."""
        weights = row_weights(op, call).float()
        kind = 1 if op.renormalise else 2
        if kind == 1:
            weights = torch.where(weights > 0, weights.log2(), HIDDEN_SCORE)
        weights = weights.contiguous()
        return self.walk("weighted", x._replace(weights=weights), lambda: Wanted(output=True, weights=kind))["z"]

    def _with_final(self, call: Call, x: Live, readings: Readings) -> Tensor | None:
        """Final probabilities need the log-sum-exp first, and weights that depend on masses the masses."""
        asked, edit = call.readout, call.edit
        z, share, kind = None, None, 0
        if edit.of(GroupWeights, Redistribute):
            kind = 2
            first = self.walk("masses", x, lambda: Wanted(row_stats=True, groups=edit.groups, n_groups=edit.key_groups))
            share = first["sink_share"] if call.sinks is not None else None
            weights, share = reference.total_weights(call, first["mass"], share)
            x = x._replace(lse=first["lse"], weights=weights.float().contiguous())
            if call.want_output:
                z = self.walk("weighted output", x, lambda: Wanted(output=True, given=True, weights=2))["z"]
        elif call.want_output or call.lse is None:
            z, lse = self._first(call, x)
            x = x._replace(lse=lse)
        else:
            x = x._replace(lse=call.lse)
        if asked.empty:
            return z
        known = Wanted(given=True, weights=kind, heads=asked.heads)
        if asked.row_stats or asked.topk or asked.received or asked.pooled:
            given = self.walk("statistics", x, lambda: _statistics(asked, known))
            given["lse"] = x.lse  # pyright: ignore[reportArgumentType]
            if share is not None:
                given["sink_share"] = share if asked.heads is None else share[:, asked.heads]
            self._keep(readings, call, given, x)
        if asked.received:
            if self.rows_seen is None or call.edit.of(Threshold) or call.bias is not None:
                self.rows_seen = received_rows(call, self.shared, x)
            readings.received_rows = self.rows_seen
        if asked.rows is not None:
            readings.rows = self.walk("some rows", x, lambda: replace(known, map=True, rows=asked.rows))["map"]
        if asked.attention:
            readings.attention = self.walk("map", x, lambda: replace(known, map=True))["map"]
        if asked.group_output is not None:
            readings.group_output = self.walk("group output", x, lambda: _group_output(call, known))["group_output"]
        if asked.distance is not None:
            given = self.walk("distance", x, lambda: replace(known, distance=asked.distance))
            readings.distance, readings.distance_mass = given["distance"], given["distance_mass"]
        if asked.offset is not None:
            offsets = self.offsets = Offsets(call) if self.offsets is None else self.offsets
            piece = lambda n: replace(known, map=True, rows=offsets.rows[n], dirty=offsets.dirty[n])  # noqa: E731
            readings.offset = offsets(call, lambda n: self.walk(f"map {n}", x, lambda: piece(n))["map"])
        return z

    def _first(self, call: Call, x: Live) -> tuple[Tensor | None, Tensor]:
        """z where wanted, and the log-sum-exp: from SDPA's kernel where it can make them, which is the fastest."""
        if call.want_output and sdpa.supports(replace(call, readout=NO_READOUT)) is None and not call.edit.operations:
            causal = sdpa.upper_left_causal(call)
            if call.bias is None and (call.mask.trivial or causal):
                gqa = x.q.shape[1] != x.k.shape[1]
                made = sdpa.fused(x.q, x.k, x.v, causal=causal, scale=call.scale, enable_gqa=gqa)
                if made is not None:
                    return made[0].transpose(1, 2).contiguous(), made[1]
        first = self.walk("output", x, lambda: Wanted(output=call.want_output))
        return first.get("z"), first["lse"]

    def _keep(self, readings: Readings, call: Call, given: dict[str, Tensor], x: Live) -> None:
        """Put a pass's tensors into the readings that were asked for."""
        asked = call.readout
        if asked.row_stats:
            for name in ("top_weight", "top_key", "entropy", "mass", "sink_share"):
                setattr(readings, name, given[name])
            lse = given["lse"]
            if call.edit.of(Uniform):
                # The reading is of the softmax that the uniform rows replace.
                lse = self.walk("plain lse", x, lambda: Wanted(uniform=False))["lse"]
            readings.lse = lse if asked.heads is None else lse[:, asked.heads]
        if asked.topk:
            readings.topk_weight, readings.topk_key = _sorted(given["topk_weight"], given["topk_key"], asked.topk)
        for name in ("received", "pooled"):
            if name in given:
                setattr(readings, name, given[name])


def _statistics_alone(asked: Readout) -> bool:
    """Whether nothing is asked for but what the statistics pass gives."""
    others = (asked.rows, asked.group_output, asked.offset, asked.distance)
    wanted = asked.row_stats or asked.received or asked.pooled
    return bool(wanted) and not asked.topk and not asked.attention and all(other is None for other in others)


def _statistics(asked: Readout, known: Wanted) -> Wanted:
    return replace(
        known, row_stats=asked.row_stats, groups=asked.groups, n_groups=asked.n_groups, topk=asked.topk,
        columns=asked.received, pooled=bool(asked.pooled),
    )  # fmt: skip


def _row_stats(call: Call, *, output: bool) -> Wanted:
    asked = call.readout
    return Wanted(output=output, row_stats=True, groups=asked.groups, n_groups=asked.n_groups, heads=asked.heads)


def _group_output(call: Call, known: Wanted) -> Wanted:
    groups = call.readout.groups
    if groups is None:
        groups = torch.zeros((1, call.shape[3]), dtype=torch.int8, device=call.q.device)
    return replace(
        known, output=True, by_group=True, groups=groups, n_groups=call.readout.n_groups, rows=call.readout.group_output
    )


def _sorted(weight: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest in falling order; among equals the lowest key first, and empty places (weight 0, key -1) last."""
    by_key = torch.where(key < 0, torch.iinfo(torch.int32).max, key).sort(dim=-1, stable=True).indices
    weight, key = weight.gather(-1, by_key), key.gather(-1, by_key)
    by_weight = weight.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return weight.gather(-1, by_weight), key.gather(-1, by_weight)
