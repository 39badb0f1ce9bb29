"""How the probability of an answer's first token changes when attention is blocked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.models.model import unwrap


@dataclass(frozen=True, eq=False)
class KnockoutEffect:
    """Probabilities of the answer with and without the blocked edges.

    Attributes:
        answer: int64 ``[S]`` token ids.
        p: ``[S, N]`` probability of the answer at the first step, for N knockouts.
        p_blocked: ``[S, N]`` likewise with edges blocked.
        layers: the layer in the middle of each window; empty for a single knockout.
    """

    answer: Tensor
    p: Tensor
    p_blocked: Tensor
    layers: tuple[int, ...]

    @property
    def change(self) -> Tensor:
        """``(p_blocked - p) / p``, ``[S, N]``; -1 is an answer lost altogether."""
        return (self.p_blocked - self.p) / self.p


def answer_probabilities(model: Any, inputs: Mapping[str, Any], answer: Any = None) -> tuple[Tensor, Tensor]:
    """Token ids ``[S]`` and their probabilities ``[S]`` (fp32) after the prompt; the most likely tokens where none are given.

    Raises:
        ValueError: an answer that is no token id, or not one for each sample.
    """
    module = unwrap(model)
    with torch.no_grad():
        logits: Tensor = module(**inputs).logits.float()
    samples, length = logits.shape[:2]
    seq2seq = bool(getattr(module.config, "is_encoder_decoder", False))
    mask = inputs.get("decoder_attention_mask" if seq2seq else "attention_mask")
    last = torch.full((samples,), length - 1, device=logits.device)
    if isinstance(mask, Tensor) and mask.shape == (samples, length):
        last = torch.where(mask.bool(), torch.arange(length, device=mask.device), -1).amax(-1).to(logits.device)
    p = logits[torch.arange(samples, device=logits.device), last].softmax(-1)
    if answer is None:
        ids = p.argmax(-1)
    else:
        ids = torch.as_tensor(answer, device=logits.device)
        ids = ids.expand(samples) if ids.ndim == 0 else ids
        if ids.is_floating_point() or ids.shape != (samples,) or not bool(((ids >= 0) & (ids < p.shape[-1])).all()):
            raise ValueError(
                f"answer must be a token id within 0 .. {p.shape[-1] - 1}, or one for each of {samples} samples, got {answer!r}"
            )
    return ids, p.gather(-1, ids[:, None])[:, 0]
