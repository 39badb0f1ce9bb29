"""BertViz (https://github.com/jessevig/bertviz): keyword arguments of its ``head_view`` and ``model_view``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.exports.maps import ExportError, Maps, maps_of
from interp.heads import Head, Heads
from interp.tracing.trace import Trace


def bertviz_inputs(trace: Trace, stack: str | None = None, *, sample: int = 0) -> dict[str, Any]:
    """Keyword arguments for ``bertviz.head_view`` or ``model_view``.

    >>> from bertviz import head_view  # doctest: +SKIP
    >>> head_view(**bertviz_inputs(run.trace))  # doctest: +SKIP

    For a few hundred tokens: the page holds every number of every map, and browsers give up beyond about 500.

    Args:
        trace: of a run with ``Capture(attention=True)`` of all heads.
        stack: which; None is encoder, decoder and cross attention together where the trace has all three, else ``text``, else
            its only stack.
        sample: its number in the trace. Pads are left out.

    Returns:
        ``attention``: a tuple with ``[1, head, query, key]`` for each layer of the model, and ``tokens``; for an encoder-decoder
        ``encoder_attention``, ``decoder_attention``, ``cross_attention``, ``encoder_tokens``, ``decoder_tokens``.
        ``include_layers`` says which layers there are where some have no map (their tensors are NaN, and BertViz leaves them out).

    Raises:
        ExportError: maps, rows or heads that the trace does not hold.
    """
    if stack is None and {"encoder", "text", "cross"} <= set(trace):
        return _both(trace, sample)
    chosen = stack or ("text" if "text" in trace or len(trace) != 1 else next(iter(trace)))
    maps = maps_of(trace, chosen, sample)
    if maps.cross:
        raise ExportError("BertViz shows cross attention with the encoder's and the decoder's: leave stack out")
    out = {"attention": _layers(maps, chosen), "tokens": maps.keys}
    return out if _complete(maps) else {**out, "include_layers": [maps.layers[i] for i in maps.there]}


def _both(trace: Trace, sample: int) -> dict[str, Any]:
    parts = {name: maps_of(trace, name, sample) for name in ("encoder", "text", "cross")}
    out: dict[str, Any] = {
        "encoder_attention": _layers(parts["encoder"], "encoder"), "decoder_attention": _layers(parts["text"], "text"),
        "cross_attention": _layers(parts["cross"], "cross"),
        "encoder_tokens": parts["encoder"].keys, "decoder_tokens": parts["text"].keys,
    }  # fmt: skip
    numbers = [{part.layers[i] for i in part.there} for part in parts.values()]
    if numbers[0] != numbers[1] or not all(map(_complete, parts.values())):
        # BertViz applies one list of layers to all three, by default as many as the encoder has.
        out["include_layers"] = sorted(set.intersection(*numbers))
        if not out["include_layers"]:
            raise ExportError(
                f"encoder, decoder and cross attention must share a layer, got {[sorted(n) for n in numbers]}"
            )
    return out


def _layers(maps: Maps, stack: str) -> tuple[Tensor, ...]:
    if not maps.there:
        raise ExportError(f"trace must hold a map of stack {stack!r}, got layers that have none: {maps.layers}")
    if maps.heads != list(range(len(maps.heads))) or len(maps.pairs) != len(maps.there) * len(maps.heads):
        raise ExportError(
            f"trace must hold all heads of a layer in stack {stack!r}, which BertViz numbers from 0; got "
            f"{Heads(Head(maps.layers[i], maps.heads[j], stack) for i, j in maps.pairs)}"
        )
    held = {maps.layers[i]: torch.from_numpy(maps.attention[i])[None] for i in maps.there}
    missing = torch.full((1, 1, 1, 1), torch.nan).expand(1, *maps.attention.shape[1:])
    return tuple(held.get(layer, missing) for layer in range(max(maps.layers) + 1))


def _complete(maps: Maps) -> bool:
    return [maps.layers[i] for i in maps.there] == list(range(max(maps.layers) + 1))
