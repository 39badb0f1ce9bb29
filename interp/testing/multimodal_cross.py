"""InternVL, and vision-language models with cross attention: BLIP-2's Q-Former and Mllama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.testing.multimodal import IMAGE, VISION, left_padded, prompt, text_config, towers, two_prompts
from interp.testing.specimen import SITES, Draw, Specimen, family, stack


@family("internvl", "InternVLForConditionalGeneration")
def internvl(draw: Draw) -> Specimen:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8], "use_qk_norm": True, "norm_type": "rms_norm"}
    config = InternVLConfig(
        vision_config=vision, text_config=text_config("qwen2"), image_token_id=IMAGE, image_seq_length=4
    )
    # Two tiles of 4 x 4 patches, 2 x 2 patches to a position: 8 positions.
    return Specimen(
        name="",
        module=InternVLForConditionalGeneration(config),
        inputs={**prompt(draw, 8), "pixel_values": draw.floats(2, 3, 32, 32)},
        stacks=towers("model.vision_tower.encoder.layer.{}.attention", "model.vision_tower"),
        batch={**two_prompts(draw, 8), "pixel_values": draw.floats(4, 3, 32, 32)},
        generates=True,
        notes="One image is two tiles: the vision tower runs with batch 2 for one sample.",
    )


@family("blip2", "Blip2ForConditionalGeneration")
def blip2(draw: Draw) -> Specimen:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text = {
        "model_type": "opt",
        "vocab_size": 96,
        "hidden_size": 48,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 48,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    qformer = {
        "vocab_size": 96,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "cross_attention_frequency": 2,
        "encoder_hidden_size": 32,
    }
    config = Blip2Config(
        vision_config=dict(VISION),
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=8,
        image_token_index=IMAGE,
    )
    # Cross attention comes every second layer: layer 1 has none.
    return Specimen(
        name="",
        module=Blip2ForConditionalGeneration(config),
        inputs={**prompt(draw, 8), "pixel_values": draw.floats(1, 3, 32, 32)},
        stacks={
            "text": stack("language_model.model.decoder.layers.{}.self_attn", 2, 4, ("language_model", "attentions")),
            "vision": stack("vision_model.encoder.layers.{}.self_attn", 3, 4, ("vision_model", "attentions")),
            "qformer": stack("qformer.encoder.layer.{}.attention.attention", 3, 2, SITES),
            "qformer_cross": stack(
                "qformer.encoder.layer.{}.crossattention.attention", 3, 2, ("qformer", "cross_attentions"), without=(1,)
            ),
        },
        batch={**two_prompts(draw, 8), "pixel_values": draw.floats(2, 3, 32, 32)},
        generates=True,
        notes=(
            "No attention mask in the vision tower and the Q-Former. The Q-Former's outputs.attentions mixes self and "
            "cross attention (5 maps for 3 layers); the model's own output nests the text maps."
        ),
    )


@family("mllama", "MllamaForConditionalGeneration")
def mllama(draw: Draw) -> Specimen:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96,
    }
    text = text_config(
        "mllama_text_model",
        num_hidden_layers=4,
        cross_attention_layers=[1, 3],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    text.pop("head_dim")
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)

    def inputs(texts: dict[str, Tensor]) -> dict[str, Any]:
        n = texts["input_ids"].shape[0]
        # Tokens before the image see none of it: those rows are fully masked in the cross attention.
        after = (texts["input_ids"] == IMAGE).cumsum(-1).clamp(max=1)
        # The last sample's second tile is padding.
        tiles = torch.ones(n, 1, 2, dtype=torch.long)
        tiles[-1, 0, 1] = 0
        return {
            **texts,
            "pixel_values": draw.floats(n, 1, 2, 3, 16, 16),
            "aspect_ratio_ids": torch.tensor([[2]] * (n - 1) + [[1]]),
            "aspect_ratio_mask": tiles,
            "cross_attention_mask": after[:, :, None, None] * tiles[:, None],
        }

    return Specimen(
        name="",
        module=MllamaForConditionalGeneration(config),
        inputs=inputs(prompt(draw, 1)),
        stacks={
            "text": stack("model.language_model.layers.{}.self_attn", 4, 4, SITES, without=(1, 3)),
            "cross": stack("model.language_model.layers.{}.cross_attn", 4, 4, SITES, without=(0, 2)),
            "vision": stack("model.vision_model.transformer.layers.{}.self_attn", 3, 4, SITES),
            "vision_global": stack("model.vision_model.global_transformer.layers.{}.self_attn", 2, 4, SITES),
        },
        batch=inputs(left_padded(prompt(draw, 1), prompt(draw, 1, before=2, after=8))),
        generates=True,
        notes=(
            "Layers 1 and 3 are cross attention, 0 and 2 self: outputs.attentions mixes both; the vision tower's is "
            "empty. Text before the image sees none of it: the library unmasks those rows wholly and zeroes the "
            "layer's output there."
        ),
    )
