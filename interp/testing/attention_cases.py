"""Random calls of the attention op, for holding one backend against another.

A :class:`Maker` draws the arguments of one call from a seed: the mask, edits and score variants that are named, on small
random shapes, with tables that broadcast over a random selection of their axes.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from interp.attention import (
    Blocks,
    Boost,
    Distances,
    DropKeys,
    Edit,
    Gain,
    GivenRows,
    GroupWeights,
    Mask,
    Neighbourhood,
    OffsetBins,
    Readout,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    TopKeys,
    Uniform,
)

Case = dict[str, Any]

MASKS = (
    "none", "causal", "window", "two-sided", "left-pad", "right-pad", "rule", "dense", "dense-head", "offsets", "empty-rows",
)  # fmt: skip
EDITS = (
    "none", "gain", "temperature", "boost", "sink-window", "blocks", "neighbourhood", "threshold", "drop-keys", "uniform",
    "given-rows", "weights", "knockout", "redistribute", "top-keys", "drop-top-keys",
)  # fmt: skip
SCORES = ("plain", "softcap", "sinks", "bias", "masking-bias")


class Maker:
    """Random arguments of one call, from a seed and the wanted kinds.

    Args:
        seed: of everything random.
        dtype: of the operands and tables.
        queries, keys: smallest and largest number of each.
        dims: head dims to choose from, for q and k and for v.
    """

    def __init__(
        self, seed: int, dtype: torch.dtype = torch.float64, *, queries: tuple[int, int] = (1, 9),
        keys: tuple[int, int] = (2, 13), dims: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    ) -> None:  # fmt: skip
        self.random = torch.Generator().manual_seed(seed)
        self.dtype, self.dims = dtype, dims
        self.batch, self.kv_heads = self.integer(1, 2), self.integer(1, 2)
        self.heads = self.kv_heads * self.integer(1, 3)
        self.n_queries, self.n_keys = self.integer(*queries), self.integer(*keys)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=self.random)

    def flags(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.random) < 0.6

    def some(self, *full: int) -> tuple[int, ...]:
        """A shape that broadcasts to the given one."""
        return tuple(n if self.integer(0, 1) else 1 for n in full)

    @property
    def per_row(self) -> tuple[int, ...]:
        return self.some(self.batch, self.heads, self.n_queries)

    @property
    def where(self) -> torch.Tensor | None:
        return self.flags(*self.per_row) if self.integer(0, 2) else None

    def mask(self, kind: str) -> Mask:
        offset = max(self.n_keys - self.n_queries, 0)
        padding = torch.ones(self.batch, self.n_keys, dtype=torch.bool)
        first = self.integers(0, self.n_keys - 1, self.batch)
        for sample, pads in enumerate(first.tolist()):
            padding[sample, :pads] = False
        match kind:
            case "none":
                return Mask()
            case "causal":
                return Mask(causal=True, q_offset=offset)
            case "window":
                return Mask(causal=True, window=(self.integer(0, 5), 0), q_offset=offset)
            case "two-sided":
                return Mask(window=(self.integer(0, 4), self.integer(0, 3)))
            case "left-pad":
                return Mask(causal=True, q_offset=offset, padding=padding, first=first)
            case "right-pad":
                return Mask(padding=padding.flip(-1))
            case "rule":
                return Mask(causal=True, q_offset=offset, rule=lambda b, h, i, j: ((i + 2 * j + b) % 3 != 0) | (j == i))
            case "dense":
                return Mask(dense=self.flags(*self.some(self.batch), 1, self.n_queries, self.n_keys))
            case "dense-head":
                return Mask(dense=self.flags(1, self.heads, self.n_queries, self.n_keys))
            case "offsets":
                return Mask(causal=True, window=(9, None), q_offset=20 + offset, kv_offset=self.integer(15, 22))
            case _:
                return Mask(causal=True, kv_offset=3, q_offset=1)

    def edit(self, kinds: tuple[str, ...], mask: Mask) -> Edit:
        n_groups = self.integer(2, 5)
        operations = [self.operation(kind, n_groups, mask) for kind in kinds if kind != "none"]
        needs_rows = any(isinstance(op, GroupWeights) and op.weight.shape[2] > 1 for op in operations)
        return Edit(
            tuple(operations),
            groups=self.integers(0, n_groups - 1, *self.some(self.batch), self.n_keys).to(torch.int8),
            query_groups=self.integers(0, 2, *self.some(self.batch), self.n_queries).to(torch.int8)
            if needs_rows
            else None,
            n_groups=n_groups,
        )

    def operation(self, kind: str, n_groups: int, mask: Mask) -> Any:
        size = self.integer(1, 2)
        match kind:
            case "gain":
                return Gain(self.normal(*self.per_row), self.where)
            case "temperature":
                return Temperature(0.3 + self.uniform(*self.per_row), self.where)
            case "boost":
                return Boost(self.normal(*self.per_row, n_groups), self.where)
            case "sink-window":
                return SinkWindow(self.integer(0, 3), self.integers(0, 5, *self.some(self.heads)), self.where)
            case "blocks":
                counts = ((mask.q_offset + self.n_queries) // 3 + 1, (mask.kv_offset + self.n_keys) // 3 + 1)
                return Blocks(3, self.flags(*self.some(self.heads), *counts), self.where)
            case "neighbourhood":
                return Neighbourhood(
                    self.integers(0, 3, *self.some(self.heads)),
                    self.integers(-1, 5, *self.some(self.batch), self.n_queries, size),
                    self.integers(-1, 5, *self.some(self.batch), self.n_keys, size),
                    self.where,
                )
            case "threshold":
                return Threshold(0.5 * self.normal(*self.per_row), self.where)
            case "drop-keys":
                return DropKeys(self.integers(-1, mask.kv_offset + self.n_keys, *self.per_row, 3), self.where)
            case "top-keys":
                return TopKeys(self.integer(1, 5), where=self.where)
            case "drop-top-keys":
                k = self.integer(1, 5)
                return TopKeys(k, self.uniform(*self.per_row, k), 0.6, bool(self.integer(0, 1)), self.where)
            case "uniform":
                return Uniform(self.where)
            case "given-rows":
                heads = torch.randperm(self.heads, generator=self.random)[: self.integer(1, self.heads)]
                rows = torch.randperm(self.n_queries, generator=self.random)[: self.integer(1, self.n_queries)]
                p = self.uniform(*self.some(self.batch), len(heads), len(rows), self.n_keys)
                return GivenRows(heads, rows, p / p.sum(-1, keepdim=True))
            case "redistribute":
                return Redistribute(
                    source=(0,), target=(1,), fraction=self.uniform(*self.per_row), gate_mass=(0, 1), gate_share=(1,),
                    summ=0.3, rho=0.2, where=self.where,
                )  # fmt: skip
            case _:
                shape = (*self.some(self.batch, self.heads), 3 if self.integer(0, 1) else 1, n_groups)
                weight = self.flags(*shape).to(self.dtype) if kind == "knockout" else 2 * self.uniform(*shape)
                return GroupWeights(weight, kind == "knockout" or bool(self.integer(0, 1)), self.where)

    def readout(self) -> Readout:
        n = self.integer(1, 2)
        consecutive = self.integer(0, 1)
        query_coords = self.integers(-1, 5, *self.some(self.batch), self.n_queries, n)
        key_coords = self.integers(-1, 5, *self.some(self.batch), self.n_keys, n)
        if consecutive:
            n = 1
            query_coords = torch.arange(self.n_queries)[None, :, None] + self.integer(0, 4)
            key_coords = torch.arange(self.n_keys)[None, :, None] + self.integer(0, 2)
            if self.integer(0, 1):
                query_coords[0, 0], key_coords[0, -1] = -1, -1
        heads = torch.randperm(self.heads, generator=self.random)[: self.integer(1, self.heads)]
        return Readout(
            heads=heads if self.integer(0, 1) else None,
            groups=self.integers(0, 3, *self.some(self.batch), self.n_keys).to(torch.int8)
            if self.integer(0, 2)
            else None,
            n_groups=4,
            query_groups=self.integers(-1, 1, *self.some(self.batch), self.n_queries).to(torch.int8)
            if self.integer(0, 2)
            else None,
            n_query_groups=2,
            row_stats=True,
            topk=self.integer(1, 4),
            group_output=self.integers(0, self.n_queries - 1, self.integer(1, 4)),
            received=True,
            pooled=self.integer(1, 20),
            offset=OffsetBins(query_coords, key_coords, (-3,) * n, (4,) * n),
            distance=Distances(query_coords, key_coords, hop=bool(self.integer(0, 1))),
            rows=self.integers(0, self.n_queries - 1, self.integer(1, 4)),
            attention=True,
        )

    def case(self, mask: str, edits: tuple[str, ...], scores: tuple[str, ...]) -> Case:
        dim, width = (self.dims[self.integer(0, len(self.dims) - 1)] for _ in range(2))
        description = self.mask(mask)
        bias = self.normal(*self.some(self.batch, self.heads, self.n_queries), self.n_keys)
        if "masking-bias" in scores:
            bias = bias.masked_fill(torch.rand(bias.shape, generator=self.random) < 0.3, torch.finfo(self.dtype).min)
        return {
            "q": self.normal(self.batch, self.heads, self.n_queries, dim),
            "k": self.normal(self.batch, self.kv_heads, self.n_keys, dim),
            "v": self.normal(self.batch, self.kv_heads, self.n_keys, width),
            "scale": 0.7,
            "mask": description,
            "softcap": 1.3 if "softcap" in scores else None,
            "sinks": self.normal(self.heads) if "sinks" in scores else None,
            "bias": bias if {"bias", "masking-bias"} & set(scores) else None,
            "edit": self.edit(edits, description),
            "readout": self.readout(),
        }


def moved(thing: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """A case, or any part of it, with its tensors on a device, floating-point ones in ``dtype`` where it is given."""
    if isinstance(thing, torch.Tensor):
        return thing.to(device, dtype if thing.is_floating_point() else None)
    if isinstance(thing, dict):
        return {name: moved(value, device, dtype) for name, value in thing.items()}
    if isinstance(thing, tuple):
        return tuple(moved(x, device, dtype) for x in thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{f.name: moved(getattr(thing, f.name), device, dtype) for f in fields(thing)})
    return thing
