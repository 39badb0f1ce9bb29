"""Timing on a GPU: CUDA graphs replayed side by side, and what a call costs the host."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch

AIM_MS = 4.0
"""How long one replay should last, so that the events around it measure work and not themselves."""


def gpu_times(functions: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Milliseconds of GPU time of each function: medians over rounds that replay every function once, in a rotating order.

    Each function is captured in a CUDA graph, as many times in a row as fill :data:`AIM_MS`, so that what the host does does
    not count. A function that cannot be captured or run is left out, with a line that says why.
    """
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, function in functions.items():
        try:
            graphs[name] = _captured(function)
        except Exception as error:
            print(f"-- {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            graph, count = graphs[name]
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def _captured(function: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, int]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The first call of a kind and the second may go different ways, and each compiles what it needs.
        for _ in range(3):
            function()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        count = max(1, min(200, round(AIM_MS / max(start.elapsed_time(stop), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            function()
    graph.replay()
    torch.cuda.synchronize()
    return graph, count


def host_microseconds(function: Callable[[], object], calls: int = 100, repeats: int = 5) -> float:
    """Microseconds until the call returns to the host, the least of several medians' runs, with the GPU's queue never full."""
    function()
    torch.cuda.synchronize()
    found: list[float] = []
    for _ in range(repeats):
        start = perf_counter()
        for _ in range(calls):
            function()
        found.append((perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize()
    return statistics.median(found)


def peak_extra_mib(function: Callable[[], object]) -> float:
    """MiB of GPU memory that a call takes beyond what was there, its results included."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / 2**20
