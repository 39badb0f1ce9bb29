"""Measuring side by side, and recording what was measured with the machine it was measured on."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("headscope", "torch", "transformers", "xarray", "zarr", "numpy")


@dataclass(frozen=True)
class Timing:
    """Seconds (or ratios of them) of one function: the median of ``repeats`` runs, and the quartiles around it."""

    median: float
    low: float
    high: float
    repeats: int


def measure(functions: Mapping[str, Callable[[], object]], repeats: int = 9, warmup: int = 1) -> dict[str, Timing]:
    """Time functions side by side: every round runs each of them once, in an order that rotates.

    One after the other would give whatever else the machine does during one of them to that one alone.
    """
    return {name: summary(values) for name, values in rounds(functions, repeats, warmup).items()}


def measure_ratios(
    functions: Mapping[str, Callable[[], object]], base: str, repeats: int = 9, warmup: int = 1
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """:func:`measure`, and each function's ratio to ``base`` in the same round: what slows both leaves it alone.

    The ratios are medians of ratios with quartiles, for differences of a few percent.
    """
    seconds = rounds(functions, repeats, warmup)
    timings = {name: summary(values) for name, values in seconds.items()}
    pairs = {name: [a / b for a, b in zip(values, seconds[base], strict=True)] for name, values in seconds.items()}
    return timings, {name: summary(values) for name, values in pairs.items()}


def rounds(functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each function in each round."""
    names = list(functions)
    for name in names * warmup:
        functions[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repeats):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            start = perf_counter()
            functions[name]()
            seconds[name].append(perf_counter() - start)
    return seconds


def summary(values: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Timing(median, low, high, len(values))


@dataclass(frozen=True)
class Peak:
    """Bytes of resident memory of a process: before a call, and by how much its peak rose during the call."""

    before: int
    growth: int


def peak_memory(prepare: Callable[..., Callable[[], object]], *args: object) -> Peak:
    """Peak memory of a call in a process of its own.

    Args:
        prepare: a function of a module (it is pickled), called as ``prepare(*args)`` in the new process; what it
            makes (inputs, a warm-up) counts as "before". It returns the call to measure.
        args: arguments of ``prepare``; picklable.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, prepare, args).result()


def _peak(prepare: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> Peak:
    call = prepare(*args)
    gc.collect()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        raise RuntimeError(f"peak_memory reads /proc/self/status, which only Linux has; got {sys.platform}")
    # The kernel keeps the peak of the whole life, and imports reach higher than what they leave: 5 resets it.
    reset.write_text("5")
    before = _status(status, "VmRSS")
    result = call()
    peak = _status(status, "VmHWM")
    del result
    return Peak(before, peak - before)


def _status(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, object]:
    """Processor, cores that this process may use, memory in GiB, system."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found: dict[str, object] = {
        "cpu": processor,
        "cores": cores,
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of what is measured, and the commit (``-dirty`` where files differ from it).

    ``HEADSCOPE_COMMIT`` names the commit where the files are a copy, whose own history says nothing about them.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    named = os.environ.get("HEADSCOPE_COMMIT")
    if named:
        found["commit"] = named
        return found
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    if described.returncode == 0:
        found["commit"] = described.stdout.strip()
    return found


def record(name: str, rows: Sequence[Mapping[str, object]], *, note: str = "", quiet: bool = False) -> Path:
    """Print ``rows`` as a table (unless ``quiet``) and write them to ``results/<name>.json`` with machine, versions, date and command.

    Args:
        name: name of the benchmark; a second run overwrites its file (git keeps the old one).
        rows: one mapping a row, of text and numbers; units in the names (``seconds``, ``mib``, ``ratio``).
        note: what a reader must know to read the rows: sizes, what a ratio is against, a limit that is promised.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = " ".join(["python", str(Path(sys.argv[0]).name), *sys.argv[1:]])
    content = {
        "name": name,
        "note": note,
        "rows": [dict(row) for row in rows],
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    part.replace(path)
    if not quiet:
        show(name, rows, note)
    return path


def show(title: str, rows: Sequence[Mapping[str, object]], note: str = "") -> None:
    """Print rows as a table, or line by line where they have more columns than a terminal has room for."""
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    if len(columns) > 10:
        for row in rows:
            Console().print("; ".join(f"{key} {_cell(value)}" for key, value in row.items()), soft_wrap=True)
        return
    table = Table(title=title, caption=note or None)
    for column in columns:
        numeric = all(isinstance(row.get(column, 0), int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    Console().print(table)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
