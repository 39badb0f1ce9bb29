"""Where the kernels can run."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

OLDEST = (8, 0)
"""Compute capability of Ampere, the first with bf16 and asynchronous copies."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if device.type == "cpu":
        return None if interpreted() else "it needs a CUDA device (or TRITON_INTERPRET=1), and q is on the CPU"
    if device.type != "cuda":
        return f"it needs a CUDA device, and q is on {device.type}"
    return _too_old(device.index or 0)


@functools.cache
def _too_old(index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton"
    found = torch.cuda.get_device_capability(index)
    if found < OLDEST:
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, and this GPU has {found[0]}.{found[1]}"
    return None
