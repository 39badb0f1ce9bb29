"""Does a small set of heads do what the whole model does? Faithfulness and completeness over the k top heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.donors import KINDS, Kind, donor_of, fitted, means_of, outputs_of
from interp.analysis.replay import Replay
from interp.analysis.running import AnalysisError, Floats, as_model, build, describe, inputs_of, require_stack, track
from interp.analysis.targets import Positions, measure, target_of
from interp.heads import Heads, as_heads
from interp.models.model import Model

PAPER = "Wang et al. 2022, https://arxiv.org/abs/2211.00593, section 4"
BATCH_BYTES = 2**30


def faithfulness(
    model: Any,
    ranking: Any,
    probe: Any = None,
    *,
    ks: Sequence[int] | None = None,
    stack: str = "text",
    kind: Kind = "resample",
    metric: str | Callable[..., Any] = "logit_difference",
    positions: Positions = "all",
    n_random: int = 8,
    matched: str = "layer",
    seed: int = 0,
    rows: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Faithfulness and completeness of the ``k`` top heads of a ranking, for every k (Wang et al. 2022; Hanna et al. 2024).

    Formulas, with C the k top heads, M all heads, and m(S) the metric with all heads outside S ablated:
    ``faithfulness(k) = (m(C) - m(none)) / (m(M) - m(none))``: 1 where C alone does what the model does;
    ``completeness(k) = (m(M - C) - m(none)) / (m(M) - m(none))``: 0 where nothing is left without C. Both are ratios of means over
    the samples; they may leave 0 .. 1. MLPs always run.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        ranking: heads, best first (a score's ``heads.top(n)``), or a score.
        probe: contrast pairs (by default ``IndirectObject(n=8)``), or an iterable of inputs.
        ks: sizes of C; None is 0, 1, 2, 4, ... and all of the ranking.
        stack: whose heads are kept or ablated.
        kind: what stands in the place of an ablated head: ``resample``, ``mean`` or ``zero``.
        metric: as for :class:`~interp.analysis.ablation.Ablation`.
        positions: likewise.
        n_random: random rankings, the control.
        matched: ``"layer"``: each random ranking has at every place a head of the same layer; ``"none"``: any head.
        seed: of the random rankings and of donors.
        rows: of a batch at most; 0 is as many as fit.
        progress: show a progress bar where the output is a terminal.

    Returns:
        ``faithfulness``, ``completeness (k)``, ``random_faithfulness``, ``random_completeness (random, k)`` and
        ``metric_by_sample (sample, set)`` for the sets ``all``, ``none``; attributes ``area`` (mean of faithfulness - random over k).

    Raises:
        AnalysisError: no ranking, k outside of it, an unknown kind; all and no heads give the same metric.
    """
    if kind not in KINDS or kind == "uniform":
        raise AnalysisError(f"kind must be 'resample', 'mean' or 'zero', got {kind!r}")
    if matched not in ("layer", "none"):
        raise AnalysisError(f"matched must be 'layer' or 'none', got {matched!r}")
    model = as_model(model)
    require_stack(model, stack)
    chosen = measure(metric)
    if probe is None:
        from probes.indirect_object import IndirectObject

        probe = IndirectObject(n=8)
    samples = build(probe, model)
    heads = _ranked(ranking, model, stack)
    sizes = _sizes(ks, len(heads))
    every = _every(model, stack)
    rng = np.random.default_rng(seed)
    rankings = [heads, *(_random(heads, every, matched, rng) for _ in range(n_random))]
    # Rows: all heads, no head, then of each ranking the kept sets and the sets without them.
    sets = [every, Heads()]
    for one in rankings:
        sets += [Heads(one[:k]) for k in sizes] + [every - Heads(one[:k]) for k in sizes]
    table = np.stack([
        _of_sample(model, samples, n, sets, stack, kind, metric, positions, seed, rows, shared)
        for shared in [means_of(model, samples, stack) if kind == "mean" else None]
        for n in track(range(len(samples)), "faithfulness", progress)
    ])  # fmt: skip
    return _curves(table, sizes, n_random, {
        "name": "faithfulness", "unit": "fraction of the metric", "paper": PAPER, "stack": stack, "kind": kind,
        "metric": metric if isinstance(metric, str) else getattr(metric, "__name__", "function"), "metric unit": chosen.unit,
        "ranking": str(heads), "matched": matched, "seed": seed, "probe": str(describe(probe)), "model": model.name,
    })  # fmt: skip


def _curves(table: Floats, sizes: list[int], n_random: int, attrs: dict[str, Any]) -> xr.Dataset:
    means = table.mean(0)
    whole = means[0] - means[1]
    if not abs(whole) > 1e-12:
        raise AnalysisError(
            "all heads and no heads must give a different metric, and do not: there is nothing to explain"
        )
    shares = ((means[2:] - means[1]) / whole).reshape(n_random + 1, 2, len(sizes))
    dims = ("random", "k")
    out = xr.Dataset(
        {
            "faithfulness": ("k", shares[0, 0]), "completeness": ("k", shares[0, 1]),
            "random_faithfulness": (dims, shares[1:, 0]), "random_completeness": (dims, shares[1:, 1]),
            "metric_by_sample": (("sample", "set"), table[:, :2]),
        },
        coords={"k": sizes, "set": ["all", "none"]}, attrs=attrs,
    )  # fmt: skip
    if n_random:
        out.attrs["area"] = float((shares[0, 0] - shares[1:, 0].mean(0)).mean())
    return out


def _of_sample(
    model: Model, samples: Sequence[Any], index: int, sets: list[Heads], stack: str, kind: Kind,
    metric: str | Callable[..., Any], positions: Positions, seed: int, rows: int, shared: Mapping[int, Tensor] | None,
) -> Floats:  # fmt: skip
    """Metric of every set of kept heads, ``[set]``."""
    inputs = inputs_of(samples[index], model)
    target = target_of(samples[index], inputs, model, positions)
    donor = shared
    if kind == "resample":
        donor = outputs_of(model, inputs_of(donor_of(samples, index, seed), model), stack)
    given = {k: v for k, v in inputs.items() if k != "labels"}
    with Replay(model, given, stack, positions=target.positions) as replay:
        clean = replay.logits()[0]
        target = target.resolved(clean)
        first = replay.sites[0].layer
        values = donor
        if donor is not None:
            values = {s.layer: fitted({0: donor[s.layer]}, _length(replay, s.layer), seed)[0] for s in replay.sites}
        limit = rows or max(1, BATCH_BYTES // (4 * clean.numel()))
        found: list[Tensor] = []
        for start in range(0, len(sets), limit):
            part = sets[start : start + limit]
            changes = {s.layer: _keeping(part, s, stack, values) for s in replay.sites}
            logits = replay.logits(replay.run(first, len(part), after=changes))
            found.append(measure(metric).function(logits, clean, target).cpu())
    return torch.cat(found).numpy()


def _keeping(sets: list[Heads], site: Any, stack: str, values: Mapping[int, Tensor] | None) -> Any:
    from interp.analysis.donors import replacing

    mask = torch.ones(len(sets), site.n_heads, dtype=torch.bool)
    for row, kept in enumerate(sets):
        mask[row, kept.by_layer(stack).get(site.layer, [])] = False
    return replacing(mask, None if values is None else values[site.layer], len(sets))


def _length(replay: Replay, layer: int) -> int:
    given = replay.calls[replay.first_call(layer)].given
    return given.shape[1] if given.ndim == 3 else given.shape[0]


def _ranked(ranking: Any, model: Model, stack: str) -> Heads:
    from interp.models.anatomy import anatomy

    if isinstance(ranking, xr.Dataset):
        ranking = ranking.heads.top(ranking["value"].size)
    heads = as_heads(ranking, anatomy(model.module))
    wrong = [str(h) for h in heads if h.stack != stack]
    if wrong or not heads:
        raise AnalysisError(f"ranking must be heads of stack {stack!r}, got {wrong or 'none'}")
    return heads


def _every(model: Model, stack: str) -> Heads:
    from interp.heads import Head
    from interp.models.anatomy import anatomy

    return Heads(Head(s.layer, h, stack) for s in anatomy(model.module).stacks[stack] for h in range(s.n_heads))


def _sizes(ks: Sequence[int] | None, n: int) -> list[int]:
    if ks is None:
        powers = [2**i for i in range(n.bit_length()) if 2**i < n]
        return [0, *powers, n]
    sizes = [int(k) for k in ks]
    if not sizes or min(sizes) < 0 or max(sizes) > n or len(set(sizes)) != len(sizes):
        raise AnalysisError(f"ks must be different numbers in [0, {n}], the heads of the ranking, got {sizes}")
    return sorted(sizes)


def _random(heads: Heads, every: Heads, matched: str, rng: np.random.Generator) -> Heads:
    """As many heads in a random order; with each of its layer where matched."""
    if matched == "none":
        return Heads(every[int(n)] for n in rng.permutation(len(every))[: len(heads)])
    left = {
        layer: list(rng.permutation([h.head for h in every if h.layer == layer])) for layer in {h.layer for h in heads}
    }
    return Heads(type(h)(h.layer, int(left[h.layer].pop()), h.stack) for h in heads)


__all__ = ["faithfulness"]
