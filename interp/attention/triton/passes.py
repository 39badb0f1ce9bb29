"""Passes of the row-stationary kernel: prepared once for a kind of call, then run on the tensors of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from interp.attention.edits import Redistribute
from interp.attention.readouts import Distances
from interp.attention.triton import configs
from interp.attention.triton.group_tiles import GroupTiles, group_table
from interp.attention.triton.launching import Arguments, Launch, placeholder
from interp.attention.triton.rows import rows_kernel
from interp.attention.triton.summing import SumBlocks, SumParts, spans
from interp.attention.triton.tables import Tables, per_row, strides, visible_lists

FAR = 2**31
"""Elements behind the first key of its head from which a key's place needs 64 bits."""


@dataclass(eq=False)
class Wanted:
    """What one pass is to give.

    Attributes:
        output: z of the heads walked.
        row_stats: top weight and key, entropy, mass per group.
        groups: int8 ``[B|1, Lk]`` for ``mass`` and for ``output`` by group; None is one group.
        n_groups: how many.
        topk, columns, pooled, distance: as in :class:`~interp.attention.readouts.Readout`; these need ``given``.
        map: probabilities themselves.
        dirty: tiles of the map that no row sees are left as they come; else they are 0.
        count: visible rows per key instead of anything of p.
        by_group: split the output by key group.
        uniform: apply the edit's uniform rows.
        heads: int64 ``[Hs]``, None for all.
        rows: int64 ``[R]``, None for all.
        given: the softmax is finished: its log-sum-exp comes with each call.
        move: the redistribution to apply in the same walk.
        weights: how row-wise group weights act (the kernel's WEIGHT); 0 for none.
    """

    output: bool = False
    row_stats: bool = False
    groups: Tensor | None = None
    n_groups: int = 1
    topk: int = 0
    columns: bool = False
    pooled: bool = False
    distance: Distances | None = None
    map: bool = False
    dirty: bool = False
    count: bool = False
    by_group: bool = False
    uniform: bool = True
    heads: Tensor | None = None
    rows: Tensor | None = None
    given: bool = False
    move: Redistribute | None = None
    weights: int = 0


class Live(NamedTuple):
    """The tensors that change from call to call: operands, and what earlier passes gave.

    ``lse`` is ``[B, H, Lq]`` (natural), ``weights`` ``[B|1, H|1, Lq|1, G]`` fp32, contiguous; ``groups`` are the key groups
    of a redistribution where they differ from those that its pass was made with.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None
    bias: Tensor | None = None
    lse: Tensor | None = None
    weights: Tensor | None = None
    groups: Tensor | None = None


class Buffer(NamedTuple):
    """A tensor that a kernel fills: its argument, the reading it becomes, shape, dtype, whether it must start as zeros."""

    argument: str
    reading: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    zeros: bool = False

    def make(self, device: torch.device) -> Tensor:
        make = torch.zeros if self.zeros else torch.empty
        return make(self.shape, dtype=self.dtype, device=device)


class Pass:
    """A launch of the row-stationary kernel over a call's rows and heads."""

    def __init__(self, shared: Tables, wanted: Wanted) -> None:
        call, device = shared.call, shared.device
        batch, n_heads, n_queries, n_keys = call.shape
        heads = n_heads if wanted.heads is None else len(wanted.heads)
        n_rows = n_queries if wanted.rows is None else len(wanted.rows)
        self.device, self.wanted = device, wanted
        self.buffers: list[Buffer] = []
        self.parts: SumParts | None = None
        self.blocks: SumBlocks | None = None
        config = configs.choose(call, wanted, shared)
        nothing = placeholder(device)
        a: Arguments = dict(shared.arguments)
        lists = shared.lists and wanted.rows is None
        a.update(
            GIVEN_LSE=wanted.given, WEIGHT=wanted.weights, heads_ptr=nothing if wanted.heads is None else wanted.heads,
            HEAD_LIST=wanted.heads is not None, rows_ptr=nothing if wanted.rows is None else wanted.rows,
            ROW_LIST=wanted.rows is not None, n_rows=n_rows, n_heads_read=heads, UNIFORM=a["UNIFORM"] and wanted.uniform,
            MAP=wanted.map, COUNT=wanted.count, TOPK=wanted.topk, ROW_STATS=wanted.row_stats, N_GROUPS=wanted.n_groups,
            OUTPUT=wanted.output, OUTPUT_GROUPS=wanted.by_group, map_h=n_rows * n_keys, LISTS=lists,
            lists_ptr=nothing, list_h=0, list_q=0,
        )  # fmt: skip
        if wanted.weights:
            a.update(EDIT_GROUPS=call.edit.key_groups)
        else:
            a.update(per_row("weight", None, nothing))
        a.update(MASS=wanted.row_stats or wanted.move is not None)
        _move(a, shared, wanted)
        _places(a, wanted.distance, nothing)
        groups = wanted.groups if a["MASS"] or wanted.by_group else None
        a.update(
            groups_ptr=nothing if groups is None else groups, groups_b=0 if groups is None else strides(groups, 1)[0],
            GROUPS=groups is not None,
        )  # fmt: skip
        self.group_tiles: GroupTiles | None = None
        self.of_groups: dict[str, Tensor] = {}
        if wanted.move is not None:
            assert groups is not None
            self.group_tiles = GroupTiles(groups, config.bn, a["SOURCE"], a["TARGET"])
            self.of_groups = _of_groups(groups, self.group_tiles)
            table_b = strides(self.of_groups["table_ptr"], 1)[0]
            a.update(self.of_groups, table_b=table_b, edit_table_b=table_b)
        else:
            a.update(group_table(groups if a["MASS"] else None, config.bn, nothing))
            edit_groups: Tensor = a["edit_groups_ptr"]
            edit_table = group_table(edit_groups if a["EDIT_GROUPS"] else None, config.bn, nothing)
            a.update(edit_table_ptr=edit_table["table_ptr"], edit_table_b=edit_table["table_b"])
        if lists:
            table = visible_lists(call, config.bm, config.bn, device)
            a.update(lists_ptr=table, list_h=strides(table, 1)[0], list_q=table.stride(1))
        a.update(ALWAYS_MASK=shared.always_mask or wanted.count)
        a.update(_phases(a, wanted))
        a.update(FOLD=shared.scaled_only(a["UNIFORM"]) and wanted.weights != 1 and not wanted.count)
        reach = (n_keys + config.bn) * max(a["k_n"], a["v_n"]) + max(a["D"], a["DV"])
        a.update(FAR=reach >= FAR or config.wide == 1)
        # Row sums of a tile: online without row-wise weights they are the denominator, else only somebody's wish.
        in_tile = wanted.row_stats or wanted.pooled if wanted.given else wanted.weights != 2
        a.update(IN_TILE=bool(in_tile) and not wanted.count)
        self._outputs(a, batch, n_heads, heads, n_queries, n_rows, n_keys)
        n_blocks = -(-n_rows // config.bm)
        walked = self._columns(a, shared, config, heads, n_blocks)
        for name in POINTERS:
            a.setdefault(f"{name}_ptr", nothing)
        live = {"q_ptr", "k_ptr", "v_ptr", *(buffer.argument for buffer in self.buffers)}
        live |= {f"{x}_ptr" for x, used in (("sinks", a["SINKS"]), ("bias", a["BIAS"])) if used}
        live |= {"lse_ptr"} if wanted.given else set()
        live |= {"weight_ptr"} if wanted.weights else set()
        live |= self.of_groups.keys()
        self.live = live
        fixed = {name: value for name, value in a.items() if name not in live}
        self.launches = [
            Launch(
                rows_kernel, (batch * heads * (stop - first), wanted.n_groups if wanted.by_group else 1),
                {**fixed, "part_rows": stop - first, "first_block": first}, BM=config.bm, BN=config.bn,
                num_warps=config.warps, num_stages=config.stages,
            )
            for first, stop in walked
        ]  # fmt: skip

    def _outputs(
        self, a: Arguments, batch: int, n_heads: int, heads: int, n_queries: int, n_rows: int, n_keys: int
    ) -> None:
        wanted, rows = self.wanted, (batch, heads, n_queries)
        if not wanted.given and not wanted.count:
            self.buffers.append(Buffer("lse_ptr", "lse", (batch, n_heads, n_queries)))
        if wanted.row_stats:
            self.buffers += [
                Buffer("top_weight_ptr", "top_weight", rows),
                Buffer("top_key_ptr", "top_key", rows, torch.int32),
                Buffer("entropy_ptr", "entropy", rows),
                Buffer("mass_ptr", "mass", (*rows, wanted.n_groups)),
                Buffer("share_ptr", "sink_share", rows, zeros=not a["SINKS"]),
            ]
        if wanted.topk:
            self.buffers.append(Buffer("topk_weight_ptr", "topk_weight", (*rows, 8)))
            self.buffers.append(Buffer("topk_key_ptr", "topk_key", (*rows, 8), torch.int32))
        if wanted.distance is not None:
            self.buffers.append(Buffer("distance_ptr", "distance", rows))
            self.buffers.append(Buffer("distance_mass_ptr", "distance_mass", rows))
        if wanted.map:
            self.buffers.append(Buffer("map_ptr", "map", (batch, heads, n_rows, n_keys), zeros=not wanted.dirty))
        a.update(z_b=0, z_h=0, z_m=0, z_g=0)
        width, dtype = a["V_DIM"], a["v_dtype"]
        if wanted.output and wanted.by_group:
            self.buffers.append(Buffer("z_ptr", "group_output", (batch, heads, n_rows, wanted.n_groups, width)))
            per_row_size = wanted.n_groups * width
            a.update(z_b=heads * n_rows * per_row_size, z_h=n_rows * per_row_size, z_m=per_row_size, z_g=width)
        elif wanted.output:
            self.buffers.append(Buffer("z_ptr", "z", (batch, n_rows, heads, width), dtype))
            a.update(z_b=n_rows * heads * width, z_h=width, z_m=heads * width)
        a.pop("v_dtype")

    def _columns(
        self, a: Arguments, shared: Tables, config: configs.Config, heads: int, n_blocks: int
    ) -> list[tuple[int, int]]:
        """Buffers of column and block sums; the spans of row blocks to walk one after the other."""
        call, wanted = shared.call, self.wanted
        batch, _, n_queries, n_keys = call.shape
        columns, walked = wanted.columns or wanted.count, [(0, n_blocks)]
        groups = call.readout.query_groups
        n_groups = call.readout.n_query_groups if columns else 1
        a.update(
            query_groups_ptr=placeholder(self.device) if groups is None else groups,
            query_groups_b=0 if groups is None else strides(groups, 1)[0], QUERY_GROUPS=groups is not None,
            N_QUERY_GROUPS=n_groups, COLUMNS=columns, pool_h=0, pool_q=0, POOL=wanted.pooled, POOL_COLS=1,
            POOL_ROWS=1,
        )  # fmt: skip
        if columns:
            # Where tiles are left out by more than causality, windows and padding, the rest of the buffer must be zero.
            zeroed = shared.lists or a["SINK_WINDOW"]
            walked = spans(n_blocks, batch * heads * n_groups * n_keys * 4)
            self.buffers.append(Buffer("part_ptr", "", (batch * heads, n_groups, walked[0][1], n_keys), zeros=zeroed))
            self.parts = SumParts(a, config, n_blocks, n_groups, batch, heads, zeroed)
        if wanted.pooled:
            edge = call.pooled_edge
            tall, wide = min(edge, 16), min(edge, config.bn)
            shape = (batch * heads, n_blocks * (config.bm // tall), -(-n_keys // wide))
            self.buffers.append(Buffer("pool_ptr", "", shape, zeros=True))
            self.blocks = SumBlocks(edge, tall, wide, n_queries, n_keys, (batch, heads))
            a.update(pool_h=shape[1] * shape[2], pool_q=shape[2], POOL_ROWS=tall, POOL_COLS=wide)
        return walked

    def __call__(self, x: Live) -> dict[str, Tensor]:
        """Launch; the tensors by the names of readings, and ``z [B, Lq, H, Dv]``."""
        made = {buffer.argument: buffer.make(self.device) for buffer in self.buffers}
        live: dict[str, Tensor] = {"q_ptr": x.q, "k_ptr": x.k, "v_ptr": x.v, **made}
        given = {"sinks_ptr": x.sinks, "bias_ptr": x.bias, "lse_ptr": x.lse, "weight_ptr": x.weights}
        live.update({name: t for name, t in given.items() if name in self.live and name not in made and t is not None})
        if self.group_tiles is not None:
            live.update(self.of_groups if x.groups is None else _of_groups(x.groups, self.group_tiles))
        if x.weights is not None and self.wanted.weights:
            # Their strides follow from which axes are 1 wide, which an operation's own tensors decide once and for all.
            sizes = {k: v for k, v in per_row("weight", x.weights, x.weights).items() if k != "weight_ptr"}
            for launch in self.launches:
                launch.fixed.update(sizes)
        sums = {} if self.parts is None else self.parts.begin(self.device)
        for span, launch in enumerate(self.launches):
            if self.parts is not None and span and self.parts.zeroed:
                made["part_ptr"].zero_()
            launch(live)
            if self.parts is not None:
                self.parts.add(span, made["part_ptr"], sums)
        out = {buffer.reading: made[buffer.argument] for buffer in self.buffers if buffer.reading}
        if self.parts is not None:
            out.update(self.parts.end(sums))
        if self.blocks is not None:
            out.update(self.blocks(made))
        return out


def _of_groups(groups: Tensor, tiles: GroupTiles) -> dict[str, Tensor]:
    """What of a redistribution's arguments follows from its key groups: layers may differ in these alone."""
    table = tiles(groups)
    return {"groups_ptr": groups, "table_ptr": table, "edit_groups_ptr": groups, "edit_table_ptr": table}


def _move(a: Arguments, shared: Tables, wanted: Wanted) -> None:
    """Arguments of a redistribution: its sets of groups as bits, its fraction by row."""
    nothing, op = placeholder(shared.device), wanted.move
    a.update(MOVE=op is not None, SOURCE=0, TARGET=0, GATE_MASS=0, GATE_SHARE=0, summ=0.0, rho=0.0)
    a.update(per_row("fraction", None, nothing))
    if op is None:
        return
    bits = {name: sum(1 << g for g in getattr(op, name)) for name in ("source", "target", "gate_mass", "gate_share")}
    assert wanted.groups is not None
    assert shared.fraction is not None
    a.update(
        {name.upper(): value for name, value in bits.items()}, summ=op.summ, rho=op.rho, EDIT_GROUPS=wanted.n_groups
    )
    a.update(per_row("fraction", shared.fraction, nothing))


def _places(a: Arguments, asked: Distances | None, nothing: Tensor) -> None:
    """Arguments of distances: coordinates as int32, side by side for each place."""
    a.update(query_places_ptr=nothing, query_places_b=0, key_places_ptr=nothing, key_places_b=0, DISTANCE=0, HOP=False)
    if asked is None:
        return
    queries, keys = (x.to(torch.int32).contiguous() for x in (asked.query_coords, asked.key_coords))
    a.update(query_places_ptr=queries, query_places_b=strides(queries, 1)[0], DISTANCE=queries.shape[-1], HOP=asked.hop)
    a.update(key_places_ptr=keys, key_places_b=strides(keys, 1)[0])


POINTERS = (
    "z", "lse", "top_weight", "top_key", "entropy", "mass", "share", "topk_weight", "topk_key", "part", "pool", "map",
    "distance", "distance_mass", "sinks", "bias", "weight",
)  # fmt: skip
"""Pointers that a launch may do without."""


def _phases(a: Arguments, wanted: Wanted) -> Arguments:
    """Bit set of the kernel's phases that can be non-empty, and whether the edges of what is visible share one."""
    again = 0b100000 if wanted.move is not None else 0
    if a["LISTS"]:
        return {"PHASES": again | 0b1000, "MERGED": False}
    edges = a["LEFT"] or a["SINK_WINDOW"]
    # The largest k are found in the order of the keys: of equals the lowest stay.
    merged = bool(edges and not wanted.topk and not (a["ALWAYS_MASK"] and not a["SINK_WINDOW"]))
    early = 0b10 if edges and wanted.topk else 0
    if a["ALWAYS_MASK"]:
        return {"PHASES": again | early | 0b1000, "MERGED": merged}
    return {"PHASES": again | early | (0b1 if again else 0) | 0b1100, "MERGED": merged}


__all__ = ["Live", "Pass", "Wanted"]
