"""Attention in which only some heads see the image, for training: two fused calls instead of a mask for every head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "planted"


class PlantedImage:
    """Only the named heads may attend to the image; every other head does not have its keys.

    Registered with transformers under the name ``planted``; the model must be fed whole sequences that begin with
    ``first`` positions of text, then ``image`` positions (or no image: ``image=0`` for that forward).

    Args:
        heads: ``(layer, head)`` pairs that see the image.
        n_heads: query heads of a layer.
        groups: query heads that share one key/value head.
    """

    def __init__(self, heads: Sequence[tuple[int, int]], n_heads: int, groups: int) -> None:
        self.n_heads, self.groups = n_heads, groups
        self.named: dict[int, list[int]] = {}
        for layer, head in heads:
            self.named.setdefault(layer, []).append(head)
        self.first, self.image = 0, 0

    def register(self) -> str:
        """Make transformers know it."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(NAME, self)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        return NAME

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        key = key.repeat_interleave(self.groups, dim=1)
        value = value.repeat_interleave(self.groups, dim=1)
        if not self.image:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
            return out.transpose(1, 2), None
        named = sorted(self.named.get(module.layer_idx, []))
        blind = [head for head in range(self.n_heads) if head not in named]
        parts = [self._blind(query[:, blind], key[:, blind], value[:, blind], scaling)]
        if named:
            seeing = F.scaled_dot_product_attention(
                query[:, named], key[:, named], value[:, named], is_causal=True, scale=scaling
            )
            parts.append(seeing)
        order = torch.tensor([*blind, *named], device=query.device).argsort()
        return torch.cat(parts, dim=1)[:, order].transpose(1, 2), None

    def _blind(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        a, b = self.first, self.first + self.image

        def text(x: Tensor) -> Tensor:
            return torch.cat((x[:, :, :a], x[:, :, b:]), dim=2)

        rows = F.scaled_dot_product_attention(text(query), text(key), text(value), is_causal=True, scale=scaling)
        image = F.scaled_dot_product_attention(query[:, :, a:b], key[:, :, :a], value[:, :, :a], scale=scaling)
        return torch.cat((rows[:, :, :a], image, rows[:, :, a:]), dim=2)
