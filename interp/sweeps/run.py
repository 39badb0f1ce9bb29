"""Running a sweep: what is left to do, by whom, and the results as one score."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from interp.analysis.ablation import Ablation
from interp.analysis.head_gates import HeadGates
from interp.analysis.running import as_model
from interp.files import local_path
from interp.scores_statistics import spearman
from interp.sweeps.local import run_here
from interp.sweeps.plan import SHORTLIST, Job, Split, SweepError, first_writer, read_manifest
from interp.sweeps.worker import Worker, method_of


def sweep(
    model: Any,
    probe: Any = None,
    *,
    score: str = "ablation",
    folder: str | os.PathLike[str] | None = None,
    split: Split = "sample",
    part: tuple[int, int] | None = None,
    shortlist: int | None = None,
    ray: str | None = None,
    workers: int | None = None,
    load: Mapping[str, Any] | None = None,
    progress: bool | Callable[[int, int], None] = True,
    **settings: Any,
) -> xr.Dataset:
    """A score of every head over many prompts.

    >>> sweep(model, kind="mean", folder="out/sweep").heads.top(5)  # doctest: +SKIP

    A folder makes it resumable: every task (a prompt, or a prompt's layer) is a file of its own, and a second call with the same
    arguments does what is left. A prompt that fails (logits that are not finite, say) is left out and named; the rest goes on.

    Args:
        model: a loaded model, or what :func:`interp.load` loads. With ``ray`` the latter: every worker loads it.
        probe: contrast pairs, a probe, or an iterable of inputs; None is the score's default.
        score: name of any score; ``ablation`` is exact (prefix reused, heads as rows of a batch, read-out positions only).
        folder: of the job, on a file system that all workers' driver sees; None keeps nothing.
        split: ``"layer"`` makes a task of each layer of each prompt: for few long prompts on many devices (ablations only).
        part: ``(i, n)``: only tasks with number ``i`` modulo ``n``, as the i-th of n jobs of an array; needs a folder. The last to
            finish, or a call without ``part``, gives the whole.
        shortlist: exact ablation for the so many heads with the largest gradient gates only (ablations); the others are NaN.
            ``gradient (layer, head)`` holds the gates, attribute ``shortlist`` the rank correlation over the exact heads: look at it.
        ray: address of a Ray cluster (``"auto"`` finds one), or ``"local"`` to start one here.
        workers: of Ray; None is one a GPU, without GPUs one for two CPUs.
        load: keyword arguments for :func:`interp.load`.
        progress: a bar (lines where nobody watches), or a function of (done, total).
        settings: of the score.

    Returns:
        A score Dataset; attribute ``missing`` counts tasks that are not done, ``failed`` says why prompts are left out.

    Raises:
        SweepError: arguments that do not go together, a folder of another sweep, or no task that succeeded.
    """
    source = model
    _check(ray, folder, part, source, workers, shortlist)
    loaded = as_model(_loaded(source, load))
    short = None if shortlist is None else _shortlisted(loaded, probe, score, settings, shortlist, folder, progress)
    if short is not None:
        settings = {**settings, "heads": short["heads"]}
    worker = Worker(loaded, score, settings, probe)
    plan = worker.plan(split)
    with tempfile.TemporaryDirectory() as held:
        job = Job(Path(held) / "sweep" if folder is None else folder, plan)
        done = job.done()
        mine = [t for t in plan.tasks if part is None or t.number % part[1] == part[0]]
        left = [t for t in mine if t.number not in done]
        if left and ray is not None:
            from interp.sweeps.ray_workers import run_on_ray

            run_on_ray(job, left, len(mine), source, load or {}, settings, probe, ray, workers, progress)
        elif left:
            run_here(job, left, len(mine), worker, progress)
        found = collected(job, worker, partial=part is not None)
        errors = job.errors()
    if found is None:
        raise SweepError(f"at least one task of this part must succeed, and none has: {errors}")
    return found if short is None else _with_gates(found, short)


def collect(
    model: Any, folder: str | os.PathLike[str], probe: Any = None, *, score: str = "ablation", **settings: Any
) -> xr.Dataset:
    """What a job's folder holds so far, as a score; nothing is run. Arguments as for :func:`sweep`.

    Raises:
        SweepError: no sweep's folder, one of another sweep, or one without a result.
    """
    manifest = read_manifest(Path(folder))
    path = local_path(folder) / SHORTLIST
    short = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if short is not None:
        settings = {"heads": short["heads"], **settings}
    worker = Worker(_loaded(model, None), score, settings, probe)
    found = collected(Job(folder, worker.plan(manifest["split"])), worker, partial=True)
    if found is None:
        raise SweepError(f"folder must hold at least one whole prompt, got {folder}")
    return found if short is None else _with_gates(found, short)


def collected(job: Job, worker: Worker, *, partial: bool) -> xr.Dataset | None:
    """The results of a job as a score; None where there are none.

    Raises:
        SweepError: unless partial, where no prompt is whole.
    """
    from interp.scores import make_score

    values: dict[int, list[Any]] = {}
    nulls: dict[int, list[Any]] = {}
    seconds, missing = 0.0, 0
    broken: set[int] = set()
    for task in job.plan.tasks:
        result = job.read(task)
        if result is None:
            missing += 1
            broken.add(task.sample)
            continue
        values.setdefault(task.sample, []).append(result[0])
        nulls.setdefault(task.sample, []).append(result[1])
        seconds += result[2]
    whole = [n for n in sorted(values) if n not in broken]
    errors = {str(n): text for n, text in job.errors().items() if n in broken}
    if not whole:
        if partial:
            return None
        first = next(iter(errors.items()), ("", "none was run"))
        raise SweepError(
            f"at least one prompt must succeed, and none of {len(job.plan.samples)} did; sample {first[0]}: {first[1]}"
        )
    rows = [_merged(values[n]) for n in whole]
    controls = [_merged(nulls[n]) if nulls[n][0] is not None else None for n in whole]
    value = np.concatenate(rows)
    null = None if any(c is None for c in controls) else np.concatenate([c for c in controls if c is not None])
    samples = [n for n, part in zip(whole, rows, strict=True) for _ in range(len(part))]
    method = worker.method
    made = make_score(
        xr.DataArray(value, dims=("sample", "layer", "head"), coords={"sample": samples}), name=method.name, unit=method.result_unit,
        paper=method.paper, stack=method.measured_stack, null_by_sample=null,
        settings={**job.plan.settings, "probe": job.plan.probe, "model": job.plan.model["name"], **method.notes()},
    )  # fmt: skip
    made.attrs.update(missing=missing, failed=json.dumps(errors), seconds=seconds)
    return made


def _merged(parts: list[Any]) -> Any:
    """Layers of one prompt that were tasks of their own: each is NaN in the others."""
    if len(parts) == 1:
        return parts[0]
    stacked = np.stack(parts)
    some = ~np.isnan(stacked)
    return np.where(some.any(0), np.where(some, stacked, 0).sum(0), np.nan)


def _check(ray: str | None, folder: Any, part: Any, source: Any, workers: int | None, shortlist: int | None) -> None:
    if ray is not None and not isinstance(source, str | os.PathLike):
        raise SweepError("model must be a name or folder with ray, which every worker loads, got a loaded model")
    if part is not None:
        whole = isinstance(part, tuple) and len(part) == 2 and all(isinstance(n, int) for n in part)
        if not whole or not 0 <= part[0] < part[1]:
            raise SweepError(f"part must be (i, n) with 0 <= i < n, got {part!r}")
        if folder is None:
            raise SweepError("part needs a folder, where the parts meet")
    if workers is not None and workers < 1:
        raise SweepError(f"workers must be at least 1, got {workers}")
    if shortlist is not None and shortlist < 1:
        raise SweepError(f"shortlist must be at least 1, got {shortlist}")


def _loaded(source: Any, load: Mapping[str, Any] | None) -> Any:
    if isinstance(source, str | os.PathLike):
        from interp.models.loading import load as load_model

        return load_model(source, **dict(load or {}))
    return source


def _shortlisted(
    model: Any, probe: Any, score: str, settings: dict[str, Any], k: int, folder: Any, progress: Any
) -> dict[str, Any]:
    """The ``k`` heads with the largest gates as text, and all gates; with a folder those that the first process found."""
    method = method_of(score, settings)
    if not isinstance(method, Ablation) or method.heads is not None:
        raise SweepError(
            "shortlist is for ablations of all heads: without heads=, with score 'ablation' or 'direct_effect'"
        )
    path = None if folder is None else local_path(folder) / SHORTLIST
    if path is not None and path.exists():
        return _held(path.read_text(encoding="utf-8"), k, path)
    metric = "loss" if method.metric in ("accuracy", "jsd") else method.metric
    gates = HeadGates(stack=method.stack, metric=metric, positions=method.positions)
    scored = gates.run(model, probe, progress=bool(progress) and not callable(progress))
    values = [[None if np.isnan(v) else float(v) for v in row] for row in scored["value"].values]
    text = json.dumps({"k": k, "heads": str(scored.heads.top(k)), "gates": values})
    return json.loads(text) if path is None else _held(first_writer(path, text), k, path)


def _held(text: str, k: int, path: Path) -> dict[str, Any]:
    held = json.loads(text)
    if held["k"] != k:
        raise SweepError(f"folder must belong to this sweep, and {path} has a shortlist of {held['k']} heads, not {k}")
    return held


def _with_gates(found: xr.Dataset, short: Mapping[str, Any]) -> xr.Dataset:
    """The score with the gates it was chosen by, and how well these order the heads that were swept."""
    gates = np.array([[np.nan if v is None else v for v in row] for row in short["gates"]])
    out = found.assign(gradient=(("layer", "head"), gates))
    exact = ~np.isnan(found["value"].values)
    rho = np.nan
    if exact.sum() > 2:
        rho = float(spearman(gates[exact][None], np.abs(found["value"].values[exact])[None])[0])
    out.attrs["shortlist"] = {"k": short["k"], "rho": rho, "n": int(exact.sum())}
    return out


__all__ = ["collect", "collected", "sweep"]
