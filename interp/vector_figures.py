"""Figures of ours as vector PDF or SVG, drawn by matplotlib: no browser, the same bytes for the same figure.

What made the figure (``figure.layout.meta``) goes into the file: the keywords of a PDF's Info dictionary and of an SVG's metadata are
that JSON, see :func:`interp.scores_files.read_image_settings`.
"""

from __future__ import annotations

import html
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from interp._version import __version__

if TYPE_CHECKING:
    import plotly.graph_objects as go

KEY = "headscope"
"""Entry of ``figure.layout.meta`` that goes into the file."""
PX = 1 / 96
"""Inches of a pixel of plotly's layout."""
POINT = 72 / 96
"""Points of a pixel: sizes of markers, lines and text."""
MARGIN = {"l": 80, "r": 80, "t": 80, "b": 70}
SIZE = (700, 450)
DASHES = {"dot": ":", "dash": "--", "dashdot": "-.", "solid": "-"}
FONT = 11
COLOUR = "#1f77b4"


class FigureError(ValueError):
    """A figure that cannot be drawn as a vector image."""


def image(figure: go.Figure, format: Literal["pdf", "svg"]) -> bytes:
    """The figure as a file.

    Args:
        figure: of heat maps and scatter traces on plain axes, as all figures of scores, diffs and evaluations are.
        format: of the file.

    Raises:
        FigureError: a trace of another kind.
        ImportError: matplotlib is not installed.
    """
    layout: Any = figure.layout
    about = dict(layout.meta or {}).get(KEY, {})
    title = _text(layout.title.text)
    told: dict[str, Any] = {
        "Title": title or str(about.get("name", "figure")), "Creator": f"Headscope {__version__}",
        "Keywords": json.dumps(about, sort_keys=True),
    }  # fmt: skip
    # No date: a figure made twice is one file.
    told |= {"CreationDate": None} if format == "pdf" else {"Date": None}
    with _style():
        drawn = _draw(figure, title)
        out = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
            drawn.savefig(out, format=format, metadata=told)
    return out.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    settings = {
        # Letters stay letters, of a font in the file: journals refuse Type 3.
        "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": KEY, "text.parse_math": False, "font.size": FONT * POINT,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with mpl.rc_context(settings):  # pyright: ignore[reportArgumentType]  # its stub lists the names as literals
        yield


def _draw(figure: Any, title: str) -> Any:
    from matplotlib.figure import Figure

    layout = figure.layout
    columns = len({trace.xaxis or "x" for trace in figure.data})
    width, height = layout.width or SIZE[0] + 200 * (columns > 1), layout.height or SIZE[1]
    drawn = Figure(figsize=(width * PX, height * PX))
    inner = (MARGIN["l"] / width, MARGIN["b"] / height, 1 - MARGIN["r"] / width, 1 - MARGIN["t"] / height)
    panels: dict[tuple[str, str], Any] = {}
    for trace in figure.data:
        if trace.type not in ("heatmap", "scatter"):
            raise FigureError(f"figure must be of heat maps and scatter traces, got one of {trace.type!r}")
        names = (trace.xaxis or "x", trace.yaxis or "y")
        if names not in panels:
            panels[names] = drawn.add_axes(_place(layout, names, inner))
        (_heatmap if trace.type == "heatmap" else _scatter)(drawn, panels[names], trace)
    for names, axes in panels.items():
        _axis(axes, layout[_long(names[0])], "x")
        _axis(axes, layout[_long(names[1])], "y")
    for shape in layout.shapes:
        _line(panels, shape)
    for note in layout.annotations:
        if (note.xref, note.yref) == ("paper", "paper"):
            x, y = (inner[k] + at * (inner[k + 2] - inner[k]) for k, at in enumerate((note.x, note.y)))
            drawn.text(x, y, _text(note.text), ha="center", va="bottom")
    if title:
        drawn.text(0.05, 1 - 0.3 * MARGIN["t"] / height, title, va="center", fontsize=(FONT + 3) * POINT)
    _legend(drawn, figure)
    return drawn


def _long(name: str) -> str:
    """``x2`` as layout has it: ``xaxis2``."""
    return f"{name[0]}axis{name[1:]}"


def _place(
    layout: Any, names: tuple[str, str], inner: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """Left, bottom, width, height in shares of the figure."""
    left, bottom, right, top = inner
    x, y = (layout[_long(name)].domain or (0, 1) for name in names)
    width, height = (x[1] - x[0]) * (right - left), (y[1] - y[0]) * (top - bottom)
    return left + x[0] * (right - left), bottom + y[0] * (top - bottom), width, height


def _heatmap(drawn: Any, axes: Any, trace: Any) -> None:
    z = np.ma.masked_invalid(np.asarray(trace.z, dtype=np.float64))
    x, y = (
        np.arange(size) if given is None else np.asarray(given, float)
        for given, size in ((trace.x, z.shape[1]), (trace.y, z.shape[0]))
    )
    low, high = (0.0, 1.0) if z.mask.all() else (float(z.min()), float(z.max()))
    if trace.zmid is not None:
        reach = max(high - trace.zmid, trace.zmid - low) or 1.0
        low, high = trace.zmid - reach, trace.zmid + reach
    low, high = (given if given is not None else found for given, found in ((trace.zmin, low), (trace.zmax, high)))
    mesh = axes.pcolormesh(
        _edges(x), _edges(y), z, cmap=_colours(trace.colorscale), vmin=low, vmax=high if high > low else low + 1,
        edgecolors="white" if trace.xgap else "none", linewidth=POINT * (trace.xgap or 0),
    )  # fmt: skip
    for side in axes.spines.values():
        side.set_visible(False)
    if trace.showscale is not False:
        _bar(drawn, axes, mesh, trace.colorbar)


def _edges(centres: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _bar(drawn: Any, axes: Any, shown: Any, colorbar: Any) -> None:
    box = axes.get_position()
    if box.x1 < 1 - MARGIN["r"] / SIZE[0] - 0.1:
        # Another panel stands to the right: the scale takes its room from its own.
        axes.set_position((box.x0, box.y0, 0.84 * box.width, box.height))
        box = axes.get_position()
    beside = drawn.add_axes([box.x1 + 0.015, box.y0, 0.016, box.height])
    bar = drawn.colorbar(shown, cax=beside, label=_text(colorbar.title.text))
    bar.outline.set_visible(False)
    # matplotlib makes a picture of a scale of many colours.
    bar.solids.set(rasterized=False, edgecolor="face")


def _scatter(drawn: Any, axes: Any, trace: Any) -> None:
    x, y = (_coordinates(values) for values in (trace.x, trace.y))
    mode, marker, line = trace.mode or "lines", trace.marker, trace.line
    plain = marker.color if isinstance(marker.color, str) else None
    colour = line.color or plain
    label = _text(trace.name) if trace.showlegend is not False and trace.name else "_nolegend_"
    for axis, error in (("xerr", trace.error_x), ("yerr", trace.error_y)):
        if error.array is not None:
            ahead = np.asarray(error.array, float)
            behind = ahead if error.arrayminus is None else np.asarray(error.arrayminus, float)
            colours = {"ecolor": error.color or colour or "#555555", "elinewidth": POINT * (error.thickness or 1.5)}
            # Whether an interval goes below its value by a rounding error is none of matplotlib's business.
            axes.errorbar(x, y, **{axis: np.clip([behind, ahead], 0, None)}, fmt="none", zorder=1, **colours)
    if "lines" in mode:
        style = {"color": colour} if colour else {}
        (drew,) = axes.plot(
            x, y, linestyle=DASHES.get(line.dash or "solid", "--"), linewidth=POINT * (line.width or 2), label=label, zorder=2, **style
        )  # fmt: skip
        colour, label = drew.get_color(), "_nolegend_"
    if "markers" in mode:
        size = (POINT * (marker.size if isinstance(marker.size, int | float) else 6)) ** 2
        if marker.color is None or plain is not None:
            axes.scatter(x, y, s=size, color=plain or colour or COLOUR, label=label, zorder=3)
        else:
            found = axes.scatter(
                x, y, s=size, c=np.asarray(marker.color, float), cmap=_colours(marker.colorscale), label=label, zorder=3
            )
            if marker.colorbar.title.text is not None:
                _bar(drawn, axes, found, marker.colorbar)


def _coordinates(values: Any) -> list[Any]:
    """Names as they are, numbers with NaN where a line breaks."""
    return [v if isinstance(v, str) else np.nan if v is None else float(v) for v in values]


def _axis(axes: Any, layout: Any, which: str) -> None:
    call = {name: getattr(axes, f"set_{which}{name}") for name in ("label", "lim", "scale")}
    call["label"](_text(layout.title.text))
    if layout.type == "log":
        call["scale"]("log")
    if layout.tickvals is not None:
        (axes.set_xticks if which == "x" else axes.set_yticks)(
            list(layout.tickvals), None if layout.ticktext is None else [_text(t) for t in layout.ticktext]
        )
    if layout.showticklabels is False:
        axes.tick_params(axis=which, **{"labelbottom" if which == "x" else "labelleft": False})
    if layout.range is not None:
        # Plotly gives the ends of a logarithmic axis as exponents.
        call["lim"](*(10.0**end if layout.type == "log" else end for end in layout.range))
    elif layout.autorange == "reversed":
        (axes.invert_xaxis if which == "x" else axes.invert_yaxis)()


def _line(panels: Mapping[tuple[str, str], Any], shape: Any) -> None:
    """A straight line over the whole of one axis: ``add_vline`` and ``add_hline``."""
    on = [(shape.xref or "x").split()[0], (shape.yref or "y").split()[0]]
    axes = next((a for (x, y), a in panels.items() if on[0] in (x, "paper") and on[1] in (y, "paper")), None)
    style = {
        "color": shape.line.color,
        "linestyle": DASHES.get(shape.line.dash or "solid", "--"),
        "linewidth": 1,
        "zorder": 0,
    }
    if shape.type == "line" and axes is not None and shape.x0 == shape.x1:
        axes.axvline(shape.x0, **style)
    elif shape.type == "line" and axes is not None and shape.y0 == shape.y1:
        axes.axhline(shape.y0, **style)
    else:
        raise FigureError(f"shapes of a figure must be lines across an axis, got a {shape.type!r}")


def _legend(drawn: Any, figure: Any) -> None:
    if figure.layout.showlegend is False:
        return
    found: dict[str, Any] = {}
    for axes in drawn.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        drawn.legend(found.values(), found.keys(), loc="center right", frameon=False)


def _colours(scale: Any) -> Any:
    """Plotly's ``((0, "#440154"), (0.5, "rgb(1,2,3)"), ...)`` as a colour map."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [(float(at), _colour(value)) for at, value in scale or ((0, "#440154"), (1, "#fde725"))]
    return LinearSegmentedColormap.from_list("scale", stops)


def _colour(value: str) -> Any:
    numbers = re.fullmatch(r"rgba?\(([^)]*)\)", value.replace(" ", ""))
    if numbers is None:
        return value
    parts = [float(n) for n in numbers[1].split(",")]
    return (*(p / 255 for p in parts[:3]), *parts[3:])


def _text(value: Any) -> str:
    """Text as plotly has it (entities, <b>, <br>), as plain text."""
    return html.unescape(re.sub(r"<[^>]*>", "", str(value).replace("<br>", "\n"))) if value else ""
