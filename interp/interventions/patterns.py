"""Which keys a head may see: patterns for :class:`~interp.interventions.Streaming`.

Each gives one restriction of the attention op, so the keys that it hides leave the softmax, whatever else is edited.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from interp.attention import Blocks, Neighbourhood, Operation, SinkWindow
from interp.files import local_path
from interp.interventions._base import expanded
from interp.interventions.activations import first_sample
from interp.interventions.selection import first_key
from interp.models.anatomy import Site
from interp.tracing.calls import SiteCall


class Pattern(Protocol):
    """What :class:`~interp.interventions.Streaming` asks of a pattern."""

    def check(self, site: Site, layers: int) -> None:
        """Raise ValueError where the pattern cannot be had at a site (of a stack with so many layers)."""
        ...

    def key(self, call: SiteCall) -> Hashable:
        """Calls with the same key get the same operation."""
        ...

    def operation(self, call: SiteCall, where: Tensor) -> Operation:
        """The restriction of one call, acting on ``where``."""
        ...


@dataclass(frozen=True)
class SinkRecent:
    """The first ``sink`` real keys and the ``recent`` last ones (Xiao et al. 2023, 2024, https://arxiv.org/abs/2410.10819).

    Defaults are those that DuoAttention deploys with; its gates are trained with 128 and 256.

    Args:
        sink: keys counted from the sample's first real token.
        recent: keys up to and with the query's own.
        counting: ``mask`` counts the query's own key among the recent ones, as the training mask does (``i - j < recent``);
            ``cache`` keeps one more, as the deployed cache does, which holds ``recent`` entries before the new one comes.
    """

    sink: int = 64
    recent: int = 256
    counting: Literal["mask", "cache"] = "mask"

    def __post_init__(self) -> None:
        if self.counting not in ("mask", "cache"):
            raise ValueError(f"counting must be 'mask' or 'cache', got {self.counting!r}")
        _check_counts(sink=self.sink, recent=self.recent)

    def check(self, site: Site, layers: int) -> None:
        _refuse_cross(site, "sink + recent window")

    def key(self, call: SiteCall) -> Hashable:
        return ()

    def operation(self, call: SiteCall, where: Tensor) -> Operation:
        return SinkWindow(self.sink, self.recent + (self.counting == "cache"), where)

    def describe(self) -> dict[str, Any]:
        return {"pattern": "sink + recent", "sink": self.sink, "recent": self.recent, "counting": self.counting}


@dataclass(frozen=True, eq=False)
class Spans:
    """A span for each head that grows with the input (Fu et al. 2024, MoA, https://arxiv.org/abs/2406.14909).

    Head h of layer l sees the first ``sink`` keys and the ``round(alpha + beta * N)`` last ones, N the prompt's length.

    Args:
        alphas: tokens ``[layer, head]``.
        betas: share of N ``[layer, head]``; 0 where left out.
        sink: keys at the start; 64 is MoA's one global block.
        length: N in place of the prompt's length.
    """

    alphas: Any
    betas: Any = None
    sink: int = 64
    length: int | None = None

    def __post_init__(self) -> None:
        alphas = np.asarray(self.alphas, dtype=np.float64)
        betas = np.zeros_like(alphas) if self.betas is None else np.asarray(self.betas, dtype=np.float64)
        if alphas.ndim != 2 or alphas.shape != betas.shape or not np.isfinite([alphas, betas]).all():
            raise ValueError(
                f"alphas and betas must be finite [layer, head], got shapes {alphas.shape} and {betas.shape}"
            )
        _check_counts(sink=self.sink)
        object.__setattr__(self, "alphas", alphas)
        object.__setattr__(self, "betas", betas)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], *, sink: int = 64, length: int | None = None) -> Spans:
        """Read a plan of MoA: ``{"alphas": [[...]], "betas": [[...]]}``.

        Raises:
            ValueError: the file is none.
        """
        said: Any = json.loads(local_path(path).read_text(encoding="utf-8"))
        if not isinstance(said, dict) or not {"alphas", "betas"} <= said.keys():
            raise ValueError(
                f"path must be a plan with alphas and betas, got {sorted(said) if isinstance(said, dict) else said!r}"
            )
        return cls(said["alphas"], said["betas"], sink, length)

    def check(self, site: Site, layers: int) -> None:
        _refuse_cross(site, "span")
        if self.alphas.shape != (layers, site.n_heads):
            raise ValueError(
                f"alphas must be [layer, head] {(layers, site.n_heads)} for stack {site.stack!r}, got {self.alphas.shape}"
            )

    def key(self, call: SiteCall) -> Hashable:
        return tuple(self._windows(call))

    def operation(self, call: SiteCall, where: Tensor) -> Operation:
        return SinkWindow(self.sink, torch.tensor(self._windows(call), dtype=torch.int32, device=call.q.device), where)

    def _windows(self, call: SiteCall) -> list[int]:
        length = self.length or call.run.prompt_length or call.q.shape[2]
        spans = self.alphas[call.site.layer] + self.betas[call.site.layer] * length
        return np.rint(spans).clip(0).astype(int).tolist()

    def describe(self) -> dict[str, Any]:
        return {
            "pattern": "spans",
            "sink": self.sink,
            "mean alpha": float(self.alphas.mean()),
            "mean beta": float(self.betas.mean()),
        }


@dataclass(frozen=True)
class Shards:
    """Each KV head keeps its own blocks of the context (Lin et al. 2024, S2-Attention, https://arxiv.org/abs/2407.17678).

    Query block m sees key block n iff ``0 <= m - n < local``, or n <= m and ``(n + h * step + offset) mod stride == 0``,
    ``step = max(1, stride // H_kv)``: heads take turns, so that together they see all where ``H_kv >= stride`` (fewer
    heads keep ``H_kv`` of the ``stride`` residues).

    Blocks are of absolute positions, which left pads would shift: such batches are refused.

    Args:
        block: tokens in a block.
        local: recent blocks that every head sees, its own among them.
        stride: a head keeps every so many-th block.
        offset: shifts all of them.
        dense: the last so many KV heads see everything.
    """

    block: int = 64
    local: int = 32
    stride: int = 8
    offset: int = 0
    dense: int = 0

    def __post_init__(self) -> None:
        _check_counts(local=self.local, dense=self.dense, offset=self.offset)
        if self.block < 1 or self.stride < 1:
            raise ValueError(f"block and stride must be at least 1, got {self.block} and {self.stride}")

    def check(self, site: Site, layers: int) -> None:
        _refuse_cross(site, "block pattern")
        if self.dense > site.n_kv_heads:
            raise ValueError(
                f"dense must be at most the {site.n_kv_heads} KV heads of stack {site.stack!r}, got {self.dense}"
            )

    def key(self, call: SiteCall) -> Hashable:
        return (call.site.n_heads, call.site.n_kv_heads, self._blocks(call))

    def operation(self, call: SiteCall, where: Tensor) -> Operation:
        if bool((first_key(call) > 0).any()):
            raise ValueError(
                "shards are blocks of absolute positions, which left pads shift: run samples of another length one by one"
            )
        kv, group = call.site.n_kv_heads, call.site.n_heads // call.site.n_kv_heads
        return Blocks(
            self.block, self.allowed(kv, self._blocks(call)).repeat_interleave(group, 0).to(call.q.device), where
        )

    def allowed(self, kv_heads: int, blocks: int) -> Tensor:
        """Bool ``[H_kv, blocks, blocks]``, query block by key block."""
        m, n = torch.arange(blocks)[:, None], torch.arange(blocks)[None]
        h = torch.arange(kv_heads)[:, None, None]
        step = max(1, self.stride // kv_heads)
        vertical = (n + h * step + self.offset) % self.stride == 0
        dense = h >= kv_heads - self.dense
        return (n <= m) & ((m - n < self.local) | vertical | dense)

    def _blocks(self, call: SiteCall) -> int:
        """Blocks that the table has: a power of two, so that one table lasts for many tokens."""
        end = max(call.mask.q_offset + call.q.shape[2], call.mask.kv_offset + call.k.shape[2])
        return 1 << (-(-end // self.block) - 1).bit_length()

    def describe(self) -> dict[str, Any]:
        return {"pattern": "shards", **vars(self)}


@dataclass(frozen=True)
class Near:
    """Keys within ``radius`` of the query: along the sequence, or on the patch grid (Chebyshev distance).

    Args:
        radius: 0 is the query's own key alone.
        dimensions: 1, or 2 for a stack of image patches with rows and columns; patches of another image or tile are far,
            class tokens and text see and are seen by all.
    """

    radius: int
    dimensions: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        _check_counts(radius=self.radius)
        if self.dimensions not in (1, 2):
            raise ValueError(f"dimensions must be 1 or 2, got {self.dimensions!r}")

    def check(self, site: Site, layers: int) -> None:
        _refuse_cross(site, "neighbourhood")

    def key(self, call: SiteCall) -> Hashable:
        if self.dimensions == 1 and call.mask.causal:
            return ()
        sample = first_sample(call, call.run.of(self).setdefault("samples", {}))
        call.run.of(self)["first"] = sample
        shape = (call.q.shape[0], call.q.shape[2], call.k.shape[2])
        return (call.site.stack, sample, call.mask.q_offset, call.mask.kv_offset, *shape)

    def operation(self, call: SiteCall, where: Tensor) -> Operation:
        if self.dimensions == 1:
            if call.mask.causal or call.generated:
                # The same set of keys, and the same edit at every token.
                return SinkWindow(0, self.radius + 1, where)
            rows = call.query_positions().int()[None, :, None]
            keys = (torch.arange(call.k.shape[2], device=rows.device) + call.mask.kv_offset).int()[None, :, None]
            return Neighbourhood(self.radius, rows, keys, where)
        return Neighbourhood(self.radius, *self._places(call), where)

    def _places(self, call: SiteCall) -> tuple[Tensor, Tensor]:
        """Rows and columns of queries ``[B|1, Lq, 2]`` and keys ``[B|1, Lk, 2]``; -1 without a place."""
        stack = call.site.stack
        lay = call.run.layouts.get(stack)
        if lay is None or not bool((lay.row >= 0).any()):
            why = call.run.layout_problem or "its positions have no rows and columns"
            raise ValueError(f"dimensions=2 needs a stack of image patches, got {stack!r}: {why}")
        # Images and tiles of one sequence lie far apart.
        apart = (np.maximum(lay.image, 0) * 64 + np.maximum(lay.tile, 0)) * 16384
        cells = np.where(lay.row[..., None] >= 0, np.stack([lay.row + apart, lay.column], -1), -1).astype(np.int32)
        known = torch.from_numpy(cells).to(call.q.device)
        first, batch = call.run.of(self)["first"], call.q.shape[0]
        known = known[first : first + batch] if first + batch <= len(known) else expanded(known, batch, "patches")

        def at(start: int, count: int) -> Tensor:
            out = torch.full((len(known), count, 2), -1, dtype=torch.int32, device=known.device)
            part = known[:, start : start + count]
            out[:, : part.shape[1]] = part
            return out

        return at(call.mask.q_offset, call.q.shape[2]), at(call.mask.kv_offset, call.k.shape[2])

    def describe(self) -> dict[str, Any]:
        return {"pattern": "near", "radius": self.radius, "dimensions": self.dimensions}


def _refuse_cross(site: Site, what: str) -> None:
    if site.cross:
        raise ValueError(
            f"a {what} needs self attention: positions of queries and keys cannot be compared in stack {site.stack!r}"
        )


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be a whole number >= 0, got {value!r}")
