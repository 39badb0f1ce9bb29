"""The sequence of a vision tower: special tokens, then patches in the order in which the tower attends over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from interp.models.layout_cells import PAD, SPECIAL, Cells, Unit, array, blank, pair, patch_grid, require
from interp.models.module_walk import every

if TYPE_CHECKING:
    from interp.models.layout_images import Placed

# Learned tokens in front of the patches, by the parameter that holds them, in the order of the sequence.
SPECIALS = {
    "cls_token": "[CLS]",
    "class_embedding": "[CLS]",
    "distillation_token": "[DIST]",
    "register_tokens": "[REG]",
}
# Towers whose order was checked against the running model (tests/models/test_layout.py).
CHECKED = (
    *("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "clip_vision_model", "siglip"),
    *("siglip_vision_model", "internvl_vision", "blip_2_vision_model", "idefics3_vision", "smolvlm_vision"),
)


def vision_cells(
    module: Any, inputs: Mapping[str, Any], placed: Placed | None
) -> tuple[Cells, NDArray[np.object_], str] | None:
    """Cells ``[sample, position]``, readable names and notes of the tower's sequence; None where it is not known.

    Args:
        module: the model.
        inputs: of a forward call.
        placed: the images as they stand in the text; None where there is none.
    """
    config, tower = module.config, vision_config(module.config)
    if tower is None or all(inputs.get(name) is None for name in ("pixel_values", "pixel_values_videos")):
        return None
    specials = _special_names(module)
    units = placed.units if placed is not None and placed.units else None
    notes = ""
    if any(inputs.get(name) is not None for name in ("image_grid_thw", "video_grid_thw")):
        sequences, notes = _packed(config, tower, inputs, units)
    elif getattr(tower, "model_type", "") == "pixtral":
        sequences = _pixtral(tower, inputs, units)
    elif config.model_type == "mllama":
        sequences = _mllama(config, inputs, multiple=8)
    elif inputs.get("spatial_shapes") is not None:
        sequences = _naflex(inputs)
    else:
        found = _pictures(config, tower, inputs, units, len(specials))
        if found is None:
            return None
        sequences, notes = found
    cells = _stack(sequences)
    return cells, _names(cells, specials), notes


def vision_config(config: Any) -> Any | None:
    """The config of the tower that cuts a picture into patches of one size."""
    own = [getattr(config, name, None) for name in ("vision_config", "encoder")]
    for candidate in (*own, config):
        # `depths`: a hierarchical tower, whose sequence changes from stage to stage.
        if getattr(candidate, "patch_size", None) is not None and not hasattr(candidate, "depths"):
            return candidate
    return None


def tower_specials(module: Any) -> int:
    """How many learned tokens stand before the patches of the tower."""
    return len(_special_names(module))


def anyres_tiles(config: Any, inputs: Mapping[str, Any]) -> list[tuple[tuple[int, int], tuple[int, int] | None]]:
    """For each image of LLaVA-NeXT or LLaVA-OneVision its size and the tiles ``(rows, columns)`` of its canvas.

    The tiles are None where the picture is not cut (several images in one prompt of LLaVA-OneVision).
    """
    from transformers.image_processing_utils import select_best_resolution

    sizes = [(int(h), int(w)) for h, w in array(require(inputs, "image_sizes", config)).tolist()]
    counts = inputs.get("batch_num_images") if config.model_type == "llava_onevision" else None
    cut = [True] * len(sizes) if counts is None else [n == 1 for n in array(counts).tolist() for _ in range(n)]
    side = pair(config.vision_config.image_size)[0]
    out: list[tuple[tuple[int, int], tuple[int, int] | None]] = []
    for size, needs in zip(sizes, cut, strict=True):
        height, width = select_best_resolution(size, config.image_grid_pinpoints)
        out.append((size, (height // side, width // side) if needs else None))
    return out


def cross_cells(config: Any, inputs: Mapping[str, Any]) -> tuple[Cells, NDArray[np.object_]]:
    """Keys of Mllama's cross attention, ``[prompt, image x tile x (CLS + patches)]``: the tower's, unpadded."""
    cells = np.stack(_mllama(config, inputs, multiple=1)).reshape(len(inputs["pixel_values"]), -1)
    return cells, _names(cells, ["[CLS]"])


def _special_names(module: Any) -> list[str]:
    config = vision_config(module.config)
    tower: Any = next((m for m in module.modules() if type(getattr(m, "config", None)) is type(config)), module)
    parameters = {
        name: parameter
        for part in every(tower)
        for name, parameter in vars(part)["_parameters"].items()
        if name in SPECIALS and parameter is not None
    }
    names: list[str] = []
    for parameter, name in SPECIALS.items():
        if parameter in parameters:
            count = parameters[parameter].shape[-2] if parameter == "register_tokens" else 1
            names.extend([name] * count)
    return names


def _pictures(
    config: Any, tower: Any, inputs: Mapping[str, Any], units: Sequence[Unit] | None, specials: int
) -> tuple[list[Cells], str] | None:
    """Towers that attend within one picture, so that an image, a tile or a frame is a sample."""
    patch, family, kind = pair(tower.patch_size), config.model_type, str(tower.model_type)
    pixels: Any = inputs.get("pixel_values")
    visible: NDArray[np.bool_] | None = None
    if family in ("llava_next", "llava_onevision"):
        pixels = inputs["pixel_values_videos"] if pixels is None else pixels
        owners = _anyres_units(config, inputs, units)
        count = len(owners)
    elif family in ("idefics3", "smolvlm"):
        visible = _visible_patches(inputs, patch)
        count = len(visible)
        owners = units
    elif pixels is not None and pixels.ndim == 4:
        count, owners = len(pixels), units
    else:
        return None  # video transformers: what a position is differs from model to model
    notes: list[str] = []
    if kind not in CHECKED:
        notes.append(f"The sequence of {kind} is assumed: {specials} special tokens, then patches row by row.")
    if owners is None:
        owners = [Unit(prompt, 0) for prompt in range(count)]
    elif len(owners) != count:
        notes.append(f"The tower gets {count} pictures and the text {len(owners)}: whose they are is not known.")
        owners = [Unit(-1, -1, -1)] * count
    grid = patch_grid(pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
    sequences = [_owned(np.concatenate([blank(specials, SPECIAL), grid]), owner) for owner in owners]
    if visible is not None:
        for cells, seen in zip(sequences, visible, strict=True):
            cells["kind"][specials:][~seen] = PAD
    return sequences, " ".join(notes)


def _owned(cells: Cells, owner: Unit) -> Cells:
    for name, value in zip(Unit._fields, owner, strict=True):
        cells[name] = value
    return cells


def _images(units: Sequence[Unit] | None, count: int) -> list[tuple[int, int]]:
    """``(prompt, image)`` in the order of the features; without a text all belong to prompt 0."""
    found = list(dict.fromkeys((unit.prompt, unit.image) for unit in units or ()))
    return found if len(found) == count else [(0 if units is None else -1, n) for n in range(count)]


def _anyres_units(config: Any, inputs: Mapping[str, Any], units: Sequence[Unit] | None) -> list[Unit]:
    """Thumbnail, then the tiles row by row, of each image; then the frames of each video, which is a later call."""
    tiles = anyres_tiles(config, inputs) if inputs.get("pixel_values") is not None else []
    videos = inputs.get("pixel_values_videos")
    images = _images(units, len(tiles) + (0 if videos is None else len(videos)))
    owners: list[Unit] = []
    for (prompt, image), (_, grid) in zip(images, tiles, strict=False):
        owners.append(Unit(prompt, image))
        rows, columns = grid or (0, 0)
        owners.extend(Unit(prompt, image, 1 + r * columns + c, r, c) for r in range(rows) for c in range(columns))
    if videos is not None:
        owners.extend(Unit(p, i, frame) for p, i in images[len(tiles) :] for frame in range(videos.shape[1]))
    return owners


def _visible_patches(inputs: Mapping[str, Any], patch: tuple[int, int]) -> NDArray[np.bool_]:
    """Idefics3, SmolVLM: bool ``[picture, patch]`` of the pictures that are not padding (all zero)."""
    pixels = inputs["pixel_values"].flatten(0, 1)
    real = (pixels != 0).flatten(1).any(1)
    real[0] |= not bool(real.any())
    mask = inputs.get("pixel_attention_mask")
    shown = pixels.new_ones((len(pixels), *pixels.shape[-2:])) if mask is None else mask.flatten(0, 1)
    patches = shown[real].unfold(1, patch[0], patch[0]).unfold(2, patch[1], patch[1])
    return array(patches.sum((-1, -2)) > 0).reshape(int(real.sum()), -1)


def _packed(
    config: Any, tower: Any, inputs: Mapping[str, Any], units: Sequence[Unit] | None
) -> tuple[list[Cells], str]:
    """Qwen2-VL and successors: all images, then all videos, in one sequence; patches by merge block, then by window."""
    merge = int(getattr(tower, "spatial_merge_size", 1))
    given = [array(inputs[n]) for n in ("image_grid_thw", "video_grid_thw") if inputs.get(n) is not None]
    sizes = np.concatenate(given).tolist()
    parts: list[Cells] = []
    for (t, h, w), (prompt, image) in zip(sizes, _images(units, len(sizes)), strict=True):
        part = np.concatenate([patch_grid(h, w, tile=frame, merge=merge) for frame in range(t)])
        part["prompt"], part["image"] = prompt, image
        if getattr(tower, "fullatt_block_indexes", None) is not None:
            order = _windows(part, merge, int(tower.window_size) // merge // pair(tower.patch_size)[0])
            part = part[order]
        parts.append(part)
    known = str(config.model_type).startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
    note = "" if known else f"Patches of {config.model_type} are assumed to be in Qwen2-VL's order."
    return [np.concatenate(parts)], note


def _windows(part: Cells, merge: int, side: int) -> NDArray[np.intp]:
    """Qwen2.5-VL's order: frame by frame, window by window (``side x side`` merge blocks), each in its former order."""
    row, column = part["row"] // merge // side, part["column"] // merge // side
    return np.lexsort((np.arange(len(part)), column, row, part["tile"]))


def _pixtral(tower: Any, inputs: Mapping[str, Any], units: Sequence[Unit] | None) -> list[Cells]:
    """All images in one sequence, row by row."""
    pixels, given = inputs["pixel_values"], inputs.get("image_sizes")
    sizes = [tuple(pixels.shape[-2:])] * len(pixels) if given is None else array(given).tolist()
    patch = pair(tower.patch_size)
    images = _images(units, len(sizes))
    grids = [patch_grid(h // patch[0], w // patch[1]) for h, w in sizes]
    return [np.concatenate([_owned(g, Unit(*image)) for g, image in zip(grids, images, strict=True)])]


def _naflex(inputs: Mapping[str, Any]) -> list[Cells]:
    """SigLIP 2 of any aspect ratio: the processor has cut the patches already."""
    length = inputs["pixel_values"].shape[1]
    shapes = array(inputs["spatial_shapes"]).tolist()
    grids = [_owned(patch_grid(rows, columns), Unit(prompt, 0)) for prompt, (rows, columns) in enumerate(shapes)]
    return [np.concatenate([grid, blank(length - len(grid), PAD)]) for grid in grids]


def _mllama(config: Any, inputs: Mapping[str, Any], multiple: int) -> list[Cells]:
    """Mllama: the tiles of an image one after the other, each a CLS and its patches, padded to a multiple."""
    pixels, tower = inputs["pixel_values"], config.vision_config
    prompts, images, tiles = pixels.shape[:3]
    ratios = array(require(inputs, "aspect_ratio_ids", config)).reshape(prompts, images)
    shown = array(require(inputs, "aspect_ratio_mask", config)).reshape(prompts, images, -1)
    patch = pair(tower.patch_size)
    grid = patch_grid(pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
    tile_cells = np.concatenate([blank(1, SPECIAL), grid, blank(-(1 + len(grid)) % multiple, PAD)])
    sequences: list[Cells] = []
    for prompt, image in np.ndindex(prompts, images):
        ratio = int(ratios[prompt, image])
        columns = int(tower.supported_aspect_ratios[ratio - 1][1]) if ratio else 1
        parts = [_owned(tile_cells.copy(), Unit(prompt, image, t, *divmod(t, columns))) for t in range(tiles)]
        for part, real in zip(parts, shown[prompt, image], strict=True):
            if not real or not ratio:  # a missing image has aspect ratio 0, and yet one tile in the mask
                part["kind"] = PAD
        sequences.append(np.concatenate(parts))
    return sequences


def _stack(sequences: list[Cells]) -> Cells:
    longest = max(len(cells) for cells in sequences)
    return np.stack([np.concatenate([cells, blank(longest - len(cells), PAD)]) for cells in sequences])


def _names(cells: Cells, specials: list[str]) -> NDArray[np.object_]:
    """Readable names: ``[CLS]``, or ``row,column`` of a patch."""
    names = np.full(cells.shape, "", dtype=object)
    samples, positions = np.nonzero(cells["kind"] != PAD)
    # Lists of plain numbers: to ask an array of records for one value takes longer than to write the name.
    found = (cells[samples, positions][field].tolist() for field in ("kind", "row", "column"))
    names[samples, positions] = [
        specials[min(position, len(specials) - 1)] if kind == SPECIAL else f"{row},{column}"
        for position, kind, row, column in zip(positions.tolist(), *found, strict=True)
    ]
    return names
