"""Greedy's captions of the scenes that :mod:`proof_scenes` confirms on, cut at 10 to 80 words: the baseline of equal length.

    python tests/benchmarks/proof_greedy.py --keep FOLDER        # a CPU: half an hour; goes on where it was cut off

What a method gains by saying less, greedy gains by being cut. The curve is drawn into docs/assets/chair_frontier.png by
``proof_surface.py --draw``. Greedy's own figures stand beside those of ``proof_scenes.json``: they should be the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import proof_scenes
import torch
from _record import record
from _results import result

import interp
from interp.evaluation.captions import scene_captions
from interp.evaluation.tasks import Statistics

FIGURES = ("chair_s", "chair_i", "recall", "words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3000, help="scenes of both splits together, as in proof_scenes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", type=Path, help="a folder of the answers: a run that was cut off goes on")
    o = parser.parse_args()
    model = interp.load("scenes-lvlm", device=o.device, dtype="float32")
    proof_scenes.keep = o.keep
    before = {r["split"]: r for r in result("proof_scenes")["rows"] if r.get("setting") == "greedy"}
    rows = []
    for split in ("test", "against"):
        found = proof_scenes.run(model, scene_captions(split, max(1, o.n // 2), seed=1), [], o.batch, Statistics(1000))
        greedy = found.rows[0]
        rows.append(
            {
                "what": "greedy", "split": split, "n": greedy.n,
                **{f"chair {name}": [float(x) for x in greedy.figures[name][:3]] for name in FIGURES},
                "in proof_scenes": {name: before[split][f"chair {name}"][0] for name in FIGURES},
                "frontier": greedy.more["frontier"],
            }
        )  # fmt: skip
    record("proof_greedy", rows, note="Values are [value, low, high], 95 % bootstrap intervals by image.")


if __name__ == "__main__":
    main()
