"""Which part of a head's map its importance rests on: rows, columns, rings of patches, single keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.pairs import pattern
from interp.analysis.replay import Replay
from interp.analysis.running import AnalysisError, as_model, build, inputs_of, require_stack, track
from interp.analysis.targets import measure, target_of
from interp.heads import Head, as_heads
from interp.models.layout import layout
from interp.models.model import Model
from interp.tracing.calls import SiteCall

PAPER = "Li et al. 2023, https://arxiv.org/abs/2303.13731 (definitions ours)"


def partial_pruning(
    model: Any,
    heads: Any,
    probe: Any,
    *,
    rings: Sequence[int] | None = None,
    keys: Sequence[int] = (),
    parts: Mapping[str, Tensor] | None = None,
    stack: str = "vision",
    metric: str = "jsd",
    progress: bool = True,
) -> xr.Dataset:
    """Damage when a part of one head's attention map is set to zero, with and without its rows made to sum to 1 again.

    Parts: ``cls_row`` (what CLS takes from patches), ``cls_column`` (what patches take from CLS), ``within k`` and ``beyond k`` (patch to
    patch at a Chebyshev distance of at most, or more than, k), ``ring k`` (exactly k), ``key j`` (one key, for all rows), ``all`` (the
    whole map: z = 0). Special tokens other than the first count in ``all`` alone. A part that covers a row leaves it 0.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        heads: what :func:`interp.heads.as_heads` takes.
        probe: an iterable of inputs of images.
        rings: values of k; None is all that the grid has.
        keys: positions of single keys.
        parts: in place of those above: by name, bool ``[query, key]``, true where the map is set to zero. Any stack whose sites are
            called once with all rows takes them, such as the text of a causal model: ``loss`` and the rest then speak of the
            rows that :func:`~interp.analysis.targets.target_of` reads.
        stack: the vision tower.
        metric: one of :data:`interp.analysis.targets.MEASURES`.
        progress: show a progress bar where the output is a terminal.

    Returns:
        ``value``, ``se (head, part, renormalised)`` in the metric's unit (mean over images) and ``mass (head, part)``, the share of the
        map that the part holds.

    Raises:
        AnalysisError: no head of the stack, a ring or key that the grid does not have, images of different size, parts of
            another shape than the map.
    """
    model = as_model(model)
    require_stack(model, stack)
    from interp.models.anatomy import anatomy

    chosen = as_heads(heads, anatomy(model.module))
    wrong = [str(h) for h in chosen if h.stack != stack]
    if wrong or not chosen:
        raise AnalysisError(f"heads must be of stack {stack!r}, got {wrong or 'none'}")
    samples = build(probe, model)
    values: list[np.ndarray[Any, Any]] = []
    masses: list[np.ndarray[Any, Any]] = []
    names: list[str] = []
    for sample in track(samples, "partial pruning", progress):
        inputs = inputs_of(sample, model)
        given = {k: v for k, v in inputs.items() if k != "labels"}
        cut = dict(parts) if parts is not None else map_parts(model, given, stack, rings, keys)
        if names and names != list(cut):
            raise AnalysisError("images must be of one size: their grids have different rings")
        names = list(cut)
        target = target_of(sample, inputs, model)
        with Replay(model, given, stack, positions=target.positions) as replay:
            found = [_of_head(replay, head, cut, metric, target) for head in chosen]
        values.append(np.stack([value for value, _ in found]))
        masses.append(np.stack([mass for _, mass in found]))
    table = np.stack(values)
    spread = table.std(0, ddof=1) / len(table) ** 0.5 if len(table) > 1 else np.full(table.shape[1:], np.nan)
    dims = ("head", "part", "renormalised")
    return xr.Dataset(
        {"value": (dims, table.mean(0)), "se": (dims, spread), "mass": (dims[:2], np.stack(masses).mean(0))},
        coords={"head": [str(h) for h in chosen], "part": names, "renormalised": [False, True]},
        attrs={
            "name": "partial pruning",
            "unit": measure(metric).unit,
            "paper": PAPER,
            "stack": stack,
            "n": len(table),
        },
    )


def map_parts(
    model: Model, inputs: dict[str, Any], stack: str, rings: Sequence[int] | None, keys: Sequence[int]
) -> dict[str, Tensor]:
    """Parts of a map by name, bool ``[token, token]``."""
    lay = layout(model.module, inputs, None)[stack]
    if lay.shape[0] != 1:
        raise AnalysisError(f"a sample must be one image of one tile, got {lay.shape[0]}")
    place = torch.from_numpy(np.stack([lay.row[0], lay.column[0]], -1).astype(np.int64))
    patch = torch.from_numpy(lay.mask("image")[0])
    special = torch.from_numpy(lay.mask("special")[0])
    between = patch[:, None] & patch[None]
    hops = (place[:, None] - place[None]).abs().amax(-1)
    largest = int(hops[between].max())
    wanted = list(range(largest + 1)) if rings is None else [int(k) for k in rings]
    out: dict[str, Tensor] = {}
    if bool(special.any()):
        cls = torch.zeros_like(special)
        cls[int(special.int().argmax())] = True
        out["cls_row"], out["cls_column"] = cls[:, None] & patch[None], patch[:, None] & cls[None]
    for k in wanted:
        if not 0 <= k <= largest:
            raise AnalysisError(f"rings must lie in [0, {largest}] on this grid, got {k}")
        out[f"within {k}"], out[f"beyond {k}"] = between & (hops <= k), between & (hops > k)
        out[f"ring {k}"] = between & (hops == k)
    for j in keys:
        if not 0 <= j < len(patch):
            raise AnalysisError(f"keys must lie in [0, {len(patch)}), got {j}")
        out[f"key {j}"] = (torch.arange(len(patch)) == j)[None].expand(len(patch), -1)
    out["all"] = torch.ones(len(patch), len(patch), dtype=torch.bool)
    return out


def _of_head(
    replay: Replay, head: Head, parts: dict[str, Tensor], metric: str, target: Any
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Damage ``[part, renormalised]`` and mass ``[part]``."""
    device = replay.model.device
    removed = torch.stack(list(parts.values())).to(device)
    mass: list[Tensor] = []

    def change(call: SiteCall, z: Tensor, row: Tensor) -> Tensor:
        p = pattern(call, torch.tensor([head.head], device=device))[:1, 0]
        if p.shape[1:] != removed.shape[1:]:
            raise AnalysisError(
                f"parts must be {list(p.shape[1:])} as the map of {head}, got {list(removed.shape[1:])}"
            )
        mass.append(((p * removed).sum((1, 2)) / p.sum()).cpu())
        kept = p * ~removed
        whole = p.sum(-1, keepdim=True)
        left = kept.sum(-1, keepdim=True)
        scaled = torch.where(left > 0, kept * whole / left.clamp_min(torch.finfo(p.dtype).tiny), kept)
        v = call.v[:1, head.head // (call.site.n_heads // call.site.n_kv_heads)]
        new = (torch.cat([kept, scaled]).to(v.dtype) @ v).to(z.dtype)
        out = z.clone()
        out[1:, :, head.head] = new
        return out

    chosen = measure(metric)
    logits = replay.logits(replay.run(head.layer, 2 * len(parts) + 1, after={head.layer: change}))
    numbers = chosen.function(logits, logits[0], target.resolved(logits[0]))
    damage = (chosen.sign * (numbers[1:] - numbers[0])).cpu().numpy().reshape(2, len(parts)).T
    return damage, mass[0].double().numpy()
