"""One run of a model that shows which sites are called, with what shapes, and what their output projection receives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from interp.models.anatomy import Site

NAME = "headscope_dry_run"


class _Seen:
    """What one site did."""

    def __init__(self) -> None:
        self.calls = 0
        self.shape: tuple[int, int, int, int] | None = None
        self.z: list[Tensor] = []
        self.projected: bool | None = None


_running: dict[int, _Seen] = {}


def confirm(module: nn.Module, sites: list[Site], inputs: Mapping[str, Any]) -> list[Site]:
    """Run ``module(**inputs)`` once without gradients; sites with ``seen``, shapes and ``z_is_projected`` filled in.

    The model is as before afterwards, also where the run raises.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    seen = {site.name: _Seen() for site in sites}
    holders: list[Any] = [m for m in module.modules() if hasattr(m, "config")]
    configs: dict[int, Any] = {id(m.config): m.config for m in holders}
    before = [
        (c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation_internal")
    ]
    handles: list[Any] = []
    try:
        for site in sites:
            sub = module.get_submodule(site.name)
            _running[id(sub)] = seen[site.name]
            if site.out_proj is not None:
                hook = _projection_hook(seen[site.name])
                handles.append(getattr(sub, site.out_proj).register_forward_pre_hook(hook))
        for config, _ in before:
            config._attn_implementation_internal = NAME
        with torch.no_grad():
            module(**inputs)
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for handle in handles:
            handle.remove()
        for site in sites:
            _running.pop(id(module.get_submodule(site.name)), None)
    return [_confirmed(site, seen[site.name]) for site in sites]


def _confirmed(site: Site, seen: _Seen) -> Site:
    if seen.shape is None:
        return replace(site, seen=0)
    heads, kv_heads, dim, v_dim = seen.shape
    return replace(
        site,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=dim,
        v_head_dim=v_dim,
        z_is_projected=seen.projected,
        seen=seen.calls,
    )


def _projection_hook(seen: _Seen) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if seen.z and args and isinstance(args[0], Tensor):
            z = torch.cat([part.flatten(2) for part in seen.z], dim=1) if len(seen.z) > 1 else seen.z[0].flatten(2)
            seen.projected = z.numel() == args[0].numel() and torch.equal(z.reshape(-1), args[0].reshape(-1))
        seen.z = []

    return hook


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """Attention good enough to see shapes: softcap, sinks and position bias are left out."""
    seen = _running.get(id(module))
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = (
        attention_mask[..., : key.shape[2]] if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 else None
    )
    z = nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=options.get("scaling"))
    z = z.transpose(1, 2).contiguous()
    if seen is not None:
        seen.calls += 1
        seen.shape = (query.shape[1], key.shape[1], query.shape[-1], value.shape[-1])
        seen.z.append(z)
    return z, None
