"""Attention entropy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr

from interp.analysis.running import AnalysisError, Floats, HeadScore, forward, inputs_of, on_grid
from interp.models.anatomy import anatomy
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class Entropy(HeadScore):
    """Attention entropy, as in Zhai et al. 2023, https://arxiv.org/abs/2303.06296, section 3.

    Formula: ``H_i = -sum_j A_ij ln A_ij`` (0 ln 0 = 0); value = mean of H_i over the real rows i of a sample (pads are left
    out). Readings ``[sample, layer, head, query]`` become ``[sample, layer, head]``. Memory is linear in length.

    Unit: nats, 0 (one key) to ln(number of visible keys). A model with a learned sink logit has rows that sum to less than
    1; H is not renormalised.

    Args:
        stack: which heads.
        normalise: divide H_i by ``ln(i + 1)``, its largest value in a causal row, or by ``ln(number of keys)`` where attention
            is not causal; rows with a single key are left out. With a sliding window the largest value is smaller.
        shuffle_seed: of the control.

    Probe: ``Passages`` by default; any probe of text, or an iterable of inputs (those of images for the vision stack).
    Control: the same tokens in a random order (special tokens and image tokens stay where they are). What is left of a low
    entropy then comes from position and token identity, not from what the text says. No control for inputs without ids.
    When not to use: to compare samples of different length without ``normalise``; to tell what a head looks at.
    """

    name: ClassVar[str] = "entropy"
    summary: ClassVar[str] = "mean entropy of a head's attention rows: low is focused, high is diffuse"
    paper: ClassVar[str] = "Zhai et al. 2023, https://arxiv.org/abs/2303.06296"
    unit: ClassVar[str] = "nats"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "Passages"
    control: ClassVar[str] = "shuffled tokens"

    stack: str = "text"
    normalise: bool = False
    shuffle_seed: int = 0

    def default_probe(self) -> Any:
        if self.stack != "text":
            raise AnalysisError(
                f"probe must be given for stack {self.stack!r}: an iterable of inputs, as model.encode makes them"
            )
        from probes.text import Passages

        return Passages()

    @property
    def result_unit(self) -> str:
        return "fraction of the largest entropy" if self.normalise else self.unit

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        inputs = inputs_of(sample, model)
        value = self.mean(model, inputs)
        shuffled = shuffle(inputs, model, self.shuffle_seed) if self.stack == "text" else None
        return value, None if shuffled is None else self.mean(model, shuffled)

    def mean(self, model: Model, inputs: Mapping[str, Any]) -> Floats:
        """Mean over the real rows, ``[sample, layer, head]``."""
        data = forward(model, inputs, Capture(row_stats=True, stacks=(self.stack,)), self.stack)
        entropy = data["entropy"]
        if self.normalise:
            causal = all(site.causal for site in anatomy(model.module).stacks[self.stack])
            entropy = entropy / largest_entropy(data, causal)
        return on_grid(entropy.mean("query", skipna=True), model, self.stack)


def largest_entropy(data: xr.Dataset, causal: bool) -> xr.DataArray:
    """``ln`` of the number of keys of each row ``[sample, query]``, NaN for rows with one key (their entropy is always 0)."""
    real = data["entropy"].notnull().any(["layer", "head"])
    if causal:
        counts = (
            data["position_in_sample"] + 1
            if "position_in_sample" in data
            else xr.zeros_like(real, dtype=int) + data["query"] + 1
        )
    else:
        counts = xr.zeros_like(real, dtype=int) + real.sum("query")
    return xr.apply_ufunc(np.log, counts.where(real & (counts > 1)).astype(float))


def shuffle(inputs: Mapping[str, Any], model: Model, seed: int) -> dict[str, Any] | None:
    """The inputs with ordinary tokens permuted within each sample; None where there are no ids."""
    from probes.samples import special_ids

    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        return None
    kept = torch.tensor(sorted(special_ids(model.tokenizer, model.config)), dtype=ids.dtype, device=ids.device)
    free = ~torch.isin(ids, kept)
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        free &= mask.bool()
    rng = np.random.default_rng(seed)
    out = ids.clone()
    for row, movable in zip(out, free, strict=True):
        where = movable.nonzero().flatten()
        order = torch.from_numpy(rng.permutation(len(where))).to(ids.device)
        row[where] = row[where][order]
    return {**inputs, "input_ids": out}
