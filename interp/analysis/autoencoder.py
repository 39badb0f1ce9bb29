"""Autoencoder of attention patterns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interp.analysis.head_maps import HeadFeatures, cluster, pca
from interp.analysis.running import AnalysisError, Floats

EDGE = 32
FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class PatternAutoencoder:
    """What :func:`fit_autoencoder` trained.

    Attributes:
        module: encoder and decoder.
        latents: ``[map, latent]`` of the maps it was trained on.
        error: mean squared error on them, of standardised log maps (1 is the mean map's).
        pca_error: the same of as many principal components: what a linear code of that size leaves.
        losses: by epoch.
        seconds: of training.
    """

    module: nn.Module
    latents: Floats
    error: float
    pca_error: float
    losses: tuple[float, ...]
    seconds: float
    _mean: Tensor
    _scale: float

    @torch.no_grad()
    def encode(self, maps: Floats) -> Floats:
        """Latents ``[map, latent]`` of maps ``[map, 32, 32]`` whose rows sum to 1."""
        net: Any = self.module
        return net.encoder(_input(maps, self._mean, self._scale)).numpy().astype(np.float64)

    @torch.no_grad()
    def decode(self, latents: Floats) -> Floats:
        """Maps ``[map, 32, 32]`` of latents, rows made to sum to 1."""
        net: Any = self.module
        out = net.decoder(torch.from_numpy(latents.astype(np.float32)))[:, 0] * self._scale + self._mean
        maps = (out.exp() - FLOOR).clamp(min=0)
        return (maps / maps.sum(-1, keepdim=True).clamp(min=1e-12)).numpy().astype(np.float64)

    def archetypes(self, k: int, *, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
        """Decoded centroids ``[k, 32, 32]`` of ``k`` clusters of the latents, and the cluster of each map.

        Raises:
            AnalysisError: k outside 2 .. maps - 1.
            ImportError: scikit-learn is missing.
        """
        labels = cluster(self.latents, k, seed=seed).labels
        return self.decode(np.stack([self.latents[labels == n].mean(0) for n in range(k)])), labels


class _Net(nn.Module):
    """Three stride-2 blocks of 16, 32, 64 channels each way around a linear code."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        small = EDGE // 8

        def down(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GELU()]

        def up(a: int, b: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.GELU()]

        self.encoder = nn.Sequential(
            *down(1, 16), *down(16, 32), *down(32, 64), nn.Flatten(), nn.Linear(64 * small**2, latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, 64 * small**2), nn.GELU(), nn.Unflatten(1, (64, small, small)), *up(64, 32), *up(32, 16),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def fit_autoencoder(
    maps: HeadFeatures | Floats,
    *,
    latent: int = 16,
    epochs: int = 200,
    seed: int = 0,
    seconds: float = 110.0,
    progress: Callable[[int, int], None] | None = None,
) -> PatternAutoencoder:
    """Train a small convolutional autoencoder on pooled maps, as Li et al. 2023, https://arxiv.org/abs/2303.13731, sum up patterns.

    Their architecture could not be read; this one is ours: 32 x 32 maps, ``ln(p + 0.0001)`` standardised as a whole, squared error,
    Adam at 0.002 with a cosine. Positions matter here: a diagonal pattern and the same one shifted are two.

    When not to use: with a few dozen heads principal components do as well (see ``pca_error``).

    Args:
        maps: ``[map, 32, 32]`` whose rows sum to 1, of one input or mean ones: ``head_features(..., grid=32)`` or its ``maps``.
        latent: numbers of the code.
        epochs: at most.
        seed: of weights and batches.
        seconds: training ends after these, whatever the epoch.
        progress: called with (epochs done, epochs) before each; what it raises ends the training.

    Raises:
        AnalysisError: maps of another shape, with numbers that are not finite, or fewer than 4.
    """
    values = np.asarray(maps.maps if isinstance(maps, HeadFeatures) else maps, dtype=np.float64)
    if values.ndim != 3 or values.shape[1:] != (EDGE, EDGE) or len(values) < 4 or not np.isfinite(values).all():
        raise AnalysisError(f"maps must be finite [map, {EDGE}, {EDGE}] and at least 4, got shape {values.shape}")
    if latent < 1 or epochs < 1:
        raise AnalysisError(f"latent and epochs must be at least 1, got {latent}, {epochs}")
    logs = torch.from_numpy(np.log(values + FLOOR).astype(np.float32))
    mean = logs.mean(0)
    scale = float((logs - mean).std()) or 1.0
    x = _input(values, mean, scale)
    began = time.monotonic()
    losses: list[float] = []
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = _Net(latent)
        optimizer: Any = torch.optim.Adam(net.parameters(), lr=2e-3)
        schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for epoch in range(epochs):
            if progress is not None:
                progress(epoch, epochs)
            total = 0.0
            for batch in torch.randperm(len(x), generator=generator).split(64):
                loss = (net(x[batch]) - x[batch]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(batch)
            schedule.step()
            losses.append(total / len(x))
            if time.monotonic() - began > seconds:
                break
    net.eval()
    flat = x.flatten(1).numpy().astype(np.float64)
    with torch.no_grad():
        latents = net.encoder(x).numpy().astype(np.float64)
        error = float((net(x) - x).square().mean())
    components = min(latent, *flat.shape)
    kept = (pca(flat, components)[0] ** 2).sum() / flat.size
    linear = float(((flat - flat.mean(0)) ** 2).mean() - kept)
    return PatternAutoencoder(
        net, latents, error, max(0.0, linear), tuple(losses), time.monotonic() - began, mean, scale
    )


def _input(maps: Floats, mean: Tensor, scale: float) -> Tensor:
    return ((torch.from_numpy(np.log(maps + FLOOR).astype(np.float32)) - mean) / scale)[:, None]
