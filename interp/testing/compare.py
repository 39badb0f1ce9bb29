"""What tracing a specimen gives, beside what the library's own maps and plain outputs say: errors, not verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from interp.testing.specimen import EagerMaps, Specimen

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Agreement:
    """Errors of one traced forward.

    Attributes:
        stacks: ``{stack: (layers, heads)}`` that were traced.
        bit_equal: the output inside an empty session, while tracing, and after it equals the plain model's, bit by bit.
        eager: largest difference between a traced map and the library's eager map; None where the library returns none.
        statistics: largest difference between each statistic and the same taken from the traced maps, over all stacks.
            ``entropy`` in nats; ``received``, ``pooled`` and ``offset`` (its total) are sums of weights; ``group_output``
            in units of z.
        trace: the trace itself.
    """

    stacks: Mapping[str, tuple[int, int]]
    bit_equal: bool
    eager: float | None
    statistics: Mapping[str, float]
    trace: Any

    @property
    def row_statistics(self) -> float:
        """Largest error of what describes one row."""
        names = ("entropy", "top_weight", "top_key", "mass", "row_attention", "group_output")
        return max(self.statistics[name] for name in names if name in self.statistics)

    @property
    def column_statistics(self) -> float:
        """Largest error of sums over rows."""
        return max(self.statistics[name] for name in ("received", "pooled", "offset") if name in self.statistics)


def agreement(specimen: Specimen) -> Agreement:
    """Trace one forward of ``specimen`` with every readout and compare."""
    # Late: interp.checking imports this package.
    from interp.checking import logits
    from interp.tracing.capture import Capture
    from interp.tracing.session import hooked

    module, inputs = specimen.module, specimen.inputs
    wanted = Capture(
        attention=True, row_stats=True, received=True, pooled=4, offset=True, topk=2, rows=[1], group_output=[1], z=True
    )
    with torch.no_grad():
        plain = logits(module(**inputs))
        with hooked(module) as empty:
            inside = logits(module(**inputs))
        with hooked(module, capture=wanted) as run:
            traced = logits(module(**inputs))
        after = logits(module(**inputs))
    same = not empty.traces and all(torch.equal(plain, other) for other in (inside, traced, after))
    trace = run.trace
    eager = _from_eager(trace, specimen.eager_maps()) if specimen.eager_maps else None
    statistics: dict[str, float] = {}
    for stack in trace.stacks:
        for name, error in errors_of_statistics(trace[stack]).items():
            statistics[name] = max(error, statistics.get(name, 0.0))
    stacks = {stack: (trace[stack].sizes["layer"], trace[stack].sizes["head"]) for stack in trace.stacks}
    return Agreement(stacks, same, eager, statistics, trace)


def _from_eager(trace: Any, expected: EagerMaps) -> float:
    worst = 0.0
    for stack in trace.stacks:
        maps = trace[stack]["attention"].values
        for layer, known in enumerate(expected.get(stack, [])):
            got = maps[:, layer]
            if known is None:
                # A layer without such heads is missing, never 0.
                worst = max(worst, 0.0 if np.isnan(got).all() else np.inf)
            else:
                worst = max(worst, float(np.nanmax(np.abs(got - known.float().numpy()))))
    return worst


def errors_of_statistics(data: xr.Dataset) -> dict[str, float]:
    """Largest difference between each statistic of one stack and the same taken from its ``attention``.

    ``data`` needs attention, row_stats, received, pooled and z; rows, group_output of one row each.
    """
    maps = data["attention"].values
    there = ~np.isnan(maps).all(-1)
    p: Floats = np.nan_to_num(maps.astype(np.float64))
    entropy = -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0.0), -1)
    chosen = np.take_along_axis(p, np.maximum(data["top_key"].values, 0)[..., None], -1)[..., 0]
    rows: dict[str, Floats] = {
        "entropy": data["entropy"].values - entropy,
        "top_weight": data["top_weight"].values - p.max(-1),
        "top_key": chosen - p.max(-1),
        "mass": data["mass"].values.sum(-1) + data["sink_share"].values - 1.0,
    }
    found = {name: float(np.abs(error)[there].max()) for name, error in rows.items()}
    found["received"] = float(np.abs(np.nan_to_num(data["received"].values).sum(3) - p.sum(3)).max())
    pooled = np.nan_to_num(data["pooled"].values)
    found["pooled"] = float(np.abs(pooled - block_sums(p, pooled.shape[-2:])).max())
    if "offset" in data:
        found["offset"] = float(np.abs(np.nan_to_num(data["offset"].values).sum(-1) - p.sum((-1, -2))).max())
    place = data["query"].values.tolist().index(int(data["row"].values[0]))
    both = np.asarray(there)[..., place]
    row = data["row_attention"].values[..., 0, :]
    parts = data["group_output"].values[..., 0, :, :].sum(-2)
    found["row_attention"] = float(np.abs(row - p[..., place, :])[both].max())
    found["group_output"] = float(np.abs(data["z"].values[..., place, :] - parts)[both].max())
    return found


def block_sums(p: Floats, blocks: tuple[int, ...]) -> Floats:
    """Sums of ``p [..., query, key]`` over square blocks of the smallest power of two that gives ``blocks`` of them."""
    edge = 1
    while tuple(-(-size // edge) for size in p.shape[-2:]) != blocks:
        edge *= 2
        if edge > 2 * max(p.shape):
            raise ValueError(f"blocks must be those of a map {p.shape[-2:]} in squares of a power of two, got {blocks}")
    for axis in (-2, -1):
        p = np.add.reduceat(p, np.arange(0, p.shape[axis], edge), axis=axis)
    return p
