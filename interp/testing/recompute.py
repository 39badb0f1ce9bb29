"""An independent recomputation of every attention map of a model: the oracle our own op is compared with.

It shares no code with ``interp.attention`` and takes nothing but what transformers hands to an attention function.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp.models import base_edit
from interp.testing.specimen import configs

ORACLE = "headscope_testing_oracle"


@dataclass
class Recomputation:
    """What every attention module did in one forward.

    Attributes:
        maps: ``{module path: [map of each call]}``; a map is ``[batch, head, query, key]`` in fp64. Packed vision
            towers make one call for each window or image.
        z: ``{module path: [output of each call]}``, ``[batch, query, head, dim]`` in fp64, before ``o_proj``.
        result: what the model returned.
    """

    maps: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    z: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    result: Any = None


_running: dict[int, tuple[str, Recomputation]] = {}
_planted: dict[int, Tensor] = {}


def recompute(module: nn.Module, inputs: Mapping[str, Any]) -> Recomputation:
    """Run ``module(**inputs)`` with every attention recomputed eagerly in fp64; leaves the model as it was.

    Modules that do not go through transformers' attention interface run as they are and are absent from the answer. The base
    edit of a planted model is kept to.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ORACLE, _oracle)
    AttentionMaskInterface.register(ORACLE, eager_mask)
    answer = Recomputation()
    before = [(config, config._attn_implementation_internal) for config in configs(module)]
    entries = {id(m): (path, answer) for path, m in module.named_modules()}
    allowed = {id(module.get_submodule(path)): seen for path, seen in base_edit.visible_maps(module, inputs).items()}
    _running.update(entries)
    _planted.update(allowed)
    base_edit.HOLDS.add(ORACLE)
    try:
        for config, _ in before:
            config._attn_implementation_internal = ORACLE
        with torch.no_grad():
            answer.result = module(**inputs)
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        base_edit.HOLDS.discard(ORACLE)
        for key in entries:
            _running.pop(key, None)
            _planted.pop(key, None)
    answer.maps, answer.z = dict(answer.maps), dict(answer.z)
    return answer


def independent_maps(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """The maps of :func:`recompute`: ``{module path: [map [batch, head, query, key] of each call]}``, fp64."""
    return recompute(module, inputs).maps


def _oracle(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    n_rep = query.shape[1] // key.shape[1]
    q = query.double()
    k = key.double().repeat_interleave(n_rep, dim=1)
    v = value.double().repeat_interleave(n_rep, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = q @ k.transpose(-1, -2) * scale
    softcap = kwargs.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias = kwargs.get("position_bias")
    if bias is not None:
        scores = scores + bias.double()
    scores = _masked(scores, attention_mask, getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if id(module) in _planted:
        scores = scores.masked_fill(~_planted[id(module)], float("-inf"))
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        column = sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    p = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    if sinks is not None:
        p = p[..., :-1]
    z = (p @ v).transpose(1, 2).contiguous()
    if id(module) in _running:
        path, answer = _running[id(module)]
        answer.maps[path].append(p)
        answer.z[path].append(z)
    return z.to(query.dtype), p.to(query.dtype)


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    n_queries, n_keys = scores.shape[-2:]
    if mask is None:
        if is_causal and n_queries > 1:
            # Upper-left alignment, as PyTorch's is_causal.
            keep = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~keep, float("-inf"))
        return scores
    mask = mask[..., :n_keys]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    # A finite bias is added; an entry of half the dtype's minimum or below means masked.
    masked = mask <= torch.finfo(mask.dtype).min / 2
    return (scores + mask.double().masked_fill(masked, 0.0)).masked_fill(masked, float("-inf"))
