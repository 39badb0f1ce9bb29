"""Outputs z of every head at chosen rows: the features of linear probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.running import AnalysisError, as_model, build, inputs_of, require_stack, track
from interp.models.anatomy import Site, anatomy
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked

Rows = Literal["last", "all"] | Sequence[int] | Callable[[Any], Sequence[int]]


class _Collector(Intervention):
    """Keeps z ``[row, H, Dv]`` of every site of one stack, as it is after all edits of sessions outside this one."""

    def __init__(self, stack: str, layers: frozenset[int]) -> None:
        self.stack, self.layers = stack, layers
        self.found: dict[int, Tensor] = {}

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == self.stack and site.layer in self.layers

    def after(self, call: SiteCall, z: Tensor) -> None:
        if not self.acts_on(call.site, call.run):
            return
        if call.site.layer in self.found:
            raise AnalysisError(
                f"stack {self.stack!r} must be called once a forward, and layer {call.site.layer} was not"
            )
        if z.shape[0] != 1:
            raise AnalysisError(f"a sample must be one sequence in stack {self.stack!r}, got a batch of {z.shape[0]}")
        self.found[call.site.layer] = z[0].detach()


def head_outputs(
    model: Any,
    probe: Any,
    rows: Rows = "last",
    *,
    stack: str = "text",
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> xr.DataArray:
    """z of every head, in one forward a sample, for :class:`probes.linear_probe.LinearProbe`.

    Args:
        model: an :class:`interp.Model` or a transformers model; edits of sessions that are open on it apply.
        probe: a probe, or an iterable of samples or inputs of one sequence each.
        rows: ``"last"`` (the row that predicts what follows), ``"all"``, positions that every sample has (negative ones
            from the end), or a function from a sample to its positions.
        stack: whose heads.
        layers: numbers of layers; None is all. Needed where layers have heads of different width.
        progress: show a progress bar where the output is a terminal.

    Returns:
        fp32 ``[sample, layer, head, dim]``, one entry of ``sample`` a row; NaN where a layer has no such head. Coordinates
        ``layer``, ``head``, ``prompt (sample)`` (the number of the sample) and ``position (sample)``.

    Raises:
        AnalysisError: no such stack or layer, a batch, positions outside a sample, no row at all, or heads of different
            width.
    """
    model = as_model(model)
    require_stack(model, stack)
    n_layers, n_heads = anatomy(model.module).shape(stack)
    chosen = list(range(n_layers)) if layers is None else [int(layer) for layer in layers]
    outside = [layer for layer in chosen if not 0 <= layer < n_layers]
    if outside or not chosen or len(set(chosen)) != len(chosen):
        raise AnalysisError(f"layers must be different ones in [0, {n_layers}), got {chosen}")
    pieces: list[np.ndarray[Any, Any]] = []
    prompts: list[int] = []
    positions: list[int] = []
    for number, sample in enumerate(track(build(probe, model), "head outputs", progress)):
        collector = _Collector(stack, frozenset(chosen))
        with hooked(model, interventions=[collector]), torch.no_grad():
            model(inputs_of(sample, model))
        if not collector.found:
            raise AnalysisError(f"these inputs do not reach the stack {stack!r}: the model did not call it")
        length = next(iter(collector.found.values())).shape[0]
        at = _positions(rows, sample, length)
        if at:
            pieces.append(_stacked(collector.found, chosen, n_heads, at))
        prompts += [number] * len(at)
        positions += at
    if not pieces:
        raise AnalysisError("rows must give at least one position in all, got none")
    if len({piece.shape[-1] for piece in pieces}) > 1:
        raise AnalysisError("heads must have one width in all samples: choose layers")
    return xr.DataArray(
        np.concatenate(pieces),
        dims=("sample", "layer", "head", "dim"),
        coords={
            "layer": chosen,
            "head": range(n_heads),
            "prompt": ("sample", prompts),
            "position": ("sample", positions),
        },
        attrs={"stack": stack, "model": model.name},
    )


def _positions(rows: Rows, sample: Any, length: int) -> list[int]:
    if isinstance(rows, str):
        if rows not in ("last", "all"):
            raise AnalysisError(f"rows must be 'last', 'all', positions or a function, got {rows!r}")
        return [length - 1] if rows == "last" else list(range(length))
    at = [int(row) for row in (rows(sample) if callable(rows) else rows)]
    wrong = [row for row in at if not -length <= row < length]
    if wrong:
        raise AnalysisError(f"rows must lie in a sample of {length} positions, got {wrong[0]}")
    return [row % length for row in at]


def _stacked(found: dict[int, Tensor], layers: list[int], n_heads: int, at: list[int]) -> np.ndarray[Any, Any]:
    """``[row, layer, head, dim]``."""
    widths = sorted({z.shape[-1] for z in found.values()})
    if len(widths) > 1:
        raise AnalysisError(f"heads must have one width, got {widths}: choose layers of one")
    out = np.full((len(at), len(layers), n_heads, widths[0]), np.nan, dtype=np.float32)
    for place, layer in enumerate(layers):
        if layer in found:
            z = found[layer][torch.tensor(at, device=found[layer].device)].float().cpu().numpy()
            out[:, place, : z.shape[1]] = z
    return out
