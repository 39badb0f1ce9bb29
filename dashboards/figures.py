"""Figures of the page, as pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

MAX_TICKS = 64


def map_figure(attention: NDArray[np.floating[Any]], tokens: Sequence[str], title: str) -> go.Figure:
    """One head's attention over the tokens of a prompt.

    Args:
        attention: weights ``[query, key]``, fraction of row mass; NaN is missing and stays blank.
        tokens: text of each position, as many as there are keys.
        title: shown above.

    Raises:
        ValueError: not a square map, or another number of tokens than of positions.
    """
    weights = np.asarray(attention)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise ValueError(f"attention must be [query, key] of one sequence, got shape {weights.shape}")
    if len(tokens) != weights.shape[1]:
        raise ValueError(f"tokens must name each of the {weights.shape[1]} positions, got {len(tokens)}")
    # Token text is anybody's: Plotly reads some HTML in labels.
    names = [f"{i} {escape(repr(token)[1:-1])}" for i, token in enumerate(tokens)]
    positions = list(range(len(names)))
    figure = go.Figure(
        go.Heatmap(
            z=weights,
            customdata=[[f"query {query}<br>key {key}" for key in names] for query in names],
            hovertemplate="%{customdata}<br>weight %{z:.6f}<extra></extra>",
            colorscale="Viridis",
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "fraction of row mass", "side": "right"}},
        )
    )
    step = max(1, -(-len(names) // MAX_TICKS))
    ticks: dict[str, Any] = {
        "tickmode": "array",
        "tickvals": positions[::step],
        "ticktext": names[::step],
        "showgrid": False,
    }
    figure.update_xaxes(title="key", tickangle=-60, **ticks)
    figure.update_yaxes(title="query", range=[len(names) - 0.5, -0.5], **ticks)
    figure.update_layout(title={"text": escape(title)}, template="plotly_white", height=max(420, 200 + 14 * len(names)))
    return figure


def empty_figure(message: str) -> go.Figure:
    """A blank figure that says why."""
    figure = go.Figure()
    figure.add_annotation(text=escape(message), showarrow=False, font={"size": 15, "color": "#555555"})
    figure.update_layout(template="plotly_white", height=420)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure
