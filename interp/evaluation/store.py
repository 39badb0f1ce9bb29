"""What was answered so far: a folder with one file a setting and one line a sample, so that a killed run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp.evaluation.settings import Setting
from interp.files import jsonable, write_whole

HEADER = "evaluation.json"


class StoreError(ValueError):
    """A folder that holds something else."""


class Store:
    """Records by setting and sample; in memory alone without a folder.

    Args:
        folder: made where it is not there.
        about: model and task, as JSON: a folder holds answers of one model to one task.

    Raises:
        StoreError: a folder of another model or task, or a damaged file.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.about = json.loads(json.dumps(jsonable(about, "about")))
        self._records: dict[str, dict[str, dict[str, Any]]] = {}
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"the folder of an evaluation must be a folder, got the file {folder}")
        header = folder / HEADER
        if header.is_file():
            try:
                held = json.loads(header.read_text(encoding="utf-8"))
            except ValueError as error:
                raise StoreError(f"{header} must be JSON: {error}") from error
            if held != self.about:
                wrong = [k for k in {**held, **self.about} if held.get(k) != self.about.get(k)]
                raise StoreError(
                    f"the folder must be new or of the same model and probe; {folder} has another {', '.join(wrong)}: "
                    + ", ".join(f"{k} {held.get(k)!r}, not {self.about.get(k)!r}" for k in wrong)[:400]
                )
        elif folder.is_dir() and any(folder.iterdir()):
            raise StoreError(f"the folder must be new, empty or of an evaluation, got {folder}")
        else:
            write_whole(header, json.dumps(self.about, indent=1) + "\n")

    def file(self, setting: Setting) -> Path | None:
        """Of one setting's lines."""
        if self.folder is None:
            return None
        word = re.sub(r"[^A-Za-z0-9.=-]+", "_", setting.name).strip("_")[:48]
        return self.folder / f"{word}-{setting.key}.jsonl"

    def records(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """Sample id to its record."""
        if setting.key not in self._records:
            self._records[setting.key] = self._read(setting)
        return self._records[setting.key]

    def add(self, setting: Setting, ids: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
        """Write lines at once and for good."""
        self.records(setting).update({i: dict(r) for i, r in zip(ids, records, strict=True)})
        file = self.file(setting)
        if file is not None:
            lines = "".join(
                json.dumps({"id": i, **jsonable(r, "record")}, ensure_ascii=False) + "\n"
                for i, r in zip(ids, records, strict=True)
            )
            with file.open("a", encoding="utf-8") as out:
                out.write(lines)

    def _read(self, setting: Setting) -> dict[str, dict[str, Any]]:
        # Settings are known by what they do: a file of the same key under another name is the same setting.
        files = [] if self.folder is None else sorted(self.folder.glob(f"*-{setting.key}.jsonl"))
        found: dict[str, dict[str, Any]] = {}
        for file in files:
            content = file.read_bytes()
            whole, _, rest = content.rpartition(b"\n")
            if rest:
                # The run was killed within a line.
                write_whole(file, whole + b"\n" if whole else b"")
            for number, line in enumerate(whole.split(b"\n"), 1):
                if not line:
                    continue
                try:
                    record: dict[str, Any] = json.loads(line)
                    found[record.pop("id")] = record
                except (ValueError, KeyError, AttributeError) as error:
                    raise StoreError(f"line {number} of {file} must be a record, and is damaged: {error!r}") from error
        return found
