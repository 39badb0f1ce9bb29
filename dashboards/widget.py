"""The same pictures in a notebook, by anywidget: ``headscope_widget(run.trace)``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from dashboards.export import page_data
from dashboards.runs import Run, run_id
from interp.heads import as_heads
from interp.tracing.trace import Trace

ASSETS = Path(__file__).parent / "assets"


def module_source() -> str:
    """The renderer as one ES module, for a front end that imports it."""
    parts = [
        (ASSETS / name).read_text(encoding="utf-8") for name in ("a_palettes.js", "b_renderer.js", "z_standalone.js")
    ]
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    main = (
        "export default { render({ model, el }) { if (!document.getElementById('headscope-style')) {"
        " const s = document.createElement('style');"
        f" s.id = 'headscope-style'; s.textContent = {_quoted(style)}; document.head.append(s); }}"
        " const host = document.createElement('div'); el.append(host); window.headscopeStandalone(host, model.get('data')); } };"
    )
    return "\n".join([*parts, main])


def headscope_widget(trace: Trace, heads: Any = (), title: str = "") -> Any:
    """A widget of a trace.

    Args:
        trace: what ``interp.hooked`` recorded, with ``row_stats``, ``received`` and ``pooled`` for the overview.
        heads: whose maps to carry; none takes those with the largest weights.
        title: shown above.

    Raises:
        ImportError: anywidget is not installed.
    """
    try:
        anywidget: Any = import_module("anywidget")
        traitlets: Any = import_module("traitlets")
    except ImportError as error:
        raise ImportError("the widget needs anywidget: pip install headscope[notebooks]") from error
    run = Run(run_id({"widget": id(trace)}), {}, trace, title or "trace")
    data = page_data(None, run, as_heads(heads))
    made = type(
        "HeadscopeWidget", (anywidget.AnyWidget,), {"_esm": module_source(), "data": traitlets.Dict().tag(sync=True)}
    )
    return made(data=data)


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)
