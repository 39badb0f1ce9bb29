"""Sinks: which tokens take attention from everywhere, in which heads, and how large the residual stream is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.errors import PageError
from dashboards.metrics import received_mean
from dashboards.runs import Run, pack

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

TOP_KEYS = 48


def sinks(run: Run, stack: str, threshold: float = 0.3, group: str | None = None) -> dict[str, Any]:
    """Mean attention received, for the keys that receive most.

    A head has a sink at a key where the rows that see it give it more than ``threshold`` on average (Gu et al. 2025,
    https://arxiv.org/abs/2410.10781, with rows counted from the key on); keys that fewer than four rows see are left out.

    Returns:
        ``keys`` (position, token, kind, share of heads with a sink there, mean mass), ``matrix`` packed ``[layer, key]`` (mean
        over heads), ``heads`` packed ``[layer, head]`` (share of a row on all sink keys together).

    Raises:
        PageError: column sums were not traced.
    """
    data = run.stack(stack)
    if not {"received", "received_rows"} <= set(data.variables):
        raise PageError("this trace has no column sums: trace with received=True", 409)
    if not 0 < threshold <= 1:
        raise PageError(f"threshold must be in (0, 1], got {threshold}")
    groups = [str(g) for g in data["query_group"].values] if "query_group" in data.coords else []
    if group is not None and group not in groups:
        raise PageError(f"rows must be one of {groups}, got {group[:40]!r}")
    layers, heads = run.shape(stack)
    mean = (
        received_mean(data, group)
        .reindex(layer=range(layers), head=range(heads))
        .transpose("layer", "head", "key")
        .values
    )
    rows = data["received_rows"] if group is None else data["received_rows"].sel(query_group=group)
    seen = rows.sum([d for d in ("sample", "query_group") if d in rows.dims]).max(["layer", "head"]).values
    mean = np.where(seen >= 4, mean, np.nan)
    missing = np.asarray(np.isnan(mean).all(-1))
    there = max(1, int((~missing).sum()))
    with np.errstate(invalid="ignore"):
        share = (mean > threshold).sum((0, 1)) / there
        overall = np.nan_to_num(np.nansum(mean, (0, 1)) / there)
    order = np.argsort(-overall, kind="stable")[: min(TOP_KEYS, mean.shape[-1])]
    tokens = run.tokens(stack)
    found = np.flatnonzero(share > 0).tolist()
    on_sinks = np.where(missing, np.nan, np.nan_to_num(mean[..., found]).sum(-1))
    count = (~missing).sum(1)[:, None]
    by_layer = np.where(count > 0, np.nan_to_num(mean).sum(1) / np.maximum(count, 1), np.nan)
    return {
        "stack": stack, "threshold": threshold, "groups": groups, "layers": layers, "heads": heads, "n_sinks": len(found),
        "keys": [
            {"position": int(k), "token": tokens["keys"][k], "kind": (tokens["kind"] or [None] * len(share))[k],
             "share": float(share[k]), "mass": float(overall[k])}
            for k in order
        ],
        "matrix": pack(by_layer[:, order]), "on_sinks": pack(np.minimum(on_sinks, 1.0)),
    }  # fmt: skip


def activations(workspace: Workspace, run: Run) -> dict[str, Any]:
    """Massive activations (Sun et al. 2024, https://arxiv.org/abs/2402.17762) of a run's prompt; on the worker.

    A value of the residual stream is massive where it is above 100 and a thousand times the median of its layer's
    magnitudes; both numbers are shown, since small models rarely reach the first.

    Returns:
        By layer the largest magnitude, the median, where the largest stands (position, token, dimension), and ``massive``.
    """
    import torch

    if "trace" in run.spec:
        raise PageError("a saved trace has no model to run: trace its prompt again", 409)
    model = workspace.model(run.spec["model"])
    inputs = workspace.encode(model, run.spec)
    with torch.no_grad():
        out: Any = model(inputs, output_hidden_states=True)
    states = getattr(out, "hidden_states", None)
    if not states:
        raise PageError(f"{model.name} gives no hidden states")
    ids = inputs.get("input_ids")
    names = model.tokens(ids) if ids is not None else run.tokens(next(iter(run.trace)))["keys"]
    rows: list[dict[str, Any]] = []
    for layer, state in enumerate(states):
        size = state[0].float().abs()
        flat = int(size.argmax())
        position, dim = divmod(flat, size.shape[-1])
        largest, median = float(size.max()), float(size.median())
        rows.append(
            {
                "layer": layer, "largest": largest, "median": median, "ratio": largest / median if median else 0.0,
                "position": position, "token": names[position] if position < len(names) else "", "dim": dim,
                "massive": bool(largest > 100 and largest > 1000 * median),
            }
        )  # fmt: skip
    return {
        "rows": rows,
        "sites": f"residual stream before layer 0 to after layer {len(rows) - 1} (as the model returns it)",
    }
