"""Logits of a forward at the positions that are read, and no others where the model can leave them out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.analysis.running import AnalysisError
from interp.models.model import Model


def forward_options(model: Model, inputs: Mapping[str, Any], positions: Sequence[int] | None) -> dict[str, Any]:
    """Keyword arguments of a forward without cache that gives logits at ``positions`` (negative ones from the end)."""
    parameters = inspect.signature(model.module.forward).parameters
    options: dict[str, Any] = {}
    if "use_cache" in parameters:
        options["use_cache"] = False
    if positions is not None and "logits_to_keep" in parameters:
        length = inputs["input_ids"].shape[1]
        at = [p + length if p < 0 else p for p in positions]
        options["logits_to_keep"] = torch.tensor(at, device=model.device)
    return options


def logits_of(model: Model, output: Any, positions: Sequence[int] | None) -> Tensor:
    """Logits ``[batch, position, class]``, fp32 at least, of what a forward with :func:`forward_options` gave.

    A classifier has one position.

    Raises:
        AnalysisError: the model gives none.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise AnalysisError(f"model must give logits [batch, position, class], {type(model.module).__name__} does not")
    if logits.ndim == 2:
        logits = logits[:, None]
    elif positions is not None and "logits_to_keep" not in inspect.signature(model.module.forward).parameters:
        logits = logits[:, list(positions)]
    return logits if logits.dtype == torch.float64 else logits.float()
