"""Decoder-only and encoder-only text models."""

from __future__ import annotations

from typing import Any

from interp.testing.specimen import Draw, Specimen, family, stack

LAYERS = "model.layers.{}.self_attn"

# head_dim is not hidden_size / num_attention_heads: whoever divides gets it wrong.
DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _decoder(draw: Draw, model: Any, config: Any, **changes: Any) -> Specimen:
    settings = {**DECODER, **changes}
    module = model(config(**settings))
    return Specimen(
        name="",
        module=module,
        inputs=draw.text(),
        stacks={"text": stack(LAYERS, settings["num_hidden_layers"], settings["num_attention_heads"])},
        batch=draw.padded_text(),
        generates=True,
    )


@family("llama", "LlamaForCausalLM")
def llama(draw: Draw) -> Specimen:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _decoder(draw, LlamaForCausalLM, LlamaConfig)


@family("mistral", "MistralForCausalLM")
def mistral(draw: Draw) -> Specimen:
    from transformers import MistralConfig, MistralForCausalLM

    return _decoder(draw, MistralForCausalLM, MistralConfig, sliding_window=8)


@family("qwen3", "Qwen3ForCausalLM")
def qwen3(draw: Draw) -> Specimen:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _decoder(draw, Qwen3ForCausalLM, Qwen3Config)


@family("gemma2", "Gemma2ForCausalLM")
def gemma2(draw: Draw) -> Specimen:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    # A cap this low bends most scores: a softcap left out moves every map.
    return _decoder(
        draw,
        Gemma2ForCausalLM,
        Gemma2Config,
        # transformers 5.17 would take SDPA, which drops the softcap there; later releases take eager themselves.
        attn_implementation="eager",
        num_hidden_layers=4,
        sliding_window=8,
        attn_logit_softcapping=3.0,
        query_pre_attn_scalar=10,
    )


@family("gemma3_text", "Gemma3ForCausalLM")
def gemma3_text(draw: Draw) -> Specimen:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layer_types = ["sliding_attention", "full_attention"] * 2
    return _decoder(
        draw,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        num_hidden_layers=4,
        sliding_window=8,
        layer_types=layer_types,
        query_pre_attn_scalar=10,
    )


@family("gpt2", "GPT2LMHeadModel")
def gpt2(draw: Draw) -> Specimen:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96,
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Specimen(
        name="",
        module=GPT2LMHeadModel(config),
        inputs=draw.text(),
        stacks={"text": stack("transformer.h.{}.attn", 3, 4)},
        batch=draw.padded_text(),
        generates=True,
    )


@family("gpt_neox", "GPTNeoXForCausalLM")
def gpt_neox(draw: Draw) -> Specimen:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    changes = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
    module = GPTNeoXForCausalLM(GPTNeoXConfig(**changes))
    return Specimen(
        name="",
        module=module,
        inputs=draw.text(),
        stacks={"text": stack("gpt_neox.layers.{}.attention", 3, 4)},
        batch=draw.padded_text(),
        generates=True,
    )


@family("gpt_oss", "GptOssForCausalLM")
def gpt_oss(draw: Draw) -> Specimen:
    from transformers import GptOssConfig, GptOssForCausalLM

    specimen = _decoder(
        draw,
        GptOssForCausalLM,
        GptOssConfig,
        num_hidden_layers=4,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    specimen.notes = "Default implementation is eager (no sdpa). A learned sink logit takes mass: rows sum to < 1."
    return specimen


@family("deepseek_v3", "DeepseekV3ForCausalLM")
def deepseek_v3(draw: Draw) -> Specimen:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    specimen = _decoder(
        draw,
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        num_key_value_heads=4,
        head_dim=8,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
    )
    specimen.notes = "Latent attention: query and key dim 24, value dim 12."
    return specimen


@family("qwen3_next", "Qwen3NextForCausalLM")
def qwen3_next(draw: Draw) -> Specimen:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    specimen = _decoder(
        draw,
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    specimen.stacks = {"text": stack(LAYERS, 4, 4, without=(0, 2))}
    specimen.notes = "Layers 0 and 2 are linear attention: outputs.attentions has two entries for four layers."
    return specimen


@family("lfm2", "Lfm2ForCausalLM")
def lfm2(draw: Draw) -> Specimen:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    specimen = _decoder(
        draw,
        Lfm2ForCausalLM,
        Lfm2Config,
        num_hidden_layers=4,
        layer_types=["conv", "full_attention"] * 2,
        block_multiple_of=16,
    )
    specimen.stacks = {"text": stack(LAYERS, 4, 4, without=(0, 2))}
    specimen.notes = "Layers 0 and 2 are short convolutions: outputs.attentions has two entries for four layers."
    return specimen


@family("bert", "BertModel")
def bert(draw: Draw) -> Specimen:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return Specimen(
        name="",
        module=BertModel(config),
        inputs=draw.text(),
        stacks={"text": stack("encoder.layer.{}.attention.self", 3, 4)},
        batch=draw.padded_text(side="right"),
    )
