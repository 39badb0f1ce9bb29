"""Visual sinks and image-centric heads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.image_inputs import answered, named, prompt_of, require_images
from interp.analysis.running import AnalysisError, Floats, HeadScore, as_model, inputs_of, on_grid
from interp.models.anatomy import Site, anatomy
from interp.models.model import Model
from interp.tracing.calls import InterventionError, RunState
from interp.tracing.capture import Capture
from interp.tracing.prompt import Prompt
from interp.tracing.session import hooked
from interp.tracing.visual_sinks import SinkDimensions, phi, scaled_tau, sink_dimensions, watch_layer_inputs, width_of

PAPER = "Kang et al. 2025, https://arxiv.org/abs/2503.03321"


@dataclass(frozen=True)
class _OfSinks(HeadScore):
    """Settings and the traced rows that both scores share."""

    paper: ClassVar[str] = PAPER
    probe: ClassVar[str] = "SceneDescriptions"
    needs: ClassVar[str] = "a vision-language model"

    tau: float = 20.0
    scale_tau: bool = True
    dims: tuple[int, ...] | None = None

    def default_probe(self) -> Any:
        from probes.scenes.described import SceneDescriptions

        return SceneDescriptions()

    def shares(self, model: Model, sample: Any) -> tuple[xr.DataArray, xr.DataArray, float]:
        """Weight on all image tokens and on visual sinks ``[sample, layer, head, row]``, and the sinks' share of the image."""
        require_images(model, self.name)
        inputs, rows = answered(sample, model)
        prompt = prompt_of(model, inputs, self.name)
        # The paper's rows are all text behind the image.
        last = int(prompt.image[0].nonzero().max())
        wanted = tuple(range(last + 1, rows.stop))
        capture = Capture(rows=wanted, stacks=("text",))
        phis, data = _with_phi(model, inputs, prompt, _tau(self, model), self.dims, self.name, capture)
        weights = data["row_attention"]
        image = xr.DataArray(prompt.image.numpy(), dims=("sample", "key"))
        sinks = (phis >= _tau(self, model)) & image
        on_image = weights.where(image, 0.0).sum("key", skipna=False)
        on_sinks = weights.where(sinks.reindex(layer=weights["layer"]), 0.0).sum("key", skipna=False)
        share = float(sinks.sum() / (sinks.sizes["layer"] * image.sum()))
        return on_image, on_sinks, share


@dataclass(frozen=True)
class ImageCentric(_OfSinks):
    """Image-centric heads, Kang et al. 2025, https://arxiv.org/abs/2503.03321, section 4.

    Formula: of the text rows behind the image, the share where ``s = sum over image keys of A_ij >= summ`` and the part of s that is
    not on visual sinks is at least rho: the rows in which VAR would act on the head. Sinks: ``phi = max over the sink dimensions of
    |x / RMS(x)| >= tau`` for what enters the layer. Rows ``[row, key]`` are read exactly, so memory is linear in length.

    Unit: fraction of rows.

    Args:
        tau: 20 at a width of 4096.
        scale_tau: times ``sqrt(width / 4096)``, for ``|x / RMS|`` cannot pass ``sqrt(width)``; False takes tau as it is.
        dims: sink dimensions of the residual stream; None takes published ones, or calibrates.
        summ: 0.2 (release).
        rho: 0.5 (hallucination tasks), 0.8 (general ones).

    Needs: a vision-language model. Where no dimension stands out it has no sinks, and a warning says so.
    Probe: ``SceneDescriptions``. Control: the same rule for a uniform head.
    When not to use: with a rho tuned on the test set.
    """

    name: ClassVar[str] = "image_centric"
    summary: ClassVar[str] = "share of text rows in which a head looks at the image and past its sinks"
    unit: ClassVar[str] = "fraction of rows"
    control: ClassVar[str] = "the same rule for a uniform head"

    summ: float = 0.2
    rho: float = 0.5

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        on_image, on_sinks, share = self.shares(model, sample)
        centric = (on_image >= self.summ) & (on_image - on_sinks >= self.rho * on_image)
        value = on_grid(centric.where(on_image.notnull()).mean("row", skipna=False), model, "text")
        inputs, rows = answered(sample, model)
        image = prompt_of(model, inputs, self.name).image[0]
        seen = np.arange(int(image.nonzero().max()) + 1, rows.stop) + 1
        uniform = float(((int(image.sum()) / seen >= self.summ) & (1 - share >= self.rho)).mean())
        return value, np.where(np.isnan(value), np.nan, uniform)


@dataclass(frozen=True)
class VisualSinkShare(_OfSinks):
    """Share of a head's image attention that visual sinks take (Kang et al. 2025, https://arxiv.org/abs/2503.03321, section 3).

    Formula: mean over the text rows behind the image of ``sum over visual sinks of A_ij / sum over image keys of A_ij``; sinks as
    for ``image_centric``. Rows without weight on the image are left out.

    Unit: fraction of image mass. Args: see ``image_centric``.
    Needs: a vision-language model. Where no dimension stands out it has no sinks, and a warning says so.
    Probe: ``SceneDescriptions``. Control: the sinks' share of the image tokens: what a head has that does not tell them apart.
    When not to use: in models without visual sinks (all zeros).
    """

    name: ClassVar[str] = "visual_sink_share"
    summary: ClassVar[str] = "share of a head's image attention that goes to visual sinks"
    unit: ClassVar[str] = "fraction of image mass"
    control: ClassVar[str] = "the sinks' share of the image tokens"

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        on_image, on_sinks, share = self.shares(model, sample)
        value = on_grid((on_sinks / on_image.where(on_image > 0)).mean("row"), model, "text")
        return value, np.where(np.isnan(value), np.nan, share)


def visual_sinks(
    model: Any, sample: Any, *, tau: float = 20.0, scale_tau: bool = True, dims: tuple[int, ...] | None = None
) -> xr.Dataset:
    """phi of every position of a prompt as it enters each layer, and which are sinks.

    Returns:
        ``phi (sample, layer, key)``, ``sink`` (bool), coordinate ``image (sample, key)``; attributes ``tau`` (as applied),
        ``dims`` and their ``source``.

    Raises:
        AnalysisError: no vision-language model, no image, or no dimension stands out (says what was seen).
    """
    model = as_model(model)
    name = "visual_sinks"
    require_images(model, name)
    inputs = inputs_of(sample, model)
    prompt = prompt_of(model, inputs, name)
    applied = scaled_tau(tau, "width" if scale_tau else "absolute", width_of(model.module))
    with torch.no_grad():
        phis, _ = _with_phi(model, inputs, prompt, applied, dims, name, None)
    attrs = {**phis.attrs, "tau": applied, "paper": PAPER, "model": model.name}
    return xr.Dataset(
        {"phi": phis, "sink": phis >= applied}, coords={"image": (("sample", "key"), prompt.image.numpy())}, attrs=attrs
    )


def _tau(settings: _OfSinks, model: Model) -> float:
    return scaled_tau(settings.tau, "width" if settings.scale_tau else "absolute", width_of(model.module))


def _dimensions(
    model: Model, inputs: Mapping[str, Any], dims: tuple[int, ...] | None, tau: float, name: str, strict: bool
) -> SinkDimensions:
    run = RunState(
        module=model.module, anatomy=anatomy(model.module), inputs=dict(inputs), generating=False,
        tokenizer=model.tokenizer, root=model.module,
    )  # fmt: skip
    try:
        return sink_dimensions(named(name), run, dims, tau)
    except InterventionError as error:
        if strict or dims is not None:
            raise AnalysisError(f"{name}: {error}") from error
        warnings.warn(f"{name} takes the model to have no visual sinks: {error}", stacklevel=2)
        return SinkDimensions((), source="none stands out")


def _with_phi(
    model: Model, inputs: Mapping[str, Any], prompt: Prompt, tau: float, dims: tuple[int, ...] | None, name: str,
    capture: Capture | None,
) -> tuple[xr.DataArray, Any]:  # fmt: skip
    """phi ``[sample, layer, key]`` and the trace of one forward."""
    known = _dimensions(model, inputs, dims, tau, name, strict=capture is None)
    sites = anatomy(model.module).stacks["text"]
    found: dict[int, Tensor] = {}

    def note(site: Site, x: Tensor) -> None:
        found[site.layer] = phi(x, known.dims).cpu() if known.dims else torch.zeros(x.shape[:2])

    undo = watch_layer_inputs(model.module, sites, note)
    try:
        with hooked(model, capture=capture) as run:
            model(inputs)
    finally:
        undo()
    layers = sorted(found)
    values = torch.stack([found[layer] for layer in layers], 1)[..., : prompt.kind.shape[1]]
    attrs = {"dims": list(known.dims), "source": known.source}
    phis = xr.DataArray(values.numpy(), dims=("sample", "layer", "key"), coords={"layer": layers}, attrs=attrs)
    return phis, None if capture is None else run.trace["text"]
