"""What a stored trace may say about itself before anything is decoded: names of files, and Zarr's metadata.

Checksums tell damage, not intent: whoever makes a folder makes its manifest. A trace from somebody else must not reach
outside its folder, name a decoder that runs code (Zarr 2's ``pickle``) or ask for more memory than there can be.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

METADATA = "zarr.json"
CODECS = frozenset({"bytes", "vlen-utf8", "zstd"})
"""What :func:`interp.tracing.store.save_tree` writes; none of them runs code."""
MAX_ELEMENTS = 2**44
"""Of an array, which is read lazily: 64 TiB of float32."""
MAX_INDEX = 2**27
"""Of an array with one dimension, which xarray may read at once to index by it: 1 GiB of int64."""


def bad_key(key: str) -> str | None:
    """Why a manifest's key is no file of the trace; None where it is one."""
    paths = PurePosixPath(key), PureWindowsPath(key)
    if any(path.is_absolute() or path.anchor or ".." in path.parts for path in paths):
        return f"{key!r}, which is outside the trace"
    if not paths[0].parts or not key.isprintable():
        return f"{key!r}, which is no name of a file"
    return None


def bad_record(record: Any) -> str | None:
    """Why a manifest's record of a file cannot be used."""
    if not isinstance(record, dict) or set(record) != {"size", "sha256"}:
        return f"must be a size and a SHA-256, got {record!r:.80}"
    size, digest = record["size"], record["sha256"]
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        return f"must be a size and a SHA-256, got {record!r:.80}"
    return None


def size_of(root: Path, key: str) -> int | None:
    """Bytes of a file of the trace; None where there is no plain file of that name inside the folder.

    A link may stand for a file, but not for one outside of the folder: the dashboard shows what lies below its roots.
    """
    path = root / key
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device would be read for ever
        return None
    real, home = os.path.realpath(path), os.path.realpath(root)
    return found.st_size if os.path.commonpath((real, home)) == home else None


def bad_metadata(data: bytes) -> str | None:
    """Why one ``zarr.json`` is not such as Headscope writes; None where it is."""
    try:
        meta: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        return f"is not readable ({error})"
    if not isinstance(meta, dict) or meta.get("zarr_format") != 3:
        return "is not of Zarr format 3"
    if meta.get("node_type") == "group":
        return None if isinstance(meta.get("attributes", {}), dict) else "has attributes that are no object"
    if meta.get("node_type") != "array":
        return f"must describe a group or an array, got {meta.get('node_type')!r:.40}"
    return _bad_array(meta)


def _bad_array(meta: Mapping[str, Any]) -> str | None:
    shape = meta.get("shape")
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        return f"must have a shape of whole numbers >= 0, got {shape!r:.80}"
    if math.prod(shape) > MAX_ELEMENTS or (len(shape) == 1 and shape[0] > MAX_INDEX):
        return f"has a shape that no trace has, {shape!r:.80}"
    codecs = meta.get("codecs")
    names = {str(c.get("name")) if isinstance(c, dict) else "?" for c in codecs} if isinstance(codecs, list) else {"?"}
    if not names <= CODECS:
        return f"names the codecs {sorted(names - CODECS)!r:.80}, and traces use {sorted(CODECS)}"
    dims = meta.get("dimension_names") or []
    if not isinstance(dims, list) or len(dims) != len(shape) or not all(isinstance(d, str) for d in dims):
        return f"must name its {len(shape)} dimensions, got {dims!r:.80}"
    return None
