"""Masking of the top keys, or of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from interp.attention import MAX_DROPPED_KEYS, DropKeys, Edit, Readout, Threshold, attend, combine
from interp.attention.call import Tile, tile_edit
from interp.interventions._base import HeadPolicy, Strength, every_head
from interp.interventions.selection import positions_in_sample
from interp.models.anatomy import Site
from interp.tracing.calls import RunState, SiteCall

MODES = ("drop", "keep")
SAMPLINGS = ("count", "bernoulli", "top")
BLOCK = 1 << 24
"""Weights looked at at once: the keys of a row are ranked by blocks of rows, so that no whole map is held."""


@dataclass(frozen=True, eq=False)
class TopKMask(HeadPolicy):
    """Hide the keys that a row attends to most, or all but those (Zhang et al. 2024, ACMIL, https://arxiv.org/abs/2311.07125).

    ``drop`` takes from each row's ``k`` top keys some out of the softmax, so that attention must spread (ACMIL's STKIM, there
    in training; Sparsifiner and top-k attention, https://arxiv.org/abs/2303.13755, are ``keep``, which leaves the ``k`` top
    keys alone). The rest of the row is renormalised by the softmax. A row always keeps a key.

    Keys are ranked by the weights that the interventions before this one give; one after it that changes scores (a
    temperature, a boost) shifts what ``keep`` holds, so put this one last.

    When not to use it: ``drop`` with k near the number of keys; ``keep`` to save time (the scores are computed all the same,
    and twice).

    Args:
        heads: what :func:`interp.heads.as_heads` takes. An empty set changes nothing.
        k: top keys of a row; 10 in ACMIL. For ``drop`` at most 32. 0 changes nothing: the tokens stay identical.
        mode: ``drop`` or ``keep``.
        p: share of the top keys that is dropped; 0.6 in ACMIL. 0 changes nothing (in mode ``drop``).
        sampling: which of them: ``count`` hides exactly ``int(min(k, keys) * p)``, drawn without replacement (the released
            code); ``bernoulli`` hides each with probability p (the paper); ``top`` hides the ``int(min(k, keys) * p)``
            largest, without chance.
        seed: of the draws, which depend on layer, head and position in the sample alone: the same with and without a cache,
            in a batch and alone.
        scope, rows: as for :class:`~interp.interventions.MaskHeads`.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model does not have.
        ValueError: a negative k, more than 32 keys to drop, p outside 0 .. 1, an unknown mode or sampling.
    """

    _: KW_ONLY
    k: int = 10
    mode: Literal["drop", "keep"] = "drop"
    p: float = 0.6
    sampling: Literal["count", "bernoulli", "top"] = "count"
    seed: int = 0

    paper: ClassVar[str] = "https://arxiv.org/abs/2311.07125"
    unit: ClassVar[str] = "keys of a row"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("mode", MODES), ("sampling", SAMPLINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        most = MAX_DROPPED_KEYS if self.mode == "drop" else None
        if (
            isinstance(self.k, bool)
            or not isinstance(self.k, int)
            or self.k < 0
            or (most is not None and self.k > most)
        ):
            raise ValueError(
                f"k must be a whole number >= 0{'' if most is None else f' and at most {most} to drop'}, got {self.k!r}"
            )
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must be a share within 0 .. 1, got {self.p!r}")

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> TopKMask:
        return cls(every_head(model), k=2 if strength == "on" else 0, p=1.0)

    @property
    def idle(self) -> bool:
        """Whether nothing will be masked."""
        return self.k == 0 or (self.mode == "drop" and self.p == 0)

    def acts_on(self, site: Site, run: RunState) -> bool:
        return not self.idle and super().acts_on(site, run)

    def before(self, call: SiteCall) -> Edit | None:
        where = None if self.idle else self.where(call)
        n_keys = call.k.shape[2]
        if where is None or n_keys == 1 or (self.mode == "keep" and self.k >= n_keys):
            return None
        mine = self.mine(call)
        # One readout for all layers that are asked the same: the op prepares for each once.
        key = ("readouts", mine, tuple(call.q.shape[:3]), n_keys, call.q.device)
        readouts = self.kept(call, key, lambda: _readouts(call, mine), lasting=False)
        found = top_keys(call, min(self.k + 1, n_keys), readouts)
        shape = (*call.q.shape[:3],)
        if self.mode == "keep":
            value = torch.full(shape, -torch.inf, device=call.q.device)
            value[:, mine] = _between(found, self.k)
            return Edit((Threshold(value, where),))
        top = found.keys[..., : self.k]
        keys = torch.full((*shape, top.shape[-1]), -1, dtype=torch.int64, device=call.q.device)
        keys[:, mine] = torch.where(self._dropped(call, mine, found), top, -1)
        return Edit((DropKeys(keys, where),))

    def _dropped(self, call: SiteCall, mine: Sequence[int], found: TopKeys) -> Tensor:
        """Which of the k top keys to hide, bool ``[B, n, Lq, k]``."""
        # One key more than the top ones was looked for: where there is none, a top key must stay.
        most = ((found.weights > 0).sum(-1, keepdim=True) - 1).clamp_min(0)
        there = found.weights[..., : self.k] > 0
        count = there.sum(-1, keepdim=True)
        rank = torch.arange(there.shape[-1], device=there.device)
        if self.sampling == "top":
            return there & (rank < torch.minimum((count * self.p).long(), most))
        draws = uniform_draws(self.seed, call.site.layer, mine, positions_in_sample(call), len(rank)).to(there.device)
        draws = draws.expand(there.shape).masked_fill(~there, 2.0)
        order = draws.argsort(-1).argsort(-1)
        wanted = (count * self.p).long() if self.sampling == "count" else (draws < self.p).sum(-1, keepdim=True)
        return there & (order < torch.minimum(wanted, most))


class TopKeys(NamedTuple):
    """Weights fp32 ``[B, n, Lq, k]``, descending, with absolute positions of their keys, and ``lse [B, n, Lq]``."""

    weights: Tensor
    keys: Tensor
    lse: Tensor


def top_keys(call: SiteCall, k: int, readouts: list[tuple[int, Readout]]) -> TopKeys:
    """The k largest weights of every row of chosen heads, as edited so far.

    Args:
        readouts: first row and readout of each block of rows (see :func:`_readouts`).
    """
    batch, n_heads, n_queries, _ = call.q.shape
    edit = combine(*call.edits)
    parts: list[TopKeys] = []
    for start, readout in readouts:
        stop = n_queries if len(readouts) == 1 else start + len(_rows(readout))
        q, mask, bias, part = call.q, call.mask, call.bias, edit
        if len(readouts) > 1:
            tile = Tile((0, batch), (0, n_heads), (start, stop), (0, call.k.shape[2]))
            q, mask, part = q[:, :, start:stop], mask.rows(start, stop), None if edit is None else tile_edit(edit, tile)
            bias = bias if bias is None or bias.shape[2] == 1 else bias[:, :, start:stop]
        readings = attend(
            q.detach(), call.k.detach(), call.v.detach(), scale=call.scale, mask=mask, softcap=call.softcap, sinks=call.sinks,
            bias=bias, edit=part, readout=readout, want_output=False,
        ).readings  # fmt: skip
        assert readings.rows is not None
        assert readings.lse is not None
        weights, slots = readings.rows.topk(k, dim=-1)
        parts.append(TopKeys(weights, slots + call.mask.kv_offset, readings.lse))
    return TopKeys(*(torch.cat([getattr(part, name) for part in parts], 2) for name in TopKeys._fields))


def _rows(readout: Readout) -> Tensor:
    assert readout.rows is not None
    return readout.rows


def _readouts(call: SiteCall, heads: Sequence[int]) -> list[tuple[int, Readout]]:
    """Readouts of whole rows, block by block."""
    batch, n_heads, n_queries, _ = call.q.shape
    device = call.q.device
    chosen = torch.tensor(heads, device=device)
    step = max(1, BLOCK // (batch * n_heads * call.k.shape[2]))
    return [
        (start, Readout(heads=chosen, rows=torch.arange(min(step, n_queries - start), device=device), row_stats=True))
        for start in range(0, n_queries, step)
    ]


def _between(found: TopKeys, k: int) -> Tensor:
    """A score between those of the k-th and the next key ``[B, n, Lq]``; nearly equal ones are all kept."""
    kth, following = found.weights[..., k - 1], found.weights[..., k]
    lowest = kth.log() + found.lse
    gap = (kth.log() - following.log()).clamp(max=1.0)
    margin = torch.maximum(gap / 2, 1e-5 * (1 + lowest.abs()))
    return torch.where(kth > 0, lowest - margin, -torch.inf)


def uniform_draws(seed: int, layer: int, heads: Sequence[int], positions: Tensor, count: int) -> Tensor:
    """Draws in [0, 1), ``[B|1, n, L, count]``, that depend on seed, layer, head, position and place alone (a hash of them)."""
    device = positions.device
    place = torch.arange(count, device=device)
    number = torch.tensor(heads, device=device)[None, :, None, None]
    state = _mixed(torch.tensor(seed * 1_000_003 + layer, device=device))
    for part in (number, positions[:, None, :, None], place):
        state = _mixed(state + part)
    return (state & 0xFFFFFF).float() / (1 << 24)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int64 that scatters neighbours (the finaliser of SplitMix64, with shifts of the signed number)."""
    x = x + -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
