"""One reader for every file of a score: ours, tables of them, and those of Retrieval_Head and DuoAttention."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from interp.files import local_path
from interp.scores_base import HEAD_DIMS
from interp.scores_files import (
    FORMAT,
    ScoreFileError,
    open_score,
    read_duo_attention_tsv,
    read_retrieval_head_json,
)

COLUMNS = ("value", "se", "n", "null", "ci_low", "ci_high")


def read_score(path: str | os.PathLike[str], *, group_size: int | None = None) -> xr.Dataset:
    """Read a score from any file that Headscope writes, and from the released files of two papers.

    Args:
        path: ``.json`` (of :func:`~interp.scores_files.save_score`; the table of ``headscope score --out``; Retrieval_Head's
            ``head_score/<model>.json``), ``.csv`` (of ``score.heads.to_csv``) or ``.tsv`` (DuoAttention's).
        group_size: query heads per KV head, which a ``.tsv`` does not say.

    Returns:
        The score. A table has no samples; heads that it leaves out are NaN.

    Raises:
        FileNotFoundError: nothing there.
        ScoreFileError: none of these, or a ``.tsv`` without ``group_size``.
    """
    file = local_path(path)
    if file.suffix == ".tsv":
        if group_size is None:
            raise ScoreFileError(f"{file} holds a gate per KV head: the query heads of each must be given (group_size)")
        return read_duo_attention_tsv(file, group_size=group_size)
    if file.suffix == ".csv":
        return _of_csv(file)
    try:
        told: Any = json.loads(file.read_bytes())
    except ValueError:
        told = None
    if isinstance(told, dict) and isinstance(told.get("heads"), list) and "format" not in told:
        return _of_table(
            pd.DataFrame(told["heads"]), {k: told.get(k) for k in ("name", "unit", "paper", "stack", "settings")}, file
        )
    if told is None or (isinstance(told, dict) and told.get("format") == FORMAT):
        return open_score(file)
    return read_retrieval_head_json(file)


def _of_csv(file: Any) -> xr.Dataset:
    try:
        frame = pd.read_csv(file)
    except (ValueError, pd.errors.ParserError) as error:
        raise ScoreFileError(f"{file} is no table of a score: {error}") from None
    if not {"score", "stack"} <= set(frame.columns) or len(set(frame["score"])) != 1:
        raise ScoreFileError(
            f"{file} must be a table of one score with the columns score and stack, got {list(frame.columns)}"
        )
    return _of_table(frame, {"name": str(frame["score"][0]), "stack": str(frame["stack"][0])}, file)


def _of_table(frame: pd.DataFrame, attrs: dict[str, Any], file: Any) -> xr.Dataset:
    if not {"layer", "head", "value"} <= set(frame.columns) or not len(frame):
        raise ScoreFileError(
            f"{file} must have layer, head and value of each head, got the columns {list(frame.columns)}"
        )
    try:
        at = frame["layer"].to_numpy(np.int64), frame["head"].to_numpy(np.int64)
        columns = {name: frame[name].to_numpy(np.float64) for name in COLUMNS if name in frame}
    except (ValueError, TypeError) as error:
        raise ScoreFileError(f"{file} must hold numbers: {error}") from None
    if min(at[0].min(), at[1].min()) < 0 or len(set(zip(*at, strict=True))) < len(frame):
        raise ScoreFileError(f"{file} must have every head once, layers and heads counted from 0")
    size = int(at[0].max()) + 1, int(at[1].max()) + 1
    out = xr.Dataset(coords={dim: np.arange(n) for dim, n in zip(HEAD_DIMS, size, strict=True)})
    for name, values in columns.items():
        grid = np.full(size, np.nan)
        grid[at] = values
        out[name] = (HEAD_DIMS, np.nan_to_num(grid).astype(np.int64) if name == "n" else grid)
    out.attrs = {"name": "score", "unit": "", "paper": "", "stack": "text", "settings": {}} | {
        k: v for k, v in attrs.items() if v is not None
    }
    return out
