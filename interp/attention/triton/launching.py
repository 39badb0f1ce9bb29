"""Launching a compiled kernel again and again without asking Triton's dispatcher each time.

The dispatcher looks at every argument to choose a specialisation, which for a kernel with a hundred of them costs more than
a layer of a small model. A :class:`Launch` asks it once; later calls differ only in the tensors that are named as live.

The first launch of a variant compiles it, or reads it from Triton's cache on disk, which takes up to tens of seconds. What it
took is logged to ``headscope.kernels`` (``logging.basicConfig(level=logging.INFO)`` shows it) and added up by
:func:`compile_seconds`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from interp.attention.triton.devices import interpreted

Arguments = dict[str, Any]

ALIGNMENT = 16
"""Bytes; Triton compiles a pointer that is a multiple of it into wider loads."""

NOTEWORTHY = 0.01
"""Seconds; a first launch below this found its variant in memory, and is logged at DEBUG only."""

logger = logging.getLogger("headscope.kernels")

_seconds: dict[str, float] = {}


def compile_seconds() -> dict[str, float]:
    """Wall-clock seconds that first launches took in this process, by kernel: compiling, or reading what is on disk.

    Each is also logged to ``headscope.kernels``, those of 10 ms or more at INFO, the others at DEBUG; to see them:
    ``logging.basicConfig(level=logging.INFO)``. Kernels in Triton's interpreter are not compiled and not counted.
    """
    return dict(_seconds)


def first_launch(kernel: Any, launch: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
    """Call ``launch``, and report how long it took and for which variant: the constants and dtypes among the arguments."""
    start = time.perf_counter()
    compiled = launch()
    seconds = time.perf_counter() - start
    name = str(getattr(kernel, "__name__", kernel))
    _seconds[name] = _seconds.get(name, 0.0) + seconds
    level = logging.INFO if seconds >= NOTEWORTHY else logging.DEBUG
    if logger.isEnabledFor(level):
        logger.log(level, "%s: %.2f s until its first launch, compiled for %s", name, seconds, _variant(arguments))
    return compiled


def _variant(arguments: Mapping[str, Any]) -> str:
    """The operands' dtypes, and the constants (by name in capitals, or options of the launch) that are set."""
    dtypes = {str(x.dtype).removeprefix("torch.") for name in OPERANDS if isinstance(x := arguments.get(name), Tensor)}
    named = {name: x for name, x in arguments.items() if (name.isupper() or name in OPTIONS) and x not in UNSET}
    return ", ".join([*sorted(dtypes), *(name if x is True else f"{name} {x}" for name, x in named.items())])


OPERANDS = ("q_ptr", "k_ptr", "v_ptr")
UNSET = (None, False, 0)
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@functools.cache
def placeholder(device: torch.device) -> Tensor:
    """What a kernel gets for a tensor that its flags leave out."""
    return torch.zeros(ALIGNMENT, dtype=torch.float32, device=device)


class Launch:
    """A kernel with everything but some tensors.

    Args:
        kernel: a jitted function.
        grid: up to three numbers of programs.
        fixed: arguments by name that stay.
        options: Triton's launch options (``num_warps`` and so on).
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], fixed: Arguments, **options: int) -> None:
        self.kernel = kernel
        self.grid: tuple[int, ...] = (*grid, 1, 1)[:3]
        self.fixed = fixed
        self.options = options
        self.known: dict[tuple[Any, ...], tuple[Any, list[Any], list[int]]] = {}

    def __call__(self, live: dict[str, Tensor]) -> None:
        """Launch with the tensors of this call; their dtypes must be those of the first call."""
        if interpreted():
            self.kernel[self.grid](**self.fixed, **live, **self.options)
            return
        device = next(iter(live.values())).device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(live)
        else:
            self._launch(live)

    def _launch(self, live: dict[str, Tensor]) -> None:
        signature = tuple([x.data_ptr() % ALIGNMENT for x in live.values()])
        found = self.known.get(signature)
        if found is None:
            given = {**self.fixed, **live, **self.options}
            compiled = first_launch(self.kernel, lambda: self.kernel[self.grid](**given), given)
            names = self.kernel.arg_names
            arguments = [self.fixed.get(name) for name in names]
            self.known[signature] = (compiled, arguments, [names.index(name) for name in live])
            return
        compiled, arguments, places = found
        arguments = arguments.copy()
        for place, tensor in zip(places, live.values(), strict=True):
            arguments[place] = tensor
        compiled[self.grid](*arguments)


class Start:
    """One kernel with all its fixed arguments, started without Triton's look at them from the second time on."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        fixed: tuple[Any, ...],
        warps: int,
        stages: int,
        variant: Hashable | None,
    ) -> None:
        self.kernel, self.grid, self.fixed, self.variant = kernel, grid, fixed, variant
        self.options = {"num_warps": warps, "num_stages": stages}
        self.again: Any = None
        if variant is not None and variant in _compiled:
            self.again = _compiled[variant][grid]
        self.launched = False

    def __call__(self, live: tuple[Any, ...], aligned: bool, fixed: tuple[Any, ...] | None = None) -> None:
        """Start with the tensors of this call, and with ``fixed`` in the place of the fixed arguments where it is given."""
        given = (*live, *(self.fixed if fixed is None else fixed))
        if self.again is None and self.variant is not None and self.variant in _compiled:
            self.again = _compiled[self.variant][self.grid]
        if aligned and self.again is not None:
            self.again(*given)
            return
        if interpreted() or (self.launched and not aligned):
            self.kernel[self.grid](*given, **self.options)
            return
        arguments = {**dict(zip(self.kernel.arg_names, given, strict=True)), **self.options}
        compiled = first_launch(self.kernel, lambda: self.kernel[self.grid](*given, **self.options), arguments)
        self.launched = True
        if aligned:
            self.again = compiled[self.grid]
            if self.variant is not None:
                _compiled[self.variant] = compiled


_compiled: dict[Hashable, Any] = {}
"""Compiled kernels by everything that chooses a variant, for calls of new kinds (every step of a growing cache is one)."""
