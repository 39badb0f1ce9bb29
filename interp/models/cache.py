"""Folders that are made once and kept: checked whenever they are used, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from interp.files import sibling
from interp.models.errors import LoadError

MANIFEST = "headscope.json"
FORMAT = 1


def cache_dir() -> Path:
    """``$HEADSCOPE_CACHE``, else ``headscope`` in ``$XDG_CACHE_HOME``, else ``~/.cache/headscope``."""
    own = os.environ.get("HEADSCOPE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "headscope"


def sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def manifest(folder: Path) -> dict[str, Any]:
    """What a cached folder says of itself: ``source``, ``source_sha256``, ``versions``, ``files``."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def cached_folder(name: str, facts: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The cached folder ``name``, made by ``build(empty folder)`` where it is not there or damaged.

    The folder is built beside its final place and renamed, under a lock that dies with its process: a killed build
    leaves nothing under the name, and of several processes one builds while the others wait for it.

    Args:
        name: folder name; what changes the content must be part of it.
        facts: goes into the manifest.
        build: fills the folder; what it raises is raised.

    Raises:
        LoadError: the cache cannot be written, or a damaged folder cannot be made again.
    """
    final = cache_dir() / "models" / name
    if damage(final) is None:
        return final
    from filelock import FileLock

    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(final.with_name(f"{name}.lock"))
        lock.acquire()
    except OSError as error:
        says = f"the cache {final.parent} must be writable ({error}); set HEADSCOPE_CACHE to another folder"
        raise LoadError(says) from error
    try:
        # Another process may have built it while this one waited.
        why = damage(final)
        if why is not None:
            _build(final, why, facts, build)
    finally:
        lock.release()
    return final


def _build(final: Path, why: str, facts: Mapping[str, Any], build: Callable[[Path], None]) -> None:
    for leftover in final.parent.glob(f"{final.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if final.exists():
        warnings.warn(f"{final} is damaged ({why}) and is made again", stacklevel=2)
    staging, aside = sibling(final, "partial"), sibling(final, "partial")
    staging.mkdir()
    try:
        build(staging)
        _write_manifest(staging, facts)
        if final.exists():
            final.rename(aside)
        staging.rename(final)
    except LoadError as error:
        if not final.exists():
            raise
        raise LoadError(f"{final} is damaged ({why}) and cannot be made again: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a cached folder, None where every file is there with its content (all is read)."""
    if not folder.is_dir():
        return "it is not there"
    try:
        said = manifest(folder)
        files: dict[str, dict[str, Any]] = said["files"] if said["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is missing or unreadable"
    if not files:
        return f"its {MANIFEST} is of another format"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
            return f"{name} differs from its checksum"
    return None


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    said = {"format": FORMAT, **facts, "versions": _versions(), "files": files}
    (folder / MANIFEST).write_text(json.dumps(said, indent=1), encoding="utf-8")


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("headscope", "torch", "transformers", "gguf", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
