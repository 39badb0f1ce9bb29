"""The weights of some heads: found by the names that families give them, cut out or set to zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interp.exports.prune_plan import PruneError
from interp.models.anatomy import Site

QUERY = ("q_proj", "query", "q", "q_b_proj")
KEY_VALUE = ("k_proj", "v_proj", "key", "value", "k", "v", "kv_b_proj")
PER_HEAD = ("sinks",)
SHARED = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")


def cut_weights(
    module: Any, state: Mapping[str, Tensor], sites: Mapping[str, Site], gone: Mapping[str, frozenset[int]]
) -> dict[str, Tensor]:
    """The weights without those of the heads that go."""
    out = dict(state)
    for name, heads in gone.items():
        site = sites[name]
        size = site.n_heads // site.n_kv_heads
        stay = [h for h in range(site.n_heads) if h not in heads]
        groups = sorted({h // size for h in stay})
        attention = module.get_submodule(name)
        for local, parameter in attention.named_parameters():
            key, part = f"{name}.{local}", local.split(".")[0]
            if part in QUERY:
                out[key] = _blocks(out[key], 0, site.n_heads, stay)
            elif part in KEY_VALUE:
                out[key] = _blocks(out[key], 0, site.n_kv_heads, groups)
            elif part == "qkv_proj":
                out[key] = _fused(out[key], site, stay, groups, key)
            elif part in PER_HEAD:
                out[key] = out[key][stay]
            elif part == site.out_proj:
                if local.endswith("weight"):
                    axis = 1 if isinstance(getattr(attention, part), nn.Linear) else 0
                    out[key] = _blocks(out[key], axis, site.n_heads, stay)
            elif part not in SHARED and _of_all_heads(parameter, site):
                raise PruneError(
                    f"{type(module).__name__} must keep each head's weights apart, and {key} {tuple(parameter.shape)} is one of all heads"
                )
    return out


def _of_all_heads(parameter: Tensor, site: Site) -> bool:
    """A weight that mixes heads, such as a norm over all of them; one of a single head's size is applied to each."""
    sizes = (site.n_heads * site.v_head_dim, site.n_heads * site.head_dim, site.n_kv_heads * site.head_dim)
    return parameter.ndim > 1 or (parameter.numel() in sizes and parameter.numel() != site.head_dim)


def _blocks(tensor: Tensor, axis: int, count: int, stay: list[int]) -> Tensor:
    """Blocks of equal size along an axis, those that stay."""
    parts = tensor.chunk(count, axis)
    return torch.cat([parts[n] for n in stay], axis)


def _fused(tensor: Tensor, site: Site, stay: list[int], groups: list[int], key: str) -> Tensor:
    """Queries, then keys, then values (Phi-3)."""
    sizes = [site.n_heads * site.head_dim, site.n_kv_heads * site.head_dim, site.n_kv_heads * site.v_head_dim]
    if tensor.shape[0] != sum(sizes):
        raise PruneError(
            f"{key} must be queries, keys and values one after the other, {sum(sizes)} rows, got {tensor.shape[0]}"
        )
    q, k, v = tensor.split(sizes)
    return torch.cat([_blocks(q, 0, site.n_heads, stay), *(_blocks(t, 0, site.n_kv_heads, groups) for t in (k, v))])


def zero(state: dict[str, Tensor], module: Any, site: Site, head: int) -> None:
    """Make a head write nothing."""
    attention = module.get_submodule(site.name)
    if site.out_proj is not None:
        axis = 1 if isinstance(getattr(attention, site.out_proj), nn.Linear) else 0
        state[f"{site.name}.{site.out_proj}.weight"].chunk(site.n_heads, axis)[head].zero_()
        return
    rows = [f"{site.name}.{n}" for n, _ in attention.named_parameters() if n.split(".")[0] in ("value", "v_proj", "v")]
    if not rows or site.n_kv_heads != site.n_heads:
        raise PruneError(
            f"{site.name} must have an output or a value projection of its own to zero a head, and has neither"
        )
    for key in rows:
        state[key].chunk(site.n_heads)[head].zero_()


def inputs_of(projection: nn.Module) -> int:
    weight: Any = projection.weight
    return int(weight.shape[1] if isinstance(projection, nn.Linear) else weight.shape[0])
