"""AttentionInfluence: texts ranked by what they lose when retrieval heads are masked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.running import AnalysisError, as_model, track
from interp.attention import Edit
from interp.attention.edits import Uniform
from interp.files import local_path, write_whole
from interp.heads import Heads, as_heads
from interp.models.anatomy import Site, anatomy
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked

PAPER = "Hua et al. 2025, https://arxiv.org/abs/2505.07293"
SHARE = 0.05
"""Share of all heads that the paper masks."""


@dataclass(frozen=True)
class Influence:
    """What masking the heads costs one text.

    Attributes:
        loss: mean cross-entropy of its tokens, nats.
        masked_loss: the same with the heads' attention uniform.
        n_tokens: tokens that were predicted.
    """

    loss: float
    masked_loss: float
    n_tokens: int

    @property
    def value(self) -> float:
        """``(masked_loss - loss) / loss``, eq. 5 (the paper's figure 3 prints the other denominator)."""
        return (self.masked_loss - self.loss) / self.loss


def attention_influence(
    model: Any, texts: Iterable[str], heads: Any, *, max_length: int = 4096, progress: bool = True
) -> list[Influence]:
    """AttentionInfluence, Hua et al. 2025, https://arxiv.org/abs/2505.07293, of each text.

    The heads' rows are made uniform, ``1 / (i + 1)`` in row i, at all positions; two forwards a text.

    Args:
        model: a language model with a tokenizer.
        texts: what to score.
        heads: the retrieval heads, see :func:`strongest`; whatever :func:`interp.heads.as_heads` takes.
        max_length: tokens of a text that are read.
        progress: show a bar where the output is a terminal.

    Raises:
        AnalysisError: a text of fewer than two tokens, or a loss that is not finite (says which text, counted from 1).
        HeadError: heads that the model does not have.
    """
    model = as_model(model)
    mask = _Masked(_checked(heads, model))
    items = list(texts)
    out: list[Influence] = []
    for number, text in enumerate(track(items, "attention influence", progress), 1):
        try:
            out.append(_influence(model, text, mask, max_length))
        except AnalysisError as error:
            raise AnalysisError(f"text {number}: {error}") from error
    return out


def strongest(score: xr.Dataset, share: float = SHARE) -> Heads:
    """The ``share`` of a retrieval score's heads with the largest value: 5 % in the paper, at least one.

    Raises:
        AnalysisError: a share outside (0, 1], or a score without numbers.
    """
    if not 0 < share <= 1:
        raise AnalysisError(f"share must lie in (0, 1], got {share}")
    known = int(np.isfinite(score["value"].values).sum())
    if not known:
        raise AnalysisError("the score has no numbers: did the model solve none of its prompts?")
    return score.heads.top(max(1, round(share * known)))


@dataclass(frozen=True)
class Ranked:
    """A ranked file.

    Attributes:
        records: what was scored, best first: the line's own object with ``attention_influence``, ``loss``, ``masked_loss``,
            ``line`` (counted from 1), ``rank`` and ``selected`` within its domain.
        problems: ``(line, why)`` of every line that was left out.
    """

    records: list[dict[str, Any]]
    problems: list[tuple[int, str]]


def rank_jsonl(
    model: Any,
    path: str | os.PathLike[str],
    heads: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    field: str = "text",
    domain: str | None = None,
    top: float = 0.2,
    max_length: int = 4096,
    progress: bool = True,
) -> Ranked:
    """Rank the texts of a JSONL file. A line that cannot be used is named by its number, and the rest goes on.

    Values compare within one domain only (code against code): give ``domain`` where a file mixes them.

    Args:
        model: as for :func:`attention_influence`.
        path: one JSON object a line.
        heads: likewise.
        out: JSONL to write, best first.
        field: which entry of the object is the text.
        domain: entry that names the domain; None takes the file for one.
        top: share of each domain that is ``selected``, 0.2 in the paper.
        max_length: likewise.
        progress: likewise.

    Raises:
        AnalysisError: no line can be used, or a share outside (0, 1].
        FileNotFoundError: no such file.
        HeadError: heads that the model does not have.
    """
    if not 0 < top <= 1:
        raise AnalysisError(f"top must lie in (0, 1], got {top}")
    model = as_model(model)
    mask = _Masked(_checked(heads, model))
    records: list[dict[str, Any]] = []
    problems: list[tuple[int, str]] = []
    lines = list(_lines(local_path(path)))
    for number, line in track(lines, "attention influence", progress):
        try:
            record = _record(line, field, domain)
            found = _influence(model, record[field], mask, max_length)
        except AnalysisError as error:
            problems.append((number, str(error)))
            continue
        scored = {"attention_influence": found.value, "loss": found.loss, "masked_loss": found.masked_loss}
        records.append({**record, **scored, "line": number})
    if not records:
        shown = "; ".join(f"line {n}: {why}" for n, why in problems[:3]) or "it is empty"
        raise AnalysisError(f"{path} must have at least one line that can be used: {shown}")
    records.sort(key=lambda r: -r["attention_influence"])
    groups: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[domain] if domain else None, []).append(record)
    for members in groups.values():
        for rank, record in enumerate(members, 1):
            record["rank"] = rank
            record["selected"] = rank <= max(1, round(top * len(members)))
    if out is not None:
        write_whole(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return Ranked(records, problems)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    yield from enumerate(path.read_bytes().splitlines(), 1)


def _record(line: bytes, field: str, domain: str | None) -> dict[str, Any]:
    if not line.strip():
        raise AnalysisError("the line is empty")
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise AnalysisError(f"not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise AnalysisError(f"no JSON: {error}") from error
    if not isinstance(record, dict):
        raise AnalysisError(f"must be an object, got {type(record).__name__}")
    if not isinstance(record.get(field), str):
        raise AnalysisError(f"must have a text in {field!r}, got {type(record.get(field)).__name__}")
    if domain is not None and not isinstance(record.get(domain), str | int):
        raise AnalysisError(f"must have a domain in {domain!r}, got {type(record.get(domain)).__name__}")
    return record


def _influence(model: Model, text: str, mask: _Masked, max_length: int) -> Influence:
    ids: Tensor = model.encode(text)["input_ids"][:, :max_length] if text else torch.zeros(1, 0, dtype=torch.int64)
    if ids.shape[1] < 2:
        raise AnalysisError(f"a text must have at least two tokens, got {ids.shape[1]}")
    with torch.no_grad():
        loss = _loss(model, ids)
        with hooked(model, interventions=[mask]):
            masked = _loss(model, ids)
    if not (math.isfinite(loss) and math.isfinite(masked)) or loss <= 0:
        raise AnalysisError(f"losses must be finite and above 0, got {loss} and {masked}")
    return Influence(loss, masked, ids.shape[1] - 1)


def _loss(model: Model, ids: Tensor) -> float:
    logits: Tensor = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, :-1]
    total = torch.zeros((), dtype=torch.float64)
    # A part at a time: fp32 logits of 4096 rows and a large vocabulary would be gigabytes.
    for start in range(0, len(logits), 512):
        part = logits[start : start + 512].float()
        total += torch.nn.functional.cross_entropy(
            part, ids[0, start + 1 : start + 513].to(part.device), reduction="sum"
        ).cpu()
    return float(total / len(logits))


def _checked(heads: Any, model: Model) -> Heads:
    chosen = as_heads(heads, anatomy(model.module).shapes())
    if not len(chosen):
        raise AnalysisError("heads must name at least one head, got none")
    return chosen


class _Masked(Intervention):
    """Uniform rows for the heads, everywhere."""

    def __init__(self, heads: Heads) -> None:
        self.by_layer: dict[tuple[str, int], Sequence[int]] = {
            (stack, layer): numbers for stack in heads.by_stack() for layer, numbers in heads.by_layer(stack).items()
        }

    def acts_on(self, site: Site, run: RunState) -> bool:
        return (site.stack, site.layer) in self.by_layer

    def before(self, call: SiteCall) -> Edit | None:
        numbers = self.by_layer.get((call.site.stack, call.site.layer))
        return None if numbers is None else Edit((Uniform(call.heads(list(numbers))),))
