"""Work on models: one worker thread that owns them, a queue in front of it, and a log of events behind it.

A job is plain data (kind and JSON spec), so that one that was interrupted can be taken up by the next process. Threads of
the web server never touch a model: they submit a job, or ``call`` for something brief, which goes before all jobs and also
between two steps of a running one.
"""

from __future__ import annotations

import heapq
import itertools
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dashboards.errors import PageError, explain
from interp.files import write_whole

State = Literal["queued", "running", "done", "failed", "cancelled"]
BRIEF, GENERATION, RUN, SCORE, SWEEP = range(5)
"""Priorities: what is brief or watched goes first."""
MAX_QUEUED = 64
KEPT_EVENTS = 20_000
KEPT_JOBS = 200


class Cancelled(Exception):
    """Raised inside a job that somebody stopped."""


@dataclass(eq=False)
class Job:
    """One piece of work.

    Attributes:
        kind: which function does it.
        spec: its arguments, JSON.
        done, total: steps; total 0 where it is not known.
        result: JSON, when done.
        partial: what is there so far, JSON.
    """

    id: str
    kind: str
    title: str
    spec: Mapping[str, Any]
    priority: int
    queue: JobQueue
    state: State = "queued"
    done: int = 0
    total: int = 0
    error: str = ""
    result: Any = None
    partial: Any = None
    created: float = field(default_factory=time.time)
    started: float = 0.0
    ended: float = 0.0
    cancel: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise :class:`Cancelled` where the job was stopped."""
        if self.cancel.is_set():
            raise Cancelled

    def step(self, done: int, total: int) -> None:
        """Between two steps: tell, let brief work through, and stop if asked to. Not inside a forward."""
        self.done, self.total = done, total
        self.check()
        self.emit("progress", done=done, total=total, eta=self.eta())
        self.queue.run_brief()
        self.check()

    def eta(self) -> float | None:
        """Seconds to go."""
        if not self.done or not self.total:
            return None
        return round((time.time() - self.started) / self.done * (self.total - self.done), 1)

    def emit(self, event: str, **data: Any) -> None:
        self.queue.emit(event, job=self.id, **data)

    def tell(self, partial: Any) -> None:
        """Show what is there so far, and keep it for the next process."""
        self.partial = partial
        self.queue.keep(self)
        self.emit("partial", partial=partial)

    def summary(self) -> dict[str, Any]:
        return {
            "id": self.id, "kind": self.kind, "title": self.title, "state": self.state, "done": self.done,
            "total": self.total, "error": self.error, "eta": self.eta() if self.state == "running" else None,
            "seconds": round((self.ended or time.time()) - self.started, 2) if self.started else 0.0,
        }  # fmt: skip


class JobQueue:
    """The queue and its worker.

    Args:
        kinds: by name, the function of a job: ``function(job) -> JSON``.
        folder: where jobs that can be resumed are kept; None keeps nothing.
        resumable: kinds that the next process takes up.
    """

    def __init__(
        self, kinds: Mapping[str, Callable[[Job], Any]], folder: Path | None = None, resumable: tuple[str, ...] = ()
    ) -> None:
        self.kinds, self.folder, self.resumable = dict(kinds), folder, resumable
        self.jobs: dict[str, Job] = {}
        self._waiting: list[tuple[int, int, Job]] = []
        self._brief: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._order = itertools.count()
        self._lock = threading.Condition()
        self._events: deque[tuple[int, str, str]] = deque(maxlen=KEPT_EVENTS)
        self._number = 0
        self._closed = False
        self.current: Job | None = None
        self.epoch = secrets.token_hex(4)
        self.thread = threading.Thread(target=self._work, daemon=True, name="headscope-model")
        self.thread.start()

    def submit(
        self, kind: str, title: str, spec: Mapping[str, Any], priority: int, id: str | None = None, partial: Any = None
    ) -> Job:
        """Queue a job.

        Args:
            id: of a job that an earlier process did not finish, with what it has as ``partial``.

        Raises:
            PageError: no such kind, or too many are waiting.
        """
        if kind not in self.kinds:
            raise PageError(f"kind must be one of {sorted(self.kinds)}, got {kind!r}")
        with self._lock:
            if len(self._waiting) >= MAX_QUEUED:
                raise PageError(f"at most {MAX_QUEUED} jobs may wait; cancel one first", 429)
            job = Job(id or secrets.token_hex(6), kind, title, spec, priority, self, partial=partial)
            self.jobs[job.id] = job
            for old in [j for j in self.jobs.values() if j.ended][: max(0, len(self.jobs) - KEPT_JOBS)]:
                del self.jobs[old.id]
            # On disk before it can run: what it writes there itself must come later.
            self.keep(job)
            heapq.heappush(self._waiting, (priority, next(self._order), job))
            self._lock.notify_all()
        self.emit("job", **job.summary())
        return job

    def call(self, work: Callable[[], Any], timeout: float = 600.0) -> Any:
        """Do something brief on the worker and wait for it; raises what it raises."""
        if threading.current_thread() is self.thread:
            return work()
        future: Future[Any] = Future()
        with self._lock:
            self._brief.append((work, future))
            self._lock.notify_all()
        return future.result(timeout)

    def cancel(self, job_id: str) -> Job:
        """Stop a job: at once where it waits, at its next token or step where it runs.

        Raises:
            PageError: no such job.
        """
        job = self.get(job_id)
        job.cancel.set()
        with self._lock:
            waiting = [entry for entry in self._waiting if entry[2] is job]
            for entry in waiting:
                self._waiting.remove(entry)
            heapq.heapify(self._waiting)
        if waiting:
            self._end(job, "cancelled")
        return job

    def get(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise PageError(f"no job {job_id!r}", 404)
        return self.jobs[job_id]

    def wait(self, job: Job, timeout: float = 600.0) -> Job:
        """Until a job has ended, for tests and scripts."""
        with self._lock:
            if not self._lock.wait_for(lambda: bool(job.ended), timeout):
                raise TimeoutError(f"{job.title} has not ended after {timeout} s")
        return job

    def emit(self, event: str, **data: Any) -> None:
        with self._lock:
            self._number += 1
            self._events.append((self._number, event, json.dumps(data, allow_nan=False, default=str)))
            self._lock.notify_all()

    @property
    def last_event(self) -> int:
        return self._number

    def events(self, since: int, keep_alive: float = 15.0) -> Iterator[tuple[int, str, str] | None]:
        """Events after number ``since`` as they come, ``(number, event, JSON)``; None when nothing came for a while."""
        while not self._closed:
            with self._lock:
                if self._number <= since:
                    self._lock.wait(keep_alive)
                new: list[tuple[int, str, str]] = []
                for entry in reversed(self._events):
                    if entry[0] <= since:
                        break
                    new.append(entry)
            if not new:
                yield None
            for entry in reversed(new):
                since = entry[0]
                yield entry

    def run_brief(self) -> None:
        """Do all brief work that waits; on the worker."""
        while True:
            with self._lock:
                if not self._brief:
                    return
                work, future = self._brief.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

    def keep(self, job: Job) -> None:
        """Write a job that the next process shall take up."""
        if self.folder is None or job.kind not in self.resumable:
            return
        path = self.folder / f"{job.id}.json"
        if job.ended:
            path.unlink(missing_ok=True)
            return
        held = {
            "kind": job.kind,
            "title": job.title,
            "spec": dict(job.spec),
            "priority": job.priority,
            "partial": job.partial,
        }
        write_whole(path, json.dumps(held, default=str))

    def resume(self) -> list[Job]:
        """Queue what an earlier process did not finish; a damaged file is left alone."""
        found: list[Job] = []
        for path in sorted(self.folder.glob("*.json")) if self.folder is not None and self.folder.is_dir() else []:
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
                wish = (held["kind"], held["title"], held["spec"], int(held["priority"]))
                job = self.submit(*wish, path.stem, held.get("partial"))
            except (ValueError, KeyError, TypeError):
                continue
            found.append(job)
        return found

    def close(self, timeout: float = 10.0) -> None:
        """Stop the current job and the worker; jobs that wait stay on disk."""
        self._closed = True
        if self.current is not None:
            self.current.cancel.set()
        with self._lock:
            self._lock.notify_all()
        self.thread.join(timeout)

    def _work(self) -> None:
        while not self._closed:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._brief or self._waiting)
                if self._closed:
                    return
            self.run_brief()
            with self._lock:
                if not self._waiting:
                    continue
                job = heapq.heappop(self._waiting)[2]
                self.current = job
                job.state, job.started = "running", time.time()
            self._run(job)

    def _run(self, job: Job) -> None:
        self.emit("job", **job.summary())
        state: State = "done"
        try:
            job.check()
            job.result = self.kinds[job.kind](job)
        except Cancelled:
            state = "cancelled"
        except BaseException as error:
            # Whatever a model does, the worker lives on; the page shows the cause.
            job.error, state = explain(error), "failed"
            _free_memory()
        if self._closed and state == "cancelled":
            return  # stays on disk for the next process
        self._end(job, state)

    def _end(self, job: Job, state: State) -> None:
        with self._lock:
            job.state, job.ended = state, time.time()
            if self.current is job:
                self.current = None
            self.keep(job)
            self._lock.notify_all()
        self.emit("job", **job.summary())


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
