"""To and from TransformerLens 4 (``TransformerBridge``), https://github.com/TransformerLensOrg/TransformerLens.

- :func:`from_activation_cache` makes a :class:`Trace` of what ``bridge.run_with_cache`` kept; :func:`to_activation_cache` the reverse.
- ``interp.load(bridge)``, or ``interp.hooked(bridge)``, works on the transformers model under the bridge, on the same weights (see
  :mod:`interp.models.bridge`). While a session is open, ``bridge(tokens)`` is traced and edited as well.
- :mod:`interp.scores_lens` converts names of heads and arrays of scores.

What the bridge's own hooks cannot do: where its attention hands the computation to the model's module, an edit returned from
``hook_pattern`` comes too late and is thrown away (it warns). With TransformerLens 4.3 that is so for OPT, BERT, RoBERTa, GPT-J, GPT-Neo,
XGLM, T5 (encoder, decoder and cross attention), ViT, DeiT, and the vision towers of LLaVA, Gemma 3 and Idefics 3 (tried one by one); in
GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma, GPT-OSS, DeepSeek-V3, Phi-3, Cohere, SmolLM3, Bloom and Falcon it acts. An edit of ours
acts in all of these that ask transformers' attention interface, so not in GPT-J, GPT-Neo, XGLM, Bloom and Falcon.

When not to use: a cache holds the full maps ``[batch, head, query, key]`` of every layer. For statistics of a long prompt, trace with a
:class:`Capture` instead: it never makes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp.attention import Edit, GivenRows, Mask
from interp.heads import TEXT
from interp.models.anatomy import Anatomy, Site
from interp.models.bridge import is_bridge, plain
from interp.tracing.calls import RunState, SiteCall
from interp.tracing.capture import Capture, Selection
from interp.tracing.recorder import Recorder
from interp.tracing.trace import CAPTURE_KEYWORD, Trace

SINGLE = (("blocks", "attn"),)
NAMES = {
    "text": (*SINGLE, ("decoder_blocks", "self_attn")),
    "encoder": (("encoder_blocks", "attn"),),
    "cross": (("decoder_blocks", "cross_attn"),),
}
"""By stack: the list of blocks and the attention in it, as a bridge names them; the first that a cache has is taken."""

ROUNDING = 1e-5
"""A row sum within this of 1 is 1: what is left over in a model without sink logits is rounding."""


class CacheError(ValueError):
    """A cache or trace that does not hold what is asked of it."""


def from_activation_cache(
    cache: Any,
    inputs: Any = None,
    *,
    capture: Capture | None = None,
    model: Any = None,
    tokenizer: Any = None,
    stack: str = TEXT,
) -> Trace:
    """A trace of one stack from the patterns (and z) of a TransformerLens run: the readings a session would have taken.

    The readings are computed from ``hook_pattern``; ``lse`` and the visible set from ``hook_attn_scores`` where the cache has the scores
    (native-delegation families repeat the pattern there: then ``lse`` is left out, and a key with weight 0 counts as invisible);
    ``group_output`` needs ``hook_v``. ``sink_share`` is what a row's sum lacks to 1.

    Args:
        cache: an ``ActivationCache`` of ``bridge.run_with_cache``, or a mapping from its names to tensors.
        inputs: what was run, for labels of positions: token ids ``[batch, position]``, or a mapping with ``input_ids`` and, with pads,
            ``attention_mask`` (``pixel_values`` for a vision model). None takes the ids from the cache.
        capture: what to take; None is row statistics, column sums, the maps, and z where the cache has it.
        model: the bridge or transformers model, for kinds of positions; None takes the cache's.
        tokenizer: for readable tokens; None takes the bridge's.
        stack: name of the stack: ``text``, ``encoder``, ``cross``, or what a model of one stack calls it (``vision``).

    Raises:
        CacheError: the cache holds no patterns of this stack, or lacks what ``capture`` asks for.
        CaptureError: ``capture`` names layers, heads or stacks that the cache does not have.
    """
    held: Mapping[str, Tensor] = getattr(cache, "cache_dict", cache)
    if not isinstance(held, Mapping):
        raise CacheError(f"cache must be an ActivationCache or a mapping of tensors, got {type(cache).__name__}")
    batched = bool(getattr(cache, "has_batch_dim", True))
    prefix, layers = _found(held, stack)
    model = getattr(cache, "model", None) if model is None else model
    module: Any = plain(model) if is_bridge(model) else getattr(model, "module", model)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer

    def read(layer: int, hook: str, ndim: int = 4) -> Tensor | None:
        value = held.get(f"{prefix.format(layer)}.{hook}")
        value = value[None] if value is not None and value.ndim == ndim - 1 and not batched else value
        return None if value is None or value.ndim != ndim else value.detach().float()

    patterns = {layer: read(layer, "hook_pattern") for layer in layers}
    wrong = [layer for layer, p in patterns.items() if p is None]
    if wrong:
        name = f"{prefix.format(wrong[0])}.hook_pattern"
        raise CacheError(f"{name} must be [batch, head, query, key], got {list(held[name].shape)}")
    if capture is None:
        capture = Capture(row_stats=True, received=True, attention=True, z=read(layers[0], "hook_z") is not None)
    first = patterns[layers[0]]
    assert first is not None
    run = RunState(
        module=module if isinstance(module, nn.Module) else nn.Identity(),
        anatomy=_anatomy(model, stack, prefix, patterns, read),
        inputs=_inputs(inputs, held, batched, first),
        generating=False,
        tokenizer=tokenizer,
        prompt_length=first.shape[3],
        past_length=first.shape[3] - first.shape[2],
        forwards=1,
    )
    selection = capture.resolve(run.anatomy)
    wanted = [layer for layer in selection.layers[stack] if layer in layers or capture.layers is not None]
    lacking = sorted(set(wanted) - set(layers))
    if lacking:
        raise CacheError(f"layers must be in the cache, which has the patterns of {layers}; got {lacking}")
    recorder = Recorder(capture, Selection({stack: wanted}, selection.heads), run, tokenizer)
    padding = _padding(run.inputs, first)
    for site in run.anatomy.sites:
        p = patterns[site.layer]
        if site.layer not in wanted or p is None:
            continue
        scores = read(site.layer, "hook_attn_scores")
        if scores is not None and (scores.shape != p.shape or torch.equal(scores, p)):
            scores = None
        seen = (p > 0 if scores is None else scores > torch.finfo(torch.float32).min / 2).any(1, keepdim=True)
        call = _call(site, run, p, read(site.layer, "hook_v"), seen, padding)
        if capture.group_output is not None and not call.v.shape[-1]:
            raise CacheError(f"group_output needs hook_v of every key, which the cache lacks at {site.name}")
        rows = GivenRows(torch.arange(p.shape[1]), torch.arange(p.shape[2]), p.cpu())
        before = len(recorder.pieces.get(stack, ()))
        recorder.read(_filled(call), Edit((rows,)), "reference")
        _sums(recorder.pieces[stack][before:], call, p, scores, seen)
        if capture.z:
            z = read(site.layer, "hook_z")
            if z is None:
                raise CacheError(
                    f"z needs {site.name}.hook_z of shape [batch, query, head, dim], which the cache lacks"
                )
            recorder.keep_z(call, z.cpu())
    config = getattr(module, "config", None)
    name = getattr(getattr(model, "cfg", None), "model_name", None) or getattr(config, "_name_or_path", "") or stack
    attrs = {
        "model": {"name": str(name), "class": type(module).__name__, "revision": None},
        "source": "ActivationCache",
    }
    return recorder.trace(None, attrs)


def to_activation_cache(trace: Trace, model: Any = None, *, stack: str = TEXT) -> Any:
    """A TransformerLens ``ActivationCache`` of one stack of a trace: ``hook_pattern`` and ``hook_z`` of each layer, and the token ids.

    Rows that are missing in the trace (pads) are 0.

    Args:
        trace: captured with ``Capture(attention=True)``, ``Capture(z=True)`` or both, for all heads of each layer.
        model: the bridge, for the cache's methods that need weights.
        stack: the stack to take.

    Raises:
        CacheError: the trace has neither maps nor z of all heads.
        TraceKeyError: no such stack.
        ImportError: TransformerLens is not installed.
    """
    data = trace[stack]
    has = [name for name in ("attention", "z") if name in data]
    if not has:
        asked = " or ".join(f"Capture({CAPTURE_KEYWORD[name]})" for name in ("attention", "z"))
        raise CacheError(
            f"trace must hold maps or z: trace with {asked}; got {', '.join(map(str, data.data_vars)) or 'nothing'}"
        )
    heads = data["head"].values.tolist()
    if heads != list(range(len(heads))):
        raise CacheError(f"trace must hold every head, since a cache knows them by their place; got heads {heads}")
    make = _activation_cache()
    prefix = _names(stack)[0]
    order = {"attention": ("head", "query", "key"), "z": ("query", "head", "dim")}
    tensors: dict[str, Tensor] = {}
    if "token_fed_id" in data.coords:
        tensors["embed.hook_in"] = torch.from_numpy(data["token_fed_id"].transpose("sample", "query").values.copy())
    for name in has:
        hook = "hook_pattern" if name == "attention" else "hook_z"
        array = data[name].transpose("layer", "sample", *order[name])
        for layer, values in zip(data["layer"].values.tolist(), array, strict=True):
            # Of a layer without such heads nothing is there.
            if bool(values.notnull().any()):
                tensors[f"{prefix.format(layer)}.{hook}"] = torch.from_numpy(np.nan_to_num(values.values, nan=0.0))
    return make(tensors, model)


def _activation_cache() -> Any:
    try:
        from transformer_lens import ActivationCache
    except ModuleNotFoundError as error:
        raise ImportError(
            f"an ActivationCache needs TransformerLens 4.3 or newer ({error}): pip install 'headscope[lens]'"
        ) from error
    return ActivationCache


def _names(stack: str) -> list[str]:
    return [f"{blocks}.{{}}.{attention}" for blocks, attention in NAMES.get(stack, SINGLE)]


def _found(held: Mapping[str, Tensor], stack: str) -> tuple[str, list[int]]:
    """The pattern of names and the layers whose maps are there."""
    for prefix in _names(stack):
        before, after = (re.escape(part) for part in prefix.split("{}"))
        matches = (re.fullmatch(rf"{before}(\d+){after}\.hook_pattern", str(name)) for name in held)
        layers = sorted(int(match[1]) for match in matches if match)
        if layers:
            return prefix, layers
    raise CacheError(
        f"cache must hold {' or '.join(f'{p.format(0)}.hook_pattern' for p in _names(stack))}, ...: run_with_cache without a "
        f"names_filter that leaves it out; got {len(held)} entries such as {[str(k) for k in list(held)[:3]]}"
    )


def _anatomy(model: Any, stack: str, prefix: str, patterns: Mapping[int, Tensor | None], read: Any) -> Anatomy:
    sites: list[Site] = []
    for layer, p in patterns.items():
        assert p is not None
        v, z = read(layer, "hook_v"), read(layer, "hook_z")
        kv_heads = p.shape[1] if v is None else v.shape[2]
        dim = 0 if z is None else z.shape[3]
        sites.append(Site(prefix.format(layer), stack, layer, p.shape[1], kv_heads, dim, dim, False, stack == "cross"))
    return Anatomy(type(model).__name__, tuple(sites), {stack: max(patterns) + 1}, (), {})


def _inputs(given: Any, held: Mapping[str, Tensor], batched: bool, p: Tensor) -> dict[str, Any]:
    if isinstance(given, Mapping):
        found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    else:
        ids = held.get("embed.hook_in") if given is None else torch.as_tensor(given)
        ids = None if ids is None or ids.is_floating_point() else ids
        ids = ids[None] if ids is not None and ids.ndim == 1 and (not batched or given is not None) else ids
        found = {} if ids is None else {"input_ids": ids}
    ids = found.get("input_ids")
    if (
        ids is not None
        and given is not None
        and tuple(ids.shape) not in {(p.shape[0], p.shape[2]), (p.shape[0], p.shape[3])}
    ):
        raise CacheError(
            f"inputs must be ids of the cached run, [{p.shape[0]}, {p.shape[3]}], got shape {list(ids.shape)}"
        )
    return found


def _padding(inputs: Mapping[str, Any], p: Tensor) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool().cpu() if isinstance(mask, Tensor) and tuple(mask.shape) == (p.shape[0], p.shape[3]) else None


def _call(site: Site, run: RunState, p: Tensor, v: Tensor | None, seen: Tensor, padding: Tensor | None) -> SiteCall:
    """A call with the visibility of the cached one; values of width 0 where the cache has none."""
    batch, heads, n_queries, n_keys = p.shape
    offset = n_keys - n_queries
    if v is None or v.shape[1] != n_keys or site.cross:
        v = p.new_zeros(batch, n_keys, heads, 0)
    seen = seen.cpu()
    below = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(offset)
    causal = not site.cross and n_queries > 1 and not bool((seen & ~below).any())
    dense = None if causal and bool((seen == below).all()) else None if bool(seen.all()) else seen
    mask = Mask(causal=causal, dense=dense, padding=padding, q_offset=offset, cross=site.cross)
    q, k = torch.zeros(batch, heads, n_queries, 1), torch.zeros(batch, v.shape[2], n_keys, 1)
    return SiteCall(
        site=site, run=run, q=q, k=k, v=v.cpu().transpose(1, 2), mask=mask, scale=1.0, softcap=None, sinks=None, bias=None,
        generated=False,
    )  # fmt: skip


def _filled(call: SiteCall) -> SiteCall:
    """The op wants values of some width, also where nothing is read of them."""
    return call if call.v.shape[-1] else replace(call, v=torch.zeros_like(call.k))


def _sums(pieces: Iterable[Any], call: SiteCall, p: Tensor, scores: Tensor | None, seen: Tensor) -> None:
    """Put right what the op cannot know of rows that are given: the log-sum-exp, and the share of a sink."""
    p = p.cpu()
    total = p.sum(-1)
    alive = seen.cpu().any(-1).expand_as(total)
    share = torch.where(alive & (1 - total > ROUNDING), 1 - total, 0.0)
    lse = None
    if scores is not None:
        hidden = scores.cpu().masked_fill(~seen.cpu(), -torch.inf)
        lse = torch.where(alive, hidden.logsumexp(-1) - torch.log1p(-share), -torch.inf)
    for piece in pieces:
        if piece.readings is None or piece.readings.entropy is None:
            continue
        rows = slice(piece.start - call.mask.q_offset, piece.stop - call.mask.q_offset)
        piece.readings.sink_share = share[:, piece.heads, rows]
        piece.readings.lse = None if lse is None else lse[:, piece.heads, rows]
