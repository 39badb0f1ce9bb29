"""Vision transformers and image-text towers."""

from __future__ import annotations

from typing import Any

from interp.testing.specimen import Draw, Specimen, family, stack

# 6 x 4 patches of 8 pixels: a grid that is not square shows rows and columns swapped. Where a config takes one side
# only the grid is 5 x 5.
RECTANGLE: dict[str, Any] = {"image_size": (48, 32), "patch_size": 8}
SQUARE: dict[str, Any] = {"image_size": 40, "patch_size": 8}

DINOV2_SITES = ("encoder.layer.{}.attention.attention", "encoder.layer.{}.attention")

ENCODER: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def _first(module: Any, *patterns: str) -> str:
    """The first pattern that names modules here: transformers 5.23 has other paths than 5.17."""
    names = {name for name, _ in module.named_modules()}
    return next(pattern for pattern in patterns if pattern.format(0) in names)


def _vision(module: Any, draw: Draw, sites: str, height: int, width: int, **more: Any) -> Specimen:
    return Specimen(
        name="",
        module=module,
        inputs={"pixel_values": draw.floats(1, 3, height, width)},
        stacks={"vision": stack(sites, ENCODER["num_hidden_layers"], ENCODER["num_attention_heads"])},
        batch={"pixel_values": draw.floats(2, 3, height, width)},
        **more,
    )


@family("vit", "ViTModel")
def vit(draw: Draw) -> Specimen:
    from transformers import ViTConfig, ViTModel

    return _vision(ViTModel(ViTConfig(**ENCODER, **RECTANGLE)), draw, "layers.{}.attention", 48, 32)


@family("deit", "DeiTModel")
def deit(draw: Draw) -> Specimen:
    from transformers import DeiTConfig, DeiTModel

    specimen = _vision(DeiTModel(DeiTConfig(**ENCODER, **RECTANGLE)), draw, "layers.{}.attention", 48, 32)
    specimen.notes = "Two special tokens lead: CLS and distillation."
    return specimen


@family("dinov2", "Dinov2Model")
def dinov2(draw: Draw) -> Specimen:
    from transformers import Dinov2Config, Dinov2Model

    module = Dinov2Model(Dinov2Config(**ENCODER, **SQUARE))
    return _vision(module, draw, _first(module, *DINOV2_SITES), 40, 40)


@family("dinov2_registers", "Dinov2WithRegistersModel")
def dinov2_registers(draw: Draw) -> Specimen:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    module = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**ENCODER, **SQUARE, num_register_tokens=3))
    return _vision(module, draw, _first(module, *DINOV2_SITES), 40, 40, notes="CLS and 3 registers lead.")


@family("dinov3", "DINOv3ViTModel")
def dinov3(draw: Draw) -> Specimen:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    module = DINOv3ViTModel(DINOv3ViTConfig(**ENCODER, **SQUARE, num_register_tokens=3))
    sites = _first(module, "model.layer.{}.attention", "layer.{}.attention")
    return _vision(module, draw, sites, 48, 32, notes="CLS and 3 registers lead; rotary, so any image size.")


def _image_text(module: Any, draw: Draw, **more: Any) -> Specimen:
    towers = {
        name: stack(f"{name}_model.encoder.layers.{{}}.self_attn", 3, 4, (f"{name}_model", "attentions"))
        for name in ("text", "vision")
    }
    return Specimen(
        name="",
        module=module,
        inputs={**draw.text(20), "pixel_values": draw.floats(1, 3, 40, 40)},
        stacks=towers,
        batch={**draw.padded_text(20, side="right"), "pixel_values": draw.floats(2, 3, 40, 40)},
        **more,
    )


@family("clip", "CLIPModel")
def clip(draw: Draw) -> Specimen:
    from transformers import CLIPConfig, CLIPModel

    text = {**ENCODER, "vocab_size": 96, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**ENCODER, **SQUARE}, projection_dim=16)
    notes = "The text tower is causal by keyword (is_causal=True) while its modules say is_causal = False."
    return _image_text(CLIPModel(config), draw, notes=notes)


@family("siglip", "SiglipModel")
def siglip(draw: Draw) -> Specimen:
    from transformers import SiglipConfig, SiglipModel

    text = {**ENCODER, "vocab_size": 96, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
    config = SiglipConfig(text_config=text, vision_config={**ENCODER, **SQUARE})
    notes = "The vision pooling head is a torch.nn.MultiheadAttention, outside the interface."
    return _image_text(SiglipModel(config), draw, notes=notes, unreached=("MultiheadAttention",))
