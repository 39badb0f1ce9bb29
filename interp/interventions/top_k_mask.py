"""Masking of the top keys, or of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import MAX_DROPPED_KEYS, Edit, TopKeys
from interp.interventions._base import HeadPolicy, Strength, every_head
from interp.interventions.selection import positions_in_sample
from interp.models.anatomy import Site
from interp.tracing.calls import Lasting, RunState, SiteCall

MODES = ("drop", "keep")
SAMPLINGS = ("count", "bernoulli", "top")
MOST_AT_ONCE = 1 << 20
"""Draws made at once for all layers, which at every token costs what one layer does."""


@dataclass(frozen=True, eq=False)
class TopKMask(HeadPolicy):
    """Hide the keys that a row attends to most, or all but those (Zhang et al. 2024, ACMIL, https://arxiv.org/abs/2311.07125).

    ``drop`` takes from each row's ``k`` top keys some out of the softmax, so that attention must spread (ACMIL's STKIM, there
    in training; Sparsifiner and top-k attention, https://arxiv.org/abs/2303.13755, are ``keep``, which leaves the ``k`` top
    keys alone). The rest of the row is renormalised by the softmax. A row always keeps a key.

    Keys are ranked by their scores as all interventions together make them (temperatures, boosts, windows), whatever the
    order in which they are given.

    When not to use it: ``drop`` with k near the number of keys; ``keep`` to save time (the scores are computed all the same,
    and on a GPU twice).

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
        if self.mode == "keep":
            return self.kept(call, "keep", lambda: Edit((TopKeys(self.k, where=where),)), of=(where,))
        if self.sampling == "top":
            return self.kept(call, "top", lambda: self._drops(_by_rank(self.k, call.q.device), where), of=(where,))
        draws = self._draws(call)
        # Tokens and layers differ in their draws alone, so that one of them is checked for all.
        family = self.kept(call, ("drawn", draws.shape), lambda: self._drops(draws, where), of=(where,))
        return family.redrawn(draws)

    def lasting(self, call: SiteCall) -> Lasting | None:
        drawn = self.mode == "drop" and self.sampling != "top"
        return None if not self.idle and (drawn or call.k.shape[2] <= max(self.k, 1)) else self.unvarying(call)

    def _drops(self, draws: Tensor, where: Tensor) -> Edit:
        return Edit((TopKeys(self.k, draws, self.p, self.sampling != "bernoulli", where),))

    def _draws(self, call: SiteCall) -> Tensor:
        """``[B|1, H, Lq, k]``; those of all layers are made at once where they are few."""
        n_heads = call.site.n_heads
        sites = call.run.anatomy.stacks[call.site.stack]
        layers = sorted({site.layer for site in sites})

        def drawn(layer: int | Tensor) -> Tensor:
            return uniform_draws(self.seed, layer, range(n_heads), positions_in_sample(call), self.k).to(call.q.device)

        if len(layers) * call.q.shape[0] * call.q.shape[2] * n_heads * self.k > MOST_AT_ONCE:
            return drawn(call.site.layer)
        key = ("draws", call.site.stack, n_heads, call.mask.q_offset, call.q.shape[0], call.q.shape[2], call.q.device)
        all_layers = self.kept(call, key, lambda: drawn(torch.tensor(layers)).unbind(0), lasting=False)
        return all_layers[layers.index(call.site.layer)]


def _by_rank(k: int, device: torch.device) -> Tensor:
    """Draws by which the largest are hidden first."""
    return torch.arange(k, dtype=torch.float32, device=device).view(1, 1, 1, k)


def uniform_draws(seed: int, layer: int | Tensor, heads: Sequence[int], positions: Tensor, count: int) -> Tensor:
    """Draws in [0, 1), ``[B|1, n, L, count]``, that depend on seed, layer, head, position and place alone (a hash of them).

    With layers ``[m]`` there is a first axis of m.
    """
    device = positions.device
    place = torch.arange(count, device=device)
    number = torch.tensor(heads, device=device)[None, :, None, None]
    layers = torch.as_tensor(layer, device=device)
    state = _mixed(seed * 1_000_003 + (layers.view(-1, 1, 1, 1, 1) if layers.ndim else layers))
    for part in (number, positions[:, None, :, None], place):
        state = _mixed(state + part)
    return (state & 0xFFFFFF).float() / (1 << 24)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int64 that scatters neighbours (the finaliser of SplitMix64, with shifts of the signed number)."""
    x = x + -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
