"""Relevancy maps of Chefer et al."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
)
from interp.analysis.running import AnalysisError, as_model, inputs_of
from interp.tracing.session import hooked

PAPER = "Chefer et al. 2021, https://arxiv.org/abs/2103.15679"


def relevancy(
    model: Any,
    sample: Any,
    *,
    rows: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    stack: str = "text",
    into_image: bool = False,
) -> xr.Dataset:
    """Generic attention explainability, Chefer et al. 2021, https://arxiv.org/abs/2103.15679, eq. 5 and 6 (self-attention).

    ``A_l = mean_h max(0, dy/dA_lh * A_lh)``, ``R = I``, ``R <- R + A_l R`` from the first layer to the last; the answer is
    ``R[row] - e_row``. y is the logit of the target. ``dy/dA = dy/dz V^T`` comes from gradients of z alone, so attention runs as it always
    does, and maps are made one layer at a time, from the last (``r <- r + r A_l``); exact. One backward a row.

    When not to use: negative contributions do not count, and MLPs are taken for the identity.

    Args:
        model: an :class:`interp.Model` or a transformers model; edits of sessions that are open on it apply.
        sample: a probe's sample, or inputs of one sequence.
        rows: positions that predict the targets; None is the last. A classifier has one logit vector: row 0 is its class token.
        targets: token (or class) whose logit is explained, one a row; None is the largest logit.
        stack: ``text``, or ``vision`` of a classifier.
        into_image: go on through the vision tower, as LVLM-Interpret does; layers that feed nothing have no gradient and drop out.

    Returns:
        ``relevance (row, position)``, ``image (row, y, x)`` where positions are on a patch grid, ``patches`` on the tower's; ``target
        (row)``, ``logit (row)``.

    Raises:
        AnalysisError: no such stack, a batch, rows or targets outside, no logits, an image whose tokens are no patches.
    """
    model = as_model(model)
    stacks = check_stack(model, stack, into_image)
    inputs: Mapping[str, Any] = inputs_of(sample, model)
    reader = SiteReader(stacks, leaves=True)
    with torch.enable_grad(), hooked(model, interventions=[reader]):
        logits: Tensor | None = getattr(model(inputs), "logits", None)
    kept = reader.found[stack]
    if logits is None or not kept:
        raise AnalysisError(
            f"relevancy needs a model with logits whose stack {stack!r} the inputs reach, got {type(model.module).__name__}"
        )
    length = next(iter(kept.values())).q.shape[2]
    at = chosen_rows([0] if rows is None and logits.ndim == 2 else rows, length)
    scores = [logits[0] if logits.ndim == 2 else logits[0, row] for row in at]
    wanted = [int(s.argmax()) for s in scores] if targets is None else [int(t) for t in targets]
    if len(wanted) != len(at) or any(not 0 <= t < len(scores[0]) for t in wanted):
        raise AnalysisError(f"targets must be one id within {len(scores[0])} for each of {len(at)} rows, got {wanted}")
    relevance: list[Tensor] = []
    patches: list[Tensor] = []
    places = image_places(model, inputs) if into_image else None
    leaves = {(name, n): k.leaf for name in stacks for n, k in reader.found[name].items() if k.leaf is not None}
    for n, (row, score, target) in enumerate(zip(at, scores, wanted, strict=True)):
        gradients = torch.autograd.grad(
            score[target], list(leaves.values()), retain_graph=n + 1 < len(at), allow_unused=True
        )
        dz = dict(zip(leaves, gradients, strict=True))
        one = unit_rows([row], length, logits.device)
        found = _relevance(kept, {m: dz[stack, m] for m in kept}, one)
        relevance.append(found - one)
        if places is not None:
            tokens, grid, _ = places
            tower = reader.found["vision"]
            start = torch.zeros(1, next(iter(tower.values())).q.shape[2], device=logits.device)
            start[:, grid] = found[:, tokens]
            patches.append(_relevance(tower, {m: dz["vision", m] for m in tower}, start))
    attrs = {"name": "relevancy", "paper": PAPER, "unit": "gradient times attention"}
    out = as_dataset(torch.cat(relevance), at, model, inputs, stack, torch.cat(patches) if patches else None, attrs)
    chosen = [float(score[target].detach()) for score, target in zip(scores, wanted, strict=True)]
    return out.assign(target=("row", wanted), logit=("row", chosen))


def _relevance(kept: Mapping[int, Kept], dz: Mapping[int, Tensor | None], start: Tensor) -> Tensor:
    def step(layer: int, row: Tensor) -> Tensor:
        gradient = dz[layer]
        if gradient is None:
            return row
        a = kept[layer].attention()
        return row + row @ (kept[layer].gradient(gradient) * a).clamp(min=0).mean(0)

    with torch.no_grad():
        return descend(kept, start, step)
