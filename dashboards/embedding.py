"""Maps of heads: where each head lies among all, by its pooled map and its numbers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dashboards.errors import PageError
from dashboards.runs import Run

if TYPE_CHECKING:
    from dashboards.jobs import Job
    from dashboards.workspace import Workspace

Floats = NDArray[np.float32]
METHODS = ("pca", "umap")
SEED = 0


def features(run: Run, stack: str) -> tuple[NDArray[np.int64], Floats]:
    """Features of every head that there is: ``index [n]`` into layer * heads + head, and ``[n, feature]``, standardised.

    Square roots of the pooled map (blocks count as probabilities), weighted as a whole like the numbers of the prompt.
    """
    layers, heads = run.shape(stack)
    numbers = (
        np.stack([v.reshape(-1) for _, v in run.metric_values(stack)], -1)
        if run.metric_values(stack)
        else np.zeros((layers * heads, 0), np.float32)
    )
    pooled = run.pooled(stack)
    there = np.isfinite(numbers).any(-1) if numbers.shape[1] else np.ones(layers * heads, bool)
    blocks = np.zeros((layers * heads, 0), np.float32)
    if pooled is not None:
        blocks = np.sqrt(np.clip(np.nan_to_num(pooled.reshape(layers * heads, -1)), 0, None))
        there &= np.isfinite(pooled.reshape(layers * heads, -1)).any(-1)
    index = np.flatnonzero(there)
    parts = [
        _standard(part[index]) / np.sqrt(part.shape[1]) for part in (np.nan_to_num(numbers), blocks) if part.shape[1]
    ]
    if not parts or len(index) < 3:
        raise PageError("a map of heads needs at least three heads with numbers", 409)
    return index, np.concatenate(parts, 1).astype(np.float32)


def embed(run: Run, stack: str, method: str = "pca", seed: int = SEED) -> dict[str, Any]:
    """Two coordinates of every head.

    Raises:
        PageError: an unknown method, or UMAP where it is not installed.
    """
    if method not in METHODS:
        raise PageError(f"method must be one of {METHODS}, got {method[:40]!r}")
    index, table = features(run, stack)
    if method == "pca":
        places, note = pca(table)
    else:
        if find_spec("umap") is None:
            raise PageError("UMAP needs the package umap-learn: pip install headscope[analysis]", 409)
        from interp.analysis.head_maps import embed as place

        places = place(table.astype(np.float64), "umap", seed=seed).astype(np.float32)
        note = f"UMAP of pooled maps and this prompt's numbers, seed {seed}; distances between clusters mean nothing"
    return {
        "method": method,
        "index": index.tolist(),
        "x": _short(places[:, 0]),
        "y": _short(places[:, 1]),
        "note": note,
    }


def pca(table: Floats) -> tuple[Floats, str]:
    """First two principal components, the sign fixed by the largest loading; and what they explain."""
    centred = table - table.mean(0)
    if centred.shape[0] < centred.shape[1]:
        values, left = np.linalg.eigh(centred @ centred.T)
        vectors = centred.T @ left[:, ::-1][:, :2]
        vectors /= np.linalg.norm(vectors, axis=0) + 1e-12
    else:
        values, whole = np.linalg.eigh(centred.T @ centred)
        vectors = whole[:, ::-1][:, :2]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(vectors.shape[1])])
    share = values[::-1][:2] / max(float(values.sum()), 1e-12)
    return (centred @ vectors).astype(
        np.float32
    ), f"PCA of pooled maps and this prompt's numbers, {share[0]:.0%} and {share[1]:.0%} of the variance"


def _standard(part: Floats) -> Floats:
    spread = part.std(0)
    return (part - part.mean(0)) / np.where(spread > 1e-9, spread, 1.0)


def _short(values: Floats) -> list[float]:
    return [round(float(v), 4) for v in values]


def archetypes(run: Run, stack: str, count: int = 8, seed: int = SEED) -> dict[str, Any]:
    """Typical pooled maps: k-means of their square roots, the largest cluster first, each with its mean map and heads.

    Raises:
        PageError: no pooled maps.
    """
    from dashboards.runs import pack

    pooled = run.pooled(stack)
    if pooled is None:
        raise PageError("pattern archetypes need pooled maps: trace with pooled=32", 409)
    layers, heads, rows, columns = pooled.shape
    flat = pooled.reshape(layers * heads, -1)
    index = np.flatnonzero(np.isfinite(flat).any(-1))
    points = np.sqrt(np.clip(np.nan_to_num(flat[index]), 0, None))
    labels = kmeans(points, min(count, len(index)), seed)
    found = [index[labels == label] for label in range(labels.max() + 1)]
    found = sorted((members for members in found if len(members)), key=len, reverse=True)
    return {
        "size": [rows, columns],
        "note": f"k-means of pooled maps, {len(found)} clusters, seed {seed}; each picture is the mean map of its heads.",
        "archetypes": [{"heads": members.tolist(), "map": pack(np.nanmean(flat[members], 0))} for members in found],
    }


def autoencoder(workspace: Workspace, job: Job) -> dict[str, Any]:
    """The job ``archetypes``: a small autoencoder trained on the run's pooled maps, and the decoded centres of its clusters.

    Spec: ``run`` and ``stack``. See :func:`interp.analysis.autoencoder.fit_autoencoder`.
    """
    from dashboards.runs import pack
    from interp.analysis.autoencoder import fit_autoencoder

    run, stack = workspace.remake(str(job.spec["run"])), str(job.spec["stack"])
    index, maps = square_maps(run, stack)
    count = min(8, len(index) - 1)
    fitted = fit_autoencoder(maps, seed=SEED, seconds=60.0, progress=job.step)
    job.check()
    pictures, labels = fitted.archetypes(count, seed=SEED)
    found = sorted(((index[labels == n], pictures[n]) for n in range(count)), key=lambda e: -len(e[0]))
    note = (
        f"autoencoder of pooled maps ({fitted.seconds:.0f} s, error {fitted.error:.3f}; as many principal components leave "
        f"{fitted.pca_error:.3f}), decoded centres of {count} clusters, seed {SEED}"
    )
    result = {
        "size": [32, 32],
        "note": note,
        "archetypes": [{"heads": heads.tolist(), "map": pack(picture)} for heads, picture in found if len(heads)],
    }
    run.once(("autoencoder", stack), lambda: result)
    return result


def square_maps(run: Run, stack: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pooled maps of the heads that there are on a grid of 32 x 32, rows made to sum to 1: ``[n]`` and ``[n, 32, 32]``."""
    import torch

    pooled = run.pooled(stack)
    if pooled is None:
        raise PageError("pattern archetypes need pooled maps: trace with pooled=32", 409)
    flat = pooled.reshape(-1, *pooled.shape[2:])
    index = np.flatnonzero(np.isfinite(flat).any((1, 2)))
    if len(index) < 5:
        raise PageError("pattern archetypes need at least five heads", 409)
    kept = torch.from_numpy(np.clip(np.nan_to_num(flat[index]), 0, None)).double()[:, None]
    maps = torch.nn.functional.interpolate(kept, size=(32, 32), mode="bilinear", align_corners=False)[:, 0].numpy()
    sums = maps.sum(-1, keepdims=True)
    return index, np.where(sums > 0, maps / np.where(sums > 0, sums, 1), 1 / 32)


def kmeans(points: Floats, count: int, seed: int, rounds: int = 40) -> NDArray[np.int64]:
    """Labels ``[n]`` by Lloyd's algorithm from k-means++ centres."""
    draw = np.random.default_rng(seed)
    size = (points**2).sum(-1)
    centres = [points[draw.integers(len(points))]]
    near = np.full(len(points), np.inf)
    for _ in range(count - 1):
        near = np.minimum(near, np.maximum(((points - centres[-1]) ** 2).sum(-1), 0))
        total = near.sum()
        centres.append(points[draw.choice(len(points), p=near / total) if total > 0 else draw.integers(len(points))])
    middle = np.stack(centres)
    labels = np.zeros(len(points), np.int64)
    for round_ in range(rounds):
        new = (size[:, None] - 2 * points @ middle.T + (middle**2).sum(-1)).argmin(1)
        if round_ and np.array_equal(new, labels):
            break
        labels = new
        middle = np.stack([points[labels == c].mean(0) if (labels == c).any() else middle[c] for c in range(count)])
    return labels
