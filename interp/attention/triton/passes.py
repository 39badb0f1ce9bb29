"""One launch of the row-stationary kernel, and the buffers it fills."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.attention.call import Call
from interp.attention.triton import columns, configs
from interp.attention.triton.configs import Config
from interp.attention.triton.rows import rows_kernel
from interp.attention.triton.statistics import mass_kernel, statistics_kernel
from interp.attention.triton.tables import Arguments, Tables, per_row, strides, visible_lists, with_weights


@dataclass(eq=False)
class Wanted:
    """What one launch is to give.

    Attributes:
        output: z of the heads walked.
        row_stats: top weight and key, entropy, mass per group.
        groups: int8 ``[B|1, Lk]`` for ``mass`` and for ``output`` by group; None is one group.
        n_groups: how many.
        topk, columns, pooled: as in :class:`~interp.attention.readouts.Readout`; these need ``lse``.
        map: probabilities themselves.
        count: visible rows per key instead of anything of p.
        by_group: split the output by key group.
        heads: int64 ``[Hs]``, None for all.
        rows: int64 ``[R]``, None for all.
        lse: natural log-sum-exp ``[B, H, Lq]`` of a finished softmax.
        weights: ``[B|1, H|1, Lq|1, G]`` by the edit's groups, and how they act (see the kernel's WEIGHT).
    """

    output: bool = False
    row_stats: bool = False
    groups: Tensor | None = None
    n_groups: int = 1
    topk: int = 0
    columns: bool = False
    pooled: bool = False
    map: bool = False
    count: bool = False
    by_group: bool = False
    uniform: bool = True
    heads: Tensor | None = None
    rows: Tensor | None = None
    lse: Tensor | None = None
    weights: Tensor | None = None
    weight_kind: int = 0


@dataclass(eq=False)
class Given:
    """What a launch gave, by the names of readings; ``lse`` is there unless it was given."""

    z: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def launch(tables: Tables, wanted: Wanted) -> Given:
    """Run the kernel over a call's rows and heads."""
    call, device = tables.call, tables.call.q.device
    batch, n_heads, n_queries, n_keys = call.shape
    heads = n_heads if wanted.heads is None else len(wanted.heads)
    n_rows = n_queries if wanted.rows is None else len(wanted.rows)
    config = configs.choose(call, wanted, tables)
    a: Arguments = dict(tables.arguments)
    nothing: Tensor = a["q_ptr"]
    if wanted.weights is not None:
        a = with_weights(a, wanted.weights, wanted.weight_kind)
    given = Given()
    uniform = a["UNIFORM"] and wanted.uniform
    fold = tables.plain or (call.scale > 0 and not uniform and _plain_but_for_uniform(a))
    a.update(UNIFORM=uniform, FOLD=fold and a["WEIGHT"] != 1 and not wanted.count)

    def buffer(*shape: int, dtype: torch.dtype = torch.float32, zeros: bool = False) -> Tensor:
        make = torch.zeros if zeros else torch.empty
        return make(shape, dtype=dtype, device=device)

    def keep(name: str, tensor: Tensor) -> Tensor:
        given.tensors[name] = tensor
        return tensor

    lse = wanted.lse
    if lse is None and not wanted.count:
        lse = keep("lse", buffer(batch, n_heads, n_queries))
    a.update(lse_ptr=nothing if lse is None else lse, GIVEN_LSE=wanted.lse is not None)
    a.update(heads_ptr=nothing if wanted.heads is None else wanted.heads, HEAD_LIST=wanted.heads is not None)
    a.update(rows_ptr=nothing if wanted.rows is None else wanted.rows, ROW_LIST=wanted.rows is not None, n_rows=n_rows)
    a.update(n_heads_read=heads)
    _output(a, wanted, given, buffer, heads, n_rows)
    groups = None if wanted.groups is None or not (wanted.row_stats or wanted.by_group) else wanted.groups
    a.update(
        groups_ptr=nothing if groups is None else groups, groups_b=0 if groups is None else strides(groups, 1)[0],
        GROUPS=groups is not None, N_GROUPS=wanted.n_groups, ROW_STATS=wanted.row_stats, **block_table(groups if wanted.row_stats else None, config.bn, nothing),
    )  # fmt: skip
    for name in ("top_weight", "top_key", "entropy", "mass", "share", "topk_weight", "topk_key"):
        a[f"{name}_ptr"] = nothing
    if wanted.row_stats:
        for name in ("top_weight", "entropy"):
            a[f"{name}_ptr"] = keep(name, buffer(batch, heads, n_queries))
        a["top_key_ptr"] = keep("top_key", buffer(batch, heads, n_queries, dtype=torch.int32))
        a["mass_ptr"] = keep("mass", buffer(batch, heads, n_queries, wanted.n_groups))
        a["share_ptr"] = keep("sink_share", buffer(batch, heads, n_queries, zeros=not a["SINKS"]))
    if wanted.topk:
        a["topk_weight_ptr"] = keep("topk_weight", buffer(batch, heads, n_queries, 8))
        a["topk_key_ptr"] = keep("topk_key", buffer(batch, heads, n_queries, 8, dtype=torch.int32))
    a.update(TOPK=wanted.topk)
    n_blocks = -(-n_rows // config.bm)
    reduce = _columns(a, tables, wanted, config, given, buffer, heads, n_blocks)
    a.update(map_ptr=nothing, map_h=0, MAP=wanted.map, COUNT=wanted.count)
    if wanted.map:
        a.update(map_ptr=keep("map", buffer(batch, heads, n_rows, n_keys, zeros=True)), map_h=n_rows * n_keys)
    a.update(lists_ptr=nothing, list_h=0, list_q=0, LISTS=tables.lists and wanted.rows is None)
    if a["LISTS"]:
        lists = visible_lists(call, config.bm, config.bn)
        a.update(lists_ptr=lists, list_h=strides(lists, 1)[0], list_q=lists.stride(1))
    a.update(ALWAYS_MASK=tables.always_mask or wanted.count, PHASES=_phases(a, tables, wanted))
    # Row sums of a tile: online without row-wise weights they are the denominator, else only somebody's wish.
    online = not a["GIVEN_LSE"]
    in_tile = (online and a["WEIGHT"] != 2) or (not online and (wanted.row_stats or wanted.pooled))
    a.update(IN_TILE=in_tile and not wanted.count)
    grid = (batch * heads * n_blocks, wanted.n_groups if wanted.by_group else 1)
    rows_kernel[grid](**a, BM=config.bm, BN=config.bn, num_warps=config.warps, num_stages=config.stages)
    reduce()
    return given


def _plain_but_for_uniform(a: Arguments) -> bool:
    return not (a["SOFTCAP"] or a["BIAS"] or a["BETA"] or a["UNIFORM"] or a["THRESHOLD"])


def _phases(a: Arguments, tables: Tables, wanted: Wanted) -> int:
    """Bit set of the kernel's phases that can be non-empty."""
    if a["LISTS"]:
        return 0b1000
    sink = 0b0001 if a["SINK_WINDOW"] else 0
    if tables.always_mask or wanted.count:
        return sink | 0b1000
    return sink | (0b0010 if a["LEFT"] or a["SINK_WINDOW"] else 0) | 0b1100


def _output(a: Arguments, wanted: Wanted, given: Given, buffer: Any, heads: int, n_rows: int) -> None:
    q: Tensor = a["q_ptr"]
    batch, width = q.shape[0], a["V_DIM"]
    a.update(z_ptr=q, z_b=0, z_h=0, z_m=0, z_g=0, OUTPUT=wanted.output, OUTPUT_GROUPS=wanted.by_group)
    if not wanted.output:
        return
    if wanted.by_group:
        z = buffer(batch, heads, n_rows, wanted.n_groups, width)
        given.tensors["group_output"] = z
        a.update(z_ptr=z, z_b=z.stride(0), z_h=z.stride(1), z_m=z.stride(2), z_g=z.stride(3))
    else:
        z = given.z = torch.empty((batch, n_rows, heads, width), dtype=q.dtype, device=q.device)
        a.update(z_ptr=z, z_b=z.stride(0), z_h=z.stride(2), z_m=z.stride(1))


def _columns(
    a: Arguments, tables: Tables, wanted: Wanted, config: Config, given: Given, buffer: Any, heads: int, n_blocks: int
) -> Any:
    """Buffers of the column sums and the block sums, and the function that finishes them after the launch."""
    call: Call = tables.call
    readout, nothing = call.readout, a["q_ptr"]
    batch, _, n_queries, n_keys = call.shape
    groups = readout.query_groups
    n_groups = readout.n_query_groups if wanted.columns or wanted.count else 1
    a.update(
        query_groups_ptr=nothing if groups is None else groups, query_groups_b=0 if groups is None else strides(groups, 1)[0],
        QUERY_GROUPS=groups is not None, N_QUERY_GROUPS=n_groups, COLUMNS=wanted.columns or wanted.count,
        part_ptr=nothing, part_rows=n_blocks, pool_ptr=nothing, pool_h=0, pool_q=0, POOL=wanted.pooled, POOL_COLS=1, POOL_ROWS=1,
    )  # fmt: skip
    # Where the kernel leaves out tiles by more than causality, windows and padding, the rest of the buffer must be zero.
    zeroed = tables.lists or a["SINK_WINDOW"]
    if a["COLUMNS"]:
        a["part_ptr"] = buffer(batch * heads, n_groups, n_blocks, n_keys, zeros=zeroed)
    edge = call.pooled_edge
    if wanted.pooled:
        tall, wide = min(edge, 16), min(edge, config.bn)
        rows_needed, cols_needed = -(-n_queries // edge) * (edge // tall), -(-n_keys // edge) * (edge // wide)
        pool = buffer(batch * heads, max(rows_needed, n_blocks * (config.bm // tall)), cols_needed, zeros=True)
        a.update(pool_ptr=pool, pool_h=pool.stride(0), pool_q=pool.stride(1), POOL_ROWS=tall, POOL_COLS=wide)

    def finish() -> None:
        if a["COLUMNS"]:
            given.tensors["received"] = _sum_parts(a, a, config, n_blocks, n_groups, batch, heads, bool(zeroed))
        if wanted.pooled:
            summed = _sum_blocks(a["pool_ptr"], call, a["POOL_ROWS"], a["POOL_COLS"])
            given.tensors["pooled"] = summed.unflatten(0, (batch, heads))

    return finish


def has_statistics(tables: Tables, wanted: Wanted) -> bool:
    """Whether :func:`launch_statistics` can give what is wanted: scaled, perhaps softcapped scores under plain masks."""
    a = tables.arguments
    edited = a["BIAS"] or a["DENSE"] or a["UNIFORM"] or a["SINK_WINDOW"] or a["BLOCKS"] or a["N_COORDS"] or a["THRESHOLD"]
    edited = edited or a["N_DROP"] or a["BETA"] or wanted.weights is not None
    edge = tables.call.pooled_edge
    return not edited and not wanted.topk and (not wanted.pooled or edge >= 16)


def launch_statistics(tables: Tables, wanted: Wanted) -> dict[str, Tensor]:
    """Row statistics, column sums and block sums of a finished softmax, by the names of readings."""
    call, device, shared = tables.call, tables.call.q.device, tables.arguments
    batch, n_heads, n_queries, n_keys = call.shape
    heads = n_heads if wanted.heads is None else len(wanted.heads)
    config = configs.choose_statistics(call, tables)
    nothing: Tensor = shared["q_ptr"]
    lse = wanted.lse
    assert lse is not None
    out: dict[str, Tensor] = {}
    groups = wanted.groups if wanted.row_stats else None
    query_groups = call.readout.query_groups
    n_query_groups = call.readout.n_query_groups if wanted.columns else 1
    n_blocks = -(-n_queries // config.bm)
    edge = call.pooled_edge
    across = max(config.bm // edge, 1) if wanted.pooled else 0
    a: Arguments = {name: shared[name] for name in SHARED}
    a.update(
        lse_ptr=lse, heads_ptr=nothing if wanted.heads is None else wanted.heads, HEAD_LIST=wanted.heads is not None,
        n_heads_read=heads, query_groups_ptr=nothing if query_groups is None else query_groups,
        query_groups_b=0 if query_groups is None else strides(query_groups, 1)[0], QUERY_GROUPS=query_groups is not None,
        N_QUERY_GROUPS=n_query_groups, ROW_STATS=wanted.row_stats, COLUMNS=wanted.columns or wanted.pooled, ACROSS=across,
        part_ptr=nothing, n_parts=n_blocks, pool_ptr=nothing, pool_h=0, pool_q=0, top_weight_ptr=nothing, top_key_ptr=nothing,
        entropy_ptr=nothing,
    )  # fmt: skip
    if wanted.row_stats:
        for name in ("top_weight", "entropy"):
            out[name] = a[f"{name}_ptr"] = torch.empty((batch, heads, n_queries), device=device)
        out["top_key"] = a["top_key_ptr"] = torch.empty((batch, heads, n_queries), dtype=torch.int32, device=device)
    if a["COLUMNS"]:
        a["part_ptr"] = torch.empty((batch * heads, n_query_groups, n_blocks, n_keys), device=device)
    if wanted.pooled:
        pool = torch.zeros((batch * heads, n_blocks * across, -(-n_keys // 16)), device=device)
        a.update(pool_ptr=pool, pool_h=pool.stride(0), pool_q=pool.stride(1))
    statistics_kernel[(batch * heads * n_blocks,)](
        **a, BM=config.bm, BN=config.bn, num_warps=config.warps, num_stages=config.stages, **configs.registers(config)
    )
    if wanted.row_stats:
        out.update(_masses(a, shared, wanted, config, n_blocks, groups))
    if wanted.columns:
        out["received"] = _sum_parts(a, shared, config, n_blocks, n_query_groups, batch, heads, False)
    if wanted.pooled:
        tall, wide = config.bm // across, 16
        out["pooled"] = _sum_blocks(a["pool_ptr"], call, tall, wide).unflatten(0, (batch, heads))
    return out


def _masses(
    a: Arguments, shared: Arguments, wanted: Wanted, config: Config, n_blocks: int, groups: Tensor | None
) -> dict[str, Tensor]:
    """``mass`` and ``sink_share`` beside a launch of the statistics kernel."""
    nothing: Tensor = shared["q_ptr"]
    shape = (shared["n_samples"], a["n_heads_read"], shared["n_queries"])
    mass = torch.empty((*shape, wanted.n_groups), device=nothing.device)
    make = torch.empty if shared["SINKS"] else torch.zeros
    share = make(shape, device=nothing.device)
    mass_kernel[(shape[0] * shape[1] * n_blocks,)](
        **{name: shared[name] for name in SHARED}, lse_ptr=a["lse_ptr"], heads_ptr=a["heads_ptr"], HEAD_LIST=a["HEAD_LIST"],
        n_heads_read=shape[1], sinks_ptr=shared["sinks_ptr"], SINKS=shared["SINKS"], mass_ptr=mass, share_ptr=share,
        groups_ptr=nothing if groups is None else groups, groups_b=0 if groups is None else strides(groups, 1)[0],
        GROUPS=groups is not None, N_GROUPS=wanted.n_groups, **block_table(groups, config.bn, nothing),
        BM=config.bm, BN=config.bn, num_warps=4, num_stages=2,
    )  # fmt: skip
    return {"mass": mass, "sink_share": share}


SHARED = (
    "q_ptr", "k_ptr", "q_b", "q_h", "q_m", "k_b", "k_h", "k_n", "scale", "softcap", "n_samples", "n_heads", "n_queries",
    "n_keys", "delta", "kv_offset", "left", "right", "row_scale_ptr", "row_scale_b", "row_scale_h", "row_scale_q",
    "padding_ptr", "padding_b", "first_ptr", "first_b", "HEAD_DIM", "D", "KV_GROUP", "UPCAST", "PRECISION", "CAUSAL", "LEFT",
    "RIGHT", "PADDING", "SOFTCAP", "ROW_SCALE",
)  # fmt: skip
"""Arguments that the statistics kernel has in common with the row-stationary one."""


def _sum_parts(
    a: Arguments, shared: Arguments, config: Config, n_blocks: int, n_groups: int, batch: int, heads: int, zeroed: bool
) -> Tensor:
    """``received [B, Hs, Gq, Lk]`` from the parts that a launch left."""
    n_queries, n_keys = shared["n_queries"], shared["n_keys"]
    received = torch.empty((batch, heads, n_groups, n_keys), device=a["part_ptr"].device)
    columns.sum_parts_kernel[(-(-n_keys // 128), batch * heads * n_groups)](
        a["part_ptr"], received, a["query_groups_ptr"], a["query_groups_b"], shared["first_ptr"], shared["first_b"],
        n_blocks, n_queries, n_keys, heads, shared["delta"], shared["kv_offset"], shared["left"], shared["right"],
        BM=config.bm, BN=config.bn, BK=128, PARTS=8, CAUSAL=shared["CAUSAL"], LEFT=shared["LEFT"], RIGHT=shared["RIGHT"],
        PADDING=shared["PADDING"], ZEROED=zeroed, N_QUERY_GROUPS=n_groups, QUERY_GROUPS=a["QUERY_GROUPS"],
    )  # fmt: skip
    return received


def _sum_blocks(pool: Tensor, call: Call, tall: int, wide: int) -> Tensor:
    """Block sums ``[B * Hs, ceil(Lq / edge), ceil(Lk / edge)]`` from sums of ``tall x wide`` pieces."""
    edge = call.pooled_edge
    n_rows, n_cols = -(-call.shape[2] // edge), -(-call.shape[3] // edge)
    r, c = edge // tall, edge // wide
    short = n_rows * r - pool.shape[1], n_cols * c - pool.shape[2]
    if short[0] > 0 or short[1] > 0:
        pool = torch.nn.functional.pad(pool, (0, max(short[1], 0), 0, max(short[0], 0)))
    pool = pool[:, : n_rows * r, : n_cols * c]
    if r == 1 and c == 1:
        return pool.contiguous()
    return pool.unflatten(1, (n_rows, r)).unflatten(-1, (n_cols, c)).sum((2, 4))


def block_table(groups: Tensor | None, bn: int, nothing: Tensor) -> Arguments:
    """Which blocks of keys are of one group; kept on the groups tensor, which many layers share."""
    if groups is None:
        return {"table_ptr": nothing, "table_b": 0}
    kept: dict[Any, Tensor] = groups.__dict__.setdefault("_interp_block_groups", {})
    key = (bn, groups._version)
    if key not in kept:
        batch, n_keys = groups.shape
        table = torch.empty((batch, 2 * -(-n_keys // bn) + 1), dtype=torch.int16, device=groups.device)
        columns.block_groups_kernel[(batch,)](groups, groups.stride(0), table, n_keys, BN=bn)
        kept[key] = table
    table = kept[key]
    return {"table_ptr": table, "table_b": strides(table, 1)[0]}


__all__ = ["Given", "Wanted", "block_table", "launch", "per_row"]
