"""Which calls the kernels can compute, and the order of launches that computes one.

1. A first pass walks over the keys with a running softmax: z where nothing more must be known first, and the log-sum-exp.
2. Weights of key groups that depend on a row's masses (redistribution, several operations in turn) are worked out from the
   masses of the first pass, by the specification's own functions.
3. With the softmax known, a second pass gives what needs final probabilities: columns, block sums, maps, the largest k, and
   z under the weights of step 2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from interp.attention import measure, reference
from interp.attention.call import Call, Tile
from interp.attention.edits import (
    Blocks,
    Boost,
    DropKeys,
    GivenRows,
    GroupWeights,
    Neighbourhood,
    Redistribute,
    SinkWindow,
    Threshold,
    Uniform,
)
from interp.attention.readouts import Readings
from interp.attention.triton.counting import received_rows
from interp.attention.triton.devices import interpreted, unusable
from interp.attention.triton.passes import Wanted, has_statistics, launch, launch_statistics
from interp.attention.triton.tables import Tables, row_weights, tables

RULE_BYTES = 64 << 20
"""Largest dense mask made of a rule."""
MAP_BYTES = 256 << 20
"""Byte budget of the piece of the map that offset histograms are counted from."""

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
    if call.needs_grad:
        return "it has no gradient for this call"
    return None


def run(call: Call) -> tuple[Tensor | None, Readings]:
    """z ``[B, Lq, H, Dv]`` in q's dtype (None where not wanted) and the readings."""
    with torch.no_grad():
        return _run(call)


def _run(call: Call) -> tuple[Tensor | None, Readings]:
    shared = tables(call, upcast=interpreted())
    asked = call.readout
    final = bool(
        asked.received or asked.pooled or asked.topk or asked.rows is not None or asked.attention
        or asked.group_output is not None or asked.offset is not None
    )  # fmt: skip
    weighting = call.edit.of(GroupWeights, Redistribute)
    readings = Readings(pooled_edge=call.pooled_edge or None)
    if weighting and len(weighting) == 1 and isinstance(weighting[0], GroupWeights) and asked.empty:
        op = weighting[0]
        kind = 1 if op.renormalise else 2
        return launch(shared, Wanted(output=True, weights=row_weights(op, call), weight_kind=kind)).z, readings
    if not weighting and not final:
        z = None
        if asked.empty or asked.heads is not None:
            if call.want_output:
                z = launch(shared, Wanted(output=True)).z
            if asked.empty:
                return z, readings
        given = launch(shared, _row_stats(call, output=call.want_output and asked.heads is None))
        _keep(readings, call, given.tensors, shared)
        return given.z if asked.heads is None else z, readings
    return _two_passes(call, shared, readings)


def _row_stats(call: Call, *, output: bool = False) -> Wanted:
    asked = call.readout
    return Wanted(output=output, row_stats=True, groups=asked.groups, n_groups=asked.n_groups, heads=asked.heads)


def _two_passes(call: Call, shared: Tables, readings: Readings) -> tuple[Tensor | None, Readings]:
    asked = call.readout
    weighting = call.edit.of(GroupWeights, Redistribute)
    z, weights, share = None, None, None
    if weighting:
        groups = call.edit.groups
        first = launch(shared, Wanted(row_stats=True, groups=groups, n_groups=call.edit.key_groups))
        masses = first.tensors["mass"]
        share = first.tensors["sink_share"] if call.sinks is not None else None
        weights, share = reference.total_weights(call, masses, share)
    else:
        first = launch(shared, Wanted(output=call.want_output))
        z = first.z
    lse = first.tensors["lse"]
    known = Wanted(lse=lse, weights=weights, weight_kind=0 if weights is None else 2)
    if weights is not None and call.want_output:
        z = launch(shared, replace(known, output=True)).z
    if asked.empty:
        return z, readings
    if asked.row_stats or asked.topk or asked.received or asked.pooled:
        wanted = replace(
            known, row_stats=asked.row_stats, groups=asked.groups, n_groups=asked.n_groups, topk=asked.topk,
            columns=asked.received, pooled=bool(asked.pooled), heads=asked.heads,
        )  # fmt: skip
        given = launch_statistics(shared, wanted) if has_statistics(shared, wanted) else launch(shared, wanted).tensors
        if asked.row_stats:
            given["lse"] = lse
            if share is not None:
                given["sink_share"] = share if asked.heads is None else share[:, asked.heads]
        _keep(readings, call, given, shared)
    if asked.received:
        readings.received_rows = received_rows(call, shared)
    if asked.rows is not None:
        readings.rows = launch(shared, replace(known, map=True, rows=asked.rows, heads=asked.heads)).tensors["map"]
    if asked.attention:
        readings.attention = launch(shared, replace(known, map=True, heads=asked.heads)).tensors["map"]
    if asked.group_output is not None:
        groups = asked.groups
        if groups is None:
            groups = torch.zeros((1, call.shape[3]), dtype=torch.int8, device=call.q.device)
        by_group = replace(
            known, output=True, by_group=True, groups=groups, n_groups=asked.n_groups, rows=asked.group_output,
            heads=asked.heads,
        )  # fmt: skip
        readings.group_output = launch(shared, by_group).tensors["group_output"]
    if asked.offset is not None:
        readings.offset = _offset(call, shared, known)
    return z, readings


def _keep(readings: Readings, call: Call, given: dict[str, Tensor], shared: Tables) -> None:
    """Put a launch's tensors into the readings that were asked for."""
    asked = call.readout
    if asked.row_stats:
        for name in ("top_weight", "top_key", "entropy", "mass", "sink_share"):
            setattr(readings, name, given[name])
        lse = given["lse"]
        if call.edit.of(Uniform):
            # The reading is of the softmax that the uniform rows replace.
            lse = launch(shared, Wanted(uniform=False)).tensors["lse"]
        readings.lse = lse if asked.heads is None else lse[:, asked.heads]
    if asked.topk:
        weight, key = given["topk_weight"], given["topk_key"]
        # Empty places have weight 0 and key -1: they go last, and among equals the lowest key first.
        by_key = torch.where(key < 0, torch.iinfo(torch.int32).max, key).sort(dim=-1, stable=True).indices
        weight, key = weight.gather(-1, by_key), key.gather(-1, by_key)
        by_weight = weight.sort(dim=-1, descending=True, stable=True).indices[..., : asked.topk]
        readings.topk_weight, readings.topk_key = weight.gather(-1, by_weight), key.gather(-1, by_weight)
    for name in ("received", "pooled"):
        if name in given:
            setattr(readings, name, given[name])


def _offset(call: Call, shared: Tables, known: Wanted) -> Tensor:
    """The histogram, counted from pieces of the map that stay under a byte budget."""
    batch, heads, n_queries, n_keys = call.shape
    asked = call.readout
    assert asked.offset is not None
    heads = heads if asked.heads is None else len(asked.heads)
    step = max(MAP_BYTES // (batch * heads * n_keys * 4), 1)
    total = None
    for start in range(0, n_queries, step):
        stop = min(start + step, n_queries)
        rows = torch.arange(start, stop, device=call.q.device)
        p = launch(shared, replace(known, map=True, rows=rows, heads=asked.heads)).tensors["map"]
        part, _ = call.tile(Tile((0, batch), (0, call.shape[1]), (start, stop), (0, n_keys)))
        assert part.readout.offset is not None
        counted = measure.counted_rows(part, p)
        histogram = measure.offset_histogram(p, part.readout.offset, counted)
        total = histogram if total is None else total + histogram
    assert total is not None
    return total
