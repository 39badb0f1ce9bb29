"""Tile sizes, warps and pipeline stages by what a launch does.

Those here were measured on an H200, those said to be of the H100 on one in bf16 at 257 to 32k tokens;
:mod:`~interp.attention.triton.tuning` finds better ones for a GPU and a shape.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

import torch

from interp.attention.edits import SinkWindow
from interp.attention.triton import tuned

if TYPE_CHECKING:
    from interp.attention.call import Call
    from interp.attention.readouts import Readout
    from interp.attention.triton.passes import Wanted
    from interp.attention.triton.tables import Tables


class Config(NamedTuple):
    """How one launch is cut up.

    Attributes:
        bm: rows of a tile.
        bn: keys of a tile.
        warps: of a program.
        stages: of the load pipeline.
        registers: that a thread may have, 0 for any.
        wide: 1 has the row-stationary kernel work out places of keys in 64 bits where 32 would do: more instructions, which
            the compiler orders otherwise.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    registers: int = 0
    wide: int = 0


INTERPRETED = Config(16, 16, 4, 1)

forced: Config | None = None
"""Set by the tuner and by tests: every launch uses it."""


def registers(config: Config) -> dict[str, int]:
    """The launch option that caps registers, so that more programs share a multiprocessor."""
    return {"maxnreg": config.registers} if config.registers else {}


SMALLER = (
    Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 1),
    Config(16, 16, 4, 1),
)  # fmt: skip
"""What to step down to where a tile does not fit into a multiprocessor's shared memory (an H200 has 227 KiB, an L4 99)."""


def choose(call: Call, wanted: Wanted, tables: Tables) -> Config:
    """The configuration for a launch of the row-stationary kernel."""
    if forced is not None:
        return forced
    if tables.device.type == "cpu":
        return INTERPRETED
    a = tables.arguments
    width = max(a["D"], a["DV"] if wanted.output else 0)
    by_pair = bool(a["BIAS"] or a["DENSE"] or a["BLOCKS"] or a["N_COORDS"] or a["N_DROP"])
    if call.q.dtype == torch.float32 or width > 128:
        best = Config(64, 32, 4, 2)
    elif by_pair:
        # Masks of single pairs take the registers of a larger tile: two small programs a multiprocessor beat one that spills.
        best = Config(64, 64, 4, 2)
    elif wanted.row_stats and not wanted.given:
        # So do statistics. Of SDPA's time, four groups: 1.62 for 1.80 in narrow places at 16k.
        best = Config(64, 64, 4, 2, wide=1)
        if width <= 64 and wanted.output:
            # A longer tile searches less often for its largest score, but not with few rows: 1.65 for 1.99 at 8192 tokens, 1.43
            # for 1.71 at 257.
            best = Config(64, 128, 4, 3) if call.shape[2] > FEW else Config(64, 32, 4, 3, wide=1)
    elif not wanted.output:
        best = Config(128, 64, 4, 2)
    elif a["SINK_WINDOW"] and width == 128 and call.shape[3] >= LONG and heads_differ(call):
        # The heads that see everything take the time. H100: 0.76 of SDPA's for 0.85, half of them at 32k.
        best = Config(128, 128, 8, 3, wide=1)
    elif a["SINK_WINDOW"] and width == 128:
        # Lower blocks of rows and shorter tiles have less at an edge. Of SDPA's time at 16k, all heads: 0.227 for 0.252.
        best = Config(64, 64, 4, 3) if heads_differ(call) else Config(64, 32, 4, 3)
    elif a["SINK_WINDOW"] or a["LEFT"]:
        # Lower blocks of rows have fewer tiles at an edge: a fifth fewer instructions, counted in the compiled code.
        best = Config(64, 64, 4, 2)
    elif width == 128 and call.shape[3] > MANY and not (a["BETA"] or wanted.weights or wanted.move):
        # Of SDPA's time at 16k: 1.24 for 1.28 in narrow places and 1.32 with smaller tiles, which have 1.13 for 1.18 at 4k.
        best = Config(128, 128, 8, 3, wide=1)
    else:
        # Of SDPA's time for a tile of 128 rows: 0.92 for 1.04 at 257 tokens and head dim 64; at 16k and 128 a redistribution
        # 1.59 for 1.63, a boost 1.83 for 1.99, key weights 1.87 for 2.11.
        best = Config(64, 64, 4, 3)
    keys = a["D"] + (a["DV"] if wanted.output else 0)
    shipped = fitting(best, a["D"], keys, call.q.dtype.itemsize, 4 if by_pair else 0, tables.device)
    return tuned.pick("rows", tables.device, lambda: facts(call, tables, wanted), shipped)


def choose_statistics(call: Call, tables: Tables) -> Config:
    """The configuration of a launch of the statistics kernel."""
    if forced is not None:
        return forced
    if tables.device.type == "cpu":
        return INTERPRETED
    width = tables.arguments["D"]
    if call.q.dtype == torch.float32:
        best = Config(64, 32, 4, 2)
    elif width > 128:
        best = Config(64, 64, 4, 2)
    elif call.shape[2] > FEW:
        best = Config(128, 64, 4, 3)
    else:
        # With few rows a head the second half of a tall tile is empty too often. H100, width 64:
        # 2.65 of SDPA's time for 3.03 at 257 tokens.
        best = Config(64, 32, 4, 3) if width <= 64 else Config(64, 64, 4, 3, 128)
    shipped = fitting(best, width, width, call.q.dtype.itemsize, 0, tables.device)
    return tuned.pick("statistics", tables.device, lambda: facts(call, tables, call.readout), shipped)


FEW = 512
"""Rows a head up to which the second half of a tall or long tile is empty too often; and masses are better read first."""
MANY = 4096
"""Keys above which a plain forward is faster in large tiles."""
LONG = 32768
"""Keys from which a head that sees all of them outweighs what a streaming head loses to taller tiles."""


def heads_differ(call: Call) -> bool:
    """Whether sinks and windows are given by head, as where some heads stream and others see everything."""
    numbers = [x for op in call.edit.of(SinkWindow) for x in (op.sink, op.window)]
    return any(isinstance(x, torch.Tensor) and x.numel() > 1 for x in numbers)


def facts(call: Call, tables: Tables, asked: Wanted | Readout | None = None) -> list[str]:
    """What the best configuration may depend on, for :func:`~interp.attention.triton.tuned.pick`.

    The dtype, head dims, the kernel's constants, what is asked of it, and the lengths by powers of two.
    """
    constants = {name: x for name, x in tables.arguments.items() if name.isupper() and name not in SIZES}
    if asked is not None:
        constants.update({f.name: getattr(asked, f.name) for f in fields(asked)})
    flags = [name if x is True or not isinstance(x, int) else f"{name}={x}" for name, x in constants.items() if _set(x)]
    dims = f"{call.q.shape[3]}x{call.v.shape[3]}"
    lengths = f"{tuned.bucket(call.shape[2])}x{tuned.bucket(call.shape[3])}"
    return [str(call.q.dtype).removeprefix("torch."), dims, ",".join(sorted(flags)), lengths]


SIZES = ("D", "DV", "HEAD_DIM", "V_DIM", "KV_GROUP", "UPCAST", "PRECISION")


def _set(value: object) -> bool:
    return value is not None and not (isinstance(value, int) and value == 0)


def fitting(
    best: Config, query_dim: int, key_dims: int, itemsize: int, pair_bytes: int, device: torch.device
) -> Config:
    """``best``, or the first smaller one whose tiles fit: queries once, keys (and values) and pairs once a stage."""
    limit = _shared_memory(device.index or 0)
    for config in (best, *SMALLER):
        tiles = config.bm * query_dim * itemsize + config.stages * config.bn * key_dims * itemsize
        if tiles + config.stages * config.bm * config.bn * pair_bytes <= limit:
            return config
    return SMALLER[-1]


@functools.cache
def _shared_memory(index: int) -> int:
    """Bytes of shared memory that one program may have."""
    return int(torch.cuda.get_device_properties(index).shared_memory_per_block_optin)
