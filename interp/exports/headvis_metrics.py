"""The numbers that place a head on HeadVis' scatter plot, as its ``data_pipeline.py`` defines them, from maps alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DESCRIPTIONS: dict[str, str] = {
    "self_attention_score": "mean of the diagonal",
    "previous_token_score": "mean of the first subdiagonal",
    "pattern_entropy": "mean entropy of a query's row, nats",
    "qk_distance": "mean |q - k|, weighted by attention, in positions",
    "qk_distance_variance": "variance of the same",
    "induction_score": "mean over queries of the attention to what followed earlier occurrences of the query's token",
    "logit_std": "mean over queries of the standard deviation of the scores before the softmax (from log p: equal up to a shift)",
    "top_logit_margin": "mean over queries of the largest minus the second largest score before the softmax",
    "logit_z_score": "mean over queries of (largest - mean) / standard deviation of the scores before the softmax",
    "query_token_entropy": "entropy over the tokens of the strongest pairs' queries, nats",
    "key_token_entropy": "the same for their keys",
}


@dataclass
class Sums:
    """Running sums of one head over sequences; :meth:`means` closes them."""

    total: dict[str, float] = field(default_factory=dict[str, float])
    count: dict[str, float] = field(default_factory=dict[str, float])
    queries: dict[str, float] = field(default_factory=dict[str, float])
    keys: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, name: str, values: Floats, weights: Floats | float = 1.0) -> None:
        weight = np.broadcast_to(weights, values.shape)
        self.total[name] = self.total.get(name, 0.0) + float((values * weight).sum())
        self.count[name] = self.count.get(name, 0.0) + float(weight.sum())

    def mean(self, name: str) -> float | None:
        """None where nothing was counted: missing, not 0."""
        return self.total[name] / self.count[name] if self.count.get(name) else None

    def means(self) -> dict[str, float | None]:
        """All metrics, in the order of :data:`DESCRIPTIONS`."""
        found = {name: self.mean(name) for name in DESCRIPTIONS}
        first, second = self.mean("qk_distance"), self.mean("squared")
        found["qk_distance_variance"] = None if first is None or second is None else max(0.0, second - first**2)
        found["query_token_entropy"], found["key_token_entropy"] = entropy(self.queries), entropy(self.keys)
        return found


def accumulate(sums: Sums, p: Floats, follows: NDArray[np.bool_]) -> None:
    """Add one map.

    Args:
        sums: of the head.
        p: ``[query, key]``.
        follows: from :func:`followers`.
    """
    n = len(p)
    sums.add("self_attention_score", np.diagonal(p))
    sums.add("previous_token_score", np.diagonal(p, -1))
    seen = p > 0
    logs = np.log(np.where(seen, p, 1.0))
    sums.add("pattern_entropy", -(p * logs).sum(1))
    distance = np.abs(np.arange(n)[:, None] - np.arange(n)[None]).astype(np.float64)
    sums.add("qk_distance", distance, p)
    sums.add("squared", distance**2, p)
    sums.add("induction_score", np.where(follows, p, 0.0).sum(1))
    several = seen.sum(1) > 1
    if not several.any():
        return
    # A softmax forgets a shift of its row, so differences of log p are differences of scores. What underflowed to 0 is left out.
    logs, seen = logs[several], seen[several]
    counts = seen.sum(1)
    mean = np.where(seen, logs, 0.0).sum(1) / counts
    std = np.sqrt(np.where(seen, (logs - mean[:, None]) ** 2, 0.0).sum(1) / counts)
    ranked = np.sort(np.where(seen, logs, -np.inf), axis=1)
    sums.add("logit_std", std)
    sums.add("top_logit_margin", ranked[:, -1] - ranked[:, -2])
    spread = std > 0
    sums.add("logit_z_score", (ranked[spread, -1] - mean[spread]) / std[spread])


def followers(identities: NDArray[np.int64]) -> NDArray[np.bool_]:
    """``[query, key]``: key j + 1 for every earlier j that holds the query's token. Tokens below 0 (patches, pads) match nothing."""
    same = (identities[:, None] == identities[None]) & (identities[:, None] >= 0)
    same &= np.tri(len(identities), k=-1, dtype=np.bool_)
    out = np.zeros_like(same)
    out[:, 1:] = same[:, :-1]
    return out


def entropy(weights: dict[str, float]) -> float | None:
    """Of a distribution given by weights, in nats; None where there is no weight."""
    values = np.array([w for w in weights.values() if w > 0], np.float64)
    if not values.size:
        return None
    share = values / values.sum()
    return float(-(share * np.log(share)).sum())
