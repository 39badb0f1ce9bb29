"""Text and images to model inputs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.models.errors import ModelInputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp.models.model import Model


ONE_IMAGE = ("Blip2Processor", "InstructBlipProcessor")
"""Processors that put exactly one image before each text, however many they are given."""

MOST_PIXELS = 100_000_000
"""Of an image file, which takes three bytes a pixel once it is open."""

OPTIONAL = inspect.Parameter("optional", inspect.Parameter.KEYWORD_ONLY, default=None)


def encode(model: Model, text: Any, image: Any, *, chat: bool, system: str | None) -> Any:
    """See :meth:`interp.models.model.Model.encode`."""
    texts = _texts(text)
    _fits(model, text, image, chat=chat, system=system)
    if texts is None:
        return _finish(model, _image_part(model)(images=_flat(image), return_tensors="pt"))
    images = _nested(image, single=isinstance(text, str), count=len(texts))
    if type(model.processor).__name__ in ONE_IMAGE and any(len(mine) != 1 for mine in images):
        counts = [len(mine) for mine in images]
        raise ModelInputError(f"image must be one image a text for {type(model.module).__name__}, got {counts}")
    if chat:
        texts = [_chat(model, t, len(images[n]), system) for n, t in enumerate(texts)]
    else:
        texts = [_with_placeholders(model, t, len(images[n])) for n, t in enumerate(texts)]
    options: dict[str, Any] = {"return_tensors": "pt"}
    if chat:
        # The template has written the special tokens already; a second start token shifts every position.
        options["add_special_tokens"] = False
    if len(texts) > 1:
        options["padding"] = True
        if model.is_generative and not getattr(model.config, "is_encoder_decoder", False):
            options["padding_side"] = "left"
    with _pad_token(model.tokenizer):
        if any(images):
            return _finish(model, model.processor(text=texts, images=images, **options))
        encoded = model.tokenizer(texts, **options)
    return _finish(model, encoded)


def _texts(text: Any) -> list[str] | None:
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
        raise ModelInputError(f"text must be a text or a list of at least one text, got {text!r}")
    return list(texts)


def _fits(model: Model, text: Any, image: Any, *, chat: bool, system: str | None) -> None:
    from interp.models.model import missing

    name = type(model.module).__name__
    takes = inspect.signature(model.module.forward).parameters
    if text is None and image is None:
        raise ModelInputError("text or image must be given, got neither")
    if text is not None and "input_ids" not in takes:
        raise ModelInputError(f"text must be None for {name}, which takes {model.module.main_input_name}; got {text!r}")
    if image is not None and "pixel_values" not in takes:
        raise ModelInputError(f"image must be None for {name}, which takes no images; got {type(image).__name__}")
    if text is None and model.is_generative:
        raise ModelInputError(f"text must be given for {name}, which continues a text; '' is allowed where it is empty")
    if text is not None and model.tokenizer is None:
        raise ModelInputError(missing(model, "tokenizer"))
    if image is not None and model.processor is None:
        raise ModelInputError(missing(model, "processor"))
    if image is None and takes.get("pixel_values", OPTIONAL).default is inspect.Parameter.empty:
        raise ModelInputError(f"image must be given for {name}")
    if text is None and chat:
        raise ModelInputError("chat must be False without text")
    if system is not None and not chat:
        raise ModelInputError(f"system must be None without chat=True, got {system!r}")


def _chat(model: Model, text: str, n_images: int, system: str | None) -> str:
    """The text of one conversation: system message, user turn, start of the answer."""
    # A processor's template takes a list of parts and writes the image placeholders; a tokenizer's takes text.
    keeper = next((p for p in (model.processor, model.tokenizer) if getattr(p, "chat_template", None)), None)
    if keeper is None:
        raise ModelInputError(f"chat must be False for {model.name}, which has no chat template")
    parts = keeper is model.processor

    def content(words: str, images: int = 0) -> Any:
        return [{"type": "image"}] * images + [{"type": "text", "text": words}] if parts else words

    if n_images and not parts:
        text = _with_placeholders(model, text, n_images)
    turns = [{"role": "system", "content": content(system)}] if system is not None else []
    turns.append({"role": "user", "content": content(text, n_images)})
    try:
        return keeper.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        given = "system and text" if system is not None else "text"
        raise ModelInputError(f"{given} must fit the chat template of {model.name}, which refused: {error}") from error


def _with_placeholders(model: Model, text: str, n_images: int) -> str:
    mark = _placeholder(model.processor)
    if mark is None:
        return text
    bare = mark if isinstance(mark, str) else mark[1]
    written = text.count(bare)
    if written == n_images:
        return text
    if written:
        raise ModelInputError(f"text must have one {bare} an image or none, got {written} with {n_images} images")
    return (mark if isinstance(mark, str) else "".join(mark)) * n_images + "\n" + text


def _placeholder(processor: Any) -> str | tuple[str, str, str] | None:
    """What stands for an image in raw text, with the marks around it where the user writes those too.

    None where the processor puts the image in by itself (BLIP-2, PaliGemma) or takes the text apart from it (CLIP).
    """
    if type(processor).__name__ in ("PaliGemmaProcessor", *ONE_IMAGE):
        return None
    token = getattr(processor, "image_token", None)
    if hasattr(processor, "boi_token"):
        # Gemma 3: the user writes the begin mark, the processor turns it into begin, soft tokens and end.
        return processor.boi_token
    if type(processor).__name__.startswith("Qwen") and token is not None:
        return ("<|vision_start|>", token, "<|vision_end|>")
    return getattr(token, "content", token)


def _nested(image: Any, *, single: bool, count: int) -> list[list[Image]]:
    """The images of each sample."""
    if image is None:
        return [[] for _ in range(count)]
    if single:
        return [_flat(image)]
    if not isinstance(image, list | tuple) or len(image) != count:
        got = f"{len(image)} entries" if isinstance(image, list | tuple) else type(image).__name__
        raise ModelInputError(f"image must be a list with one entry a text ({count}), got {got}")
    return [[] if entry is None else _flat(entry) for entry in image]


def _flat(image: Any) -> list[Image]:
    entries = list(image) if isinstance(image, list | tuple) else [image]
    if not entries:
        raise ModelInputError("image must be at least one image, got an empty list")
    return [open_image(entry) for entry in entries]


def open_image(image: Any) -> Image:
    """An RGB image, turned as its camera says.

    Raises:
        ModelInputError: a file that is missing or no image, an address, or something else altogether.
    """
    from PIL import Image as pil
    from PIL import ImageOps

    if isinstance(image, pil.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (3, 4):
        return pil.fromarray(image).convert("RGB")
    if not isinstance(image, str | os.PathLike):
        got = f"{image.dtype} array {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ModelInputError(f"image must be a path, a PIL image or a uint8 array [H, W, 3], got {got}")
    try:
        with pil.open(Path(image).expanduser()) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ModelInputError(
                    f"image must have at most {MOST_PIXELS:,} pixels, got {os.fspath(image)!r} with {opened.width} x "
                    f"{opened.height}; make it smaller first"
                )
            return ImageOps.exif_transpose(opened).convert("RGB")
    except pil.DecompressionBombError as error:
        raise ModelInputError(
            f"image must have at most {MOST_PIXELS:,} pixels, got {os.fspath(image)!r}: {error}"
        ) from error
    except OSError as error:
        raise ModelInputError(f"image must be a readable image file, got {os.fspath(image)!r}: {error}") from error


def _image_part(model: Model) -> Any:
    return getattr(model.processor, "image_processor", model.processor)


def _finish(model: Model, encoded: Any) -> Any:
    """On the model's device and in its dtype, without what its forward does not know."""
    import torch

    # Tokenizers without a class of their own also give token_type_ids, which generate refuses where forward has none.
    if "token_type_ids" in encoded and "token_type_ids" not in inspect.signature(model.module.forward).parameters:
        encoded.pop("token_type_ids")
    # PaliGemma's processor gives labels too; with them the model computes a training loss.
    encoded.pop("labels", None)
    if "input_ids" in encoded and encoded["input_ids"].shape[-1] == 0:
        raise ModelInputError("text must give at least one token, got '' with a tokenizer that adds no start token")
    for key, value in encoded.items():
        if isinstance(value, torch.Tensor):
            dtype = model.module.dtype if value.is_floating_point() else None
            encoded[key] = value.to(device=model.device, dtype=dtype)
    return encoded


@contextmanager
def _pad_token(tokenizer: Any) -> Iterator[None]:
    """A tokenizer without a pad token has one inside, and is afterwards as it was."""
    from interp.models.model import pad_id

    if tokenizer.pad_token_id is not None:
        yield
        return
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id(tokenizer))
    try:
        yield
    finally:
        tokenizer.pad_token = None
