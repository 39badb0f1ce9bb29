"""The training loop of the recall model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from recall_data import Feed
from torch.nn.functional import cross_entropy

WARM = 0.03


@dataclass(frozen=True)
class Settings:
    """Of one training.

    Attributes:
        seed: of weights and data.
        steps: optimiser steps.
        minutes: a cap: when it comes near, schedule and curriculum run by the clock, so that they still come to their end.
        tokens: in one batch.
        longest: length at the end of the curriculum.
        rate: peak learning rate.
        workers: processes that make batches.
        compile: run the model through ``torch.compile``.
    """

    seed: int
    steps: int
    minutes: float
    tokens: int
    longest: int
    rate: float
    workers: int
    compile: bool


def train(
    model: Any, settings: Settings, device: torch.device, watch: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Train in place (fp32 weights, bf16 autocast on CUDA, AdamW, warm-up and cosine).

    Args:
        model: on ``device``.
        settings: see there.
        device: where.
        watch: called as ``watch(step, loss)`` before the first step (with NaN) and after each.

    Returns:
        Steps, tokens, minutes, and the loss of every step.
    """
    # The embedding is the head too: no decay. One-dimensional weights are norms.
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), fused=cuda)

    def token_losses(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    run: Any = token_losses
    if settings.compile:
        # What cannot be compiled runs as it is: a slower training, not a failed one.
        import_module("torch._dynamo").config.suppress_errors = True
        run = torch.compile(token_losses)
    feed = Feed(settings.seed, settings.tokens, settings.longest, settings.workers)
    losses: list[torch.Tensor] = []
    seen = 0
    if watch is not None:
        watch(0, math.nan)
    start = time.monotonic()
    try:
        for step in range(settings.steps):
            by_clock = (time.monotonic() - start) / (60 * settings.minutes)
            progress = max(step / settings.steps, by_clock)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * _schedule(progress)
            ids, weights = feed.take(progress)
            seen += ids.size
            ids_there = (
                torch.from_numpy(ids).pin_memory().to(device, non_blocking=True) if cuda else torch.from_numpy(ids)
            )
            weights_there = torch.from_numpy(weights[:, 1:].copy()).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                each = run(ids_there.long())
            loss = (each * weights_there).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            if watch is not None:
                watch(step + 1, loss)
    finally:
        feed.close()
    values = torch.stack(losses).tolist()
    return {"steps": len(values), "tokens": seen, "minutes": (time.monotonic() - start) / 60, "loss": values}


def _schedule(progress: float) -> float:
    if progress < WARM:
        return max(0.01, progress / WARM)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - WARM) / (1 - WARM)))
