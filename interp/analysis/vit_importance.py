"""Importance of the heads of a vision transformer by pruning: what the output loses, and what the layer itself loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from interp.analysis.donors import replacing
from interp.analysis.replay import Replay
from interp.analysis.running import AnalysisError, Floats, HeadScore, inputs_of
from interp.analysis.targets import MEASURES, target_of
from interp.models.layout import layout
from interp.models.model import Model

GLOBAL = ("probability", "logit", "jsd", "loss", "accuracy")
LOCAL = ("cls_shift", "cls_distance", "layer_shift")
UNITS = {
    "cls_shift": "1 - cosine",
    "cls_distance": "share of the CLS token's norm",
    "layer_shift": "share of a token's norm",
}


@dataclass(frozen=True)
class VitImportance(HeadScore):
    """Pruning-based importance for "How Does Attention Work in Vision Transformers?" (Li et al. 2023), https://arxiv.org/abs/2303.13731.

    That paper prunes each head (z = 0) and measures the model's output and the layer's. Its formulas could not be read: these
    are our definitions, in the two families that it names. With p, s the class probabilities and logits, c the class, x_t and C
    the layer's output tokens and its CLS token, and a prime behind the pruning:

    - global: ``probability`` ``p_c - p'_c``; ``logit`` ``s_c - s'_c``; ``jsd`` ``JSD(p || p')`` in bits; ``loss`` ``CE(p') - CE(p)``;
      ``accuracy`` (a number of the whole set of images).
    - local, at the output of the head's own layer: ``cls_shift`` ``1 - cos(C, C')``; ``cls_distance`` ``||C - C'|| / ||C||``;
      ``layer_shift`` ``mean_t ||x_t - x'_t|| / ||x_t||``.

    ``keep="all_but_one"`` prunes the head. ``keep="one"`` prunes all other heads of its layer: small values then mean that the head
    alone is nearly enough.

    Unit: that of the metric.

    Args:
        stack: the vision tower.
        metric: see above.
        keep: likewise.

    Probe: an iterable of inputs, as ``model.encode(None, image)`` makes them, with ``labels [1]`` where they are known; without, c
    is the class that the model chooses. Local metrics need no classifier.
    Control: a row of the same batch in which nothing is pruned: the numerical floor.
    When not to use it: to say what a head looks at (:func:`~interp.analysis.partial_pruning.partial_pruning` takes it apart); CLS
    metrics for towers without such a token (SigLIP): refused.
    """

    name: ClassVar[str] = "vit_importance"
    summary: ClassVar[str] = "what a vision transformer's output, or the layer's, loses when the head is pruned"
    paper: ClassVar[str] = "Li et al. 2023, https://arxiv.org/abs/2303.13731 (definitions ours)"
    unit: ClassVar[str] = "bits"
    stacks: ClassVar[tuple[str, ...]] = ("vision",)
    probe: ClassVar[str] = "inputs of images"
    control: ClassVar[str] = "a row in which nothing is pruned"
    needs: ClassVar[str] = "a vision tower; global metrics: a classifier"

    stack: str = "vision"
    metric: Literal["probability", "logit", "jsd", "loss", "accuracy", "cls_shift", "cls_distance", "layer_shift"] = (
        "jsd"
    )
    keep: Literal["all_but_one", "one"] = "all_but_one"

    def __post_init__(self) -> None:
        if self.metric not in (*GLOBAL, *LOCAL):
            raise AnalysisError(f"metric must be one of {(*GLOBAL, *LOCAL)}, got {self.metric!r}")
        if self.keep not in ("all_but_one", "one"):
            raise AnalysisError(f"keep must be 'all_but_one' or 'one', got {self.keep!r}")

    @property
    def result_unit(self) -> str:
        return UNITS[self.metric] if self.metric in UNITS else MEASURES[self.metric].unit

    def default_probe(self) -> Any:
        raise AnalysisError("probe must be given: an iterable of inputs of images, as model.encode makes them")

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        inputs = inputs_of(sample, model)
        given = {k: v for k, v in inputs.items() if k != "labels"}
        local = self.metric in LOCAL
        target = None if local else target_of(sample, inputs, model)
        cls = cls_token(model, given, self.stack) if self.metric.startswith("cls") else 0
        with Replay(model, given, self.stack, positions=None if target is None else target.positions) as replay:
            out, null = (np.full((1, *replay.shape.shape(self.stack)), np.nan) for _ in range(2))
            clean = None if local else replay.logits()[0]
            target = None if target is None or clean is None else target.resolved(clean)
            for site in replay.sites:
                rows = site.n_heads + 1
                mask = torch.zeros(rows, site.n_heads, dtype=torch.bool)
                one = torch.eye(site.n_heads, dtype=torch.bool)
                mask[1:] = ~one if self.keep == "one" else one
                until = site.layer if local else None
                found = replay.run(site.layer, rows, after={site.layer: replacing(mask, None, rows)}, until=until)
                if target is None or clean is None:
                    plain = replay.calls[replay.first_call(site.layer)].result
                    plain = plain if isinstance(plain, Tensor) else plain[0]
                    changes = _shifts(found.reshape(rows, -1, found.shape[-1]), self.metric, cls)
                    floor = _shifts(
                        torch.stack([plain.reshape(-1, plain.shape[-1]), found[:1].reshape(-1, plain.shape[-1])]),
                        self.metric,
                        cls,
                    )
                else:
                    metric = MEASURES[self.metric]
                    logits = replay.logits(found)
                    numbers = metric.function(logits, logits[0], target)
                    changes = metric.sign * (numbers[1:] - numbers[0])
                    floor = metric.sign * (
                        metric.function(logits[:1], clean, target) - metric.function(clean[None], clean, target)
                    )
                out[0, site.layer, : site.n_heads] = changes.cpu().numpy()
                null[0, site.layer, : site.n_heads] = floor.cpu().numpy()
        return out, null


def _shifts(tokens: Tensor, metric: str, cls: int) -> Tensor:
    """Of tokens ``[1 + heads, token, width]``: each row's difference from the first, ``[heads]``."""
    tokens = tokens.double()
    base, changed = tokens[:1], tokens[1:]
    if metric == "layer_shift":
        return (torch.linalg.vector_norm(changed - base, dim=-1) / torch.linalg.vector_norm(base, dim=-1)).mean(-1)
    base, changed = base[:, cls], changed[:, cls]
    if metric == "cls_shift":
        return 1 - torch.nn.functional.cosine_similarity(changed, base, dim=-1)
    return torch.linalg.vector_norm(changed - base, dim=-1) / torch.linalg.vector_norm(base, dim=-1)


def cls_token(model: Model, inputs: dict[str, Any], stack: str) -> int:
    """Position of a vision tower's first special token.

    Raises:
        AnalysisError: it has none.
    """
    special = np.flatnonzero(layout(model.module, inputs, None)[stack].mask("special")[0])
    if not len(special):
        raise AnalysisError(
            f"a metric of the CLS token needs one, and stack {stack!r} of {type(model.module).__name__} has none"
        )
    return int(special[0])
