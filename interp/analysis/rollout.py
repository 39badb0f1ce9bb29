"""Attention rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import xarray as xr
from torch import Tensor

from interp.analysis.layer_maps import (
    Kept,
    SiteReader,
    as_dataset,
    check_stack,
    chosen_rows,
    descend,
    image_places,
    unit_rows,
    used_layers,
)
from interp.analysis.running import AnalysisError, as_model, inputs_of
from interp.tracing.session import hooked

PAPER = "Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928"


def rollout(
    model: Any,
    sample: Any,
    *,
    rows: Sequence[int] | None = None,
    stack: str = "text",
    fuse: Literal["mean", "max"] = "mean",
    drop: Sequence[int] = (),
    into_image: bool = False,
) -> xr.Dataset:
    """Attention rollout, Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928.

    ``A_l = rows of (mean_h A_lh + I) made to sum to 1``, ``R = A_L ... A_1``; the answer is ``R[row]``. Computed as ``e_row A_L ... A_1``
    from the last layer down, so one layer's map is held at a time and no product of maps is made; exact.

    When not to use: as a cause. BOS and sink columns dominate in decoders: see ``drop``.

    Args:
        model: an :class:`interp.Model` or a transformers model; edits of sessions that are open on it apply.
        sample: a probe's sample, or inputs of one sequence.
        rows: positions whose row is wanted; None is the last. A class token is row 0.
        stack: ``text`` or ``vision``.
        fuse: heads by their mean (paper) or maximum.
        drop: key positions whose columns are removed before rows are made to sum to 1 (sinks).
        into_image: go on through the vision tower: ``patches`` is on the tower's own grid. For models with a token for each patch.

    Returns:
        ``relevance (row, position)``, sums to 1; ``image (row, y, x)`` where positions are on a patch grid; ``patches``.

    Raises:
        AnalysisError: no such stack, a batch, rows outside the sequence, an image whose tokens are no patches.
    """
    if fuse not in ("mean", "max"):
        raise AnalysisError(f"fuse must be 'mean' or 'max', got {fuse!r}")
    model = as_model(model)
    stacks = check_stack(model, stack, into_image)
    inputs: Mapping[str, Any] = inputs_of(sample, model)
    reader = SiteReader(stacks)
    with torch.no_grad(), hooked(model, interventions=[reader]):
        model(inputs)
    kept = reader.found[stack]
    if not kept:
        raise AnalysisError(f"these inputs do not reach the stack {stack!r}")
    length = next(iter(kept.values())).q.shape[2]
    at = chosen_rows(rows, length)
    beyond = [d for d in drop if not 0 <= d < length]
    if beyond:
        raise AnalysisError(f"drop must be positions within {length}, got {beyond}")
    relevance = _roll(kept, unit_rows(at, length, next(iter(kept.values())).q.device), fuse, drop)
    patches = None
    if into_image:
        tokens, places, _ = image_places(model, inputs)
        tower = reader.found["vision"]
        used = {n: k for n, k in tower.items() if n < used_layers(model, len(tower))}
        start = torch.zeros(len(at), next(iter(tower.values())).q.shape[2], device=relevance.device)
        start[:, places] = relevance[:, tokens]
        patches = _roll(used, start, fuse, ())
    attrs = {"name": "rollout", "paper": PAPER, "fuse": fuse, "drop": list(drop), "unit": "share of the row"}
    return as_dataset(relevance, at, model, inputs, stack, patches, attrs)


def _roll(kept: Mapping[int, Kept], start: Tensor, fuse: str, drop: Sequence[int]) -> Tensor:
    def step(layer: int, row: Tensor) -> Tensor:
        a = kept[layer].attention()
        fused = a.mean(0) if fuse == "mean" else a.amax(0)
        if drop:
            fused[:, list(drop)] = 0
        fused.diagonal().add_(1)
        return (row / fused.sum(-1)) @ fused

    return descend(kept, start, step)
