"""HeadVis (https://transformer-circuits.pub/2026/headvis, https://github.com/anthropics/headvis): its static ``data/`` folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from interp.exports.headvis_metrics import DESCRIPTIONS, Sums, accumulate, followers
from interp.exports.maps import IMAGE, ExportError, Maps, maps_of
from interp.files import local_path, sibling
from interp.heads import Head, Heads, as_heads
from interp.scores_base import metadata, values_of
from interp.tracing.trace import Trace

Pair = tuple[int, int]
EDGES = [0, *(2**n for n in range(18))]
TOKENS = 100
"""Tokens in the ranking of a head's query and key tokens."""


def write_headvis(
    traces: Trace | str | os.PathLike[str] | Sequence[Trace | str | os.PathLike[str]], folder: str | os.PathLike[str], *,
    heads: Any = None, stack: str = "text", scores: Sequence[xr.Dataset] = (), intervals: int = 10, per_interval: int = 20,
    top: int = 8, threshold: float = 0.005, seed: int = 0, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write the folder ``data/`` that HeadVis' page reads without a server.

    ``config.json``, ``scatter_data.json`` (a row per head: the metrics of :data:`~interp.exports.headvis_metrics.DESCRIPTIONS` and
    ``scores``), ``heads/L{layer}H{head}.json`` (sequences by decile of the head's largest weight, maps as sparse pairs, histograms,
    tokens). Position 0 and the diagonal do not count in the largest weight, as in HeadVis itself. There is no ``umap/``.

    Every trace is read twice and none is kept, so that traces on disk may be more than fits in memory.

    Args:
        traces: of runs with ``Capture(attention=True)``; every sample is a sequence. Paths are opened.
        folder: to write; its parents are made.
        heads: which; None is all of the stack that every trace has.
        stack: of the heads.
        scores: more axes of the scatter plot, each by its name.
        intervals: buckets of equal size by the largest weight, the highest last.
        per_interval: sequences drawn from each.
        top: pairs kept of a query's row.
        threshold: the least weight kept.
        seed: of that draw.
        overwrite: replace a folder that this wrote. Anything else is never replaced.

    Returns:
        The folder.

    Raises:
        ExportError: no trace, maps that a trace does not hold, or heads that a score does not have.
        FileExistsError: the folder is there.
    """
    opened = [traces] if isinstance(traces, Trace | str | os.PathLike) else list(traces)
    if not opened:
        raise ExportError("traces must be at least one, got none")
    for name, value, least in (("intervals", intervals, 1), ("per_interval", per_interval, 1), ("top", top, 1)):
        if value < least:
            raise ExportError(f"{name} must be at least {least}, got {value}")
    final = local_path(folder)
    _check_folder(final, overwrite)
    wanted = None if heads is None else as_heads(heads)
    if wanted is not None and list(wanted.by_stack()) != [stack]:
        raise ExportError(f"heads must be of stack {stack!r}, got {wanted}")
    pairs = None if wanted is None else [(h.layer, h.head) for h in wanted]
    extra = {str(metadata(score, "name")): score for score in scores}
    sums, peaks, pairs, attrs = _first_pass(opened, stack, pairs, top, threshold)
    rows = [_row(pair, sums[pair], extra, stack) for pair in pairs]
    chosen = {pair: _draw(peaks[pair], intervals, per_interval, np.random.default_rng([seed, *pair])) for pair in pairs}
    held = _second_pass(opened, stack, chosen, top, threshold)
    config = _config(attrs, pairs, stack, intervals, extra)
    part = sibling(final, "partial")
    try:
        (part / "heads").mkdir(parents=True)
        (part / "attributions").mkdir()
        _write(part / "config.json", config)
        _write(part / "scatter_data.json", rows)
        # Empty ones tell the page that there is no server and no attribution.
        _write(part / "server_config.json", {})
        _write(part / "attributions" / "manifest.json", {})
        for pair in pairs:
            found = [{**s, "max_activation": _short(peaks[pair][s["sequence_id"]])} for s in held[pair]]
            _write(part / "heads" / f"L{pair[0]}H{pair[1]}.json", _payload(found, peaks[pair]))
        if final.exists():
            old = sibling(final, "old")
            final.rename(old)
            part.rename(final)
            shutil.rmtree(old)
        else:
            part.rename(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def _first_pass(
    traces: Sequence[Any], stack: str, pairs: list[Pair] | None, top: int, threshold: float
) -> tuple[dict[Pair, Sums], dict[Pair, list[float]], list[Pair], dict[str, Any]]:
    """Metrics of each head, the largest weight of each sequence, the heads, and the first trace's attributes."""
    sums: dict[Pair, Sums] = {}
    peaks: dict[Pair, list[float]] = {}
    attrs: dict[str, Any] = {}
    for number, (trace, maps) in enumerate(_sequences(traces, stack)):
        there = {(maps.layers[i], maps.heads[j]): maps.attention[i, j] for i, j in maps.pairs}
        if pairs is None:
            pairs = list(there)
        absent = Heads(Head(layer, head, stack) for layer, head in pairs if (layer, head) not in there)
        if absent or not pairs:
            raise ExportError(
                f"every trace must hold the maps of all heads, got sequence {number} without {absent or 'any'}"
            )
        attrs = attrs or dict(trace.attrs)
        follows = followers(np.where(maps.kinds == IMAGE, -1, maps.query_ids))
        for pair in pairs:
            p = there[pair].astype(np.float64)
            mine = sums.setdefault(pair, Sums())
            accumulate(mine, p, follows)
            peaks.setdefault(pair, []).append(float(_inner(p).max(initial=0.0)))
            for query, key, weight in zip(*_sparse(_inner(p), top, threshold), strict=True):
                for token, tokens in ((maps.keys[query], mine.queries), (maps.keys[key], mine.keys)):
                    tokens[token] = tokens.get(token, 0.0) + weight
    return sums, peaks, pairs or [], attrs


def _second_pass(
    traces: Sequence[Any], stack: str, chosen: Mapping[Pair, Mapping[int, int]], top: int, threshold: float
) -> dict[Pair, list[dict[str, Any]]]:
    """The sequences drawn for each head, highest interval first."""
    out: dict[Pair, list[dict[str, Any]]] = {pair: [] for pair in chosen}
    for number, (_, maps) in enumerate(_sequences(traces, stack)):
        for pair, drawn in chosen.items():
            if number not in drawn:
                continue
            p = maps.attention[maps.layers.index(pair[0]), maps.heads.index(pair[1])].astype(np.float64)
            query, key, weight = _sparse(p, top, threshold)
            out[pair].append(
                {
                    "sequence_id": number, "interval": drawn[number], "tokens": maps.keys,
                    "attention_indices": (query * len(p) + key).tolist(), "attention_values": [_short(w) for w in weight],
                    "seq_len": len(p),
                }
            )  # fmt: skip
    return {pair: sorted(found, key=lambda s: -s["interval"]) for pair, found in out.items()}


def _sequences(traces: Sequence[Any], stack: str) -> Iterator[tuple[Trace, Maps]]:
    for one in traces:
        trace = one if isinstance(one, Trace) else Trace.open(one)
        samples = trace[stack].sizes["sample"] if stack in trace else 1
        for sample in range(samples):
            maps = maps_of(trace, stack, sample)
            if maps.cross:
                raise ExportError("HeadVis has one row of tokens for queries and keys: cross attention cannot be shown")
            yield trace, maps


def _inner(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without what the page's own largest weight leaves out."""
    out = p.copy()
    np.fill_diagonal(out, 0.0)
    out[0], out[:, 0] = 0.0, 0.0
    return out


def _sparse(p: NDArray[np.float64], top: int, threshold: float) -> tuple[Any, Any, Any]:
    """Query, key and weight of the largest ``top`` of each row that reach the threshold, in the order of the map."""
    kept = np.argsort(-p, axis=1, kind="stable")[:, :top]
    mask = np.zeros(p.shape, np.bool_)
    np.put_along_axis(mask, kept, True, axis=1)
    query, key = np.nonzero(mask & (p >= threshold) & (p > 0))
    return query, key, p[query, key]


def _draw(peaks: Sequence[float], intervals: int, per_interval: int, random: np.random.Generator) -> dict[int, int]:
    """The interval of each sequence that is drawn: 1 for the lowest, ``intervals`` for the highest largest weight."""
    order = np.argsort(-np.asarray(peaks), kind="stable")
    bucket = intervals - np.arange(len(peaks)) * intervals // len(peaks)
    out: dict[int, int] = {}
    for interval in range(1, intervals + 1):
        members = order[bucket == interval]
        if len(members) > per_interval:
            members = random.choice(members, per_interval, replace=False)
        out |= {int(n): interval for n in members}
    return out


def _row(pair: Pair, sums: Sums, scores: Mapping[str, xr.Dataset], stack: str) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": pair[0], "head": pair[1]}
    row |= {name: None if value is None else _short(value) for name, value in sums.means().items()}
    for name, score in scores.items():
        if metadata(score, "stack") != stack:
            raise ExportError(f"scores must be of stack {stack!r}, got {name} of {metadata(score, 'stack')!r}")
        values = values_of(score, "value")
        if pair[0] not in values["layer"] or pair[1] not in values["head"]:
            raise ExportError(f"scores must have every head, got {name} without {Head(*pair, stack)}")
        value = float(values.sel(layer=pair[0], head=pair[1]))
        row[name] = None if np.isnan(value) else _short(value)
    return row


def _config(
    attrs: Mapping[str, Any], pairs: list[Pair], stack: str, intervals: int, scores: Mapping[str, xr.Dataset]
) -> dict[str, Any]:
    said = {name: f"{metadata(s, 'name')}, {metadata(s, 'unit')}; {metadata(s, 'paper')}" for name, s in scores.items()}
    model = attrs.get("model")
    name = str(model.get("name") if isinstance(model, Mapping) else model or "model")
    return {
        "model_name": name if stack == "text" else f"{name}, {stack}", "heads": [list(pair) for pair in pairs],
        "n_layers": max(layer for layer, _ in pairs) + 1, "n_heads": max(head for _, head in pairs) + 1, "n_intervals": intervals,
        "metrics": [*DESCRIPTIONS, *scores], "metric_descriptions": {**DESCRIPTIONS, **said},
        "head_data_pattern": "L{layer}H{head}.json", "has_umap": False, "umap_heads": [],
        "custom_plots": [
            {"key": "qk_distance_histogram", "label": "Q-K distance"}, {"key": "histogram", "label": "Largest weight of a sequence"},
        ],
        "custom_tables": [
            {"key": "top_query_tokens", "label": "Top query tokens"}, {"key": "top_key_tokens", "label": "Top key tokens"},
        ],
        "statistics_display": {
            "mean_max_activation": {"label": "Mean largest weight", "format": "default"},
            "sequences": {"label": "Sequences", "format": "default"},
        },
    }  # fmt: skip


def _payload(sequences: list[dict[str, Any]], peaks: Sequence[float]) -> dict[str, Any]:
    distances: list[NDArray[np.int64]] = []
    masses: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for found in sequences:
        query, key = np.divmod(np.asarray(found["attention_indices"], np.int64), found["seq_len"])
        distances.append(np.abs(query - key))
        for places, mass in zip((query, key), masses, strict=True):
            for place, weight in zip(places, found["attention_values"], strict=True):
                token = found["tokens"][place]
                mass[token] = mass.get(token, 0.0) + weight
    edges = EDGES[
        : 2 + int(np.searchsorted(EDGES, max((int(d.max(initial=0)) for d in distances), default=0), "right"))
    ]
    counts, _ = np.histogram(np.concatenate(distances) if distances else [], bins=edges)
    spread, bounds = np.histogram(peaks, bins=20, range=(0.0, 1.0))
    return {
        "sequences": sequences, "qk_distance_histogram": {"bin_edges": edges, "bin_values": counts.tolist()},
        "top_query_tokens": _ranked(masses[0]), "top_key_tokens": _ranked(masses[1]),
        "histogram": {"bin_edges": [_short(b) for b in bounds], "bin_values": spread.tolist()},
        "statistics": {"mean_max_activation": _short(float(np.mean(peaks))), "sequences": len(peaks)},
    }  # fmt: skip


def _ranked(mass: Mapping[str, float]) -> list[dict[str, Any]]:
    """Tokens by their share of the attention kept."""
    total = sum(mass.values()) or 1.0
    ranked = sorted(mass.items(), key=lambda item: (-item[1], item[0]))[:TOKENS]
    return [{"token": token, "weight": _short(weight / total)} for token, weight in ranked]


def _short(value: Any) -> float:
    """Four decimals, which is a quarter of the file."""
    return round(float(value), 4)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False, ensure_ascii=False), encoding="utf-8")


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    ours = config.is_file() and "head_data_pattern" in config.read_text(encoding="utf-8")
    if not overwrite or not ours:
        why = "pass overwrite=True to replace it" if ours else "it is not HeadVis' data"
        raise FileExistsError(f"folder must be new or empty, got {folder}: {why}")
