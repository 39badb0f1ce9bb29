"""Planted scenes models for statistics over trainings: 3 seeds x 2 strengths of the prior, with other heads for every seed.

``python data/build/variants.py FOLDER --minutes 4`` trains them one after another and skips those that are there.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import scenes_lvlm

STRENGTHS = (1.0, 0.5)
SEEDS = (1, 2, 3)
LAYERS, HEADS, FIRST, LAST = 8, 8, 2, 5
"""Named heads stand where the decoder has text to ask with and layers left to answer in."""


def heads_of(seed: int, n: int = 6) -> str:
    """Heads that a seed's models see the image with."""
    places = [(layer, head) for layer in range(FIRST, LAST + 1) for head in range(HEADS)]
    chosen = sorted(random.Random(f"planted {seed}").sample(places, n))
    return ",".join(f"L{layer}H{head}" for layer, head in chosen)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--minutes", type=float, default=None, help="of every training, instead of --steps")
    options.add_argument("--steps", type=int, default=2520)
    options.add_argument("--smoke", action="store_true", help="toys")
    chosen = options.parse_args(arguments)
    for seed in SEEDS[: 1 if chosen.smoke else None]:
        for strength in STRENGTHS:
            target = chosen.folder / f"scenes-lvlm-planted-{seed}-{strength:g}"
            if (target / "metrics.json").is_file():
                print(f"{target.name}: there already")
                continue
            planted = "L0H1,L1H0" if chosen.smoke else heads_of(seed)
            given = ["--seed", str(seed), "--strength", str(strength), "--planted", planted, "--out", str(target)]
            given += ["--minutes", str(chosen.minutes)] if chosen.minutes else ["--steps", str(chosen.steps)]
            scenes_lvlm.main([*given, *(["--smoke", "--steps", "5", "--vit", "none"] if chosen.smoke else [])])


if __name__ == "__main__":
    main()
