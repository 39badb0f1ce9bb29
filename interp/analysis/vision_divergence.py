"""Vision-aware head divergence: what a head's output owes to the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr

from interp.analysis.image_inputs import answered, prompt_of, require_images, with_other_image, z_with, z_without
from interp.analysis.running import AnalysisError, Floats, HeadScore, as_model, inputs_of, on_grid
from interp.models.model import Model

PAPER = "He et al. 2025, https://arxiv.org/abs/2412.13949"


@dataclass(frozen=True)
class VisionAwareDivergence(HeadScore):
    """Vision-aware head divergence (VHD), He et al. 2025, https://arxiv.org/abs/2412.13949, eq. 4.

    Formula: ``VHD_h = || z_h(y_t | y_<t, image, text) - z_h(y_t | y_<t, text) ||_2``, z ``[Dv]`` before the output projection, at
    the row that predicts y_t. Without the image means that its tokens are cut out of the sequence, as paper and release do: later
    positions are renumbered, which moves z as well. Two forwards a sample; ``[sample, layer, head]``.

    Unit: that of z; heads of different layers are not on one scale, so rank within layers or take ``relative``.

    Args:
        rows: ``"first"``: the row that predicts the answer's first token (what VHR uses); ``"answer"``: the mean over the tokens
            of the sample's own answer, forced.
        distance: ``"euclidean"`` (paper) or ``"squared"`` (release).
        relative: divide by ``|| z_h(text, image) ||`` (squared likewise).

    Needs: a vision-language model whose image tokens stand in the text.
    Probe: ``SceneDescriptions``, or inputs with an image.
    Control: the image exchanged for that of the next sample in place of none. What another image changes is content; what is in
    the value beyond it is the mere presence of an image and the renumbering. NaN where the two images are encoded differently.
    When not to use: to compare layers; as proof that a head matters (see the ablation scores).
    """

    name: ClassVar[str] = "vision_aware_divergence"
    summary: ClassVar[str] = "how far a head's output moves when the image is taken away"
    paper: ClassVar[str] = PAPER
    unit: ClassVar[str] = "norm of z"
    probe: ClassVar[str] = "SceneDescriptions"
    control: ClassVar[str] = "the image exchanged for another one instead of taken away"
    needs: ClassVar[str] = "a vision-language model"

    rows: Literal["first", "answer"] = "first"
    distance: Literal["euclidean", "squared"] = "euclidean"
    relative: bool = False

    def __post_init__(self) -> None:
        if self.rows not in ("first", "answer"):
            raise AnalysisError(f"rows must be 'first' or 'answer', got {self.rows!r}")
        if self.distance not in ("euclidean", "squared"):
            raise AnalysisError(f"distance must be 'euclidean' or 'squared', got {self.distance!r}")

    @property
    def result_unit(self) -> str:
        return "fraction of the norm of z" if self.relative else self.unit

    def default_probe(self) -> Any:
        from probes.scenes.described import SceneDescriptions

        return SceneDescriptions()

    def arrange(self, samples: list[Any]) -> list[Any]:
        others = [*samples[1:], samples[0]]
        return [(sample, other if len(samples) > 1 else None) for sample, other in zip(samples, others, strict=True)]

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        require_images(model, self.name)
        sample, other = sample
        inputs, rows = answered(sample, model) if self.rows == "answer" else _first(sample, model)
        seen = z_with(model, inputs, rows)
        alone = z_without(model, inputs, prompt_of(model, inputs, self.name), rows, self.name)
        value = on_grid(self.between(seen, alone).mean("query"), model, "text")
        swapped = None if other is None else with_other_image(inputs, inputs_of(other, model))
        if swapped is None:
            return value, np.full_like(value, np.nan)
        return value, on_grid(self.between(seen, z_with(model, swapped, rows)).mean("query"), model, "text")

    def between(self, a: xr.DataArray, b: xr.DataArray) -> xr.DataArray:
        """Distance ``[sample, layer, head, query]`` of two z ``[..., query, dim]``."""
        squared = ((a - b.reindex_like(a)) ** 2).sum("dim", skipna=False)
        if self.relative:
            squared = squared / (a**2).sum("dim", skipna=False)
        return squared if self.distance == "squared" else squared**0.5


def _first(sample: Any, model: Model) -> tuple[dict[str, Any], range]:
    inputs = inputs_of(sample, model)
    length = inputs["input_ids"].shape[1]
    return inputs, range(length - 1, length)


def token_divergence(
    model: Any, sample: Any, *, k: int | None = None, distance: Literal["euclidean", "squared"] = "euclidean"
) -> xr.Dataset:
    """T-VHD (He et al. 2025, eq. 5) of every token of an answer: ``sum_l sum of the k largest VHD_{l,h}``.

    Args:
        model: a vision-language model.
        sample: a prompt with its answer, as of ``SceneDescriptions``; an answer that the model wrote itself is as good.
        k: heads a layer. The paper's text does not give it; None is a quarter of the layer's heads, rounded up (8 of 32, as in a
            port of the release).
        distance: ``"euclidean"`` (paper) or ``"squared"`` (release).

    Returns:
        ``vhd (step, layer, head)`` and ``t_vhd (step)``; coordinates ``token (step)`` and ``k``.

    Raises:
        AnalysisError: no vision-language model, a sample without an answer, a k outside the heads.
    """
    model = as_model(model)
    score = VisionAwareDivergence(rows="answer", distance=distance)
    require_images(model, "token_divergence")
    if not getattr(sample, "answer_ids", ()):
        raise AnalysisError("token_divergence needs a sample with an answer (answer_ids and forced()), got none")
    with torch.no_grad():
        inputs, rows = answered(sample, model)
        prompt = prompt_of(model, inputs, "token_divergence")
        found = score.between(z_with(model, inputs, rows), z_without(model, inputs, prompt, rows, "token_divergence"))
    vhd = found.isel(sample=0).transpose("query", "layer", "head")
    heads = vhd.sizes["head"]
    k = -(-heads // 4) if k is None else k
    if not 1 <= k <= heads:
        raise AnalysisError(f"k must lie in 1 .. {heads}, the heads of a layer, got {k}")
    largest = np.sort(np.nan_to_num(vhd.values), axis=-1)[..., -k:].sum((-1, -2))
    tokens = (
        [model.tokenizer.decode([i]) for i in sample.answer_ids] if model.tokenizer is not None else [""] * len(rows)
    )
    return xr.Dataset(
        {"vhd": (("step", "layer", "head"), vhd.values), "t_vhd": ("step", largest)},
        coords={"layer": vhd["layer"].values, "head": vhd["head"].values, "token": ("step", tokens)},
        attrs={"name": "token_divergence", "unit": "norm of z", "paper": PAPER, "k": k, "model": model.name},
    )
