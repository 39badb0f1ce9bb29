"""What each position of a sequence is: special token, text, image patch with its row and column, generated token.

:func:`layout` reads the inputs and the model's config; it never runs the model. How images become positions differs by
family: ``layout_images`` knows it for the image tokens inside the text, ``layout_vision`` for the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interp.models.layout_cells import AUDIO, FIELDS, GENERATED, IMAGE, KINDS, PAD, Cells, LayoutError, array, blank
from interp.models.layout_images import Placed, place_images
from interp.models.layout_tokens import strings, token_cells
from interp.models.layout_vision import cross_cells, vision_cells

__all__ = ["KINDS", "Layout", "LayoutError", "layout"]

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Layout:
    """What each position of one stack's sequence is. Every array is ``[sample, position]``; -1 is "none".

    In a text stack a sample is a prompt. In a vision stack it is what the tower attends within: an image or a tile, or
    (Qwen-VL, Pixtral) all images of the call packed one after the other; ``prompt``, ``image`` and ``tile`` then say
    where a position belongs. In a stack of cross attention the positions are those of the keys.

    Attributes:
        stack: name of the stack.
        kind: int8 code into ``KINDS``, -1 for a pad.
        token_ids: int64, -1 where the position is no token (vision, audio).
        tokens: readable strings; the id as text where no tokenizer was given.
        prompt: index of the prompt in the batch.
        image: index of the image (or video) in its prompt, in order of appearance.
        tile: index of the tile in its image, 0 where the image is not tiled; the frame of a video. In the text stack of
            LLaVA-NeXT and LLaVA-OneVision 0 is the thumbnail and 1 the whole unpadded high-resolution grid.
        row: row on the patch grid of that tile (of merged patches in a text stack).
        column: column on it.
        tile_row: row of the tile in its image; -1 for a thumbnail and where the inputs do not tell.
        tile_column: column of the tile.
        notes: what was assumed, or could not be told; empty where the family is known.
    """

    stack: str
    kind: NDArray[np.int8]
    token_ids: NDArray[np.int64]
    tokens: NDArray[np.object_]
    prompt: Ints
    image: Ints
    tile: Ints
    row: Ints
    column: Ints
    tile_row: Ints
    tile_column: Ints
    notes: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """``(samples, positions)``."""
        return self.kind.shape[0], self.kind.shape[1]

    def mask(self, kind: str, image: int | None = None, tile: int | None = None) -> NDArray[np.bool_]:
        """Where a kind stands: bool ``[sample, position]``.

        Args:
            kind: one of ``KINDS``.
            image: only positions of this image of the prompt.
            tile: only positions of this tile.

        Raises:
            LayoutError: no such kind.
        """
        if kind not in KINDS:
            raise LayoutError(f"kind must be one of {KINDS}, got {kind!r}")
        chosen = self.kind == KINDS.index(kind)
        if image is not None:
            chosen &= self.image == image
        if tile is not None:
            chosen &= self.tile == tile
        return chosen

    def groups(self) -> NDArray[np.int8]:
        """Kind codes as key groups, int8 ``[sample, position]``; a pad, which no query sees, counts as group 0."""
        return np.maximum(self.kind, 0).astype(np.int8)

    def extend(self, ids: Any, tokenizer: Any = None, pads: NDArray[np.bool_] | None = None) -> Layout:
        """This layout followed by generated tokens.

        Args:
            ids: ``[sample, n]``, or ``[n]`` where there is one sample.
            tokenizer: gives them readable strings.
            pads: bool ``[sample, n]``, True after the sample has stopped.

        Raises:
            LayoutError: ``ids`` has another number of samples.
        """
        new = np.atleast_2d(array(ids)).astype(np.int64)
        samples = self.shape[0]
        if new.ndim != 2 or new.shape[0] != samples:
            raise LayoutError(f"ids must be [sample, n] with {samples} samples, got shape {new.shape}")
        cells = blank(new.shape, GENERATED)
        cells["prompt"] = np.arange(samples)[:, None]
        if pads is not None:
            cells["kind"][pads] = PAD
        tail = _assemble(self.stack, cells, new, strings(new, tokenizer))
        joined = {name: np.concatenate([getattr(self, name), getattr(tail, name)], axis=1) for name in _ARRAYS}
        return replace(self, **joined)

    def grid(self, image: int = 0, tile: int = 0, sample: int = 0) -> tuple[int, int]:
        """``(rows, columns)`` of the patch grid of an image's tile.

        Raises:
            LayoutError: the sample has no such tile with known rows and columns.
        """
        cells = self._cells(image, tile, sample)
        return int(self.row[sample, cells].max()) + 1, int(self.column[sample, cells].max()) + 1

    def overlay(self, values: Any, image: int = 0, tile: int = 0, sample: int = 0) -> NDArray[np.float64]:
        """Values by position put on the patch grid.

        Args:
            values: ``[..., position]``.

        Returns:
            ``[..., row, column]``, NaN where the grid has no position (masked patches).

        Raises:
            LayoutError: no such tile, or ``values`` has another number of positions.
        """
        given = np.asarray(array(values), dtype=np.float64)
        if given.shape[-1:] != (self.shape[1],):
            raise LayoutError(f"values must be [..., {self.shape[1]} positions], got shape {given.shape}")
        cells = self._cells(image, tile, sample)
        out = np.full((*given.shape[:-1], *self.grid(image, tile, sample)), np.nan)
        out[..., self.row[sample, cells], self.column[sample, cells]] = given[..., cells]
        return out

    def _cells(self, image: int, tile: int, sample: int) -> NDArray[np.intp]:
        wanted = self.mask("image", image, tile)[sample] & (self.row[sample] >= 0)
        if not wanted.any():
            have = sorted(set(zip(self.image[sample].tolist(), self.tile[sample].tolist(), strict=True)) - {(-1, -1)})
            raise LayoutError(
                f"image, tile must name patches with rows and columns in sample {sample} of stack {self.stack!r}, "
                f"got ({image}, {tile}); tiles there: {have[:12]}. {self.notes}"
            )
        return np.flatnonzero(wanted)


_ARRAYS = ("kind", "token_ids", "tokens", "prompt", "image", "tile", "row", "column", "tile_row", "tile_column")


def layout(module: Any, inputs: Mapping[str, Any], tokenizer: Any = None, generated: int = 0) -> dict[str, Layout]:
    """What each position of each stack's sequence is.

    Args:
        module: a ``PreTrainedModel`` (or what unwraps to one).
        inputs: keyword arguments of one forward call, or of ``generate``.
        tokenizer: tells special tokens and gives readable strings; without one, the special ids come from the configs.
        generated: the last so many positions of the ``text`` sequence were generated.

    Returns:
        One :class:`Layout` by stack: ``text`` (the decoder's own sequence), ``encoder``, ``vision``, ``audio``,
        ``qformer``; ``cross`` and ``qformer_cross`` hold the key positions of cross attention. A stack whose sequence
        is not known for this family is left out; what was assumed is in ``notes``.

    Raises:
        LayoutError: an input is missing or contradicts the others.
    """
    from interp.models import unwrap

    module = unwrap(module)
    config = module.config
    known = ("input_ids", "decoder_input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values")
    if not any(inputs.get(name) is not None for name in known):
        raise LayoutError(f"inputs must hold one of {known}, got {sorted(inputs)}")
    out: dict[str, Layout] = {}
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    placed: Placed | None = None
    if inputs.get("input_ids") is not None:
        name = "encoder" if seq2seq else "text"
        out[name], placed = _token_layout(module, name, inputs, tokenizer, 0 if seq2seq else generated)
    elif not seq2seq and inputs.get("inputs_embeds") is not None:
        raise LayoutError("inputs must hold input_ids: inputs_embeds does not tell what the positions are")
    vision = vision_cells(module, inputs, placed)
    if vision is not None:
        cells, names, notes = vision
        out["vision"] = _assemble("vision", cells, np.full(cells.shape, -1), names, notes)
    audio = _audio_layout(module, inputs)
    if audio is not None:
        out["audio"] = audio
    if seq2seq:
        out["text"] = _decoder_layout(config, inputs, tokenizer, generated, out)
        source = next((out[s] for s in ("encoder", "audio", "vision") if s in out), None)
        if source is not None:
            out["cross"] = replace(source, stack="cross")
    if getattr(config, "model_type", "") == "blip-2" and "vision" in out:
        out["qformer"] = _query_layout(config.num_query_tokens, out["vision"])
        out["qformer_cross"] = replace(out["vision"], stack="qformer_cross")
    if getattr(config, "model_type", "") == "mllama" and inputs.get("pixel_values") is not None:
        cells, names = cross_cells(config, inputs)
        out["cross"] = _assemble("cross", cells, np.full(cells.shape, -1), names)
    return out


def text_cells(module: Any, inputs: Mapping[str, Any], tokenizer: Any = None) -> Cells | None:
    """What :func:`layout` says of the text sequence, as records ``[sample, position]``, without what is for reading alone.

    For policies that ask at every run: no readable strings, no other stack where the text does not depend on one.

    Raises:
        LayoutError: as :func:`layout`, but for inputs of other stacks.
    """
    from interp.models import unwrap

    module = unwrap(module)
    if getattr(module.config, "is_encoder_decoder", False) or inputs.get("input_ids") is None:
        found = layout(module, inputs, tokenizer).get("text")
        if found is None:
            return None
        cells = blank(found.shape, PAD)
        for name in FIELDS:
            cells[name] = getattr(found, name)
        return cells
    ids = array(inputs["input_ids"]).astype(np.int64)
    cells, _ = token_cells(module.config, ids, inputs.get("attention_mask"), tokenizer, 0, "input_ids")
    place_images(module, inputs, ids, cells)
    return cells


def _assemble(
    stack: str, cells: NDArray[Any], ids: NDArray[np.int64], tokens: NDArray[np.object_], notes: str = ""
) -> Layout:
    fields = {name: cells[name].astype(np.int32) for name in cells.dtype.names or () if name != "kind"}
    return Layout(stack, cells["kind"].astype(np.int8), ids.astype(np.int64), tokens, notes=notes, **fields)


def _token_layout(
    module: Any, stack: str, inputs: Mapping[str, Any], tokenizer: Any, generated: int
) -> tuple[Layout, Placed | None]:
    """A stack made of tokens, images among them."""
    ids = array(inputs["input_ids"]).astype(np.int64)
    cells, notes = token_cells(module.config, ids, inputs.get("attention_mask"), tokenizer, generated, "input_ids")
    placed = place_images(module, inputs, ids, cells)
    if placed is not None:
        notes = " ".join(part for part in (notes, placed.notes) if part)
    return _assemble(stack, cells, ids, strings(ids, tokenizer), notes), placed


def _decoder_layout(
    config: Any, inputs: Mapping[str, Any], tokenizer: Any, generated: int, others: Mapping[str, Layout]
) -> Layout:
    notes = ""
    if inputs.get("decoder_input_ids") is not None:
        ids = array(inputs["decoder_input_ids"]).astype(np.int64)
    else:
        start = getattr(config, "decoder_start_token_id", None)
        start = getattr(config.get_text_config(), "decoder_start_token_id", None) if start is None else start
        if start is None:
            raise LayoutError("inputs must hold decoder_input_ids: the config names no decoder_start_token_id")
        ids = np.full((next(iter(others.values())).shape[0], 1), start, dtype=np.int64)
        notes = "No decoder_input_ids: the sequence is what generate starts from."
    cells, note = token_cells(
        config, ids, inputs.get("decoder_attention_mask"), tokenizer, generated, "decoder_input_ids"
    )
    return _assemble("text", cells, ids, strings(ids, tokenizer), " ".join(part for part in (notes, note) if part))


def _audio_layout(module: Any, inputs: Mapping[str, Any]) -> Layout | None:
    """Frames after the convolutions of a speech encoder (Whisper, wav2vec 2.0 and kin)."""
    given = inputs.get("input_features")
    given = inputs.get("input_values") if given is None else given
    lengths = getattr(module, "_get_feat_extract_output_lengths", None)
    if given is None or lengths is None:
        return None
    samples, length = len(given), int(lengths(given.shape[-1]))
    cells = blank((samples, length), AUDIO)
    cells["prompt"] = np.arange(samples)[:, None]
    return _assemble("audio", cells, np.full(cells.shape, -1), _numbers(samples, length))


def _query_layout(queries: int, vision: Layout) -> Layout:
    """The Q-Former's learned queries: they stand for the image and have no place in it."""
    cells = blank((vision.shape[0], queries), IMAGE)
    for name in ("prompt", "image"):
        cells[name] = getattr(vision, name).max(axis=1, keepdims=True)
    return _assemble("qformer", cells, np.full(cells.shape, -1), _numbers(len(cells), queries))


def _numbers(samples: int, length: int) -> NDArray[np.object_]:
    return strings(np.tile(np.arange(length), (samples, 1)), None)
