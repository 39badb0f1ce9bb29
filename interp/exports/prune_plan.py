"""Which of the wanted heads can be taken out of a checkpoint whose config has one number of heads for all its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from interp.models.anatomy import Site


class PruneError(ValueError):
    """Heads that cannot be removed from this model's checkpoint."""


class Cut(NamedTuple):
    """What is removed from each site of a config.

    Attributes:
        heads: removed query heads by name of the site.
        n_heads: query heads that stay in each.
        n_kv_heads: key-value heads that stay in each.
    """

    heads: dict[str, frozenset[int]]
    n_heads: int
    n_kv_heads: int

    @property
    def size(self) -> int:
        return sum(map(len, self.heads.values()))


def exact(wanted: Mapping[Site, frozenset[int]]) -> Cut:
    """All wanted heads removed.

    A config says how many query heads every layer has, and how many key-value heads they share evenly.

    Raises:
        PruneError: layers that would keep different numbers, groups that would, or nothing left.
    """
    _require_alike(wanted)
    for cut in cuts(wanted):
        if all(cut.heads[site.name] == heads for site, heads in wanted.items()):
            return cut
    first = next(iter(wanted))
    size = first.n_heads // first.n_kv_heads
    counts = {f"{site.stack} {site.layer}": len(heads) for site, heads in wanted.items()}
    if any(count == site.n_heads for count, site in zip(counts.values(), wanted, strict=True)):
        raise PruneError(
            f"heads must leave at least one in every layer, got all of a layer: {counts} of {first.n_heads}"
        )
    if len(set(counts.values())) > 1:
        raise PruneError(
            f"heads must be as many in every layer, since the config has one number for all; got, by layer, {counts} "
            "(uneven='zero' removes what it can and zeroes the rest)"
        )
    groups = {f"{site.stack} {site.layer}": _by_group(site, heads) for site, heads in wanted.items()}
    raise PruneError(
        f"heads must leave every key-value head that stays the same number of its {size} query heads, in every layer; got, removed of "
        f"each key-value head by layer, {groups} (uneven='zero' removes what it can and zeroes the rest)"
    )


def cuts(wanted: Mapping[Site, frozenset[int]]) -> list[Cut]:
    """Every even cut within the wanted heads, the largest first; only such as remove something.

    Whole key-value heads with all their query heads, then the same number of query heads of each that stays.
    """
    _require_alike(wanted)
    first = next(iter(wanted))
    n_kv, size = first.n_kv_heads, first.n_heads // first.n_kv_heads
    full = {site: [g for g in range(n_kv) if _group(g, size) <= heads] for site, heads in wanted.items()}
    found: list[Cut] = []
    for whole in range(min(n_kv - 1, *(len(groups) for groups in full.values()), n_kv) + 1):
        gone = {site: set(groups[:whole]) for site, groups in full.items()}
        rest = {
            site: [heads & _group(g, size) for g in range(n_kv) if g not in gone[site]]
            for site, heads in wanted.items()
        }
        least = min(len(part) for parts in rest.values() for part in parts)
        for each in range(min(least, size - 1) + 1):
            heads = {
                site.name: frozenset().union(
                    *(_group(g, size) for g in gone[site]), *(sorted(part)[:each] for part in rest[site])
                )
                for site in wanted
            }
            found.append(Cut(heads, (n_kv - whole) * (size - each), n_kv - whole))
    return sorted((cut for cut in found if cut.size), key=lambda cut: -cut.size)


def _require_alike(wanted: Mapping[Site, frozenset[int]]) -> None:
    shapes = {(site.n_heads, site.n_kv_heads) for site in wanted}
    if len(shapes) > 1:
        raise PruneError(f"layers of one config must have the same heads and key-value heads, got {sorted(shapes)}")


def _group(number: int, size: int) -> frozenset[int]:
    return frozenset(range(number * size, (number + 1) * size))


def _by_group(site: Site, heads: frozenset[int]) -> list[int]:
    size = site.n_heads // site.n_kv_heads
    return [len(heads & _group(g, size)) for g in range(site.n_kv_heads)]
