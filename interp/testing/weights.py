"""Random weights under which attention is far from uniform, so that a wrong map or edit shows."""

from __future__ import annotations

import re

import torch
from torch import nn

_QUERY_KEY = re.compile(r"(^|[._])(q|k|qkv|query|key|query_key_value|c_attn|q_[ab]|kv_[ab]|Wqkv|in)(_?proj\w*)?$")
_QUERY_KEY_NORM = re.compile(r"(q|k|query|key)_?(layer)?norm$")


def randomise(module: nn.Module, *, seed: int, gain: float) -> None:
    """Draw the weights of ``module`` anew, in place.

    Linear layers get normal weights of variance ``1 / fan_in`` (``gain**2 / fan_in`` for query and key projections):
    with the library's 0.02 every softmax of a tiny model is uniform and every test passes. Norm weights move off 1 and
    biases and position embeddings off 0, since a bias nobody sees is a bias nobody tests. Parameters of recurrences
    (decays, short convolutions) stay as the library made them.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(parameter: torch.Tensor, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    done: set[int] = set()
    with torch.no_grad():
        for path, part in module.named_modules():
            for name, parameter in part.named_parameters(recurse=False):
                if id(parameter) in done or parameter.ndim == 0 or not parameter.is_floating_point():
                    continue
                done.add(id(parameter))
                if isinstance(part, nn.Embedding):
                    normal(parameter, 1.0)
                elif isinstance(part, nn.Conv1d) or name in ("A_log", "dt_bias", "D"):
                    continue
                elif name.endswith("bias"):
                    normal(parameter, 0.1)
                elif parameter.ndim == 1:
                    boost = gain - 1 if _QUERY_KEY_NORM.search(path) else 0.0
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1 + boost)
                elif not parameter.any():
                    normal(parameter, 0.5)
                else:
                    transposed = type(part).__name__ == "Conv1D"
                    fan_in = parameter.shape[0] if transposed else parameter[0].numel()
                    if parameter.ndim == 3:  # the fused experts of a mixture: [expert, in, out]
                        fan_in = parameter.shape[1]
                    normal(parameter, (gain if _QUERY_KEY.search(path) else 1.0) * fan_in**-0.5)
