"""The overview's data: every number per head that is there, packed, and the same as rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from dashboards.pictures import sprite
from dashboards.runs import Run, pack
from interp.heads import Head

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

Floats = NDArray[np.float32]


def overview(workspace: Workspace, run: Run, stack: str) -> dict[str, Any]:
    """What the grid needs: sizes, and for each metric its definition and packed ``[layer, head]`` values.

    Metrics ``p:...`` are of this prompt; ``s:...`` are registered scores of the model, with standard error, control and
    number of samples, or with ``ready`` False where they have not been computed.
    """
    layers, heads = run.shape(stack)
    metrics: list[dict[str, Any]] = []
    for metric, values in run.metric_values(stack):
        metrics.append(
            {
                "key": f"p:{metric.key}", "name": metric.name, "unit": metric.unit, "definition": metric.definition,
                "paper": metric.paper, "ready": True, "values": pack(values), "se": None, "null": None, "n": 1,
                "probe": "this prompt",
            }
        )  # fmt: skip
    metrics += [_score_entry(workspace, run, info, stack, (layers, heads)) for info in scores_for(stack)]
    pooled = run.pooled(stack)
    size = None if pooled is None else [int(pooled.shape[2]), int(pooled.shape[3])]
    return {
        "stack": stack, "layers": layers, "heads": heads, "metrics": metrics, "kv_group": run.kv_groups.get(stack, 1),
        "exists": pack(exists(run, stack)), "pooled": size, "pooled_top": run.pooled_top(stack) if size else None,
        "order": cluster_order(pooled).tolist() if pooled is not None else None,
    }  # fmt: skip


def scores_for(stack: str) -> list[Any]:
    """Registered scores that apply to a stack."""
    from interp import analysis

    return [info for info in analysis.scores() if stack in info.stacks or "any" in info.stacks]


def exists(run: Run, stack: str) -> Floats:
    """1 where the stack has a head, NaN where it has none: ``[layer, head]``."""
    data = run.stack(stack)
    out = np.full(run.shape(stack), np.nan, np.float32)
    layers, heads = data["layer"].values, data["head"].values
    out[np.ix_(layers, heads)] = 1.0
    first = next((v for m, v in run.metric_values(stack) if m.key in ("entropy", "top_weight")), None)
    return out if first is None else np.where(np.isnan(first), np.nan, out).astype(np.float32)


def score_grid(score: xr.Dataset, name: str, shape: tuple[int, int]) -> Floats | None:
    """A variable of a score on the run's grid, None where the score has none."""
    if name not in score:
        return None
    full = score[name].transpose("layer", "head").reindex(layer=range(shape[0]), head=range(shape[1]))
    return full.values.astype(np.float32)


def _score_entry(workspace: Workspace, run: Run, info: Any, stack: str, shape: tuple[int, int]) -> dict[str, Any]:
    found = workspace.score(run.model_name, info.name, stack, run.id)
    entry: dict[str, Any] = {
        "key": f"s:{info.name}", "name": info.name, "unit": info.unit, "definition": info.summary, "paper": info.paper,
        "ready": found is not None, "values": None, "se": None, "null": None, "n": 0, "probe": info.probe,
        "needs": getattr(info, "needs", ""), "control": getattr(info, "control", ""),
    }  # fmt: skip
    if found is not None:
        entry["unit"] = str(found.attrs.get("unit", info.unit))
        for name, variable in (("values", "value"), ("se", "se"), ("null", "null")):
            grid = score_grid(found, variable, shape)
            entry[name] = None if grid is None else pack(grid)
        entry["n"] = int(np.nanmax(found["n"].values)) if "n" in found else 0
        entry["probe"] = probe_of(found) or info.probe
    return entry


def probe_of(score: xr.Dataset) -> str:
    """What a score was computed on, in a word."""
    settings = score.attrs.get("settings")
    probe = settings.get("probe") if isinstance(settings, dict) else None
    name = probe.get("name") if isinstance(probe, dict) else probe
    return "this prompt" if name == "list" else str(name or "")


def cluster_order(pooled: Floats) -> NDArray[np.int64]:
    """Heads of each layer in an order that puts alike maps side by side: head number by column, ``[layer, head]``.

    Sorted along the first principal component of all heads' pooled maps, the same axis in every layer.
    """
    layers, heads = pooled.shape[:2]
    flat = np.nan_to_num(np.sqrt(np.clip(pooled.reshape(layers * heads, -1), 0, None)))
    flat = flat - flat.mean(0)
    if flat.shape[1] > 256:
        flat = flat @ np.random.default_rng(0).normal(size=(flat.shape[1], 256)).astype(np.float32) / 16
    _, vectors = np.linalg.eigh(flat.T @ flat)
    return np.argsort((flat @ vectors[:, -1]).reshape(layers, heads), axis=1, kind="stable")


def sprite_png(run: Run, stack: str) -> bytes:
    """All heads' pooled maps as one picture."""
    pooled = run.pooled(stack)
    if pooled is None:
        from dashboards.errors import PageError

        raise PageError("this run has no pooled maps", 404)
    return run.once(("sprite", stack), lambda: sprite(pooled, run.pooled_top(stack)))


def values_by_name(workspace: Workspace, run: Run, stack: str) -> dict[str, Floats]:
    """Every metric that is ready, ``[layer, head]`` by key."""
    found = {f"p:{metric.key}": values for metric, values in run.metric_values(stack)}
    for info in scores_for(stack):
        score = workspace.score(run.model_name, info.name, stack, run.id)
        if score is not None:
            grid = score_grid(score, "value", run.shape(stack))
            if grid is not None:
                found[f"s:{info.name}"] = grid
    return found


def table_csv(workspace: Workspace, run: Run, stack: str) -> str:
    """The table twin of the overview as CSV."""
    values = values_by_name(workspace, run, stack)
    layers, heads = run.shape(stack)
    lines = [",".join(["id", "layer", "head", *(k.partition(":")[2] for k in values)])]
    for layer in range(layers):
        for head in range(heads):
            cells = [f"{v[layer, head]:.6g}" if np.isfinite(v[layer, head]) else "" for v in values.values()]
            if any(cells):
                lines.append(",".join([str(Head(layer, head, stack)), str(layer), str(head), *cells]))
    return "\n".join(lines) + "\n"
