"""Heads and scores as TransformerLens writes them, to and fro; needs no TransformerLens.

It names heads by ``(layer, head)`` pairs or ``{layer: [heads]}``, and holds scores as tensors ``[layer, head]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.heads import TEXT, Heads, as_heads
from interp.scores import make_score
from interp.scores_base import ScoreError, values_of


def heads_to_lens(heads: Any, stack: str = TEXT) -> list[tuple[int, int]]:
    """The heads of one stack as ``(layer, head)`` pairs, as ``detect_head(heads=...)`` takes them.

    >>> heads_to_lens("L3H1,L5H0")
    [(3, 1), (5, 0)]
    """
    return [(head.layer, head.head) for head in as_heads(heads) if head.stack == stack]


def heads_from_lens(heads: Iterable[Iterable[int]] | Mapping[int, Iterable[int]], stack: str = TEXT) -> Heads:
    """Heads from ``(layer, head)`` pairs or ``{layer: [heads]}``.

    >>> heads_from_lens({3: [1, 2]})
    Heads('L3H1,L3H2')
    """
    pairs: Any = heads
    if isinstance(heads, Mapping):
        pairs = [(layer, head) for layer, numbers in heads.items() for head in numbers]
    return as_heads([(*(int(n) for n in pair), stack) for pair in pairs])


def scores_to_lens(score: xr.Dataset, by: str = "value", shape: tuple[int, int] | None = None) -> Tensor:
    """A score as a tensor ``[layer, head]``, NaN where a layer or head is missing.

    Args:
        score: see :mod:`interp.scores`.
        by: a variable of it, or ``"difference"``.
        shape: layers and heads of the model; None is just large enough.

    Raises:
        ScoreError: no such variable, or a head of the score outside ``shape``.
    """
    values = values_of(score, by)
    layers, heads = (values[dim].values.astype(int) for dim in ("layer", "head"))
    least = (int(layers.max(initial=-1)) + 1, int(heads.max(initial=-1)) + 1)
    size = least if shape is None else shape
    if any(a < b for a, b in zip(size, least, strict=True)):
        raise ScoreError(f"shape must hold every head of the score, at least {least}, got {tuple(size)}")
    out = torch.full(size, torch.nan, dtype=torch.float64)
    out[torch.from_numpy(layers)[:, None], torch.from_numpy(heads)] = torch.from_numpy(values.values.astype(np.float64))
    return out


def scores_from_lens(
    values: Any, *, name: str, unit: str = "score", paper: str = "TransformerLens", missing: float | None = None,
    stack: str = TEXT,
) -> xr.Dataset:  # fmt: skip
    """A score from a tensor ``[layer, head]`` or ``[sample, layer, head]``.

    Args:
        values: the numbers; NaN is missing.
        name, unit, paper, stack: as in :func:`interp.scores.make_score`.
        missing: a value that means missing, too: -1 for ``detect_head`` with ``heads=``.

    Raises:
        ScoreError: another number of dims.
    """
    array = torch.as_tensor(values).detach().cpu().double().numpy()
    array = array if missing is None else np.where(array == missing, np.nan, array)
    return make_score(array, name=name, unit=unit, paper=paper, stack=stack)
