"""The bundled LLaVA, and a tiny one with random weights whose texts never end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interp


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scenes_model() -> Any:
    return interp.load("scenes-lvlm", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny() -> Any:
    """A LLaVA of 5 text layers, eager enough to be re-stated: greedy texts of its own."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from interp.testing.multimodal import IMAGE, VISION, text_config
    from interp.testing.weights import randomise

    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config=text_config(num_hidden_layers=5, num_attention_heads=4),
        image_token_index=IMAGE, image_seq_length=16, vision_feature_layer=-2,
    )  # fmt: skip
    module = LlavaForConditionalGeneration(config).eval()
    randomise(module, seed=3, gain=1.4)
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    return interp.load(module)


@pytest.fixture
def tiny_inputs() -> Any:
    from interp.testing.multimodal import prompt
    from interp.testing.specimen import Draw

    def make(seed: int = 0) -> dict[str, torch.Tensor]:
        draw = Draw(torch.Generator().manual_seed(seed))
        return {**prompt(draw, 16, before=4, after=12), "pixel_values": draw.floats(1, 3, 32, 32)}

    return make
