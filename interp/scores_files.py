"""Scores as files: our own JSON, tables and pictures for papers, and the formats of Retrieval_Head and DuoAttention.

Every file is written whole or not at all, and nothing is pickled.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from interp._version import __version__
from interp.files import jsonable, local_path, write_whole
from interp.scores_base import HEAD_DIMS, SAMPLE_DIMS, ScoreError, metadata, summarise, values_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

FORMAT = "headscope-score"
VERSION = 1
RETRIEVAL_PAPER = "Wu et al. 2024, https://arxiv.org/abs/2404.15574"
DUO_PAPER = "Xiao et al. 2024, https://arxiv.org/abs/2410.10819"


class ScoreFileError(ValueError):
    """A file that is no score, is damaged, or was written by a later version."""


def save_score(score: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write a score, or a stack of scores, as one JSON file; numbers come back bit for bit.

    Returns:
        The path written; what was there is replaced.

    Raises:
        TypeError: an attribute or variable that cannot be stored; it is named.
    """
    content = json.dumps(
        {
            "attrs": jsonable(score.attrs, "attrs"),
            "coords": {str(name): _encode(str(name), array) for name, array in score.coords.items()},
            "variables": {str(name): _encode(str(name), array) for name, array in score.data_vars.items()},
        }
    )
    digest = hashlib.sha256(content.encode()).hexdigest()
    head = f'{{"format": "{FORMAT}", "version": {VERSION}, "sha256": "{digest}", "content":\n'
    return write_whole(path, f"{head}{content}\n}}\n")


def open_score(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read what :func:`save_score` wrote.

    Raises:
        FileNotFoundError: nothing there.
        ScoreFileError: not a score, damaged, or from a later version of Headscope.
    """
    file = local_path(path)
    try:
        text = file.read_bytes().decode()
        whole: Any = json.loads(text)
    except ValueError as error:
        raise ScoreFileError(f"{file} is not a score, or is damaged: {error}") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ScoreFileError(f"{file} is not a score: it does not name the format {FORMAT!r}")
    version = whole.get("version")
    if not isinstance(version, int) or version < 1:
        raise ScoreFileError(f"{file} is damaged: it has the version {version!r}")
    if version > VERSION:
        raise ScoreFileError(
            f"{file} has format version {version}, this Headscope reads up to {VERSION}: update Headscope"
        )
    content = whole.get("content")
    if not isinstance(content, dict) or hashlib.sha256(json.dumps(content).encode()).hexdigest() != whole.get("sha256"):
        raise ScoreFileError(f"{file} is damaged: its content was changed after it was written (SHA-256 differs)")
    variables, coords = ({n: _decode(a) for n, a in content[part].items()} for part in ("variables", "coords"))
    return xr.Dataset(variables, coords=coords, attrs=content["attrs"])


def read_retrieval_head_json(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read ``head_score/<model>.json`` of Retrieval_Head: one line ``{"<layer>-<head>": [score of each passed test]}``.

    Heads are query heads. Heads of the grid that the file leaves out are NaN. A test's score can exceed 1: the released
    code counts a token each time it is copied.

    Raises:
        ScoreFileError: another format, or lists of different lengths.
    """
    file = local_path(path)
    with file.open(encoding="utf-8") as lines:
        first = lines.readline()
    try:
        table: Any = json.loads(first)
        if not isinstance(table, dict) or not table:
            raise ValueError("not an object with entries")
        matches = {key: re.fullmatch(r"(\d+)-(\d+)", key) for key in table}
        heads = {key: (int(m[1]), int(m[2])) for key, m in matches.items() if m}
        if len(heads) < len(table):
            raise ValueError(f"the key {next(k for k, m in matches.items() if not m)!r} is not '<layer>-<head>'")
        lists = {key: np.asarray(values, dtype=np.float64) for key, values in table.items()}
    except (ValueError, TypeError) as error:
        raise ScoreFileError(f"{file} is no Retrieval_Head score file: {error}") from None
    lengths = {values.shape for values in lists.values()}
    if len(lengths) > 1 or len(next(iter(lengths))) != 1 or not next(iter(lengths))[0]:
        raise ScoreFileError(
            f"{file} must have one non-empty list of numbers per head, all of one length, got {lengths}"
        )
    n_layers, n_heads = (max(pair[axis] for pair in heads.values()) + 1 for axis in (0, 1))
    samples = np.full((next(iter(lengths))[0], n_layers, n_heads), np.nan)
    for key, (layer, head) in heads.items():
        samples[:, layer, head] = lists[key]
    attrs = {"name": "retrieval", "unit": "fraction of needle tokens copied", "paper": RETRIEVAL_PAPER}
    return _score(samples, attrs | {"settings": {"file": file.name}, "stack": "text"})


def write_retrieval_head_json(score: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write ``head_score/<model>.json`` as Retrieval_Head does: one line, keys in layer order, a list per head.

    Missing heads are left out.

    Raises:
        ScoreError: no ``value_by_sample``, or a head that lacks only some samples (the lists have no place for a gap).
    """
    if "value_by_sample" not in score:
        raise ScoreError("the Retrieval_Head format has a value per test: make the score with keep_samples=True")
    samples = score["value_by_sample"].transpose(*SAMPLE_DIMS).sortby(list(HEAD_DIMS))
    table: dict[str, list[float]] = {}
    for i, layer in enumerate(samples["layer"].values):
        for j, head in enumerate(samples["head"].values):
            values = samples.values[:, i, j]
            if np.isnan(values).all():
                continue
            if np.isnan(values).any():
                raise ScoreError(
                    f"every head must have all samples or none, got {np.isnan(values).sum()} NaN in L{layer}H{head}"
                )
            table[f"{layer}-{head}"] = values.tolist()
    return write_whole(path, json.dumps(table))


def read_duo_attention_tsv(path: str | os.PathLike[str], *, group_size: int) -> xr.Dataset:
    """Read ``full_attention_heads.tsv`` of DuoAttention: a line per layer, a gate per KV head (1 full, 0 streaming).

    Args:
        path: the file.
        group_size: query heads per KV head of the model (``H / H_kv``); query head h gets the gate of KV head
            ``h // group_size``.

    Returns:
        A score with ``value`` clipped to [0, 1] (the last optimiser step may leave it) per query head, and
        ``gate (layer, kv_head)``, the numbers as they are in the file.

    Raises:
        ScoreFileError: not a table of numbers.
    """
    _check_group_size(group_size)
    file = local_path(path)
    try:
        gate = np.array([[float(cell) for cell in line.split("\t")] for line in file.read_text().splitlines() if line])
    except ValueError as error:
        raise ScoreFileError(f"{file} is no DuoAttention table of numbers: {error}") from None
    if gate.ndim != 2 or not np.isfinite(gate).all():
        raise ScoreFileError(f"{file} must be a table of finite numbers, one line per layer, got shape {gate.shape}")
    samples = np.repeat(gate.clip(0, 1), group_size, axis=1)[None]
    attrs = {"name": "duo_attention", "unit": "gate (1 full attention, 0 streaming)", "paper": DUO_PAPER}
    score = _score(samples, attrs | {"settings": {"file": file.name, "group_size": group_size}, "stack": "text"})
    return score.drop_vars("value_by_sample").assign(gate=(("layer", "kv_head"), gate))


def write_duo_attention_tsv(
    score: xr.Dataset,
    path: str | os.PathLike[str],
    *,
    group_size: int,
    reduce: Literal["equal", "mean", "max"] = "equal",
) -> Path:
    """Write ``full_attention_heads.tsv``: tab-separated ``%.18e``, a line per layer, a column per KV head.

    A gate that :func:`read_duo_attention_tsv` read and nobody changed is written as it stood in the file, also where it
    lay outside [0, 1], so that lines not touched keep their bytes.

    Args:
        score: values per query head.
        path: the file.
        group_size: query heads per KV head.
        reduce: the gate of a KV head from the values of its query heads: ``"equal"`` demands that they agree.

    Raises:
        ScoreError: missing heads, layers not 0, 1, 2, ..., a head count that is no multiple of ``group_size``, or
            values that differ within a group under ``"equal"``.
    """
    _check_group_size(group_size)
    if reduce not in ("equal", "mean", "max"):
        raise ValueError(f"reduce must be 'equal', 'mean' or 'max', got {reduce!r}")
    values = values_of(score, "value").sortby(list(HEAD_DIMS))
    for dim in HEAD_DIMS:
        if values[dim].values.tolist() != list(range(values.sizes[dim])):
            raise ScoreError(f"the DuoAttention format needs every {dim} from 0, got {values[dim].values.tolist()}")
    if values.sizes["head"] % group_size:
        raise ScoreError(f"group_size must divide the {values.sizes['head']} heads, got {group_size}")
    grouped = values.values.astype(np.float64).reshape(values.sizes["layer"], -1, group_size)
    if np.isnan(grouped).any():
        raise ScoreError(f"the DuoAttention format has no place for missing heads, got {np.isnan(grouped).sum()} NaN")
    if reduce == "equal" and (grouped != grouped[..., :1]).any():
        layer, kv_head = np.argwhere((grouped != grouped[..., :1]).any(axis=-1))[0]
        raise ScoreError(
            f"query heads of one KV head must have one value, got {grouped[layer, kv_head].tolist()} in layer {layer}, "
            f"KV head {kv_head}: choose reduce='mean' or 'max'"
        )
    gate = {"equal": grouped[..., 0], "mean": grouped.mean(axis=-1), "max": grouped.max(axis=-1)}[reduce]
    if "gate" in score and score["gate"].shape == gate.shape:
        read = score["gate"].transpose("layer", "kv_head").values
        gate = np.where(gate == read.clip(0, 1), read, gate)
    lines = ["\t".join(f"{cell:.18e}" for cell in row) for row in gate]
    return write_whole(path, "\n".join(lines) + "\n")


def write_csv(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table as CSV, numbers in full."""
    write_whole(path, table.to_csv(index=False))


def write_parquet(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table as Parquet; ImportError without pyarrow or fastparquet."""
    if not (find_spec("pyarrow") or find_spec("fastparquet")):
        raise ImportError("to_parquet needs the package pyarrow: pip install pyarrow (to_csv needs nothing)")
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_whole(path, buffer.getvalue())


def write_image(figure: go.Figure, path: str | os.PathLike[str], format: Literal["pdf", "svg"]) -> None:
    """Write a figure as a vector image; ImportError without matplotlib.

    What made it is in the file, see :func:`read_image_settings`.
    """
    if not find_spec("matplotlib"):
        raise ImportError(
            f"to_{format} needs the package matplotlib: pip install 'matplotlib>=3.10' (score.heads.grid().write_html needs nothing)"
        )
    from interp.vector_figures import image

    write_whole(path, image(figure, format))


def figure_settings(score: xr.Dataset, by: str = "value") -> dict[str, Any]:
    """What a figure of a score carries with it, JSON: score, model, seed, settings, paper, unit, stack, variable, version."""
    settings = metadata(score, "settings")
    # A stack of scores holds them as text.
    held: dict[str, Any] = dict(json.loads(settings) if isinstance(settings, str) and settings else settings or {})
    seeds = {k: v for k, v in _walk(held) if k == "seed" or k.endswith("_seed")}
    about = {key: metadata(score, key) for key in ("name", "unit", "paper", "stack")}
    seed = seeds.get("seed", next(iter(seeds.values()), None))
    about |= {"variable": by, "model": held.get("model"), "seed": seed, "settings": held, "headscope": __version__}
    return jsonable(about, "settings of the figure")


def _walk(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries of a mapping, those of mappings in it (a probe's settings) first, so that the outer ones win."""
    for item in value.values():
        if isinstance(item, Mapping):
            yield from _walk(item)
    yield from ((str(k), v) for k, v in value.items())


def read_image_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a PDF or SVG of :func:`write_image` says of the figure's making: score, model, seed, settings, version.

    Any PDF reader shows the same under Keywords of the document's properties.

    Raises:
        FileNotFoundError: nothing there.
        ScoreFileError: no image that Headscope wrote.
    """
    file = local_path(path)
    data = file.read_bytes()
    if data.startswith(b"%PDF"):
        # matplotlib leaves the Info dictionary uncompressed; the JSON is ASCII, so the string has no other escapes.
        found = re.search(rb"/Keywords \(((?:[^\\()]|\\.)*)\)", data, re.S)
        text = None if found is None else re.sub(rb"\\(.)", _unescape, found[1], flags=re.S).decode("ascii", "replace")
    else:
        marked = re.search(rb"<dc:subject>.*?<rdf:li>(.*?)</rdf:li>", data, re.S)
        text = None if marked is None else html.unescape(marked[1].decode("utf-8", "replace"))
    try:
        told: Any = json.loads(text or "")
    except ValueError:
        told = None
    if not isinstance(told, dict) or not told:
        raise ScoreFileError(f"{file} is no figure that Headscope wrote: it does not say what made it")
    return told


def _unescape(match: re.Match[bytes]) -> bytes:
    return {b"n": b"\n", b"r": b"\r", b"t": b"\t"}.get(match[1], match[1])


def latex_table(score: xr.Dataset, table: pd.DataFrame, path: str | os.PathLike[str] | None) -> str:
    """A booktabs table of head, value with standard error, n and, where there is one, the control."""
    null = "null" in table
    titles = [
        "Head",
        f"{_tex(metadata(score, 'name'))} ({_tex(metadata(score, 'unit'))})",
        "$n$",
        *(["Control"] if null else []),
    ]
    lines = [rf"\begin{{tabular}}{{{'lrr' + 'r' * null}}}", r"\toprule", " & ".join(titles) + r" \\", r"\midrule"]
    for row in table.to_dict("records"):
        se = row.get("se", math.nan)
        value = f"{row['value']:.3f}" + ("" if math.isnan(se) else f" $\\pm$ {se:.3f}")
        cells = [_tex(row["id"]), value, str(row.get("n", "")), *([f"{row['null']:.3f}"] if null else [])]
        lines.append(" & ".join(cells) + r" \\")
    text = "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
    if path is not None:
        write_whole(path, text)
    return text


def _score(samples: np.ndarray, attrs: dict[str, Any]) -> xr.Dataset:
    summary = summarise(samples)
    variables = {name: (HEAD_DIMS, array) for name, array in summary._asdict().items()}
    coords = {dim: np.arange(size) for dim, size in zip(HEAD_DIMS, samples.shape[1:], strict=True)}
    return xr.Dataset({**variables, "value_by_sample": (SAMPLE_DIMS, samples)}, coords=coords, attrs=attrs)


def _check_group_size(group_size: int) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a whole number >= 1, got {group_size!r}")


def _encode(name: str, array: xr.DataArray) -> dict[str, Any]:
    values = array.values
    kind = values.dtype.kind
    if kind in "OTU":
        data = [str(x) for x in values.ravel().tolist()]
    elif kind == "f":
        # JSON has neither NaN nor infinity.
        data = [None if math.isnan(x) else x if math.isfinite(x) else str(x) for x in values.ravel().tolist()]
    elif kind in "biu":
        data = values.ravel().tolist()
    else:
        raise TypeError(f"{name!r} must hold numbers, bools or strings, got dtype {values.dtype}")
    dtype = "str" if kind in "OTU" else values.dtype.name
    return {
        "dims": [str(dim) for dim in array.dims],
        "shape": list(values.shape),
        "dtype": dtype,
        "data": data,
        "attrs": jsonable(array.attrs, f"attrs of {name!r}"),
    }


def _decode(stored: dict[str, Any]) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    data = [math.nan if x is None else x for x in stored["data"]]
    values = np.array(data, dtype=np.dtype(stored["dtype"])).reshape(stored["shape"])
    return stored["dims"], values, stored["attrs"]


def _tex(text: Any) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in str(text))
