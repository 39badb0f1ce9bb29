"""What every probe hands out: token ids of one prompt, with an image where the model sees, and how they were made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class ProbeError(ValueError):
    """A probe that cannot be built for a model, or settings that contradict each other."""


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        ids: token ids ``[position]``, special tokens included.
        text: what was encoded; empty where the ids were drawn directly.
    """

    ids: tuple[int, ...]
    text: str = ""

    def inputs(self, device: Any = None) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask``, int64 ``[1, position]``."""
        import torch

        ids = torch.tensor([self.ids], dtype=torch.int64, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class ImagePrompt(Sample):
    """One prompt with an image, or an image alone (no ids, no text). The pixels are read whenever they are needed.

    Attributes:
        image: as ``model.encode`` takes it; two prompts are equal where their ids and paths are.
        model: the :class:`interp.Model` that encodes it.
        chat: the text stands in the model's chat template.
    """

    image: Any = None
    model: Any = field(default=None, repr=False, compare=False)
    chat: bool = False

    def inputs(self, device: Any = None) -> dict[str, Any]:
        """What ``model.encode`` gives: ``pixel_values``, with ``input_ids`` and ``attention_mask`` where there is text."""
        encoded = self.model.encode(self.text or None, self.image, chat=self.chat)
        return {k: v.to(device) if device is not None and hasattr(v, "to") else v for k, v in encoded.items()}


def image_prompt(model: Any, text: str, image: Any, *, chat: bool = False) -> ImagePrompt:
    """A prompt of one text and one image.

    Raises:
        ProbeError: not an :class:`interp.Model`.
        ModelInputError: a model that takes no images, or an image that cannot be read.
    """
    if not callable(getattr(model, "encode", None)) or not hasattr(model, "processor"):
        raise ProbeError(f"a prompt with an image needs an interp.Model, got {type(model).__name__}")
    ids = model.encode(text, image, chat=chat)["input_ids"][0]
    return ImagePrompt(tuple(int(i) for i in ids), text, image, model, chat)


def tokenizer_of(model_or_tokenizer: Any) -> Any:
    """The tokenizer of an :class:`interp.Model`, or the tokenizer itself.

    Raises:
        ProbeError: there is none.
    """
    if hasattr(model_or_tokenizer, "convert_ids_to_tokens"):
        return model_or_tokenizer
    tokenizer = getattr(model_or_tokenizer, "tokenizer", None)
    if tokenizer is None:
        got = getattr(model_or_tokenizer, "name", None) or type(model_or_tokenizer).__name__
        raise ProbeError(f"a text probe needs a tokenizer, and {got} has none; pass tokenizer= to interp.load")
    return tokenizer


def config_of(model_or_tokenizer: Any) -> Any:
    """The transformers config of a model, None for a tokenizer."""
    return getattr(model_or_tokenizer, "config", None)


def bos_id(model_or_tokenizer: Any) -> int | None:
    """Id of the token that begins a sequence, by the tokenizer, else by the config; None where there is none."""
    config = config_of(model_or_tokenizer)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokenizer = getattr(model_or_tokenizer, "tokenizer", None)
    for keeper in (model_or_tokenizer, tokenizer, text):
        found = getattr(keeper, "bos_token_id", None)
        if isinstance(found, int):
            return found
    return None


def encode(model_or_tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of ``text`` with the special tokens that the tokenizer puts around a prompt."""
    return tuple(int(i) for i in tokenizer_of(model_or_tokenizer)(text)["input_ids"])


def special_ids(tokenizer: Any, config: Any) -> set[int]:
    """Ids that mark structure, by the tokenizer and by every ``*_token_id`` of the config and its sub-configs."""
    found = {int(i) for i in getattr(tokenizer, "all_special_ids", ())}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found |= {int(i) for i, token in added.items() if getattr(token, "special", False)}
    if config is not None:
        _config_ids(config.to_dict(), found)
    return found


def _config_ids(values: dict[Any, Any], found: set[int]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _config_ids(value, found)
        elif isinstance(name, str) and name.endswith(("_token_id", "_token_index")):
            several = value if isinstance(value, list | tuple) else [value]
            found |= {v for v in several if isinstance(v, int) and v >= 0}
