"""DuoAttention's ``full_attention_heads.tsv``: a gate per KV head, and which KV heads stream by it (https://arxiv.org/abs/2410.10819)."""

from __future__ import annotations

import json
import os
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from interp.files import local_path, write_whole
from interp.scores_files import read_duo_attention_tsv

Gates = NDArray[np.float64]
METHODS = ("rank", "quantile")


def read_gates(path: str | os.PathLike[str]) -> Gates:
    """Gates ``[layer, KV head]`` clipped to [0, 1] (the last optimiser step may leave it): 1 full attention, 0 streaming.

    Raises:
        ScoreFileError: not a table of finite numbers.
        FileNotFoundError: nothing there.
    """
    return read_duo_attention_tsv(path, group_size=1)["gate"].values.clip(0.0, 1.0)


def write_gates(gates: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write gates ``[layer, KV head]`` as DuoAttention does: tab-separated ``%.18e``, a line per layer, no header.

    Raises:
        ValueError: not a table of finite numbers.
    """
    table = check_gates(gates)
    write_whole(path, "".join("\t".join(f"{cell:.18e}" for cell in row) + "\n" for row in table))


def read_windows(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """``(sink_size, recent_size)`` of the ``config.json`` beside a table of gates: what they were trained with.

    Raises:
        ValueError: a ``config.json`` without these numbers.
    """
    config = local_path(path).with_name("config.json")
    if not config.is_file():
        return None
    said: Any = json.loads(config.read_text(encoding="utf-8"))
    sink, recent = (said.get(name) if isinstance(said, dict) else None for name in ("sink_size", "recent_size"))
    if not isinstance(sink, int) or not isinstance(recent, int):
        raise ValueError(f"{config} must give sink_size and recent_size as whole numbers, got {sink!r} and {recent!r}")
    return sink, recent


def check_gates(gates: ArrayLike) -> Gates:
    """Gates as fp64 ``[layer, KV head]``.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    table = np.asarray(gates, dtype=np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError(f"gates must be finite numbers [layer, KV head], got shape {table.shape}")
    return table


def streaming(
    gates: ArrayLike, *, sparsity: float | None = None, threshold: float | None = None, method: Literal["rank", "quantile"] = "rank",
    seed: int = 0,
) -> NDArray[np.bool_]:  # fmt: skip
    """Which KV heads stream, bool ``[layer, KV head]``: those with the smallest gates, over all layers together.

    Args:
        gates: ``[layer, KV head]``.
        sparsity: share of the KV heads that stream. Ranks, not a fixed threshold, are what tells heads of a GQA model apart:
            most of its gates are near 1.
        threshold: in place of a share: those with a smaller gate stream.
        method: ``rank`` takes the ``round(n * sparsity)`` smallest, equal ones in order; ``quantile`` is the released code,
            which breaks ties by noise within 1e-6 and compares with the quantile.
        seed: of that noise.

    Raises:
        ValueError: neither or both of sparsity and threshold, a share outside 0 .. 1, an unknown method.
    """
    table = check_gates(gates)
    if (sparsity is None) == (threshold is None):
        raise ValueError(f"one of sparsity and threshold must be given, got {sparsity} and {threshold}")
    if threshold is not None:
        return table < threshold
    assert sparsity is not None
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be a share within 0 .. 1, got {sparsity}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if sparsity in (0, 1):
        return np.full(table.shape, sparsity == 1)
    if method == "quantile":
        noisy = table + np.random.default_rng(seed).uniform(0, 1e-6, table.shape)
        return noisy < np.quantile(noisy, sparsity)
    out = np.zeros(table.size, dtype=np.bool_)
    out[np.argsort(table.ravel(), kind="stable")[: round(table.size * sparsity)]] = True
    return out.reshape(table.shape)
