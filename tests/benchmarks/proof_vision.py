"""Do vision scores tell which heads hold hallucination down? Each score against the ablation's effect on the margin.

    python tests/benchmarks/proof_vision.py                            # the bundled model, a GPU, a minute or two
    python tests/benchmarks/proof_vision.py scenes-lvlm FOLDER FOLDER  # of several training seeds: each and pooled
    python tests/benchmarks/proof_vision.py --smoke                    # a quick look on a CPU, recorded nowhere

At points of mention of scenes whose typical companion is missing, where caption and prompt are given (teacher-forced):

- effect of a head: rise of the margin, log p(absent companion) - log p(present object), in nats, when its z is replaced. Above
  0 the head holds hallucination down. ``resample``: by its z under another scene's picture and the same text, at all rows;
  ``mean``: by its mean over the scenes at the same position (captions of one length); ``row``: as ``resample``, but at the row
  that decides alone, which is where the scores look.
- scores, at the row that decides: VHD (no picture), the picture exchanged for a third scene's (content in place of presence),
  local VHD (the picture hidden in that layer alone), mass on the picture; write norm as the baseline and covariate.

Order of heads within layers only (see `_layer_ranks.py`). The scores and the effects are means over scenes; intervals resample
scenes, or the heads of each layer; p is by permutation of the heads of each layer, also of the largest correlation over all scores.
The exchanged picture and `resample` both move z by a change of picture, so some agreement is built in: `mean` is the check.
Other trainings are made by `python data/build/scenes_lvlm.py --seed 1 --steps 2520 --text-steps 1415 --out FOLDER`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _layer_ranks import (
    Floats,
    by_heads,
    correlation,
    draws_of_samples,
    interval,
    reliability,
    resampled,
    shuffled,
)
from _record import record
from torch import Tensor

import interp
from interp.analysis.ablation import ablated
from interp.analysis.donors import means_of, outputs_of
from interp.analysis.image_inputs import z_with, z_without
from interp.analysis.local_divergence import knocked_out
from interp.analysis.replay import Replay
from interp.analysis.running import forward, on_grid
from interp.analysis.targets import Target
from interp.analysis.vision_divergence import VisionAwareDivergence
from interp.evaluation.forced import scene_margins
from interp.models.anatomy import anatomy
from interp.models.layout import layout
from interp.tracing.prompt import Prompt
from probes.margin import margins

SPLIT, SEED = "against", 3
"""Scenes that no setting was tuned or confirmed on."""
SCORES = ("VHD", "exchanged picture", "local VHD", "image mass", "write norm")
EFFECTS = ("resample", "mean", "row")
COVARIATE = "write norm"
say = partial(print, flush=True)


@dataclass(frozen=True)
class Point:
    """A point of mention: everything up to the word that is ``present`` or ``absent``."""

    inputs: dict[str, Tensor]
    present: int
    absent: int
    number: int

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


def points_of(model: Any, n: int) -> list[Point]:
    """Points whose two names part in one token, the same ones for every model of one tokenizer.

    Raises:
        ValueError: the margin of a point is not the one that :func:`probes.margin.margins` gives.
    """
    found: list[Point] = []
    items = []
    task = scene_margins(SPLIT, 2 * n, seed=SEED)
    for number, item in enumerate(task.items):
        tails = [
            model.tokenizer(f"{item.prefix} {name}", add_special_tokens=False)["input_ids"]
            for name in (item.present, item.absent)
        ]
        if len(found) == n:
            break
        if tails[0][:-1] != tails[1][:-1]:
            continue  # "a car" and "an apple" part at the article.
        given = dict(model.encode(item.prompt, image=item.image(), chat=item.chat))
        ids = given["input_ids"]
        more = torch.tensor([tails[0][:-1]], dtype=ids.dtype, device=ids.device)
        given["input_ids"] = torch.cat([ids, more], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        found.append(Point(given, tails[0][-1], tails[1][-1], number))
        items.append(item)
    if len(found) < n:
        raise ValueError(f"n must be at most the {len(found)} points there are, got {n}")
    checked = margins(model, [replace(i, image=i.image()) for i in items[:4]])
    for point, margin in zip(found, checked, strict=False):
        with torch.no_grad():
            mine = -difference(model(point.inputs).logits[0, -1], point)
        if abs(mine - margin.value) > 1e-3:
            raise ValueError(f"point {point.number} must have the margin {margin.value}, got {mine}")
    return found


def difference(logits: Tensor, point: Point) -> float:
    """Minus the margin: logit of the present name minus that of the absent one."""
    return float(logits[point.present].double() - logits[point.absent].double())


def exchanged(points: Sequence[Point], step: int) -> list[dict[str, Tensor]]:
    """The inputs of each point with the picture of the point ``step`` further on."""
    pictures = [p.inputs["pixel_values"] for p in points]
    return [{**p.inputs, "pixel_values": pictures[(k + step) % len(points)]} for k, p in enumerate(points)]


def read_scores(model: Any, points: Sequence[Point], batch: int) -> dict[str, Floats]:
    """Scores by name, each ``[point, layer, head]``, at the row that decides; points of one length."""
    parts: dict[str, list[Floats]] = {name: [] for name in SCORES}
    others = exchanged(points, 1)
    row = points[0].length - 1
    capture = interp.Capture(row_stats=True, z=True, group_output=(row,), queries=(row,), stacks=("text",))
    distance = VisionAwareDivergence().between
    for start in range(0, len(points), batch):
        part = slice(start, start + batch)
        inputs, other = (_together(x[part]) for x in ([p.inputs for p in points], others))
        data = forward(model, inputs, capture, "text")
        places = layout(model.module, inputs, model.tokenizer)["text"]
        prompt = Prompt(torch.from_numpy(places.kind.copy()), torch.from_numpy(places.image.astype("int16")))
        outputs = data["group_output"].rename(output_row="query").assign_coords(query=data["query"].values)
        found = {
            "VHD": distance(data["z"], z_without(model, inputs, prompt, (row,), "proof_vision")),
            "exchanged picture": distance(data["z"], z_with(model, other, (row,))),
            "local VHD": knocked_out(outputs, data["mass"], "image"),
            "image mass": data["mass"].sel(group="image", drop=True),
        }
        for name, values in found.items():
            parts[name].append(on_grid(values.mean("query"), model, "text"))
        parts[COVARIATE].append(
            write_norms(model, data["z"].transpose("sample", "layer", "head", "query", "dim").values)
        )
    return {name: np.concatenate(values) for name, values in parts.items()}


def write_norms(model: Any, z: Floats) -> Floats:
    """L2 norm ``[sample, layer, head]`` of what a head writes at the row; z is ``[sample, layer, head, 1, dim]``."""
    out = np.zeros(z.shape[:3])
    for site in anatomy(model.module).stacks["text"]:
        weight = (
            getattr(model.module.get_submodule(site.name), str(site.out_proj)).weight.detach().double().cpu().numpy()
        )
        slices = weight.reshape(weight.shape[0], site.n_heads, site.v_head_dim)
        out[:, site.layer] = np.linalg.norm(np.einsum("shd,mhd->shm", z[:, site.layer, :, 0], slices), axis=-1)
    return out


def read_effects(model: Any, points: Sequence[Point]) -> tuple[dict[str, Floats], Floats, float]:
    """Effects by name, each ``[point, layer, head]`` in nats, the plain margins ``[point]``, and the largest numerical floor."""
    parts: dict[str, list[Floats]] = {name: [] for name in EFFECTS}
    others = exchanged(points, 2)
    means = means_of(model, [p.inputs for p in points], "text")
    means = {layer: z.to(model.device) for layer, z in means.items()}
    plain: list[float] = []
    floor = 0.0
    for point, other in zip(points, others, strict=True):
        resample, own = outputs_of(model, other, "text"), outputs_of(model, point.inputs, "text")
        last = {layer: torch.cat([own[layer][:, :-1], z[:, -1:]], 1) for layer, z in resample.items()}
        target = Target((-1,), (point.present,), (point.absent,))
        with Replay(model, point.inputs, "text", positions=target.positions) as replay:
            plain.append(-difference(replay.logits()[0, -1], point))
            for name, donor in zip(EFFECTS, (resample, means, last), strict=True):
                value, null = ablated(replay, target, "logit_difference", kind="resample", donor=donor)
                parts[name].append(value)
                floor = max(floor, float(np.nanmax(np.abs(null))))
    return {name: np.concatenate(values) for name, values in parts.items()}, np.array(plain), floor


def _together(inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([x[name] for x in inputs]) for name in inputs[0]}


@dataclass(frozen=True)
class Measured:
    """What was measured on one model; all arrays ``[point, layer, head]`` in one order of points."""

    name: str
    numbers: tuple[int, ...]
    scores: dict[str, Floats]
    effects: dict[str, Floats]
    margins: Floats
    floor: float
    seconds: float


@dataclass(frozen=True)
class Work:
    """What one process measures: every ``parts``-th length of text, from the ``part``-th on."""

    name: str
    given: str
    device: str
    n: int
    batch: int
    part: int = 0
    parts: int = 1


def measured(work: Work) -> Measured | None:
    """Scores and effects of one model, in groups of one length; None where its part has no group."""
    begun = time.perf_counter()
    if work.device.startswith("cuda"):
        torch.cuda.set_device(work.device)
    model = interp.load(work.given, device=work.device, dtype="float32")
    points = points_of(model, work.n)
    lengths = {p.length: [q for q in points if q.length == p.length] for p in points}
    groups = [g for g in lengths.values() if len(g) >= 3][work.part :: work.parts]
    scores, effects, plain, floors = [], [], [], []
    with torch.no_grad():
        for group in groups:
            scores.append(read_scores(model, group, work.batch))
            found, values, floor = read_effects(model, group)
            effects.append(found)
            plain.append(values)
            floors.append(floor)
    seconds = time.perf_counter() - begun
    say(f"{work.name}: {sum(map(len, groups))} points, {seconds:.0f} s")
    if not groups:
        return None
    read, done = (_concatenated(parts) for parts in (scores, effects))
    numbers = tuple(p.number for g in groups for p in g)
    return Measured(work.name, numbers, read, done, np.concatenate(plain), max(floors), seconds)


def joined(parts: Sequence[Measured]) -> Measured:
    """One model's parts as one; its seconds are the sum over processes."""
    return Measured(
        parts[0].name, tuple(k for m in parts for k in m.numbers), _concatenated([m.scores for m in parts]),
        _concatenated([m.effects for m in parts]), np.concatenate([m.margins for m in parts]),
        max(m.floor for m in parts), sum(m.seconds for m in parts),
    )  # fmt: skip


def _concatenated(parts: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def kept(models: Sequence[Measured], path: Path) -> None:
    """Write what was measured, ``MODEL/KIND/NAME [point, layer, head]``, so that other statistics need no GPU."""
    arrays: dict[str, Any] = {"points": np.array(models[0].numbers)}
    for m in models:
        arrays |= {f"{m.name}/score/{k}": v for k, v in m.scores.items()}
        arrays |= {f"{m.name}/effect/{k}": v for k, v in m.effects.items()}
        arrays[f"{m.name}/margin"] = m.margins
    np.savez_compressed(path, **arrays)


@dataclass(frozen=True)
class Resampling:
    """How many draws of each kind."""

    resamples: int = 2000
    permutations: int = 10_000


@dataclass(frozen=True)
class Draws:
    """A correlation and its draws by scene, by head, and under the permutation of heads."""

    value: float
    scenes: Floats
    heads: Floats
    null: Floats


KINDS = {"": (False, False), "partial ": (True, False), "size ": (False, True), "size partial ": (True, True)}
"""What is put before a column's name: whether the write norm is taken off, and whether it is of the effect's size."""


def draws_of_effect(m: Measured, effect: str, how: Resampling, seed: int) -> dict[tuple[str, str], Draws]:
    """All correlations of one model with one effect, by score and kind."""
    return {
        (score, kind): draws_of(m, score, effect, how, seed, partially=partially, size=size)
        for score in SCORES
        for kind, (partially, size) in KINDS.items()
        if not (partially and score == COVARIATE)
    }


def draws_of(m: Measured, score: str, effect: str, how: Resampling, seed: int, *, partially: bool, size: bool) -> Draws:
    """The correlation of a score with an effect of one model.

    Args:
        seed: of heads and permutations; scenes are drawn alike for all models.
        partially: take off what the write norm has in both.
        size: of the size of the mean effect, whatever its sign.
    """
    turned = np.abs if size else np.asarray
    a, b, c = m.scores[score], m.effects[effect], m.scores[COVARIATE] if partially else None
    given = None if c is None else c.mean(0)
    means = (a.mean(0), turned(b.mean(0)))
    weights = draws_of_samples(len(a), how.resamples, 0)
    scenes = correlation(
        resampled(a, weights), turned(resampled(b, weights)), None if c is None else resampled(c, weights)
    )
    drawn = by_heads(means if given is None else (*means, given), how.resamples, seed)
    null = correlation(means[0], shuffled(means[1], how.permutations, seed), given)
    return Draws(float(correlation(*means, given)), scenes, correlation(*drawn), null)


def pooled(parts: Sequence[Draws]) -> Draws:
    """The mean over models."""
    value = float(np.mean([p.value for p in parts]))
    return Draws(value, *(np.mean([getattr(p, k) for p in parts], 0) for k in ("scenes", "heads", "null")))


def compared(models: Sequence[Measured], how: Resampling, pool: Executor | None = None) -> list[dict[str, Any]]:
    """One row a score and effect, for each model and pooled."""
    rows: list[dict[str, Any]] = []
    tasks = [(m, effect, how, seed) for effect in EFFECTS for seed, m in enumerate(models)]
    done = list((pool.map if pool else map)(draws_of_effect, *zip(*tasks, strict=True)))
    reliable = list((pool.map if pool else map)(reliabilities, models))
    for number, effect in enumerate(EFFECTS):
        each = done[number * len(models) : (number + 1) * len(models)]
        found = {key: [draws[key] for draws in each] for key in each[0]}
        for m, single, sure in zip(models, each, reliable, strict=True):
            rows += _rows(m.name, effect, single, len(m.margins), sure)
        if len(models) > 1:
            rows += _rows(
                "pooled", effect, {key: pooled(parts) for key, parts in found.items()}, len(models[0].margins),
                {name: float(np.mean([sure[name] for sure in reliable])) for name in reliable[0]},
                {key: [p.value for p in parts] for key, parts in found.items()},
            )  # fmt: skip
    return rows


def reliabilities(m: Measured) -> dict[str, float]:
    """Split-half reliability of every score and effect of one model."""
    return {name: reliability(values) for name, values in (m.scores | m.effects).items()}


def _rows(
    model: str, effect: str, found: dict[tuple[str, str], Draws], n: int, reliable: dict[str, float],
    seeds: dict[tuple[str, str], list[float]] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    rows: list[dict[str, Any]] = []
    for score in SCORES:
        row: dict[str, Any] = {"what": "correlation", "model": model, "effect": effect, "score": score, "n": n}
        for (name, kind), draws in found.items():
            if name != score:
                continue
            row[f"{kind}rho"] = [draws.value, *interval(draws.scenes)]
            row[f"{kind}rho, heads drawn"] = interval(draws.heads)
            null = np.abs(draws.null) >= abs(draws.value) - 1e-12
            row[f"{kind}p"] = float((1 + null.sum()) / (1 + null.size))
            # The permutations of an effect are the same for every score, so their maximum is one of the whole family.
            largest = np.max([np.abs(d.null) for (_, k), d in found.items() if k == kind], 0)
            row[f"{kind}p max-T"] = float((1 + (largest >= abs(draws.value) - 1e-12).sum()) / (1 + largest.size))
            if seeds is not None:
                row[f"{kind}rho by seed"] = seeds[name, kind]
        row |= {"reliability of the score": reliable[score], "reliability of the effect": reliable[effect]}
        rows.append(row)
    return rows


def summary(m: Measured) -> list[dict[str, Any]]:
    """The margins of one model, and its heads by effect."""
    rows: list[dict[str, Any]] = [
        {
            "what": "model", "model": m.name, "n": len(m.margins), "margin": float(m.margins.mean()),
            "prefers absent": float((m.margins > 0).mean()), "numerical floor, nats": m.floor, "seconds": m.seconds,
        }
    ]  # fmt: skip
    for effect, values in m.effects.items():
        mean, se = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
        order = np.argsort(-mean, axis=None)
        places = [tuple(int(v) for v in np.unravel_index(k, mean.shape)) for k in (*order[:5], *order[-3:])]
        rows.append(
            {
                "what": "heads", "model": m.name, "effect": effect,
                "largest and smallest": [f"L{a}H{b} {mean[a, b]:+.3f} (se {se[a, b]:.3f})" for a, b in places],
                "heads with |mean| > 4 se": int((np.abs(mean) > 4 * se).sum()), "of": mean.size,
            }
        )  # fmt: skip
    return rows


def shape(m: Measured) -> list[dict[str, Any]]:
    """In which layers effects are large, and how far the kinds of effect order the heads of a layer alike."""
    means = {effect: values.mean(0) for effect, values in m.effects.items()}
    rows: list[dict[str, Any]] = [
        {
            "what": "layers", "model": m.name, "effect": effect,
            "mean |effect| by layer": [float(v) for v in np.abs(mean).mean(1)],
        }
        for effect, mean in means.items()
    ]  # fmt: skip
    pairs = {f"{a}, {b}": float(correlation(means[a], means[b])) for a, b in combinations(EFFECTS, 2)}
    return [*rows, {"what": "agreement of effects", "model": m.name, **pairs}]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["scenes-lvlm"], help="bundled names or folders, one a training seed"
    )
    parser.add_argument("--n", type=int, default=400, help="points of mention, one a scene")
    parser.add_argument("--batch", type=int, default=50, help="points of one forward where scores are read")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--split", type=int, default=0, help="processes a model, over all GPUs; 0: all in this one")
    parser.add_argument("--keep", type=Path, default=None, help="an .npz of what was measured by point")
    parser.add_argument("--smoke", action="store_true", help="8 points, few draws; nothing is recorded")
    o = parser.parse_args(arguments)
    n = 8 if o.smoke else o.n
    if n < 8:
        parser.error(f"--n must be at least 8, got {n}")
    if o.split < 0:
        parser.error(f"--split must be at least 0, got {o.split}")
    how = Resampling(50, 100) if o.smoke else Resampling()
    names = [Path(m).name for m in o.models]
    if len(set(names)) != len(names):
        parser.error(f"models must have different names, got {names}")
    devices = [o.device]
    if o.device == "cuda" and o.split:
        devices = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    works = [
        Work(
            name,
            str(given),
            devices[(number * max(o.split, 1) + part) % len(devices)],
            n,
            o.batch,
            part,
            max(o.split, 1),
        )
        for number, (name, given) in enumerate(zip(names, o.models, strict=True))
        for part in range(max(o.split, 1))
    ]
    # Spawned: a process that has been forked cannot use CUDA.
    pool = ProcessPoolExecutor(len(works), mp_context=get_context("spawn")) if o.split else None
    with pool or nullcontext():
        parts = [m for m in (pool.map if pool else map)(measured, works) if m is not None]
        found = [joined([m for m in parts if m.name == name]) for name in names]
        if len({m.numbers for m in found}) > 1:
            raise ValueError("models must have one tokenizer, so that their points are the same, got several")
        if o.keep is not None:
            kept(found, o.keep)
        rows = [row for m in found for row in (*summary(m), *shape(m))] + compared(found, how, pool)
    for row in rows:
        if row["what"] != "correlation":
            say(row)
        elif row["model"] == "pooled" or len(found) == 1:
            rho, part = row["rho"], row.get("partial rho", [float("nan")] * 3)
            say(
                f"{row['effect']:9} {row['score']:18} rho {rho[0]:+.2f} [{rho[1]:+.2f}, {rho[2]:+.2f}] p {row['p max-T']:.4f}  "
                f"partial {part[0]:+.2f} [{part[1]:+.2f}, {part[2]:+.2f}]  reliability {row['reliability of the score']:.2f}, "
                f"{row['reliability of the effect']:.2f}"
            )
    if not o.smoke:
        note = (
            "Effects in nats: rise of log p(absent companion) - log p(present object) when a head's z is replaced. rho: correlation of "
            "ranks within layers, [value, low, high] with 95 % intervals by scene; 'heads drawn': the interval where the heads of each "
            "layer are drawn; p: permutation of heads within layers, two-sided, max-T over the scores of an effect; partial: the write "
            "norm taken off; size: of |mean effect|; reliability: split halves, Spearman-Brown. pooled: mean over training seeds."
        )
        record("proof_vision", rows, note=note)
    return rows


if __name__ == "__main__":
    main()
