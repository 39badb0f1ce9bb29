"""Scores from weights alone: copying by OV eigenvalues, matching by QK eigenvalues, and composition of two heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.projections import HeadWeights, head_weights, weight_in_memory
from interp.analysis.running import AnalysisError, Floats, HeadScore, as_model, require_stack
from interp.models.anatomy import anatomy
from interp.models.model import Model

PAPER = "Elhage et al. 2021, https://transformer-circuits.pub/2021/framework"


@dataclass(frozen=True)
class _OfWeights(HeadScore):
    paper: ClassVar[str] = PAPER
    unit: ClassVar[str] = "sum over absolute sum of eigenvalues"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "none: read off the weights"
    control: ClassVar[str] = "normal random matrices of the same shapes"
    needs: ClassVar[str] = "known projections"

    stack: str = "text"
    fold_norm: bool = True
    seed: int = 0

    def matrices(self, weights: HeadWeights) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def middle(self, model: Model) -> Tensor | None:
        return None

    def run(self, model: Any, probe: Any = None, **options: Any) -> xr.Dataset:
        """A value a head (n = 1, no standard error); ``probe`` must be None."""
        from interp.scores import make_score

        if probe is not None:
            raise AnalysisError(f"probe must be None: {self.name} is read off the weights, got {type(probe).__name__}")
        model = as_model(model)
        require_stack(model, self.stack)
        shape = anatomy(model.module).shape(self.stack)
        value, null = np.full(shape, np.nan), np.full(shape, np.nan)
        middle = self.middle(model)
        generator = torch.Generator().manual_seed(self.seed)
        for site in anatomy(model.module).stacks[self.stack]:
            a, b = self.matrices(head_weights(model, site, fold_norm=self.fold_norm))
            value[site.layer, : site.n_heads] = eigenvalue_score(a, b, middle)
            left, right = (torch.randn(m.shape, generator=generator) for m in (a, b))
            null[site.layer, : site.n_heads] = eigenvalue_score(left, right, middle)
        settings = {
            "fold_norm": self.fold_norm, "seed": self.seed, "model": model.name, "stack": self.stack,
            **self.notes(), **self.extra(),
        }  # fmt: skip
        return make_score(
            value, name=self.name, unit=self.unit, paper=self.paper, settings=settings, stack=self.stack,
            null_by_sample=null,
        )  # fmt: skip

    def extra(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class OVCopying(_OfWeights):
    """OV copying score of Elhage et al. 2021, https://transformer-circuits.pub/2021/framework (TransformerLens' form).

    Formula: ``Re(sum lambda) / sum |lambda|`` over the eigenvalues of ``W_V W_O`` (through ``"residual"``) or of
    ``W_E W_V W_O W_U`` (``"tokens"``), by the small product that shares them. 1 copies every direction, -1 turns it round.

    Unit: -1 to 1.

    Args:
        stack: which heads.
        fold_norm: the weight of the norm in front in W_V, as TransformerLens' ``fold_ln``.
        seed: of the control.
        through: ``"residual"`` or ``"tokens"``; the latter leaves out what lies between the layers and folds no final norm.

    Needs: projections that are recognised; ``"tokens"`` output embeddings. Control: normal random W_V and W_O.
    When not to use: it says nothing about where a head looks.
    """

    name: ClassVar[str] = "ov_copying"
    summary: ClassVar[str] = "does a head's OV circuit copy (eigenvalues, weights alone)?"

    through: Literal["residual", "tokens"] = "residual"

    def __post_init__(self) -> None:
        if self.through not in ("residual", "tokens"):
            raise AnalysisError(f"through must be 'residual' or 'tokens', got {self.through!r}")

    def extra(self) -> dict[str, Any]:
        return {"through": self.through}

    def middle(self, model: Model) -> Tensor | None:
        if self.through == "residual":
            return None
        head: Any = model.module.get_output_embeddings()
        if head is None:
            raise AnalysisError(f"through='tokens' needs output embeddings, and {type(model.module).__name__} has none")
        embed: Any = model.module.get_input_embeddings()
        return weight_in_memory(head).float().cpu().T @ weight_in_memory(embed).float().cpu()

    def matrices(self, weights: HeadWeights) -> tuple[Tensor, Tensor]:
        return weights.W_V, weights.W_O


@dataclass(frozen=True)
class QKMatching(_OfWeights):
    """QK eigenvalue score of Elhage et al. 2021, https://transformer-circuits.pub/2021/framework.

    Formula: ``Re(sum lambda) / sum |lambda|`` over the eigenvalues of ``W_Q W_K^T``: 1 where a token attends to what is like it.

    Unit: -1 to 1. Args: ``stack``, ``fold_norm``, ``seed`` as for ``ov_copying``.
    Needs: projections that are recognised. Control: normal random W_Q and W_K.
    When not to use: rotation by position and norms of q and k are left out, so in RoPE models it describes content alone.
    """

    name: ClassVar[str] = "qk_matching"
    summary: ClassVar[str] = "does a head's QK circuit match a token with its like (eigenvalues, weights alone)?"

    def matrices(self, weights: HeadWeights) -> tuple[Tensor, Tensor]:
        return weights.W_Q, weights.W_K.transpose(1, 2)


def eigenvalue_score(a: Tensor, b: Tensor, middle: Tensor | None = None) -> Floats:
    """``Re(sum lambda) / sum |lambda|`` of ``a[h] b[h]`` (``[H, d, n]``, ``[H, n, d]``), or of ``a[h] b[h] middle``; NaN for zeros."""
    small = b.double() @ (a.double() if middle is None else middle.double() @ a.double())
    values = torch.linalg.eigvals(small)
    size = values.abs().sum(-1)
    return torch.where(size > 0, values.real.sum(-1) / size, torch.nan).numpy()


def composition(
    model: Any, kind: Literal["Q", "K", "V"], *, stack: str = "text", fold_norm: bool = True, seed: int = 0
) -> xr.Dataset:
    """Composition of an earlier head with a later one (Elhage et al. 2021, https://transformer-circuits.pub/2021/framework).

    ``|| W_OV^1 M^2 ||_F / (|| W_OV^1 ||_F || M^2 ||_F)`` with right multiplication as in TransformerLens, M = ``W_Q W_K^T`` (Q), its
    transpose (K) or ``W_V W_O`` (V).

    Returns:
        ``value (layer, head, later_layer, later_head)``, NaN unless layer < later_layer, and ``null`` of normal random matrices of
        the same shapes, which is not 0: subtract it in pictures.

    Raises:
        AnalysisError: an unknown kind or stack, or projections that are not recognised.
    """
    if kind not in ("Q", "K", "V"):
        raise AnalysisError(f"kind must be 'Q', 'K' or 'V', got {kind!r}")
    model = as_model(model)
    require_stack(model, stack)
    shape = anatomy(model.module).shape(stack)
    weights = {s.layer: head_weights(model, s, fold_norm=fold_norm) for s in anatomy(model.module).stacks[stack]}
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        layer: HeadWeights(*(torch.randn(m.shape, generator=generator) for m in (w.W_Q, w.W_K, w.W_V, w.W_O)))
        for layer, w in weights.items()
    }
    out = {
        name: (("layer", "head", "later_layer", "later_head"), _compose(source, kind, shape))
        for name, source in (("value", weights), ("null", drawn))
    }
    coords = {n: np.arange(s) for n, s in zip(("layer", "head", "later_layer", "later_head"), shape * 2, strict=True)}
    attrs = {
        "name": f"{kind.lower()}_composition",
        "unit": "ratio of Frobenius norms",
        "paper": PAPER,
        "model": model.name,
    }
    return xr.Dataset(out, coords=coords, attrs=attrs)


def _compose(weights: dict[int, HeadWeights], kind: str, shape: tuple[int, int]) -> Floats:
    out = np.full(shape * 2, np.nan)
    for first, w in weights.items():
        norm = _norm(w.W_V, w.W_O)
        gram = (w.W_V.transpose(1, 2) @ w.W_V).double()
        for later, x in weights.items():
            if later <= first:
                continue
            left, right = {
                "Q": (x.W_Q, x.W_K.transpose(1, 2)), "K": (x.W_K, x.W_Q.transpose(1, 2)), "V": (x.W_V, x.W_O),
            }[kind]  # fmt: skip
            # || V O L R ||_F^2 = tr((O L)^T V^T V (O L) R R^T): only head-sized matrices are multiplied.
            inner = torch.einsum("hvd,gdn->hgvn", w.W_O, left).double()
            outer = (right @ right.transpose(1, 2)).double()
            squared = torch.einsum("hgvn,hvw,hgwm,gmn->hg", inner, gram, inner, outer)
            value = squared.clamp(min=0).sqrt() / (norm[:, None] * _norm(left, right)[None])
            out[first, : len(value), later, : value.shape[1]] = value.numpy()
    return out


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """``|| left[h] right[h] ||_F`` from ``[H, d, n]`` and ``[H, n, d]``."""
    a, b = (left.transpose(1, 2) @ left).double(), (right @ right.transpose(1, 2)).double()
    return (a * b).sum((-1, -2)).clamp(min=0).sqrt()
