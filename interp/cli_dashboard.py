"""The command ``headscope dashboard``, pages of saved traces, and interventions from a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from interp import cli_common as common
from interp.cli_common import DeviceOption, DTypeOption, TrustOption, UsageError, friendly

LOCAL = ("127.0.0.1", "localhost")


@friendly
def dashboard(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models the page offers; the first is loaded.")
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder below which models and saved traces may be opened; again for more."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8050,
    host: Annotated[str, typer.Option(help="Address to serve on. Any other than 127.0.0.1 asks for a token.")] = LOCAL[
        0
    ],
    state: Annotated[Path | None, typer.Option(help="Folder of pictures, runs, jobs and saved results.")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Open the page: every head of a model by any score, its map, what it does to an image, and what changes without it."""
    for folder in root or []:
        if not folder.is_dir():
            raise UsageError(f"--root must be a folder, got {folder}")
    first = common.load_model(models[0], dtype, device, trust_remote_code) if models else None
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    serve_page(first, models or [], port, browser, options, roots=root or [], host=host, state=state)


def serve_page(
    model: Any, sources: list[str], port: int, browser: bool, options: dict[str, Any], *, roots: list[Path] | None = None,
    host: str = LOCAL[0], state: Path | None = None,
) -> None:  # fmt: skip
    """Serve until Ctrl-C.

    Raises:
        UsageError: the extra ``dashboard`` is not installed.
    """
    try:
        from dashboards.app import make_app, new_token, serve
    except ModuleNotFoundError as error:
        raise UsageError(f"the page needs {error.name}: pip install headscope[dashboard]") from error
    token = None if host in LOCAL else new_token()
    hosts = LOCAL if token is None else None if host == "0.0.0.0" else (*LOCAL, host)
    page = make_app(
        model, sources=sources, load_options=options, roots=roots or [], state=state, hosts=hosts, token=token
    )
    serve(page, port=port, browser=browser, host=host)


def write_page(run: Path, target: Path, heads: str | None) -> Path:
    """A saved trace as one HTML page that opens without a server: overview, maps of chosen heads, table."""
    from dashboards.export import html_page
    from dashboards.runs import saved_run
    from interp.files import write_whole
    from interp.heads import Heads

    found = saved_run(run)
    shapes = {stack: found.shape(stack) for stack in found.trace}
    return write_whole(target, html_page(None, found, Heads.parse(heads or "", shapes)))


def read_interventions(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """Interventions of a JSON file, and what else it says (``prompt``, ``max_new_tokens``, ``chat``).

    The file is what the page exports, or a list of ``{"name": "VHR", "settings": {"alpha": 2}}``.

    Raises:
        UsageError: not such a file, or a method or setting that does not exist.
    """
    from dashboards.errors import PageError
    from dashboards.specs import build_all

    if not path.is_file():
        raise UsageError(f"--interventions must be a file, got {path}")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"--interventions must be JSON, got {path}: {error}") from None
    whole = dict(held) if isinstance(held, Mapping) else {"interventions": held}
    if not isinstance(whole.get("interventions"), list):
        raise UsageError(f"--interventions must hold a list of {{name, settings}}, got {path}")
    try:
        return build_all(whole["interventions"]), whole
    except PageError as error:
        raise UsageError(f"--interventions: {error}") from None
