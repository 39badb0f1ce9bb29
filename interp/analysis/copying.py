"""Copying heads of Olsson et al., from what a head writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr

from interp.analysis.projections import LogitDirections, output_weight, require_plain_heads
from interp.analysis.running import AnalysisError, Floats, HeadScore, forward, inputs_of, on_grid
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class Copying(HeadScore):
    """Copying evaluator of Olsson et al. 2022, https://arxiv.org/abs/2209.11895, appendix (from quotes of it).

    Formula, random tokens once: a head's direct logits at row i for the tokens of the sample, ``l_i = z_i W_O W_U`` less the mean over
    the vocabulary, through the final norm at its scale in the run, ``max(l, 0)``; ``r`` = the raise of the attended token over the raise
    of all tokens of the sample, mean over rows that raise any. ``4 r - 1`` maps r's range to [-1, 1] if the attended token gets at most
    half.

    Unit: by ``scale``.

    Args:
        attended: ``"top"`` the key with the largest weight, or ``"weighted"`` the raise of every key's token by its weight.
        scale: ``"ratio"`` r; ``"4r-1"`` or ``"2r-1"``: implementations differ.

    Needs: a decoder with output embeddings whose z goes straight into the output projection.
    Probe: ``RepeatedTokens`` (its first copy, so ``length=25`` is the paper's).
    Control: the token after the attended one in its place: what a head that raises any of the sample's tokens has.
    When not to use: for heads that copy through later layers. See ``ov_copying`` for the weights alone.
    """

    name: ClassVar[str] = "copying"
    summary: ClassVar[str] = "how much of what a head raises is the token it attends to"
    paper: ClassVar[str] = "Olsson et al. 2022, https://arxiv.org/abs/2209.11895"
    unit: ClassVar[str] = "fraction of the raise"
    probe: ClassVar[str] = "RepeatedTokens"
    control: ClassVar[str] = "the token after the attended one in its place"
    needs: ClassVar[str] = "a language model with output embeddings"

    attended: Literal["top", "weighted"] = "top"
    scale: Literal["ratio", "4r-1", "2r-1"] = "ratio"

    def __post_init__(self) -> None:
        if self.attended not in ("top", "weighted") or self.scale not in ("ratio", "4r-1", "2r-1"):
            raise AnalysisError(
                f"attended must be 'top' or 'weighted' and scale 'ratio', '4r-1' or '2r-1', got {self.attended!r}, {self.scale!r}"
            )

    @property
    def result_unit(self) -> str:
        return self.unit if self.scale == "ratio" else "fraction of the raise, as " + self.scale

    def default_probe(self) -> Any:
        from probes.repeated import RepeatedTokens

        return RepeatedTokens(length=25)

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        if not hasattr(sample, "last_copy"):
            raise AnalysisError(f"{self.name} needs samples of RepeatedTokens, got {type(sample).__name__}")
        start, stop = sample.start, sample.start + sample.length
        inputs = {k: v[:, :stop] for k, v in inputs_of(sample, model).items()}
        rows = list(range(start, stop))
        data = forward(model, inputs, Capture(z=True, rows=rows, queries=rows, stacks=("text",)), "text")
        sites = require_plain_heads(model, inputs, "text", self.name)
        directions = LogitDirections(model, inputs, sites, self.name)
        table = directions.unembedding.float()
        ids = inputs["input_ids"][0, start:stop]
        wanted = (table[ids] - table.mean(0)).cpu()
        found: list[Floats] = []
        for site in sites:
            layer = site.layer
            u = directions.of(rows, wanted, site.layer)
            z = torch.from_numpy(data["z"].sel(layer=layer).values[0, : site.n_heads, :, : site.v_head_dim])
            raised = torch.einsum("hrv,hvd,rnd->hrn", z, output_weight(model, site), u).clamp(min=0).numpy()
            a = data["row_attention"].sel(layer=layer).values[0, : site.n_heads, :, start:stop]
            found.append(np.stack([self._ratio(raised, a, shift) for shift in (0, 1)]))
        both = xr.DataArray(
            np.stack(found, 1), dims=("sample", "layer", "head"),
            coords={"layer": [site.layer for site in sites], "head": data["head"].values},
        )  # fmt: skip
        value, null = (on_grid(both.isel(sample=[n]), model, "text") for n in (0, 1))
        return value, null

    def _ratio(self, raised: Floats, a: Floats, shift: int) -> Floats:
        """``[head]`` from raises and weights ``[head, row, token]``."""
        total = raised.sum(-1)
        raised = np.roll(raised, -shift, -1)
        mine = (a * raised).sum(-1)
        if self.attended == "top":
            mine = np.take_along_axis(raised, a.argmax(-1)[..., None], -1)[..., 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(total > 0, mine / total, np.nan)
            mean = np.nansum(ratio, -1) / (~np.isnan(ratio)).sum(-1)
        return {"ratio": mean, "4r-1": 4 * mean - 1, "2r-1": 2 * mean - 1}[self.scale]
