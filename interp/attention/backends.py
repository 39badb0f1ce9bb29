"""The ways to compute a call, and how one is chosen.

A backend is a module with two functions: ``supports(call) -> str | None`` (None, or what the call has that the backend
lacks) and ``run(call) -> (z [B, Lq, H, Dv] in q's dtype or None, Readings)``. Modules are imported when first needed.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Protocol, cast

from torch import Tensor

from interp.attention import sdpa
from interp.attention.call import Call
from interp.attention.readouts import Readings
from interp.attention.validation import fail

BACKENDS = {
    "reference": "interp.attention.reference",
    "blockwise": "interp.attention.blockwise",
    "sdpa": "interp.attention.sdpa",
    "triton": "interp.attention.triton",
}
"""Module of each backend by name."""

SDPA_MASK_BYTES = 64 << 20
"""Largest dense mask that ``auto`` makes for SDPA; above it the description is evaluated tile by tile (blockwise)."""


class Backend(Protocol):
    """What a backend module offers."""

    def supports(self, call: Call) -> str | None: ...

    def run(self, call: Call) -> tuple[Tensor | None, Readings]: ...


class BackendUnavailable(RuntimeError):
    """A backend asked for by name is not there, or lacks something that the call needs."""


def load_backend(name: str) -> Backend:
    """The backend module of that name.

    Raises:
        AttentionArgumentError: there is no such name.
        BackendUnavailable: its module is not built into this installation.
    """
    if name not in BACKENDS:
        fail("backend", f"must be one of auto, {', '.join(BACKENDS)}", repr(name))
    if importlib.util.find_spec(BACKENDS[name]) is None:
        raise BackendUnavailable(f"backend {name!r} is not built yet: there is no module {BACKENDS[name]}")
    return cast(Backend, importlib.import_module(BACKENDS[name]))


def choose(name: str, call: Call) -> tuple[str, Backend]:
    """The backend asked for, or for ``auto`` the fastest that has everything the call needs.

    Raises:
        BackendUnavailable: a backend asked for by name lacks something; it never falls back.
    """
    if name == "auto":
        if sdpa.supports(call) is None and sdpa.mask_bytes(call) <= SDPA_MASK_BYTES:
            return "sdpa", sdpa
        # On a CPU Triton has an interpreter only, for tests.
        if call.q.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            kernels = load_backend("triton")
            if kernels.supports(call) is None:
                return "triton", kernels
        return "blockwise", load_backend("blockwise")
    backend = load_backend(name)
    lacking = backend.supports(call)
    if lacking is not None:
        raise BackendUnavailable(f"backend {name!r} cannot compute this call: {lacking}; ask for 'auto' or 'blockwise'")
    return name, backend
