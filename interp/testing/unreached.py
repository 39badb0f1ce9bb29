"""Models whose attention transformers' attention interface does not reach, and one with none: for negative tests."""

from __future__ import annotations

from typing import Any

from interp.testing.specimen import Draw, Specimen, family

SIZES: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _unreached(draw: Draw, module: Any, *unreached: str) -> Specimen:
    return Specimen(
        name="",
        module=module,
        inputs=draw.text(),
        stacks={},
        batch=draw.padded_text(),
        generates=True,
        unreached=unreached,
    )


@family("falcon", "FalconForCausalLM", reached=False)
def falcon(draw: Draw) -> Specimen:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(**SIZES, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    return _unreached(draw, FalconForCausalLM(config), "FalconAttention")


@family("bloom", "BloomForCausalLM", reached=False)
def bloom(draw: Draw) -> Specimen:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(**SIZES, hidden_size=48, n_layer=2, n_head=4)
    return _unreached(draw, BloomForCausalLM(config), "BloomAttention")


@family("gptj", "GPTJForCausalLM", reached=False)
def gptj(draw: Draw) -> Specimen:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(**SIZES, n_embd=48, n_layer=2, n_head=4, rotary_dim=8, n_positions=64)
    return _unreached(draw, GPTJForCausalLM(config), "GPTJAttention")


@family("mamba", "MambaForCausalLM", reached=False)
def mamba(draw: Draw) -> Specimen:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(**SIZES, hidden_size=48, num_hidden_layers=2, state_size=8, time_step_rank=4)
    specimen = _unreached(draw, MambaForCausalLM(config))
    specimen.notes = "No attention at all."
    return specimen


@family("swinv2", "Swinv2Model", reached=False)
def swinv2(draw: Draw) -> Specimen:
    from transformers import Swinv2Config, Swinv2Model

    config = Swinv2Config(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    return Specimen(
        name="",
        module=Swinv2Model(config),
        inputs={"pixel_values": draw.floats(1, 3, 32, 32)},
        stacks={},
        unreached=("Swinv2SelfAttention",),
    )
