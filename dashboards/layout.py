"""The page's parts. Controls are Dash's; what is drawn on canvas, and what changes by the millisecond, is the scripts'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from dashboards.layout_views import VIEWS, aria, button, select, views

PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play outside."
HELP = (
    "A click on a head opens it; shift-click or a box selects. On a map the wheel zooms, dragging moves, a double click shows "
    "all, and a click locks."
)
LIVE: Any = {"aria-live": "polite"}


def layout(models: Sequence[str], prompt: str = PROMPT) -> Any:
    """The whole page."""
    return dmc.MantineProvider(
        defaultColorScheme="auto",
        children=html.Div(
            id="page",
            children=[
                _header(models),
                _prompt(prompt),
                html.Div(id="problems", role="alert"),
                html.Div(id="status", role="status", **LIVE),
                html.Div(id="answer", hidden=True),
                html.Div([_side(), html.Main([_tabs(), _welcome(), *views()])], className="hs-main"),
                *_sheets(),
                html.Div(id="live", className="visually-hidden", **LIVE),
                dcc.Store(id="state", data={}),
                dcc.Store(id="booted"),
                html.Div(id="file-slot"),
            ],
        ),
    )


def _header(models: Sequence[str]) -> Any:
    data = [{"value": m, "label": m.split("/")[-1] or m} for m in models]
    return html.Header(
        [
            html.H1("Headscope"),
            html.Div(
                dmc.Select(
                    id="c-model",
                    label="Model",
                    data=data,
                    searchable=True,
                    size="xs",
                    nothingFoundMessage="see --root",
                    maxDropdownHeight=320,
                    allowDeselect=False,
                ),
                className="hs-grow",
            ),
            html.Div(
                dmc.Select(
                    id="c-run",
                    label="Run",
                    data=[],
                    searchable=True,
                    size="xs",
                    placeholder="trace a prompt",
                    allowDeselect=False,
                ),
                className="hs-grow",
            ),
            html.Span(className="hs-fill"),
            button("Copy link", "copy-link"),
            button("Show code", "show-code"),
            _exports(),
            html.Button("Jobs", id="jobs-count", type="button", className="hs-button"),
            button("?", "help", title="keyboard"),
            dmc.ColorSchemeToggle(
                lightIcon=html.Span("Dark", className="hs-scheme"),
                darkIcon=html.Span("Light", className="hs-scheme"),
                id="scheme",
                size="md",
                variant="default",
                w=52,
                **aria("light or dark"),
            ),
        ],
        className="hs-head",
    )


def _exports() -> Any:
    entries = [
        ("PNG picture", "export-png"),
        ("SVG picture", "export-svg"),
        ("CSV of all heads", "export-csv"),
        ("NPZ of the head's map", "export-npz"),
        ("HTML page", "do-export-html"),
    ]
    return dmc.Menu(
        [
            dmc.MenuTarget(button("Export", "export")),
            dmc.MenuDropdown([dmc.MenuItem(text, id=name) for text, name in entries]),
        ],
        keepMounted=True,
    )


def _prompt(prompt: str) -> Any:
    return html.Section(
        [
            html.Div(
                [
                    dmc.Textarea(
                        id="c-prompt",
                        label="Prompt",
                        value=prompt,
                        autosize=True,
                        minRows=1,
                        maxRows=6,
                        size="xs",
                        style={"flex": 1},
                    ),
                    html.Div(
                        [html.Div(id="image-preview"), button("Picture…", "image-choose")],
                        className="hs-row hs-end",
                        style={"margin": 0},
                    ),
                    dmc.NumberInput(id="c-new", label="New tokens", value=24, min=0, max=4096, size="xs", w=90),
                    html.Span(
                        dmc.Switch(id="c-chat", label="chat", size="xs", checked=True, mb=4),
                        title="put the prompt in the model's chat template, where it has one",
                    ),
                    button("Trace", "trace", strong=True, title="Ctrl-Enter in the prompt"),
                ],
                className="hs-row hs-end",
            )
        ],
        **aria("prompt"),
    )


def _tabs() -> Any:
    data = [{"value": value, "label": label} for value, label in VIEWS]
    return html.Div(
        [
            dmc.SegmentedControl(id="c-view", data=data, value="overview", size="xs"),
            html.Div(
                dmc.SegmentedControl(id="c-stack", data=[{"value": "text", "label": "text"}], value="text", size="xs"),
                **aria("stacks"),
            ),
            html.Div(select("c-metric", "Colour and order by"), id="metric-box"),
        ],
        className="hs-row hs-end",
    )


def _welcome() -> Any:
    steps = (
        "Pick a model above: bundled ones, folders below --root, or a hub id.",
        "Write a prompt, and choose a picture where the model takes one.",
        "Press Trace. Or pick a saved trace under Run.",
    )
    return html.Div(
        [
            html.H2("Nothing is open yet"),
            html.Ol([html.Li(step) for step in steps]),
            html.P("A press on ? lists the keys. Nothing leaves this machine.", className="hs-dim"),
        ],
        id="welcome",
        hidden=True,
    )


def _side() -> Any:
    return html.Aside(html.Div(id="chosen"), className="hs-side", **aria("chosen head and selection"))


def _sheets() -> list[Any]:
    return [
        dmc.Modal(
            id="code-modal",
            title="Python that rebuilds this view",
            size="xl",
            children=[dmc.CodeHighlight(id="code", code="", language="python")],
        ),
        dmc.Modal(
            id="help-modal",
            title="Keyboard",
            keepMounted=True,
            children=[html.Table(html.Tbody(id="help-keys"), className="hs-table"), html.P(HELP, className="hs-dim")],
        ),
        dmc.Drawer(id="jobs-drawer", title="Jobs", position="right", keepMounted=True, children=[html.Div(id="jobs")]),
    ]
