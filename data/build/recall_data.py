"""Batches of the recall world for training: what one step sees is a function of seed, step and length alone."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from probes.recall import TASKS, Batch

TRAINING = 2**32
"""Seeds from here on are of training; probes and held-out sequences use smaller ones."""

OTHER = 0.1
"""Weight of all tokens that no recall can tell (hay, keys, the first copy): the model learns the language too."""

LENGTHS = (64, 128, 256, 512, 1024)
SHARES = (0.30, 0.15, 0.15, 0.20, 0.20)
"""Of the training, by the longest length so far."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """One step's batch: a third of its rows each task."""

    seed: int
    step: int
    length: int
    rows: int


def one_task(rng: np.random.Generator, task: str, rows: int, length: int) -> Batch:
    """Sequences as training has them: several questions each, so that a sequence has many answers to learn from."""
    if task == "key_value":
        return TASKS[task](rng, rows, length, questions=int(rng.integers(1, max(1, length // 16) + 1)))
    if task == "needle":
        count = int(rng.integers(1, max(1, length // 32) + 1))
        return TASKS[task](rng, rows, length, count=count, questions=int(rng.integers(1, count + 1)))
    return TASKS[task](rng, rows, length)


def make(job: Job) -> tuple[NDArray[np.int16], Floats]:
    """Ids ``[row, position]`` and the weight of every token in the loss; the answers of a task weigh 1/3 together."""
    rng = np.random.default_rng((TRAINING + job.seed, job.step))
    ids: list[NDArray[np.int16]] = []
    weights: list[Floats] = []
    for task in TASKS:
        batch = one_task(rng, task, max(1, job.rows // len(TASKS)), job.length)
        wanted = batch.answer | batch.end
        other = ~wanted
        other[:, 0] = False
        ids.append(batch.ids.astype(np.int16))
        weights.append((wanted / wanted.sum() + OTHER * other / other.sum()).astype(np.float32) / len(TASKS))
    return np.concatenate(ids), np.concatenate(weights)


def length_at(progress: float, seed: int, step: int, longest: int) -> int:
    """Length of a step's sequences: the curriculum's present one, one time in four a shorter one."""
    lengths = [n for n in LENGTHS if n < longest] + [longest]
    shares = np.array([*SHARES[: len(lengths) - 1], sum(SHARES[len(lengths) - 1 :])])
    present = min(int(np.searchsorted(np.cumsum(shares), progress, side="right")), len(lengths) - 1)
    rng = np.random.default_rng((TRAINING + seed, step, 1))
    return lengths[int(rng.integers(present + 1))] if rng.random() < 0.25 else lengths[present]


class Feed:
    """Batches in the order of steps, made ahead in worker processes (0 workers: on demand)."""

    def __init__(self, seed: int, tokens: int, longest: int, workers: int) -> None:
        self.seed, self.tokens, self.longest, self.ahead = seed, tokens, longest, max(1, workers * 4)
        # Spawned: children forked from a process with CUDA or threads are not safe. They import numpy, not torch.
        self.pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers else None
        self.waiting: deque[Future[tuple[NDArray[np.int16], Floats]]] = deque()
        self.next = 0

    def take(self, progress: float) -> tuple[NDArray[np.int16], Floats]:
        """The next step's batch; ``progress`` of the training, 0 to 1, sets the length of the one that is ordered now."""
        while len(self.waiting) < self.ahead:
            length = length_at(progress, self.seed, self.next, self.longest)
            job = Job(self.seed, self.next, length, self.tokens // length)
            self.next += 1
            if self.pool is None:
                return make(job)
            self.waiting.append(self.pool.submit(make, job))
        return self.waiting.popleft().result()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def chunks(rows: int, length: int, tokens: int = 2**16) -> Iterator[slice]:
    """Slices of rows with at most ``tokens`` tokens each."""
    step = max(1, tokens // length)
    yield from (slice(start, min(rows, start + step)) for start in range(0, rows, step))
