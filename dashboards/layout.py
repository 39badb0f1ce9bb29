"""The page's parts. Controls are Dash's; what is drawn on canvas, and what changes by the millisecond, is the scripts'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import dcc, html

PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play outside."
VIEWS = (
    ("overview", "Overview"), ("head", "Head"), ("image", "Image"), ("map", "Map of heads"), ("importance", "Importance"),
    ("sinks", "Sinks"), ("workbench", "Workbench"),
)  # fmt: skip
GRID: Any = {
    "theme": {"function": "themeQuartz"}, "rowSelection": {"mode": "multiRow", "enableClickSelection": False},
    "pagination": False, "animateRows": False, "suppressFieldDotNotation": True, "tooltipShowDelay": 300,
}  # fmt: skip


def layout(models: Sequence[str], prompt: str = PROMPT) -> Any:
    """The whole page."""
    return dmc.MantineProvider(
        defaultColorScheme="auto",
        children=html.Div(
            id="page",
            children=[
                _header(models), _prompt(prompt), html.Div(id="problems", role="alert"),
                html.Div(id="status", role="status", **{"aria-live": "polite"}), html.Div(id="answer", hidden=True),
                html.Div([_side(), html.Main([_tabs(), *_views()])], className="hs-main"), *_sheets(),
                html.Div(id="live", className="visually-hidden", **{"aria-live": "polite"}),
                dcc.Store(id="state", data={}), dcc.Store(id="booted"), html.Div(id="file-slot"),
            ],
        ),
    )  # fmt: skip


def _button(text: str, id: str, **more: Any) -> Any:
    strong = " hs-strong" if more.pop("strong", False) else ""
    return html.Button(text, id=id, type="button", className=f"hs-button{strong}", **more)


def _header(models: Sequence[str]) -> Any:
    data = [{"value": m, "label": m.split("/")[-1] or m} for m in models]
    return html.Header(
        [
            html.H1("Headscope"),
            html.Div(
                dmc.Select(
                    id="c-model", label="Model", data=data, searchable=True, size="xs", nothingFoundMessage="see --root",
                    maxDropdownHeight=320, allowDeselect=False,
                ),
                className="hs-grow",
            ),
            html.Div(
                dmc.Select(id="c-run", label="Run", data=[], searchable=True, size="xs", placeholder="trace a prompt", allowDeselect=False),
                className="hs-grow",
            ),
            html.Span(className="hs-fill"), _button("Copy link", "copy-link"), _button("Show code", "show-code"),
            _exports(), html.Button("Jobs", id="jobs-count", type="button", className="hs-button"), _button("?", "help", title="keyboard"),
            dmc.ColorSchemeToggle(
                lightIcon=html.Span("Dark", className="hs-scheme"), darkIcon=html.Span("Light", className="hs-scheme"), id="scheme",
                size="md", variant="default", w=52, **{"aria-label": "light or dark"},
            ),
        ],
        className="hs-head",
    )  # fmt: skip


def _exports() -> Any:
    entries = [
        ("PNG picture", "export-png"), ("SVG picture", "export-svg"), ("CSV of all heads", "export-csv"),
        ("NPZ of the head's map", "export-npz"), ("HTML page", "do-export-html"),
    ]  # fmt: skip
    return dmc.Menu(
        [
            dmc.MenuTarget(_button("Export", "export")),
            dmc.MenuDropdown([dmc.MenuItem(text, id=name) for text, name in entries]),
        ],
        keepMounted=True,
    )


def _prompt(prompt: str) -> Any:
    return html.Section(
        [
            html.Div(
                [
                    dmc.Textarea(id="c-prompt", label="Prompt", value=prompt, autosize=True, minRows=1, maxRows=6, size="xs", style={"flex": 1}),
                    html.Div([html.Div(id="image-preview"), _button("Picture…", "image-choose")], className="hs-row hs-end", style={"margin": 0}),
                    dmc.NumberInput(id="c-new", label="New tokens", value=24, min=0, max=4096, size="xs", w=90),
                    dmc.Switch(id="c-chat", label="chat", size="xs", checked=False, mb=4),
                    _button("Trace", "trace", strong=True, title="Ctrl-Enter in the prompt"),
                ],
                className="hs-row hs-end",
            )
        ],
        **{"aria-label": "prompt"},
    )  # fmt: skip


def _tabs() -> Any:
    data = [{"value": value, "label": label} for value, label in VIEWS]
    return html.Div(
        [
            dmc.SegmentedControl(id="c-view", data=data, value="overview", size="xs"),
            dmc.SegmentedControl(id="c-stack", data=[{"value": "text", "label": "text"}], value="text", size="xs", color="blue"),
        ],
        className="hs-row",
    )


def _side() -> Any:
    return html.Aside(html.Div(id="chosen"), className="hs-side", **{"aria-label": "chosen head and selection"})


def _view(name: str, children: list[Any]) -> Any:
    label = dict(VIEWS)[name]
    return html.Section(children, id=f"view-{name}", hidden=name != "overview", **{"aria-label": label})


def _views() -> list[Any]:
    return [_overview(), _head(), _image(), _map(), _importance(), _sinks(), _workbench()]


def _select(id: str, label: str, data: Any = (), value: str | None = None, width: int = 230) -> Any:
    return dmc.Select(id=id, label=label, data=list(data), value=value, size="xs", w=width, searchable=True, allowDeselect=False, maxDropdownHeight=380)


def _switch(id: str, label: str) -> Any:
    return dmc.Switch(id=id, label=label, size="xs", checked=False)


def _overview() -> Any:
    sorts = [
        {"value": "none", "label": "as in the model"}, {"value": "value", "label": "by value"}, {"value": "cluster", "label": "alike maps together"},
    ]  # fmt: skip
    return _view(
        "overview",
        [
            html.Div(
                [
                    _select("c-metric", "Colour by"), _select("c-sort", "Heads in a layer", sorts, "none", 170),
                    dmc.NumberInput(id="c-top", label="Top N only (0: all)", value=0, min=0, max=100000, size="xs", w=120),
                    dmc.NumberInput(id="c-zoom", label="Zoom", value=1, min=1, max=6, step=0.5, size="xs", w=80),
                    _switch("c-thumbs", "maps as thumbnails"),
                ],
                className="hs-row hs-end",
            ),
            html.Div(id="metric-about"), html.Div(id="grid-bar", className="hs-bar"), html.Div(id="grid-host", className="hs-scroll"),
            html.H2("The same heads as a table"),
            dag.AgGrid(
                id="table", columnDefs=[], rowData=[], dashGridOptions=GRID, getRowId="params.data.id", columnSize=None,
                defaultColDef={"sortable": True, "resizable": True, "filter": True, "floatingFilter": False},
                style={"height": "340px", "width": "100%"},
            ),
        ],
    )  # fmt: skip


def _head() -> Any:
    directions = [{"value": "from", "label": "query → key"}, {"value": "to", "label": "key → query"}]
    return _view(
        "head",
        [
            html.Div(
                [
                    dmc.SegmentedControl(id="c-dir", data=directions, value="from", size="xs"),
                    _switch("c-norm", "row-normalise"), _switch("c-hide", "hide sink columns"),
                    dmc.NumberInput(id="c-gamma", label="Gamma", value=0.5, min=0.2, max=1, step=0.1, size="xs", w=80),
                    _button("+", "zoom-in", title="zoom in"), _button("−", "zoom-out", title="zoom out"), _button("All", "zoom-all", title="the whole map"),
                    _select("c-pinrun", "Beside it, the same under", width=210),
                ],
                className="hs-row hs-end",
            ),
            html.Div(
                [
                    html.Div([html.Div(id="map-host")]),
                    html.Div([html.H2(id="pin-title"), html.Div(id="pin-host")], id="pin-box", hidden=True),
                    html.Div(
                        [
                            html.Div(id="head-facts"), html.Div(id="head-pairs"),
                            html.Div([_button("Direct logits (OV)", "do-logits"), _button("Examples in other texts", "do-examples")], className="hs-row"),
                            html.Div(id="head-logits"), html.Div(id="head-examples"),
                        ]
                    ),
                ],
                id="maps",
            ),
            html.Div(id="strip-note", className="hs-dim", role="status"),
            html.H2("Keys"), html.Div(id="strip-k"), html.H2("Queries"), html.Div(id="strip-q"),
        ],
    )  # fmt: skip


def _image() -> Any:
    return _view(
        "image",
        [
            html.Div(
                [
                    _switch("c-mean", "mean of the selected heads"), _button("From a token", "image-from"),
                    html.Label(["opacity ", html.Span(id="opacity-slot")], className="hs-row"),
                    html.Label(["step through generation ", html.Span(id="step-slot")], className="hs-row", id="step-box", hidden=True),
                ],
                className="hs-row",
            ),
            html.Div(id="image-note", className="hs-dim", role="status"), html.Div(id="image-bar", className="hs-bar"),
            html.Div(id="image-special", className="hs-row"), html.Div(id="image-panels"), html.Div(id="image-tokens"), html.Div(id="hops"),
        ],
    )  # fmt: skip


def _map() -> Any:
    axes = [{"value": "pca", "label": "PCA"}, {"value": "umap", "label": "UMAP"}]
    return _view(
        "map",
        [
            html.Div([_select("c-sx", "Axes: a map, or x", axes, "pca"), _select("c-sy", "y (where x is a number)")], className="hs-row hs-end"),
            html.Div(id="map-note", className="hs-dim", role="status"), html.Div(id="scatter-bar", className="hs-bar"),
            html.Div(id="scatter-host"), html.Div(id="archetypes"),
        ],
    )  # fmt: skip


def _importance() -> Any:
    return _view(
        "importance",
        [
            html.Div(id="importance-note", className="hs-dim"), html.Div(id="importance-bar", className="hs-bar"),
            html.Div([html.Div(id="importance-host", className="hs-scroll"), html.Div([html.H2("Rank agreement"), html.Div(id="agreement-host")])], className="hs-cols"),
            html.Div([_button("Take the chosen head apart", "do-dissect")], className="hs-row"), html.Div(id="dissect-host"),
        ],
    )  # fmt: skip


def _sinks() -> Any:
    return _view(
        "sinks",
        [
            html.Div(
                [
                    dmc.NumberInput(id="c-thr", label="Threshold", value=0.3, min=0.01, max=1, step=0.05, size="xs", w=100),
                    _select("c-rows", "Rows", [{"value": "", "label": "all rows"}], "", 150),
                    _button("Massive activations", "do-massive"),
                ],
                className="hs-row hs-end",
            ),
            html.Div(id="sink-list"), html.H2("Attention received, by layer and key"), html.Div(id="sink-bar", className="hs-bar"),
            html.Div(id="sink-matrix", className="hs-scroll"), html.H2("Share of a head's attention on sink tokens"),
            html.Div(id="sink-heads", className="hs-scroll"), html.Div(id="massive"),
        ],
    )  # fmt: skip


def _workbench() -> Any:
    return _view(
        "workbench",
        [
            html.Div([html.Span(id="add-slot"), html.Span(id="saved-slot")], className="hs-row"), html.Div(id="cards"),
            html.Div(
                [
                    html.Span(id="options-slot", className="hs-row"), _button("Run before / after", "wb-run", strong=True),
                    _button("Stop", "wb-stop", disabled=True),
                ],
                className="hs-row hs-end",
            ),
            html.Div(id="verdict", role="status"),
            html.Div(
                [
                    html.Div([html.H2("Before"), html.Div(id="text-before", className="hs-text")]),
                    html.Div([html.H2("After"), html.Div(id="text-after", className="hs-text")]),
                ],
                className="hs-texts",
            ),
            html.Div(id="wb-after-buttons", className="hs-row"), html.Div(id="effect"), html.Div(id="curves"),
            html.H2("On a probe"), html.Div([html.Span(id="probe-slot", className="hs-row"), _button("Evaluate", "wb-evaluate")], className="hs-row"),
            html.Div(id="evaluation"),
        ],
    )  # fmt: skip


def _sheets() -> list[Any]:
    return [
        dmc.Modal(id="code-modal", title="Python that rebuilds this view", size="xl", children=[dmc.CodeHighlight(id="code", code="", language="python")]),
        dmc.Modal(
            id="help-modal", title="Keyboard", keepMounted=True,
            children=[html.Table(html.Tbody(id="help-keys"), className="hs-table"), html.P("A click on a head opens it; shift-click or a box selects. On a map: wheel zooms, drag moves, double click shows all, click locks.", className="hs-dim")],
        ),
        dmc.Drawer(id="jobs-drawer", title="Jobs", position="right", keepMounted=True, children=[html.Div(id="jobs")]),
    ]  # fmt: skip
