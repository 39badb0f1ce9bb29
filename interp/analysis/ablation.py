"""What the model loses without a head: exact ablation of every head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.branch import Branch
from interp.analysis.donors import KINDS, Kind, donor_of, fitted, means_of, outputs_of, replacing, uniform
from interp.analysis.replay import Replay
from interp.analysis.running import (
    AnalysisError,
    Floats,
    HeadScore,
    as_model,
    build,
    describe,
    inputs_of,
    require_stack,
    track,
)
from interp.analysis.targets import MEASURES, Positions, Target, measure, target_of
from interp.heads import Heads, as_heads
from interp.models.anatomy import anatomy
from interp.models.model import Model

BATCH_BYTES = 2**30
"""Of the read-out logits of one batch, in fp32."""
BATCH_TOKENS = 2**16
"""Of one batch, all rows together: an MLP's activations of an 8B model then take 6 GB in bf16."""


@dataclass(frozen=True)
class Ablation(HeadScore):
    """Ablation of one head at a time, as in Michel et al. 2019, https://arxiv.org/abs/1905.10650 (there: zero).

    Formula: ``damage_h = sign * (m(model without h) - m(model))``, positive where the head helped: the rise of a loss or of a
    divergence, the fall of a logit, a probability or an accuracy. The heads are exact, none is approximated: one clean forward,
    then from layer l on (see :class:`~interp.analysis.replay.Replay`), all heads of the layer as rows of one batch.

    What stands in the head's place (``kind``) is the question that is asked, and kinds share no ranking:

    - ``resample`` (default): z of the same positions on another sample, or on a pair's corrupt half. What is lost with the
      head's dependence on this input, the model staying on activations it knows (Chan et al. 2022, causal scrubbing; Heimersheim
      and Nanda 2024, https://arxiv.org/abs/2404.15255).
    - ``mean``: its mean over the samples at the same position (Wang et al. 2022, https://arxiv.org/abs/2211.00593).
    - ``zero``: 0. Also what the head adds to every input is lost; the model may be off its usual activations.
    - ``uniform``: it attends to all visible keys alike (Wu et al. 2024, https://arxiv.org/abs/2404.15574).

    Effects: ``total``, or ``direct``: every later layer, and the layer's own MLP, add what they added in the clean run, so that
    only what the head writes itself reaches the output (:class:`~interp.analysis.direct_effect.DirectEffect`).

    Unit: that of the metric: ``loss`` nats a token, ``logit`` and ``logit_difference`` logits, ``probability``, ``accuracy``
    fraction, ``jsd`` Jensen-Shannon divergence of the output before and after, bits (0 to 1). Means over read-out positions.

    Args:
        stack: whose heads.
        kind: see above. :func:`kind_agreement` shows how far the ranking depends on it.
        metric: see above, or a function ``(logits [rows, class], answer, foil) -> [rows]`` of the last read-out position, as
            :mod:`probes.contrast` has them; its damage is by how much it falls.
        effect: ``"total"`` or ``"direct"``.
        positions: read-out positions of a text, see :func:`~interp.analysis.targets.target_of`.
        heads: what :func:`interp.heads.as_heads` takes; None is all of the stack. The others are NaN.
        rows: heads of one batch at most; 0 is as many as a layer has, fewer where their logits would take over 1 GiB, or their
            tokens be over 65536.
        seed: of the draw of donors.

    Probe: ``Passages(n=8, length=64)`` for text; contrast pairs, image prompts, or any iterable of inputs (of a classifier with
    or without ``labels``).
    Control: a row of the same batch in which nothing is changed, against the clean forward: the numerical floor below which a
    value says nothing (fp32: about 1e-6 nats; bf16: 1e-2 is usual).
    When not to use it: to show that heads act together, or that one stands in for another (:mod:`~interp.analysis.faithfulness`).
    """

    name: ClassVar[str] = "ablation"
    summary: ClassVar[str] = "what the model's output loses without the head (resample, mean, zero or uniform)"
    paper: ClassVar[str] = "Michel et al. 2019, https://arxiv.org/abs/1905.10650"
    unit: ClassVar[str] = "nats"
    control: ClassVar[str] = "a row in which nothing is changed"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "Passages"

    stack: str = "text"
    kind: Kind = "resample"
    metric: str | Callable[..., Any] = "loss"
    effect: Literal["total", "direct"] = "total"
    positions: Positions = "all"
    heads: Any = None
    rows: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AnalysisError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.effect not in ("total", "direct"):
            raise AnalysisError(f"effect must be 'total' or 'direct', got {self.effect!r}")
        if not isinstance(self.rows, int) or self.rows < 0:
            raise AnalysisError(f"rows must be a whole number of at least 0, got {self.rows!r}")
        measure(self.metric)

    @property
    def result_unit(self) -> str:
        return measure(self.metric).unit

    def default_probe(self) -> Any:
        if self.stack != "text":
            raise AnalysisError(
                f"probe must be given for stack {self.stack!r}: an iterable of inputs, as model.encode makes them"
            )
        from probes.text import Passages

        return Passages(n=8, length=64)

    def run(self, model: Any, probe: Any = None, *, progress: bool = True) -> xr.Dataset:
        from interp.scores import make_score

        model = as_model(model)
        require_stack(model, self.stack)
        probe = self.default_probe() if probe is None else probe
        samples = build(probe, model)
        shared = self.prepare(model, samples)
        found = [self.of_sample(model, samples, n, shared) for n in track(range(len(samples)), self.name, progress)]
        value, null = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return make_score(
            value, name=self.name, unit=self.result_unit, paper=self.paper, stack=self.stack, null_by_sample=null,
            settings={**self.settings(), "probe": describe(probe), "model": model.name, **self.notes()},
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """JSON-able."""
        metric = (
            self.metric
            if isinstance(self.metric, str)
            else getattr(self.metric, "__name__", type(self.metric).__name__)
        )
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        heads = (
            None if self.heads is None else str(as_heads(self.heads)) if "*" not in str(self.heads) else str(self.heads)
        )
        return {
            "stack": self.stack, "kind": self.kind, "metric": metric, "effect": self.effect, "positions": positions,
            "heads": heads, "rows": self.rows, "seed": self.seed,
        }  # fmt: skip

    def prepare(self, model: Model, samples: Sequence[Any]) -> Any:
        """What all samples share: for ``mean``, the means."""
        return means_of(model, samples, self.stack) if self.kind == "mean" else None

    def of_sample(self, model: Model, samples: Sequence[Any], index: int, shared: Any) -> tuple[Floats, Floats]:
        """Damage and floor of one sample, each ``[1, layer, head]``."""
        sample = samples[index]
        inputs = inputs_of(sample, model)
        target = target_of(sample, inputs, model, self.positions)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        donor = self._donor(model, samples, index, shared)
        with Replay(model, inputs, self.stack, positions=target.positions) as replay:
            return ablated(
                replay, target, self.metric, kind=self.kind, donor=donor, effect=self.effect, rows=self.rows, seed=self.seed,
                heads=None if self.heads is None else as_heads(self.heads, anatomy(model.module)),
            )  # fmt: skip

    def _donor(self, model: Model, samples: Sequence[Any], index: int, shared: Any) -> Mapping[int, Tensor] | None:
        if self.kind == "resample":
            other = donor_of(samples, index, self.seed)
            return outputs_of(model, inputs_of(other, model), self.stack)
        return shared


def ablated(
    replay: Replay, target: Target, metric: str | Callable[..., Any] = "loss", *, kind: Kind = "zero",
    donor: Mapping[int, Tensor] | None = None, effect: str = "total", heads: Heads | None = None, rows: int = 0, seed: int = 0,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Damage of every head of an open replay, and the floor, each ``[1, layer, head]``; NaN where there is no such head.

    Args:
        replay: open, with the target's positions.
        target: what is right.
        metric: as for :class:`Ablation`.
        kind: what stands in a head's place.
        donor: z by layer ``[entry, position, H, Dv]``, for ``mean`` and ``resample``.
        effect: ``"total"`` or ``"direct"``.
        heads: None is all.
        rows: of a batch at most, 0 for as many as fit.
        seed: for donors that are shorter.
    """
    chosen, stack = measure(metric), replay.stack
    n_layers, n_heads = replay.shape.shape(stack)
    value, null = (np.full((1, n_layers, n_heads), np.nan) for _ in range(2))
    clean = replay.logits()[0]
    target = target.resolved(clean)
    length = _length(replay, replay.sites[0].layer, 1)
    limit = rows or max(1, min(BATCH_BYTES // (4 * clean.numel()), BATCH_TOKENS // length) - 1)
    wanted = None if heads is None else heads.by_layer(stack)
    found: list[tuple[int, list[int], Tensor]] = []
    for site in replay.sites:
        mine = list(range(site.n_heads)) if wanted is None else wanted.get(site.layer, [])
        values = None
        if donor is not None and mine:
            values = fitted({0: donor[site.layer]}, _length(replay, site.layer, donor[site.layer].shape[1]), seed)[0]
        branch = Branch(replay, site) if effect == "direct" and mine else None
        for start in range(0, len(mine), limit):
            part = mine[start : start + limit]
            logits = _without(replay, site, part, kind, values, branch)
            found.append((site.layer, part, _changes(chosen.function, logits, clean, target)))
    for layer, part, changes in found:
        numbers = chosen.sign * changes.cpu().numpy()
        value[0, layer, part], null[0, layer, part] = numbers[1:], numbers[0]
    return value, null


def _changes(
    function: Callable[[Tensor, Tensor, Target], Tensor], logits: Tensor, clean: Tensor, target: Target
) -> Tensor:
    """Of the row in which nothing is changed against the clean run, then of each head against that row, ``[1 + heads]``.

    Heads went through the very same kernels as that row, so what a batch rounds otherwise than one sample is in neither.
    """
    floor = function(logits[:1], clean, target) - function(clean[None], clean, target)
    numbers = function(logits, logits[0], target)
    return torch.cat([floor, numbers[1:] - numbers[0]])


def _without(
    replay: Replay, site: Any, part: list[int], kind: str, values: Tensor | None, branch: Branch | None
) -> Tensor:
    """Logits ``[1 + heads, position, class]``: a row in which nothing is changed, then one without each head."""
    rows = len(part) + 1
    mask = torch.zeros(rows, site.n_heads, dtype=torch.bool)
    mask[torch.arange(1, rows), part] = True
    mask = mask.to(replay.model.device)
    if kind == "uniform":
        changes: dict[str, Any] = {"before": {site.layer: uniform(mask)}}
    else:
        changes = {"after": {site.layer: replacing(mask, values, rows)}}
    output = replay.run(site.layer, rows, **changes) if branch is None else branch.run(rows, **changes)
    return replay.logits(output)


def _length(replay: Replay, layer: int, fallback: int) -> int:
    """Positions of the stack in the clean forward."""
    given = replay.calls[replay.first_call(layer)].given
    return given.shape[1] if given.ndim == 3 else given.shape[0] if given.ndim == 2 else fallback


def kind_agreement(
    model: Any, probe: Any = None, *, kinds: Sequence[Kind] = KINDS, progress: bool = True, **settings: Any
) -> xr.Dataset:
    """How far the ranking of heads depends on what stands in their place: Spearman's rho between kinds of ablation.

    Args:
        model, probe: as for :class:`Ablation`.
        kinds: at least two.
        progress: show a progress bar where the output is a terminal.
        settings: of :class:`Ablation`.

    Returns:
        ``rho``, ``ci_low``, ``ci_high`` ``(kind, other)`` (bootstrap over samples) and ``value (kind, layer, head)``.

    Raises:
        AnalysisError: fewer than two kinds, or an unknown one.
    """
    from interp.scores import rank_agreement

    if len(kinds) < 2 or len(set(kinds)) != len(kinds):
        raise AnalysisError(f"kinds must be at least two different ones of {KINDS}, got {tuple(kinds)}")
    made: list[dict[str, Any]] = [{**settings, "kind": kind} for kind in kinds]
    scores = [Ablation(**one).run(model, probe, progress=progress) for one in made]
    table = np.full((3, len(kinds), len(kinds)), 1.0)
    enough = scores[0].sizes["sample"] > 1
    for i, a in enumerate(scores):
        for j, b in enumerate(scores[:i]):
            found = rank_agreement(a, b, over="samples" if enough else "heads")
            table[:, i, j] = table[:, j, i] = found.rho, found.ci_low, found.ci_high
    out = xr.Dataset(
        {name: (("kind", "other"), table[n]) for n, name in enumerate(("rho", "ci_low", "ci_high"))},
        coords={"kind": list(kinds), "other": list(kinds)},
    )
    out["value"] = (("kind", "layer", "head"), np.stack([s["value"].values for s in scores]))
    out.attrs = {"name": "kind agreement", "unit": "Spearman's rho", "settings": scores[0].attrs["settings"]}
    return out


__all__ = ["BATCH_BYTES", "MEASURES", "Ablation", "ablated", "kind_agreement"]
