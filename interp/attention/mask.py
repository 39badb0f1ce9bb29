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
        first: int ``[B|1]``, absolute position of each sample's first real token (left padding shifts it); None is 0.
            Only restrictions that keep "the first tokens" (:class:`~interp.attention.edits.SinkWindow`) read it.
        cross: queries and keys are different sequences, so that their positions cannot be compared: causality, windows
            and readings of offsets are refused.
    """

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    padding: Tensor | None = None
    q_offset: int = 0
    kv_offset: int = 0
    rule: VisibilityRule | None = None
    dense: Tensor | None = None
    first: Tensor | None = None
    cross: bool = False

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
        if self.trivial:
            return None
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
        seen = parts[0]
        for part in parts[1:]:
            seen = seen & part
        return seen

    def settled(self, n_keys: int) -> int:
        """Number of leading key slots that every row sees whatever its number; only plain causality has any."""
        if not self.causal or any(x is not None for x in (self.window, self.padding, self.rule, self.dense)):
            return 0
        return min(max(self.q_offset + 1 - self.kv_offset, 0), n_keys)

    def key_range(self, n_queries: int, n_keys: int) -> tuple[int, int]:
        """Key slots ``start:stop`` outside which causality and window hide everything; never empty."""
        start, stop = 0, n_keys
        first_row = self.q_offset - self.kv_offset
        last_row = first_row + n_queries - 1
        if self.causal:
            stop = min(stop, last_row + 1)
        if self.window is not None:
            left, right = self.window
            if left is not None:
                start = max(start, first_row - left)
            if right is not None:
                stop = min(stop, last_row + right + 1)
        start = min(start, n_keys - 1)
        return start, max(stop, start + 1)

    def simplified(self, n_queries: int, n_keys: int) -> Mask:
        """The same visibility without parts that hide nothing (decoding sees all; a batch may have no pads)."""
        last_key = self.kv_offset + n_keys - 1
        causal = self.causal and self.q_offset < last_key
        padding = None if self.padding is None or bool(self.padding.all()) else self.padding
        window = self.window
        if window is not None:
            left, right = window
            if left is not None and self.q_offset + n_queries - 1 - left <= self.kv_offset:
                left = None
            if right is not None and (self.q_offset + right >= last_key or (self.causal and right >= 0)):
                right = None
            window = None if left is None and right is None else (left, right)
        return replace(self, causal=causal, padding=padding, window=window)

    def batch(self, start: int, stop: int) -> Mask:
        """The same description for samples ``start:stop``; the rule still hears their numbers in the whole batch."""
        whole, rule = self.rule, self.rule
        if whole is not None and start:
            rule = lambda b, h, i, j: whole(b + start, h, i, j)  # noqa: E731
        return replace(
            self,
            padding=_cut(self.padding, 0, start, stop),
            dense=_cut(self.dense, 0, start, stop),
            first=_cut(self.first, 0, start, stop),
            rule=rule,
        )

    def rows(self, start: int, stop: int) -> Mask:
        """The same description for query rows ``start:stop`` of the call."""
        dense = self.dense[:, :, start:stop] if self.dense is not None else None
        return replace(self, q_offset=self.q_offset + start, dense=dense)

    def heads(self, start: int, stop: int) -> Mask:
        """The same description for query heads ``start:stop``; only a dense mask can differ by head."""
        return replace(self, dense=_cut(self.dense, 1, start, stop))

    def keys(self, start: int, stop: int) -> Mask:
        """The same description for key slots ``start:stop`` of the call."""
        padding = None if self.padding is None else self.padding[:, start:stop]
        dense = None if self.dense is None else self.dense[..., start:stop]
        return replace(self, kv_offset=self.kv_offset + start, padding=padding, dense=dense)


@dataclass(frozen=True, eq=False)
class Visible:
    """The set ``V_i`` of every row of a call, evaluated.

    Key slots before ``start`` are seen by every row; ``mask`` speaks of the ``W`` slots from there on.

    Attributes:
        mask: bool ``[B|1, H|1, Lq, W]``; None where every row sees every key.
        penalty: 0 where visible and -inf where not, shaped like ``mask``; 0 throughout a row that sees nothing, so that
            its softmax (and the gradient of that) stays finite until it is zeroed.
        alive: bool ``[B|1, H|1, Lq]``, the rows that see something; None where all do.
        n_queries: Lq.
        n_keys: Lk.
    """

    mask: Tensor | None
    penalty: Tensor | None
    alive: Tensor | None
    n_queries: int
    n_keys: int

    @classmethod
    def of(cls, mask: Tensor | None, n_queries: int, n_keys: int, dtype: torch.dtype) -> Visible:
        """From bool ``[B|1, H|1, Lq|1, W|1]`` about the last ``W`` of ``Lk`` keys, or None for all visible."""
        if mask is None or mask.shape[-1] == 0:
            return cls(None, None, None, n_queries, n_keys)
        mask = mask.expand(-1, -1, n_queries, -1).contiguous()
        penalty = torch.where(mask, 0.0, -torch.inf).to(dtype)
        if mask.shape[-1] < n_keys:
            return cls(mask, penalty, None, n_queries, n_keys)
        # Bytes: torch reduces bool tensors some thirty times slower than uint8 ones.
        alive = mask.view(torch.uint8).amax(-1).bool()
        if bool(alive.all()):
            return cls(mask, penalty, None, n_queries, n_keys)
        return cls(mask, torch.where(alive.unsqueeze(-1), penalty, 0.0), alive, n_queries, n_keys)

    @property
    def start(self) -> int:
        return self.n_keys if self.mask is None else self.n_keys - self.mask.shape[-1]

    @property
    def n_heads(self) -> int:
        """1 where all heads see the same."""
        return 1 if self.mask is None else self.mask.shape[1]

    def uniform(self, like: Tensor) -> Tensor:
        """``1 / |V_i|`` on ``V_i``, ``[B|1, H|1, Lq, Lk]`` in the dtype and on the device of ``like``."""
        whole = torch.ones((1, 1, self.n_queries, self.n_keys), dtype=like.dtype, device=like.device)
        if self.mask is None:
            return whole / self.n_keys
        seen = torch.cat(
            [whole[..., : self.start].expand(*self.mask.shape[:2], -1, -1), self.mask.to(like.dtype)], dim=-1
        )
        return seen / seen.sum(-1, keepdim=True).clamp_min(1.0)

    def counts(self, rows: Tensor) -> Tensor:
        """How many rows of each kind see a key: int32 ``[B, H|1, Gq, Lk]`` for one-hot rows ``[B|1, Lq, Gq]``."""
        kinds = rows.mT.unsqueeze(1)
        free = kinds.sum(-1, keepdim=True)
        if self.mask is None:
            return free.round().int().expand(-1, -1, -1, self.n_keys)
        counted = kinds @ self.mask.to(rows.dtype)
        free = free.expand(*counted.shape[:3], self.start)
        return torch.cat([free, counted], dim=-1).round().int()


def _cut(tensor: Tensor | None, axis: int, start: int, stop: int) -> Tensor | None:
    """``start:stop`` along an axis that may be 1 wide and stand for all."""
    if tensor is None or tensor.shape[axis] == 1:
        return tensor
    return tensor.narrow(axis, start, stop - start)
