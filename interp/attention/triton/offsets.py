"""Histograms of query-key offset, counted from pieces of the map that stay under a byte budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from interp.attention import measure
from interp.attention.call import Call, Tile
from interp.attention.triton.devices import interpreted
from interp.attention.triton.diagonals import diagonals_kernel
from interp.attention.triton.launching import Launch
from interp.attention.triton.tables import strides

MAP_BYTES = 512 << 20
"""Byte budget of a piece of the map. Small pieces leave a GPU idle: 512 MiB are 128 rows of 32 heads at 32k keys."""

Pieces = Callable[[int], Tensor]
"""From the number of a piece to its p ``[B, H, R, Lk]``, in memory that may be written to."""


class Offsets:
    """What is prepared once for calls that read offsets: pieces, and (between consecutive tokens) what counts in them.

    Attributes:
        rows: int64 ``[R]`` of each piece.
        dirty: whether a piece may hold anything in tiles of the map that no row sees: they are not read.
    """

    def __init__(self, call: Call) -> None:
        batch, heads, n_queries, n_keys = call.shape
        asked, mask, device = call.readout, call.mask, call.q.device
        assert asked.offset is not None
        self.bins = asked.offset
        self.heads = heads if asked.heads is None else len(asked.heads)
        self.shape = (batch, self.heads, self.bins.shape[0] + 1)
        step = max(MAP_BYTES // (batch * self.heads * n_keys * 4), 1)
        if step > 128:
            step = step // 128 * 128  # whole blocks of rows
        self.spans = [(start, min(start + step, n_queries)) for start in range(0, n_queries, step)]
        self.rows = [torch.arange(*span, device=device) for span in self.spans]
        self.dirty = [False] * len(self.spans)
        self.first = measure._consecutive(self.bins)  # pyright: ignore[reportPrivateUsage]
        if self.first is None:
            return
        counted = torch.ones(1, n_queries, device=device) if asked.query_groups is None else asked.query_groups >= 0
        placed, keys = (coords[0, :, 0] >= 0 for coords in (self.bins.query_coords, self.bins.key_coords))
        self.counted = counted.float().contiguous()
        self.inside = (self.counted * placed).contiguous()
        self.outside = self.counted - self.inside
        unplaced = (~placed).cpu().tolist()
        self.special_rows = [any(unplaced[start:stop]) for start, stop in self.spans]
        special = (~keys).nonzero().flatten()
        delta = mask.q_offset - mask.kv_offset
        # What no row can see is left out, and need not be cleared: where only causality hides keys, and no later key is counted.
        restricted = (
            mask.window is not None or mask.padding is not None or mask.dense is not None or mask.rule is not None
        )
        plain = mask.causal and not restricted and call.bias is None and not call.edit.operations
        plain = plain and self.bins.lo[0] >= 0 and self.first == delta
        numbers = special.cpu().tolist()
        self.special: list[Tensor | None] = []
        for n, (start, stop) in enumerate(self.spans):
            seen = [c for c in numbers if not mask.causal or c < stop + delta]
            self.special.append(special[: len(seen)] if seen else None)
            edge = any(c > start + delta for c in seen)
            self.dirty[n] = plain and not edge and not self.special_rows[n]
        n_bins, bd = self.bins.shape[0], 16 if interpreted() else 128
        blocks = -(-n_bins // bd)
        self.launches = [
            Launch(
                diagonals_kernel, (batch * self.heads * blocks,),
                {
                    "row_ptr": self.inside, "row_b": strides(self.inside, 1)[0], "n_rows": stop - start, "n_keys": n_keys,
                    "n_bins": n_bins, "n_blocks": blocks, "n_heads": self.heads, "first": self.first + start - self.bins.lo[0],
                    "row_start": start,
                },
                BR=16, BD=bd, num_warps=4, num_stages=1,
            )
            for start, stop in self.spans
        ]  # fmt: skip

    def __call__(self, call: Call, piece: Pieces) -> Tensor:
        """The histogram ``[B, H, bins + 1]``."""
        return self._by_pairs(call, piece) if self.first is None else self._by_diagonals(piece)

    def _by_diagonals(self, piece: Pieces) -> Tensor:
        total = torch.zeros(self.shape, device=self.counted.device)
        specials = total[..., -1]
        for n, (start, stop) in enumerate(self.spans):
            p = piece(n)
            if self.special_rows[n]:
                specials += (p.sum(-1) * self.outside[:, None, start:stop]).sum(-1)
            special = self.special[n]
            if special is not None:
                here = p.index_select(-1, special).sum(-1)
                specials += (here * self.inside[:, None, start:stop]).sum(-1)
                p.index_fill_(-1, special, 0.0)
            self.launches[n]({"map_ptr": p, "out_ptr": total})
        return total

    def _by_pairs(self, call: Call, piece: Pieces) -> Tensor:
        batch, heads, _, n_keys = call.shape
        total = None
        for n, span in enumerate(self.spans):
            p = piece(n)
            part, _ = call.tile(Tile((0, batch), (0, heads), span, (0, n_keys)))
            assert part.readout.offset is not None
            histogram = measure.offset_histogram(p, part.readout.offset, measure.counted_rows(part, p))
            total = histogram if total is None else total + histogram
        assert total is not None
        return total
