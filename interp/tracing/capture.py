"""The user's wish: which readouts, for which stacks, layers, heads and query rows (:class:`Capture`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from interp.heads import Heads, as_heads
from interp.models.anatomy import Anatomy, Site

Rows = Literal["all", "last", "prefill", "generated"] | Sequence[int]
Metric = Literal["euclidean", "hop"]
METRICS = ("euclidean", "hop")
ROW_WORDS = ("all", "last", "prefill", "generated")
DEFAULT_MEMORY_LIMIT = 4 * 2**30


class CaptureError(ValueError):
    """A capture that names something the model does not have, or that contradicts itself."""


class CaptureTooLargeError(CaptureError):
    """What the capture asks for does not fit under its memory limit; raised before anything is computed."""


@dataclass(frozen=True)
class Capture:
    """Which readings to keep. Nothing is captured unless it is named here.

    One keyword per readout (see :class:`interp.attention.Readings` for shapes and units):

    Args:
        row_stats: lse, top_weight, top_key, entropy, mass, sink_share of every selected row.
        topk: the k largest weights and their keys, k <= 8.
        group_output: rows (as ``queries``) for which each key group's contribution to z is kept.
        received: column sums per key; prefill and generated rows are separate query groups.
        pooled: P for block sums of the prefill map on a grid of at most P x P.
        offset: histogram of key-query offset, 1-D over tokens, 2-D over patches.
        distance: ``"euclidean"`` or ``"hop"`` (Chebyshev): per row, the sum of weight times distance over ordinary keys, and of their
            weight, in tokens or patches; much faster than ``offset``.
        rows: rows (as ``queries``) whose exact attention is kept.
        attention: the full map. Quadratic: 34 GB at 4k tokens for a 7B model, hence the memory limit.
        z: the output of every head, before the output projection.

    and what to take them from:

    Args:
        stacks: names of stacks; None is all.
        layers: layer numbers (of every captured stack), or a mapping from stack to layer numbers; None is all.
        heads: heads such as ``"L3H1,L5H0-3"`` or anything :func:`interp.heads.as_heads` takes; None is all.
        queries: which rows: ``"all"``, ``"prefill"``, ``"generated"``, ``"last"`` (the last row of each call: the one that
            produces a token) or absolute positions. Column readouts count only these rows.
        groups: int codes per key position ``[position]`` or ``[sample, position]`` of the text stack in place of the layout's
            kinds (special, text, image, generated); later positions get the last code.
        group_names: names of those codes.
        memory_limit: bytes that the readings of one trace may take; default 4 GiB.

    Raises:
        CaptureError: an unknown row word, k > 8, more than 8 groups, nothing asked for.
    """

    row_stats: bool = False
    topk: int = 0
    group_output: Rows | None = None
    received: bool = False
    pooled: int = 0
    offset: bool = False
    distance: Metric | None = None
    rows: Rows | None = None
    attention: bool = False
    z: bool = False
    stacks: Collection[str] | None = None
    layers: Collection[int] | Mapping[str, Collection[int]] | None = None
    heads: Any = None
    queries: Rows = "all"
    groups: Any = None
    group_names: tuple[str, ...] | None = None
    memory_limit: int = DEFAULT_MEMORY_LIMIT

    def __post_init__(self) -> None:
        for name in ("queries", "rows", "group_output"):
            value = getattr(self, name)
            if isinstance(value, str) and value not in ROW_WORDS:
                raise CaptureError(f"{name} must be one of {ROW_WORDS} or a sequence of positions, got {value!r}")
            if isinstance(value, bool):
                raise CaptureError(f"{name} must say which rows ({', '.join(ROW_WORDS)} or positions), got {value!r}")
        if isinstance(self.stacks, str):
            object.__setattr__(self, "stacks", (self.stacks,))
        if not 0 <= self.topk <= 8:
            raise CaptureError(f"topk must be between 0 and 8, got {self.topk}")
        if self.distance is not None and self.distance not in METRICS:
            raise CaptureError(f"distance must be one of {METRICS} or None, got {self.distance!r}")
        if self.pooled is True or self.pooled < 0:
            raise CaptureError(f"pooled must be a grid size such as 64, got {self.pooled!r}")
        if self.groups is not None:
            codes = torch.as_tensor(self.groups)
            low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
            if codes.ndim not in (1, 2) or low < 0:
                raise CaptureError(
                    f"groups must be codes >= 0 of shape [position] or [sample, position], got shape {tuple(codes.shape)}, min {low}"
                )
            if high > 7:
                raise CaptureError(f"groups must name at most 8 key groups (codes 0..7), got code {high}")

    @property
    def empty(self) -> bool:
        return not (
            self.row_stats or self.topk or self.received or self.pooled or self.offset or self.attention or self.z
        ) and all(x is None for x in (self.group_output, self.rows, self.distance))

    def describe(self) -> dict[str, Any]:
        """The settings that differ from the default, JSON-able."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default if not isinstance(value, Tensor) else True:
                out[f.name] = _plain(value)
        return out

    def resolve(self, anatomy: Anatomy) -> Selection:
        """Check the selection against a model, early.

        Raises:
            CaptureError: an unknown stack or layer, or heads the model does not have.
        """
        known = anatomy.stacks
        stacks = list(known) if self.stacks is None else list(self.stacks)
        if self.heads is not None and self.stacks is None:
            named = as_heads(self.heads, anatomy.shapes())
            stacks = [s for s in known if any(h.stack == s for h in named)]
        for stack in stacks:
            if stack not in known:
                raise CaptureError(f"stacks must be among {list(known)} of {anatomy.model_class}, got {stack!r}")
        heads = None if self.heads is None else as_heads(self.heads, anatomy.shapes())
        if heads is not None and len(heads) == 0:
            raise CaptureError("heads must name at least one head, got none")
        layers: dict[str, list[int]] = {}
        for stack in stacks:
            given: Any = self.layers
            wanted = given.get(stack) if isinstance(given, Mapping) else given
            n_layers = anatomy.shape(stack)[0]
            if wanted is not None:
                numbers = sorted({int(n) + n_layers if int(n) < 0 else int(n) for n in wanted})
                wrong = [n for n in numbers if not 0 <= n < n_layers]
                if wrong:
                    raise CaptureError(f"layers must be within 0..{n_layers - 1} of stack {stack!r}, got {wrong}")
                layers[stack] = numbers
            elif heads is not None:
                layers[stack] = sorted({h.layer for h in heads if h.stack == stack})
            else:
                layers[stack] = list(range(n_layers))
        return Selection(layers, heads)


@dataclass(frozen=True)
class Selection:
    """A capture's stacks, layers and heads, resolved on one model."""

    layers: Mapping[str, list[int]]
    heads: Heads | None

    def of(self, site: Site) -> list[int] | None:
        """Query heads wanted of a site; None where the site is not captured."""
        if site.layer not in self.layers.get(site.stack, ()):
            return None
        if self.heads is None:
            return list(range(site.n_heads))
        mine = [h.head for h in self.heads if h.stack == site.stack and h.layer == site.layer]
        return mine or None


def select_rows(rows: Rows, start: int, count: int, generated: bool, prompt_length: int) -> list[tuple[int, int]]:
    """Rows of one call that a selection wants, as ``(first, stop)`` runs of row indices within the call.

    Args:
        rows: the selection.
        start: absolute position of the call's first row.
        count: number of rows of the call.
        generated: whether the call's rows come after the prompt.
        prompt_length: length of the prompt; negative positions count from it.
    """
    if rows == "all" or (rows == "prefill" and not generated) or (rows == "generated" and generated):
        return [(0, count)]
    if rows == "last":
        return [(count - 1, count)]
    if isinstance(rows, str):
        return []
    wanted = sorted({(int(r) + prompt_length if int(r) < 0 else int(r)) - start for r in rows})
    runs: list[tuple[int, int]] = []
    for row in (r for r in wanted if 0 <= r < count):
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def estimate_bytes(capture: Capture, site: Site, batch: int, heads: int, n_queries: int, n_keys: int) -> dict[str, int]:
    """Bytes that each readout of one site takes for one call, by name (fp32)."""
    per_row = batch * heads * n_queries * 4
    sizes = {
        "row_stats": per_row * (6 + 4) if capture.row_stats else 0,
        "topk": per_row * 2 * capture.topk,
        "received": batch * heads * n_keys * 4 * 4 if capture.received else 0,
        "pooled": batch * heads * min(capture.pooled, n_queries) * min(capture.pooled, n_keys) * 4,
        "offset": batch * heads * (n_queries + n_keys) * 4 if capture.offset else 0,
        "distance": per_row * 2 if capture.distance else 0,
        "attention": per_row * n_keys if capture.attention else 0,
        "z": per_row * site.v_head_dim if capture.z else 0,
        "rows": per_row * n_keys if capture.rows in ("all", "prefill") else 0,
        "group_output": per_row * 4 * site.v_head_dim if capture.group_output in ("all", "prefill") else 0,
    }
    return {name: size for name, size in sizes.items() if size}


INSTEAD = {
    "attention": "pooled=64 (block sums), row_stats=True, received=True, or rows=[...] for the rows you need",
    "rows": "rows=[...] for fewer rows, or topk=8",
    "z": "heads= or layers= to select, or queries='last'",
    "group_output": "group_output='last' or a few rows",
}


def check_fits(capture: Capture, sizes: Mapping[str, int], n_sites: int) -> None:
    """Refuse a capture that would pass its limit; ``sizes`` is one site's, ``n_sites`` how many will follow.

    Raises:
        CaptureTooLargeError: names the size, the limit and what to ask for instead.
    """
    total = sum(sizes.values()) * n_sites
    if total <= capture.memory_limit:
        return
    worst = max(sizes, key=lambda name: sizes[name])
    raise CaptureTooLargeError(
        f"capture must fit in memory_limit={capture.memory_limit / 2**30:.2f} GiB, but {n_sites} sites need about "
        f"{total / 2**30:.2f} GiB, most of it for {worst} ({sizes[worst] * n_sites / 2**30:.2f} GiB). "
        f"Ask for {INSTEAD.get(worst, 'fewer layers, heads or rows')} instead, select layers= or heads=, or raise memory_limit="
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, Collection):
        return [_plain(v) for v in value]
    return str(value)
