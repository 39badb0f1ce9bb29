"""The tasks of a sweep on Ray: workers that each load the model once, and the driver that keeps what they give."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from interp.sweeps.local import REFUSED, message_of
from interp.sweeps.plan import Job, SweepError, Task
from interp.sweeps.progress import Progress

LOCAL = "local"
ATTEMPTS = 3
"""Times that a task is given out when its worker dies."""


def run_on_ray(
    job: Job, tasks: Sequence[Task], total: int, source: Any, load: Mapping[str, Any], settings: Mapping[str, Any], probe: Any,
    address: str, workers: int | None, progress: bool | Callable[[int, int], None],
) -> None:  # fmt: skip
    """As :func:`~interp.sweeps.local.run_here`, with the workers of a Ray cluster.

    Args:
        job, tasks, total, progress: as there.
        source, load: what :func:`interp.load` takes, on every worker.
        settings, probe: of the score.
        address: of the cluster, ``"auto"``, or ``"local"`` to start one here.
        workers: None is one a GPU, without GPUs one for two CPUs.

    Raises:
        SweepError: Ray is not installed, or no worker lives.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise SweepError("ray must be installed for this: pip install headscope[ray]") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=None if address == LOCAL else address, include_dashboard=False, log_to_driver=False)
    try:
        _run(
            ray,
            job,
            tasks,
            total,
            _Recipe(job.plan.score, os.fspath(source), dict(load), dict(settings), probe),
            workers,
            progress,
        )
    finally:
        if started:
            ray.shutdown()


class _Recipe:
    """What makes a worker."""

    def __init__(self, score: str, source: str, load: dict[str, Any], settings: dict[str, Any], probe: Any) -> None:
        self.score, self.source, self.load, self.settings, self.probe = score, source, load, settings, probe

    def make(self) -> Any:
        from interp.models.loading import load
        from interp.sweeps.worker import Worker

        return Worker(load(self.source, **self.load), self.score, self.settings, self.probe)


class _Remote:
    """A worker in a process of its own."""

    def __init__(self, recipe: _Recipe) -> None:
        self.worker = recipe.make()

    def run(self, task: Task) -> Any:
        """The result, or the message of a prompt that failed."""
        try:
            return self.worker.run(task)
        except REFUSED as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            return message_of(error)


def _run(
    ray: Any, job: Job, tasks: Sequence[Task], total: int, recipe: _Recipe, workers: int | None,
    progress: bool | Callable[[int, int], None],
) -> None:  # fmt: skip
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    count = min(len(tasks), workers or gpus or max(1, cpus // 2))
    # A share of the CPUs: an actor that asks for none is put anywhere, and its threads take them all the same.
    actor = ray.remote(num_gpus=1 if gpus else 0, num_cpus=1)(_Remote)
    left, tries = list(reversed(tasks)), dict.fromkeys((t.number for t in tasks), 0)
    running: dict[Any, tuple[Any, Task]] = {}

    def give(worker: Any) -> None:
        if left:
            task = left.pop()
            tries[task.number] += 1
            running[worker.run.remote(task)] = (worker, task)

    with Progress(total, total - len(tasks), progress) as bar:
        for _ in range(count):
            give(actor.remote(recipe))
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            worker, task = running.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except ray.exceptions.RayActorError as error:
                if tries[task.number] >= ATTEMPTS:
                    raise SweepError(
                        f"workers must live, and {ATTEMPTS} died at task {task.number}: {message_of(error)}"
                    ) from error
                left.append(task)
                give(actor.remote(recipe))
                continue
            if isinstance(result, str):
                job.write_error(task, result)
            else:
                job.write(task, *result)
            bar.advance()
            give(worker)
