"""The pass of the statistics kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from interp.attention.triton import configs
from interp.attention.triton.group_tiles import group_table
from interp.attention.triton.launching import Arguments, Launch, placeholder
from interp.attention.triton.passes import Buffer, Live, Wanted
from interp.attention.triton.statistics import statistics_kernel
from interp.attention.triton.summing import SumBlocks, SumParts, spans
from interp.attention.triton.tables import Tables, strides

SLAB = 16
"""Keys of a slab of a matrix product's result, over which sums need no exchange between warps."""

MASS_BN = 32
"""Keys of a tile of the table of groups: most groups are small, and fewer keys take fewer registers."""

SHARED = (
    "q_b", "q_h", "q_m", "k_b", "k_h", "k_n", "scale", "softcap", "n_samples", "n_heads", "n_queries", "n_keys", "delta",
    "kv_offset", "left", "right", "row_scale_ptr", "row_scale_b", "row_scale_h", "row_scale_q", "padding_ptr", "padding_b",
    "first_ptr", "first_b", "HEAD_DIM", "D", "KV_GROUP", "UPCAST", "PRECISION", "CAUSAL", "LEFT", "RIGHT", "PADDING",
    "SOFTCAP", "ROW_SCALE",
)  # fmt: skip
"""Arguments in common with the row-stationary kernel."""

POINTERS = ("top_weight", "top_key", "entropy", "mass", "share", "part", "pool", "sinks")
"""Pointers that a launch may do without."""


def covers(shared: Tables, wanted: Wanted) -> bool:
    """Whether this pass can give what is wanted: of scaled, perhaps softcapped scores under plain masks."""
    a = shared.arguments
    edited = (
        a["BIAS"] or a["DENSE"] or a["UNIFORM"] or a["SINK_WINDOW"] or a["BLOCKS"] or a["N_COORDS"] or a["THRESHOLD"]
    )
    edited = edited or a["N_DROP"] or a["BETA"] or wanted.weights
    return not edited and not wanted.topk


class StatisticsPass:
    """Row statistics, column sums and block sums of a finished softmax."""

    def __init__(self, shared: Tables, wanted: Wanted) -> None:
        call, device = shared.call, shared.device
        batch, n_heads, n_queries, n_keys = call.shape
        heads = n_heads if wanted.heads is None else len(wanted.heads)
        config = configs.choose_statistics(call, shared)
        nothing = placeholder(device)
        self.device, self.wanted = device, wanted
        self.buffers: list[Buffer] = []
        self.parts: SumParts | None = None
        self.blocks: SumBlocks | None = None
        n_blocks, edge = -(-n_queries // config.bm), call.pooled_edge
        # Where a block of the pooled map holds whole blocks of rows, it is summed from the parts of the columns.
        from_parts = wanted.pooled and edge >= config.bm
        across = config.bm // edge if wanted.pooled and not from_parts else 0
        query_groups = call.readout.query_groups
        columns = wanted.columns or wanted.pooled
        n_query_groups = call.readout.n_query_groups if columns else 1
        a: Arguments = {name: shared.arguments[name] for name in SHARED}
        a.update(
            heads_ptr=nothing if wanted.heads is None else wanted.heads,
            HEAD_LIST=wanted.heads is not None,
            n_heads_read=heads,
        )
        own: Arguments = {
            "query_groups_ptr": nothing if query_groups is None else query_groups,
            "query_groups_b": 0 if query_groups is None else strides(query_groups, 1)[0],
            "QUERY_GROUPS": query_groups is not None, "N_QUERY_GROUPS": n_query_groups, "ROW_STATS": wanted.row_stats,
            "COLUMNS": columns, "ACROSS": across, "WIDE": min(edge, SLAB), "pool_h": 0, "pool_q": 0,
        }  # fmt: skip
        rows = (batch, heads, n_queries)
        groups = wanted.groups if wanted.row_stats else None
        mass_bn = min(config.bn, MASS_BN)
        self.sinks = wanted.row_stats and shared.arguments["SINKS"]
        own.update(
            SINKS=self.sinks, GROUPS=groups is not None, N_GROUPS=wanted.n_groups if wanted.row_stats else 1,
            groups_ptr=nothing if groups is None else groups, groups_b=0 if groups is None else strides(groups, 1)[0],
            **group_table(groups, mass_bn, nothing), MASS_BN=mass_bn,
            # Of SDPA's time with everything: 2.55 for 2.70 before the walk at 257 tokens, 1.90 for 1.96 after it at 8192.
            MASS_FIRST=n_queries <= configs.FEW,
        )  # fmt: skip
        if wanted.row_stats:
            self.buffers += [
                Buffer("top_weight_ptr", "top_weight", rows),
                Buffer("top_key_ptr", "top_key", rows, torch.int32),
                Buffer("entropy_ptr", "entropy", rows),
                Buffer("mass_ptr", "mass", (*rows, wanted.n_groups)),
                Buffer("share_ptr", "sink_share", rows),
            ]
        walked = [(0, n_blocks)]
        if columns:
            walked = spans(n_blocks, batch * heads * n_query_groups * n_keys * 4)
            self.buffers.append(Buffer("part_ptr", "", (batch * heads, n_query_groups, walked[0][1], n_keys)))
        if wanted.columns or from_parts:
            self.parts = SumParts(
                {**a, **own}, config, n_blocks, n_query_groups, batch, heads, False, edge=edge if from_parts else 0,
                received=wanted.columns,
            )  # fmt: skip
        if across:
            shape = (batch * heads, -(-n_queries // (config.bm // across)), -(-n_keys // min(edge, SLAB)))
            masked = a["CAUSAL"] or a["LEFT"] or a["RIGHT"] or a["PADDING"]
            self.buffers.append(Buffer("pool_ptr", "", shape, zeros=masked))
            own.update(pool_h=shape[1] * shape[2], pool_q=shape[2])
            self.blocks = SumBlocks(edge, config.bm // across, min(edge, SLAB), n_queries, n_keys, (batch, heads))
        live = {"q_ptr", "k_ptr", "lse_ptr", *(buffer.argument for buffer in self.buffers)}
        if self.sinks:
            live.add("sinks_ptr")
        for name in POINTERS:
            own.setdefault(f"{name}_ptr", nothing)
        fixed = {name: value for name, value in {**a, **own}.items() if name not in live}
        self.launches = [
            Launch(
                statistics_kernel, (batch * heads * (stop - first),), {**fixed, "n_parts": stop - first, "first_block": first},
                BM=config.bm, BN=config.bn, num_warps=config.warps, num_stages=config.stages, **configs.registers(config),
            )
            for first, stop in walked
        ]  # fmt: skip

    def __call__(self, x: Live) -> dict[str, Tensor]:
        """Launch; tensors by the names of readings."""
        assert x.lse is not None
        made = {buffer.argument: buffer.make(self.device) for buffer in self.buffers}
        live = {"q_ptr": x.q, "k_ptr": x.k, "lse_ptr": x.lse, **made}
        if self.sinks and x.sinks is not None:
            live["sinks_ptr"] = x.sinks
        out = {buffer.reading: made[buffer.argument] for buffer in self.buffers if buffer.reading}
        sums = {} if self.parts is None else self.parts.begin(self.device)
        for span, launch in enumerate(self.launches):
            launch(live)
            if self.parts is not None:
                self.parts.add(span, made["part_ptr"], sums)
        if self.parts is not None:
            out.update(self.parts.end(sums))
        if self.blocks is not None:
            out.update(self.blocks(made))
        return out
