"""A trace on disk: a folder of Zarr v3 arrays and a manifest.

``headscope-manifest.json`` lists every file with its size and SHA-256 and is written last. Zarr reads a deleted chunk
as NaN without a word; here a missing, cut or changed file is :class:`DamagedTrace`. A save builds the whole folder
beside the final name and swaps it in, so the name holds the old trace or the new one and never a part of either.
Nothing is pickled.

Other programs read the folder as plain Zarr: ``xarray.open_datatree(path, engine="zarr", consolidated=False)``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Generator, Hashable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import numpy as np
import xarray as xr

from interp.files import jsonable, local_path, sibling
from interp.tracing.stored_metadata import METADATA, bad_key, bad_metadata, bad_record, size_of

if TYPE_CHECKING:
    from interp.tracing.zarr_files import TraceWriter

MANIFEST = "headscope-manifest.json"
FORMAT = "headscope-trace"
VERSION = 1
CHUNK_BYTES = 16 * 2**20
ZSTD_LEVEL = 1  # On attention maps and row statistics level 3 saves under 1 % more and halves the writing speed.

Verify = Literal["content", "sizes", "full"]


class TraceStoreError(Exception):
    """A trace could not be saved or opened."""


class NotATrace(TraceStoreError):
    """What the path names is no trace of Headscope."""


class DamagedTrace(TraceStoreError):
    """A file of the trace is missing, cut short or changed; the message names it."""


class NewerTrace(TraceStoreError):
    """The trace was written by a later version of Headscope."""


class FileRecord(TypedDict):
    """One file in the manifest."""

    size: int
    sha256: str


def record_of(data: bytes) -> FileRecord:
    """Size and SHA-256 of a file's content."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_file(root: Path, key: str, record: FileRecord, *, check: bool = True) -> bytes:
    """The content of a file of the trace.

    Raises:
        DamagedTrace: it is missing, or (with ``check``) its content is not what was written.
    """
    try:
        data = (root / key).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DamagedTrace(f"{root} is damaged: the file {key} is missing") from None
    if check and record_of(data) != record:
        raise DamagedTrace(f"{root} is damaged: the content of {key} is not what was written (SHA-256 differs)")
    return data


def save_tree(tree: xr.DataTree, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write one node per stack; see :meth:`interp.tracing.trace.Trace.save`."""
    files = _zarr_files()
    final = local_path(path)
    _check_target(final, overwrite)
    stored = {name: _storable(node.to_dataset(), name) for name, node in tree.children.items()}
    encoding = {f"/{name}": _encoding(dataset) for name, dataset in stored.items()}
    out = xr.DataTree.from_dict(stored)
    out.attrs = jsonable(tree.attrs, "attrs")

    def fill(folder: Path) -> None:
        writer: TraceWriter = files.TraceWriter(folder)
        try:
            # Consolidated metadata is no part of the Zarr v3 specification; the manifest already makes listing cheap.
            out.to_zarr(writer, mode="w-", encoding=encoding, zarr_format=3, consolidated=False)  # pyright: ignore[reportArgumentType]
            writer.write(MANIFEST, _manifest(_in_order_of(stored, writer.files)))
        finally:
            writer.stop()

    try:
        with _swapped_in(final) as partial:
            fill(partial)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise TraceStoreError(
            f"saving to {final} failed: {error.strerror or error}. What was under that name is unchanged."
        ) from error
    return final


def open_tree(path: str | os.PathLike[str], *, verify: Verify = "content") -> xr.DataTree:
    """Open lazily; see :meth:`interp.tracing.trace.Trace.open`."""
    if verify not in get_args(Verify):
        raise ValueError(f"verify must be one of {get_args(Verify)}, got {verify!r}")
    zarr_files = _zarr_files()
    root = local_path(path)
    records = read_manifest(root)
    for key, record in records.items():
        size = size_of(root, key)
        if size is None:
            raise DamagedTrace(f"{root} is damaged: the file {key} is missing, or no plain file of this folder")
        if size != record["size"]:
            raise DamagedTrace(f"{root} is damaged: {key} has {size} bytes, but {record['size']} were written")
        if verify == "full":
            read_file(root, key, record)
    for key, record in records.items():
        if key.rpartition("/")[2] == METADATA:
            wrong = bad_metadata(read_file(root, key, record, check=verify != "sizes"))
            if wrong:
                raise DamagedTrace(f"{root} is damaged: {key} {wrong}")
    reader = zarr_files.TraceReader(root, records, check=verify != "sizes")
    try:
        tree = xr.open_datatree(
            reader,  # pyright: ignore[reportArgumentType]
            engine="zarr",
            # Never 2, whose metadata may name decoders that run code.
            zarr_format=3,
            chunks=None,
            consolidated=False,
            # Units such as "seconds" are for people here: never turn readings into dates.
            decode_times=False,
            decode_timedelta=False,
        )
        return _in_order(tree, list(records))
    except Exception as error:
        # The system's own word on a file stays; zarr's "not found" is an OSError without a number.
        if isinstance(error, TraceStoreError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        # Whatever zarr and xarray say of metadata that has the right checksums and that no Headscope wrote.
        raise DamagedTrace(
            f"{root} is damaged: what its metadata says does not fit together ({type(error).__name__}: {error})"
        ) from error


def read_manifest(root: Path) -> dict[str, FileRecord]:
    """The files of a trace, in the order written.

    Raises:
        NotATrace, NewerTrace, DamagedTrace: as their names say.
    """
    if not root.exists():
        left = sorted(p.name for p in root.parent.glob(f"{root.name}.replaced-*")) if root.parent.is_dir() else []
        hint = f"; a save that was killed left the older trace as {left[-1]}: rename it back" if left else ""
        raise NotATrace(f"there is no trace at {root}{hint}")
    if not root.is_dir():
        raise NotATrace(f"{root} is a file, and a trace is a folder (unpack it first if this is an archive)")
    if size_of(root, MANIFEST) is None:
        raise NotATrace(f"{root} is not a trace: it has no {MANIFEST}")
    text = (root / MANIFEST).read_bytes()
    try:
        manifest: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedTrace(f"{root} is damaged: {MANIFEST} is not readable ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise NotATrace(f"{root} is not a trace: {MANIFEST} does not name the format {FORMAT!r}")
    version, files = manifest.get("version"), manifest.get("files")
    if not isinstance(version, int) or version < 1:
        raise DamagedTrace(f"{root} is damaged: {MANIFEST} has the version {version!r}")
    if version > VERSION:
        raise NewerTrace(
            f"{root} has format version {version}, and this Headscope reads up to {VERSION}: update Headscope"
        )
    # Without its own checksum a changed file name in here would make Zarr see a missing chunk, that is NaN.
    if not isinstance(files, dict) or manifest.get("sha256") != _digest(files):
        raise DamagedTrace(f"{root} is damaged: {MANIFEST} was changed after it was written (SHA-256 differs)")
    for key, record in files.items():
        wrong = bad_key(key)
        if wrong:
            raise DamagedTrace(f"{root} is damaged: {MANIFEST} names {wrong}")
        wrong = bad_record(record)
        if wrong:
            raise DamagedTrace(f"{root} is damaged: {MANIFEST}'s entry of {key} {wrong}")
    return files


def _in_order_of(stacks: Mapping[str, xr.Dataset], files: dict[str, FileRecord]) -> dict[str, FileRecord]:
    first = ["zarr.json"]
    for stack, dataset in stacks.items():
        first += [f"{stack}/zarr.json", *(f"{stack}/{name}/zarr.json" for name in dataset.variables)]
    return {key: files[key] for key in (*first, *sorted(files))}


def _in_order(tree: xr.DataTree, keys: list[str]) -> xr.DataTree:
    """Stacks and variables in the manifest's order: Zarr writes and lists them in whatever order comes about."""
    place = {key: i for i, key in reversed(list(enumerate(keys)))}
    out: dict[str, xr.Dataset] = {}
    for stack in sorted(tree.children, key=lambda name: place[f"{name}/zarr.json"]):
        dataset = tree.children[stack].to_dataset()
        names = sorted(dataset.variables, key=lambda name: place[f"{stack}/{name}/zarr.json"])
        coords = {name: dataset.coords[name] for name in names if name in dataset.coords}
        out[stack] = xr.Dataset({n: dataset[n] for n in names if n not in coords}, coords=coords, attrs=dataset.attrs)
    ordered = xr.DataTree.from_dict(out)
    ordered.attrs = tree.attrs
    return ordered


def _manifest(files: dict[str, FileRecord]) -> bytes:
    content = {"format": FORMAT, "version": VERSION, "sha256": _digest(files), "files": files}
    return json.dumps(content, indent=0).encode()


def _digest(files: dict[str, FileRecord]) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _check_target(final: Path, overwrite: bool) -> None:
    if not final.exists():
        return
    if final.is_dir() and not any(final.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{final} exists already: choose another path, or pass overwrite=True to replace a trace")
    if not (final / MANIFEST).is_file():
        raise NotATrace(f"overwrite=True replaces only a trace, and {final} is none: remove it yourself if it may go")


@contextmanager
def _swapped_in(final: Path) -> Generator[Path]:
    """A folder to fill beside ``final``; it takes that name at the end, or vanishes on any failure."""
    final.parent.mkdir(parents=True, exist_ok=True)
    partial, aside = sibling(final, "partial"), sibling(final, "replaced")
    partial.mkdir()
    try:
        yield partial
        if final.exists():
            final.rename(aside)
        partial.rename(final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _storable(dataset: xr.Dataset, stack: str) -> xr.Dataset:
    """The same dataset with plain attributes and with strings in the one dtype that Zarr v3 specifies for them."""
    out = dataset.drop_encoding()
    out.attrs = jsonable(dataset.attrs, f"attrs of stack {stack!r}")
    for name in list(out.variables):
        variable = out.variables[name]
        attrs = jsonable(variable.attrs, f"attrs of {name!r} in stack {stack!r}")
        if variable.dtype.kind in "OUT":
            out[name] = (variable.dims, _strings(variable, name, stack), attrs)
        elif variable.dtype.kind not in "biufc":
            raise TypeError(
                f"{name!r} in stack {stack!r} must hold numbers, bools or strings, got dtype {variable.dtype}"
            )
        else:
            out[name].attrs = attrs
    return out


def _strings(variable: xr.Variable, name: Hashable, stack: str) -> np.ndarray:
    values = np.asarray(variable.values)
    wrong = [x for x in values.ravel() if not isinstance(x, str)] if values.dtype.kind == "O" else []
    if wrong:
        raise TypeError(f"{name!r} in stack {stack!r} must hold strings only ('' for none), got {wrong[0]!r}")
    return values.astype(np.dtypes.StringDType())


def _encoding(dataset: xr.Dataset) -> dict[Hashable, dict[str, Any]]:
    from zarr.codecs import ZstdCodec

    codec = ZstdCodec(level=ZSTD_LEVEL)
    return {
        name: {"chunks": chunk_shape(variable.dims, variable.shape, variable.dtype.itemsize), "compressors": [codec]}
        for name, variable in dataset.variables.items()
        if variable.ndim
    }


def chunk_shape(dims: tuple[Hashable, ...], shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """One layer to a chunk and the other dims whole, halved from the left until a chunk has at most 16 MiB.

    >>> chunk_shape(("sample", "layer", "head", "query", "key"), (1, 30, 9, 1024, 1024), 4)
    (1, 1, 3, 1024, 1024)
    """
    chunk = [max(1, size) for size in shape]
    if len(shape) == 1:
        return (min(chunk[0], max(1, CHUNK_BYTES // itemsize)),)
    for axis, dim in enumerate(dims):
        if dim == "layer":
            chunk[axis] = 1
    axis = 0
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        if chunk[axis] == 1:
            axis += 1
        else:
            chunk[axis] = -(-chunk[axis] // 2)
    return tuple(chunk)


def _zarr_files() -> Any:
    try:
        from interp.tracing import zarr_files
    except ImportError as error:
        raise ImportError(
            "saving and opening traces needs the package zarr, version 3: pip install 'zarr>=3'"
        ) from error
    return zarr_files
