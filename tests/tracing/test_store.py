"""Traces on disk: the round trip, every kind of damage, and saves that fail half-way."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from interp.tracing import store, zarr_files
from interp.tracing.store import MANIFEST, DamagedTrace, NewerTrace, NotATrace, TraceStoreError, chunk_shape
from interp.tracing.trace import Trace

ROOT = Path(__file__).parents[2]


def make_trace(fill: float = 0.0) -> Trace:
    rng = np.random.default_rng(0)
    entropy = rng.normal(size=(2, 3, 4, 5)).astype(np.float32) + fill
    entropy[1, :, :, 4] = np.nan
    entropy[:, 1] = np.nan
    text = xr.Dataset(
        {
            "entropy": (("sample", "layer", "head", "query"), entropy, {"units": "nats"}),
            "top_key": (("sample", "layer", "head", "query"), rng.integers(-1, 5, (2, 3, 4, 5)).astype(np.int32)),
            "lse": (("sample", "layer"), np.array([[-np.inf, np.inf, 0]] * 2)),
            "real": (("sample", "query"), entropy[:, 0, 0] == entropy[:, 0, 0]),
            "row_attention": (("sample", "layer", "head", "row", "key"), np.zeros((2, 3, 4, 0, 5), np.float16)),
            "edge": ((), np.int64(7)),
        },
        coords={
            "layer": [0, 2, 5],
            "sample": ["first", "second"],
            "token": (("sample", "key"), np.array([["<s>", "é", " the", "日本", "🙂"], ["a", "", "\n", '"', "\\"]])),
            "piece": ("key", np.array(["\x00", "a longer token than the rest", "", "b", "c"], dtype=object)),
            "kind": (("sample", "key"), np.array([[0, 1, 1, 1, 1], [-1, -1, 0, 1, 1]], np.int8)),
        },
        attrs={"note": "é"},
    )
    vision = xr.Dataset({"attention": (("sample", "layer", "head", "query", "key"), rng.random((3, 2, 1, 6, 6)))})
    empty = xr.Dataset()
    return Trace({"text": text, "vision": vision, "audio": empty}, {"model": "tiny", "seed": 1, "alpha": float("inf")})


def assert_same(got: Trace, expected: Trace) -> None:
    assert list(got) == list(expected)
    assert got.attrs == expected.attrs
    for name in expected:
        xr.testing.assert_identical(got[name].load(), expected[name].load())
        for variable in expected[name].variables:
            if expected[name][variable].dtype.kind in "biuf":
                assert got[name][variable].dtype == expected[name][variable].dtype, variable


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trace().save(tmp_path_factory.mktemp("saved") / "run.zarr")


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_once, tmp_path / "run.zarr")


def chunk_of(saved: Path, variable: str = "text/entropy") -> Path:
    return next(p for p in sorted((saved / variable).rglob("*")) if p.is_file() and p.name != "zarr.json")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The round trip


def test_round_trip(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = make_trace().save(tmp_path / "deep" / "er" / "run.zarr")
        got = Trace.open(path)
        assert_same(got, make_trace())
    assert list(got["text"].data_vars) == list(make_trace()["text"].data_vars)
    assert got["text"].piece.values.tolist()[:2] == ["\x00", "a longer token than the rest"]
    assert names(path.parent) == ["run.zarr"]


@pytest.mark.parametrize("verify", ["content", "sizes", "full"])
def test_every_way_of_verifying_reads_the_same(saved: Path, verify: store.Verify) -> None:
    assert_same(Trace.open(saved, verify=verify), make_trace())


def test_a_second_generation_is_the_same(saved: Path, tmp_path: Path) -> None:
    again = Trace.open(saved).save(tmp_path / "again.zarr")
    assert_same(Trace.open(again), make_trace())


def test_an_empty_trace(tmp_path: Path) -> None:
    assert_same(Trace.open(Trace({}).save(tmp_path / "t")), Trace({}))


def test_other_programs_read_it_as_zarr(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = xr.open_datatree(saved, engine="zarr", consolidated=False)
    xr.testing.assert_equal(tree["vision/attention"].load(), make_trace()["vision"].attention)


def test_nothing_is_pickled(saved: Path) -> None:
    nodes = {json.loads(p.read_text())["node_type"] for p in saved.rglob("zarr.json")}
    assert nodes == {"array", "group"}
    for meta in (json.loads(p.read_text()) for p in saved.rglob("zarr.json")):
        assert meta["zarr_format"] == 3
        codecs = [codec["name"] for codec in meta.get("codecs", [])]
        assert set(codecs) <= {"bytes", "vlen-utf8", "zstd"}
        assert "zstd" in codecs or not codecs or meta["shape"] == []


def test_compressed(tmp_path: Path) -> None:
    zeros = xr.Dataset({"attention": (("layer", "query", "key"), np.zeros((2, 512, 512), np.float32) + 1)})
    path = Trace({"text": zeros}).save(tmp_path / "t")
    assert sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) < zeros.nbytes / 20


# Laziness and chunks


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = zarr_files.read_file

    def spy(root: Path, key: str, record: store.FileRecord, *, check: bool = True) -> bytes:
        seen.append(key)
        return real(root, key, record, check=check)

    monkeypatch.setattr(zarr_files, "read_file", spy)
    return seen


def test_opening_reads_no_readings_and_a_layer_reads_one_chunk(saved: Path, reads: list[str]) -> None:
    trace = Trace.open(saved)
    assert not [key for key in reads if key.startswith("text/entropy/c")]
    assert trace.nbytes > 0
    assert "entropy" in repr(trace)
    assert not [key for key in reads if key.startswith("text/entropy/c")]
    reads.clear()
    part = trace["text"].entropy.sel(layer=5, head=3).values
    assert reads == ["text/entropy/c/0/2/0/0"]
    np.testing.assert_array_equal(part, make_trace()["text"].entropy.sel(layer=5, head=3))


def test_an_array_is_read_once(saved: Path, reads: list[str]) -> None:
    trace = Trace.open(saved)
    _ = trace["vision"].attention.values
    reads.clear()
    _ = trace["vision"].attention.values
    assert reads == []


def test_chunks() -> None:
    dims = ("sample", "layer", "head", "query", "key")
    assert chunk_shape(dims, (2, 30, 9, 100, 100), 4) == (2, 1, 9, 100, 100)
    assert chunk_shape(dims, (2, 30, 9, 1024, 1024), 4) == (1, 1, 3, 1024, 1024)
    assert chunk_shape(dims, (0, 0, 1, 1, 1), 4) == (1, 1, 1, 1, 1)
    assert chunk_shape(("layer",), (30,), 8) == (30,)
    for shape in [(7, 3, 33, 5000, 5001), (1, 1, 1, 1, 10**8)]:
        chunk = chunk_shape(dims, shape, 4)
        assert np.prod(chunk) * 4 <= store.CHUNK_BYTES
        assert chunk[1] == 1


def test_a_big_dim_is_split_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 1000)
    values = np.arange(2 * 3 * 5 * 301, dtype=np.float64).reshape(2, 3, 5, 301)
    trace = Trace({"text": xr.Dataset({"lse": (("sample", "layer", "head", "query"), values)})})
    path = trace.save(tmp_path / "t")
    assert len(list((path / "text" / "lse" / "c").rglob("*"))) > 30
    np.testing.assert_array_equal(Trace.open(path)["text"].lse, values)


# Damage


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [delete, truncate, empty, lengthen])
@pytest.mark.parametrize("which", ["chunk", "metadata"])
@pytest.mark.parametrize("verify", ["content", "sizes", "full"])
def test_a_file_gone_or_of_another_size_is_seen_on_opening(
    saved: Path, damage: Callable[[Path], None], which: str, verify: store.Verify
) -> None:
    file = chunk_of(saved) if which == "chunk" else saved / "text" / "zarr.json"
    damage(file)
    with pytest.raises(DamagedTrace, match=str(file.relative_to(saved))):
        Trace.open(saved, verify=verify)


def test_every_flipped_byte_is_seen_no_later_than_on_reading(saved: Path) -> None:
    for file in sorted(p for p in saved.rglob("*") if p.is_file()):
        before = file.read_bytes()
        flip(file)
        with pytest.raises((DamagedTrace, NotATrace, NewerTrace), match=file.name):
            Trace.open(saved).load()
        with pytest.raises((DamagedTrace, NotATrace, NewerTrace), match=file.name):
            Trace.open(saved, verify="full")
        file.write_bytes(before)
    assert_same(Trace.open(saved), make_trace())


def test_damage_elsewhere_does_not_hinder_reading(saved: Path) -> None:
    flip(chunk_of(saved, "text/top_key"))
    trace = Trace.open(saved)
    np.testing.assert_array_equal(trace["text"].entropy, make_trace()["text"].entropy)
    with pytest.raises(DamagedTrace, match="text/top_key/c/"):
        trace["text"].top_key.load()


@pytest.mark.parametrize("damage", [delete, truncate, flip])
@pytest.mark.parametrize("verify", ["content", "full"])
def test_damage_after_opening_is_seen_on_reading(
    saved: Path, damage: Callable[[Path], None], verify: store.Verify
) -> None:
    trace = Trace.open(saved, verify=verify)
    damage(chunk_of(saved))
    with pytest.raises(DamagedTrace, match="text/entropy/c/"):
        trace["text"].entropy.mean().item()


def test_the_manifest_cannot_lose_a_file_unnoticed(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    name = str(chunk_of(saved).relative_to(saved))
    del manifest["files"][name]
    (saved / name).unlink()
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedTrace, match=MANIFEST):
        Trace.open(saved)


@pytest.mark.parametrize("damage", [truncate, empty])
def test_a_cut_manifest(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved / MANIFEST)
    with pytest.raises(DamagedTrace, match=MANIFEST):
        Trace.open(saved)


def test_a_manifest_that_points_outside(saved: Path) -> None:
    files = {"../secret": {"size": 1, "sha256": "0"}}
    (saved / MANIFEST).write_bytes(store._manifest(files))  # type: ignore[arg-type]
    with pytest.raises(DamagedTrace, match="outside the trace"):
        Trace.open(saved)


def test_a_newer_version(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text()) | {"version": store.VERSION + 1, "sha256": "of another kind"}
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(NewerTrace, match=f"version {store.VERSION + 1}.*up to {store.VERSION}"):
        Trace.open(saved)


@pytest.mark.parametrize("version", [None, "1", 0])
def test_a_version_that_is_none(saved: Path, version: object) -> None:
    manifest = json.loads((saved / MANIFEST).read_text()) | {"version": version}
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedTrace, match="version"):
        Trace.open(saved)


# Things that are no traces


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotATrace, match="there is no trace at"):
        Trace.open(tmp_path / "absent" / "run.zarr")


def test_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "photo.txt").write_text("hello")
    with pytest.raises(NotATrace, match=MANIFEST):
        Trace.open(tmp_path)


def test_a_zarr_folder_of_somebody_else(tmp_path: Path) -> None:
    xr.Dataset({"x": ("a", [1.0])}).to_zarr(tmp_path / "x.zarr", consolidated=False)
    with pytest.raises(NotATrace, match=MANIFEST):
        Trace.open(tmp_path / "x.zarr")


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(NotATrace, match="is a file, and a trace is a folder"):
        Trace.open(tmp_path / "x.zip")


@pytest.mark.parametrize("text", ["[]", '{"format": "other"}', "{}"])
def test_a_foreign_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(NotATrace, match="does not name the format"):
        Trace.open(tmp_path)


def test_an_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for action in (lambda: make_trace().save("s3://bucket/run"), lambda: Trace.open("s3://bucket/run")):
        with pytest.raises(ValueError, match="address"):
            action()
    assert names(tmp_path) == []


def test_an_unknown_verify_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"verify must be one of .*got 'no'"):
        Trace.open(saved, verify="no")  # type: ignore[arg-type]


# What cannot be stored


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (np.array(["a", None], dtype=object), "'x' in stack 'text' must hold strings only.*got (nan|None)"),
        (np.array([{"a": 1}, {}], dtype=object), "'x' in stack 'text' must hold strings only.*got {'a': 1}"),
        (np.array([b"a", b"b"]), "'x' in stack 'text' must hold numbers, bools or strings, got dtype"),
        (np.array(["2020-01-01"] * 2, "datetime64[ns]"), "must hold numbers, bools or strings"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, values: np.ndarray, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        Trace({"text": xr.Dataset({"x": ("query", values)})}).save(tmp_path / "t")
    assert names(tmp_path) == []


def test_an_attribute_of_a_variable_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    bad = xr.Dataset({"x": ("query", [1.0], {"edge": object()})})
    with pytest.raises(TypeError, match="attrs of 'x' in stack 'text'"):
        Trace({"text": bad}).save(tmp_path / "t")


# Replacing


def test_overwriting_must_be_asked_for(saved: Path) -> None:
    with pytest.raises(FileExistsError, match="overwrite=True"):
        make_trace(1).save(saved)
    assert_same(Trace.open(saved), make_trace())
    make_trace(1).save(saved, overwrite=True)
    assert_same(Trace.open(saved), make_trace(1))
    assert names(saved.parent) == ["run.zarr"]


def test_only_traces_are_replaced(tmp_path: Path) -> None:
    folder, file = tmp_path / "thesis", tmp_path / "thesis.tex"
    folder.mkdir()
    (folder / "a.tex").write_text("years of work")
    file.write_text("years of work")
    for path in (folder, file):
        with pytest.raises(NotATrace, match="replaces only a trace"):
            make_trace().save(path, overwrite=True)
    assert (folder / "a.tex").read_text() == file.read_text() == "years of work"
    assert names(tmp_path) == ["thesis", "thesis.tex"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    assert_same(Trace.open(make_trace().save(tmp_path / "t")), make_trace())


def test_saving_a_lazy_trace_over_itself(saved: Path) -> None:
    trace = Trace.open(saved)
    trace["text"]["entropy"] = trace["text"].entropy + 1
    trace.save(saved, overwrite=True)
    xr.testing.assert_allclose(trace["text"].entropy, make_trace()["text"].entropy + 1)
    np.testing.assert_array_equal(trace["text"].top_key, make_trace()["text"].top_key)
    np.testing.assert_array_equal(Trace.open(saved)["vision"].attention, make_trace()["vision"].attention)


def test_a_linked_folder_stays_a_link(saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(saved)
    make_trace(1).save(link, overwrite=True)
    assert link.is_symlink()
    assert_same(Trace.open(saved), make_trace(1))


# Failing half-way


def failing_after(limit: int, error: BaseException) -> Callable[..., None]:
    """A ``TraceWriter.write`` for a disk with ``limit`` bytes left: the file that does not fit is cut short."""
    real = zarr_files.TraceWriter.write
    left = limit

    def write(self: zarr_files.TraceWriter, key: str, data: bytes) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            real(self, key, data[: len(data) // 2])
            raise error
        real(self, key, data)

    return write


def total_size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize(("older", "share"), [(False, 0.5), (True, 0.0), (True, 0.5), (True, 0.999)])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool, share: float
) -> None:
    path = tmp_path / "run.zarr"
    size = total_size(make_trace(1).save(tmp_path / "other"))
    shutil.rmtree(tmp_path / "other")
    if older:
        make_trace().save(path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(zarr_files.TraceWriter, "write", failing_after(int(size * share), full))
    with pytest.raises(TraceStoreError, match=r"No space left on device.*unchanged"):
        make_trace(1).save(path, overwrite=True)
    assert names(tmp_path) == (["run.zarr"] if older else [])
    if older:
        assert_same(Trace.open(path), make_trace())


@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError()])
@pytest.mark.parametrize("limit", [0, 2000])
def test_any_other_failure_leaves_what_was_there(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, limit: int
) -> None:
    monkeypatch.setattr(zarr_files.TraceWriter, "write", failing_after(limit, error))
    with pytest.raises(type(error)):
        make_trace(1).save(saved, overwrite=True)
    assert names(saved.parent) == ["run.zarr"]
    assert_same(Trace.open(saved), make_trace())


def test_an_interrupt_just_before_the_manifest(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(files: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_trace(1).save(saved, overwrite=True)
    assert names(saved.parent) == ["run.zarr"]
    assert_same(Trace.open(saved), make_trace())


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_swap_is_undone(saved: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    real, calls = Path.rename, 0

    def rename(source: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(TraceStoreError, match="Input/output error"):
        make_trace(1).save(saved, overwrite=True)
    assert names(saved.parent) == ["run.zarr"]
    assert_same(Trace.open(saved), make_trace())


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mount = shutil.which("mount")
    done = subprocess.run(
        [mount or "mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(not shutil.which("mount") or not hasattr(os, "geteuid"), reason="no mount command")
def test_a_really_full_disk(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((4, 100_000))
    with small_disk(tmp_path / "disk"):
        path = make_trace().save(tmp_path / "disk" / "run.zarr")
        with pytest.raises(TraceStoreError, match="No space left on device"):
            Trace({"text": xr.Dataset({"lse": (("layer", "query"), noise)})}).save(path, overwrite=True)
        assert names(tmp_path / "disk") == ["run.zarr"]
        assert_same(Trace.open(path), make_trace())


SLOW_SAVE = """
import signal, sys, time
# A shell that starts the tests in the background has them ignore Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np, xarray as xr
from interp.tracing import zarr_files
from interp.tracing.trace import Trace
real = zarr_files.TraceWriter.write
def slow(self, key, data):
    real(self, key, data)
    print(key, flush=True)
    time.sleep(0.05)
zarr_files.TraceWriter.write = slow
trace = Trace({"text": xr.Dataset({"lse": (("layer", "query"), np.random.rand(200, 10))})})
trace.save(sys.argv[1], overwrite=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_saving(saved: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SAVE, str(saved)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "lse/c/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0, errors
    assert_same(Trace.open(saved), make_trace())
    left = sorted(p.name.split("-")[0] for p in saved.parent.iterdir())
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert left == ["run.zarr"]
    else:
        # Nobody can clean up after SIGKILL; what is left has a name of its own and does not open.
        assert left == ["run.zarr", "run.zarr.partial"]
        with pytest.raises(NotATrace):
            Trace.open(next(saved.parent.glob("*.partial-*")))


def test_killed_between_the_two_renames_says_where_the_older_trace_is(saved: Path) -> None:
    saved.rename(saved.with_name("run.zarr.replaced-0a0b"))
    with pytest.raises(NotATrace, match=r"run\.zarr\.replaced-0a0b: rename it back"):
        Trace.open(saved)
