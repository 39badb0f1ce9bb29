"""Head scores of two checkpoints, compared head by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from interp._version import __version__
from interp.analysis.running import AnalysisError, as_model, build
from interp.files import jsonable
from interp.models.anatomy import anatomy
from interp.models.model import Model
from interp.vector_figures import KEY

if TYPE_CHECKING:
    import plotly.graph_objects as go

DEFAULT = ("entropy", "sink", "previous_token", "duplicate_token", "induction")


def diff(
    a: Any,
    b: Any,
    scores: Sequence[str] = DEFAULT,
    *,
    probe: Any = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    correction: Literal["holm", "benjamini-hochberg", "none"] = "benjamini-hochberg",
    progress: Any = True,
) -> xr.Dataset:
    """Scores of two models with the same heads (base and tuned, with and without an adapter, two steps of a training run), paired.

    Both run on the same samples. Differences are b - a; each head's is tested over samples (paired t, corrected over the heads of a
    score). Scores read off the weights have no samples, hence no test.

    When not to use: for models of different shape, whose heads have nothing to do with each other.

    Args:
        a, b: an :class:`interp.Model` or a transformers model each.
        scores: names, see :func:`interp.scores`.
        probe: for all scores; None is each score's own default.
        settings: keyword arguments by score.
        correction: see :func:`interp.scores.adjust_p_values`.
        progress: show bars where the output is a terminal.

    Returns:
        ``a``, ``b``, ``difference``, ``se``, ``p``, ``p_adjusted``, ``n (score, layer, head)`` and by score ``rho`` (Spearman's, over
        heads) and ``unit``; attributes name both models, the stack, and the settings of each score.

    Raises:
        AnalysisError: no or repeated scores, another shape, another tokenizer or probe samples that differ, scores of several stacks.
    """
    from interp.analysis import score as run
    from interp.scores import paired_test, rank_agreement

    if not scores or len(set(scores)) < len(scores):
        raise AnalysisError(f"scores must be at least one and without repeats, got {list(scores)}")
    first, second = as_model(a), as_model(b)
    _check_shapes(first, second)
    if probe is not None:
        _check_samples(build(probe, first), build(probe, second))
    parts: list[xr.Dataset] = []
    stacks: set[str] = set()
    made: dict[str, Any] = {}
    for name in scores:
        options = dict((settings or {}).get(name, {}))
        x, y = (run(name, model, probe, progress=progress, **options) for model in (first, second))
        _check_same_text(name, first, second, x)
        stacks.add(str(x.attrs["stack"]))
        made[name] = {k: v for k, v in x.attrs["settings"].items() if k != "model"}
        both = xr.Dataset({"a": x["value"], "b": y["value"], "difference": y["value"] - x["value"]}).reset_coords(
            drop=True
        )
        if x.sizes.get("sample", 1) > 1:
            tested = paired_test(y, x, correction=correction)
            both["se"], both["p"], both["p_adjusted"] = (tested[n] for n in ("se", "p_t", "p_t_adjusted"))
            both["n"] = tested["n"]
        else:
            blank = xr.full_like(both["a"], np.nan)
            both["se"], both["p"], both["p_adjusted"], both["n"] = blank, blank, blank, x["n"]
        parts.append(both.assign(rho=rank_agreement(x, y).rho, unit=str(x.attrs["unit"])))
    if len(stacks) > 1:
        raise AnalysisError(f"scores must be of one stack, got {sorted(stacks)}")
    out = xr.concat(parts, dim=xr.DataArray(list(scores), dims="score", name="score"))
    return out.assign_attrs(a=first.name, b=second.name, stack=stacks.pop(), correction=correction, settings=made)


def diff_table(result: xr.Dataset, top: int | None = None) -> list[dict[str, Any]]:
    """One row a score and head, the largest differences of each score first; heads that are missing are left out.

    Args:
        result: of :func:`diff`.
        top: so many rows of each score; None is all.
    """
    from interp.heads import Head

    rows: list[dict[str, Any]] = []
    for name in result["score"].values:
        one = result.sel(score=name)
        order = np.argsort(-np.abs(np.nan_to_num(one["difference"].values, nan=-1.0)).ravel(), kind="stable")
        layers, heads = one["layer"].values, one["head"].values
        found: list[dict[str, Any]] = []
        for at in order:
            i, j = divmod(int(at), len(heads))
            if np.isnan(one["difference"].values[i, j]):
                continue
            cells = {key: float(one[key].values[i, j]) for key in ("a", "b", "difference", "se", "p", "p_adjusted")}
            head = Head(int(layers[i]), int(heads[j]), str(result.attrs["stack"]))
            found.append({"score": str(name), "id": str(head), **cells, "n": int(one["n"].values[i, j])})
        rows += found[:top]
    return rows


def diff_figure(result: xr.Dataset) -> go.Figure:
    """A row a score: the grid of differences (missing heads are blank), and b against a with the line where nothing changed."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = [str(n) for n in result["score"].values]
    titles = [t for n in names for t in (f"{n}: b - a", f"{n}, rho {float(result.sel(score=n)['rho']):.2f}")]
    figure = make_subplots(rows=len(names), cols=2, subplot_titles=titles, horizontal_spacing=0.14)
    stack = "" if result.attrs["stack"] == "text" else f"{result.attrs['stack']}."
    for row, name in enumerate(names, 1):
        one = result.sel(score=name)
        a, b, d = (one[key].values for key in ("a", "b", "difference"))
        text = [[f"{stack}L{n}H{h}" for h in one["head"].values] for n in one["layer"].values]
        limit = float(np.nanmax(np.abs(d))) or 1.0
        place = {"len": 0.8 / len(names), "y": 1 - (row - 0.5) / len(names), "x": 0.44, "thickness": 10}
        figure.add_trace(
            go.Heatmap(
                z=d, text=text, zmin=-limit, zmax=limit, colorscale="RdBu_r", colorbar=place, xgap=1, ygap=1,
                hovertemplate="<b>%{text}</b><br>b - a %{z:.4g}<extra></extra>",
            ),
            row=row, col=1,
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=a.ravel(), y=b.ravel(), mode="markers", text=np.array(text).ravel(),
                marker={"color": np.repeat(one["layer"].values, a.shape[1]), "colorscale": "Viridis", "size": 6},
                hovertemplate="<b>%{text}</b><br>a %{x:.4g}<br>b %{y:.4g}<extra></extra>",
            ),
            row=row, col=2,
        )  # fmt: skip
        ends = [float(np.nanmin([a, b])), float(np.nanmax([a, b]))]
        figure.add_trace(
            go.Scatter(x=ends, y=ends, mode="lines", line={"color": "#9a9a9a", "dash": "dot"}, hoverinfo="skip"),
            row=row, col=2,
        )  # fmt: skip
        unit = str(one["unit"].values)
        figure.update_yaxes(title="layer", autorange="reversed", row=row, col=1)
        figure.update_xaxes(title="head", row=row, col=1)
        figure.update_xaxes(title=f"a ({unit})", row=row, col=2)
        figure.update_yaxes(title="b", row=row, col=2)
    figure.update_layout(
        title=f"a: {result.attrs['a']}, b: {result.attrs['b']}", template="plotly_white", showlegend=False,
        height=120 + 320 * len(names),
        meta={KEY: jsonable({"name": f"diff of {', '.join(names)}", **result.attrs, "headscope": __version__}, "attributes")},
    )  # fmt: skip
    return figure


def _check_shapes(a: Model, b: Model) -> None:
    shapes = [anatomy(model.module).shapes() for model in (a, b)]
    if shapes[0] != shapes[1]:
        raise AnalysisError(
            f"both models must have the same heads, got {shapes[0]} in {a.name} and {shapes[1]} in {b.name}"
        )


def _check_samples(a: list[Any], b: list[Any]) -> None:
    same = len(a) == len(b) and all(
        getattr(x, "ids", None) == getattr(y, "ids", None) for x, y in zip(a, b, strict=True)
    )
    if not same:
        raise AnalysisError("both models must get the same samples: do they have one tokenizer?")


def _check_same_text(name: str, a: Model, b: Model, score: xr.Dataset) -> None:
    """Default probes make their own texts with each model's tokenizer."""
    if "sample" not in score.sizes or a.tokenizer is None or b.tokenizer is None:
        return
    words = "The quick brown fox, 123 times; the lazy dog."
    if a.tokenizer(words)["input_ids"] != b.tokenizer(words)["input_ids"]:
        raise AnalysisError(f"{name} must run on the same samples, and the tokenizers of {a.name} and {b.name} differ")
