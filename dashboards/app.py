"""The page of ``headscope dashboard``: the Dash app, its few callbacks, and the server."""

from __future__ import annotations

import sys
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from dash import Dash, Input, Output, State, no_update

from dashboards.errors import PageError, explain
from dashboards.layout import PROMPT, layout
from dashboards.routes import blueprint
from dashboards.safety import LOOPBACK, Guard, content_policy, new_token
from dashboards.workspace import Workspace
from interp.models.model import Model

HOST = "127.0.0.1"
CONTROLS = {
    "model": "value",
    "run": "value",
    "view": "value",
    "stack": "value",
    "metric": "value",
    "thumbs": "checked",
    "sort": "value",
    "top": "value",
    "zoom": "value",
    "norm": "checked",
    "hide": "checked",
    "gamma": "value",
    "dir": "value",
    "mean": "checked",
    "sx": "value",
    "sy": "value",
    "thr": "value",
    "rows": "value",
    "pinrun": "value",
    "prompt": "value",
    "new": "value",
    "chat": "checked",
}
"""Controls whose value is part of the page's state, and the property that holds it."""


def make_app(
    model: Model | Mapping[str, Model] | None = None,
    *,
    sources: Sequence[str] = (),
    load_options: Mapping[str, Any] | None = None,
    roots: Sequence[str | Path] = (),
    state: str | Path | None = None,
    prompt: str = PROMPT,
    hosts: Sequence[str] | None = LOOPBACK,
    token: str | None = None,
) -> Dash:
    """The Dash app; its workspace is ``app.workspace``.

    Args:
        model: a loaded model, or several by name.
        sources: what else may be picked; loaded by ``interp.load`` when it is.
        load_options: keyword arguments of that load.
        roots: folders below which models and saved traces may be taken.
        state: folder of pictures, runs, jobs and saved results.
        prompt: what the prompt box holds at first.
        hosts: names the page may be reached by; None is any, which needs a token.
        token: to be given once in the address; None on this machine.
    """
    if hosts is None and token is None:
        raise ValueError("hosts must be given where there is no token, got None")
    models = {model.name: model} if isinstance(model, Model) else dict(model or {})
    space = Workspace(models, sources, roots, load_options, state)
    app = Dash(
        __name__,
        title="Headscope",
        update_title="",
        serve_locally=True,
        enable_mcp=False,
        assets_folder=str(Path(__file__).parent / "assets"),
        suppress_callback_exceptions=False,
    )
    app.layout = layout(space.offered(), prompt)
    _callbacks(app, space)
    app.server.register_blueprint(blueprint(space))
    Guard(hosts, token).install(app.server, content_policy(app.csp_hashes()))
    app.workspace, app.token = space, token  # type: ignore[attr-defined]
    return app


def _callbacks(app: Dash, space: Workspace) -> None:
    for key, prop in CONTROLS.items():
        app.clientside_callback(
            f"function(v) {{ if (window.hs) window.hs.control('{key}', v); }}", Input(f"c-{key}", prop)
        )
    app.clientside_callback(
        "function(rows) { if (window.hs && rows) window.hs.tablePicked(rows); }",
        Input("table", "selectedRows"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        "function(cell) { if (window.hs && cell) window.hs.tableOpened(cell); }",
        Input("table", "cellClicked"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        "function() { setTimeout(function () { window.hs.hostInputs(); window.hs.boot(); }, 0); return window.dash_clientside.no_update; }",
        Output("booted", "data"),
        Input("page", "id"),
    )
    for button, sheet in (("help", "help-modal"), ("jobs-count", "jobs-drawer")):
        app.clientside_callback(
            "function(n) { return Boolean(n); }",
            Output(sheet, "opened"),
            Input(button, "n_clicks"),
            prevent_initial_call=True,
        )
    app.callback(
        Output("code", "code"),
        Output("code-modal", "opened"),
        Input("show-code", "n_clicks"),
        State("state", "data"),
        prevent_initial_call=True,
    )(lambda clicks, state: code_sheet(space, clicks, state))


def code_sheet(space: Workspace, clicks: int | None, state: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """What the code window shows, and that it opens."""
    from dashboards.code import show_code

    if not clicks:
        return no_update, no_update
    try:
        return show_code(space, state or {}), True
    except PageError as error:
        return f"# {error}", True
    except Exception as error:
        return f"# {explain(error)}", True


def stay_responsive() -> None:
    """Let threads that answer the page in between a model's Python code sooner than every 5 ms."""
    sys.setswitchinterval(0.001)


def serve(app: Dash, *, port: int, browser: bool, host: str = HOST) -> None:
    """Serve until Ctrl-C.

    Args:
        host: another address than this machine's own needs an app with a token.

    Raises:
        OSError: the port is taken.
        ValueError: another host without a token.
    """
    from werkzeug.serving import make_server

    token: str | None = app.token  # type: ignore[attr-defined]
    if host not in LOOPBACK and token is None:
        raise ValueError(f"--host other than {HOST} needs a token, got {host!r}")
    try:
        server = make_server(host, port, app.server, threaded=True)
    except (OSError, SystemExit) as error:
        raise OSError(f"--port must be free, got {port}; --port 0 takes any") from error
    address = f"http://{host}:{server.server_port}/" + (f"?token={token}" if token else "")
    typer.echo(f"Headscope is at {address} (Ctrl-C ends it)")
    if token:
        typer.echo("Whoever has this address can run models on this machine; it travels unencrypted.", err=True)
    if browser:
        threading.Timer(0.5, webbrowser.open, (address,)).start()
    space: Workspace = app.workspace  # type: ignore[attr-defined]
    space.queue.resume()
    stay_responsive()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("ended")
    finally:
        server.server_close()
        space.close()


__all__ = ["HOST", "code_sheet", "make_app", "new_token", "serve"]
