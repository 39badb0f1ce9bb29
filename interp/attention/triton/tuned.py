"""Configurations that were timed on the GPU at hand, kept in a file, and preferred to the shipped ones.

The file is written by :mod:`interp.attention.triton.tuning` only; without it every launch has its shipped configuration. It
lies in ``kernels/tuned.json`` of Headscope's cache: ``$HEADSCOPE_CACHE``, else ``headscope`` in ``$XDG_CACHE_HOME``, else
``~/.cache/headscope``. It is read once a process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch

FORMAT = 1
ConfigT = TypeVar("ConfigT", bound=tuple[Any, ...])
Entry = dict[str, Any]
"""``config``, ``ms`` of the call that it was timed in, and the same of what is shipped: ``shipped``, ``shipped_ms``."""


class Trial(Protocol):
    """Decides instead of the file while something is tuned."""

    def pick(self, key: str, shipped: tuple[int, ...]) -> tuple[int, ...]: ...


_trial: Trial | None = None
_entries: dict[str, Entry] | None = None


def file(folder: Path | None = None) -> Path:
    """Where the configurations are kept, in ``folder`` or in Headscope's cache."""
    if folder is None:
        # The rule of interp.models.cache, which the op must not import.
        own, shared = os.environ.get("HEADSCOPE_CACHE"), os.environ.get("XDG_CACHE_HOME")
        folder = Path(own).expanduser() if own else (Path(shared) if shared else Path.home() / ".cache") / "headscope"
    return folder / "kernels" / "tuned.json"


def pick(kind: str, device: torch.device, facts: Callable[[], Sequence[object]], shipped: ConfigT) -> ConfigT:
    """The configuration timed best for such a launch on this GPU, else the shipped one.

    Args:
        kind: of launch, such as ``rows``.
        device: where.
        facts: what else the best configuration may depend on; asked for only where something is tuned at all.
        shipped: a named tuple of ints.
    """
    entries = _loaded()
    if not entries and _trial is None:
        return shipped
    key = "|".join((machine(device), kind, *map(str, facts())))
    if _trial is not None:
        return cast(Any, type(shipped))(*_trial.pick(key, shipped))
    found = entries.get(key)
    if found is None or len(found["config"]) != len(shipped):
        return shipped
    return cast(Any, type(shipped))(*found["config"])


def bucket(length: int) -> int:
    """Lengths are told apart by the power of two that covers them."""
    return 1 << max(length - 1, 0).bit_length()


@functools.cache
def machine(device: torch.device) -> str:
    """The GPU, Triton's version and the kernels' source: what a timing holds for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "unknown"
    source = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(here.glob("*.py")):
        text = path.read_bytes()
        if b"@triton.jit" in text:
            source.update(text)
    return f"{name}|triton {triton}|{source.hexdigest()[:8]}"


@contextmanager
def trying(trial: Trial) -> Generator[None]:
    """Let ``trial`` pick configurations."""
    global _trial  # noqa: PLW0603
    _trial = trial
    try:
        yield
    finally:
        _trial = None


def reload() -> None:
    """Read the file again at the next launch that is prepared."""
    global _entries  # noqa: PLW0603
    _entries = None


def read(path: Path) -> dict[str, Entry]:
    """The entries of a file by key; what is damaged or foreign is left out with a warning, a missing file has none."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is not used, since it cannot be read ({error}); tuning writes it anew", stacklevel=2)
        return {}
    entries = said.get("configurations") if isinstance(said, dict) and said.get("format") == FORMAT else None
    if not isinstance(entries, dict):
        warnings.warn(f"{path} is not used, since it is no file of this format ({FORMAT})", stacklevel=2)
        return {}
    good = {key: entry for key, entry in cast(dict[str, Any], entries).items() if _is_entry(entry)}
    if len(good) < len(entries):
        warnings.warn(f"{path}: {len(entries) - len(good)} damaged entries are not used", stacklevel=2)
    return good


def write(path: Path, changes: Mapping[str, Entry | None]) -> None:
    """Set entries of the file, or with None remove them; whatever happens, it is there as it was or as it should be.

    Raises:
        OSError: it cannot be written.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        entries = {**(read(path) if path.exists() else {}), **changes}
        kept = {key: entry for key, entry in sorted(entries.items()) if entry is not None}
        partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
        try:
            partial.write_text(json.dumps({"format": FORMAT, "configurations": kept}, indent=1), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    reload()


def _is_entry(entry: Any) -> bool:
    config = cast(dict[str, Any], entry).get("config") if isinstance(entry, dict) else None
    return isinstance(config, list) and all(type(n) is int and n >= 0 for n in cast(list[Any], config))


def _loaded() -> dict[str, Entry]:
    global _entries  # noqa: PLW0603
    if _entries is None:
        _entries = read(file())
    return _entries
