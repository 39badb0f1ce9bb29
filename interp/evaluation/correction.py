"""Tests over many settings and parts at once: sign flips by image, corrected by the largest statistic (max-T)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from interp.scores_statistics import adjust_p_values
from probes.intervals import Floats, unit_index
from probes.samples import ProbeError

BLOCK = 2**22


class Tested(NamedTuple):
    """One comparison.

    Attributes:
        difference: mean over units of the unit's mean difference.
        t: that over its standard error; 0 where all differences are 0.
        p: two-sided, of the sign-flip test of this comparison alone.
        p_max_t: corrected over all comparisons by the distribution of the largest |t| (Westfall and Young 1993).
        p_bh: p corrected by Benjamini and Hochberg.
        n: units.
    """

    difference: float
    t: float
    p: float
    p_max_t: float
    p_bh: float
    n: int


def by_unit(units: Sequence[Hashable], differences: Sequence[float]) -> tuple[list[Hashable], Floats]:
    """Mean difference of every unit, in order of appearance."""
    names, index = unit_index(units)
    sums, counts = np.zeros(len(names)), np.bincount(index, minlength=len(names))
    np.add.at(sums, index, np.asarray(differences, dtype=np.float64))
    return names, sums / counts


def max_t(
    parts: Mapping[str, Mapping[str, Floats]], *, n_flips: int = 5000, seed: int = 0
) -> dict[tuple[str, str], Tested]:
    """Does each setting differ from the baseline in each part? Two-sided, all together.

    Without an effect a unit's difference is as likely its negative. All settings of one part are flipped together, since they
    have the same units: so what they share is kept. Parts share no units and are flipped apart.

    Args:
        parts: part to setting to differences ``[unit]``; all of a part of one length, of at least 2.
        n_flips: random sign assignments.
        seed: of those.

    Returns:
        By (part, setting).

    Raises:
        ProbeError: no comparison, or settings of one part with differences of several lengths.
    """
    if not any(parts.values()):
        raise ProbeError("parts must have at least one comparison, got none")
    rng = np.random.default_rng(seed)
    keys: list[tuple[str, str]] = []
    observed: list[Floats] = []
    flipped: list[Floats] = []
    means: list[Floats] = []
    counts: list[int] = []
    for part, settings in parts.items():
        if not settings:
            continue
        lengths = {len(values) for values in settings.values()}
        if len(lengths) > 1 or min(lengths) < 2:
            raise ProbeError(f"differences of part {part!r} must be of one length of at least 2, got {sorted(lengths)}")
        d = np.stack(list(settings.values()), axis=1)
        keys += [(part, name) for name in settings]
        counts += [len(d)] * d.shape[1]
        means.append(d.mean(0))
        observed.append(_t(np.ones((1, len(d))), d)[0])
        rows = max(1, BLOCK // len(d))
        blocks: list[Floats] = []
        for start in range(0, n_flips, rows):
            signs: Floats = rng.choice(np.array([-1.0, 1.0]), size=(min(rows, n_flips - start), len(d)))
            blocks.append(_t(signs, d))
        flipped.append(np.concatenate(blocks))
    t, null = np.abs(np.concatenate(observed)), np.abs(np.concatenate(flipped, axis=1))
    # Rounding must not tell a flip that is the data itself from the data.
    edge = t * (1 - 1e-9)
    p = (1 + (null >= edge).sum(0)) / (1 + n_flips)
    largest = null.max(1)
    corrected = (1 + (largest[:, None] >= edge).sum(0)) / (1 + n_flips)
    falsely = adjust_p_values(p.tolist(), "benjamini-hochberg")
    signed, mean = np.concatenate(observed), np.concatenate(means)
    return {
        key: Tested(float(mean[k]), float(signed[k]), float(p[k]), float(corrected[k]), float(falsely[k]), counts[k])
        for k, key in enumerate(keys)
    }


def _t(signs: Floats, d: Floats) -> Floats:
    """``[flip, setting]``; 0 where the mean is 0."""
    n = len(d)
    mean = signs @ d / n
    spread = np.sqrt(np.maximum((d**2).mean(0) - mean**2, 0) / (n - 1))
    return np.divide(mean, spread, out=np.where(mean == 0, 0.0, np.copysign(np.inf, mean)), where=spread > 0)
