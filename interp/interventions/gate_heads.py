"""Routing of tokens to heads without a router."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Edit, Gain
from interp.interventions._base import HeadPolicy, Strength, every_head
from interp.models.anatomy import Site
from interp.tracing.calls import RunState, SiteCall

GATES = ("hard", "soft")


@dataclass(frozen=True, eq=False)
class GateHeads(HeadPolicy):
    """Let every token use its own heads (Jin et al. 2024, MoH, https://arxiv.org/abs/2410.11842).

    Of the n chosen heads of a layer the first ``int(n * shared)`` always work; of the others, for every token, the
    ``int(n * routed)`` with the largest query norm ``||q_i||_2`` do, and the rest give ``z = 0``. That is the released
    MoH-LLaMA3-8B, which routes without parameters: norm divided by its standard deviation over the routed heads, softmax,
    top-k, gates 0 or 1. The model was trained on with this; here it acts on a model as it is, and all heads are computed.

    When not to use it: where queries are normalised (Qwen 3, Gemma 3), all norms of a head are nearly alike and the same heads
    win at every token.

    Args:
        heads: what :func:`interp.heads.as_heads` takes. An empty set changes nothing.
        shared: share of a layer's chosen heads that always work: 0.5 in the released model.
        routed: share of them that a token may choose among the rest: 0.25 in the released model. With
            ``shared + routed = 1`` nothing changes: the tokens stay identical.
        gates: ``hard`` are 0 and 1 (the released LLaMA); ``soft`` are the softmax of the chosen, made to sum to their number
            (the paper's MoH-ViT and -DiT, there with a trained router).
        scope, rows: as for :class:`~interp.interventions.MaskHeads`.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model does not have.
        ValueError: shares outside 0 .. 1 or of a sum above 1, unknown gates.
    """

    _: KW_ONLY
    shared: float = 0.5
    routed: float = 0.25
    gates: Literal["hard", "soft"] = "hard"

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.11842"
    unit: ClassVar[str] = "heads at work for a token"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shared", "routed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share within 0 .. 1, got {getattr(self, name)!r}")
        if self.shared + self.routed > 1:
            raise ValueError(f"shared + routed must be at most 1, got {self.shared} + {self.routed}")
        if self.gates not in GATES:
            raise ValueError(f"gates must be one of {GATES}, got {self.gates!r}")

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> GateHeads:
        on = strength == "on"
        return cls(every_head(model), shared=0.0 if on else 0.5, routed=0.25 if on else 0.5)

    def acts_on(self, site: Site, run: RunState) -> bool:
        return self.shared + self.routed < 1 and super().acts_on(site, run)

    def before(self, call: SiteCall) -> Edit | None:
        where = self.where(call) if self.shared + self.routed < 1 else None
        if where is None:
            return None
        mine = self.mine(call)
        shared, routed = int(len(mine) * self.shared), int(len(mine) * self.routed)
        free = mine[shared:]
        if routed >= len(free):
            return None
        gates = torch.ones(call.q.shape[:3], dtype=torch.float32, device=call.q.device)
        gates[:, free] = routing(call.q[:, free], routed, soft=self.gates == "soft")
        return Edit((Gain(gates, where),))


def routing(q: Tensor, top: int, *, soft: bool = False) -> Tensor:
    """Gates ``[B, n, L]`` of n heads from their queries ``[B, n, L, D]``: ``top`` of them at every token, by query norm."""
    norms = torch.linalg.vector_norm(q.float(), dim=-1)
    chosen = norms.topk(top, dim=1).indices
    gates = torch.zeros_like(norms).scatter_(1, chosen, 1.0)
    if not soft or top == 0:
        return gates
    spread = norms.std(1, keepdim=True) if norms.shape[1] > 1 else torch.ones_like(norms[:, :1])
    weights = torch.softmax(norms / spread.clamp_min(torch.finfo(norms.dtype).tiny), 1) * gates
    return weights / weights.sum(1, keepdim=True) * top
