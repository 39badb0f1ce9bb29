"""The statistics of the vision proof find what was put in, and a measurement in parts is the whole one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import proof_vision
from proof_vision import EFFECTS, SCORES, Measured, Resampling

POINTS, LAYERS, HEADS = 24, 4, 8


def made(seed: int, name: str = "one") -> Measured:
    """VHD goes with every effect, the other scores with none."""
    rng = np.random.default_rng(seed)
    shape = (POINTS, LAYERS, HEADS)
    truth = rng.standard_normal(shape[1:])
    scores = {k: rng.standard_normal(shape[1:]) + 0.1 * rng.standard_normal(shape) for k in SCORES}
    scores["VHD"] = truth + 0.1 * rng.standard_normal(shape)
    effects = {k: truth + 0.3 * rng.standard_normal(shape) for k in EFFECTS}
    return Measured(name, tuple(range(POINTS)), scores, effects, rng.standard_normal(POINTS), 1e-6, 1.0)


def part(whole: Measured, where: slice) -> Measured:
    scores, effects = ({k: v[where] for k, v in values.items()} for values in (whole.scores, whole.effects))
    return Measured(whole.name, whole.numbers[where], scores, effects, whole.margins[where], whole.floor, 0.5)


def test_the_score_that_goes_with_the_effect_is_found_and_no_other() -> None:
    rows = proof_vision.compared([made(0, "one"), made(1, "two")], Resampling(100, 400))
    pooled = {(r["effect"], r["score"]): r for r in rows if r["model"] == "pooled"}
    assert len(rows) == 3 * len(EFFECTS) * len(SCORES) and len(pooled) == len(EFFECTS) * len(SCORES)
    for (_, score), row in pooled.items():
        found = row["p max-T"] < 0.05
        assert found == (score == "VHD")
        assert len(row["rho by seed"]) == 2
        assert np.isclose(row["rho"][0], np.mean(row["rho by seed"]))
    assert pooled["mean", "VHD"]["rho"][0] > 0.8 and pooled["mean", "VHD"]["partial rho"][0] > 0.8


def test_parts_joined_are_the_whole() -> None:
    whole = made(0)
    joined = proof_vision.joined([part(whole, slice(0, 10)), part(whole, slice(10, None))])
    assert joined.numbers == whole.numbers and joined.seconds == 1.0
    assert np.array_equal(joined.scores["VHD"], whole.scores["VHD"])
    assert np.array_equal(joined.effects["row"], whole.effects["row"])
    assert np.array_equal(joined.margins, whole.margins)


def test_what_is_kept_is_what_was_measured(tmp_path: Path) -> None:
    whole = made(0)
    proof_vision.kept([whole], tmp_path / "kept.npz")
    with np.load(tmp_path / "kept.npz") as kept:
        assert np.array_equal(kept["one/score/write norm"], whole.scores["write norm"])
        assert np.array_equal(kept["one/effect/mean"], whole.effects["mean"])
        assert tuple(kept["points"]) == whole.numbers


def test_effects_that_order_heads_alike_agree() -> None:
    rows = proof_vision.shape(made(0))
    assert rows[-1]["resample, mean"] > 0.8
    assert [len(r["mean |effect| by layer"]) for r in rows[:-1]] == [LAYERS] * len(EFFECTS)
