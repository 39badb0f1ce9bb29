"""What follows a launch: partial column sums and block sums are added up. Also the table of key groups by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.attention.triton import columns
from interp.attention.triton.configs import Config
from interp.attention.triton.launching import Arguments, Launch
from interp.attention.triton.tables import strides


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
        fixed = {name: a[name] for name in (*names, *flags)}
        fixed.update(
            groups_b=a["query_groups_b"], n_parts=n_blocks, n_heads=heads, BM=config.bm, BN=config.bn, BK=wide,
            ZEROED=bool(zeroed), N_QUERY_GROUPS=n_groups, BLOCKS=edge > 0, RECEIVED=received,
        )  # fmt: skip
        # Parts of one chunk belong to one row of the pooled map.
        chunk = min(edge // config.bm, 16) if edge else 8
        fixed["PARTS"] = chunk
        self.received = received
        self.n_chunks, self.n_cols = -(-n_blocks // chunk), -(-n_keys // wide)
        self.blocks = SumBlocks(edge, chunk * config.bm, wide, a["n_queries"], n_keys, (batch, heads)) if edge else None
        self.launch = Launch(columns.sum_parts_kernel, (-(-n_keys // wide), batch * heads * n_groups), fixed)

    def __call__(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        device = made["part_ptr"].device
        received = torch.empty(self.shape if self.received else (1,), device=device)
        batch, heads, n_groups, _ = self.shape
        pool = torch.zeros(
            (batch * heads, n_groups, self.n_chunks, self.n_cols) if self.blocks is not None else (1,), device=device
        )
        self.launch({"part_ptr": made["part_ptr"], "out_ptr": received, "pool_ptr": pool})
        out = {"received": received} if self.received else {}
        if self.blocks is not None:
            out.update(self.blocks({"pool_ptr": pool.sum(1) if n_groups > 1 else pool[:, 0]}))
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


def block_table(groups: Tensor | None, bn: int, nothing: Tensor) -> Arguments:
    """Which blocks of keys are of one group; kept on the groups tensor, which many layers share."""
    if groups is None:
        return {"table_ptr": nothing, "table_b": 0}
    kept: dict[Any, Tensor] = vars(groups).setdefault("_interp_block_groups", {})
    key = (bn, groups._version)
    if key not in kept:
        batch, n_keys = groups.shape
        table = torch.empty((batch, 2 * -(-n_keys // bn) + 1), dtype=torch.int16, device=groups.device)
        fixed: Arguments = {"groups_b": groups.stride(0), "n_keys": n_keys, "BN": bn}
        Launch(columns.block_groups_kernel, (batch,), fixed)({"groups_ptr": groups, "out_ptr": table})
        kept[key] = table
    table = kept[key]
    return {"table_ptr": table, "table_b": strides(table, 1)[0]}


def moved_tiles(groups: Tensor, touched: int, bn: int, nothing: Tensor) -> Tensor:
    """Tiles of keys with a group of ``touched`` (bits) in them, int32 ``[B|1, 2 n + 1]`` for n tiles.

    First how many of them lie before tile 0, 1, ... n, then their numbers. Kept on the groups tensor.
    """
    table = block_table(groups, bn, nothing)["table_ptr"]
    kept: dict[Any, Tensor] = vars(groups)["_interp_block_groups"]
    key = (bn, groups._version, touched)
    if key not in kept:
        n_tiles = table.shape[1] // 2
        only = table[:, :n_tiles].int()
        inside = (only < 0) | ((touched >> only.clamp_min(0)) & 1).bool()
        before = torch.nn.functional.pad(inside.int().cumsum(1, dtype=torch.int32), (1, 0))
        number = torch.arange(n_tiles, device=groups.device, dtype=torch.int32)
        order = torch.where(inside, number, n_tiles).sort(1).values
        kept[key] = torch.cat([before, order], 1).int().contiguous()
    return kept[key]
