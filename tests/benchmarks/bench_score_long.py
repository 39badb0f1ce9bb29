"""Scores that read statistics, over long prompts of an 8B-shaped model: time and peak memory beside a plain prefill.

Promised: 32k tokens run on one GPU in memory linear in the length. Give lengths to measure others; ``--layers 2`` for a quick look.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from _record import record
from bench_kernels_model import build

import interp
from interp.models.model import Model
from probes.samples import Sample

SCORES = {"entropy": {}, "sink": {}, "streaming_mass": {"sink": 64, "recent": 1024}, "attention_distance": {}}
REPEATS = 2


def peak(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds until the GPU is done, and MiB on it at the peak beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = perf_counter()
    function()
    torch.cuda.synchronize()
    return perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(model: Model, n: int, layers: int) -> list[dict[str, Any]]:
    ids = torch.randint(0, 128000, (n,), generator=torch.Generator().manual_seed(n))
    samples = [Sample(tuple(ids.tolist()))]
    on_gpu = ids[None].cuda()

    def plain() -> object:
        return model.module(on_gpu, use_cache=True, logits_to_keep=1)

    def statistics_of_all() -> object:
        with interp.hooked(model, capture=interp.Capture(row_stats=True, received=True, pooled=64)) as run:
            plain()
        return run.trace

    ways: dict[str, Callable[[], object]] = {
        "plain prefill": plain,
        "trace: row statistics, received, pooled maps": statistics_of_all,
    }
    for name, settings in SCORES.items():
        ways[f"score {name}"] = lambda name=name, settings=settings: interp.score(name, model, samples, **settings)
    rows: list[dict[str, Any]] = []
    maps = layers * 32 * n * n * 2 / 2**20
    for way, function in ways.items():
        function()
        found = [peak(function) for _ in range(REPEATS)]
        seconds, extra = statistics.median(s for s, _ in found), max(m for _, m in found)
        rows.append(
            {"way": way, "tokens": n, "seconds": seconds, "peak MiB": extra, "share of the maps in bf16": extra / maps}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=int, nargs="*", default=[8192, 16384, 32768])
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("-- no CUDA GPU here: nothing to measure")
        return
    model = Model(build(options.layers))
    with torch.no_grad():
        rows = [row for n in options.lengths for row in measure(model, n, options.layers)]
    record(
        "score_long", rows,
        note=f"Llama-3-8B's shape, {options.layers} layers x 32 heads, random bf16 weights, one prompt; a score with a control runs "
        "it too; peak: beyond the weights; the maps: what every head's N x N weights would take in bf16",
    )  # fmt: skip
    grown = {way: [r["peak MiB"] for r in rows if r["way"] == way] for way in dict.fromkeys(r["way"] for r in rows)}
    bad = [
        way
        for way, mib in grown.items()
        if len(mib) > 1 and mib[-1] / mib[-2] > 1.2 * options.lengths[-1] / options.lengths[-2]
    ]
    if bad:
        sys.exit(f"memory grows faster than the length: {bad}")


if __name__ == "__main__":
    main()
