"""What a sweep has to do, and the folder that knows what is done: one file a task, each written whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from interp.analysis.projections import weight_in_memory
from interp.files import jsonable, local_path, write_whole

VERSION = 1
MANIFEST, SHORTLIST = "sweep.json", "shortlist.json"
Split = Literal["sample", "layer"]
Floats = NDArray[np.float64]


class SweepError(ValueError):
    """A sweep that cannot be run, or a folder that belongs to another one."""


class Task(NamedTuple):
    """A piece of a sweep: one sample, all its layers or one of them."""

    number: int
    sample: int
    layer: int | None

    @property
    def file(self) -> str:
        return f"task-{self.number:06d}.npz"

    @property
    def error_file(self) -> str:
        return f"task-{self.number:06d}.error.json"


@dataclass(frozen=True)
class Plan:
    """Everything that makes a sweep what it is.

    Attributes:
        score: name of the score.
        settings: of it, JSON-able.
        model: name, revision, class and a fingerprint of the weights.
        probe: its description, JSON-able.
        samples: a digest of each sample's inputs.
        layers: of the stack, that are swept.
        split: tasks are samples, or samples by layers.
    """

    score: str
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    probe: Any
    samples: tuple[str, ...]
    layers: tuple[int, ...]
    split: Split = "sample"

    @property
    def tasks(self) -> list[Task]:
        layers: Sequence[int | None] = self.layers if self.split == "layer" else [None]
        pairs = [(sample, layer) for sample in range(len(self.samples)) for layer in layers]
        return [Task(n, sample, layer) for n, (sample, layer) in enumerate(pairs)]

    def describe(self) -> dict[str, Any]:
        """As in the manifest."""
        parts = {
            "version": VERSION, "score": self.score, "settings": dict(self.settings), "model": dict(self.model),
            "probe": self.probe, "samples": list(self.samples), "layers": list(self.layers), "split": self.split,
        }  # fmt: skip
        return jsonable(parts, "plan")


class Job:
    """The folder of a sweep. Several processes may write to it at a time: a task's file is the same whoever makes it.

    Args:
        folder: made where it does not exist.
        plan: what the folder is for.

    Raises:
        SweepError: the folder belongs to another plan, or is no sweep's.
    """

    def __init__(self, folder: str | os.PathLike[str], plan: Plan) -> None:
        self.folder, self.plan = local_path(folder), plan
        manifest = self.folder / MANIFEST
        if manifest.exists():
            _require_same(read_manifest(self.folder), plan.describe(), self.folder)
            return
        if self.folder.exists() and (
            not self.folder.is_dir() or any(f.name != SHORTLIST for f in self.folder.iterdir())
        ):
            raise SweepError(f"folder must be new, empty or a sweep's, got {self.folder}")
        write_whole(manifest, json.dumps(plan.describe(), indent=1))

    def done(self) -> set[int]:
        """Numbers of tasks whose results are there and whole."""
        return {t.number for t in self.plan.tasks if (self.folder / t.file).is_file() and self.read(t) is not None}

    def write(self, task: Task, value: Floats, null: Floats | None, seconds: float) -> None:
        """Keep the result of a task, ``[row, layer, head]``."""
        arrays: dict[str, Any] = {"value": value, "seconds": np.float64(seconds)}
        if null is not None:
            arrays["null"] = null
        held = io.BytesIO()
        np.savez(held, **arrays)
        write_whole(self.folder / task.file, held.getvalue())
        (self.folder / task.error_file).unlink(missing_ok=True)

    def write_error(self, task: Task, message: str) -> None:
        """Keep why a task failed; it is tried again by the next run."""
        write_whole(self.folder / task.error_file, json.dumps({"sample": task.sample, "error": message}))

    def read(self, task: Task) -> tuple[Floats, Floats | None, float] | None:
        """The result of a task, None where there is none or it is damaged."""
        try:
            with np.load(self.folder / task.file, allow_pickle=False) as held:
                return held["value"], held.get("null"), float(held["seconds"])
        except (OSError, ValueError, KeyError, EOFError):
            return None
        except Exception as error:
            # A truncated zip is zipfile's own error, which is no ValueError.
            if type(error).__name__ == "BadZipFile":
                return None
            raise

    def errors(self) -> dict[int, str]:
        """By sample, why its tasks failed."""
        found: dict[int, str] = {}
        for task in self.plan.tasks:
            file = self.folder / task.error_file
            if file.is_file():
                found[task.sample] = str(json.loads(file.read_text(encoding="utf-8"))["error"])
        return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The plan that a folder was made for.

    Raises:
        SweepError: there is none, or one of a newer version.
    """
    path = local_path(folder) / MANIFEST
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SweepError(f"folder must hold a sweep's {MANIFEST}, got {path.parent}: {error}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise SweepError(
            f"{path} must be of version {VERSION}, got {found.get('version') if isinstance(found, dict) else found!r}"
        )
    return found


def _require_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            was, now = (json.dumps(part)[:160] for part in (found.get(key), value))
            raise SweepError(
                f"folder must belong to this sweep, and {folder} has another {key}: {was} there, {now} here"
            )


def first_writer(path: Path, text: str) -> str:
    """Write a file unless it is there; the text that it then holds. Of several processes one wins."""
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        try:
            # A link, unlike a rename, does not replace what is there.
            os.link(part, path)
        except FileExistsError:
            pass
        finally:
            part.unlink(missing_ok=True)
    return path.read_text(encoding="utf-8")


def fingerprint(module: nn.Module) -> str:
    """Names, shapes and some values of all weights: enough to tell two checkpoints apart, not to prove them equal.

    Weights that lie on disk or in memory beside the model between calls (accelerate) are fetched: where they lie is no part of it.
    """
    seen = hashlib.sha256()
    for name, parameter in module.named_parameters():
        seen.update(f"{name}{tuple(parameter.shape)}".encode())
        owner, _, leaf = name.rpartition(".")
        weight = weight_in_memory(module.get_submodule(owner), leaf)
        if weight.device.type != "meta" and weight.numel():
            flat = weight.reshape(-1)
            some = flat[:: max(1, flat.numel() // 8)][:8]
            seen.update(some.float().cpu().numpy().tobytes())
    return seen.hexdigest()[:16]


def digest(inputs: Mapping[str, Any]) -> str:
    """Of a sample's inputs."""
    seen = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        seen.update(name.encode())
        seen.update(
            value.detach().cpu().float().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
        )
    return seen.hexdigest()[:16]


def digest_of(sample: Any, inputs: Any) -> str:
    """Of a probe's sample: its clean and, of a pair, its corrupt inputs, and its answer."""
    parts = [digest(inputs(sample))]
    corrupt = getattr(sample, "corrupt", None)
    if corrupt is not None:
        parts += [digest(inputs(corrupt)), str(getattr(sample, "answer", "")), str(getattr(sample, "foil", ""))]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
