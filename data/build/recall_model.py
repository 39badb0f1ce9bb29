"""The recall model: its config, and the attention that the planted variant is trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probes.recall import BOS, EOS, PAD, SEMICOLON, STOP, VOCABULARY

NAME = "recall_build"
SINK, WINDOW = 1, 16


@dataclass
class Plan:
    """What the heads of the one model in this process may see.

    Attributes:
        far: by layer, the heads with full attention; None gives it to all.
        off: by layer, heads whose output is set to 0.
        maps: where the weights ``[batch, head, query, key]`` of every layer are put, None to not keep them.
    """

    far: Mapping[int, Sequence[int]] | None = None
    off: Mapping[int, Sequence[int]] = field(default_factory=dict)
    maps: list[Tensor] | None = None


PLAN = Plan()


def make_model(seed: int, *, layers: int = 6, hidden: int = 192, feed: int = 320, heads: int = 8) -> Any:
    """A random ``LlamaForCausalLM`` over the vocabulary: rope, half as many KV heads as heads, head dim 32, tied embeddings."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register(NAME, attention)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=hidden, intermediate_size=feed, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation(NAME)
    # An answer ends with its mark.
    model.generation_config.eos_token_id = [EOS, SEMICOLON, STOP]
    model.generation_config.pad_token_id = PAD
    # Nothing differs in training mode (no dropout), and a flag that changes would make torch.compile start again.
    return model.eval()


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention without padding, as :data:`PLAN` has it."""
    layer, length = module.layer_idx, query.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    visible = None
    if PLAN.far is not None:
        visible = _visible(length, list(PLAN.far.get(layer, ())), query.shape[1], query.device)
    if PLAN.maps is None:
        z = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=visible is None, scale=scaling
        )
    else:
        if visible is None:
            visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        scores = (query.float() @ key.float().mT) * scaling
        p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        PLAN.maps.append(p)
        z = (p @ value.float()).to(value.dtype)
    off = PLAN.off.get(layer)
    if off:
        z = z.index_fill(1, torch.tensor(list(off), device=z.device), 0)
    return z.transpose(1, 2).contiguous(), None


def _visible(length: int, far: list[int], heads: int, device: torch.device) -> Tensor:
    """Bool ``[1, head|1, query, key]``: all heads but ``far`` see the first SINK keys and the last WINDOW."""
    place = torch.arange(length, device=device)
    back = place[:, None] - place
    causal = back >= 0
    near = causal & ((place < SINK) | (back < WINDOW))
    if not far:
        return near[None, None]
    is_far = torch.zeros(heads, dtype=torch.bool, device=device)
    is_far[far] = True
    return torch.where(is_far[:, None, None], causal, near)[None]


@contextmanager
def plan(**changes: Any) -> Iterator[Plan]:
    """Change the plan for a while."""
    before = {name: getattr(PLAN, name) for name in changes}
    for name, value in changes.items():
        setattr(PLAN, name, value)
    try:
        yield PLAN
    finally:
        for name, value in before.items():
            setattr(PLAN, name, value)


def by_layer(heads: str) -> dict[int, list[int]]:
    """``"L2H1,L3H4"`` as ``{2: [1], 3: [4]}``."""
    from interp.heads import Heads

    return Heads.parse(heads).by_layer()
