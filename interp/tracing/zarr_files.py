"""The two Zarr stores behind a saved trace: a folder being written, and a folder read against its manifest.

Zarr fills a missing chunk with NaN and decodes a damaged one where it can, so neither is left to Zarr: the writer
records size and SHA-256 of each file it writes, the reader refuses every file that differs from that record.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from interp.tracing.store import FileRecord, read_file, record_of


class _FolderStore(Store):
    """Keys are the names in ``files``, in the order written, whatever else lies in the folder."""

    def __init__(self, root: Path, files: dict[str, FileRecord], *, read_only: bool, check: bool = True) -> None:
        super().__init__(read_only=read_only)
        self.root = root
        self.files = files
        self.check = check

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, _FolderStore) and self.root == other.root

    def __hash__(self) -> int:
        return hash((type(self), self.root))

    def __str__(self) -> str:
        return self.root.as_uri()

    @property
    def supports_writes(self) -> bool:
        return not self.read_only

    @property
    def supports_deletes(self) -> bool:
        return not self.read_only

    @property
    def supports_listing(self) -> bool:
        return True

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if key not in self.files:
            return None
        data = await asyncio.to_thread(read_file, self.root, key, self.files[key], check=self.check)
        return (prototype or default_buffer_prototype()).buffer.from_bytes(_part(data, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self.files

    async def list(self) -> AsyncIterator[str]:
        for key in list(self.files):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in list(self.files):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        for name in dict.fromkeys(key[len(start) :].split("/")[0] for key in list(self.files) if key.startswith(start)):
            yield name


class TraceReader(_FolderStore):
    """Read-only; with ``check`` every file is compared with the manifest each time it is read."""

    def __init__(self, root: Path, files: dict[str, FileRecord], *, check: bool = True) -> None:
        super().__init__(root, files, read_only=True, check=check)

    def with_read_only(self, read_only: bool = False) -> Store:
        if not read_only:
            raise ValueError("a saved trace is read-only: save a new one instead")
        return self

    async def set(self, key: str, value: Buffer) -> None:
        raise ValueError("a saved trace is read-only: save a new one instead")

    async def delete(self, key: str) -> None:
        raise ValueError("a saved trace is read-only: save a new one instead")


class TraceWriter(_FolderStore):
    """Writes files and records them in ``files``, until :meth:`stop`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, {}, read_only=False)
        self._lock = threading.Lock()
        self._stopped = False

    def with_read_only(self, read_only: bool = False) -> Store:
        return TraceReader(self.root, self.files) if read_only else self

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.write, key, value.to_bytes())

    async def delete(self, key: str) -> None:
        with self._lock:
            if self.files.pop(key, None) is not None:
                (self.root / key).unlink(missing_ok=True)

    def write(self, key: str, data: bytes) -> None:
        """Write one file and record it.

        Raises:
            OSError: the disk is full, or the writer was stopped.
        """
        record = record_of(data)
        # Under the lock, so that stop() returns only once no file can appear any more.
        with self._lock:
            if self._stopped:
                raise OSError(f"writing to {self.root} was stopped")
            path = self.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
            self.files[key] = record

    def stop(self) -> None:
        """Refuse all further writes. Zarr writes from its own thread, which a Ctrl-C in ours does not end."""
        with self._lock:
            self._stopped = True


def _part(data: bytes, wanted: ByteRequest | None) -> bytes:
    match wanted:
        case RangeByteRequest(start, end):
            return data[start:end]
        case OffsetByteRequest(offset):
            return data[offset:]
        case SuffixByteRequest(suffix):
            return data[max(0, len(data) - suffix) :]
        case _:
            return data
