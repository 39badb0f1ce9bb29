"""What follows a launch: partial column sums and block sums are added up. Also the table of key groups by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.attention.edits import MAX_GROUPS
from interp.attention.triton import columns
from interp.attention.triton.configs import Config
from interp.attention.triton.launching import Arguments, Launch
from interp.attention.triton.tables import strides

PART_BYTES = 512 << 20
"""Largest buffer of partial column sums. Above it rows are walked in spans, so that memory stays linear in the keys."""
CHUNK = 16
"""Parts added up at a time; spans are whole chunks."""


def spans(n_blocks: int, bytes_a_block: int) -> list[tuple[int, int]]:
    """Half-open ranges of row blocks whose parts fit into the buffer together."""
    step = max(PART_BYTES // bytes_a_block // CHUNK, 1) * CHUNK
    return [(first, min(first + step, n_blocks)) for first in range(0, n_blocks, step)]


class SumParts:
    """``received [B, Hs, Gq, Lk]`` from the parts ``[B * Hs, Gq, blocks, Lk]`` that a launch leaves in ``part_ptr``.

    With ``edge`` (a multiple of a block's rows) also ``pooled`` on that edge.
    """

    def __init__(
        self, a: Arguments, config: Config, n_blocks: int, n_groups: int, batch: int, heads: int, zeroed: bool, *,
        edge: int = 0, received: bool = True,
    ) -> None:  # fmt: skip
        n_keys = a["n_keys"]
        wide = min(edge, 128) if edge else 128
        self.shape = (batch, heads, n_groups, n_keys)
        names = (
            "query_groups_ptr",
            "first_ptr",
            "first_b",
            "n_queries",
            "n_keys",
            "delta",
            "kv_offset",
            "left",
            "right",
        )
        flags = ("CAUSAL", "LEFT", "RIGHT", "PADDING", "QUERY_GROUPS")
        # Parts of one chunk belong to one row of the pooled map.
        chunk = min(edge // config.bm, CHUNK) if edge else 8
        self.received, self.zeroed = received, bool(zeroed)
        self.n_chunks, self.n_cols = -(-n_blocks // chunk), -(-n_keys // wide)
        self.blocks = SumBlocks(edge, chunk * config.bm, wide, a["n_queries"], n_keys, (batch, heads)) if edge else None
        fixed = {name: a[name] for name in (*names, *flags)}
        fixed.update(
            groups_b=a["query_groups_b"], n_heads=heads, n_chunks=self.n_chunks, n_cols=self.n_cols, BM=config.bm, BN=config.bn, BK=wide,
            PARTS=chunk, ZEROED=bool(zeroed), N_QUERY_GROUPS=n_groups, BLOCKS=edge > 0, RECEIVED=received,
        )  # fmt: skip
        grid = (self.n_cols * batch * heads * n_groups,)
        self.launches = [
            Launch(
                columns.sum_parts_kernel,
                grid,
                {**fixed, "n_parts": stop - first, "first_block": first, "ADD": first > 0},
            )
            for first, stop in spans(n_blocks, batch * heads * n_groups * n_keys * 4)
        ]

    def begin(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors that the spans add to."""
        batch, heads, n_groups, _ = self.shape
        pool = (batch * heads, n_groups, self.n_chunks, self.n_cols) if self.blocks is not None else (1,)
        received = torch.empty(self.shape if self.received else (1,), device=device)
        return {"out_ptr": received, "pool_ptr": torch.zeros(pool, device=device)}

    def add(self, span: int, part: Tensor, sums: dict[str, Tensor]) -> None:
        """Add up what the launch over a span of row blocks left."""
        self.launches[span]({"part_ptr": part, **sums})

    def end(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The readings."""
        out = {"received": sums["out_ptr"]} if self.received else {}
        if self.blocks is not None:
            out.update(self.blocks({"pool_ptr": sums["pool_ptr"].sum(1)}))
        return out


class SumBlocks:
    """``pooled [B, Hs, ceil(Lq / edge), ceil(Lk / edge)]`` from sums over ``tall`` rows and ``wide`` keys in ``pool_ptr``."""

    def __init__(self, edge: int, tall: int, wide: int, n_queries: int, n_keys: int, leading: tuple[int, int]) -> None:
        self.rows, self.cols = -(-n_queries // edge), -(-n_keys // edge)
        self.tall, self.wide = edge // tall, edge // wide
        self.leading = leading

    def __call__(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        pool = made["pool_ptr"]
        rows, cols = self.rows * self.tall, self.cols * self.wide
        short = rows - pool.shape[1], cols - pool.shape[2]
        if short[0] > 0 or short[1] > 0:
            pool = torch.nn.functional.pad(pool, (0, max(short[1], 0), 0, max(short[0], 0)))
        pool = pool[:, :rows, :cols]
        if self.tall > 1 or self.wide > 1:
            pool = pool.unflatten(1, (self.rows, self.tall)).unflatten(-1, (self.cols, self.wide)).sum((2, 4))
        return {"pooled": pool.contiguous().unflatten(0, self.leading)}


def _kept(groups: Tensor) -> dict[Any, Tensor]:
    """What is kept on a groups tensor, which many layers share; one made in inference mode does not tell when it changes."""
    if groups.is_inference():
        return {}
    kept = vars(groups).get("_interp_tables")
    if kept is None or kept[0] != groups._version:
        kept = vars(groups)["_interp_tables"] = (groups._version, {})
    return kept[1]


def block_table(groups: Tensor | None, bn: int, nothing: Tensor) -> Arguments:
    """Which blocks of ``bn`` keys are of one group, int32 ``[B|1, 2 n + 1]`` for n blocks.

    First the group of each block, -2 where it holds several. Then the group with most blocks of its own, the "rest". Then for
    each block how many from it on are of the rest, or minus how many are not.
    """
    if groups is None:
        return {"table_ptr": nothing, "table_b": 0}
    kept = _kept(groups)
    if bn not in kept:
        short = -groups.shape[1] % bn
        blocks = torch.cat([groups, groups[:, -1:].expand(-1, short)], 1) if short else groups
        blocks = blocks.unflatten(1, (-1, bn))
        lowest, highest = blocks.amin(2).int(), blocks.amax(2).int()
        only = torch.where(lowest == highest, lowest, -2)
        numbers = torch.arange(MAX_GROUPS, device=groups.device, dtype=torch.int32)
        count = (only.unsqueeze(-1) == numbers).sum(1)
        rest = torch.where(count == count.amax(1, keepdim=True), numbers, MAX_GROUPS).amin(1, keepdim=True).int()
        of_rest = only == rest
        run = (_ends(of_rest) - torch.arange(only.shape[1], device=groups.device)).int()
        kept[bn] = torch.cat([only, rest, torch.where(of_rest, run, -run)], 1).contiguous()
    table = kept[bn]
    return {"table_ptr": table, "table_b": strides(table, 1)[0]}


def moved_tiles(groups: Tensor, table: Tensor, source: int, target: int, bn: int) -> Tensor:
    """Tiles of keys with a source or target group (given as bits) in them, int32 ``[B|1, 2 n + 4]`` for n tiles.

    ``table`` is the :func:`block_table` of these groups.

    First how many of them lie before tile 0, 1, ... n, then their numbers; then the longest run of tiles that are nothing but
    target, or nothing but source: its first tile, the tile after its last, and 1 or 2 for which. Kept on the groups tensor.
    """
    kept, key = _kept(groups), (bn, source, target)
    if key not in kept:
        n_tiles = table.shape[1] // 2
        only = table[:, :n_tiles]
        number = torch.arange(n_tiles, device=groups.device, dtype=torch.int32)
        of = lambda bits: (only >= 0) & ((bits >> only.clamp_min(0)) & 1).bool()  # noqa: E731
        inside = (only == -2) | of(source | target)
        before = torch.nn.functional.pad(inside.int().cumsum(1, dtype=torch.int32), (1, 0))
        order = torch.where(inside, number, n_tiles).sort(1).values
        part = of(target).int() + 2 * of(source).int()
        length = torch.where(part > 0, _ends(part) - number, 0)
        first = length.argmax(1, keepdim=True)
        run = [first, first + length.gather(1, first), part.gather(1, first)]
        kept[key] = torch.cat([before, order, *run], 1).int().contiguous()
    return kept[key]


def _ends(kinds: Tensor) -> Tensor:
    """For each block ``[B, n]`` the number of the first one after it that is of another kind, n where there is none."""
    n = kinds.shape[1]
    number = torch.arange(1, n + 1, device=kinds.device)
    last = torch.nn.functional.pad(kinds[:, 1:] != kinds[:, :-1], (0, 1), value=True)
    return torch.where(last, number, n).flip(1).cummin(1).values.flip(1)
