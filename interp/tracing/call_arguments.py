"""From the arguments transformers gives an attention function to a :class:`~interp.tracing.calls.SiteCall`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.attention import Mask
from interp.models.anatomy import Site
from interp.tracing.calls import RunState, SiteCall
from interp.tracing.dispatch import entry_implementation
from interp.tracing.masks import LazyMask


def site_call(
    site: Site, run: RunState, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, given: Any,
    options: Mapping[str, Any], chunk: Sequence[int],
) -> SiteCall:  # fmt: skip
    """Read one call's arguments.

    Args:
        given: a :class:`LazyMask`, a dense mask ``[B|1, H|1, Lq|1, >= Lk]`` (bool or additive) or None.
        options: the keyword arguments of the attention function.
        chunk: query rows and keys that earlier calls of the same module forward took (Qwen-VL's vision tower calls its
            attention once per window or image).
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    decoder = decodes(site)
    start = run.past_length if decoder else chunk[0]
    bias: Tensor | None = options.get("position_bias")
    lazy = isinstance(given, LazyMask)
    if lazy and given.n_keys != n_keys:
        given, lazy = given.dense(), False
    if lazy:
        mask = given.describe()
        mask = replace(mask, cross=True, causal=False, window=None, q_offset=start) if site.cross else mask
    elif isinstance(given, Tensor):
        if given.ndim != 4:
            raise ValueError(
                f"attention mask at {site.name} must be [batch, head, query, key], got shape {tuple(given.shape)}"
            )
        visible, extra = _dense(given[..., :n_keys].to(query.device), n_queries)
        bias = extra if bias is None else bias if extra is None else bias + extra
        mask = Mask(dense=visible, q_offset=start, kv_offset=0 if decoder else chunk[1], cross=site.cross)
    else:
        causal = not site.cross and n_queries > 1 and _is_causal(module, options)
        mask = _plain_mask(causal=causal, q_offset=start, kv_offset=0 if decoder else chunk[1], cross=site.cross)
    if bias is not None:
        bias = bias[..., :n_keys].to(query.device)
    sinks: Tensor | None = options.get("s_aux")
    if sinks is None:
        # Not by getattr: a module that lacks a name takes its time to say so, at every call.
        parameters: Mapping[str, Tensor | None] = vars(module)["_parameters"]
        sinks = parameters.get("sinks")
    if options.get("softcap") is not None and entry_implementation(getattr(module, "config", None)) == "sdpa":
        warnings.warn(
            f"{site.name} has a softcap of {options['softcap']}, which SDPA drops without a word in this transformers: the model "
            "runs without it, readings and edits have it. Load the model with attn_implementation='eager'",
            stacklevel=2,
        )
    scale = options.get("scaling")
    sizes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    if (site.n_heads, site.n_kv_heads, site.head_dim, site.v_head_dim) != sizes:
        site = _with_sizes(site, *sizes)
    return SiteCall(
        site=site,
        run=run,
        q=query,
        k=key,
        v=value,
        mask=mask,
        scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
        softcap=options.get("softcap"),
        sinks=None if sinks is None else sinks.reshape(-1),
        bias=bias,
        generated=_generated(run, decoder, mask.q_offset, n_queries),
    )


def decodes(site: Site) -> bool:
    """Whether the rows of a site come after what the KV cache holds; elsewhere they come after those of earlier calls."""
    return site.stack == "text" or site.cross


@functools.lru_cache(maxsize=4096)
def _with_sizes(site: Site, heads: int, kv_heads: int, head_dim: int, v_head_dim: int) -> Site:
    return replace(site, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim)


@functools.lru_cache(maxsize=256)
def _plain_mask(causal: bool, q_offset: int, kv_offset: int, cross: bool) -> Mask:
    """One object for all layers: the op prepares for each mask once."""
    return Mask(causal=causal, q_offset=q_offset, kv_offset=kv_offset, cross=cross)


def _generated(run: RunState, decoder: bool, start: int, count: int) -> bool:
    if not decoder:
        return False
    if run.generating or run.given_prompt_length is not None:
        return run.prompt_length is not None and start >= run.prompt_length
    return count == 1 and start > 0


def _is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    # Eager functions know no causality beyond the mask; the others follow the flag where there is no mask.
    if entry_implementation(getattr(module, "config", None)) == "eager":
        return False
    flag = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if flag is None else flag)


def _dense(mask: Tensor, n_queries: int) -> tuple[Tensor | None, Tensor | None]:
    """``(visible, additive)`` of a dense mask; the additive part only where something finite is not 0."""
    mask = mask.expand(-1, -1, n_queries, -1)
    if mask.dtype == torch.bool:
        return mask, None
    visible = mask > torch.finfo(mask.dtype).min / 2
    rest = torch.where(visible, mask, 0.0)
    return (None if bool(visible.all()) else visible), (rest if bool(rest.any()) else None)
