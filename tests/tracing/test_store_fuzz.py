"""Traces from anybody: whatever is in the folder, opening tells the truth or raises one of our errors, and runs nothing.

``HEADSCOPE_FUZZ=50`` makes fifty times as many random attempts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interp.tracing import store
from interp.tracing.store import MANIFEST, DamagedTrace, TraceStoreError
from interp.tracing.trace import Trace
from tests.tracing.test_store import assert_same, make_trace

TIMES = int(os.environ.get("HEADSCOPE_FUZZ", "1"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trace().save(tmp_path_factory.mktemp("fuzz") / "run.zarr")


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run.zarr")


def files_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST)


def sign(root: Path) -> None:
    """A manifest with the right checksums of whatever lies there: what an attacker would write."""
    files = {str(p.relative_to(root)): store.record_of(p.read_bytes()) for p in files_of(root)}
    (root / MANIFEST).write_bytes(store._manifest(files))


def spoil(root: Path, rng: random.Random) -> None:
    file = rng.choice([*files_of(root), root / MANIFEST])
    data = bytearray(file.read_bytes())
    match rng.randrange(6):
        case 0:
            for _ in range(rng.randint(1, 8)):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        case 1:
            file.write_bytes(data[: rng.randrange(len(data) + 1)])
        case 2:
            file.write_bytes(rng.randbytes(rng.randrange(200)))
        case 3:
            file.unlink()
        case 4:
            file.unlink()
            file.mkdir()
        case _:
            (root / rng.choice(["text/entropy/c/9", "foreign.bin", "text/zarr.json.bak"])).write_bytes(b"foreign")


@pytest.mark.parametrize("seed", range(12 * TIMES))
def test_damage_is_told_or_does_no_harm(saved: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        spoil(saved, rng)
    try:
        got = Trace.open(saved).load()
    except TraceStoreError as error:
        assert str(saved) in str(error)  # noqa: PT017 - that none is raised is as good
        return
    assert_same(got, make_trace())  # only files that are no part of the trace were touched


WORDS = (
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1e400,
    "",
    "\0",
    "../x",
    "pickle",
    [],
    [-1],
    [2**60],
    {},
    {"name": "numcodecs.pickle"},
)


def spoil_value(value: Any, rng: random.Random) -> Any:
    """The same JSON with one place of it something else."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: spoil_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [spoil_value(v, rng) if i == place else v for i, v in enumerate(value)]
    return rng.choice(WORDS)


@pytest.mark.parametrize("seed", range(20 * TIMES))
def test_signed_nonsense_is_refused_or_read(saved: Path, seed: int) -> None:
    rng = random.Random(seed)
    file = rng.choice([p for p in files_of(saved) if p.name == "zarr.json"])
    file.write_text(json.dumps(spoil_value(json.loads(file.read_text()), rng)))
    sign(saved)
    # Opening alone: what a signed trace says its numbers are is its maker's word.
    try:
        repr(Trace.open(saved))
    except TraceStoreError as error:
        assert str(saved) in str(error)  # noqa: PT017 - that none is raised is as good


def edit(root: Path, **changes: Any) -> None:
    file = root / "text" / "entropy" / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    sign(root)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shape": [2, 3, 4, -5]}, "whole numbers >= 0"),
        ({"shape": [2**60, 3, 4, 5]}, "no trace has"),
        ({"shape": [2, 3, 4, True]}, "whole numbers >= 0"),
        ({"shape": None}, "whole numbers >= 0"),
        ({"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]}, "numcodecs.pickle"),
        ({"codecs": "bytes"}, "codecs"),
        ({"dimension_names": ["sample"]}, "4 dimensions"),
        ({"zarr_format": 2}, "format 3"),
        ({"node_type": "file"}, "group or an array"),
        ({"data_type": "object"}, "does not fit together"),
    ],
)
def test_signed_metadata_must_be_such_as_we_write(saved: Path, changes: dict[str, Any], says: str) -> None:
    edit(saved, **changes)
    with pytest.raises(DamagedTrace, match=says):
        Trace.open(saved)


def test_a_trace_that_would_unpickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    from numcodecs import pickles

    # Older releases of numcodecs have no such switch, and unpickle.
    monkeypatch.setattr(pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    mark = tmp_path / "run"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (mark,)

    root = tmp_path / "evil.zarr"
    array = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": None, "fill_value": "", "order": "C",
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 4}],
    }  # fmt: skip
    for name, content in {
        ".zgroup": {"zarr_format": 2},
        "text/.zgroup": {"zarr_format": 2},
        "text/x/.zarray": array,
        "text/x/.zattrs": {"_ARRAY_DIMENSIONS": ["x"]},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    (root / "text/x/0").write_bytes(pickle.dumps(Evil(), protocol=4))
    sign(root)
    with pytest.raises(DamagedTrace):
        Trace.open(root).load()
    assert not mark.exists()


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link_out(file: Path) -> None:
    outside = file.parents[3] / "outside"
    outside.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(outside)


@pytest.mark.parametrize("change", [pipe, link_out])
@pytest.mark.parametrize("name", ["text/entropy/zarr.json", MANIFEST])
def test_no_pipe_is_read_and_no_link_leads_out(saved: Path, change: Callable[[Path], None], name: str) -> None:
    file = saved / name
    if name == MANIFEST and change is link_out:
        outside = saved.parent / "outside"
        file.rename(outside)
        file.symlink_to(outside)
    else:
        change(file)
    with pytest.raises(TraceStoreError, match=file.name):
        Trace.open(saved)


def test_a_link_within_the_folder_is_a_file(saved: Path) -> None:
    file = saved / "text" / "entropy" / "zarr.json"
    file.rename(file.with_name("kept"))
    file.symlink_to("kept")
    assert_same(Trace.open(saved), make_trace())


@pytest.mark.parametrize("key", ["/etc/passwd", "a/../../b", "..\\b", "C:\\b", "", "a\0b", "\ud800", "a\nb"])
def test_keys_that_name_no_file_of_the_trace(saved: Path, key: str) -> None:
    (saved / MANIFEST).write_bytes(store._manifest({key: {"size": 1, "sha256": "0"}}))
    with pytest.raises(DamagedTrace, match="outside the trace|no name of a file"):
        Trace.open(saved)


@pytest.mark.parametrize(
    "record", [None, 3, {}, {"size": -1, "sha256": ""}, {"size": True, "sha256": ""}, {"size": 1, "sha256": 2}]
)
def test_records_that_are_none(saved: Path, record: Any) -> None:
    (saved / MANIFEST).write_bytes(store._manifest({"zarr.json": record}))
    with pytest.raises(DamagedTrace, match="must be a size and a SHA-256"):
        Trace.open(saved)


def test_a_manifest_nested_without_end(saved: Path) -> None:
    (saved / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(DamagedTrace, match="not readable"):
        Trace.open(saved)
