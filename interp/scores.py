"""A score: a number per head with its uncertainty, as an :class:`xarray.Dataset`, and what one does with it.

Variables, all ``(layer, head)``: ``value`` (mean over samples), ``se`` (standard error of that mean), ``n`` (samples),
and, where there is a control, ``null`` and ``null_se``; with the samples kept, ``value_by_sample (sample, layer,
head)`` and ``null_by_sample``. Attributes: name, unit, paper, settings, stack. NaN means missing, never 0.

>>> score = make_score([[[0.1, 0.9]], [[0.3, 0.7]]], name="toy", unit="fraction", paper="none")
>>> score.heads.top(1)
Heads('L0H1')
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from interp import scores_files
from interp.files import jsonable
from interp.heads import Head, Heads
from interp.scores_base import HEAD_DIMS, SAMPLE_DIMS, ScoreError, Summary, metadata, summarise, values_of
from interp.scores_files import (
    ScoreFileError,
    open_score,
    read_duo_attention_tsv,
    read_image_settings,
    read_retrieval_head_json,
    save_score,
    write_duo_attention_tsv,
    write_image,
    write_retrieval_head_json,
)
from interp.scores_readers import read_score
from interp.scores_sets import (
    Confirmation,
    SplitHalf,
    discover_and_confirm,
    matched_random_sets,
    max_t_test,
    split_half,
)
from interp.scores_statistics import (
    RankAgreement,
    adjust_p_values,
    bootstrap_ci,
    paired_test,
    rank_agreement,
    t_interval,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "Confirmation",
    "HeadsAccessor",
    "RankAgreement",
    "ScoreError",
    "ScoreFileError",
    "SplitHalf",
    "adjust_p_values",
    "bootstrap_ci",
    "discover_and_confirm",
    "make_score",
    "matched_random_sets",
    "max_t_test",
    "open_score",
    "paired_test",
    "rank_agreement",
    "read_duo_attention_tsv",
    "read_image_settings",
    "read_retrieval_head_json",
    "read_score",
    "save_score",
    "split_half",
    "stack_scores",
    "write_duo_attention_tsv",
    "write_image",
    "write_retrieval_head_json",
]


def make_score(
    value_by_sample: Any,
    *,
    name: str,
    unit: str,
    paper: str,
    settings: Mapping[str, Any] | None = None,
    stack: str = "text",
    null_by_sample: Any = None,
    keep_samples: bool = True,
) -> xr.Dataset:
    """Summarise a score over its samples.

    Args:
        value_by_sample: ``[sample, layer, head]``, or ``[layer, head]`` for a score without samples (one read off the
            weights: n = 1, se NaN); a DataArray with those dims keeps its layer, head and sample labels. NaN is
            missing.
        name: e.g. ``"induction"``.
        unit: e.g. ``"nats"``.
        paper: the source, with link.
        settings: whatever made the score what it is; JSON.
        stack: the stack the layers and heads belong to.
        null_by_sample: the same score under its control, same layers and heads. With the same number of samples the two
            are paired, sample by sample; any other number is fine too (so many random sets).
        keep_samples: keep ``value_by_sample`` (and ``null_by_sample``), which paired tests and bootstraps need.

    Raises:
        ScoreError: wrong dims, not numbers, no sample, or a control of other layers and heads.
    """
    for argument, text in (("name", name), ("unit", unit), ("paper", paper), ("stack", stack)):
        if not isinstance(text, str) or not text:
            raise ScoreError(f"{argument} must be a text that is not empty, got {text!r}")
    samples = _as_samples(value_by_sample, "value_by_sample")
    summary = summarise(samples.values)
    score = xr.Dataset(
        {"value": (HEAD_DIMS, summary.value), "se": (HEAD_DIMS, summary.se), "n": (HEAD_DIMS, summary.n)}
    )
    score = score.assign_coords({dim: samples[dim].values for dim in HEAD_DIMS})
    if keep_samples:
        score["value_by_sample"] = samples
    if null_by_sample is not None:
        null = _as_samples(null_by_sample, "null_by_sample", like=samples)
        if any(not np.array_equal(null[dim], samples[dim]) for dim in HEAD_DIMS):
            raise ScoreError(
                f"null_by_sample must have the layers and heads of value_by_sample, {samples.shape[1:]},"
                f" got {null.shape[1:]} or other labels"
            )
        control = summarise(null.values)
        score["null"], score["null_se"] = (HEAD_DIMS, control.value), (HEAD_DIMS, control.se)
        if keep_samples:
            same = null.sizes["sample"] == samples.sizes["sample"]
            dims = SAMPLE_DIMS if same else ("null_sample", *HEAD_DIMS)
            score["null_by_sample"] = (dims, null.values)
    score.attrs = {"name": name, "unit": unit, "paper": paper, "settings": jsonable(settings or {}, "settings")}
    score.attrs["stack"] = stack
    return score


def stack_scores(scores: Iterable[xr.Dataset]) -> xr.Dataset:
    """Put several scores of one stack on a new dim ``score``, labelled with their names.

    Units, papers and settings (JSON text) become coordinates of it. Heads that only some scores have are NaN in the
    others (n = 0). Samples are left out.

    ``stacked.sel(score="induction")`` is a score again.

    Raises:
        ScoreError: no score, scores of different stacks, or two of one name.
    """
    parts = list(scores)
    if not parts:
        raise ScoreError("scores must be at least one score, got none")
    for part in parts:
        values_of(part, "value")
    names = [str(metadata(part, "name")) for part in parts]
    stacks = sorted({str(metadata(part, "stack")) for part in parts})
    if len(stacks) > 1:
        raise ScoreError(f"scores must be of one stack, got {', '.join(stacks)}")
    if len(set(names)) < len(names):
        raise ScoreError(f"scores must have different names, got {', '.join(names)}")
    variables = dict.fromkeys(
        str(v) for p in parts for v, array in p.data_vars.items() if set(array.dims) == set(HEAD_DIMS)
    )
    plain = [part.drop_attrs() for part in parts]
    labels = {dim: sorted({int(i) for part in parts for i in part[dim].values}) for dim in HEAD_DIMS}
    whole = [part.reindex(labels) for part in plain]
    empty = xr.DataArray(np.nan, coords=labels, dims=HEAD_DIMS)
    out = xr.Dataset(
        {v: xr.concat([p.get(v, empty).reset_coords(drop=True) for p in whole], dim="score") for v in variables}
    )
    if "n" in out:
        out["n"] = out["n"].fillna(0).astype(np.int64)
    settings = [json.dumps(metadata(part, "settings") or {}) for part in parts]
    out = out.assign_coords(
        score=("score", names),
        unit=("score", [str(metadata(part, "unit")) for part in parts]),
        paper=("score", [str(metadata(part, "paper")) for part in parts]),
        settings=("score", settings),
    )
    out.attrs["stack"] = stacks[0]
    return out


@xr.register_dataset_accessor("heads")
class HeadsAccessor:
    """``score.heads``: ranking, tables, pictures and exports of one score.

    ``by`` is always a variable ``(layer, head)`` of the score, or ``"difference"`` for value - null. Heads whose value
    is NaN are missing and appear only, hatched, in :meth:`grid`.
    """

    def __init__(self, score: xr.Dataset) -> None:
        self._score = score

    def top(self, k: int, by: str = "value") -> Heads:
        """The ``k`` heads with the highest values (all there are, if fewer), highest first; ties in layer order."""
        return self._ranked(k, by, sign=-1)

    def bottom(self, k: int, by: str = "value") -> Heads:
        """The ``k`` heads with the lowest values, lowest first; ties in layer order."""
        return self._ranked(k, by, sign=1)

    def above(self, threshold: float, by: str = "value") -> Heads:
        """The heads whose value is at least ``threshold``, highest first."""
        return self._ranked(int((values_of(self._score, by) >= threshold).sum()), by, sign=-1)

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """One row per head, highest value first.

        Columns: id, layer, head, value, se, n, ci_low, ci_high, null, and whatever else the score has per head.

        The interval is the one :func:`bootstrap_ci` stored, if it did, else Student's t at ``level``.
        """
        values = values_of(self._score, "value")
        columns: dict[str, Any] = {name: values_of(self._score, name).values.ravel() for name in self._variables()}
        if "ci_low" not in columns and {"se", "n"} <= set(columns):
            summary = Summary(*(values_of(self._score, name).values for name in ("value", "se", "n")))
            columns["ci_low"], columns["ci_high"] = (bound.ravel() for bound in t_interval(summary, level))
        heads = [(int(layer), int(head)) for layer in values["layer"].values for head in values["head"].values]
        frame = pd.DataFrame(
            {
                "id": [str(self._head(*pair)) for pair in heads],
                "layer": [layer for layer, _ in heads],
                "head": [head for _, head in heads],
            }
            | {name: columns.pop(name) for name in ("value", "se", "n", "ci_low", "ci_high", "null") if name in columns}
            | columns
        )
        flat = values.values.astype(np.float64).ravel()
        order = np.argsort(-flat, kind="stable")[: np.count_nonzero(~np.isnan(flat))]
        return frame.iloc[order].reset_index(drop=True)

    def grid(self, by: str = "value") -> go.Figure:
        """Layer x head heat map; missing heads are hatched. Hover: value, se, n, null, unit, paper."""
        from interp.scores_figures import grid_figure

        return grid_figure(self._score, by)

    def scatter(self, other: xr.Dataset, by: str = "value") -> go.Figure:
        """This score (x) against another (y) of the same stack, one point per head, bars of one standard error."""
        from interp.scores_figures import scatter_figure

        return scatter_figure(self._score, other, by)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`table`, with the columns score and stack in front."""
        scores_files.write_csv(self._labelled_table(), path)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`table` with the columns score and stack in front.

        Raises:
            ImportError: neither pyarrow nor fastparquet is installed.
        """
        scores_files.write_parquet(self._labelled_table(), path)

    def to_latex(self, path: str | os.PathLike[str] | None = None, k: int = 20) -> str:
        """The ``k`` top heads as a LaTeX table (package booktabs); written to ``path`` if given, and returned."""
        return scores_files.latex_table(self._score, self.table().head(k), path)

    def to_pdf(self, path: str | os.PathLike[str], by: str = "value") -> None:
        """Write :meth:`grid` as a vector PDF; model, settings and seed are in its keywords (:func:`read_image_settings`).

        Raises:
            ImportError: the package matplotlib is not installed.
        """
        scores_files.write_image(self.grid(by), path, "pdf")

    def to_svg(self, path: str | os.PathLike[str], by: str = "value") -> None:
        """Write :meth:`grid` as SVG, with the same in its metadata.

        Raises:
            ImportError: the package matplotlib is not installed.
        """
        scores_files.write_image(self.grid(by), path, "svg")

    def _ranked(self, k: int, by: str, sign: int) -> Heads:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 0:
            raise ScoreError(f"k must be a whole number >= 0, got {k!r}")
        values = values_of(self._score, by).sortby(list(HEAD_DIMS))
        flat = sign * values.values.astype(np.float64).ravel()
        order = np.argsort(flat, kind="stable")
        order = order[~np.isnan(flat[order])][:k]
        layers, heads = np.unravel_index(order, values.shape)
        return Heads(
            self._head(int(values["layer"].values[i]), int(values["head"].values[j]))
            for i, j in zip(layers, heads, strict=True)
        )

    def _head(self, layer: int, head: int) -> Head:
        return Head(layer, head, str(metadata(self._score, "stack")))

    def _variables(self) -> list[str]:
        return [str(name) for name, array in self._score.data_vars.items() if set(array.dims) == set(HEAD_DIMS)]

    def _labelled_table(self) -> pd.DataFrame:
        frame = self.table()
        frame.insert(0, "stack", metadata(self._score, "stack"))
        frame.insert(0, "score", metadata(self._score, "name"))
        return frame


def _as_samples(values: Any, argument: str, like: xr.DataArray | None = None) -> xr.DataArray:
    """``values`` as float64 ``[sample, layer, head]``; without labels of its own it has those of ``like``, or 0, 1, 2, ..."""
    array = values if isinstance(values, xr.DataArray) else None
    if array is None:
        plain = np.asarray(values)
        if plain.ndim not in (2, 3):
            raise ScoreError(f"{argument} must be [sample, layer, head] or [layer, head], got shape {plain.shape}")
        array = xr.DataArray(plain, dims=SAMPLE_DIMS[3 - plain.ndim :])
    if array.dtype.kind not in "biuf":
        raise ScoreError(f"{argument} must hold numbers, got dtype {array.dtype}")
    if "sample" not in array.dims and set(array.dims) == set(HEAD_DIMS):
        array = array.expand_dims("sample")
    if set(array.dims) != set(SAMPLE_DIMS):
        raise ScoreError(f"{argument} must have the dims {SAMPLE_DIMS} or {HEAD_DIMS}, got {array.dims}")
    if 0 in array.shape:
        raise ScoreError(f"{argument} must have at least one sample, layer and head, got {dict(array.sizes)}")
    array = array.transpose(*SAMPLE_DIMS).astype(np.float64)
    labels: dict[str, Any] = {}
    for dim in HEAD_DIMS:
        source = array if dim in array.coords else like
        known = source is not None and source.sizes[dim] == array.sizes[dim]
        labels[dim] = source[dim].values if source is not None and known else np.arange(array.sizes[dim])
    return array.reset_coords(drop=True).assign_coords(labels)


class _CallableModule(ModuleType):
    """Importing this module binds it to ``interp.scores``, which users call to list the scores there are."""

    def __call__(self) -> Any:
        return import_module("interp.analysis").scores()


sys.modules[__name__].__class__ = _CallableModule
