"""Which cells (special or patch, tile, row, column) the images of each family contribute to the text, in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interp.models.layout_cells import IMAGE, SPECIAL, Cells, LayoutError, array, blank, pair, patch_grid, require
from interp.models.layout_vision import anyres_tiles, tower_specials

Blocks = tuple[list[Cells], str]


@dataclass(frozen=True)
class Given:
    """What a family's function looks at; it may write ``cells`` where it recognises marker tokens."""

    module: Any
    inputs: Mapping[str, Any]
    ids: NDArray[np.int64]
    placeholder: NDArray[np.bool_]
    cells: Cells

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def count(self) -> int:
        return int(self.placeholder.sum())

    def runs(self) -> list[list[tuple[int, int]]]:
        """By sample, ``(start, stop)`` of each unbroken run of placeholders."""
        edges = np.diff(np.pad(self.placeholder.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        starts, stops = ([np.flatnonzero(row == sign).tolist() for row in edges] for sign in (1, -1))
        return [list(zip(a, b, strict=True)) for a, b in zip(starts, stops, strict=True)]

    def sides(self) -> tuple[int, int]:
        """Rows and columns of patches of one picture as the tower gets it."""
        height, width = pair(self.config.vision_config.image_size)
        if self.inputs.get("pixel_values") is not None:
            height, width = self.inputs["pixel_values"].shape[-2:]
        patch = pair(self.config.vision_config.patch_size)
        return height // patch[0], width // patch[1]

    def repeat(self, block: Cells) -> list[Cells]:
        """As many copies of one image's block as the placeholders hold."""
        return [block] * (self.count // len(block))


def family_of(config: Any, inputs: Mapping[str, Any]) -> Callable[[Given], Blocks]:
    """The function that gives one block of cells for each image, and notes."""
    if inputs.get("image_grid_thw") is not None:
        return _merged
    return FAMILIES.get(getattr(config, "model_type", ""), _unknown)


def _llava(given: Given) -> Blocks:
    """The tower's whole grid; with a Pixtral tower one grid for each image size."""
    config, merge = given.config, int(getattr(given.config, "spatial_merge_size", 1))
    if given.inputs.get("image_sizes") is not None:
        step = pair(config.vision_config.patch_size)
        sizes = array(given.inputs["image_sizes"]).tolist()
        return [patch_grid(h // step[0] // merge, w // step[1] // merge) for h, w in sizes], ""
    return given.repeat(_features(given)), ""


def _features(given: Given) -> Cells:
    """What one picture gives after the feature selection: the tower's specials and patches, or all but the first."""
    sequence = np.concatenate([blank(tower_specials(given.module), SPECIAL), patch_grid(*given.sides())])
    sequence["tile"] = 0
    strategy = given.inputs.get("vision_feature_select_strategy") or getattr(
        given.config, "vision_feature_select_strategy", "default"
    )
    # The library drops the first position whatever it is: with a tower without CLS that is a patch.
    return sequence[1:] if strategy == "default" else sequence


def _anyres(given: Given) -> Blocks:
    """LLaVA-NeXT, LLaVA-OneVision: thumbnail, then the tiles as one unpadded grid, a newline token after each row."""
    config, base, tiles = given.config, _features(given), anyres_tiles(given.config, given.inputs)
    side = pair(config.vision_config.image_size)[0] // pair(config.vision_config.patch_size)[0]
    limit = getattr(config, "vision_aspect_ratio", None)
    blocks: list[Cells] = []
    for (height, width), grid in tiles:
        newline = blank(1, SPECIAL)
        if grid is None:
            blocks.append(np.concatenate([base, newline]))
            continue
        rows, columns = _unpadded(grid[0] * side, grid[1] * side, height, width)
        if limit is not None:
            ratio = math.sqrt(rows * columns / (int(limit.removeprefix("anyres_max_")) * side**2))
            if ratio > 1.1:  # the library then interpolates the whole grid to a smaller one
                rows, columns = int(rows // ratio), int(columns // ratio)
        newline["tile"] = 1
        lines = patch_grid(rows, columns, tile=1).reshape(rows, columns)  # either may be 0 for a very long picture
        blocks.append(np.concatenate([base, *(part for line in lines for part in (line, newline))]))
    return blocks, ""


def _unpadded(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Patches left of a ``rows x columns`` canvas once the padding of a ``height x width`` picture is cut off."""
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * padding, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * padding


def _merged(given: Given, name: str = "image_grid_thw") -> Blocks:
    """Qwen2-VL and successors: ``merge x merge`` patches are one token, row by row, frame by frame."""
    merge = int(getattr(given.config.vision_config, "spatial_merge_size", 1))
    blocks = [
        np.concatenate([patch_grid(h // merge, w // merge, tile=frame) for frame in range(t)])
        for t, h, w in array(require(given.inputs, name, given.config)).tolist()
    ]
    known = str(given.config.model_type).startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
    return blocks, "" if known else f"Image tokens of {given.config.model_type} are assumed to be merged as Qwen2-VL's."


def videos(given: Given) -> Blocks:
    """One block of cells for each video, its frames as tiles, and notes."""
    config, frames = given.config, given.inputs.get("pixel_values_videos")
    if given.inputs.get("video_grid_thw") is not None:
        return _merged(given, "video_grid_thw")
    if getattr(config, "model_type", "") == "llava_onevision" and frames is not None:
        height, width = pair(config.vision_config.image_size)
        patch = pair(config.vision_config.patch_size)
        pooled = math.ceil(height // patch[0] / 2), math.ceil(width // patch[1] / 2)
        video = [patch_grid(*pooled, tile=frame) for frame in range(frames.shape[1])]
        return [np.concatenate([*video, blank(1, SPECIAL)])] * len(frames), ""
    return _rowless(given, "Where video tokens come from is not known for this family: they have no rows.")


def _square(given: Given) -> Blocks:
    """PaliGemma: the tower's grid. Gemma 3: the grid after average pooling."""
    tokens = getattr(given.config, "mm_tokens_per_image", None)
    rows, columns = (math.isqrt(tokens),) * 2 if tokens else given.sides()
    return given.repeat(patch_grid(rows, columns)), ""


def _internvl(given: Given) -> Blocks:
    """Each unbroken run of image tokens is one image, its tiles one after the other."""
    ratio = float(given.config.downsample_ratio)
    rows, columns = (int(side * ratio) for side in given.sides())
    blocks: list[Cells] = []
    for start, stop in (run for sample in given.runs() for run in sample):
        count, rest = divmod(stop - start, rows * columns)
        if rest:
            raise LayoutError(
                f"input_ids must hold a multiple of {rows * columns} image tokens between markers, got {stop - start}"
            )
        blocks.append(np.concatenate([patch_grid(rows, columns, tile=tile) for tile in range(count)]))
    tiled = any(len(block) > rows * columns for block in blocks)
    note = "The inputs do not tell how tiles are arranged; the processor puts the thumbnail last." if tiled else ""
    return blocks, note


def _idefics3(given: Given) -> Blocks:
    """Idefics3, SmolVLM: tiles row by row, then the whole image; ``<fake><row_r_col_c>`` or ``<fake><global>`` before.

    The marker ids are not in the config, so the structure is read: ``<fake>`` stands two positions before each tile and
    closes the image; two tiles of a row have nothing but their markers between them; other tokens (newlines) end a row.
    """
    rows, columns = (side // int(given.config.scale_factor) for side in given.sides())
    runs = given.runs()
    rows_runs = list(zip(given.ids.tolist(), runs, strict=True))
    fakes = {row[start - 2] if start > 1 else -1 for row, sample in rows_runs for start, _ in sample}
    fakes |= {row[sample[-1][1]] if sample[-1][1] < len(row) else -1 for row, sample in rows_runs if sample}
    plain = all(stop - start == rows * columns for sample in runs for start, stop in sample)
    if not plain or len(fakes) != 1 or -1 in fakes:
        note = "No tile markers found around the image tokens: every tile is counted as an image of its own."
        return given.repeat(patch_grid(rows, columns)), note
    fake = fakes.pop()
    blocks: list[Cells] = []
    for sample, (row_ids, sample_runs) in enumerate(rows_runs):
        image: list[list[int]] = [[]]
        for n, (start, stop) in enumerate(sample_runs):
            given.cells["kind"][sample, [start - 2, start - 1]] = SPECIAL
            image[-1].append(n)
            last = n + 1 == len(sample_runs)
            closes = stop < len(row_ids) and row_ids[stop] == fake
            if not last and closes and sample_runs[n + 1][0] - stop == 2:
                continue
            if last or closes:
                given.cells["kind"][sample, stop : stop + closes] = SPECIAL
                blocks.append(_tile_rows(image, rows, columns))
                image = [[]]
            else:
                image.append([])
    return blocks, ""


def _tile_rows(image: list[list[int]], rows: int, columns: int) -> Cells:
    parts: list[Cells] = []
    for tile_row, line in enumerate(image):
        for tile_column in range(len(line)):
            part = patch_grid(rows, columns, tile=len(parts))
            if tile_row + 1 < len(image):  # the last one shows the whole image
                part["tile_row"], part["tile_column"] = tile_row, tile_column
            parts.append(part)
    return np.concatenate(parts)


def _queries(given: Given) -> Blocks:
    """BLIP-2, InstructBLIP: learned queries that stand for the image and have no place in it."""
    block = blank(int(given.config.num_query_tokens), IMAGE)
    block["tile"] = 0
    return given.repeat(block), ""


def _unknown(given: Given) -> Blocks:
    """An image is an unbroken run; its rows are a guess that is said to be one."""
    config = given.config
    resampled = any(getattr(config, name, None) is not None for name in ("qformer_config", "perceiver_config"))
    lengths = {stop - start for sample in given.runs() for start, stop in sample}
    side = math.isqrt(min(lengths))
    if resampled or len(lengths) != 1 or side * side != min(lengths):
        return _rowless(given, f"How {config.model_type} lays out image tokens is not known: they have no rows.")
    note = f"How {config.model_type} lays out image tokens is not known: {side} x {side}, row by row, is assumed."
    return given.repeat(patch_grid(side, side)), note


def _rowless(given: Given, note: str) -> Blocks:
    blocks = [blank(stop - start, IMAGE) for sample in given.runs() for start, stop in sample]
    for block in blocks:
        block["tile"] = 0
    return blocks, note


FAMILIES: dict[str, Callable[[Given], Blocks]] = {
    "llava": _llava,
    "mistral3": _llava,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "paligemma": _square,
    "gemma3": _square,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "blip-2": _queries,
    "instructblip": _queries,
}
