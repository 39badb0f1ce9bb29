"""Launches of the decoding kernels: tiles, number of parts, buffers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from interp.attention.readouts import Readout
from interp.attention.triton import tuned
from interp.attention.triton.decode import combine_kernel, decode_kernel
from interp.attention.triton.decode_arguments import UNEDITED_FLAGS, Values, Work, aligned_to_16, with_batch_stride
from interp.attention.triton.decode_joined import Joined
from interp.attention.triton.devices import interpreted
from interp.attention.triton.launching import Start
from interp.attention.triton.tables import next_power, row_major

MOST_ROWS = 64
"""Rows of a tile at most."""
FEWEST_KEYS = 256
"""Keys of a part at least."""
PROGRAMS = 2
"""Programs that a multiprocessor is to run side by side."""


class Config(NamedTuple):
    """Keys of a tile, warps of a program, stages of the load pipeline."""

    keys: int
    warps: int
    stages: int


forced: Config | None = None
"""Set by the tuner: every launch uses it."""
forced_parts: int | None = None
"""Number of parts, set by the tuner and by tests."""


def choose(widest: int, dtype: torch.dtype, rows: int, heavy: bool, on_cpu: bool) -> Config:
    """The configuration of a launch; ``heavy``: with statistics that would not fit into registers beside a wide tile."""
    if forced is not None:
        return forced
    if on_cpu:
        return Config(16, 4, 1)
    keys, stages = (64, 3) if widest <= 128 else (32, 2)
    if dtype == torch.float32:
        keys //= 2
    if heavy and keys > 32:
        keys, stages = 32, 4
    return Config(keys, 8 if rows > 32 else 4, stages)


@functools.lru_cache(maxsize=64)
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.lru_cache(maxsize=4096)
def parts_of(units: int, blocks: int, processors: int) -> int:
    """Number of parts for so many samples times key-value heads of so many blocks of :data:`FEWEST_KEYS` keys.

    By the time of a launch in keys: waves of programs times keys of a part, what a part costs, and what combining costs.
    """
    slots = PROGRAMS * processors

    def cost(n: int) -> float:
        return -(-units * n // slots) * (blocks * FEWEST_KEYS / n + 64) + (96 if n > 1 else 0)

    return min(range(1, max(min(blocks, 4 * slots // units + 1), 1) + 1), key=cost)


class Live(NamedTuple):
    """What changes from call to call of one kind."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: Tensor | None


@dataclass(eq=False)
class Given:
    """What a launch gave: ``[B, H, Lq]`` (``mass`` by group, ``used`` weights by class), z as the op returns it."""

    z: Tensor | None = None
    lse: Tensor | None = None
    share: Tensor | None = None
    top_weight: Tensor | None = None
    top_key: Tensor | None = None
    entropy: Tensor | None = None
    mass: Tensor | None = None
    planes: Tensor | None = None
    used: Tensor | None = None


NOTHING = (None,) * 6


class Pass:
    """One walk over the keys and the launch that puts its parts together.

    Args:
        work: what of.
        asked: whose groups ``mass`` is by.
        output: z.
        row_stats: all row statistics.
        known: what a map's launch needs: log-sum-exp, sink share, the weights used.
        masses: masses of classes.
    """

    def __init__(
        self, work: Work, asked: Readout, *, output: bool = False, row_stats: bool = False, known: bool = False,
        masses: bool = False,
    ) -> None:  # fmt: skip
        batch, heads, n_kv, n_queries, _ = work.shape
        weights = work.weights
        self.output, self.row_stats, self.masses = output, row_stats, masses
        self.lse = row_stats or known or masses
        self.device, self.dtype = work.device, work.dtype
        self.rows = (batch, heads, n_queries)
        self.z_shape = (batch, n_queries, heads, work.widths[1])
        groups, n_groups = (asked.groups, asked.n_groups) if row_stats else (None, 1)
        classes = weights.n_classes
        self.used = (*self.rows, classes) if known and weights.how else None
        self.mass = (*self.rows, classes if masses else n_groups)
        parts = n_parts(work)
        self.direct = parts == 1 and classes == 1 and not weights.how
        n_rows = batch * heads * n_queries
        tile = Tile.of(work, classes, heavy=row_stats, n_groups=n_groups)
        planes = 4 + n_groups if row_stats else 2
        self.part_size = n_rows * parts * classes * (planes + (tile.dv if output else 0))
        constants = tile.constants(
            work, (output, row_stats, self.lse, False, self.direct, groups is not None, n_groups, classes, False)
        )
        group_at = (None, 0) if groups is None else with_batch_stride(row_major(groups))
        variant = None
        if work.dtypes is not None and aligned_to_16(group_at[0]):
            variant = (
                work.device.index,
                work.dtypes,
                constants,
                tile.config,
                group_at[0] is not None and groups is not None and groups.dtype,
            )
        fixed = (0.0, parts, *work.values, *group_at, *work.groups, *work.tail, *constants)
        # Where the edit's groups stand, if the kernel looks at them.
        self.groups_at = None if work.groups[0] is None else len(work.values) + 4
        grid = (batch * n_kv * tile.row_blocks * parts, 1, 1)
        self.walk = Start(decode_kernel, grid, fixed, tile.config.warps, tile.config.stages, variant)
        self.combine = None
        if not self.direct:
            total = parts * classes
            uniform = work.edited[1]
            combining = (
                next_power(total), min(next_power(total), 32), tile.dv, work.widths[1], classes, weights.how, output,
                row_stats, self.lse, masses, self.used is not None, n_groups, work.flags[4], work.flags[6], work.edited[0],
                uniform, weights.fractions,
            )  # fmt: skip
            fixed = (total, heads, n_queries, n_rows, work.factor, *work.rows, *weights.values, *combining)
            variant = None if work.dtypes is None else (work.device.index, work.dtypes, combining)
            self.combine = Start(combine_kernel, (n_rows, 1, 1), fixed, 4, 1, variant)
        self.joined: Joined | None = None
        if output and not self.lse and Joined.able(work):
            self.joined = Joined(work, parts, self.part_size, tile, direct=self.direct)

    def output_of(self, x: Live, groups: Tensor | None = None) -> Tensor:
        """z alone, of a pass that gives nothing else; ``groups`` are the edit's where they are not those of ``work``."""
        q, k, v, sinks, bias = x
        if self.joined is not None and (made := self.joined(q, k, v, groups)) is not None:
            return made
        aligned, fixed = not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15, None
        if groups is not None and (at := self.groups_at) is not None:
            groups = row_major(groups)
            aligned = aligned and aligned_to_16(groups)
            fixed = (*self.walk.fixed[:at], groups, *self.walk.fixed[at + 1 :])
        z = q.new_empty(self.z_shape)
        if self.combine is None:
            self.walk((q, k, v, sinks, bias, z, *NOTHING), aligned, fixed)
            return z
        part = torch.empty(self.part_size, dtype=torch.float32, device=self.device)
        self.walk((q, k, v, sinks, bias, z, part, *NOTHING[1:]), aligned, fixed)
        self.combine((sinks, z, part, *NOTHING[:4]), True)
        return z

    def __call__(self, x: Live) -> Given:
        given = Given()
        device = self.device
        z = planes = key = mass = used = None
        if self.output:
            z = given.z = torch.empty(self.z_shape, dtype=self.dtype, device=device)
        if self.lse:
            planes = given.planes = torch.empty((5, *self.rows), dtype=torch.float32, device=device)
            given.lse, given.top_weight, given.entropy, given.share, _ = planes.unbind(0)
            if self.row_stats:
                key = given.top_key = torch.empty(self.rows, dtype=torch.int32, device=device)
            if self.row_stats or self.masses:
                mass = given.mass = torch.empty(self.mass, dtype=torch.float32, device=device)
            if self.used is not None:
                used = given.used = torch.empty(self.used, dtype=torch.float32, device=device)
        q, k, v, sinks, bias = x
        aligned = not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
        if self.combine is None:
            self.walk((q, k, v, sinks, bias, z, None, planes, key, mass, None, None), aligned)
            return given
        part = torch.empty(self.part_size, dtype=torch.float32, device=device)
        walked = z if self.output else None
        self.walk((q, k, v, sinks, bias, walked, part, None, None, None, None, None), aligned)
        self.combine((sinks, z, part, planes, key, mass, used), True)
        return given


class MapPass:
    """Probabilities of a softmax that is known, ``hide`` where a key is not visible."""

    def __init__(self, work: Work, hide: float, weighted: bool) -> None:
        batch, heads, n_kv, n_queries, n_keys = work.shape
        self.shape, self.hide, self.device = (batch, heads, n_queries, n_keys), hide, work.device
        parts = n_parts(work)
        tile = Tile.of(work, 1)
        classes = work.weights.n_classes if weighted else 1
        constants = tile.constants(work, (False, False, False, True, False, False, 1, classes, weighted))
        fixed = (hide, parts, *work.values, None, 0, *work.groups, *work.tail, *constants)
        grid = (batch * n_kv * tile.row_blocks * parts, 1, 1)
        self.walk = Start(decode_kernel, grid, fixed, tile.config.warps, tile.config.stages, None)

    def __call__(self, x: Live, given: Given) -> Tensor:
        p = torch.full(self.shape, self.hide, dtype=torch.float32, device=self.device)
        q, k, v, sinks, bias = x
        aligned = not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
        self.walk((q, k, v, sinks, bias, None, None, given.planes, None, None, p, given.used), aligned)
        return p


def n_parts(work: Work) -> int:
    """How many parts the keys are split into."""
    return parts_at(work.shape[0] * work.shape[2], work.span, work.device)


def parts_at(units: int, span: int, device: torch.device) -> int:
    """As :func:`n_parts`, for so many samples times key-value heads and so many keys that a row reads at most."""
    if forced_parts is not None or device.type == "cpu":
        return forced_parts or 1
    return parts_of(units, max(span, 1) // FEWEST_KEYS, _processors(device.index))


class Tile(NamedTuple):
    """Rows of a tile and blocks of them, head dims of v padded, and the configuration."""

    bm: int
    row_blocks: int
    dv: int
    config: Config

    @classmethod
    def of(cls, work: Work, classes: int, heavy: bool = False, n_groups: int = 1) -> Tile:
        """A tile for all rows of a key-value head, once for each class."""
        _, heads, n_kv, n_queries, _ = work.shape
        rows = heads // n_kv * n_queries * classes
        bm = min(max(next_power(rows), 16), MOST_ROWS)
        heavy = heavy and (n_groups > 4 or bm > 16)
        config = choose(max(work.widths), work.dtype, bm, heavy, work.device.type == "cpu")
        if forced is None and work.device.type != "cpu":
            config = tuned.pick("decode", work.device, lambda: _facts(work, bm, classes, heavy, n_groups), config)
        return cls(bm, -(-rows // bm), max(next_power(work.widths[1]), 16), config)

    def constants(self, work: Work, asked: Values) -> Values:
        """The constants of ``decode_kernel``; ``asked`` are those from ``OUTPUT`` to ``WEIGHTED``."""
        _, heads, n_kv, _, _ = work.shape
        return (
            self.bm, self.config.keys, self.row_blocks, *work.widths, max(next_power(work.widths[0]), 16), self.dv,
            heads // n_kv, interpreted(), "ieee", *asked, *work.flags, work.edited != UNEDITED_FLAGS, *work.edited,
        )  # fmt: skip


def _facts(work: Work, rows: int, classes: int, heavy: bool, n_groups: int) -> list[object]:
    """What the best configuration may depend on, for :func:`~interp.attention.triton.tuned.pick`."""
    edited = "".join(str(int(x)) for x in (*work.flags, *work.edited))
    kind = f"{rows} rows,{classes} classes,{n_groups} groups{',statistics' if heavy else ''},{edited}"
    dims = f"{work.widths[0]}x{work.widths[1]}"
    return [str(work.dtype).removeprefix("torch."), dims, kind, tuned.bucket(max(work.span, 1))]
