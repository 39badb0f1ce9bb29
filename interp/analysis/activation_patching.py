"""Activation patching: each head's activation from one run put into another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from interp.analysis.pairs import KEYED, WHAT, PairScore, Rows, What, activations, patch, rows_of
from interp.analysis.replay import Replay
from interp.analysis.running import AnalysisError, Floats
from interp.models.model import Model


@dataclass(frozen=True)
class ActivationPatching(PairScore):
    """Activation patching, as in Heimersheim and Nanda 2024, https://arxiv.org/abs/2404.15255 (Vig et al. 2020, Meng et al. 2022).

    Formula: ``(m(base with h from source) - m(base)) / (m(source) - m(base))`` for each head h. ``denoise``: base is the corrupt run
    and source the clean one, which asks whether the head alone is enough to restore the answer; ``noise`` the other way round
    asks whether the head is needed. Exact: every head is a row of a batch, run from its layer on
    (:class:`~interp.analysis.replay.Replay`).

    What is patched: ``z`` (all that the head does), ``q``, ``k``, ``v`` (why it does it), ``pattern`` (what it looks at, values
    staying the base run's; whole maps are kept, quadratic in the length). k and v are those of a KV head: every query head of
    the group has the group's value.

    Unit: fraction of the difference between the runs, or that of the metric with ``normalise=False``.

    Args:
        stack, metric, direction, normalise: see :class:`~interp.analysis.pairs.PairScore`.
        what: see above.
        rows: positions that are patched (negative ones from the end), or a function from a pair to its positions, such as
            ``lambda pair: [pair.position("S2")]``; None is all. For k and v key positions.

    Probe: ``IndirectObject(n=8)``, or any iterable of contrast pairs that are aligned token by token.
    Control: a row of the same batch with nothing patched: the numerical floor.
    When not to use it: denoising misses heads that need each other (each alone restores nothing), noising those that have a
    backup; look at both, and at sets (:mod:`~interp.analysis.faithfulness`).
    """

    name: ClassVar[str] = "activation_patching"
    summary: ClassVar[str] = "how much of the answer comes back when the head is patched from the clean run"
    paper: ClassVar[str] = "Heimersheim and Nanda 2024, https://arxiv.org/abs/2404.15255"
    unit: ClassVar[str] = "fraction of the difference between the runs"
    control: ClassVar[str] = "a row in which nothing is patched"
    needs: ClassVar[str] = "contrast pairs"

    what: What = "z"
    rows: Rows = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in WHAT:
            raise AnalysisError(f"what must be one of {WHAT}, got {self.what!r}")

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        pair, positions = self.pair(model, sample), rows_of(self.rows, sample)
        source = activations(model, pair.source, self.stack, self.what)
        function = self.measured.function
        with Replay(model, pair.source, self.stack, positions=pair.target.positions) as replay:
            other = replay.logits()
        with Replay(model, pair.base, self.stack, positions=pair.target.positions) as replay:
            base = replay.logits()
            target = pair.target.resolved(base[0])
            own = function(base, base[0], target)
            whole = float(function(other, other[0], target) - own)
            out, null = (np.full((1, *replay.shape.shape(self.stack)), np.nan) for _ in range(2))
            for site in replay.sites:
                group = site.n_heads // site.n_kv_heads if self.what in KEYED else 1
                rows = site.n_heads // group + 1
                mask = torch.zeros(rows, site.n_heads, dtype=torch.bool)
                for n in range(1, rows):
                    mask[n, (n - 1) * group : n * group] = True
                before, after = patch(self.what, mask, source[site.layer], positions)
                output = replay.run(
                    site.layer, rows, before=None if before is None else {site.layer: before},
                    after=None if after is None else {site.layer: after},
                )  # fmt: skip
                logits = replay.logits(output)
                found = function(logits, base[0], target)
                change = self.scaled((found[1:] - found[0]).repeat_interleave(group), whole)
                out[0, site.layer, : site.n_heads] = change
                null[0, site.layer, : site.n_heads] = self.scaled((found[:1] - own), whole)
        return out, null
