"""What do head methods do to a language model that must copy a fact? On SmolLM2-135M-Instruct, tuned on dev, confirmed once.

    python tests/benchmarks/proof_smol.py --folder FOLDER            # a quarter of an hour on one CPU core, a minute on a GPU
    python tests/benchmarks/proof_smol.py --folder FOLDER --n 4 --dev 2 --detect 2 --smoke      # recorded nowhere

Heads are found on ``detect`` needles (:mod:`_detection`). Each method's grid, whose first setting is its default and fixed
beforehand, is tuned on other ``detect`` needles: the highest log-probability of the answer. Default and tuned setting are confirmed once on
``test`` needles (other cities, numbers and filler), and on questions whose answer is not in the prompt, where a method that
merely breaks the model breaks too. Methods act on the rows that produce the answer, the scope of Wu et al. (2404.15574): the
prompt is run once and plain, all settings go on from its cache. Primary endpoint: log p(answer | prompt), teacher-forced, nats.
A copy task and 135M parameters: analogues of the papers' settings, none of their numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from _detection import answer_ids, detect, ranked
from _record import record

import interp
from interp.evaluation import DoLa, Evaluation, Setting, Task, evaluate, random_control
from interp.evaluation.baselines import scoring
from interp.evaluation.correction import by_unit, max_t
from interp.evaluation.tasks import Call, Pairs, Record, Sample, Statistics
from interp.heads import Head
from interp.interventions import GateHeads, MaskHeads, ScaleHeads, Streaming, Temperature, TopKMask
from interp.interventions.patterns import SinkRecent
from interp.tracing.session import untouched
from probes.intervals import Estimate, mean_interval, paired_difference
from probes.needle import NeedleInHaystack
from probes.text import ClosedBook

CONTROLS = 3
ROUNDING = 5
"""Digits of a difference that are tested: below them stands what one kernel rounds otherwise than another."""
SEEN = SinkRecent(4, 64)
Place = tuple[int, int]


@dataclass(frozen=True)
class ForcedAnswers(Task):
    """Log-probability of each sample's answer, and whether every token of it was the likeliest one, behind one plain prompt.

    Args:
        items: samples with ``ids`` and ``answer``.
        label: of the split.
    """

    items: Sequence[Any]
    label: str

    name: ClassVar[str] = "forced"
    primary: ClassVar[str] = "logprob"
    shown: ClassVar[tuple[str, ...]] = ("logprob", "exact")

    def describe(self) -> dict[str, Any]:
        return {"probe": self.name, "split": self.label, "first": self.items[0].text}

    def samples(self, model: Any) -> list[Sample]:
        return [Sample(str(n), n, (list(s.ids), answer_ids(model, s))) for n, s in enumerate(self.items)]

    def run(self, call: Call, samples: Sequence[Sample]) -> list[Record]:
        return [self._one(call, s) for s in samples]

    def _one(self, call: Call, sample: Sample) -> Record:
        from transformers import DynamicCache

        prompt, answer = sample.content
        device, kept = call.model.device, len(prompt) - 1
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=device)
        with torch.inference_mode():
            if sample.id not in call.shared:
                cache = DynamicCache()
                with untouched(call.model.module):
                    call.model.module(input_ids=ids[:, :kept], past_key_values=cache, logits_to_keep=1)
                call.shared[sample.id] = cache
            cache = call.shared[sample.id]
            call.session.prompt_length = kept
            logits = call.model.module(input_ids=ids[:, kept:], past_key_values=cache).logits
            cache.crop(kept - ids.shape[1])
            for method in scoring(call.interventions):
                logits, _ = method.forced(call.model, {"input_ids": ids}, logits, {})
        wanted = torch.tensor(answer, device=device)
        logp = logits[0].float().log_softmax(-1)
        return {
            "logprob": float(logp.gather(-1, wanted[:, None]).double().sum()),
            "exact": float((logp.argmax(-1) == wanted).all()),
        }

    def figures(self, found: Pairs, how: Statistics) -> dict[str, Estimate]:
        return {n: mean_interval([r[n] for _, r in found], **how.options()) for n in self.shown}

    def differences(self, a: Pairs, b: Pairs, how: Statistics) -> dict[str, Estimate]:
        return {n: paired_difference([r[n] for _, r in a], [r[n] for _, r in b], **how.options()) for n in self.shown}


def grids(order: Sequence[Place], group: int, depth: int, n_heads: int) -> dict[str, list[Setting]]:
    """Method to its settings, the default first. ``order``: heads by retrieval score; ``group``: query heads of a KV head."""

    def top(k: int) -> list[Head]:
        return [Head(*place) for place in order[:k]]

    def streaming(k: int, keep: bool) -> list[Head]:
        """The KV groups of the k first heads, or all groups but those."""
        mine = {(layer, h // group) for layer, h in order[:k]}
        places = [(layer, h) for layer in range(depth) for h in range(n_heads)]
        return [Head(*p) for p in places if ((p[0], p[1] // group) in mine) != keep]

    def named(name: str, method: Any) -> Setting:
        return Setting(name, (method,))

    return {
        "MaskHeads": [named(f"MaskHeads(top {k})", MaskHeads(top(k))) for k in (3, 1, 10)],
        "MaskHeads, uniform": [named(f"MaskHeads(top {k}, uniform)", MaskHeads(top(k), kind="uniform")) for k in (3, 1, 10)],
        "ScaleHeads": [
            named(f"ScaleHeads(top {k}, {g:g})", ScaleHeads(top(k), g)) for k, g in ((3, 1.5), (3, 1.25), (10, 1.25), (10, 1.5))
        ],
        "Temperature": [named(f"Temperature(top 10, {t:g})", Temperature(top(10), t)) for t in (0.8, 0.67, 1.25)],
        "Streaming, the others": [
            named(f"Streaming(all but the KV heads of top {k})", Streaming(streaming(k, True), pattern=SEEN)) for k in (10, 3, 30)
        ],
        "Streaming, the heads": [named(f"Streaming(KV heads of top {k})", Streaming(streaming(k, False), pattern=SEEN)) for k in (10, 3)],
        "TopKMask": [named(f"TopKMask(keep {k})", TopKMask("L*H*", k=k, mode="keep")) for k in (32, 8)],
        "GateHeads": [named(f"GateHeads({s:g}, {r:g})", GateHeads("L*H*", shared=s, routed=r)) for s, r in ((0.5, 0.25), (0.7, 0.25))],
        "DoLa": [named("DoLa(low)", DoLa("low")), named("DoLa(high)", DoLa("high"))],
    }  # fmt: skip


def confirmed(kinds: dict[str, str], results: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """A row a setting and split; p over all of them together."""
    parts: dict[str, Any] = {}
    for split, result in results.items():
        units, plain = result.task.values(result.found[result.rows[0].setting.key])
        parts[split] = {
            row.setting.name: by_unit(
                units,
                np.subtract(result.task.values(result.found[row.setting.key])[1], plain).round(ROUNDING).tolist(),
            )[1]
            for row in result.rows[1:]
            if not row.problem
        }
    tests = max_t(parts)
    rows: list[dict[str, Any]] = []
    for split, result in results.items():
        for one in result.rows:
            name = one.setting.name
            row: dict[str, Any] = {
                "what": "confirmed",
                "split": split,
                "setting": name,
                "kind": kinds[name],
                "n": one.n,
                "heads": one.heads,
            }
            if one.problem:
                rows.append({**row, "cannot act": one.problem})
                continue
            for figure in one.figures:
                row[figure] = [float(x) for x in one.figures[figure][:3]]
                if one.differences:
                    row[f"{figure} difference"] = [float(x) for x in one.differences[figure][:3]]
            if one.differences:
                found = tests[split, name]
                row |= {"p": found.p, "p max-T": found.p_max_t, "p BH": found.p_bh}
            rows.append(row)
    return rows  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="with the SmolLM2 GGUF, or HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--n", type=int, default=120, help="test needles")
    parser.add_argument("--dev", type=int, default=40, help="needles for tuning")
    parser.add_argument("--detect", type=int, default=12, help="needles that find the heads")
    parser.add_argument("--length", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", type=Path, help="a folder of the answers: a run that was cut off goes on")
    parser.add_argument("--smoke", action="store_true", help="nothing is recorded")
    o = parser.parse_args(arguments)
    begun = time.perf_counter()
    model = interp.load(o.folder, device=o.device, dtype=torch.float32)
    shape = model.config.get_text_config()

    def needles(split: Any, n: int, seed: int) -> list[Any]:
        depths = tuple(np.linspace(0.05, 0.95, n).round(4))
        return NeedleInHaystack((o.length,), depths, 1, split, seed).build(model)

    score = detect(model, needles("detect", o.detect, 0))[0].mean(0)
    order = ranked(score)
    made = grids(order, shape.num_attention_heads // shape.num_key_value_heads, *score.shape)
    few, how = Statistics(200), Statistics(2000)
    everything = [s for grid in made.values() for s in grid]

    def answered(items: list[Any], label: str, settings: list[Setting], how: Statistics) -> Evaluation:
        folder = o.keep and o.keep / label.replace(" ", "_")
        return evaluate(model, ForcedAnswers(items, label), settings, folder=folder, batch=1, how=how, refuse=False)

    dev = answered(needles("detect", o.dev, 1), "dev", everything, few)
    print(f"dev is done, {time.perf_counter() - begun:.0f} s", flush=True)
    rows: list[dict[str, Any]] = [
        {"what": "detection", "n": o.detect, "top": ", ".join(f"L{a}H{b} {score[a, b]:.2f}" for a, b in order[:10])}
    ]
    kinds, settings = {"greedy": "baseline"}, list[Setting]()
    for method, grid in made.items():
        able = [s for s in grid if not dev[s.name].problem]
        chosen = max(able, key=lambda s: dev[s.name].figures["logprob"].value) if able else grid[0]
        both = [grid[0], *([chosen] if chosen is not grid[0] else [])]
        kinds |= {chosen.name: "tuned", grid[0].name: "default" if chosen is not grid[0] else "default, also tuned"}
        values = {s.name: dev[s.name].problem or [float(x) for x in dev[s.name].figures["logprob"][:3]] for s in grid}
        rows.append({"what": "tuned on dev", "method": method, "setting": chosen.name, "n": o.dev, "grid": values})
        settings += both
        if method.startswith(("MaskHeads", "ScaleHeads")):
            controls = [random_control(grid[0], seed) for seed in range(CONTROLS)]
            kinds |= {c.name: "random heads" for c in controls}
            settings += controls
    results = {
        label: answered(items, label, settings, how)
        for label, items in (("needles", needles("test", o.n, 2)), ("closed book", ClosedBook().build(model)))
    }
    rows += confirmed(kinds, results)
    rows.append({"what": "cost", "seconds": time.perf_counter() - begun, "device": results["needles"].about["machine"]})
    if o.smoke:
        for row in rows:
            print(row)
    else:
        note = (
            f"Log-probability of the whole answer, nats, teacher-forced, prompts of {o.length} tokens; values and differences to the "
            "plain model are [value, low, high] with 95 % bootstrap intervals by sample; p by sign flips, max-T and "
            "Benjamini-Hochberg over all settings and both splits. Random heads: as many others of the same layers."
        )
        record("proof_smol_methods", rows, note=note)
    return rows


if __name__ == "__main__":
    main()
