from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dashboards.errors import PageError
from dashboards.jobs import GENERATION, SWEEP, Job, JobQueue


def make(folder: Path | None = None, **kinds: Any) -> JobQueue:
    return JobQueue(kinds, folder, tuple(kinds))


def test_jobs_run_one_at_a_time_by_priority_on_one_thread() -> None:
    gate, order, threads = threading.Event(), [], set()

    def work(job: Job) -> str:
        threads.add(threading.current_thread().name)
        if job.spec.get("wait"):
            gate.wait(5)
        order.append(job.spec["n"])
        return f"did {job.spec['n']}"

    queue = make(work=work)
    first = queue.submit("work", "first", {"n": 0, "wait": True}, SWEEP)
    time.sleep(0.05)
    jobs = [queue.submit("work", str(n), {"n": n}, p) for n, p in ((1, SWEEP), (2, GENERATION), (3, SWEEP))]
    gate.set()
    for job in (first, *jobs):
        assert queue.wait(job, 5).state == "done"
    assert order == [0, 2, 1, 3] and threads == {"headscope-model"} and jobs[0].result == "did 1"
    queue.close()


def test_brief_work_goes_between_the_steps_of_a_long_job() -> None:
    started, running = threading.Event(), [0]

    def sweep(job: Job) -> None:
        for n in range(400):
            job.step(n, 400)
            running[0] = n
            started.set()
            time.sleep(0.005)

    queue = make(sweep=sweep)
    job = queue.submit("sweep", "long", {}, SWEEP)
    started.wait(5)
    began = time.monotonic()
    assert queue.call(lambda: threading.current_thread().name) == "headscope-model"
    assert time.monotonic() - began < 0.5 and job.state == "running" and running[0] < 399
    with pytest.raises(ZeroDivisionError):
        queue.call(lambda: 1 // 0)
    queue.cancel(job.id)
    assert queue.wait(job, 5).state == "cancelled" and running[0] < 399
    queue.close()


def test_a_waiting_job_is_cancelled_at_once_and_others_stay() -> None:
    gate = threading.Event()
    queue = make(work=lambda job: gate.wait(5))
    first, second, third = (queue.submit("work", t, {}, SWEEP) for t in "abc")
    assert queue.cancel(second.id).state == "cancelled"
    gate.set()
    assert queue.wait(first, 5).state == "done" and queue.wait(third, 5).state == "done"
    with pytest.raises(PageError, match="no job"):
        queue.cancel("ff" * 6)
    queue.close()


def test_an_error_is_told_and_the_worker_lives_on() -> None:
    def work(job: Job) -> None:
        raise MemoryError("no room") if job.spec["kind"] == "memory" else KeyError("what is missing")

    queue = make(work=work)
    memory = queue.wait(queue.submit("work", "m", {"kind": "memory"}, SWEEP), 5)
    assert memory.state == "failed" and "out of memory: no room" in memory.error and "shorter prompt" in memory.error
    key = queue.wait(queue.submit("work", "k", {"kind": "key"}, SWEEP), 5)
    assert key.error == "KeyError: what is missing" and queue.call(lambda: 7) == 7
    with pytest.raises(PageError, match="kind must be one of"):
        queue.submit("nonsense", "", {}, SWEEP)
    queue.close()


def test_events_can_be_read_again_from_any_number() -> None:
    queue = make(work=lambda job: [job.emit("token", text=t) for t in "abc"] and None)
    queue.wait(queue.submit("work", "w", {}, SWEEP), 5)
    found = []
    for entry in queue.events(0, keep_alive=0.05):
        if entry is None:
            break
        found.append(entry)
    assert [n for n, _, _ in found] == list(range(1, len(found) + 1))
    assert [json.loads(d)["text"] for _, kind, d in found if kind == "token"] == ["a", "b", "c"]
    again = queue.events(found[-2][0], keep_alive=0.05)
    assert next(again) == found[-1] and next(again) is None
    queue.close()


def test_an_interrupted_job_goes_on_in_the_next_process_behind_what_was_done(tmp_path: Path) -> None:
    seen: list[int] = []
    reached = threading.Event()

    def sweep(job: Job) -> list[int]:
        rows = list((job.partial or {}).get("rows", []))
        for n in range(6):
            job.step(n, 6)
            if n < len(rows):
                continue
            if n == 3 and not reached.is_set():
                reached.set()
                job.cancel.wait(5)
                job.check()
            seen.append(n)
            rows.append(n)
            job.tell({"rows": rows})
        return rows

    queue = make(tmp_path, sweep=sweep)
    job = queue.submit("sweep", "points", {"a": 1}, SWEEP)
    reached.wait(5)
    queue.close()
    assert seen == [0, 1, 2] and (tmp_path / f"{job.id}.json").is_file()
    (tmp_path / "damaged.json").write_text("{", encoding="utf-8")
    following = make(tmp_path, sweep=sweep)
    (found,) = following.resume()
    assert found.id == job.id and following.wait(found, 5).result == [0, 1, 2, 3, 4, 5] and seen == [0, 1, 2, 3, 4, 5]
    assert not (tmp_path / f"{job.id}.json").exists(), "what is done is not done again"
    following.close()


def test_too_many_waiting_jobs_are_refused() -> None:
    gate = threading.Event()
    queue = make(work=lambda job: gate.wait(5))
    first = queue.submit("work", "first", {}, SWEEP)
    while first.state != "running":
        time.sleep(0.01)
    for n in range(64):
        queue.submit("work", str(n), {}, SWEEP)
    with pytest.raises(PageError, match="at most 64 jobs") as refused:
        queue.submit("work", "one more", {}, SWEEP)
    assert refused.value.status == 429
    gate.set()
    queue.close()
