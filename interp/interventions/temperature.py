"""Temperatures of attention: for each head, and by position."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp.attention import Edit
from interp.attention import Temperature as Divide
from interp.interventions._base import HeadPolicy, HeadValues, Strength, every_head
from interp.interventions.selection import positions_in_sample
from interp.models.anatomy import Anatomy, Site
from interp.tracing.calls import Lasting, RunState, SiteCall


@dataclass(frozen=True, eq=False)
class Temperature(HeadPolicy):
    """Sharpen or flatten attention (Zhang et al. 2024, Selective Attention, https://arxiv.org/abs/2411.12892).

    ``s = scale * q.k / T`` with ``T = value / (1 + beta * ln(i + 1))``, i the position counted from the sample's first real
    token: T < 1 sharpens, T > 1 flattens, ``beta`` sharpens late rows, which otherwise spread over ever more keys. That is
    the position part of the paper's query temperature as its released code has it (``1 + beta ln(row length)``, beta
    learned per layer from near 0; the paper adds a part that is learned per token, which no training-free method has).
    T divides q.k only, never a bias or a learned sink, and acts before a softcap.

    When not to use it: to compare heads whose softcap (Gemma 2) bends the scores, where T is no temperature any more.

    Args:
        heads: what :func:`interp.heads.as_heads` takes. An empty set changes nothing.
        value: > 0; a number, ``[n]``, ``[S|1, n|1]`` or ``[S|1, n|1, P]`` as the gain of
            :class:`~interp.interventions.ScaleHeads`. 1, the default, changes nothing by itself.
        beta: >= 0; a number, or one for each of ``heads``. 0, the default, is no dependence on position.
        scope, rows: as for :class:`~interp.interventions.MaskHeads`.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model does not have.
        ValueError: a value or beta of another shape, not finite or too small.
    """

    value: Any = 1.0
    _: KW_ONLY
    beta: Any = 0.0

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.12892"
    unit: ClassVar[str] = "divisor of q.k"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_value", HeadValues("value", self.value, 1.0, least=0.0))
        slope = HeadValues("beta", self.beta, 0.0)
        if slope.table.shape[0] > 1 or slope.table.shape[2] > 1 or bool((slope.table < 0).any()):
            raise ValueError(f"beta must be a number >= 0, or one for each of heads, got {self.beta!r}")
        object.__setattr__(self, "_beta", slope)

    @property
    def tables(self) -> tuple[HeadValues, HeadValues]:
        """Value and beta as tables."""
        return vars(self)["_value"], vars(self)["_beta"]

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> Temperature:
        return cls(every_head(model), 3.0 if strength == "on" else 1.0)

    def prepare(self, anatomy: Anatomy) -> None:
        super().prepare(anatomy)
        for table in self.tables:
            table.check(self.resolve(anatomy))

    def acts_on(self, site: Site, run: RunState) -> bool:
        return not all(t.is_neutral for t in self.tables) and super().acts_on(site, run)

    def before(self, call: SiteCall) -> Edit | None:
        value, beta = self.tables
        where = None if value.is_neutral and beta.is_neutral else self.where(call)
        if where is None:
            return None
        heads = self.heads_of(call.run)
        if value.differentiable or beta.differentiable:
            return Edit((Divide(self._at(call), where),))
        varies = value.by_position or not beta.is_neutral
        if value.number is not None and not varies:
            number = value.number
            return self.kept(call, "number", lambda: Edit((Divide(number, where),)), of=(where,))
        place = (call.mask.q_offset, call.q.shape[2]) if varies else ()
        key = (value.key(call, heads), beta.key(call, heads), place)
        return self.kept(call, key, lambda: Edit((Divide(self._at(call), where),)), of=(where,), lasting=not varies)

    def lasting(self, call: SiteCall) -> Lasting | None:
        value, beta = self.tables
        varies = value.by_position or not beta.is_neutral or value.differentiable or beta.differentiable
        return None if varies else self.unvarying(call)

    def _at(self, call: SiteCall) -> Tensor:
        """``T [B|1, H, Lq|1]``."""
        value, beta = self.tables
        heads = self.heads_of(call.run)
        t = value.at(call, heads)
        if beta.is_neutral:
            return t
        length = positions_in_sample(call).clamp_min(0)[:, None] + 1
        return t / (1 + beta.at(call, heads) * torch.log(length.float()))
