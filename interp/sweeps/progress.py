"""How far a sweep is, and how long it has yet: a bar where somebody watches, lines where a log is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Any, Self, TextIO

EVERY = 30.0
"""Seconds between two lines of a log."""


class Progress:
    """Counts tasks. What was done before does not count in the speed.

    Args:
        total: tasks in all.
        done: of them done before.
        show: whether to tell, or a function of (done, total) that is called instead; what it raises ends the sweep.
        stream: where lines go.
    """

    def __init__(
        self, total: int, done: int, show: bool | Callable[[int, int], None] = True, stream: TextIO | None = None
    ) -> None:
        self.total, self.done, self.before = total, done, done
        self.show, self.stream = show, sys.stderr if stream is None else stream
        self.start = self.told = monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if callable(self.show):
            self.show(self.done, self.total)
        elif self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            if console.is_terminal:
                columns = TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
                self._bar = Bar(*columns, console=console, transient=True)
                self._bar.start()
                self._task = self._bar.add_task("sweep", total=self.total, completed=self.done)
            elif self.before:
                self._line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        self.done += 1
        if callable(self.show):
            self.show(self.done, self.total)
        elif self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif self.show and (monotonic() - self.told >= EVERY or self.done == self.total):
            self._line()

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far; None before the first task."""
        made = self.done - self.before
        return (monotonic() - self.start) / made * (self.total - self.done) if made else None

    def _line(self) -> None:
        self.told = monotonic()
        left = self.seconds_left
        rest = "" if left is None else f", {_span(left)} left"
        print(f"sweep: {self.done} of {self.total} tasks{rest}", file=self.stream, flush=True)


def _span(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
