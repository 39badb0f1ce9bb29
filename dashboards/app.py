"""The page of ``headscope dash``: a score on the layer x head grid, and a head's map over the tokens of a prompt."""

from __future__ import annotations

import threading
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer
from dash import Dash, Input, Output, State, dcc, html, no_update

from dashboards.figures import empty_figure, map_figure
from dashboards.workbench import Workbench
from interp.heads import Head
from interp.models.model import Model

HOST = "127.0.0.1"
PROMPT = "Mary and John went to the shop. Mary gave a book to John. Then Mary and"
GRAPH: Any = {"displaylogo": False, "responsive": True}
BANNER = {
    "color": "#8a1020",
    "background": "#fdecee",
    "padding": "10px 14px",
    "borderRadius": "6px",
    "margin": "10px 0",
}
HIDDEN = {"display": "none"}


def aria(label: str) -> dict[str, Any]:
    """The name of a part of the page for screen readers."""
    return {"aria-label": label}


def make_app(
    model: Model | Mapping[str, Model] | None = None,
    *,
    sources: Sequence[str] = (),
    load_options: Mapping[str, Any] | None = None,
    prompt: str = PROMPT,
) -> Dash:
    """The Dash app.

    Args:
        model: a loaded model, or several by name.
        sources: what else may be picked; loaded by ``interp.load`` when it is.
        load_options: keyword arguments of that load.
        prompt: what the prompt box holds at first.
    """
    models = {model.name: model} if isinstance(model, Model) else dict(model or {})
    bench = Workbench(models, sources, load_options)
    app = Dash(__name__, title="Headscope", update_title="", serve_locally=True, enable_mcp=False)
    # Without this list a page of another site could reach the model through a name that it points to this machine.
    app.server.config.update(TRUSTED_HOSTS=[HOST, "localhost"], MAX_CONTENT_LENGTH=2 * 2**20)
    app.server.after_request(_headers)
    app.layout = _layout(bench, prompt)
    actions = Actions(bench)
    app.callback(
        Output("grid", "figure"), Output("grid-error", "children"), Output("grid-error", "style"), Output("stack", "data"),
        Input("model", "value"), Input("score", "value"),
    )(actions.grid)  # fmt: skip
    app.callback(
        Output("map", "figure"), Output("map-error", "children"), Output("map-error", "style"), Output("head", "children"),
        Input("grid", "clickData"), Input("draw", "n_clicks"), State("model", "value"), State("stack", "data"),
        State("prompt", "value"), prevent_initial_call=True,
    )(actions.head_map)  # fmt: skip
    return app


class Actions:
    """What the callbacks do, callable without a server."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench

    def grid(self, model: str | None, score: str | None) -> tuple[Any, Any, Any, Any]:
        """Figure, error text, its style, and the score's stack."""
        if not model or not score:
            return empty_figure("pick a model and a score"), "", HIDDEN, None
        found, error = _attempt(lambda: self.bench.score(model, score))
        if found is None:
            return empty_figure("no score"), error, BANNER, None
        return found.heads.grid(), "", HIDDEN, found.attrs["stack"]

    def head_map(
        self, click: Any, clicks: int | None, model: str | None, stack: str | None, prompt: str | None
    ) -> tuple[Any, Any, Any, Any]:
        """Figure, error text, its style, and the head's name."""
        if not click or not model or not stack:
            return no_update, "click a head in the grid first", BANNER, no_update
        point = click["points"][0]
        head = Head(int(point["y"]), int(point["x"]), stack)
        found, error = _attempt(lambda: self.bench.head_map(model, head, prompt or ""))
        if found is None:
            return empty_figure(f"no map of {head}"), error, BANNER, str(head)
        return map_figure(*found, title=f"{head} of {model}"), "", HIDDEN, str(head)


def serve(app: Dash, *, port: int, browser: bool) -> None:
    """Serve on this machine only, until Ctrl-C.

    Raises:
        OSError: the port is taken.
    """
    from werkzeug.serving import make_server

    try:
        server = make_server(HOST, port, app.server, threaded=True)
    except (OSError, SystemExit) as error:
        raise OSError(f"--port must be free, got {port}; --port 0 takes any") from error
    address = f"http://{HOST}:{server.server_port}/"
    typer.echo(f"Headscope is at {address} (Ctrl-C ends it)")
    if browser:
        threading.Timer(0.5, webbrowser.open, (address,)).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("ended")
    finally:
        server.server_close()


def _attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """The result, or None and one line about what went wrong: the page must live on, whatever a model does."""
    try:
        return work(), ""
    except Exception as error:
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        return None, f"{type(error).__name__}: {' '.join(message.split())[:600]}"


def _headers(response: Any) -> Any:
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers["X-Frame-Options"] = "SAMEORIGIN"
    return response


def _layout(bench: Workbench, prompt: str) -> Any:
    from interp import analysis

    scores = [{"label": f"{entry.name}: {entry.summary}", "value": entry.name} for entry in analysis.scores()]
    first = bench.names[0] if bench.names else None
    panel = {"flex": "1 1 480px", "minWidth": "0"}
    return html.Main(
        style={"fontFamily": "system-ui, sans-serif", "maxWidth": "1500px", "margin": "0 auto", "padding": "12px 20px"},
        children=[
            html.H1("Headscope", style={"fontSize": "22px", "margin": "4px 0 12px"}),
            html.Div(
                style={"display": "flex", "gap": "16px", "flexWrap": "wrap"},
                children=[
                    _field("Model", dcc.Dropdown(list(bench.names), first, id="model", clearable=False)),
                    _field("Score", dcc.Dropdown(scores, "previous_token", id="score", clearable=False)),
                ],
            ),
            html.Div(id="grid-error", role="alert", style=HIDDEN),
            html.Div(
                style={"display": "flex", "gap": "16px", "flexWrap": "wrap", "marginTop": "12px"},
                children=[
                    html.Section(
                        [
                            dcc.Loading(
                                dcc.Graph(id="grid", figure=empty_figure("working"), config=GRAPH), delay_show=300
                            ),
                            html.P("Click a head to see its map.", style={"color": "#555555"}),
                        ],
                        style=panel,
                        **aria("scores by layer and head"),
                    ),
                    html.Section(
                        [
                            html.Label("Prompt", htmlFor="prompt", style={"fontWeight": 600}),
                            dcc.Textarea(
                                id="prompt", value=prompt, rows=3, style={"width": "100%", "boxSizing": "border-box"}
                            ),
                            html.Div(
                                [
                                    html.Button("Draw the map", id="draw", n_clicks=0),
                                    html.Strong(id="head", role="status", style={"marginLeft": "12px"}),
                                ]
                            ),
                            html.Div(id="map-error", role="alert", style=HIDDEN),
                            dcc.Loading(
                                dcc.Graph(id="map", figure=empty_figure("no head picked"), config=GRAPH), delay_show=300
                            ),
                        ],
                        style=panel,
                        **aria("attention map of one head"),
                    ),
                ],
            ),
            dcc.Store(id="stack"),
        ],
    )


def _field(label: str, control: Any) -> Any:
    return html.Label([html.Div(label, style={"fontWeight": 600}), control], style={"flex": "1 1 320px"})
