"""CircuitsVis (https://github.com/TransformerLensOrg/CircuitsVis): keyword arguments of its attention views."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from interp.exports.maps import ExportError, maps_of
from interp.heads import Head, Heads, as_heads
from interp.tracing.trace import Trace


def circuitsvis_inputs(
    trace: Trace, heads: Any = None, *, layer: int | None = None, stack: str = "text", sample: int = 0
) -> dict[str, Any]:
    """Keyword arguments for ``circuitsvis.attention.attention_heads``.

    >>> import circuitsvis  # doctest: +SKIP
    >>> circuitsvis.attention.attention_heads(**circuitsvis_inputs(run.trace, layer=3))  # doctest: +SKIP

    The older ``attention_patterns`` takes two of them: ``tokens`` and ``attention``.

    Args:
        trace: of a run with ``Capture(attention=True)``.
        heads: which, of any layers, in this order.
        layer: in place of heads: all heads of this layer.
        stack: of the layer.
        sample: its number in the trace. Pads are left out.

    Returns:
        ``attention [head, query, key]`` (fp32 tensor), ``tokens``, ``attention_head_names`` (``L3H1``) and ``mask_upper_tri``,
        which is True where no query looks ahead.

    Raises:
        ExportError: neither or both of heads and layer, heads of several stacks, or maps that the trace does not hold.
    """
    if (heads is None) == (layer is None):
        raise ExportError(f"one of heads and layer must be given, got heads={heads!r}, layer={layer!r}")
    wanted = as_heads(heads) if heads is not None else None
    if wanted is not None:
        stacks = list(wanted.by_stack())
        if len(stacks) != 1:
            raise ExportError(f"heads must be of one stack, got {stacks or 'none'}")
        stack = stacks[0]
    maps = maps_of(trace, stack, sample)
    if maps.cross:
        raise ExportError("CircuitsVis has one row of tokens for queries and keys: cross attention cannot be shown")
    if wanted is None:
        assert layer is not None
        wanted = Heads(Head(layer, h, stack) for h in maps.heads)
    there = {Head(maps.layers[i], maps.heads[j], stack): (i, j) for i, j in maps.pairs}
    absent = [head for head in wanted if head not in there]
    if absent or not len(wanted):
        raise ExportError(
            f"trace must hold the map of each head, got {str(Heads(absent)) or 'no head'} and a trace with {Heads(there)}"
        )
    picked = np.stack([maps.attention[there[h]] for h in wanted])
    return {
        "attention": torch.from_numpy(picked), "tokens": maps.keys, "attention_head_names": [str(h) for h in wanted],
        "mask_upper_tri": not np.triu(picked, 1).any(),
    }  # fmt: skip
