"""Attention that patches of a vision tower receive, put at the text positions that stand for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.attention import Readout, attend
from interp.models.anatomy import Site
from interp.models.layout import KINDS, Layout
from interp.tracing.calls import Intervention, InterventionError, RunState, SiteCall

Picture = tuple[tuple[int, Tensor], list[Tensor]]


class TowerScores:
    """Attention each key of the tower gets from the class token (or from the mean row), summed over heads.

    A tower that calls its attention window by window hands over its sequence piece by piece.
    """

    def __init__(self, sites: Sequence[Site], scored_by: str) -> None:
        self.sites, self.scored_by = tuple(sites), scored_by
        self.pieces: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    @property
    def seen(self) -> bool:
        return any(self.pieces.values())

    def read(self, call: SiteCall) -> None:
        """Take the scores of one call of one of the sites, before anything edits it."""
        rows = slice(0, 1) if self.scored_by == "cls" else slice(None)
        bias = call.bias if call.bias is None or call.bias.shape[2] == 1 else call.bias[:, :, rows]
        found = attend(
            call.q[:, :, rows].detach(), call.k.detach(), call.v.detach(), scale=call.scale, softcap=call.softcap, sinks=call.sinks,
            mask=call.mask if self.scored_by == "mean" else call.mask.rows(0, 1), bias=bias, want_output=False,
            readout=Readout(received=True),
        ).readings.received  # fmt: skip
        assert found is not None
        scores = found.sum((1, 2)).cpu() / (1 if self.scored_by == "cls" else call.q.shape[2])
        pieces = self.pieces[call.site.name]
        if call.mask.kv_offset and pieces:
            pieces[-1] = torch.cat([pieces[-1], scores], -1)
        else:
            pieces.append(scores)

    def by_picture(self, who: Intervention, run: RunState, length: int) -> Iterator[Picture]:
        """For each picture of the prompt: ``(sample, positions [n])`` in the text, and each site's scores ``[n]`` there.

        Raises:
            InterventionError: the tower's patches do not correspond to positions of the text.
        """
        name = type(who).__name__
        tower, text = run.layouts.get("vision"), run.layouts.get("text")
        if tower is None or text is None:
            raise InterventionError(
                f"{name} must know which patch stands where; {type(run.module).__name__} does not tell. {run.layout_problem}"
            )
        # The last positions of the prompt are those of this run; earlier ones are in the cache.
        shift = length - text.shape[1]
        tables = [self._table(who, run, site, tower) for site in self.sites]
        for sample, image, tile in _pictures(text):
            mine = (
                (text.image[sample] == image)
                & (text.tile[sample] == tile)
                & (text.kind[sample] == KINDS.index("image"))
            )
            theirs = (tower.prompt == sample) & (tower.image == image) & (tower.tile == tile)
            theirs &= tower.kind == KINDS.index("image")
            cells = np.stack([text.row[sample][mine], text.column[sample][mine]], -1)
            patches = np.stack([tower.row[theirs], tower.column[theirs]], -1)
            merge = _merge(cells, patches)
            if not merge:
                raise InterventionError(
                    f"{name} needs the tower's patches at positions of their own in the text; in {type(run.module).__name__} the "
                    f"{mine.sum()} positions of image {image}, tile {tile} do not stand for its {theirs.sum()} patches"
                )
            where = {tuple(cell): n for n, cell in enumerate(cells.tolist())}
            owner = torch.tensor([where[row // merge, column // merge] for row, column in patches.tolist()])
            counts = torch.zeros(len(cells)).index_add_(0, owner, torch.ones(len(owner)))
            scores = [
                torch.zeros(len(cells)).index_add_(0, owner, table[torch.from_numpy(theirs)]) / counts
                for table in tables
            ]
            yield (sample, torch.from_numpy(np.flatnonzero(mine)) + shift), scores

    def _table(self, who: Intervention, run: RunState, site: Site, tower: Layout) -> Tensor:
        """Scores ``[picture, position]`` in the layout's order; beams repeat the pictures of a sample."""
        got = torch.cat(self.pieces[site.name]).float() if self.pieces[site.name] else torch.zeros(0, 0)
        wanted = tower.shape
        samples = int(tower.prompt.max()) + 1
        times, rest = divmod(len(got), max(1, wanted[0]))
        if got.shape[1:] != wanted[1:] or rest or not times:
            raise InterventionError(
                f"{type(who).__name__} must recognise the tower's sequences; {site.name} made {list(got.shape)} scores for "
                f"{list(wanted)} positions"
            )
        if times == 1:
            return got
        pixels: Any = run.inputs.get("pixel_values")
        by_sample = isinstance(pixels, Tensor) and len(pixels) == samples
        return got.unflatten(0, (samples, times, -1))[:, 0].flatten(0, 1) if by_sample else got[::times]


def require_class_token(who: Intervention, run: RunState, cached: bool) -> None:
    """Raise unless the tower's sequence begins with a class token.

    Raises:
        InterventionError: it has none, or what it holds cannot be told.
    """
    if cached and not any("pixel" in name for name in run.inputs):
        return
    tower = run.layouts.get("vision")
    if tower is None:
        raise InterventionError(
            f"{type(who).__name__} must know the vision tower's positions; {type(run.module).__name__} does not tell. "
            f"{run.layout_problem}"
        )
    if (tower.kind[:, 0] != KINDS.index("special")).any():
        raise InterventionError(
            f"{type(who).__name__} scores patches by the class token's attention, and the vision tower of {type(run.module).__name__} has "
            "none; scored_by='mean' takes the mean row"
        )


def _pictures(text: Layout) -> list[tuple[int, int, int]]:
    """``(sample, image, tile)`` of everything with image positions, in order."""
    samples, positions = np.nonzero(text.kind == KINDS.index("image"))
    found = zip(
        samples.tolist(), text.image[samples, positions].tolist(), text.tile[samples, positions].tolist(), strict=True
    )
    return list(dict.fromkeys(found))


def _merge(cells: np.ndarray[Any, Any], patches: np.ndarray[Any, Any]) -> int:
    """Side of the squares of patches that became one position each; 0 where they did not."""
    if not len(cells) or not len(patches) or (cells < 0).any() or (patches < 0).any():
        return 0
    sides = (patches.max(0) + 1) / (cells.max(0) + 1)
    merge = int(sides[0])
    whole = set(map(tuple, cells.tolist())) == set(map(tuple, (patches // max(merge, 1)).tolist()))
    return (
        merge if merge == sides[0] == sides[1] and whole and len({*map(tuple, patches.tolist())}) == len(patches) else 0
    )
