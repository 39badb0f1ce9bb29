"""Tile sizes, warps and pipeline stages by what a launch does."""

from __future__ import annotations

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


def choose(call: Call, wanted: Wanted, tables: Tables) -> Config:
    """The configuration for a launch."""
    if forced is not None:
        return forced
    if tables.device.type == "cpu":
        return INTERPRETED
    a = tables.arguments
    width = max(a["D"], a["DV"] if wanted.output else 0)
    if call.q.dtype == torch.float32:
        return Config(64, 32, 4, 2) if width <= 128 else Config(32, 32, 4, 1)
    if width > 128:
        return Config(64, 32, 4, 2)
    if wanted.row_stats and not wanted.given:
        # Statistics take the registers of a larger tile: two small programs a multiprocessor beat one that spills.
        return Config(64, 64, 4, 2)
    if not wanted.output:
        return Config(128, 64, 4, 2)
    return Config(128, 128, 8, 3) if width == 128 else Config(128, 64, 8, 3)


def choose_statistics(call: Call, tables: Tables) -> Config:
    """The configuration of a launch of the statistics kernel."""
    if forced is not None:
        return forced
    if tables.device.type == "cpu":
        return INTERPRETED
    width = tables.arguments["D"]
    if call.q.dtype == torch.float32:
        return Config(64, 32, 4, 2) if width <= 128 else Config(32, 32, 4, 1)
    return Config(128, 64, 4, 3) if width <= 128 else Config(64, 64, 4, 2)
