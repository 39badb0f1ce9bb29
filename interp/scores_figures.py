"""Pictures of scores: the layer x head grid, and one score against another."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp._version import __version__
from interp.heads import Head
from interp.scores_base import ScoreError, metadata, values_of
from interp.scores_files import figure_settings
from interp.vector_figures import KEY

if TYPE_CHECKING:
    import plotly.graph_objects as go

HATCH_COLOUR = "#9a9a9a"


def grid_figure(score: xr.Dataset, by: str = "value") -> go.Figure:
    """Heat map with layers downwards and heads rightwards; see :meth:`interp.scores.HeadsAccessor.grid`.

    Values of both signs get a diverging scale with its middle at 0. Missing heads are white with grey hatching.
    """
    import plotly.graph_objects as go

    values = values_of(score, by)
    layers, heads = ([int(i) for i in values[dim].values] for dim in ("layer", "head"))
    z = values.values.astype(np.float64)
    signed = bool(np.nanmin(z, initial=np.inf) < 0 < np.nanmax(z, initial=-np.inf))
    unit = str(metadata(score, "unit"))
    figure = go.Figure(
        go.Heatmap(
            z=z,
            text=_hover(score, by),
            hovertemplate="%{text}<extra></extra>",
            colorscale="RdBu_r" if signed else "Viridis",
            zmid=0 if signed else None,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": escape(unit if by == "value" else by), "side": "right"}},
        )
    )
    missing = np.argwhere(np.isnan(z))
    if len(missing):
        x, y = _hatching(missing)
        figure.add_scatter(
            x=x, y=y, mode="lines", line={"color": HATCH_COLOUR, "width": 1}, hoverinfo="skip", name="missing"
        )
    stack = str(metadata(score, "stack"))
    figure.update_layout(
        title={"text": f"{escape(str(metadata(score, 'name')))}, {escape(stack)}, by head"},
        template="plotly_white",
        showlegend=False,
        height=max(320, 130 + 18 * len(layers)),
        meta={KEY: figure_settings(score, by)},
        plot_bgcolor="white",
    )
    figure.update_xaxes(title="head", showgrid=False, zeroline=False, **_ticks(heads))
    figure.update_yaxes(title="layer", showgrid=False, zeroline=False, **_ticks(layers))
    figure.update_yaxes(range=[len(layers) - 0.5, -0.5])
    figure.update_xaxes(range=[-0.5, len(heads) - 0.5])
    return figure


def scatter_figure(score: xr.Dataset, other: xr.Dataset, by: str = "value") -> go.Figure:
    """One point per head that both scores have; see :meth:`interp.scores.HeadsAccessor.scatter`.

    Raises:
        ScoreError: scores of different stacks, or without a head in common.
    """
    import plotly.graph_objects as go

    stack = metadata(score, "stack")
    if stack != metadata(other, "stack"):
        raise ScoreError(f"scores must be of one stack, got {stack!r} and {metadata(other, 'stack')!r}")
    x, y = xr.align(values_of(score, by), values_of(other, by), join="inner")
    shared = np.argwhere(~np.isnan(x.values.astype(np.float64) + y.values.astype(np.float64)))
    if not len(shared):
        raise ScoreError("scores must have heads in common, got none")
    at = tuple(shared.T)
    names = [str(Head(int(x["layer"].values[i]), int(x["head"].values[j]), str(stack))) for i, j in shared]
    figure = go.Figure(
        go.Scatter(
            x=x.values[at],
            y=y.values[at],
            error_x=_error_bars(score, x, by, at),
            error_y=_error_bars(other, y, by, at),
            mode="markers",
            text=names,
            marker={
                "color": [int(x["layer"].values[i]) for i, _ in shared],
                "colorscale": "Viridis",
                "colorbar": {"title": {"text": "layer"}},
            },
            hovertemplate="<b>%{text}</b><br>x %{x:.4g}<br>y %{y:.4g}<extra></extra>",
        )
    )
    titles = [escape(f"{metadata(s, 'name')} ({metadata(s, 'unit') if by == 'value' else by})") for s in (score, other)]
    about = {
        "name": f"{metadata(score, 'name')} against {metadata(other, 'name')}",
        "x": figure_settings(score, by),
        "y": figure_settings(other, by),
    }
    figure.update_layout(template="plotly_white", showlegend=False, meta={KEY: {**about, "headscope": __version__}})
    figure.update_xaxes(title=titles[0])
    figure.update_yaxes(title=titles[1])
    return figure


def _hover(score: xr.Dataset, by: str) -> list[list[str]]:
    values = values_of(score, by)
    stack, unit, paper = (str(metadata(score, key)) for key in ("stack", "unit", "paper"))
    shown = {name: values_of(score, name).values for name in ("value", "se", "n", "null") if name in score}
    if by not in shown:
        shown = {by: values.values} | shown
    rows: list[list[str]] = []
    for i, layer in enumerate(values["layer"].values):
        row: list[str] = []
        for j, head in enumerate(values["head"].values):
            name = f"<b>{Head(int(layer), int(head), stack)}</b>"
            if np.isnan(values.values[i, j]):
                row.append(f"{name}<br>missing: no such head, or not measured")
                continue
            lines = [f"{key} {array[i, j]:.4g}" for key, array in shown.items()]
            row.append("<br>".join([name, *lines, f"unit {escape(unit)}", escape(paper)]))
        rows.append(row)
    return rows


def _hatching(cells: np.ndarray) -> tuple[list[float | None], list[float | None]]:
    """Three diagonals in each cell ``(row, column)``, as one broken line: a heat map has no pattern of its own."""
    x: list[float | None] = []
    y: list[float | None] = []
    for row, column in cells:
        for (x0, y0), (x1, y1) in (((-0.5, 0.0), (0.0, -0.5)), ((-0.5, 0.5), (0.5, -0.5)), ((0.0, 0.5), (0.5, 0.0))):
            x += [float(column + x0), float(column + x1), None]
            y += [float(row + y0), float(row + y1), None]
    return x, y


def _ticks(labels: list[int]) -> dict[str, Any]:
    step = max(1, -(-len(labels) // 32))
    at = list(range(0, len(labels), step))
    return {"tickmode": "array", "tickvals": at, "ticktext": [str(labels[i]) for i in at]}


def _error_bars(score: xr.Dataset, aligned: xr.DataArray, by: str, at: tuple[Any, ...]) -> dict[str, Any] | None:
    if by != "value" or "se" not in score:
        return None
    se = values_of(score, "se").sel(layer=aligned["layer"], head=aligned["head"]).values[at]
    return {"type": "data", "array": np.nan_to_num(se), "thickness": 1, "width": 0}
