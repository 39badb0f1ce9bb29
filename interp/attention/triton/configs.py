"""Tile sizes, warps and pipeline stages by what a launch does."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from interp.attention.call import Call
    from interp.attention.triton.passes import Wanted
    from interp.attention.triton.tables import Tables


class Config(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of the load pipeline, registers a thread may have (0: any)."""

    bm: int
    bn: int
    warps: int
    stages: int
    registers: int = 0


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
    elif by_pair or (wanted.row_stats and not wanted.given):
        # Statistics and masks of single pairs take the registers of a larger tile: two small programs a multiprocessor
        # beat one that spills.
        best = Config(64, 64, 4, 2)
    elif not wanted.output:
        best = Config(128, 64, 4, 2)
    elif width == 128 and not (a["SINK_WINDOW"] or a["LEFT"] or a["BETA"] or wanted.weights or wanted.move):
        best = Config(128, 128, 8, 3)
    else:
        best = Config(128, 64, 8, 3)
    keys = a["D"] + (a["DV"] if wanted.output else 0)
    return fitting(best, a["D"], keys, call.q.dtype.itemsize, 4 if by_pair else 0, tables.device)


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
    else:
        # With few rows a head the second half of a tall tile is empty too often.
        best = Config(128, 64, 4, 3) if call.shape[2] > 512 else Config(64, 64, 4, 3, 128)
    return fitting(best, width, width, call.q.dtype.itemsize, 0, tables.device)


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
