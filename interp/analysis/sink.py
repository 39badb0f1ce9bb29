"""Attention sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from interp.analysis.running import AnalysisError, Floats, HeadScore, forward, inputs_of, on_grid
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class Sink(HeadScore):
    """Sink metric of Gu et al. 2025, https://arxiv.org/abs/2410.10781, section 3.

    Formula, keys and rows counted from 1: ``alpha_k = 1 / (T - k + 1) * sum_{i >= k} A_ik``, the mean weight that key k gets
    from the rows that can see it; the sample counts if ``alpha_k > epsilon``. Value = share of samples that count (the paper
    averages over layers and heads as well and reports percent). ``received [sample, layer, head, key]`` is all it needs: memory
    is linear in T.

    Unit: fraction of samples; with ``measure="mass"`` alpha_k itself, fraction of row mass.

    Args:
        stack: which heads.
        key: k counted from 0: 0 is the first token (the paper's k = 1).
        length: T, 64 in the paper's code. Text is cut to exactly T tokens; other stacks are taken whole.
        epsilon: 0.3, the paper's.
        measure: ``"share"`` (paper) or ``"mass"``.

    Probe: ``Passages(n=64, length=T)`` by default, or an iterable of inputs: text ones of at least T unpadded tokens.
    Control: the same for the key in the middle, ``T // 2``: a head that spreads its attention evenly passes neither.
    When not to use: to compare different T (alpha_1 of a uniform head is ``(1 / T) sum_i 1 / i``: 0.07 for T = 64, and more for a
    shorter one). With a sliding window shorter than T, late rows cannot see the first key; they still count in T. Where
    attention is not causal, alpha_k is the mean over all rows.
    """

    name: ClassVar[str] = "sink"
    summary: ClassVar[str] = (
        "share of samples in which a head puts more than epsilon of its attention on the first token"
    )
    paper: ClassVar[str] = "Gu et al. 2025, https://arxiv.org/abs/2410.10781"
    unit: ClassVar[str] = "fraction of samples"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "Passages"
    control: ClassVar[str] = "the key in the middle"

    stack: str = "text"
    key: int = 0
    length: int = 64
    epsilon: float = 0.3
    measure: Literal["share", "mass"] = "share"

    def __post_init__(self) -> None:
        if self.measure not in ("share", "mass"):
            raise AnalysisError(f"measure must be 'share' or 'mass', got {self.measure!r}")
        if self.length < 2 or not 0 <= self.key < self.length:
            raise AnalysisError(
                f"length must be at least 2 and key within it, got length={self.length}, key={self.key}"
            )
        if not 0 <= self.epsilon < 1:
            raise AnalysisError(f"epsilon must lie in [0, 1), got {self.epsilon}")

    def default_probe(self) -> Any:
        if self.stack != "text":
            raise AnalysisError(
                f"probe must be given for stack {self.stack!r}: an iterable of inputs, as model.encode makes them"
            )
        from probes.text import Passages

        return Passages(n=64, length=self.length)

    @property
    def result_unit(self) -> str:
        return "fraction of samples" if self.measure == "share" else "fraction of row mass"

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        inputs = inputs_of(sample, model)
        text = self.stack == "text"
        if text:
            inputs = cut(inputs, self.length)
        data = forward(model, inputs, Capture(received=True, stacks=(self.stack,)), self.stack)
        prefill = data[["received", "received_rows"]].isel(query_group=0)
        n_keys = prefill.sizes["key"]
        if self.key >= n_keys:
            raise AnalysisError(f"key must be within the {n_keys} keys of stack {self.stack!r}, got {self.key}")
        out: list[Floats] = []
        for key in (self.key, n_keys // 2):
            here = prefill.isel(key=key)
            # Rows that can see the key: of text, all from the key on, as the paper counts them.
            rows = n_keys - key if text else here["received_rows"].where(here["received_rows"] > 0)
            share = on_grid(here["received"] / rows, model, self.stack)
            out.append(share if self.measure == "mass" else above(share, self.epsilon))
        return out[0], out[1]


def alpha(attention: Floats) -> Floats:
    """alpha_k of every key ``[..., key]`` of causal maps ``[..., query, key]``; the formula in eager, for checks."""
    length = attention.shape[-1]
    return attention.sum(axis=-2) / (length - np.arange(length))


def above(values: Floats, epsilon: float) -> Floats:
    """1 where ``values > epsilon``, else 0; NaN stays."""
    return np.where(np.isnan(values), np.nan, (values > epsilon).astype(np.float64))


def cut(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Text inputs of exactly ``length`` tokens.

    Raises:
        AnalysisError: not only text, padded, or too short.
    """
    other = sorted(set(inputs) - {"input_ids", "attention_mask"})
    if other or "input_ids" not in inputs:
        raise AnalysisError(
            f"the sink of the text stack is measured on text alone (input_ids, attention_mask), got also {other}"
        )
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    if ids.shape[1] < length or not bool(mask[:, :length].all()):
        raise AnalysisError(f"samples must have at least length={length} unpadded tokens, got {int(mask.sum(1).min())}")
    return {"input_ids": ids[:, :length], "attention_mask": mask[:, :length]}
