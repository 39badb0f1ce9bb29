"""Vision-language models whose images vary in size: packed patches (Qwen) or tiles with patch masks (Idefics 3)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from interp.testing.multimodal import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    VIDEO,
    VISION,
    left_padded,
    prompt,
    text_config,
    towers,
    two_prompts,
)
from interp.testing.specimen import Draw, Specimen, family, stack

PACKED: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 48,
}


def _packed(draw: Draw, model: Any, config: Any, notes: str) -> Specimen:
    module = model(config)

    def inputs(texts: dict[str, Tensor], *grids: tuple[int, int, int]) -> dict[str, Tensor]:
        # One row for each patch, of 3 channels x 2 frames x 4 x 4 pixels.
        n_patches = sum(t * h * w for t, h, w in grids)
        packed = {
            **texts,
            "pixel_values": draw.floats(n_patches, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor(grids),
        }
        if "mm_token_type_ids" in inspect.signature(module.forward).parameters:
            packed["mm_token_type_ids"] = (texts["input_ids"] == IMAGE).long()
        return packed

    first, second = (1, 6, 8), (1, 4, 6)
    return Specimen(
        name="",
        module=module,
        inputs=inputs(prompt(draw, 12, 6), first, second),
        stacks={
            "text": stack("model.language_model.layers.{}.self_attn", 2, 4),
            "vision": stack("model.visual.blocks.{}.attn", 4, 4, None),
        },
        batch=inputs(left_padded(prompt(draw, 12), prompt(draw, 6, before=2)), first, second),
        generates=True,
        notes=notes,
    )


@family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")
def qwen2_5_vl(draw: Draw) -> Specimen:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = text_config("qwen2_5_vl_text", rope_parameters=_mrope([2, 2, 2]))
    text.pop("head_dim")
    config = Qwen2_5_VLConfig(
        text_config=text,
        # A window is 16 pixels = 4 x 4 patches; the odd grid leaves smaller windows at the edges.
        vision_config={**PACKED, "window_size": 16, "fullatt_block_indexes": [1, 3]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )
    notes = (
        "Two images. The vision tower makes one call a window (layers 0 and 2) or an image (1 and 3), on permuted "
        "patches, with no mask. Eager returns no vision maps."
    )
    return _packed(draw, Qwen2_5_VLForConditionalGeneration, config, notes)


@family("qwen3_vl", "Qwen3VLForConditionalGeneration")
def qwen3_vl(draw: Draw) -> Specimen:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config=text_config("qwen3_vl_text", rope_parameters={**_mrope([4, 2, 2]), "mrope_interleaved": True}),
        vision_config={**PACKED, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )
    notes = "Two images: one vision call an image, with no mask. Eager returns no vision maps."
    return _packed(draw, Qwen3VLForConditionalGeneration, config, notes)


def _mrope(sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}


def _tiled(draw: Draw, model: Any, config: Any) -> Specimen:
    # Two tiles of 6 x 6 patches, the second with padding: its last two patch columns are not there. 2 x 2 patches
    # become one position.
    seen = torch.ones(1, 2, 48, 48, dtype=torch.long)
    seen[:, 1, :, 32:] = 0
    return Specimen(
        name="",
        module=model(config),
        inputs={
            **prompt(draw, 9, 9),
            "pixel_values": draw.floats(1, 2, 3, 48, 48),
            "pixel_attention_mask": seen,
        },
        stacks={
            "text": stack("model.text_model.layers.{}.self_attn", 2, 4),
            "vision": towers("model.vision_model.encoder.layers.{}.self_attn", "model.vision_model")["vision"],
        },
        batch={
            **two_prompts(draw, 9, 9),
            "pixel_values": draw.floats(2, 2, 3, 48, 48),
            "pixel_attention_mask": seen.expand(2, -1, -1, -1).contiguous(),
        },
        generates=True,
        notes="Two tiles a sample; padded patches of the second are masked in the vision tower.",
    )


def _tiled_vision() -> dict[str, Any]:
    return {**VISION, "image_size": 48}


@family("idefics3", "Idefics3ForConditionalGeneration")
def idefics3(draw: Draw) -> Specimen:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    config = Idefics3Config(
        vision_config=_tiled_vision(), text_config=text_config(), image_token_id=IMAGE, scale_factor=2
    )
    return _tiled(draw, Idefics3ForConditionalGeneration, config)


@family("smolvlm", "SmolVLMForConditionalGeneration")
def smolvlm(draw: Draw) -> Specimen:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        vision_config=_tiled_vision(), text_config=text_config(), image_token_id=IMAGE, scale_factor=2
    )
    return _tiled(draw, SmolVLMForConditionalGeneration, config)
