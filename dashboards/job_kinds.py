"""What jobs do, by kind. Each takes its job (whose spec is JSON) and gives JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dashboards.errors import PageError
from dashboards.generation import Stop, Streamer, compare, stopping
from dashboards.jobs import Cancelled, Job

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

__all__ = ["Stop", "kinds"]


def kinds(workspace: Workspace) -> Mapping[str, Callable[[Job], Any]]:
    from dashboards.dissect import dissect
    from dashboards.embedding import autoencoder
    from dashboards.evaluate import evaluate

    return {
        "run": lambda job: trace(workspace, job),
        "generate": lambda job: compare(workspace, job),
        "score": lambda job: score(workspace, job),
        "evaluate": lambda job: evaluate(workspace, job),
        "dissect": lambda job: dissect(workspace, job),
        "archetypes": lambda job: autoencoder(workspace, job),
    }


def trace(workspace: Workspace, job: Job) -> dict[str, Any]:
    """Trace a prompt; its answer is streamed."""
    spec = dict(job.spec)
    model = workspace.model(spec["model"])
    job.check()
    streamer = stop = None
    if spec.get("max_new_tokens") and model.is_generative:
        streamer = Streamer(job, model, "run", bool(getattr(model.config, "is_encoder_decoder", False)))
        stop = stopping(job)
    run = workspace.make_run(spec, streamer, stop)
    if job.cancel.is_set():
        del workspace.runs[run.id]
        raise Cancelled
    return {"run": run.id}


def score(workspace: Workspace, job: Job) -> dict[str, Any]:
    """One of ``interp.scores()``, sample by sample.

    Spec: ``model``, ``score``, and ``stack`` and ``run``: for another stack than text, and for scores without a probe of their
    own, the run's prompt is what it is computed on, which holds for that run alone.
    """
    from interp import analysis

    name, stack = str(job.spec["score"]), str(job.spec.get("stack") or "text")
    known = {entry.name: entry for entry in analysis.scores()}
    if name not in known:
        raise PageError(f"score must be one of {sorted(known)}, got {name[:60]!r}")
    model = workspace.model(str(job.spec["model"]))
    info = known[name]
    settings = {"stack": stack} if "stack" in info.settings else {}
    probe, run = None, ""
    if (stack != "text" or info.probe.startswith("inputs")) and not info.probe.startswith("none"):
        run = str(job.spec.get("run") or "")
        probe = [workspace.encode(model, workspace.remake(run).spec)]
    found = analysis.score(name, model, probe, progress=job.step, **settings)  # type: ignore[arg-type]
    workspace.keep_score(str(job.spec["model"]), name, found, run)
    return {"model": job.spec["model"], "score": name, "stack": str(found.attrs["stack"])}
