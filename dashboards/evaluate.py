"""A probe answered with and without the workbench's interventions, sample by sample, as a background job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dashboards.errors import PageError
from dashboards.jobs import Job
from dashboards.specs import build_all

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

MAX_SAMPLES = 200


def judged_probes() -> list[dict[str, Any]]:
    """Probes that judge answers and can be built without settings."""
    import probes

    return [
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
