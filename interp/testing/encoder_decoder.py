"""Encoder-decoder models: three stacks, with cross attention."""

from __future__ import annotations

from typing import Any

import torch

from interp.testing.specimen import Draw, Specimen, family, stack

# Layer counts differ, so that encoder and decoder cannot be mixed up. The encoder is the deeper one: T5 sizes the
# decoder's cache by the number of encoder layers (transformers 5.23).
N_ENCODER, N_DECODER = 3, 2


def _texts(draw: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """Encoder inputs with the decoder's, of different length; and a batch padded on the right in the encoder."""
    inputs, batch = draw.text(24), draw.padded_text(24, side="right")
    return {**inputs, "decoder_input_ids": draw.ids(1, 20)}, {**batch, "decoder_input_ids": draw.ids(2, 20)}


@family("bart", "BartForConditionalGeneration")
def bart(draw: Draw) -> Specimen:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=96,
        d_model=48,
        encoder_layers=N_ENCODER,
        decoder_layers=N_DECODER,
        encoder_attention_heads=4,
        decoder_attention_heads=6,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    inputs, batch = _texts(draw)
    return Specimen(
        name="",
        module=BartForConditionalGeneration(config),
        inputs=inputs,
        batch=batch,
        stacks={
            "encoder": stack("model.encoder.layers.{}.self_attn", N_ENCODER, 4, ("", "encoder_attentions")),
            "text": stack("model.decoder.layers.{}.self_attn", N_DECODER, 6, ("", "decoder_attentions")),
            "cross": stack("model.decoder.layers.{}.encoder_attn", N_DECODER, 6, ("", "cross_attentions")),
        },
        generates=True,
    )


@family("t5", "T5ForConditionalGeneration", gain=1.0)
def t5(draw: Draw) -> Specimen:
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {"decoder_start_token_id": 0}
    config = T5Config(
        vocab_size=96,
        d_model=48,
        d_kv=8,
        d_ff=64,
        num_layers=N_ENCODER,
        num_decoder_layers=N_DECODER,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        pad_token_id=0,
        eos_token_id=2,
        **settings,
    )
    inputs, batch = _texts(draw)
    return Specimen(
        name="",
        module=T5ForConditionalGeneration(config),
        inputs=inputs,
        batch=batch,
        stacks={
            "encoder": stack("encoder.block.{}.layer.0.SelfAttention", N_ENCODER, 4, ("", "encoder_attentions")),
            "text": stack("decoder.block.{}.layer.0.SelfAttention", N_DECODER, 4, ("", "decoder_attentions")),
            "cross": stack("decoder.block.{}.layer.1.EncDecAttention", N_DECODER, 4, ("", "cross_attentions")),
        },
        generates=True,
        notes="Scores are not scaled by 1/sqrt(dim); the position bias of layer 0 serves every layer.",
    )


@family("whisper", "WhisperForConditionalGeneration")
def whisper(draw: Draw) -> Specimen:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=96,
        num_mel_bins=8,
        d_model=48,
        encoder_layers=N_ENCODER,
        decoder_layers=N_DECODER,
        encoder_attention_heads=4,
        decoder_attention_heads=6,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=32,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    # The convolution in front of the encoder halves the 64 frames: 32 positions.
    return Specimen(
        name="",
        module=WhisperForConditionalGeneration(config),
        inputs={"input_features": draw.floats(1, 8, 64), "decoder_input_ids": draw.ids(1, 20)},
        stacks={
            "audio": stack("model.encoder.layers.{}.self_attn", N_ENCODER, 4, ("", "encoder_attentions")),
            "text": stack("model.decoder.layers.{}.self_attn", N_DECODER, 6, ("", "decoder_attentions")),
            "cross": stack("model.decoder.layers.{}.encoder_attn", N_DECODER, 6, ("", "cross_attentions")),
        },
        batch={
            "input_features": draw.floats(2, 8, 64),
            "decoder_input_ids": draw.ids(2, 20),
            "attention_mask": torch.ones(2, 64, dtype=torch.long),
        },
        generates=True,
        notes="The query is scaled before the interface: scaling=1.0.",
    )
