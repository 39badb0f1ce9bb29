"""Vector images: what they say of their making, that they are vectors of what the figure holds, and what is refused."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from plotly.subplots import make_subplots

from interp import __version__, scores_files
from interp.scores import ScoreFileError, make_score, read_image_settings, stack_scores, write_image
from interp.vector_figures import FigureError, image

pytest.importorskip("matplotlib", reason="vector images need matplotlib")


def a_score(name: str = "toy", **settings: Any) -> xr.Dataset:
    values = np.random.default_rng(0).normal(size=(4, 3, 5))
    values[:, 1, 2:] = np.nan
    return make_score(
        values, name=name, unit="nats (of $row$)", paper="Nobody 2026", settings={"model": "tiny", **settings}
    )


def streams(pdf: bytes) -> bytes:
    """What the pages of a PDF draw."""
    parts = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.S)
    out = b""
    for part in parts:
        try:
            out += zlib.decompress(part)
        except zlib.error:
            out += part
    return out


@pytest.mark.parametrize("format", ["pdf", "svg"])
def test_a_figure_says_what_made_it(format: str, tmp_path: Path) -> None:
    note = 'back\\slash (brackets) é & < > "quotes"\nline'
    score = a_score(probe={"name": "RepeatedTokens", "seed": 3}, note=note)
    path = tmp_path / f"grid.{format}"
    getattr(score.heads, f"to_{format}")(path)
    told = read_image_settings(path)
    assert (told["name"], told["model"], told["seed"], told["headscope"]) == ("toy", "tiny", 3, __version__)
    assert told["settings"] == score.attrs["settings"] and told["settings"]["note"] == note
    assert (told["unit"], told["paper"], told["stack"], told["variable"]) == (
        "nats (of $row$)",
        "Nobody 2026",
        "text",
        "value",
    )
    before = path.read_bytes()
    getattr(score.heads, f"to_{format}")(path)
    assert path.read_bytes() == before, "no date, no random names"


def test_another_reader_finds_the_same(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf", reason="the package pypdf is not installed")
    score = a_score(seed=7, note="back\\slash (brackets) é")
    score.heads.to_pdf(tmp_path / "grid.pdf")
    read = pypdf.PdfReader(tmp_path / "grid.pdf")
    assert json.loads(read.metadata["/Keywords"]) == read_image_settings(tmp_path / "grid.pdf")
    assert read.metadata["/Creator"] == f"Headscope {__version__}" and "toy" in read.metadata["/Title"]
    assert "head" in read.pages[0].extract_text()


def test_the_outer_seed_is_the_scores_own_and_a_scatter_tells_of_both() -> None:
    x, y = a_score(seed=1, probe={"seed": 9}), a_score("other", shuffle_seed=5)
    told = x.heads.scatter(y).layout.meta["headscope"]
    assert told["name"] == "toy against other" and told["x"]["seed"] == 1 and told["y"]["seed"] == 5
    both = stack_scores([x, y]).sel(score="other").heads.grid().layout.meta["headscope"]
    assert both["name"] == "other" and both["seed"] == 5 and both["model"] == "tiny"
    html = x.heads.grid().to_html(include_plotlyjs=False)
    assert '"seed":1' in html.replace(" ", ""), "a page carries it too"


def test_a_pdf_is_a_vector_image_with_a_cell_a_head(tmp_path: Path) -> None:
    score = a_score()
    score.heads.to_pdf(tmp_path / "grid.pdf")
    data = (tmp_path / "grid.pdf").read_bytes()
    assert b"/Type3" not in data and b"/FontFile2" in data, "letters are letters of a font that is in the file"
    assert b"/Subtype /Image" not in data
    drawn = b" ".join(streams(data).split())
    cells = re.findall(rb"rg [\d.]+ [\d.]+ m (?:[\d.]+ [\d.]+ l ){4}B ", drawn)
    assert len(cells) == 12 + 256, "a cell a head that is there, and the scale"
    # Colours are those of plotly's scale: white in the middle of a diverging one, its ends at the largest magnitude.
    colours = {tuple(float(n) for n in m.split()[:3]) for m in re.findall(rb"[\d.]+ [\d.]+ [\d.]+ rg", drawn)}
    largest = float(np.abs(score["value"]).max())
    end = (103 / 255, 0, 31 / 255) if float(score["value"].max()) == largest else (5 / 255, 48 / 255, 97 / 255)
    assert any(np.allclose(c, end, atol=2e-2) for c in colours)


def test_missing_heads_only_and_one_head(tmp_path: Path) -> None:
    for values in ([[np.nan]], [[0.5]], [[-1.0, 1.0]]):
        score = make_score(np.array(values), name="n", unit="u", paper="p")
        score.heads.to_svg(tmp_path / "s.svg")
        assert read_image_settings(tmp_path / "s.svg")["model"] is None


def test_what_figures_of_diffs_and_evaluations_are_made_of(tmp_path: Path) -> None:
    figure: Any = make_subplots(rows=1, cols=2, subplot_titles=["left <b>", "right"])
    error = {"type": "data", "symmetric": False, "array": [0.1, 0.2], "arrayminus": [0.2, -1e-17]}
    figure.add_scatter(x=[1.0, 2.0], y=["VHR(2)", "a $b$"], mode="markers", error_x=error, row=1, col=1)
    figure.add_vline(x=1.5, line={"dash": "dot"}, row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    figure.add_scatter(x=[1, 10, None, 100], y=[1, 2, None, 3], mode="lines+markers", name="line & co", row=1, col=2)
    figure.update_xaxes(type="log", range=[0, 2], row=1, col=2)
    figure.update_layout(title="two", meta={"headscope": {"seed": 4}})
    write_image(figure, tmp_path / "made.svg", "svg")
    text = (tmp_path / "made.svg").read_text()
    for word in ("VHR(2)", "a $b$", "left", "right", "line &amp; co", "two"):
        assert word in text, word
    assert read_image_settings(tmp_path / "made.svg") == {"seed": 4}
    assert text.index(">VHR(2)<") < text.index(">a $b$<")


def test_what_cannot_be_drawn_or_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FigureError, match="got one of 'bar'"):
        write_image(go.Figure(go.Bar(y=[1])), tmp_path / "a.pdf", "pdf")
    figure = go.Figure(go.Scatter(y=[1, 2], x=[1, 2]))
    figure.add_shape(type="circle", x0=0, x1=1, y0=0, y1=1)
    with pytest.raises(FigureError, match="'circle'"):
        image(figure, "svg")
    assert not list(tmp_path.iterdir())
    for name, data in (("x.pdf", b"%PDF-1.4\n/Keywords (hm)"), ("y.svg", b"<svg/>"), ("z.pdf", b"%PDF-1.4")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ScoreFileError, match="no figure that Headscope wrote"):
            read_image_settings(tmp_path / name)
    monkeypatch.setattr(scores_files, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="to_svg needs the package matplotlib"):
        a_score().heads.to_svg(tmp_path / "b.svg")
