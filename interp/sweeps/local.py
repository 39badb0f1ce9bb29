"""The tasks of a sweep one after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from interp.sweeps.plan import Job, Task
from interp.sweeps.progress import Progress
from interp.sweeps.worker import Worker

REFUSED = (ValueError, RuntimeError, ArithmeticError)
"""What one prompt may fail with while the rest goes on; anything else is a mistake of ours, or the end of the process."""


def run_here(
    job: Job, tasks: Sequence[Task], total: int, worker: Worker, progress: bool | Callable[[int, int], None]
) -> None:
    """Run tasks and keep each result when it is there.

    Args:
        job: where results go.
        tasks: what is left.
        total: tasks in all, those done before included.
        worker: what does them.
        progress: see :class:`~interp.sweeps.progress.Progress`.
    """
    with Progress(total, total - len(tasks), progress) as bar:
        for task in tasks:
            try:
                job.write(task, *worker.run(task))
            except torch.OutOfMemoryError:
                raise
            except REFUSED as error:
                job.write_error(task, message_of(error))
            bar.advance()


def message_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
