"""The views of the page, one function each: their controls, and the places that the scripts draw into."""

from __future__ import annotations

from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import html

VIEWS = (
    ("overview", "Overview"),
    ("head", "Head"),
    ("image", "Image"),
    ("map", "Map of heads"),
    ("importance", "Importance"),
    ("sinks", "Sinks"),
    ("workbench", "Workbench"),
)
GRID: Any = {
    "theme": {"function": "themeQuartz"},
    "rowSelection": {"mode": "multiRow", "enableClickSelection": False},
    "pagination": False,
    "animateRows": False,
    "suppressFieldDotNotation": True,
    "tooltipShowDelay": 300,
}


def aria(label: str) -> Any:
    """The name of a part of the page for screen readers."""
    return {"aria-label": label}


def button(text: str, id: str, **more: Any) -> Any:
    strong = " hs-strong" if more.pop("strong", False) else ""
    return html.Button(text, id=id, type="button", className=f"hs-button{strong}", **more)


def _view(name: str, children: list[Any]) -> Any:
    label = dict(VIEWS)[name]
    return html.Section(children, id=f"view-{name}", hidden=name != "overview", **aria(label))


def views() -> list[Any]:
    return [_overview(), _head(), _image(), _map(), _importance(), _sinks(), _workbench()]


def select(id: str, label: str, data: Any = (), value: str | None = None, width: int = 230, **more: Any) -> Any:
    """A picker that is searched by typing."""
    return dmc.Select(
        id=id,
        label=label,
        data=list(data),
        value=value,
        size="xs",
        w=width,
        searchable=True,
        allowDeselect=False,
        maxDropdownHeight=380,
        **more,
    )


def _switch(id: str, label: str) -> Any:
    return dmc.Switch(id=id, label=label, size="xs", checked=False)


def _overview() -> Any:
    sorts = [
        {"value": "none", "label": "as in the model"},
        {"value": "value", "label": "by value"},
        {"value": "cluster", "label": "alike maps together"},
    ]
    return _view(
        "overview",
        [
            html.Div(
                [
                    select("c-sort", "Heads in a layer", sorts, "none", 170),
                    dmc.NumberInput(
                        id="c-top", label="Top N only (0: all)", value=0, min=0, max=100000, size="xs", w=120
                    ),
                    dmc.NumberInput(id="c-zoom", label="Zoom", value=1, min=1, max=6, step=0.5, size="xs", w=80),
                    _switch("c-thumbs", "maps as thumbnails"),
                ],
                className="hs-row hs-end",
            ),
            html.Div(id="metric-about"),
            html.Div(id="grid-bar", className="hs-bar"),
            html.Div(id="grid-host", className="hs-scroll"),
            html.H2("The same heads as a table"),
            dag.AgGrid(
                id="table",
                columnDefs=[],
                rowData=[],
                dashGridOptions=GRID,
                getRowId="params.data.id",
                columnSize=None,
                defaultColDef={"sortable": True, "resizable": True, "filter": True, "floatingFilter": False},
                style={"height": "340px", "width": "100%"},
            ),
        ],
    )


def _head() -> Any:
    directions = [{"value": "from", "label": "query → key"}, {"value": "to", "label": "key → query"}]
    return _view(
        "head",
        [
            html.Div(
                [
                    dmc.SegmentedControl(id="c-dir", data=directions, value="from", size="xs"),
                    _switch("c-norm", "row-normalise"),
                    _switch("c-hide", "hide sink columns"),
                    dmc.NumberInput(id="c-gamma", label="Gamma", value=0.5, min=0.2, max=1, step=0.1, size="xs", w=80),
                    button("+", "zoom-in", title="zoom in"),
                    button("−", "zoom-out", title="zoom out"),
                    button("All", "zoom-all", title="the whole map"),
                    select(
                        "c-pinrun", "Beside it, the head in another run", width=230, clearable=True, placeholder="none"
                    ),
                ],
                className="hs-row hs-end",
            ),
            html.Div(
                [
                    html.Div(
                        [
                            html.Div(
                                [
                                    html.Div([html.H2(id="map-title"), html.Div(id="map-host")]),
                                    html.Div(
                                        [html.H2(id="pin-title"), html.Div(id="pin-host")], id="pin-box", hidden=True
                                    ),
                                ],
                                className="hs-maprow",
                            ),
                            html.Div(id="strip-note", className="hs-dim", role="status"),
                            html.H2("Keys"),
                            html.Div(id="strip-k"),
                            html.H2("Queries"),
                            html.Div(id="strip-q"),
                        ]
                    ),
                    html.Div(
                        [
                            html.Div(id="head-facts"),
                            html.Div(id="head-pairs"),
                            html.Div(
                                [
                                    button("Direct logits (OV)", "do-logits"),
                                    button("Examples in other texts", "do-examples"),
                                ],
                                className="hs-row",
                            ),
                            html.Div(id="head-logits"),
                            html.Div(id="head-examples"),
                        ]
                    ),
                ],
                id="maps",
            ),
        ],
    )


def _image() -> Any:
    return _view(
        "image",
        [
            html.Div(
                [
                    _switch("c-mean", "mean of the selected heads"),
                    button("From a token", "image-from"),
                    html.Label(["opacity ", html.Span(id="opacity-slot")], className="hs-row"),
                    html.Label(
                        ["step through generation ", html.Span(id="step-slot")],
                        className="hs-row",
                        id="step-box",
                        hidden=True,
                    ),
                ],
                className="hs-row",
            ),
            html.Div(id="image-note", className="hs-dim", role="status"),
            html.Div(id="image-bar", className="hs-bar"),
            html.Div(id="image-special", className="hs-row"),
            html.Div(id="image-panels"),
            html.Div(id="image-tokens"),
            html.Div(id="hops"),
        ],
    )


def _map() -> Any:
    axes = [{"value": "pca", "label": "PCA"}, {"value": "umap", "label": "UMAP"}]
    return _view(
        "map",
        [
            html.Div(
                [select("c-sx", "Axes: a map, or x", axes, "pca"), select("c-sy", "y (where x is a number)")],
                className="hs-row hs-end",
            ),
            html.Div(id="map-note", className="hs-dim", role="status"),
            html.Div(id="scatter-bar", className="hs-bar"),
            html.Div(id="scatter-host"),
            html.Div(id="archetypes"),
        ],
    )


def _importance() -> Any:
    return _view(
        "importance",
        [
            html.Div(id="importance-note", className="hs-dim"),
            html.Div(id="importance-compute", className="hs-row"),
            html.Div(id="importance-bar", className="hs-bar"),
            html.Div(
                [
                    html.Div(id="importance-host", className="hs-scroll"),
                    html.Div([html.H2("Rank agreement"), html.Div(id="agreement-host")]),
                ],
                className="hs-cols",
            ),
            html.Div([button("Take the chosen head apart", "do-dissect")], className="hs-row"),
            html.Div(id="dissect-host"),
        ],
    )


def _sinks() -> Any:
    return _view(
        "sinks",
        [
            html.Div(
                [
                    dmc.NumberInput(
                        id="c-thr", label="Threshold", value=0.3, min=0.01, max=1, step=0.05, size="xs", w=100
                    ),
                    select("c-rows", "Rows", [{"value": "", "label": "all rows"}], "", 150),
                    button("Massive activations", "do-massive"),
                ],
                className="hs-row hs-end",
            ),
            html.Div(id="sink-list"),
            html.H2("Attention received, by layer and key"),
            html.Div(id="sink-bar", className="hs-bar"),
            html.Div(id="sink-matrix", className="hs-scroll"),
            html.H2("Share of a head's attention on sink tokens"),
            html.Div(id="sink-heads", className="hs-scroll"),
            html.Div(id="massive"),
        ],
    )


def _workbench() -> Any:
    return _view(
        "workbench",
        [
            html.Div([html.Span(id="add-slot"), html.Span(id="saved-slot")], className="hs-row"),
            html.Div(id="cards"),
            html.Div(
                [
                    html.Span(id="options-slot", className="hs-row"),
                    button("Run before / after", "wb-run", strong=True),
                    button("Stop", "wb-stop", disabled=True),
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
            html.Div(id="wb-after-buttons", className="hs-row"),
            html.Div(id="effect"),
            html.Div(id="curves"),
            html.H2("On a probe"),
            html.Div(
                [html.Span(id="probe-slot", className="hs-row"), button("Evaluate", "wb-evaluate")], className="hs-row"
            ),
            html.Div(id="evaluation"),
        ],
    )
