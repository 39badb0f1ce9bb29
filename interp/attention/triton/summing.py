"""What follows a launch: partial column sums and block sums are added up."""

from __future__ import annotations

import torch
from torch import Tensor

from interp.attention.triton import columns
from interp.attention.triton.configs import Config
from interp.attention.triton.launching import Arguments, Launch, placeholder

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
        wide = min(edge, 256) if edge else 128
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
        chunk = min(edge // config.bm, CHUNK) if edge else CHUNK
        self.received, self.zeroed = received, bool(zeroed)
        self.n_chunks, self.n_cols = -(-n_blocks // chunk), -(-n_keys // wide)
        self.blocks = SumBlocks(edge, chunk * config.bm, wide, a["n_queries"], n_keys, (batch, heads)) if edge else None
        fixed = {name: a[name] for name in (*names, *flags)}
        fixed.update(
            groups_b=a["query_groups_b"], n_heads=heads, n_chunks=self.n_chunks, n_cols=self.n_cols, BM=config.bm, BN=config.bn, BK=wide,
            PARTS=CHUNK, CHUNK=chunk, ZEROED=bool(zeroed), N_QUERY_GROUPS=n_groups, BLOCKS=edge > 0, RECEIVED=received,
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
        nothing = placeholder(device)
        pool = nothing
        if self.blocks is not None:
            pool = torch.zeros((batch * heads, n_groups, self.n_chunks, self.n_cols), device=device)
        return {"out_ptr": torch.empty(self.shape, device=device) if self.received else nothing, "pool_ptr": pool}

    def add(self, span: int, part: Tensor, sums: dict[str, Tensor]) -> None:
        """Add up what the launch over a span of row blocks left."""
        self.launches[span]({"part_ptr": part, **sums})

    def end(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The readings."""
        out = {"received": sums["out_ptr"]} if self.received else {}
        if self.blocks is not None:
            pool = sums["pool_ptr"]
            out.update(self.blocks({"pool_ptr": pool[:, 0] if pool.shape[1] == 1 else pool.sum(1)}))
        return out


class SumBlocks:
    """``pooled [B, Hs, ceil(Lq / edge), ceil(Lk / edge)]`` from sums over ``tall`` rows and ``wide`` keys in ``pool_ptr``."""

    def __init__(self, edge: int, tall: int, wide: int, n_queries: int, n_keys: int, leading: tuple[int, int]) -> None:
        self.rows, self.cols = -(-n_queries // edge), -(-n_keys // edge)
        self.tall, self.wide = edge // tall, edge // wide
        self.leading = leading

    def __call__(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        pool = made["pool_ptr"]
        if self.tall == self.wide == 1 and pool.shape[1:] == (self.rows, self.cols):
            return {"pooled": pool.view(*self.leading, self.rows, self.cols)}
        rows, cols = self.rows * self.tall, self.cols * self.wide
        short = rows - pool.shape[1], cols - pool.shape[2]
        if short[0] > 0 or short[1] > 0:
            pool = torch.nn.functional.pad(pool, (0, max(short[1], 0), 0, max(short[0], 0)))
        pool = pool[:, :rows, :cols]
        if self.tall > 1 or self.wide > 1:
            pool = pool.unflatten(1, (self.rows, self.tall)).unflatten(-1, (self.cols, self.wide)).sum((2, 4))
        return {"pooled": pool.contiguous().unflatten(0, self.leading)}
