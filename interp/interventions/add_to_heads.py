"""Vectors added to head outputs: inference-time intervention, function vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.heads import Heads
from interp.interventions._base import HeadPolicy, HeadValues, Strength, every_head
from interp.interventions.activations import last_outputs
from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.model import unwrap
from interp.tracing.calls import RunState, SiteCall


@dataclass(frozen=True, eq=False)
class AddToHeads(HeadPolicy):
    """Push head outputs along a direction (Li et al. 2023, inference-time intervention, https://arxiv.org/abs/2306.03341).

    ``z_h += alpha * sigma_h * vector_h`` in the rows of the scope, in the head's own space, before the output projection.
    ``AddToHeads.mass_mean`` makes directions and sigmas as the paper does; ``AddToHeads.function_vectors`` adds a task's mean
    outputs (Todd et al. 2024, https://arxiv.org/abs/2310.15213).

    When not to use it: where the direction was found on another model or another position of the prompt.

    Args:
        heads: what :func:`interp.heads.as_heads` takes. An empty set changes nothing.
        vectors: one for each of ``heads`` in their order, ``[n, Dv]`` or a list of n vectors; they are added as they are.
        alpha: strength; 15 is the paper's for LLaMA-7B with 48 heads. 0 changes nothing: the tokens stay identical.
        sigma: a number, or one for each of ``heads``: the standard deviation of outputs along the direction.
        scope: by default ``next``, the rows that decide the next token, as the paper's code has it (``lt``).
        rows: absolute positions in place of a scope.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model does not have.
        ValueError: another number of vectors than heads, a vector of another width than the head's, values not finite.
    """

    vectors: Any
    _: KW_ONLY
    alpha: float = 15.0
    sigma: Any = 1.0
    scope: Literal["all", "prefill", "decode", "next"] = "next"

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.03341"
    unit: ClassVar[str] = "added to z"
    needs: ClassVar[str] = "a vector for each head"

    def __post_init__(self) -> None:
        if self.rows is not None and self.scope == "next":
            object.__setattr__(self, "scope", "all")
        super().__post_init__()
        vectors = [torch.as_tensor(v).detach().float() for v in self.vectors]
        if any(v.ndim != 1 or not bool(torch.isfinite(v).all()) for v in vectors):
            raise ValueError(
                f"vectors must be finite, one [dim] for each of heads, got shapes {[tuple(v.shape) for v in vectors][:4]}"
            )
        if not isinstance(self.alpha, int | float) or not bool(torch.isfinite(torch.tensor(float(self.alpha)))):
            raise ValueError(f"alpha must be a finite number, got {self.alpha!r}")
        object.__setattr__(self, "vectors", vectors)
        sigma = HeadValues("sigma", self.sigma, 1.0)
        if sigma.table.shape[0] > 1 or sigma.by_position:
            raise ValueError(
                f"sigma must be a number, or one for each of heads, got shape {tuple(torch.as_tensor(self.sigma).shape)}"
            )
        object.__setattr__(self, "_sigma", sigma)

    @classmethod
    def mass_mean(
        cls,
        model: Any,
        true: Sequence[Mapping[str, Any]],
        false: Sequence[Mapping[str, Any]],
        heads: Any,
        **settings: Any,
    ) -> AddToHeads:
        """Directions from the means of two classes of inputs, as the paper found best, of unit length.

        ``direction = mean z(true) - mean z(false)`` in the last real row, normalised; sigma is the standard deviation
        (of the population, as ``numpy.std``) of all inputs' outputs along it.

        Args:
            model: as :func:`interp.hooked` takes.
            true: keyword arguments of one forward each.
            false: of the other class.
            heads: what :func:`interp.heads.as_heads` takes.
            settings: ``alpha``, ``scope``, ``rows``.
        """
        up, down = last_outputs(model, true, heads), last_outputs(model, false, heads)
        vectors: list[Tensor] = []
        sigma: list[float] = []
        for head in up:
            difference = up[head].mean(0) - down[head].mean(0)
            direction = difference / torch.linalg.vector_norm(difference).clamp_min(torch.finfo(torch.float32).tiny)
            vectors.append(direction)
            sigma.append(float((torch.cat([up[head], down[head]]) @ direction).std(correction=0)))
        return cls(Heads(up), vectors, sigma=sigma, **settings)

    @classmethod
    def function_vectors(
        cls, model: Any, prompts: Sequence[Mapping[str, Any]], heads: Any, **settings: Any
    ) -> AddToHeads:
        """The mean outputs of heads in the last row of a task's prompts, with ``alpha`` 1.

        The paper sums them through the output projections and adds the sum to one layer's hidden state; here each
        head's share enters the residual stream at its own layer.

        Args:
            model: as :func:`interp.hooked` takes.
            prompts: keyword arguments of one forward each: demonstrations of the task.
            heads: the task's heads (those with the largest indirect effect).
            settings: ``alpha``, ``sigma``, ``scope``, ``rows``.
        """
        found = last_outputs(model, prompts, heads)
        return cls(Heads(found), [z.mean(0) for z in found.values()], alpha=settings.pop("alpha", 1.0), **settings)

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> AddToHeads:
        widths = {(s.stack, s.layer): s.v_head_dim for s in anatomy(unwrap(model)).sites}
        heads = every_head(model)
        vectors = [torch.linspace(-1, 1, widths[h.stack, h.layer]) for h in heads]
        return cls(heads, vectors, alpha=2.0 if strength == "on" else 0.0, scope="all")

    def prepare(self, anatomy: Anatomy) -> None:
        super().prepare(anatomy)
        heads = self.resolve(anatomy)
        if len(self.vectors) != len(heads):
            raise ValueError(f"vectors must be one for each of the {len(heads)} heads, got {len(self.vectors)}")
        self._spread.check(heads)
        for head, vector in zip(heads, self.vectors, strict=True):
            width = anatomy.site(head.stack, head.layer).v_head_dim
            if len(vector) != width:
                raise ValueError(f"vectors must be as wide as the head's z, {width} for {head}, got {len(vector)}")

    @property
    def _spread(self) -> HeadValues:
        return vars(self)["_sigma"]

    def acts_on(self, site: Site, run: RunState) -> bool:
        return self.alpha != 0 and super().acts_on(site, run)

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        where = self.where(call) if self.alpha != 0 else None
        if where is None:
            return None
        added = self.kept(call, (call.site.stack, call.site.layer, z.dtype, z.device), lambda: self._added(call, z))
        return torch.where(where.transpose(1, 2).unsqueeze(-1), z + added, z)

    def _added(self, call: SiteCall, z: Tensor) -> Tensor:
        """``[H, Dv]``, 0 at other heads."""
        out = torch.zeros(z.shape[2:], dtype=torch.float32)
        heads = self.heads_of(call.run)
        sigma = (
            self._spread.table.flatten().expand(len(heads))
            if self._spread.table.numel() == 1
            else self._spread.table.flatten()
        )
        for n, head in enumerate(heads):
            if (head.stack, head.layer) != (call.site.stack, call.site.layer):
                continue
            if len(self.vectors[n]) != z.shape[3]:
                raise ValueError(
                    f"vectors must be as wide as the head's z, {z.shape[3]} for {head}, got {len(self.vectors[n])}"
                )
            out[head.head] = self.alpha * sigma[n] * self.vectors[n]
        return out.to(z.device, z.dtype)
