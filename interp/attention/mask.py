"""Which keys a query may see, described instead of materialised.

A dense mask is 1 GB at 32k tokens and 17 GB at 128k, so the op takes a description and evaluates it on the rows it is
working on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

VisibilityRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Mask:
    """A visibility description; every given part must allow a key for it to be visible.

    Positions are absolute: query row ``r`` of a call stands at ``i = q_offset + r``, key slot ``c`` at
    ``j = kv_offset + c``. The offsets cannot be derived from the lengths (a sliding cache drops early keys, a static
    cache has room for keys to come), so whoever builds the mask states them.

    Args:
        causal: a query sees no key with ``j > i``.
        window: inclusive bounds ``(left, right)``: visible iff ``i - left <= j <= i + right``; None is unbounded. A
            causal sliding window of ``w`` tokens is ``causal=True, window=(w - 1, 0)``.
        padding: bool ``[B|1, Lk]``, True for a real key, by key slot of this call.
        q_offset: absolute position of query row 0.
        kv_offset: absolute position of key slot 0.
        rule: ``rule(b, h, i, j)`` on broadcastable int64 index tensors (``i`` and ``j`` absolute) gives a bool tensor;
            the form Hugging Face's masking functions have.
        dense: bool ``[B|1, H|1, Lq, Lk]``, True for visible.
        first: int ``[B]``, absolute position of each sample's first real token (left padding shifts it); None is 0.
            Only restrictions that keep "the first tokens" (:class:`~interp.attention.edits.SinkWindow`) read it.
    """

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    padding: Tensor | None = None
    q_offset: int = 0
    kv_offset: int = 0
    rule: VisibilityRule | None = None
    dense: Tensor | None = None
    first: Tensor | None = None

    @property
    def trivial(self) -> bool:
        """True where every query sees every key."""
        return not self.causal and all(x is None for x in (self.window, self.padding, self.rule, self.dense))

    def positions(self, n_queries: int, n_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Absolute positions ``i [Lq]`` and ``j [Lk]`` (int64)."""
        i = torch.arange(n_queries, device=device) + self.q_offset
        j = torch.arange(n_keys, device=device) + self.kv_offset
        return i, j

    def visible(self, batch: int, n_queries: int, n_keys: int, device: torch.device) -> Tensor | None:
        """Evaluate the description: bool ``[B|1, H|1, Lq, Lk]``, or None where everything is visible."""
        i, j = self.positions(n_queries, n_keys, device)
        row, column = i[:, None], j[None, :]
        parts: list[Tensor] = []
        if self.causal:
            parts.append((column <= row)[None, None])
        if self.window is not None:
            left, right = self.window
            if left is not None:
                parts.append((column >= row - left)[None, None])
            if right is not None:
                parts.append((column <= row + right)[None, None])
        if self.padding is not None:
            parts.append(self.padding.to(device)[:, None, None, :])
        if self.rule is not None:
            b = torch.arange(batch, device=device)[:, None, None, None]
            h = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
            parts.append(self.rule(b, h, row[None, None], column[None, None]))
        if self.dense is not None:
            parts.append(self.dense.to(device))
        if not parts:
            return None
        seen = parts[0]
        for part in parts[1:]:
            seen = seen & part
        return seen

    def rows(self, start: int, stop: int) -> Mask:
        """The same description for query rows ``start:stop`` of the call."""
        dense = self.dense[:, :, start:stop] if self.dense is not None else None
        return replace(self, q_offset=self.q_offset + start, dense=dense)

    def heads(self, start: int, stop: int) -> Mask:
        """The same description for query heads ``start:stop``; only a dense mask can differ by head."""
        if self.dense is None or self.dense.shape[1] == 1:
            return self
        return replace(self, dense=self.dense[:, start:stop])
