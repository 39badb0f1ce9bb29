"""Maps of heads: a row of features for every head, placed in the plane and put into clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from interp.analysis.redundancy import pooled_maps
from interp.analysis.running import AnalysisError, Floats, as_model, build, forward, inputs_of, require_stack, track
from interp.heads import Head
from interp.tracing.capture import Capture

Method = Literal["pca", "umap"]
PROFILE_EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 4096, 16384, 65536)
"""Offsets at which a bin of a text profile begins."""


@dataclass(frozen=True, eq=False)
class HeadFeatures:
    """A row for every head.

    Attributes:
        values: ``[head, feature]``, no NaN.
        heads: whose.
        maps: mean pooled map ``[head, row, key]`` whose rows sum to 1, before the log.
        blocks: ``{name: slice}`` of the features.
    """

    values: Floats
    heads: tuple[Head, ...]
    maps: Floats
    blocks: Mapping[str, slice]

    @property
    def layer(self) -> NDArray[np.int64]:
        """Layer of every head, for colouring."""
        return np.array([head.layer for head in self.heads])


def head_features(
    model: Any,
    probe: Any,
    *,
    stack: str = "text",
    grid: int = 32,
    include: Sequence[Literal["map", "profile", "scores"]] = ("map", "profile"),
    scores: Sequence[xr.Dataset] = (),
    progress: bool = True,
) -> HeadFeatures:
    """Features of every head, averaged over samples.

    ``map``: the pooled map on a grid of ``grid`` x ``grid``, rows made to sum to 1, as ``ln(p * grid + 0.001)``, so that a uniform row
    is 0. ``profile``: the share of weight by distance (text: bins that grow; patches: Chebyshev rings), special tokens last, and the
    mean entropy. ``scores``: values of scores over the same heads. Each block is scaled to one variance in all, so that none counts for
    more by having more columns.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        probe: a probe, or an iterable of inputs.
        stack: whose heads.
        grid: of the maps.
        include: which blocks.
        scores: Datasets of scores of the stack; given, ``scores`` is included.
        progress: show a bar where the output is a terminal.

    Raises:
        AnalysisError: no such stack, no head with all features, or scores of another stack.
    """
    model = as_model(model)
    require_stack(model, stack)
    wanted = [*include, *(["scores"] if scores and "scores" not in include else [])]
    unknown = [name for name in wanted if name not in ("map", "profile", "scores")]
    if unknown or not wanted or ("scores" in wanted and not scores) or grid < 4:
        raise AnalysisError(
            f"include must be among 'map', 'profile' and (with scores=) 'scores', and grid at least 4, got {wanted}, {grid}"
        )
    maps: list[xr.DataArray] = []
    profiles: list[xr.DataArray] = []
    for sample in track(build(probe, model), "features of heads", progress):
        inputs = inputs_of(sample, model)
        with torch.no_grad():
            maps.append(_resized(pooled_maps(model, inputs, stack, 2 * grid), grid))
            if "profile" in wanted:
                profiles.append(
                    _profile(forward(model, inputs, Capture(offset=True, row_stats=True, stacks=(stack,)), stack))
                )
    mean = xr.concat(maps, dim="sample").mean("sample")
    parts: dict[str, Floats] = {}
    shape = (mean.sizes["layer"] * mean.sizes["head"], -1)
    if "map" in wanted:
        parts["map"] = np.log(mean.values * grid + 1e-3).reshape(shape)
    if "profile" in wanted:
        joined = xr.concat(profiles, dim="sample", join="outer").fillna(0.0).mean("sample")
        parts["profile"] = joined.transpose("layer", "head", "bin").values.reshape(shape)
    if "scores" in wanted:
        parts["scores"] = np.stack([_score_values(s, mean, stack) for s in scores], 1)
    flat = mean.values.reshape(shape[0], *mean.shape[2:])
    known = ~np.isnan(flat).any((1, 2)) & np.all([~np.isnan(p).any(1) for p in parts.values()], axis=0)
    if not known.any():
        raise AnalysisError("no head has all features: do the scores cover the stack?")
    blocks: dict[str, slice] = {}
    scaled: list[Floats] = []
    start = 0
    for name, part in parts.items():
        scaled.append(_scaled(part[known], columns=name == "scores"))
        blocks[name] = slice(start, start + part.shape[1])
        start += part.shape[1]
    layers, heads = np.meshgrid(mean["layer"].values, mean["head"].values, indexing="ij")
    names = [Head(int(n), int(h), stack) for n, h in zip(layers.ravel()[known], heads.ravel()[known], strict=True)]
    return HeadFeatures(np.concatenate(scaled, 1), tuple(names), flat[known], blocks)


def embed(features: HeadFeatures | Floats, method: Method = "pca", *, dims: int = 2, seed: int = 0) -> Floats:
    """Places of the heads, ``[head, dims]``.

    Args:
        features: of :func:`head_features`, or any ``[point, feature]``.
        method: ``"pca"``, or ``"umap"`` (package umap-learn; distances between clusters mean nothing there).
        dims: 2 or 3.
        seed: of UMAP.

    Raises:
        AnalysisError: an unknown method, too few heads, or numbers that are not finite.
        ImportError: umap-learn is missing.
    """
    if method not in get_args(Method) or dims not in (2, 3):
        raise AnalysisError(f"method must be one of {get_args(Method)} and dims 2 or 3, got {method!r}, {dims}")
    values = _matrix(features, dims + 1)
    if method == "pca":
        return pca(values, dims)[0]
    umap = _needs("umap", "umap-learn")
    neighbours = min(15, len(values) - 1)
    # With a seed UMAP runs on one thread and says so.
    reducer = umap.UMAP(n_components=dims, n_neighbors=neighbours, random_state=seed, n_jobs=1, init="pca")
    return np.asarray(reducer.fit_transform(values), dtype=np.float64)


def pca(values: Floats, dims: int) -> tuple[Floats, Floats]:
    """Principal components ``[point, dims]``, each with its largest loading positive, and the share of variance of each."""
    centred = values - values.mean(0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    sign = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)])
    total = (s**2).sum()
    return (u * s * sign)[:, :dims], s[:dims] ** 2 / total if total > 0 else np.zeros(dims)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of heads.

    Attributes:
        labels: ``[head]``, of the run with the least inertia; cluster 0 is the largest.
        stability: mean adjusted Rand index over all pairs of runs: 1 the same clusters from every start.
        stability_low: the smallest of them.
        null: the same for features each of whose columns was shuffled over heads: what starts alone agree on.
    """

    labels: NDArray[np.int64]
    stability: float
    stability_low: float
    null: float


def cluster(features: HeadFeatures | Floats, k: int, *, seeds: int = 10, seed: int = 0) -> Clusters:
    """k-means (package scikit-learn) from ``seeds`` random starts, one run each, with their agreement.

    Features are reduced to at most 20 principal components first. Take the k whose stability is high and far from ``null``.

    Raises:
        AnalysisError: k outside 2 .. heads - 1, or fewer than two seeds.
        ImportError: scikit-learn is missing.
    """
    values = _matrix(features, 3)
    if not 2 <= k < len(values) or seeds < 2:
        raise AnalysisError(f"k must lie in 2 .. {len(values) - 1} and seeds be at least 2, got {k}, {seeds}")
    kmeans = _needs("sklearn.cluster", "scikit-learn").KMeans
    rng = np.random.default_rng(seed)

    def runs(x: Floats) -> list[Any]:
        reduced = pca(x, min(20, *x.shape))[0]
        starts = range(seed, seed + seeds)
        return [kmeans(n_clusters=k, n_init=1, init="random", random_state=s).fit(reduced) for s in starts]

    def agreement(fits: list[Any]) -> Floats:
        return np.array([adjusted_rand(a.labels_, b.labels_) for a, b in combinations(fits, 2)])

    fits = runs(values)
    pairs = agreement(fits)
    shuffled = np.stack([rng.permutation(column) for column in values.T], 1).astype(np.float64)
    best = min(fits, key=lambda fit: fit.inertia_).labels_
    order = np.argsort(-np.bincount(best, minlength=k), kind="stable")
    return Clusters(
        np.argsort(order)[best], float(pairs.mean()), float(pairs.min()), float(agreement(runs(shuffled)).mean())
    )


def adjusted_rand(a: Any, b: Any) -> float:
    """Adjusted Rand index of two labellings (Hubert & Arabie 1985): 1 the same, 0 as by chance."""
    _, x = np.unique(a, return_inverse=True)
    _, y = np.unique(b, return_inverse=True)
    table = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(table, (x, y), 1)

    def pairs(counts: NDArray[Any]) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, first, second = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = first * second / max(len(x) * (len(x) - 1) / 2, 1)
    most = (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def _resized(maps: xr.DataArray, grid: int) -> xr.DataArray:
    """Maps ``[layer, head, row, key]`` of one shape, mean over the samples, rows summing to 1."""
    tensor = torch.from_numpy(maps.mean("sample").values.astype(np.float32))
    blocks = torch.nn.functional.adaptive_avg_pool2d(tensor, (grid, grid)).numpy()
    total = blocks.sum(-1, keepdims=True)
    return xr.DataArray(
        blocks / np.where(total > 0, total, np.nan), dims=("layer", "head", "map_row", "map_key"),
        coords={name: maps[name].values for name in ("layer", "head")},
    )  # fmt: skip


def _profile(data: xr.Dataset) -> xr.DataArray:
    """Share of weight by distance and the mean entropy, ``[layer, head, bin]``."""
    histogram = data["offset"].sum("sample", skipna=False)
    if "offset_position" in data.coords:
        distance = np.abs(data["offset_position"].values)
        code = np.searchsorted(PROFILE_EDGES, np.nan_to_num(distance), side="right") - 1
        last = len(PROFILE_EDGES)
    else:
        distance = np.maximum(np.abs(data["offset_row"].values), np.abs(data["offset_column"].values))
        code = np.nan_to_num(distance).astype(int)
        last = int(np.nanmax(distance)) + 1
    code = np.where(np.isnan(distance), last, code)
    sums = histogram.transpose("layer", "head", "offset").values @ np.eye(last + 1)[code]
    total = sums.sum(-1, keepdims=True)
    entropy = data["entropy"].mean(["sample", "query"]).transpose("layer", "head").values[..., None]
    # Special tokens and entropy have one place whatever the number of rings.
    named = [*map(str, range(last)), "special", "entropy"]
    return xr.DataArray(
        np.concatenate([sums / np.where(total > 0, total, np.nan), entropy / np.log(data.sizes["query"])], -1),
        dims=("layer", "head", "bin"), coords={"layer": data["layer"].values, "head": data["head"].values, "bin": named},
    )  # fmt: skip


def _score_values(score: xr.Dataset, like: xr.DataArray, stack: str) -> Floats:
    if score.attrs.get("stack", "text") != stack:
        raise AnalysisError(f"scores must be of stack {stack!r}, got {score.attrs.get('stack')!r}")
    found = score["value"].reindex(layer=like["layer"].values, head=like["head"].values)
    return found.transpose("layer", "head").values.ravel()


def _scaled(part: Floats, *, columns: bool) -> Floats:
    """Centred, of variance 1 in all; scores, which have units of their own, column by column first."""
    centred = part.astype(np.float64) - part.astype(np.float64).mean(0)
    if columns:
        spread = centred.std(0)
        centred = centred / np.where(spread > 0, spread, 1)
    size = np.sqrt((centred**2).sum(1).mean())
    return centred / size if size > 0 else centred


def _matrix(features: HeadFeatures | Floats, least: int) -> Floats:
    values = features.values if isinstance(features, HeadFeatures) else np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < least or not np.isfinite(values).all():
        raise AnalysisError(
            f"features must be finite [point, feature] of at least {least} points, got shape {values.shape}"
        )
    return values


def _needs(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs the package {package}: pip install 'headscope[analysis]'") from error
