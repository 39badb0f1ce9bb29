"""Which scores find heads that are known to do the job? The bundled planted models are the judge.

    python tests/benchmarks/proof_planted.py [vision] [retrieval] [--n 24]

In `scenes-lvlm-planted` only six of 64 heads can see the image, in `recall-lm-planted` only three of 48 see further than 16
tokens. Every score ranks all heads; the area under its ROC curve against the named ones is 1 where they all come first and
0.5 by chance. Intervals resample the samples (scenes, needles). Some scores read the image's mass directly, which a planted
head alone can have: they must reach 1 and are listed as a check, not as an achievement.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from _record import record

import interp
from interp.analysis import score
from probes.recall import KeyValueRecall, NeedleStrings
from probes.scenes.described import SceneDescriptions
from probes.scenes.pairs import ScenePairs

RESAMPLES = 1000


def area(values: np.ndarray[Any, Any], named: np.ndarray[Any, Any]) -> float:
    """Area under the ROC curve over heads; ties count half, missing heads are left out."""
    a, b = values[named], values[~named]
    a, b = a[np.isfinite(a)][:, None], b[np.isfinite(b)][None]
    return float(((a > b) + 0.5 * (a == b)).mean()) if a.size and b.size else float("nan")


def judged(found: Any, heads: Any, sign: int) -> dict[str, Any]:
    """Area of a score with its interval, and the best heads."""
    value = found.value.values
    named = heads.mask("text", *value.shape)
    row: dict[str, Any] = {
        "area": area(sign * value, named), "n": int(np.nanmax(found.n.values)), "heads": int(named.sum()), "of": value.size,
    }  # fmt: skip
    if "value_by_sample" in found:
        samples = found.value_by_sample.values
        rng = np.random.default_rng(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            areas = [
                area(sign * np.nanmean(samples[rng.integers(0, len(samples), len(samples))], 0), named)
                for _ in range(RESAMPLES)
            ]
        row["low"], row["high"] = (float(v) for v in np.nanpercentile(areas, [2.5, 97.5]))
    return row


def vision(n: int) -> list[dict[str, Any]]:
    """Scores of vision, and baselines that know nothing of images."""
    model = interp.load("scenes-lvlm-planted", device="cpu")
    probe = SceneDescriptions(n=n)
    tried: list[tuple[str, str, dict[str, Any], Any, int]] = [
        ("image_mass", "reads the plant", {}, probe, 1),
        ("image_centric", "reads the plant", {}, probe, 1),
        ("grounding", "reads the plant", {}, probe, 1),
        ("vision_aware_divergence", "score", {}, probe, 1),
        ("local_vision_divergence", "score", {}, probe, 1),
        ("attribution_patching", "gradient, counterfactual pairs", {}, ScenePairs(n=min(n, 18)), 1),
        ("activation_patching", "causal, counterfactual pairs", {}, ScenePairs(n=6), 1),
        ("entropy", "baseline", {}, None, 1),
        ("write_norm", "baseline", {}, None, 1),
    ]
    return _rows("scenes-lvlm-planted", model, tried)


def retrieval(n: int) -> list[dict[str, Any]]:
    """Scores of retrieval on needles further away than anything else sees."""
    model = interp.load("recall-lm-planted", device="cpu")
    needles = NeedleStrings(lengths=(256, 512), depths=(0.0, 0.25, 0.5), n=max(1, n // 6))
    tried: list[tuple[str, str, dict[str, Any], Any, int]] = [
        ("retrieval", "score", {}, needles, 1),
        ("query_mass", "score", {}, needles, 1),
        ("needle_contribution", "score", {}, needles, 1),
        ("query_mass", "score, key-value lookup", {}, KeyValueRecall(lengths=(256,), n=n), 1),
        ("induction", "score", {}, None, 1),
        ("streaming_mass", "reads the plant", {"sink": 1, "recent": 16}, needles, -1),
        ("entropy", "baseline", {}, None, 1),
        ("sink", "baseline", {}, None, -1),
        ("write_norm", "baseline", {}, None, 1),
    ]
    return _rows("recall-lm-planted", model, tried)


def _rows(name: str, model: Any, tried: list[tuple[str, str, dict[str, Any], Any, int]]) -> list[dict[str, Any]]:
    assert model.base_edit is not None
    rows: list[dict[str, Any]] = []
    for scored, kind, settings, probe, sign in tried:
        begun = time.perf_counter()
        row: dict[str, Any] = {"model": name, "score": ("" if sign > 0 else "low ") + scored, "kind": kind}
        try:
            warnings.filterwarnings("ignore", message="image_centric takes the model")
            row |= judged(score(scored, model, probe, progress=False, **settings), model.base_edit.heads, sign)
        except ValueError as error:
            row["failed"] = " ".join(str(error).split())[:200]
        row["seconds"] = round(time.perf_counter() - begun, 1)
        print(row, flush=True)
        rows.append(row)
    return rows


PARTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {"vision": vision, "retrieval": retrieval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="both where none is named")
    parser.add_argument("--n", type=int, default=24, help="samples")
    options = parser.parse_args()
    names = options.parts or list(PARTS)
    rows = [row for name in names for row in PARTS[name](options.n)]
    if len(names) == len(PARTS):
        record("planted", rows, note="Area under ROC over heads against the named ones; 95 % intervals by sample.")


if __name__ == "__main__":
    main()
