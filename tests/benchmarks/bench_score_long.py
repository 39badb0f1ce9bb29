"""Scores that read statistics, over long prompts of an 8B-shaped model: time and peak memory beside a plain prefill.

Promised: 32k tokens run on one GPU in memory linear in the length. The longest prompt comes first and every row is recorded as it
is measured, so that a run cut short keeps what it has. A short prompt runs before anything is timed, which compiles the kernels.

python bench_score_long.py [--lengths 32768 16384 8192] [--layers 32] [--repeats 1] [--ways plain score statistics offset]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from _record import record, show
from bench_kernels_model import build

import interp
from interp.models.model import Model
from probes.samples import Sample

Row = dict[str, Any]
WARM_UP = 2048
SLACK = 1.2
"""How much faster than the length a peak may grow before the run fails: buffers are rounded up."""


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


def ways(model: Model, n: int) -> dict[str, Callable[[], object]]:
    """What is timed on a prompt of ``n`` random tokens, by name."""
    ids = torch.randint(0, 128000, (n,), generator=torch.Generator().manual_seed(n))
    samples = [Sample(tuple(ids.tolist()))]
    given = ids[None].to(next(model.module.parameters()).device)

    def plain() -> object:
        return model.module(given, use_cache=True, logits_to_keep=1)

    def statistics_of_all() -> object:
        with interp.hooked(model, capture=interp.Capture(row_stats=True, received=True, pooled=64)) as run:
            plain()
        return run.trace

    # The sink score cuts text to its length, and the window of the streaming mass must be shorter than the prompt.
    scores = {
        "attention_distance": {}, "entropy": {}, "sink": {"length": n}, "streaming_mass": {"sink": 64, "recent": 1024},
    }  # fmt: skip
    found: dict[str, Callable[[], object]] = {"plain prefill": plain}
    for name, settings in scores.items():
        found[f"score {name}"] = lambda name=name, settings=settings: interp.score(
            name, model, samples, progress=False, **settings
        )
    found["trace: row statistics, received, pooled maps"] = statistics_of_all

    def offsets() -> object:
        with interp.hooked(model, capture=interp.Capture(offset=True)) as run:
            plain()
        return run.trace

    found["trace: offset histograms"] = offsets
    return found


def growth(rows: list[Row]) -> list[Row]:
    """For each way the growth of its peak from the shortest prompt to the longest, over that of the length (1: linear)."""
    found: list[Row] = []
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = sorted((row for row in rows if row["way"] == way), key=lambda row: row["tokens"])
        if len(mine) > 1:
            by = (mine[-1]["peak MiB"] / mine[0]["peak MiB"]) / (mine[-1]["tokens"] / mine[0]["tokens"])
            found.append(
                {"way": way, "from tokens": mine[0]["tokens"], "to tokens": mine[-1]["tokens"], "peak over linear": by}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 16384, 8192])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["plain", "score", "statistics"],
        help="words, one of which is in its name",
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("-- no CUDA GPU here: nothing to measure")
        return
    run(options)


def run(options: argparse.Namespace) -> None:
    start = perf_counter()
    model = Model(build(options.layers))
    chosen = lambda n: {w: f for w, f in ways(model, n).items() if any(word in w for word in options.ways)}  # noqa: E731
    note = (
        f"Llama-3-8B's shape, {options.layers} layers x 32 heads, random bf16 weights, one prompt, {options.repeats} run(s) a row after "
        f"a prompt of {WARM_UP}; entropy runs its control (shuffled tokens) too; peak: beyond the weights; the maps: what every head's "
        "N x N weights would take in bf16"
    )
    rows: list[Row] = []
    with torch.no_grad():
        for function in chosen(WARM_UP).values():
            function()
        print(f"built and compiled after {perf_counter() - start:.0f} s", flush=True)
        for n in sorted(options.lengths, reverse=True):
            for way, function in chosen(n).items():
                found = [peak(function) for _ in range(options.repeats)]
                extra = max(mib for _, mib in found)
                rows.append(
                    {
                        "way": way, "tokens": n, "seconds": statistics.median(s for s, _ in found), "peak MiB": extra,
                        "share of the maps": extra / (options.layers * 32 * n * n * 2 / 2**20),
                    }
                )  # fmt: skip
                print(f"{perf_counter() - start:.0f} s: {rows[-1]}", flush=True)
                record("score_long", [*rows, *growth(rows)], note=note, quiet=True)
    show("score_long", rows, note)
    checked = growth(rows)
    show("peak memory over that of a linear growth", checked)
    bad = [row["way"] for row in checked if row["peak over linear"] > SLACK]
    if bad:
        sys.exit(f"memory grows faster than the length: {bad}")


if __name__ == "__main__":
    main()
