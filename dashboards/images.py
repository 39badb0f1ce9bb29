"""Attention over images: which position is which patch of which picture, and how strongly it is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dashboards.errors import PageError
from dashboards.maps import Look, rings
from dashboards.runs import Run
from interp.heads import Head, Heads

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

Floats = NDArray[np.float32]
MAX_HEADS = 64


def panels(run: Run, stack: str) -> list[dict[str, Any]]:
    """One for each picture or tile: the positions of its patches, in rows and columns.

    Positions of an image that are no patches (class token, row ends, separators) are listed apart.
    """
    tokens = run.tokens(stack)
    if tokens["row"] is None or tokens["image"] is None:
        return []
    image, tile, row, column = (np.asarray(tokens[k]) for k in ("image", "tile", "row", "column"))
    found: list[dict[str, Any]] = []
    for number, part in sorted(
        {(int(i), int(t)) for i, t, r in zip(image, tile, row, strict=True) if i >= 0 and r >= 0}
    ):
        here = np.flatnonzero((image == number) & (tile == part) & (row >= 0))
        tiles = {int(t) for i, t, r in zip(image, tile, row, strict=True) if i == number and r >= 0}
        found.append(
            {
                "image": number, "tile": part, "rows": int(row[here].max()) + 1, "columns": int(column[here].max()) + 1,
                "positions": here.tolist(), "row": row[here].tolist(), "column": column[here].tolist(),
                # A tile that shows a part of the picture only has no picture of its own to lie under.
                "whole": len(tiles) == 1 or part == 0, "name": f"image {number}" + (f", tile {part}" if len(tiles) > 1 else ""),
                "source": run.images[number] if number < len(run.images) else (run.images[0] if run.images else None),
            }
        )  # fmt: skip
    return found


def special_positions(run: Run, stack: str) -> list[dict[str, Any]]:
    """Positions of a vision stack that are no patches: class token, registers."""
    tokens = run.tokens(stack)
    if tokens["row"] is None:
        return []
    on_grid = np.asarray(tokens["row"]) >= 0
    inside = np.asarray(tokens["image"]) >= 0
    return [{"position": int(i), "token": tokens["keys"][i]} for i in np.flatnonzero(~on_grid & inside)][:64]


def weights(workspace: Workspace, run: Run, heads: Heads, query: int, direction: str = "from") -> Floats:
    """Mean over heads of one row ``[key]`` (what a query looks at) or one column ``[query]`` (what looks at a key).

    Raises:
        PageError: heads of several stacks, too many, none, or a position outside.
    """
    stacks = heads.by_stack()
    if len(stacks) != 1 or len(heads) > MAX_HEADS:
        raise PageError(f"heads must be 1 to {MAX_HEADS} of one stack, got {len(heads)} of {len(stacks)}")
    total: Any = None
    for head in heads:
        values = workspace.pyramid(run, head, Look()).levels[0]
        size = values.shape[0] if direction == "from" else values.shape[1]
        if not 0 <= query < size:
            raise PageError(f"position must be in 0..{size - 1}, got {query}")
        line = values[query] if direction == "from" else values[:, query]
        total = line if total is None else total + line
    return np.asarray(total / len(heads), dtype=np.float32)


def hops(workspace: Workspace, run: Run, head: Head) -> dict[str, Any]:
    """k-hop profile of a vision head, with its layer's and its stack's means where full maps are at hand.

    Raises:
        PageError: a stack whose rows are no patches.
    """
    found = [p for p in panels(run, head.stack) if p["whole"]]
    data = run.check_head(head.stack, head.layer, head.head)
    if not found or data.sizes.get("query") != data.sizes.get("key", data.sizes.get("query")) or head.stack == "text":
        raise PageError(f"a k-hop profile needs a stack whose rows and keys are patches; {head.stack!r} is none", 409)
    panel = found[0]
    at = np.asarray(panel["positions"])

    def profile(one: Head) -> list[float]:
        values = workspace.pyramid(run, one, Look()).levels[0]
        return rings(values[np.ix_(at, at)], panel["row"], panel["column"])[1]

    mine = profile(head)
    out: dict[str, Any] = {"k": list(range(len(mine))), "head": mine}
    if "attention" in data.variables:
        layer = [profile(Head(head.layer, int(h), head.stack)) for h in data["head"].values]
        out["layer"] = np.nanmean(np.asarray(layer), 0).tolist()
    uniform = np.full((len(at), len(at)), 1 / max(1, data.sizes["query"]), np.float32)
    out["uniform"] = rings(uniform, panel["row"], panel["column"])[1]
    return out
