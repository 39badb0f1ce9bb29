"""Vision-language models whose images have a fixed number of positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.testing.specimen import Draw, Specimen, family, stack
from interp.testing.text import DECODER

# Ids 3 to 9 are special: the image token, and what marks its beginning and end.
IMAGE, IMAGE_START, IMAGE_END, VIDEO = 5, 6, 7, 8

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {**DECODER, "num_hidden_layers": 2}
LANGUAGE = "model.language_model.layers.{}.self_attn"


def prompt(draw: Draw, *images: int, before: int = 4, after: int = 12) -> dict[str, Tensor]:
    """A text prompt with runs of image tokens of the given lengths, text around each."""
    parts = [torch.tensor([[1]]), draw.ids(1, before)]
    for length in images:
        parts += [torch.tensor([[IMAGE_START]]), torch.full((1, length), IMAGE), torch.tensor([[IMAGE_END]])]
        parts += [draw.ids(1, 3)]
    ids = torch.cat([*parts, draw.ids(1, after)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def left_padded(*prompts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prompts of different length as one left padded batch."""
    length = max(p["input_ids"].shape[1] for p in prompts)

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (length - x.shape[1], 0))

    return {key: torch.cat([pad(p[key]) for p in prompts]) for key in ("input_ids", "attention_mask")}


def two_prompts(draw: Draw, *images: int) -> dict[str, Tensor]:
    """A left padded batch of two prompts, the second shorter."""
    return left_padded(prompt(draw, *images), prompt(draw, *images, before=2, after=8))


def text_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A tiny language model's config, as a dict."""
    return {"model_type": model_type, **TEXT, **changes}


def towers(vision_sites: str, vision_maps: str | None, n_vision: int = 3, n_text: int = 2) -> dict[str, Any]:
    """The two stacks of a vision-language model. The model's own output holds the text maps only."""
    return {
        "text": stack(LANGUAGE, n_text, 4),
        "vision": stack(vision_sites, n_vision, 4, (vision_maps, "attentions") if vision_maps else None),
    }


@family("llava", "LlavaForConditionalGeneration")
def llava(draw: Draw) -> Specimen:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config=text_config(),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    return Specimen(
        name="",
        module=LlavaForConditionalGeneration(config),
        inputs={**prompt(draw, 16), "pixel_values": draw.floats(1, 3, 32, 32)},
        stacks=towers("model.vision_tower.encoder.layers.{}.self_attn", "model.vision_tower"),
        batch={**two_prompts(draw, 16), "pixel_values": draw.floats(2, 3, 32, 32)},
        generates=True,
        notes="The vision tower's last layer runs, but features are taken before it: its heads do not move the logits.",
    )


@family("llava_onevision", "LlavaOnevisionForConditionalGeneration")
def llava_onevision(draw: Draw) -> Specimen:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config=text_config("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    # A 32 x 64 image is the whole picture and two tiles of 4 x 4 patches: 16 base positions, then 4 rows of 8 with a
    # newline each.
    image = {"pixel_values": draw.floats(1, 3, 3, 32, 32), "image_sizes": torch.tensor([[32, 64]])}
    return Specimen(
        name="",
        module=LlavaOnevisionForConditionalGeneration(config),
        inputs={**prompt(draw, 52), **image},
        stacks=towers("model.vision_tower.encoder.layers.{}.self_attn", "model.vision_tower"),
        batch={
            **two_prompts(draw, 52),
            "pixel_values": draw.floats(2, 3, 3, 32, 32),
            "image_sizes": torch.tensor([[32, 64], [32, 64]]),
        },
        generates=True,
        notes="One image is three tiles: the vision tower runs with batch 3 for one sample.",
    )


@family("paligemma", "PaliGemmaForConditionalGeneration")
def paligemma(draw: Draw) -> Specimen:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False, "projection_dim": 48},
        text_config=text_config("gemma", num_image_tokens=16),
        image_token_index=IMAGE,
        projection_dim=48,
        hidden_size=48,
        vocab_size=96,
    )

    def with_types(inputs: dict[str, Tensor], n_images: int) -> dict[str, Tensor]:
        # As the processor does: type 0 is the prompt, 1 an answer to learn.
        types = torch.zeros_like(inputs["input_ids"])
        return {**inputs, "token_type_ids": types, "pixel_values": draw.floats(n_images, 3, 32, 32)}

    return Specimen(
        name="",
        module=PaliGemmaForConditionalGeneration(config),
        inputs=with_types(prompt(draw, 16), 1),
        stacks=towers("model.vision_tower.encoder.layers.{}.self_attn", "model.vision_tower"),
        batch=with_types(two_prompts(draw, 16), 2),
        generates=True,
        notes=(
            "The mask handed on must have .ndim (a tensor). The prompt attends both ways (token_type_ids 0); without "
            "token_type_ids sdpa attends both ways and eager causally (5.23): the modules say is_causal = False."
        ),
    )


@family("gemma3", "Gemma3ForConditionalGeneration")
def gemma3(draw: Draw) -> Specimen:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = text_config(
        "gemma3_text",
        num_hidden_layers=4,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=10,
    )
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    )

    def with_types(inputs: dict[str, Tensor], n_images: int) -> dict[str, Tensor]:
        types = (inputs["input_ids"] == IMAGE).long()
        return {**inputs, "token_type_ids": types, "pixel_values": draw.floats(n_images, 3, 32, 32)}

    return Specimen(
        name="",
        module=Gemma3ForConditionalGeneration(config),
        inputs=with_types(prompt(draw, 4, 4), 2),
        stacks=towers("model.vision_tower.encoder.layers.{}.self_attn", "model.vision_tower", n_text=4),
        batch=with_types(two_prompts(draw, 4), 2),
        generates=True,
        notes="Two images; the positions of one image see each other both ways.",
    )
