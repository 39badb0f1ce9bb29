"""Kinds and readable strings of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interp.models.layout_cells import GENERATED, PAD, SPECIAL, TEXT, Cells, LayoutError, array, blank


def token_cells(
    config: Any, ids: NDArray[np.int64], given_mask: Any, tokenizer: Any, generated: int, name: str
) -> tuple[Cells, str]:
    """Kinds of the tokens ``ids`` ``[sample, position]`` before any image is placed, and notes.

    Args:
        config: of the model; its special ids mark structure, with those of the tokenizer.
        ids: token ids.
        given_mask: attention mask, 0 for a pad.
        tokenizer: or None.
        generated: how many positions at the end were generated.
        name: of the input, for errors.

    Raises:
        LayoutError: shapes that do not fit.
    """
    if ids.ndim != 2:
        raise LayoutError(f"{name} must be [sample, position], got shape {ids.shape}")
    if not 0 <= generated <= ids.shape[1]:
        raise LayoutError(f"generated must lie between 0 and the {ids.shape[1]} positions of {name}, got {generated}")
    cells = blank(ids.shape, TEXT)
    cells["prompt"] = np.arange(len(ids))[:, None]
    cells["kind"][np.isin(ids, sorted(special_ids(config, tokenizer)))] = SPECIAL
    if generated:
        cells["kind"][:, -generated:] = GENERATED
    mask = None if given_mask is None else array(given_mask)
    if mask is None:
        return cells, ""
    if mask.ndim != 2:
        return cells, f"Pads are not marked: the attention mask is {mask.ndim}-dimensional."
    if mask.shape != ids.shape:
        raise LayoutError(f"attention_mask must have the shape of {name}, {ids.shape}, got {mask.shape}")
    cells["kind"][mask == 0] = PAD
    return cells, ""


def special_ids(config: Any, tokenizer: Any) -> set[int]:
    """Ids that mark structure: the tokenizer's special tokens and every ``*_token_id`` of the configs."""
    found: set[int] = set()
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for owner in (config, text):
        # Old configs say `_token_index`; both names appear among what is saved or as mapped attributes.
        for name in {*_saved(owner), *getattr(owner, "attribute_map", {})}:
            if name.endswith(("_token_id", "_token_index")) and not name.startswith("_"):
                value = getattr(owner, name, None)
                values = value if isinstance(value, list | tuple) else [value]
                found |= {v for v in values if isinstance(v, int) and v >= 0}
    if tokenizer is not None:
        found |= {int(i) for i in tokenizer.all_special_ids}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        found |= {int(i) for i, token in added.items() if getattr(token, "special", False)}
    return found


def _saved(config: Any) -> Iterable[str]:
    """Names of what a config saves of itself; ``to_dict`` copies every value, and a class may add names there."""
    from transformers import PretrainedConfig

    if getattr(type(config), "to_dict", None) is PretrainedConfig.to_dict:
        return vars(config)
    return config.to_dict()


def strings(ids: NDArray[np.int64], tokenizer: Any) -> NDArray[np.object_]:
    """Readable strings of token ids, same shape; the numbers without a tokenizer."""
    distinct, where = np.unique(ids, return_inverse=True)
    words = np.array([_readable(int(i), tokenizer) for i in distinct], dtype=object)
    return words[where].reshape(ids.shape)


def _readable(token_id: int, tokenizer: Any) -> str:
    if tokenizer is None or token_id < 0:
        return str(token_id)
    piece = tokenizer.convert_ids_to_tokens(token_id)
    text = tokenizer.decode([token_id])
    if piece is None:
        return str(token_id)
    if not text or "�" in text:
        # Part of a character: its bytes have no text of their own.
        return str(piece)
    # SentencePiece drops the space at the start of what it decodes.
    return f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text
