"""Joint embedding of a head's queries and keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from interp.analysis.head_maps import Method, embed
from interp.analysis.projections import NAMES
from interp.analysis.running import AnalysisError, Floats, as_model, build, inputs_of
from interp.heads import Head, as_heads
from interp.models.anatomy import Site, anatomy
from interp.models.layout import layout
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked

PAPER = "Yeh et al. 2023, https://arxiv.org/abs/2305.03210"
MOST = 2000
"""Queries and keys at most that the scale is chosen on and the agreement measured with."""


def query_key_embedding(
    model: Any, probe: Any, head: Any, *, method: Method = "pca", dims: int = 2, rotated: bool = True, seed: int = 0
) -> xr.Dataset:
    """AttentionViz' joint embedding, Yeh et al. 2023, https://arxiv.org/abs/2305.03210.

    All queries and keys of a head over the probe's samples. (1) A constant is added to all keys, which no softmax sees, so that their
    centre meets the queries'; (2) ``q <- c q, k <- k / c``, which leaves dot products alone, with the c of 0.1 .. 10 at which Euclidean
    distance and dot product (of the moved keys) are most negatively correlated; then PCA or UMAP of both together.

    When not to use: distances in the plane are not attention: look at ``agreement`` first (the paper has -0.94 for BERT, -0.79 for GPT-2).

    Args:
        model: an :class:`interp.Model` or a transformers model.
        probe: a probe, or an iterable of inputs of one sequence each.
        head: such as ``"L3H1"`` or ``"vision.L2H0"``.
        method: ``"pca"`` or ``"umap"``.
        dims: 2 or 3.
        rotated: as attention has them (with RoPE); False takes them before position is put in, behind norms of q and k.
        seed: of UMAP, and of the sample on which the scale is chosen.

    Returns:
        ``place (point, dim)``, ``norm (point)`` before any change; coordinates ``kind`` (``query`` or ``key``), ``sample``,
        ``position``, ``token``, ``row``, ``column`` (-1 off the grid); attributes ``scale``, ``agreement``: Spearman's rho of cosine
        distance and dot product after (1) and (2).

    Raises:
        AnalysisError: not one head, a batch, or (rotated=False) projections that are not known.
        ImportError: umap-learn is missing.
    """
    model = as_model(model)
    chosen = as_heads(head, anatomy(model.module).shapes())
    if len(chosen) != 1:
        raise AnalysisError(f"head must be one head, got {len(chosen)}")
    one = chosen[0]
    site = anatomy(model.module).site(one.stack, one.layer)
    queries: list[Floats] = []
    keys: list[Floats] = []
    labels: list[dict[str, Any]] = []
    for number, sample in enumerate(build(probe, model)):
        inputs = inputs_of(sample, model)
        q, k = _vectors(model, inputs, site, one, rotated)
        queries.append(q)
        keys.append(k)
        found = layout(model.module, inputs, model.tokenizer).get(one.stack)
        for kind, count in (("query", len(q)), ("key", len(k))):
            known = found is not None and found.shape == (1, count)
            labels.append(
                {
                    "kind": [kind] * count, "sample": [number] * count, "position": list(range(count)),
                    "token": [str(t) for t in found.tokens[0]] if known and found is not None else [""] * count,
                    "row": found.row[0].tolist() if known and found is not None else [-1] * count,
                    "column": found.column[0].tolist() if known and found is not None else [-1] * count,
                }
            )  # fmt: skip
    q, k = np.concatenate(queries), np.concatenate(keys)
    moved_q, moved_k, scale, agreement = joint(q, k, seed)
    order = [*labels[::2], *labels[1::2]]
    coords = {name: ("point", [x for part in order for x in part[name]]) for name in labels[0]}
    places = embed(np.concatenate([moved_q, moved_k]), method, dims=dims, seed=seed)
    norms = np.linalg.norm(np.concatenate([q, k]), axis=1)
    attrs = {
        "name": "query_key_embedding", "paper": PAPER, "head": str(one), "method": method, "scale": scale, "agreement": agreement,
        "model": model.name, "rotated": rotated,
    }  # fmt: skip
    return xr.Dataset({"place": (("point", "dim"), places), "norm": ("point", norms)}, coords=coords, attrs=attrs)


def joint(q: Floats, k: Floats, seed: int = 0) -> tuple[Floats, Floats, float, float]:
    """Queries and keys ``[point, D]`` moved and scaled, the scale, and Spearman's rho of cosine distance and dot product."""
    moved = k - k.mean(0) + q.mean(0)
    rng = np.random.default_rng(seed)
    a, b = (x if len(x) <= MOST else x[rng.choice(len(x), MOST, replace=False)] for x in (q, moved))
    dots = a @ b.T
    squares = (a**2).sum(1)[:, None], (b**2).sum(1)[None]

    def correlation(c: float) -> float:
        distance = np.sqrt(np.maximum(squares[0] * c**2 + squares[1] / c**2 - 2 * dots, 0))
        return float(np.corrcoef(distance.ravel(), dots.ravel())[0, 1])

    scale = float(min(np.geomspace(0.1, 10, 41), key=correlation))
    cosine = 1 - dots / np.maximum(np.sqrt(squares[0] * squares[1]), 1e-12)
    return q * scale, moved / scale, scale, _spearman(cosine.ravel(), dots.ravel())


def _spearman(x: Floats, y: Floats) -> float:
    import pandas as pd

    ranks = np.stack([pd.Series(v).rank().to_numpy() for v in (x, y)])
    return float(np.corrcoef(ranks)[0, 1])


class _Reader(Intervention):
    def __init__(self, site: Site) -> None:
        self.site, self.found = site, list[tuple[Tensor, Tensor]]()

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.name == self.site.name

    def before(self, call: SiteCall) -> None:
        if call.site.name == self.site.name:
            self.found.append((call.q.detach(), call.k.detach()))


def _vectors(model: Model, inputs: Any, site: Site, head: Head, rotated: bool) -> tuple[Floats, Floats]:
    """Queries and keys ``[position, D]`` of one head in one forward."""
    reader = _Reader(site)
    plain: dict[str, Tensor] = {}
    handles = [] if rotated else _watch(model.module.get_submodule(site.name), plain)
    try:
        with torch.no_grad(), hooked(model, interventions=[reader]):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(reader.found) != 1 or reader.found[0][0].shape[0] != 1:
        raise AnalysisError(f"a sample must reach {head} in one call with one sequence, got {len(reader.found)} calls")
    q, k = reader.found[0]
    group = head.head // (site.n_heads // site.n_kv_heads)
    if not rotated:
        q = plain["q"].reshape(1, -1, site.n_heads, site.head_dim).transpose(1, 2)
        k = plain["k"].reshape(1, -1, site.n_kv_heads, site.head_dim).transpose(1, 2)
    return q[0, head.head].double().cpu().numpy(), k[0, group].double().cpu().numpy()


def _watch(attention: nn.Module, into: dict[str, Tensor]) -> list[Any]:
    handles: list[Any] = []
    for name in ("q", "k"):
        parts = (f"{name}_norm", *NAMES[name])
        part = next((p for n in parts if isinstance(p := getattr(attention, n, None), nn.Module)), None)
        if part is None:
            raise AnalysisError(
                f"rotated=False needs projections that are known, and {type(attention).__name__} has others"
            )

        def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
            into[name] = output.detach()

        handles.append(part.register_forward_hook(keep))
    return handles
