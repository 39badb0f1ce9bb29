"""The context manager that puts captures and interventions on a model: ``interp.hooked``.

A session belongs to the model, not to a thread: it is one of a stack that the model's installation holds (see
:mod:`interp.tracing.installation`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from torch import nn

from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.base_edit import BaseEdit
from interp.models.model import unwrap
from interp.tracing.calls import Intervention, RunState
from interp.tracing.capture import Capture, Selection
from interp.tracing.installation import INSTALLATIONS, LOCK, SessionError, install
from interp.tracing.plant import Plant
from interp.tracing.recorder import Recorder
from interp.tracing.trace import Trace


class Session:
    """An open (or closed) ``interp.hooked``: traces of what ran, and a report of what it used.

    :attr:`traces` has one :class:`~interp.tracing.trace.Trace` for each top-level forward or generate.

    Attributes:
        extra_forwards: forwards that interventions made of their own, so far.
        prompt_length: set it to have forwards of a prompt with its answer (teacher forcing) treat the first so many
            positions, pads included, as the prompt and what follows as generated; None takes all for the prompt.
    """

    def __init__(
        self, model: Any, capture: Capture | None, interventions: Sequence[Intervention], backend: str,
        sites: Anatomy | None = None,
    ) -> None:  # fmt: skip
        """As :func:`hooked`; ``sites`` are the model's where a caller has just listed them."""
        self.module = unwrap(model)
        self.model = model
        self.capture = capture or Capture()
        self.interventions = tuple(interventions)
        self.backend = backend
        self.anatomy: Anatomy = anatomy(self.module) if sites is None else sites
        self.anatomy.require_sites()
        for intervention in self.interventions:
            if not isinstance(intervention, Intervention):
                raise TypeError(f"interventions must be Intervention objects, got {type(intervention).__name__}")
            intervention.prepare(self.anatomy)
        self.selection: Selection | None = None if self.capture.empty else self.capture.resolve(self.anatomy)
        self._traces: list[Trace] = []
        self._pending: Callable[[], Trace] | None = None
        self.used: dict[str, dict[str, int]] = {}
        self.runs: dict[int, tuple[RunState, Recorder | None]] = {}
        self.extra_forwards = 0
        self.prompt_length: int | None = None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.model, "tokenizer", None)

    @property
    def traces(self) -> list[Trace]:
        """One trace for each top-level forward or generate, in order of their ends.

        The last run's readings stay on their devices until somebody looks here, or the next run ends.
        """
        with LOCK:
            pending, self._pending = self._pending, None
            if pending is not None:
                self._traces.append(pending())
        return self._traces

    def keep(self, make: Callable[[], Trace]) -> None:
        """Remember how to make the trace of a run that has just ended."""
        if self._pending is not None:
            _ = self.traces
        self._pending = make

    @property
    def trace(self) -> Trace:
        """The only trace.

        Raises:
            SessionError: nothing was traced, or more than once.
        """
        if len(self.traces) == 1:
            return self.traces[0]
        if not self.traces:
            why = (
                "nothing was captured: pass capture=Capture(...)"
                if self.selection is None
                else "the model has not run to the end yet"
            )
            raise SessionError(f"run.trace needs exactly one traced run, got none; {why}")
        raise SessionError(f"run.trace needs exactly one traced run, got {len(self.traces)}: take one of run.traces")

    def touches(self, site: Site, run: RunState) -> bool:
        """Whether an intervention may act on calls of a site in this run; asked once a run."""
        if not self.interventions:
            return False
        found = run.touched.get(site.name)
        if found is None:
            found = run.touched[site.name] = any(i.acts_on(site, run) for i in self.interventions)
        return found

    def report(self) -> dict[str, dict[str, int]]:
        """Attention calls by site and by what became of them; a site that was never called has an empty entry.

        ``untouched`` and ``gain`` took the model's own function (with z scaled afterwards); ``edited by triton`` and ``read by
        blockwise`` name the backend of the attention op that ``auto`` chose, or that was asked for.
        """
        return {site.name: dict(self.used.get(site.name, {})) for site in self.anatomy.sites}

    def end_run(self, thread: int) -> None:
        """Forget the run of a thread, and undo what was set up for it."""
        run, _ = self.runs.pop(thread, (None, None))
        if run is not None:
            self.extra_forwards += run.extra_forwards
            run.close()

    def end_runs(self) -> None:
        for thread in list(self.runs):
            self.end_run(thread)

    def entry(self, site: Site) -> dict[str, int]:
        """What :meth:`report` has of a site."""
        return self.used.setdefault(site.name, {})

    def count(self, site: Site, backend: str) -> None:
        entry = self.entry(site)
        entry[backend] = entry.get(backend, 0) + 1

    def __enter__(self) -> Self:
        with LOCK:
            installation = INSTALLATIONS.get(id(self.module))
            me = threading.get_ident()
            if installation is not None and installation.thread not in (None, me):
                raise SessionError(
                    f"a session on this {type(self.module).__name__} is already open in thread {installation.thread_name!r}; one "
                    "thread at a time may open sessions on a model. interp.reset(model) clears one that was left open"
                )
            if installation is None:
                installation = install(self.module, self.anatomy)
            installation.held_by_this_thread()
            installation.sessions.append(self)
            installation.unsettle()
            if self.selection is not None or self.interventions:
                installation.watch_sites()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with LOCK:
            installation = INSTALLATIONS.get(id(self.module))
            if installation is None or self not in installation.sessions:
                return
            installation.sessions.remove(self)
            installation.unsettle()
            self.end_runs()
            if not installation.sessions and not installation.suspended:
                installation.close()


def hooked(
    model: Any, *, capture: Capture | None = None, interventions: Sequence[Intervention] = (), backend: str = "auto"
) -> Session:
    """Trace and change the attention of ``model`` while the ``with`` block runs.

    >>> with hooked(model, capture=Capture(row_stats=True)) as run:  # doctest: +SKIP
    ...     model(inputs)
    >>> run.trace["text"].entropy  # doctest: +SKIP

    Args:
        model: an :class:`interp.Model`, a ``PreTrainedModel``, or what wraps one (PEFT, pipeline, ``torch.compile``, a
            TransformerLens bridge: calls of the bridge count, too).
        capture: what to keep; None keeps nothing.
        interventions: policies, applied in order after those of enclosing sessions.
        backend: of the attention op, for calls that are edited or read (see :func:`interp.attention.attend`).

    Raises:
        AnatomyError: the model has no attention that can be reached.
        CaptureError: the capture names something the model does not have.
        SessionError: another thread holds a session on this model (raised on entering the block).
    """
    if capture is not None and not isinstance(capture, Capture):
        raise TypeError(f"capture must be a Capture, got {type(capture).__name__}")
    return Session(model, capture, interventions, backend)


def reset(model: Any) -> int:
    """Close every session on ``model`` that was left open, from whatever thread; returns how many there were."""
    module = unwrap(model)
    with LOCK:
        installation = INSTALLATIONS.get(id(module))
        if installation is None:
            return 0
        count = len(installation.sessions)
        for session in installation.sessions:
            session.end_runs()
        installation.sessions.clear()
        installation.unsettle()
        installation.close()
        return count


def plant(module: nn.Module, edit: BaseEdit) -> None:
    """Hold a model to its base edit from now on (:func:`interp.models.base_edit.attach` checks and calls this).

    Raises:
        SessionError: a session is open on the model.
    """
    with LOCK:
        if id(module) in INSTALLATIONS:
            raise SessionError(
                f"a base edit must be put on before any session, one is open on this {type(module).__name__}"
            )
        shape = anatomy(module)
        install(module, shape, Plant(module, shape, edit))


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Run the plain model inside a session: no captures, no interventions, for a baseline or a reference pass."""
    installation = INSTALLATIONS.get(id(unwrap(model)))
    held, sessions = (installation.sessions, []) if installation is not None else ([], [])
    me = threading.get_ident()
    generating, stack = False, None
    if installation is not None:
        # Inside a generate or a forward: what runs in the block is a run of its own.
        generating, stack = me in installation.generating, installation.active.pop(me, None)
        installation.generating.discard(me)
        # The last session opened in the block must not take the suspended ones' installation down with it.
        installation.suspended += 1
        installation.sessions = sessions
        installation.unsettle()
    try:
        yield
    finally:
        if installation is not None:
            installation.suspended -= 1
            installation.sessions = held
            installation.unsettle()
            installation.active.pop(me, None)
            if stack is not None:
                installation.active[me] = stack
            if generating:
                installation.generating.add(me)
