"""TransformerLens' head detector: how much a head's whole map is like a pattern."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from interp.analysis.running import AnalysisError, Floats, as_model, forward, inputs_of, require_stack
from interp.tracing.capture import Capture

Pattern = Literal["previous_token", "duplicate_token", "induction"]
PATTERNS = ("previous_token", "duplicate_token", "induction")


def head_detector(
    model: Any,
    sample: Any,
    pattern: Pattern | NDArray[Any],
    *,
    measure: Literal["mul", "abs"] = "mul",
    exclude_first: bool = False,
    exclude_current: bool = False,
) -> xr.DataArray:
    """Likeness of every head's map A to a pattern D, as TransformerLens' ``detect_head``, https://github.com/TransformerLensOrg/TransformerLens.

    ``mul``: ``sum(A * D) / sum(A)``, the options setting the first column or the diagonal of A to 0 before both sums. ``abs``: ``1 -
    mean over rows of sum_j |A_ij - D_ij|``, the options leaving those differences out. Equal to ``detect_head`` of TransformerLens 4.3
    on the same tokens (tested on GPT-2, Llama and Gemma shapes), but for its rounding of ``abs`` to 3 decimals. Its pitfalls:

    - ``mul`` counts rows in which D is empty: a perfect previous-token head has ``(T - 1) / T``, a perfect induction head on ``[x; x]``
      under one half. Compare heads on one sequence, not numbers across lengths.
    - It takes text and puts a BOS before it unless the tokenizer does; here the inputs are taken as they are. With ``exclude_bos`` it
      drops position 0, whatever stands there.
    - Padding is not considered (refused here); heads not asked for get -1 (``missing=-1`` of :func:`interp.scores_from_lens`); scores
      are in the model's dtype.
    - Before 4.3 ``mul`` wrote the options into the cache it was given, and a list of sequences lost its options.

    When not to use: the scores of the same names (``interp.score("induction", ...)``) leave out empty rows, are linear in length, and
    have controls.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        sample: a probe's sample, or inputs of one unpadded sequence.
        pattern: by name, of the sample's tokens, or a matrix ``[T, T]``, lower triangular.
        measure: ``mul`` or ``abs``.
        exclude_first: without attention to the first position (``exclude_bos``).
        exclude_current: without attention to oneself (``exclude_current_token``).

    Returns:
        ``[layer, head]``.

    Raises:
        AnalysisError: an unknown pattern or measure, a matrix of another shape or with entries above the diagonal, padded inputs.
    """
    if measure not in ("mul", "abs"):
        raise AnalysisError(f"measure must be 'mul' or 'abs', got {measure!r}")
    model = as_model(model)
    require_stack(model, "text")
    inputs = inputs_of(sample, model)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if ids.shape[0] != 1 or (mask is not None and not bool(mask.all())):
        raise AnalysisError(f"inputs must be one sequence without pads, got {list(ids.shape)}")
    wanted = (
        detection_pattern(pattern, ids[0].tolist())
        if isinstance(pattern, str)
        else np.asarray(pattern, dtype=np.float64)
    )
    if wanted.shape != (ids.shape[1], ids.shape[1]) or np.triu(wanted, 1).any():
        raise AnalysisError(f"pattern must be lower triangular of shape {(ids.shape[1],) * 2}, got {wanted.shape}")
    with torch.no_grad():
        data = forward(model, inputs, Capture(attention=True, stacks=("text",)), "text")
    found = likeness(
        data["attention"].isel(sample=0).transpose("layer", "head", "query", "key").values.astype(np.float64), wanted, measure,
        exclude_first=exclude_first, exclude_current=exclude_current,
    )  # fmt: skip
    coords = {"layer": data["layer"].values, "head": data["head"].values}
    return xr.DataArray(
        found, dims=("layer", "head"), coords=coords, attrs={"pattern": str(pattern)[:40], "measure": measure}
    )


def detection_pattern(name: str, ids: list[int]) -> Floats:
    """The pattern of a sequence ``[T, T]``.

    Raises:
        AnalysisError: an unknown name.
    """
    if name not in PATTERNS:
        raise AnalysisError(f"pattern must be one of {PATTERNS}, got {name!r}")
    n = len(ids)
    if name == "previous_token":
        return np.eye(n, k=-1)
    tokens = np.array(ids)
    duplicate = np.tril(tokens[:, None] == tokens[None], -1).astype(np.float64)
    if name == "duplicate_token":
        return duplicate
    # The token after an earlier occurrence: one column to the right.
    shifted = np.roll(duplicate, 1, axis=1)
    shifted[:, 0] = 0
    return np.tril(shifted)


def likeness(
    a: Floats, pattern: Floats, measure: str, *, exclude_first: bool = False, exclude_current: bool = False
) -> Floats:
    """``[...]`` of maps ``[..., T, T]``."""
    kept = np.ones(a.shape[-2:])
    if exclude_first:
        kept[:, 0] = 0
    if exclude_current:
        np.fill_diagonal(kept, 0)
    if measure == "abs":
        return 1 - (np.abs(a - pattern) * kept).sum((-1, -2)) / a.shape[-1]
    a = a * kept
    total = a.sum((-1, -2))
    return np.where(total > 0, (a * pattern).sum((-1, -2)) / np.where(total > 0, total, 1), np.nan)
