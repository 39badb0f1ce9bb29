"""What a session recorded in one top-level forward or generate, as labelled arrays (:class:`Trace`)."""

from __future__ import annotations

import html
import os
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xarray as xr

from interp.files import jsonable, local_path
from interp.tracing.store import Verify, open_tree, save_tree

CAPTURE_KEYWORD: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("lse", "top_weight", "top_key", "entropy", "mass", "sink_share"), "row_stats=True"),
        **dict.fromkeys(("topk_weight", "topk_key"), "topk=8"),
        "group_output": "group_output='last'",
        **dict.fromkeys(("received", "received_rows"), "received=True"),
        "pooled": "pooled=64",
        "offset": "offset=True",
        **dict.fromkeys(("distance", "distance_mass"), "distance='euclidean'"),
        "row_attention": "rows='last'",
        "attention": "attention=True",
        "z": "z=True",
    }
)
"""Each variable of a trace and the ``Capture`` keyword that gives it."""


class TraceKeyError(KeyError):
    """A stack or variable that the trace does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


class StackDataset(xr.Dataset):
    """The Dataset of one stack. Asked for a reading that was not captured, it says how to capture it."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except KeyError:
            if isinstance(key, str):
                raise TraceKeyError(self._absent(key)) from None
            raise

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in CAPTURE_KEYWORD:
                raise AttributeError(self._absent(name)) from None
            raise

    def _absent(self, name: str) -> str:
        has = ", ".join(map(str, self.variables)) or "none"
        if name in CAPTURE_KEYWORD:
            return f"{name!r} was not captured: trace again with Capture({CAPTURE_KEYWORD[name]}). Captured here: {has}"
        return f"no variable {name!r} in this stack; it has: {has}"


class Trace:
    """The readings of one run: an :class:`xarray.Dataset` for each stack, and the circumstances in ``attrs``.

    >>> trace = Trace({"text": xr.Dataset({"entropy": (("sample", "layer", "head", "query"), [[[[0.0, 0.5]]]])})})
    >>> trace["text"].entropy.sizes["query"]
    2

    Dims are sample, layer, head, query, key and, by what was captured, group, query_group, query_block, key_block, row,
    dim, k. Stacks share no dims: the ``query`` of ``vision`` counts patches. NaN means missing (a layer without such
    heads, a pad row), never 0.

    Args:
        stacks: the Dataset of each stack by its name, such as ``text`` or ``vision``.
        attrs: model id, revision, library versions, capture, interventions, seeds: whatever JSON can hold.

    Raises:
        TypeError: a stack that is no Dataset, or an attribute that JSON cannot hold.
        ValueError: a stack without a name, or with ``/`` or a leading ``.`` in it.
    """

    def __init__(self, stacks: Mapping[str, xr.Dataset], attrs: Mapping[str, Any] | None = None) -> None:
        for name, dataset in stacks.items():
            if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
                raise ValueError(f"stacks must be named without '/' or a leading '.', got {name!r}")
            if not isinstance(dataset, xr.Dataset):
                raise TypeError(f"stacks[{name!r}] must be an xarray.Dataset, got {type(dataset).__name__}")
        self._stacks = {name: _as_stack(dataset) for name, dataset in stacks.items()}
        self._path: Path | None = None
        self.attrs: dict[str, Any] = jsonable(dict(attrs or {}), "attrs")

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: Verify = "content") -> Trace:
        """Open a saved trace; an array is read from disk when it is used, layer by layer.

        Args:
            path: the folder that :meth:`save` wrote.
            verify: ``"content"`` checks now that every file is there with the right size, and its SHA-256 when
                it is read; ``"full"`` checks all of that now; ``"sizes"`` never looks at the content.

        Raises:
            NotATrace: nothing there, or something else.
            DamagedTrace: a file is missing, cut short or changed; raised later too, by the use of a damaged array.
            NewerTrace: written by a later version of Headscope.
            ImportError: Zarr is not installed.
        """
        tree = open_tree(path, verify=verify)
        trace = cls({str(name): node.to_dataset() for name, node in tree.children.items()}, _named(tree.attrs))
        trace._path = local_path(path)
        return trace

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write the trace as a folder of Zarr v3 arrays with a manifest. Strings come back as NumPy's ``StringDType``.

        Whatever goes wrong (full disk, Ctrl-C, an exception), ``path`` afterwards holds what it held before. While an
        older trace is being replaced both are on disk.

        Args:
            path: the folder to write; missing parents are made.
            overwrite: replace a trace that is there. Anything else is never replaced.

        Returns:
            The path written.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is False.
            NotATrace: ``overwrite`` is True, and what is there is no trace.
            TraceStoreError: the disk is full or the folder cannot be written.
            TypeError: a variable or attribute that cannot be stored; it is named.
            ImportError: Zarr is not installed.
        """
        final = save_tree(self.tree, path, overwrite=overwrite)
        if self._path == final:
            # What was opened lazily from the replaced files reads from the new ones now.
            self._stacks = Trace.open(final)._stacks
        return final

    @property
    def stacks(self) -> Mapping[str, xr.Dataset]:
        """The Dataset of each stack, by name."""
        return MappingProxyType(self._stacks)

    @property
    def tree(self) -> xr.DataTree:
        """The trace as an :class:`xarray.DataTree`, one node per stack; the arrays are shared, not copied."""
        tree = xr.DataTree.from_dict(dict(self._stacks))
        tree.attrs = dict(self.attrs)
        return tree

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays uncompressed, whether in memory yet or not."""
        return sum(dataset.nbytes for dataset in self._stacks.values())

    def load(self) -> Trace:
        """Read every array into memory and return the trace.

        Raises:
            DamagedTrace: a file is missing, cut short or changed.
        """
        for dataset in self._stacks.values():
            dataset.load()
        return self

    def describe(self) -> str:
        """Every stack with its sizes, and every variable with its dims, type and bytes."""
        lines = [self._title()]
        for name, dataset in self._stacks.items():
            dims = dict.fromkeys([*(dim for array in dataset.data_vars.values() for dim in array.dims), *dataset.sizes])
            lines.append(f"{name}: " + ", ".join(f"{dim} {dataset.sizes[dim]}" for dim in dims))
            # xarray takes a variable with the name of one of its dims, as `offset` has, for a coordinate.
            readings = [v for v in dataset.variables if v in dataset.data_vars or v in CAPTURE_KEYWORD]
            for variable, array in ((v, dataset.variables[v]) for v in readings):
                lines.append(f"  {variable} ({', '.join(map(str, array.dims))}) {array.dtype}, {_size(array.nbytes)}")
        missing = sorted(set(CAPTURE_KEYWORD.values()) - {CAPTURE_KEYWORD.get(v, "") for v in self._variables()})
        if missing:
            lines.append("not captured: " + ", ".join(missing))
        return "\n".join(lines)

    def __getitem__(self, stack: str) -> xr.Dataset:
        try:
            return self._stacks[stack]
        except KeyError:
            has = ", ".join(self._stacks) or "none"
            raise TraceKeyError(f"no stack {stack!r} in this trace; it has: {has}") from None

    def __contains__(self, stack: object) -> bool:
        return stack in self._stacks

    def __iter__(self) -> Iterator[str]:
        return iter(self._stacks)

    def __len__(self) -> int:
        return len(self._stacks)

    def __repr__(self) -> str:
        return f"<{self.describe()}>"

    def _repr_html_(self) -> str:
        parts = [f"<div><b>{html.escape(self._title())}</b></div>"]
        for name, dataset in self._stacks.items():
            body = dataset._repr_html_()  # pyright: ignore[reportPrivateUsage]  # IPython's protocol, public by use
            parts.append(f"<details open><summary><b>{html.escape(name)}</b></summary>{body}</details>")
        return "".join(parts)

    def _title(self) -> str:
        model = self.attrs.get("model")
        # A session writes the model as a mapping (name, class, revision); others' traces may have its name alone.
        name = (model.get("name") or model.get("class")) if isinstance(model, Mapping) else model
        of = f" of {name}" if isinstance(name, str) and name else ""
        stacks = "1 stack" if len(self) == 1 else f"{len(self)} stacks"
        where = f", on disk at {self._path}" if self._path else ""
        return f"Trace{of}: {stacks}, {_size(self.nbytes)}{where}"

    def _variables(self) -> set[str]:
        return {str(name) for dataset in self._stacks.values() for name in dataset.variables}


def _named(attrs: Mapping[Hashable, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in attrs.items()}


def _as_stack(dataset: xr.Dataset) -> StackDataset:
    return StackDataset(dataset.data_vars, coords=dataset.coords, attrs=dataset.attrs)


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"
