"""Launching a compiled kernel again and again without asking Triton's dispatcher each time.

The dispatcher looks at every argument to choose a specialisation, which for a kernel with a hundred of them costs more than
a layer of a small model. A :class:`Launch` asks it once; later calls differ only in the tensors that are named as live.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from interp.attention.triton.devices import interpreted

Arguments = dict[str, Any]

ALIGNMENT = 16
"""Bytes; Triton compiles a pointer that is a multiple of it into wider loads."""


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
            compiled = self.kernel[self.grid](**self.fixed, **live, **self.options)
            names = self.kernel.arg_names
            arguments = [self.fixed.get(name) for name in names]
            self.known[signature] = (compiled, arguments, [names.index(name) for name in live])
            return
        compiled, arguments, places = found
        arguments = arguments.copy()
        for place, tensor in zip(places, live.values(), strict=True):
            arguments[place] = tensor
        compiled[self.grid](*arguments)
