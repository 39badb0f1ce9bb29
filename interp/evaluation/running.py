"""Running a table of settings over a task (:func:`evaluate`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from interp.evaluation.baselines import check_together
from interp.evaluation.settings import Setting, SettingError, heads_of, unique
from interp.evaluation.store import Store
from interp.evaluation.tasks import Call, Pairs, Sample, Statistics, Task
from interp.models.anatomy import anatomy
from interp.tracing.calls import Intervention, InterventionError
from interp.tracing.session import hooked
from probes.intervals import Estimate

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One setting's results.

    Attributes:
        setting: which.
        heads: heads that were drawn for a random control; empty elsewhere.
        figures: name to estimate.
        differences: setting minus the plain model, paired; empty for the plain model itself.
        more: further results of the task.
        n: samples.
        tokens_per_second: generated tokens over the time of their batches; NaN where nothing is generated.
        samples_per_second: samples over time.
        extra_passes: forwards beside the model's own, a batch, on average.
        problem: why it could not act; the rest is then empty.
    """

    setting: Setting
    heads: str = ""
    figures: dict[str, Estimate] = field(default_factory=dict[str, Estimate])
    differences: dict[str, Estimate] = field(default_factory=dict[str, Estimate])
    more: dict[str, Any] = field(default_factory=dict[str, Any])
    n: int = 0
    tokens_per_second: float = math.nan
    samples_per_second: float = math.nan
    extra_passes: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Evaluation:
    """A table: the plain model first.

    Attributes:
        task: what was asked.
        about: model, task and machine, JSON-able.
        rows: one a setting.
        found: setting key to ``(sample, record)`` of every sample, in the task's order.
        resumed: records that were there before.
    """

    task: Task
    about: dict[str, Any]
    rows: tuple[Row, ...]
    found: Mapping[str, Pairs]
    resumed: int = 0

    def __getitem__(self, name: str) -> Row:
        """The row of a setting by its name."""
        for row in self.rows:
            if row.setting.name == name:
                return row
        raise KeyError(f"name must be one of {[r.setting.name for r in self.rows]}, got {name!r}")


def evaluate(
    model: Any,
    task: Task,
    settings: Sequence[Setting],
    *,
    folder: Path | None = None,
    batch: int = 8,
    refuse: bool = True,
    how: Statistics | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer a task under every setting, and compare each with the plain model, which is added where it is not given.

    A batch is answered under all settings before the next one begins, so its inputs are made once, and a run that was killed
    has as many samples of each. All settings are tried on the first sample before anything is measured.

    Args:
        model: an :class:`interp.Model`.
        task: of :mod:`interp.evaluation.tasks`.
        settings: any number; two that do the same are one.
        folder: of the answers, so that a killed run goes on and nothing is done twice. None keeps nothing.
        batch: samples in one call, padded on the left.
        refuse: raise where a method cannot act on this model or its inputs; else its row says why (the plain model always raises).
        how: of the bootstrap.
        progress: called with a setting's name, samples done and all.

    Raises:
        SettingError: random heads that cannot be drawn, a batch below 1.
        InterventionError, HeadError: before the first token, with ``refuse``: a method that cannot act, heads that are not there.
        StoreError: a folder of another model or task.
        ProbeError: a task that the model cannot do.
    """
    if batch < 1:
        raise SettingError(f"batch must be at least 1, got {batch}")
    how = how or Statistics()
    shape = anatomy(model.module)
    chosen = unique(settings)
    task.check(model)
    made: dict[str, list[Intervention]] = {}
    problems: dict[str, str] = {}
    for setting in chosen:
        try:
            interventions = setting.on(shape)
            check_together(interventions)
            hooked(model, interventions=interventions)
            made[setting.key] = interventions
        except ValueError as error:
            _refuse(setting, error, problems, refuse)
    samples = task.samples(model)
    if len({s.id for s in samples}) != len(samples):
        raise SettingError(f"ids of samples must be unique, {task.name} has some twice")
    about = {
        "model": model.name, "revision": model.revision, "dtype": str(model.module.dtype).removeprefix("torch."),
        "task": task.describe(), "n": len(samples),
    }  # fmt: skip
    store = Store(folder, about)
    ids = {s.id for s in samples}
    resumed = sum(len(ids & store.records(s).keys()) for s in chosen)
    going = [s for s in chosen if s.key not in problems]
    for setting in going:
        if ids <= store.records(setting).keys():
            continue
        try:
            _run(model, task, setting, made[setting.key], samples[:1], {}, trial=True)
        except (ValueError, NotImplementedError) as error:
            # Without the plain model there is nothing to compare with.
            _refuse(setting, error, problems, refuse or setting is chosen[0])
    going = [s for s in going if s.key not in problems]
    for start in range(0, len(samples), batch):
        part, shared = samples[start : start + batch], dict[tuple[str, ...], dict[Any, Any]]()
        for setting in going:
            missing = [s for s in part if s.id not in store.records(setting)]
            if missing:
                inputs = shared.setdefault(tuple(s.id for s in missing), {})
                records = _run(model, task, setting, made[setting.key], missing, inputs)
                store.add(setting, [s.id for s in missing], records)
            if progress is not None:
                progress(setting.name, min(start + batch, len(samples)), len(samples))
    found = {s.key: [(x, store.records(s)[x.id]) for x in samples] for s in going}
    plain = found[chosen[0].key]
    rows = [
        Row(s, problem=problems[s.key])
        if s.key in problems
        else _row(task, s, made[s.key], found[s.key], plain if s is not chosen[0] else None, how)
        for s in chosen
    ]
    return Evaluation(task, {**about, "machine": _machine(model), "batch": batch}, tuple(rows), found, resumed)


def _refuse(setting: Setting, error: Exception, problems: dict[str, str], refuse: bool) -> None:
    if refuse:
        kind = type(error) if isinstance(error, InterventionError) else SettingError
        raise kind(f"{setting.name}: {error}") from error
    problems[setting.key] = " ".join(str(error).split())


def _run(
    model: Any, task: Task, setting: Setting, interventions: Sequence[Intervention], samples: Sequence[Sample],
    shared: dict[Any, Any], *, trial: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    cuda = model.device.type == "cuda"
    session = hooked(model, interventions=interventions)
    call = Call(model, session, interventions, setting.beams, shared, trial)
    if cuda:
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    with session:
        records = task.run(call, samples)
    if cuda:
        torch.cuda.synchronize(model.device)
    seconds = (time.perf_counter() - start) / len(samples)
    return [{**r, "seconds": round(seconds, 6), "extra_passes": session.extra_forwards} for r in records]


def _row(
    task: Task, setting: Setting, interventions: Sequence[Intervention], found: Pairs, plain: Pairs | None, how: Statistics
) -> Row:  # fmt: skip
    seconds = sum(r["seconds"] for _, r in found)
    tokens = sum(r.get("tokens", 0) for _, r in found) if task.records_text else math.nan
    drawn = [str(heads_of(i)) for i in interventions if setting.random is not None and heads_of(i) is not None]
    return Row(
        setting, "; ".join(drawn), task.figures(found, how), {} if plain is None else task.differences(found, plain, how),
        task.more(found, found if plain is None else plain, how), len(found), tokens / seconds, len(found) / seconds,
        sum(r["extra_passes"] for _, r in found) / len(found),
    )  # fmt: skip


def _machine(model: Any) -> str:
    import transformers

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
