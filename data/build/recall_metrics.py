"""What a recall model can do, on sequences it has not seen, and what its heads do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recall_data import chunks
from recall_model import WINDOW, plan
from torch import Tensor

from probes.intervals import mean_interval
from probes.recall import N_VALUES, SPECIAL, TASKS, VOCABULARY, Batch, needles, repeated

CHANCE = {"repeated": 1 / (len(VOCABULARY) - len(SPECIAL)), "key_value": 1 / N_VALUES, "needle": 1 / N_VALUES}
"""Of one answer token, guessed among all that may stand there."""

SINK_TOKENS, SINK_EPSILON = 64, 0.3
"""T and epsilon of Gu et al. 2025, https://arxiv.org/abs/2410.10781."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """Answer tokens of a batch: NLL in nats and whether the most likely token is right, NaN elsewhere, ``[n, position]``."""

    loss: Floats
    right: Floats


def held_out(task: str, n: int, length: int, seed: int) -> Batch:
    """Sequences of a task with one question each; needles stand among distractors, one to 64 tokens."""
    rng = np.random.default_rng((seed, 7, length, list(TASKS).index(task)))
    if task == "needle":
        return needles(rng, n, length, count=max(1, length // 64))
    return TASKS[task](rng, n, length)


@torch.no_grad()
def judge(model: Any, batch: Batch) -> Judged:
    """Ask the model, with the right answer so far in front of each token (greedy text is right iff each token is)."""
    n, length = batch.ids.shape
    loss, right = np.full((2, n, length), np.nan)
    for rows in chunks(n, length):
        ids = torch.from_numpy(batch.ids[rows].astype(np.int64)).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss[rows, 1:] = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
        right[rows, 1:] = (logits.argmax(-1) == ids[:, 1:]).float().cpu()
    loss[~batch.answer], right[~batch.answer] = np.nan, np.nan
    return Judged(loss, right)


def accuracy(model: Any, task: str, n: int, length: int, seed: int) -> dict[str, Any]:
    """Accuracy by sequence with its bootstrap interval: of repeated, the share of right tokens; else all tokens right."""
    batch = held_out(task, n, length, seed)
    found = judge(model, batch)
    by_sequence = np.nanmean(found.right, 1) if task == "repeated" else np.nanmin(found.right, 1)
    made = mean_interval(by_sequence)
    return {
        "accuracy": made.value, "low": made.low, "high": made.high, "sequences": n, "loss": float(np.nanmean(found.loss)),
        "unit": "tokens of later copies" if task == "repeated" else "whole answers",
    }  # fmt: skip


def maps(model: Any, ids: NDArray[np.int32]) -> list[Tensor]:
    """Weights of every layer ``[batch, head, query, key]``."""
    kept: list[Tensor] = []
    with torch.no_grad(), plan(maps=kept):
        model(input_ids=torch.from_numpy(ids.astype(np.int64)).to(model.device), use_cache=False)
    return kept


def heads(model: Any, seed: int, n: int = 16) -> dict[str, Any]:
    """Induction score (weight on the token after the earlier occurrence) and first-token sink rate, by head and overall."""
    period = (SINK_TOKENS - 1) // 2
    copies = repeated(np.random.default_rng((seed, 8)), n, 2 * period + 1, period=period)
    rows = torch.arange(period + 1, 2 * period)
    induction = [p[:, :, rows, rows - period + 1].mean((0, 2)) for p in maps(model, copies.ids)]
    hay = held_out("needle", n, SINK_TOKENS, seed)
    alpha = [p[..., 0].mean(2) for p in maps(model, hay.ids)]
    sink = [(a > SINK_EPSILON).float().mean(0) for a in alpha]
    return {
        "induction_max": max(float(i.max()) for i in induction),
        "sink_rate": float(torch.stack(sink).mean()),
        "induction": [[round(v, 4) for v in i.tolist()] for i in induction],
        "first_token_weight": [[round(v, 4) for v in a.mean(0).tolist()] for a in alpha],
    }


def curve_point(model: Any, step: int, length: int, seed: int, n: int) -> dict[str, Any]:
    """One point of the training curve."""
    by_task = {task: accuracy(model, task, n, length, seed) for task in TASKS}
    picked = {task: {k: v[k] for k in ("accuracy", "loss")} for task, v in by_task.items()}
    return {"step": step, "length": length, "tasks": picked, **heads(model, seed)}


def leakage(model: Any, named: Mapping[int, Sequence[int]], length: int, seed: int, n: int) -> dict[str, Any]:
    """What is left of a planted model without its named heads (their output set to 0), beyond the reach of all others.

    Windows stack: over ``layers`` layers, heads that see ``WINDOW`` tokens carry at most ``layers * (WINDOW - 1)`` tokens
    far. Answers further from their source must be at chance, and the last row must not change by one bit when everything
    beyond that reach is replaced.
    """
    layers = len(model.model.layers)
    reach = layers * (WINDOW - 1)
    out: dict[str, Any] = {"reach": reach, "length": length}
    if length < reach + 32:
        return {**out, "note": "sequences are too short to look beyond the reach"}
    with plan(off=named):
        for task in TASKS:
            batch = held_out(task, n, length, seed)
            # The row that predicts a token stands one before it.
            far = batch.answer & (np.arange(length) - 1 - batch.source > reach)
            right = np.where(far, judge(model, batch).right, np.nan)
            some = far.any(1)
            made = mean_interval(np.nanmean(right[some], 1)) if some.any() else None
            out[task] = {
                "accuracy": made and made.value, "low": made and made.low, "high": made and made.high,
                "sequences": int(some.sum()), "chance": CHANCE[task],
            }  # fmt: skip
        batch = held_out("key_value", 2, length, seed)
        ids = torch.from_numpy(batch.ids[:1].astype(np.int64)).to(model.device).repeat(2, 1)
        ids[1, 1 : length - 1 - reach] = torch.randint(
            len(SPECIAL), len(VOCABULARY), (length - 2 - reach,), generator=torch.Generator().manual_seed(seed)
        ).to(ids.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        out["logit_change"] = float((logits[0] - logits[1]).abs().max())
    return out
