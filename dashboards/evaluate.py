"""A probe answered with and without the workbench's interventions, sample by sample, as a background job."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dashboards.errors import PageError
from dashboards.jobs import Job
from dashboards.specs import build_all

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

MAX_SAMPLES = 200
SCENES = {
    "chair": "captions of the bundled scenes: objects named that are not there (CHAIR)",
    "pope": "yes or no on the bundled scenes: is an object there? (POPE)",
}
"""Tasks on pictures, as ``headscope evaluate`` has them."""
CAPTION_TOKENS = 64
RESAMPLES = 400


def judged_probes() -> list[dict[str, Any]]:
    """Probes that judge answers and can be built without settings, and tasks on bundled pictures."""
    import probes

    scenes = [{"value": k, "label": k, "summary": text, "needs": ["images"]} for k, text in SCENES.items()]
    return scenes + [
        {"value": entry.name, "label": entry.name, "summary": entry.summary, "needs": list(entry.needs)}
        for entry in probes.probes()
        if entry.judged and "required" not in entry.settings.values()
    ]


def evaluate(workspace: Workspace, job: Job) -> dict[str, Any]:
    """The job ``evaluate``. Spec: ``model``, ``probe``, ``n``, ``interventions``.

    Both answers of a sample are made before the next one, so that what is there is always paired; a job that is taken up
    again goes on behind the last whole sample.
    """
    import probes
    from interp.tracing.session import hooked
    from probes.gate import gate

    name = str(job.spec["probe"])
    if name not in {entry["value"] for entry in judged_probes()}:
        raise PageError(f"probe must be one of {sorted(e['value'] for e in judged_probes())}, got {name[:60]!r}")
    n = int(job.spec.get("n") or 20)
    if not 1 <= n <= MAX_SAMPLES:
        raise PageError(f"n must be from 1 to {MAX_SAMPLES}, got {n}")
    model = workspace.model(str(job.spec["model"]))
    actions = build_all(job.spec.get("interventions") or [], model)
    if name in SCENES:
        return on_scenes(model, name, n, actions, job)
    probe = probes.probe(name)()
    samples = list(probe.build(model))[:n]
    if not samples:
        raise PageError(f"{name} makes no sample that fits {model.name}")
    rows: list[list[bool]] = list((job.partial or {}).get("rows", []))
    for number, sample in enumerate(samples):
        job.step(number, len(samples))
        if number < len(rows):
            continue
        pair = [gate(model, probe, [sample]).right[0]]
        with hooked(model, interventions=actions):
            pair.append(gate(model, probe, [sample]).right[0])
        rows.append(pair)
        job.tell(summary(name, rows, len(samples)))
    job.step(len(samples), len(samples))
    return summary(name, rows, len(samples))


def on_scenes(model: Any, name: str, n: int, actions: list[Any], job: Job) -> dict[str, Any]:
    """A task of :mod:`interp.evaluation` on ``n`` pictures, plain and changed, picture by picture."""
    from interp.evaluation.captions import scene_captions
    from interp.evaluation.pope import scene_pope
    from interp.evaluation.tasks import Call
    from interp.tracing.session import hooked

    task: Any = scene_captions("test", n, max_new_tokens=CAPTION_TOKENS) if name == "chair" else scene_pope(n)
    task.check(model)
    samples = task.samples(model)
    records: list[list[Any]] = list((job.partial or {}).get("records", []))
    units = [samples[k : k + 1] for k in range(len(samples))]
    for number, part in enumerate(units):
        job.step(number, len(units))
        if number < len(records):
            continue
        pair: list[Any] = []
        for used in ([], actions):
            session = hooked(model, interventions=used)
            with session:
                pair.append(task.run(Call(model, session, used), part)[0])
        records.append(pair)
        if samples[number + 1 : number + 2] and samples[number + 1].unit == part[0].unit:
            continue  # the questions of a picture are told together
        job.tell(scene_summary(task, name, samples, records))
    job.step(len(units), len(units))
    return scene_summary(task, name, samples, records)


def scene_summary(task: Any, name: str, samples: list[Any], records: list[list[Any]]) -> dict[str, Any]:
    """Figures of both sides and their paired differences, each ``[value, low, high]``."""
    from interp.evaluation.tasks import Statistics

    how = Statistics(RESAMPLES)
    plain, changed = ([(s, r[side]) for s, r in zip(samples, records, strict=False)] for side in (0, 1))
    before, after, difference = (
        task.figures(plain, how),
        task.figures(changed, how),
        task.differences(changed, plain, how),
    )
    rows = [
        {"name": f, "lower": f in task.lower_is_better, "plain": _cell(before[f]), "changed": _cell(after[f]),
         "difference": _cell(difference[f]) if f in difference else None}
        for f in before
    ]  # fmt: skip
    units = [s.unit for s in samples]
    return {
        "probe": name, "records": records, "figures": rows, "n": len(set(units[: len(records)])), "total": len(set(units)),
    }  # fmt: skip


def _cell(estimate: Any) -> list[float | None]:
    """Value and interval; None where there is none, as of one picture (events are JSON, which has no NaN)."""
    return [float(v) if math.isfinite(v) else None for v in tuple(estimate)[:3]]


def summary(name: str, rows: list[list[bool]], total: int) -> dict[str, Any]:
    """Success rates with Wilson's intervals, and how many samples changed each way."""
    from probes.gate import wilson

    plain, changed = [sum(row[side] for row in rows) for side in (0, 1)]
    count = len(rows)
    return {
        "probe": name, "rows": rows, "n": count, "total": total, "plain": plain / count, "changed": changed / count,
        "plain_interval": list(wilson(plain, count, 0.95)), "changed_interval": list(wilson(changed, count, 0.95)),
        "lost": sum(a and not b for a, b in rows), "won": sum(b and not a for a, b in rows),
    }  # fmt: skip
