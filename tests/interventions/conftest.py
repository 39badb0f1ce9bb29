"""A deeper tiny LLaVA than the one of interp.testing, its prompts, and generation with scores."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def deep_llava():
    """A function that builds a LLaVA with so many text layers (heads are 4 over 2 key-value heads, width 48)."""

    def make(layers=5, seed=0, heads=4):
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        from interp.testing.multimodal import IMAGE, VISION, text_config
        from interp.testing.weights import randomise

        config = LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
            text_config=text_config(num_hidden_layers=layers, num_attention_heads=heads),
            image_token_index=IMAGE, image_seq_length=16, vision_feature_layer=-2,
        )  # fmt: skip
        module = LlavaForConditionalGeneration(config).eval()
        randomise(module, seed=seed, gain=1.4)
        module.generation_config.eos_token_id = None
        module.generation_config.pad_token_id = 0
        return module

    return make


@pytest.fixture
def llava_inputs():
    """A function that makes inputs of one sample: a prompt with so many images of 16 tokens."""

    def make(seed=0, images=1, before=4, after=12):
        from interp.testing.multimodal import prompt
        from interp.testing.specimen import Draw

        draw = Draw(torch.Generator().manual_seed(seed))
        return {
            **prompt(draw, *[16] * images, before=before, after=after),
            "pixel_values": draw.floats(images, 3, 32, 32),
        }

    return make


@pytest.fixture
def batched():
    """A function that puts samples of one sample each into a left-padded batch."""

    def make(*samples):
        from interp.testing.multimodal import left_padded

        return {**left_padded(*samples), "pixel_values": torch.cat([s["pixel_values"] for s in samples])}

    return make


@pytest.fixture
def run():
    """A function that generates inside a session with interventions; gives ``(ids, scores [step, row, token], session)``."""

    def generate(module, inputs, interventions=(), tokens=5, **options):
        import interp

        options = {"do_sample": False, "max_new_tokens": tokens, "output_logits": True, **options}
        with torch.no_grad(), interp.hooked(module, interventions=list(interventions)) as session:
            out = module.generate(**inputs, **options, return_dict_in_generate=True)
        return out.sequences, torch.stack(out.logits), session

    return generate
