"""What the needle's positions write on the logit of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr

from interp.analysis.projections import LogitDirections, output_weight, require_plain_heads
from interp.analysis.retrieval import elsewhere
from interp.analysis.running import AnalysisError, Floats, HeadScore, forward, on_grid
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class NeedleContribution(HeadScore):
    """Logit contribution of the needle, after LOCOS (2026, https://arxiv.org/abs/2607.01002; only its abstract was read).

    Formula, mean over the rows t that should produce the answer's tokens w:
    ``sum over j in the answer's span of A_tj v_j W_O . u_t(w)``, u the unembedding of w (less the vocabulary's mean) through the final
    norm at the scale it had in the run. Prompt and right answer in one forward; from ``group_output``, linear in length. A head that
    looks at the needle but does not write it has no score.

    Unit: logits (direct path alone).

    Args:
        contrast: subtract the contribution of all other positions, as the abstract says (needle against off-needle).

    Needs: a decoder with output embeddings whose z goes straight into the output projection.
    Probe: ``NeedleInHaystack``, ``KeyValueTokens`` and kin. Control: a span of the same length elsewhere.
    When not to use: for heads that act through later layers.
    """

    name: ClassVar[str] = "needle_contribution"
    summary: ClassVar[str] = "what a head's reading of a hidden fact adds to the right token's logit"
    paper: ClassVar[str] = "LOCOS 2026, https://arxiv.org/abs/2607.01002"
    unit: ClassVar[str] = "logits"
    probe: ClassVar[str] = "NeedleInHaystack"
    control: ClassVar[str] = "a span of the same length elsewhere in the prompt"
    needs: ClassVar[str] = "a language model with output embeddings"

    contrast: bool = False

    def default_probe(self) -> Any:
        from probes.needle import NeedleInHaystack

        return NeedleInHaystack()

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        missing = [n for n in ("ids", "answer_span", "needle_span", "answer_ids") if not hasattr(sample, n)]
        if missing:
            raise AnalysisError(
                f"{self.name} needs samples of NeedleInHaystack, got {type(sample).__name__} without {missing}"
            )
        answer = list(sample.answer_ids)
        ids = torch.tensor([[*sample.ids, *answer[:-1]]], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rows = list(range(len(sample.ids) - 1, ids.shape[1]))
        groups = np.zeros(ids.shape[1], dtype=np.int64)
        for code, span in (
            (1, sample.answer_span),
            (2, elsewhere(len(sample.ids), sample.answer_span, sample.needle_span)),
        ):
            groups[slice(*span)] = code
        capture = Capture(
            group_output=rows,
            stacks=("text",),
            groups=torch.from_numpy(groups),
            group_names=("rest", "needle", "control"),
        )
        outputs = forward(model, inputs, capture, "text")["group_output"]
        contribution = contributions(model, inputs, outputs, answer, rows, self.name).mean("output_row")
        needle, control = contribution.sel(group="needle"), contribution.sel(group="control")
        if self.contrast:
            total = contribution.sum("group", skipna=False)
            needle, control = 2 * needle - total, 2 * control - total
        return on_grid(needle, model, "text"), on_grid(control, model, "text")


def contributions(
    model: Model, inputs: dict[str, Any], outputs: xr.DataArray, tokens: list[int], rows: list[int], name: str
) -> xr.DataArray:
    """Logits ``[sample, layer, head, output_row, group]`` that each key group adds to the token of each row.

    Args:
        model: the model.
        inputs: of the forward, one sample.
        outputs: ``group_output`` of it, ``[sample, layer, head, output_row, group, dim]``.
        tokens: one id a row.
        rows: the rows of ``outputs``.
        name: of the score, for errors.
    """
    sites = require_plain_heads(model, inputs, "text", name)
    directions = LogitDirections(model, inputs, sites, name)
    table = directions.unembedding
    wanted = (table[torch.tensor(tokens, device=table.device)] - table.float().mean(0).to(table.dtype)).float()[:, None]
    parts: list[xr.DataArray] = []
    for site in sites:
        layer = site.layer
        u = directions.of(rows, wanted, site.layer)[:, 0]
        by_head = torch.einsum("hvd,rd->hrv", output_weight(model, site), u)
        heads = [int(h) for h in outputs["head"].values if h < site.n_heads]
        part = outputs.sel(layer=layer, head=heads).isel(dim=slice(0, site.v_head_dim))
        weight = xr.DataArray(by_head[heads].numpy(), dims=("head", "output_row", "dim"), coords={"head": heads})
        parts.append((part * weight).sum("dim", skipna=False))
    return xr.concat(parts, dim="layer")
