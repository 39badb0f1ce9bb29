"""What a head writes to the output by itself, whatever later layers make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from interp.analysis.ablation import Ablation


@dataclass(frozen=True)
class DirectEffect(Ablation):
    """Direct effect of a head: :class:`~interp.analysis.ablation.Ablation` with all that comes after it frozen.

    Wang et al. 2022, https://arxiv.org/abs/2211.00593 (path patching from a head to the logits), McGrath et al. 2023,
    https://arxiv.org/abs/2307.15771 (direct and total effect; their difference is what later layers make up for).

    Formula: every later layer, and the MLP of the head's own, adds to the residual stream what it added in the clean run; the
    final norm is the model's own and runs. ``direct_h`` is the damage then, ``total_h`` that of the plain ablation.

    Unit, settings, probe, control: as for the ablation; ``effect`` is ``"direct"``. One layer without its MLP is run for each
    head, whatever the depth, so this is ``L`` times cheaper than total effects.
    When not to use it: on models that normalise behind the sum (BERT), which have no stream to write to: refused. For a linear
    reading of the same, with the final norm frozen too: :mod:`~interp.analysis.logit_attribution`.
    """

    name: ClassVar[str] = "direct_effect"
    summary: ClassVar[str] = "what the output loses of the head's own write, all later layers frozen"
    paper: ClassVar[str] = "McGrath et al. 2023, https://arxiv.org/abs/2307.15771"
    needs: ClassVar[str] = "a residual stream (pre-norm)"

    effect: Literal["total", "direct"] = "direct"

    def notes(self) -> dict[str, Any]:
        return {**super().notes(), "frozen": "later layers and the layer's own MLP; the final norm runs"}
