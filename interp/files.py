"""Writing files whole or not at all, and values that survive JSON."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def local_path(path: str | os.PathLike[str]) -> Path:
    """An absolute path on this machine, links resolved and ``~`` expanded.

    Raises:
        ValueError: ``path`` is an address such as ``s3://bucket/run``.
    """
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"path must be a file or folder on this machine, got the address {text!r}")
    return Path(text).expanduser().resolve()


def sibling(path: Path, word: str) -> Path:
    """A name beside ``path`` that nothing has yet, so that a rename between the two never crosses a file system."""
    return path.with_name(f"{path.name}.{word}-{secrets.token_hex(4)}")


def write_whole(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file so that its name holds either what was there before or all of ``data``, whatever happens.

    Missing parent folders are made. Text is written as UTF-8.

    Returns:
        The path written.
    """
    final = local_path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = sibling(final, "partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        partial.replace(final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return final


def jsonable(value: Any, name: str) -> Any:
    """``value`` in the types that JSON gives back: NumPy scalars and arrays, tuples, sets and paths become plain.

    Args:
        name: what to call the value in an error.

    Raises:
        TypeError: naming the part of ``value`` that JSON cannot hold.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return jsonable(value.item(), name)
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist(), name)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_key(key, name): jsonable(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return [jsonable(item, name) for item in sorted(value, key=repr)]
    raise TypeError(
        f"{name} must be text, numbers, lists or dicts of those (JSON), got {type(value).__name__}: {value!r}"
    )


def _key(key: Any, name: str) -> str:
    if isinstance(key, str | int | np.integer):
        return str(key)
    raise TypeError(f"{name} must have text as keys (JSON), got the key {key!r}")
