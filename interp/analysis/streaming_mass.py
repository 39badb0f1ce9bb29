"""How much of its attention a head would keep if it streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.running import AnalysisError, Floats, HeadScore, inputs_of, on_grid
from interp.attention import Edit, Readout, attend
from interp.attention.edits import SinkWindow
from interp.models.anatomy import Site
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked

ROWS = Readout(row_stats=True)


@dataclass(frozen=True)
class StreamingMass(HeadScore):
    """Streaming mass: what sink and recent keys have of a head's attention (Xiao et al. 2024, https://arxiv.org/abs/2410.10819).

    Formula: mean over rows with more keys than the window of ``sum over j < sink or i - j < recent of A_ij``, from the log-sum-exp of the
    row with and without the other keys: ``exp(lse_stream - lse_full)`` where there is no learned sink. Linear in length, no training.

    Unit: fraction of row mass.

    Args:
        sink, recent: 64 and 256, DuoAttention's deployment.

    Probe: ``Passages(length=512)``, or an iterable of text inputs longer than the window. Control: a uniform head,
    ``(sink + recent) / (i + 1)``.
    When not to use: little mass can matter much: a retrieval head has a high value until there is something to retrieve.
    """

    name: ClassVar[str] = "streaming_mass"
    summary: ClassVar[str] = "share of attention on the first and the last keys, which a streaming cache keeps"
    paper: ClassVar[str] = "Xiao et al. 2024, https://arxiv.org/abs/2410.10819"
    unit: ClassVar[str] = "fraction of row mass"
    probe: ClassVar[str] = "Passages"
    control: ClassVar[str] = "a uniform head"

    sink: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise AnalysisError(f"sink must be at least 0 and recent at least 1, got {self.sink} and {self.recent}")

    def default_probe(self) -> Any:
        from probes.text import Passages

        return Passages(n=8, length=self.sink + self.recent + 192)

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        inputs = inputs_of(sample, model)
        window = self.sink + self.recent
        length = inputs["input_ids"].shape[1]
        if length <= window:
            raise AnalysisError(f"samples must have more than sink + recent = {window} tokens, got {length}")
        reader = _Kept(self.sink, self.recent)
        with hooked(model, interventions=[reader]):
            model(inputs)
        layers = sorted(reader.found)
        kept = [xr.DataArray(reader.found[n].numpy()[..., window:], dims=("sample", "head", "query")) for n in layers]
        by_head = xr.concat([k.assign_coords(head=np.arange(k.sizes["head"])) for k in kept], dim="layer", join="outer")
        value = on_grid(by_head.assign_coords(layer=layers).mean("query"), model, "text")
        uniform = float((window / np.arange(window + 1, length + 1)).mean())
        return value, np.where(np.isnan(value), np.nan, uniform)


class _Kept(Intervention):
    """Reads each call twice, with all keys and with the stream's; changes nothing."""

    def __init__(self, sink: int, recent: int) -> None:
        self.edit = Edit((SinkWindow(sink, recent),))
        self.found: dict[int, Tensor] = {}

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == "text"

    def before(self, call: SiteCall) -> None:
        if call.site.stack != "text":
            return
        readings = [
            attend(
                call.q, call.k, call.v, scale=call.scale, mask=call.mask, softcap=call.softcap, sinks=call.sinks, bias=call.bias,
                edit=edit, readout=ROWS, want_output=False,
            ).readings
            for edit in (None, self.edit)
        ]  # fmt: skip
        full, stream = readings
        assert full.lse is not None
        assert stream.lse is not None
        assert stream.mass is not None
        # Under a restriction the row sums to what a learned sink leaves of its smaller denominator.
        self.found[call.site.layer] = (stream.mass.sum(-1) * torch.exp(stream.lse - full.lse)).cpu()
