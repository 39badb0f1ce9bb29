"""Time configurations of the kernels on the GPU at hand, and keep the best for every later process.

Nothing is tuned unless asked for, in Python::

    tuning.tune(lambda: attend(q, k, v, scale=scale, mask=Mask(causal=True)))

or on the command line, here for 32 heads over 8 key-value heads, 4096 tokens, head dim 128::

    python -m interp.attention.triton.tuning --shape 1,32,8,4096,128 --causal --read all
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.attention import kinds
from interp.attention.api import attend
from interp.attention.edits import Edit, Gain, SinkWindow, Temperature
from interp.attention.mask import Mask
from interp.attention.readouts import Readout
from interp.attention.triton import tuned
from interp.attention.versions import tensors

Numbers = tuple[int, ...]
WORTH = 0.98
"""A configuration is kept only where the call takes at most this share of its time with the shipped one."""


@dataclass(eq=False)
class Tuned:
    """One launch: its key, and the configuration and milliseconds of the whole call before and after."""

    key: str
    shipped: Numbers
    shipped_ms: float
    config: Numbers
    ms: float


@dataclass(eq=False)
class _Trial:
    chosen: dict[str, Numbers] = field(default_factory=dict[str, Numbers])
    seen: dict[str, Numbers] = field(default_factory=dict[str, Numbers])

    def pick(self, key: str, shipped: Numbers) -> Numbers:
        self.seen[key] = tuple(shipped)
        return self.chosen.get(key, shipped)


def tune(
    run: Callable[[], Any],
    *,
    candidates: Callable[[str, Numbers], Sequence[Numbers]] | None = None,
    timer: Callable[[Callable[[], Any]], float] | None = None,
    progress: Callable[[str], None] | None = None,
    folder: Path | None = None,
    keep: bool = True,
) -> list[Tuned]:
    """Try configurations for every launch that a call makes, one launch after the other, and keep the best.

    Calls prepared before take them up from the next call on. One that fails (it does not fit the GPU) or whose result
    is not that of the shipped one is passed over.

    Args:
        run: makes the call, say of ``attend``, on tensors of the shapes that matter; returns what is to stay the same.
        candidates: configurations to try by a launch's key and its shipped configuration; None has a few dozen.
        timer: median milliseconds of ``run``; None is ``triton.testing.do_bench``.
        progress: hears one line a launch and one a configuration.
        folder: Headscope's cache; None is the user's.
        keep: write the result to ``kernels/tuned.json`` in it.

    Returns:
        A row for every launch, of those that stay as shipped too.

    Raises:
        ValueError: the call prepares no launch that could be tuned (it went to another backend).
        OSError: the result cannot be written.
    """
    timer = _median if timer is None else timer
    say = progress or (lambda line: None)
    candidates = _candidates if candidates is None else candidates
    trial = _Trial()
    rows: list[Tuned] = []

    def measured() -> tuple[Any, float]:
        kinds.clear()
        return run(), timer(run)

    try:
        with tuned.trying(trial):
            expected, shipped_ms = measured()
            if not trial.seen:
                raise ValueError(
                    "run: must make a call that the kernels compute on a GPU; got one without a launch of theirs"
                )
            ms = shipped_ms
            for key, shipped in list(trial.seen.items()):
                say(f"{_short(key)}: {shipped} as shipped, {ms:.4f} ms")
                best, best_ms = shipped, ms
                for config in candidates(key, shipped):
                    if config == shipped:
                        continue
                    trial.chosen[key] = config
                    try:
                        given, took = measured()
                    except Exception as error:
                        say(f"  {config}: {type(error).__name__}")
                        continue
                    fits = _same(given, expected)
                    say(f"  {config}: {took:.4f} ms" if fits else f"  {config}: another result")
                    if fits and took < best_ms and took <= ms * WORTH:
                        best, best_ms = config, took
                trial.chosen[key] = best
                rows.append(Tuned(key, shipped, ms, best, best_ms))
                ms = best_ms
    finally:
        kinds.clear()
    if keep:
        entry = lambda row: {  # noqa: E731
            "config": list(row.config), "ms": row.ms, "shipped": list(row.shipped), "shipped_ms": row.shipped_ms,
        }  # fmt: skip
        tuned.write(tuned.file(folder), {row.key: entry(row) if row.config != row.shipped else None for row in rows})
    return rows


def _median(run: Callable[[], Any]) -> float:
    import triton.testing

    bench: Any = triton.testing.do_bench
    return float(bench(run, return_mode="median"))


def _candidates(key: str, shipped: Numbers) -> list[Numbers]:
    """Of a decoding kernel (keys, warps, stages), of any other (rows, keys, warps, stages, registers, wide)."""
    if len(shipped) == 3:
        return [(keys, warps, stages) for keys in (32, 64, 128) for warps in (4, 8) for stages in (2, 3, 4)]
    tiles = [(bm, bn) for bm in (32, 64, 128) for bn in (32, 64, 128)]
    # Elements of a tile a warp has to hold: fewer leave it idle, more spill.
    sizes = [(bm, bn, warps) for bm, bn in tiles for warps in (4, 8) if 256 <= bm * bn // warps <= 2048]
    places = (0, 1) if "|rows|" in key else (0,)
    return [
        (*size, stages, registers, wide)
        for size in sizes
        for stages in (2, 3)
        for registers in _registers(key, size[2])
        for wide in places
    ]


def _registers(key: str, warps: int) -> tuple[int, ...]:
    return (0, 128) if "|statistics|" in key and warps == 4 else (0,)


def _same(given: Any, expected: Any) -> bool:
    """Whether two results agree as those of two orders of summation do; keys of the largest weight may be tied."""
    pairs = list(zip(_floats(given), _floats(expected), strict=False))
    close = [torch.allclose(x.float(), y.float(), rtol=0.05, atol=0.02, equal_nan=True) for x, y in pairs]
    return all(close)


def _floats(thing: Any) -> Iterator[Tensor]:
    found = list(tensors(thing)) if not isinstance(thing, list) else [x for x in thing if isinstance(x, Tensor)]
    yield from (x for x in found if x.is_floating_point())


def _short(key: str) -> str:
    return " ".join(key.split("|")[3:])


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m interp.attention.triton.tuning",
        description="Time configurations of the attention kernels on this GPU, and keep the best for later runs.",
    )
    parser.add_argument(
        "--shape", required=True, action="append", metavar="B,H,HKV,N,D[,DV]", help="batch, heads, key-value heads, keys, "
        "head dim, that of v; may be given several times",
    )  # fmt: skip
    parser.add_argument("--queries", type=int, metavar="LQ", help="query rows at the end (1 for decoding); default: N")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=int, metavar="W", help="sliding window of W tokens")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument(
        "--read", choices=("none", "rows", "all"), default="none",
        help="rows: row statistics; all: received attention and a 64 x 64 pooled map as well",
    )  # fmt: skip
    parser.add_argument("--no-output", action="store_true", help="readings only")
    parser.add_argument("--edit", choices=("none", "gain", "temperature", "sink-window"), default="none")
    parser.add_argument("--backward", action="store_true", help="the gradients of q, k and v too")
    parser.add_argument("--folder", type=Path, help="Headscope's cache; default: the user's")
    parser.add_argument("--dry-run", action="store_true", help="keep nothing")
    return parser


def _call(shape: str, options: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    """The call that the options describe, on random tensors.

    Raises:
        ValueError: ``shape`` is none.
    """
    sizes = [int(n) for n in shape.split(",")] if all(n.strip().isdigit() for n in shape.split(",")) else []
    if len(sizes) not in (5, 6) or 0 in sizes:
        raise ValueError(f"--shape: must be 5 or 6 numbers > 0, B,H,HKV,N,D[,DV]; got {shape!r}")
    batch, heads, kv_heads, n_keys, dim, width = [*sizes, sizes[4]][:6]
    n_queries = options.queries or n_keys
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    make = lambda *size: torch.randn(*size, device=device, dtype=dtype, requires_grad=options.backward)  # noqa: E731
    q, k, v = (
        make(batch, heads, n_queries, dim),
        make(batch, kv_heads, n_keys, dim),
        make(batch, kv_heads, n_keys, width),
    )
    window = None if options.window is None else (options.window - 1, 0)
    mask = Mask(causal=options.causal, window=window, q_offset=n_keys - n_queries)
    factor = torch.full((1, heads, 1), 1.25, device=device)
    operations = {
        "none": (), "gain": (Gain(factor),), "temperature": (Temperature(factor),), "sink-window": (SinkWindow(64, 1024),),
    }  # fmt: skip
    edit = Edit(operations[options.edit])
    everything = options.read == "all"
    readout = Readout(row_stats=options.read != "none", received=everything, pooled=64 if everything else 0)
    dz = torch.randn(batch, n_queries, heads, width, device=device, dtype=dtype)

    def run() -> list[Tensor]:
        z, readings = attend(
            q, k, v, scale=dim**-0.5, mask=mask, edit=edit, readout=readout, backend="triton",
            want_output=not options.no_output,
        )  # fmt: skip
        gradients = torch.autograd.grad(z, (q, k, v), dz) if options.backward and z is not None else ()
        return [*([] if z is None else [z]), *readings.tensors().values(), *gradients]

    return run


def table(rows: Sequence[Tuned]) -> str:
    """Before and after, a line for every launch."""
    lines = [("launch", "shipped", "ms", "tuned", "ms", "speed")]
    for row in rows:
        same = row.config == row.shipped
        config, ms = ("as shipped", "") if same else (str(row.config), f"{row.ms:.4f}")
        speed = "" if same else f"{row.shipped_ms / row.ms:.2f} x"
        lines.append((_short(row.key), str(row.shipped), f"{row.shipped_ms:.4f}", config, ms, speed))
    widths = [max(len(line[n]) for line in lines) for n in range(6)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with a message where the options or the machine will not do."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed, and torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    _say(tuned.machine(device).replace("|", ", "))
    start, rows = time.perf_counter(), list[Tuned]()
    for shape in options.shape:
        try:
            run = _call(shape, options, device)
            rows += tune(run, progress=_say, folder=options.folder, keep=not options.dry_run)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    _say(f"\n{table(rows)}\n\n{time.perf_counter() - start:.0f} s")
    _say("nothing is kept (--dry-run)" if options.dry_run else f"kept in {tuned.file(options.folder)}")
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
