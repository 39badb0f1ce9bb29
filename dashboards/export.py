"""One self-contained HTML page of a run: overview, maps of chosen heads, table; opens without a server."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.maps import Look
from dashboards.overview import overview, sprite_png
from dashboards.pictures import TILE, Pyramid, indices, png
from dashboards.runs import Run
from interp.heads import Head, Heads

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

ASSETS = Path(__file__).parent / "assets"
MOST_HEADS = 64
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
START = (
    'headscopeStandalone(document.getElementById("headscope"), '
    'JSON.parse(document.getElementById("headscope-data").textContent));'
)
EXACT = 512
"""Up to this many rows and keys a map travels with its values (fp16); larger ones as a picture of pooled cells."""


def page_data(space: Workspace | None, run: Run, heads: Heads) -> dict[str, Any]:
    """What the renderer needs, as JSON: every stack's overview, tokens, and the maps of the heads."""
    from dashboards.workspace import Workspace as Space

    bare = space if space is not None else Space.__new__(Space)
    stacks: dict[str, Any] = {}
    for stack in run.trace:
        data = overview(bare, run, stack) if space is not None else _prompt_only(run, stack)
        data["metrics"] = [m for m in data["metrics"] if m["ready"]]
        data["sprite"] = base64.b64encode(sprite_png(run, stack)).decode() if data["pooled"] else None
        stacks[stack] = {"overview": data, "tokens": run.tokens(stack)}
    chosen = heads[:MOST_HEADS] if len(heads) else default_heads(run)
    maps = {str(head): _map(space, run, head) for head in chosen}
    return {"title": run.title, "model": run.model_name, "answer": run.answer, "stacks": stacks, "maps": maps}


def default_heads(run: Run, count: int = 12) -> Heads:
    """The heads with the largest weights in the first stack: what is worth a look where nothing was chosen."""
    stack = "text" if "text" in run.trace else next(iter(run.trace))
    entries = [v for m, v in run.metric_values(stack) if m.key == "top_weight"] or [
        v for _, v in run.metric_values(stack)
    ]
    if not entries:
        return Heads([Head(0, 0, stack)])
    flat = np.where(np.isfinite(entries[0]), entries[0], -np.inf).ravel()
    order = np.argsort(-flat, kind="stable")[:count]
    return Heads(
        Head(int(i) // entries[0].shape[1], int(i) % entries[0].shape[1], stack) for i in order if np.isfinite(flat[i])
    )


def html_page(space: Workspace | None, run: Run, heads: Heads) -> str:
    """The page as text: data, style and the renderer inside, nothing from elsewhere."""
    data = json.dumps(page_data(space, run, heads)).replace("<", "\\u003c")
    scripts = "".join(
        f"<script>{_script(name)}</script>" for name in ("a_palettes.js", "b_renderer.js", "z_standalone.js")
    )
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<title>Headscope: {html.escape(run.title)}</title><style>{style}</style></head><body><div id="headscope"></div>'
        f'{scripts}<script type="application/json" id="headscope-data">{data}</script>'
        f"<script>{START}</script>"
        "</body></html>\n"
    )


def _script(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8").replace("</script", "<\\/script")


def _prompt_only(run: Run, stack: str) -> dict[str, Any]:
    class _NoScores:
        @staticmethod
        def score(*_: str) -> None:
            return None

    return overview(_NoScores(), run, stack)  # type: ignore[arg-type]


def _map(space: Workspace | None, run: Run, head: Head) -> dict[str, Any]:
    if space is not None:
        pyramid: Pyramid = space.pyramid(run, head, Look())
    else:
        full = run.full_map(head.stack, head.layer, head.head)
        pooled = run.pooled(head.stack)
        pyramid = Pyramid(
            full
            if full is not None
            else pooled[head.layer, head.head]
            if pooled is not None
            else np.zeros((1, 1), np.float32)
        )
    rows, columns = pyramid.shape
    found: dict[str, Any] = {
        "stack": head.stack,
        "layer": head.layer,
        "head": head.head,
        "rows": rows,
        "columns": columns,
        "top": pyramid.top,
    }
    if max(rows, columns) <= EXACT:
        found["values"] = base64.b64encode(pyramid.levels[0].astype("<f2").tobytes()).decode()
    else:
        level = next(lv for lv in pyramid.levels if max(lv.shape) <= TILE)
        found["picture"] = base64.b64encode(png(indices(level, pyramid.top or 1.0, 0.5))).decode()
    return found
