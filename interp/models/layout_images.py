"""The image tokens inside a text sequence: which image, tile, row and column each of them is.

A vision-language model scatters its projected image features, in order, into the placeholder tokens of the batch. So
each family says which cells (special or patch, tile, row, column) every image contributes (``layout_families``), and
here they are laid into the placeholders in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interp.models.layout_cells import GENERATED, IMAGE, PAD, Cells, LayoutError, Unit
from interp.models.layout_families import Given, family_of, videos


@dataclass
class Placed:
    """The images of a batch in the order of their features.

    Attributes:
        units: one for each tile of each image, in order.
        notes: what was assumed.
    """

    units: list[Unit] = field(default_factory=list)
    notes: str = ""


def place_images(module: Any, inputs: Mapping[str, Any], ids: NDArray[np.int64], cells: Cells) -> Placed | None:
    """Mark the image tokens in ``cells`` ``[sample, position]``, in place.

    Returns:
        The images in order; None where the model has no image tokens in its text.

    Raises:
        LayoutError: the number of image tokens contradicts the images.
    """
    config = module.config
    if getattr(config, "model_type", "") == "mllama":
        return None  # its image token only marks where an image was: the patches are keys of the cross attention
    image_ids, video_ids = _ids(config, "image"), _ids(config, "video")
    if not image_ids | video_ids:
        return None
    open_cells = (cells["kind"] != PAD) & (cells["kind"] != GENERATED)
    found: list[tuple[int, NDArray[np.intp], Cells]] = []
    notes: list[str] = []
    for tokens, function in ((image_ids, family_of(config, inputs)), (video_ids - image_ids, videos)):
        given = Given(module, inputs, ids, np.isin(ids, sorted(tokens)) & open_cells, cells)
        if given.count:
            blocks, note = function(given)
            notes.append(note)
            found.extend(_scatter(given, blocks))
    placed = Placed(notes=" ".join(note for note in notes if note))
    for sample, positions, block in found:
        # Images and videos of a prompt are numbered together, as they stand in the text.
        image = sum(other == sample and where[0] < positions[0] for other, where, _ in found)
        own = block.copy()  # families repeat one block for many images
        own["prompt"], own["image"] = sample, image
        cells[sample, positions] = own
        tiles = dict.fromkeys(zip(*(own[n][own["kind"] == IMAGE].tolist() for n in Unit._fields), strict=True))
        placed.units.extend(Unit(*tile) for tile in tiles)
    return placed


def _ids(config: Any, what: str) -> set[int]:
    values = (getattr(config, f"{what}_{name}", None) for name in ("token_id", "token_index"))
    return {value for value in values if isinstance(value, int)}


def _scatter(given: Given, blocks: list[Cells]) -> list[tuple[int, NDArray[np.intp], Cells]]:
    """Lay blocks into the placeholders as ``masked_scatter`` lays features: through the samples, in order."""
    expected = sum(len(block) for block in blocks)
    if expected != given.count:
        raise LayoutError(
            f"input_ids must hold as many image tokens as the images of {given.config.model_type} give "
            f"({[len(block) for block in blocks]}, together {expected}), got {given.count}"
        )
    samples, positions = np.nonzero(given.placeholder)
    out: list[tuple[int, NDArray[np.intp], Cells]] = []
    start = 0
    for block in blocks:
        here = slice(start, start + len(block))
        if len(set(samples[here].tolist())) != 1:
            raise LayoutError(f"input_ids must keep the {len(block)} tokens of an image in one sample")
        out.append((int(samples[start]), positions[here], block))
        start += len(block)
    return out
