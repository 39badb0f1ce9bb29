"""The record of one position, shared by the layouts of text and of vision sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

KINDS = ("special", "text", "image", "generated", "audio")
PAD, SPECIAL, TEXT, IMAGE, GENERATED, AUDIO = -1, 0, 1, 2, 3, 4

FIELDS = ("kind", "prompt", "image", "tile", "row", "column", "tile_row", "tile_column")
CELL = np.dtype([(name, np.int32) for name in FIELDS])

Cells = NDArray[Any]


class LayoutError(ValueError):
    """The inputs do not tell what the positions are."""


class Unit(NamedTuple):
    """One picture a tower sees: an image, a tile of it or a frame; -1 where not known."""

    prompt: int
    image: int
    tile: int = 0
    tile_row: int = -1
    tile_column: int = -1


def require(inputs: Mapping[str, Any], name: str, config: Any) -> Any:
    """An input without which the family's images cannot be placed."""
    if inputs.get(name) is None:
        raise LayoutError(f"inputs must hold {name}: {config.model_type} places its images by it; got {sorted(inputs)}")
    return inputs[name]


def array(value: Any) -> NDArray[Any]:
    """A numpy array of a tensor on any device, or of a list."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def blank(shape: int | tuple[int, ...], kind: int) -> Cells:
    """Positions of one kind that belong to no image."""
    cells = np.full(shape, -1, dtype=np.int32).astype(CELL)
    cells["kind"] = kind
    return cells


def patch_grid(rows: int, columns: int, *, tile: int = 0, merge: int = 1) -> Cells:
    """The patches of a grid ``[rows * columns]``: row by row, or ``merge x merge`` blocks row by row."""
    cells = blank(rows * columns, IMAGE)
    row, column = np.mgrid[:rows, :columns]
    blocks = (rows // merge, merge, columns // merge, merge)
    for name, coordinate in (("row", row), ("column", column)):
        cells[name] = coordinate.reshape(blocks).transpose(0, 2, 1, 3).ravel()
    cells["tile"] = tile
    return cells


def pair(size: Any) -> tuple[int, int]:
    """``(height, width)`` of a config value that may be one number."""
    values = list(size) if isinstance(size, list | tuple) else [size, size]
    return int(values[-2]), int(values[-1])
