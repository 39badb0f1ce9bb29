"""Massive activations in the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.running import AnalysisError, as_model, build, inputs_of, require_stack
from interp.models.anatomy import Site, anatomy
from interp.tracing.calls import InterventionError
from interp.tracing.visual_sinks import SinkDimensions, calibrate_sinks, watch_layer_inputs

PAPER = "Sun et al. 2024, https://arxiv.org/abs/2402.17762"


def massive_activations(
    model: Any, probe: Any = None, *, stack: str = "text", top: int = 3, least: float = 100.0, ratio: float = 1000.0
) -> xr.Dataset:
    """Massive activations, Sun et al. 2024, https://arxiv.org/abs/2402.17762: the largest entries of what enters each layer.

    An entry of the hidden states ``x [position, dim]`` is massive where ``|x| > least`` and ``|x| >= ratio * median |x|`` over all entries
    (the paper's "at least about 1000 times"; the criterion is from quotes of section 2). Small and narrow models do not reach 100: look at
    ``ratio_to_median`` there, and at :func:`sink_dims`, which has no absolute threshold.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        probe: a probe, or an iterable of inputs of one sequence each; None is ``Passages(n=10)``, as many as the paper has.
        stack: whose layers.
        top: entries a layer and sample.
        least, ratio: the criterion.

    Returns:
        ``value (sample, layer, rank)`` signed, ``position``, ``dim``, ``massive`` (bool) likewise; ``median (sample, layer)`` of ``|x|``,
        ``ratio_to_median (sample, layer, rank)``.

    Raises:
        AnalysisError: no such stack, no samples, inputs of several sequences, or a ``top`` below 1.
    """
    if top < 1:
        raise AnalysisError(f"top must be at least 1, got {top}")
    model = as_model(model)
    require_stack(model, stack)
    if probe is None:
        from probes.text import Passages

        probe = Passages(n=10)
    sites = anatomy(model.module).stacks[stack]
    found: list[dict[int, tuple[Any, ...]]] = []

    def note(site: Site, x: Tensor) -> None:
        if x.shape[0] != 1:
            raise AnalysisError(f"inputs must be one sequence each, got a batch of {x.shape[0]}")
        size = x[0].float().abs()
        values, at = size.flatten().topk(top)
        signed = x[0].float().flatten()[at].tolist()
        width = size.shape[1]
        found[-1][site.layer] = (
            signed, (at // width).tolist(), (at % width).tolist(), float(size.flatten().median()), values.tolist(),
        )  # fmt: skip

    undo = watch_layer_inputs(model.module, sites, note)
    try:
        with torch.no_grad():
            for sample in build(probe, model):
                found.append({})
                model(inputs_of(sample, model))
    finally:
        undo()
    layers = sorted({layer for one in found for layer in one})
    if not layers:
        raise AnalysisError(f"these inputs do not reach the stack {stack!r}")
    rows = [[one[layer] for layer in layers] for one in found]
    value, position, dim, median, size = (np.array([[cell[n] for cell in row] for row in rows]) for n in range(5))
    dims = ("sample", "layer", "rank")
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = size / median[..., None]
    return xr.Dataset(
        {
            "value": (dims, value), "position": (dims, position), "dim": (dims, dim), "median": (dims[:2], median),
            "ratio_to_median": (dims, relative), "massive": (dims, (size > least) & (relative >= ratio)),
        },
        coords={"layer": layers, "rank": np.arange(top)},
        attrs={
            "name": "massive_activations", "unit": "activation", "paper": PAPER, "model": model.name, "stack": stack,
            "least": least, "ratio": ratio,
        },
    )  # fmt: skip


def sink_dims(model: Any, probe: Any = None, *, tau: float = 20.0) -> SinkDimensions:
    """Dimensions in which a few tokens are massive, found by calibration (see :func:`~interp.tracing.visual_sinks.calibrate_sinks`).

    Args:
        model: an :class:`interp.Model` or a transformers model.
        probe: a probe, or an iterable of inputs; None is ``Passages``.
        tau: ``|x / RMS(x)|`` that they must reach.

    Raises:
        AnalysisError: no dimension stands out; says what was seen.
    """
    model = as_model(model)
    if probe is None:
        from probes.text import Passages

        probe = Passages(n=6, length=64)
    try:
        return calibrate_sinks(model, [inputs_of(sample, model) for sample in build(probe, model)], tau=tau)
    except InterventionError as error:
        raise AnalysisError(str(error)) from error
