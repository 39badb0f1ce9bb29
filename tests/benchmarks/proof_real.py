"""Retrieval heads, attention sinks and massive activations of a real language model, each with its controls.

    python tests/benchmarks/proof_real.py --folder FOLDER_OF_SMOLLM2      # a few minutes on a CPU

Controls: a twin of the same shape with random weights; the same tokens in a random order; a span elsewhere in the prompt
(retrieval), the middle key (sinks). What is read from attention is no cause: `proof_needle.py` masks the heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import record

import interp
from interp.analysis import score
from interp.analysis.massive_activations import massive_activations, sink_dims
from interp.analysis.running import AnalysisError
from probes.needle import NeedleInHaystack
from probes.samples import Sample
from probes.text import Passages

QUESTION = 32
"""Tokens at a prompt's end that are left alone: more than the question has."""
PARTS = ("retrieval", "sinks", "massive")
Row = dict[str, Any]


def random_twin(model: interp.Model, seed: int = 0) -> interp.Model:
    """A model of the same class and config with the weights that it would start its training with."""
    torch.manual_seed(seed)
    module = type(model.module)(model.config).to(model.device).float().eval()
    return interp.Model(module, tokenizer=model.tokenizer, name=f"random twin of {model.name}")


def in_random_order(samples: Sequence[Any], seed: int = 0) -> list[Sample]:
    """Each sample's tokens in a random order; the first stays, as a model may know it."""
    rng = np.random.default_rng(seed)
    return [Sample((s.ids[0], *(int(i) for i in rng.permutation(s.ids[1:])))) for s in samples]


def haystack_in_random_order(samples: Sequence[Any], seed: int = 0) -> list[Any]:
    """Needle prompts whose filler is in a random order: the needle and the question stay where they are."""
    rng = np.random.default_rng(seed)
    out: list[Any] = []
    for sample in samples:
        ids = np.array(sample.ids)
        start, stop = sample.needle_span
        free = [n for n in range(1, len(ids) - QUESTION) if not start <= n < stop]
        ids[free] = rng.permutation(ids[free])
        out.append(replace(sample, ids=tuple(int(i) for i in ids)))
    return out


def named(values: np.ndarray[Any, Any], k: int = 5) -> str:
    order = np.argsort(-np.nan_to_num(values), axis=None)[:k]
    places = [np.unravel_index(n, values.shape) for n in order]
    return ", ".join(f"L{a}H{b} {values[a, b]:.2f}" for a, b in places)


def retrieval(model: Any, twin: Any, needles: Sequence[Any]) -> list[Row]:
    """The retrieval score (set form, forced) on the model, on prompts with shuffled filler, and on the twin."""
    tried = {
        "model": (model, needles),
        "filler shuffled": (model, haystack_in_random_order(needles)),
        "random weights": (twin, needles),
    }
    found = {name: score("retrieval", m, given, mode="teacher_forced") for name, (m, given) in tried.items()}
    top = found["model"].value.values >= 0.1
    rows: list[Row] = []
    for name, one in found.items():
        value, null = one.value.values, one.null.values
        rows.append(
            {
                "what": "retrieval", "on": name, "n": len(needles), "top": named(value), "largest": float(np.nanmax(value)),
                "share of heads at least 0.1": float((value >= 0.1).mean()), "largest, a span elsewhere": float(np.nanmax(null)),
                "mean of the model's retrieval heads": float(value[top].mean()),
                "rank correlation with the model": _rank_correlation(value[top], found["model"].value.values[top]),
            }
        )  # fmt: skip
    return rows


def sinks(model: Any, twin: Any, passages: Sequence[Any]) -> list[Row]:
    """Gu's sink metric at the first token, epsilon 0.3, T = 64."""
    tried = {
        "model": (model, passages), "tokens shuffled": (model, in_random_order(passages)), "random weights": (twin, passages),
    }  # fmt: skip
    rows: list[Row] = []
    for name, (m, given) in tried.items():
        share = score("sink", m, given)
        mass = score("sink", m, given, measure="mass")
        value = share.value.values
        rows.append(
            {
                "what": "sinks", "on": name, "n": len(given), "sink metric, percent": float(100 * np.nanmean(value)),
                "the middle key, percent": float(100 * np.nanmean(share.null.values)),
                "mean mass on the first token": float(np.nanmean(mass.value.values)),
                "heads that are sinks in every text": int((value == 1).sum()), "of": int(np.isfinite(value).sum()),
                "percent by layer": [round(float(100 * v), 1) for v in np.nanmean(value, 1)],
            }
        )  # fmt: skip
    return rows


def massive(model: Any, twin: Any, passages: Sequence[Any]) -> list[Row]:
    """The largest entry that enters each layer, and the dimensions in which sinks show."""
    tried = {
        "model": (model, passages), "tokens shuffled": (model, in_random_order(passages)), "random weights": (twin, passages),
    }  # fmt: skip
    rows: list[Row] = []
    for name, (m, given) in tried.items():
        found = massive_activations(m, given)
        first = found.isel(rank=0)
        peak = np.abs(first["value"].values).mean(0)
        layer = int(peak.argmax())
        dims, counts = np.unique(first["dim"].values[:, layer], return_counts=True)
        row: Row = {
            "what": "massive activations", "on": name, "n": len(given), "layer of the largest": layer,
            "largest, mean": float(peak.max()), "ratio to the median, mean": float(first["ratio_to_median"].values[:, layer].mean()),
            "share of texts with a massive one": float(found["massive"].any(["layer", "rank"]).mean()),
            "at the first token": float((first["position"].values[:, layer] == 0).mean()),
            "dimension": int(dims[counts.argmax()]), "texts with it": float(counts.max() / counts.sum()),
            "ratio by layer": [round(float(v), 1) for v in first["ratio_to_median"].values.mean(0)],
        }  # fmt: skip
        try:
            sink = sink_dims(m, given)
            row["sink dimensions"] = list(sink.dims)
            row["x / RMS at the sink"], row["x / RMS, three quarters of tokens below"] = sink.peak[0], sink.typical[0]
            row["times the x of three quarters of tokens"] = sink.ratio[0]
        except AnalysisError as error:
            row["sink dimensions"] = f"none: {' '.join(str(error).split())[:160]}"
        rows.append(row)
    return rows


def _rank_correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float | None:
    import pandas as pd

    found = float(pd.Series(a).rank().corr(pd.Series(b).rank()))
    return found if np.isfinite(found) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="SmolLM2-135M-Instruct as a folder, or its hub id")
    parser.add_argument("--needles", type=int, default=12, help="prompts")
    parser.add_argument("--length", type=int, default=400, help="tokens of a prompt")
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    o = parser.parse_args()
    model = interp.load(o.folder, dtype=torch.float32)
    twin = random_twin(model)
    depths = tuple(float(d) for d in np.linspace(0.1, 0.9, o.needles).round(3))
    rows: list[Row] = []
    if "retrieval" in o.parts:
        rows += retrieval(model, twin, NeedleInHaystack((o.length,), depths, 1, "detect", 0).build(model))
    passages = Passages(n=o.passages, length=64).build(model)
    if "sinks" in o.parts:
        rows += sinks(model, twin, passages)
    if "massive" in o.parts:
        rows += massive(model, twin, passages[: min(10, len(passages))])
    note = (
        f"{Path(o.folder).name}. Retrieval: set form, teacher-forced. Sinks: Gu et al., first token, T = 64, epsilon 0.3. Massive "
        "activations: |x| > 100 and 1000 times the median, of what enters a layer."
    )
    # A part alone has a file of its own: what the others say was measured by another run.
    record("proof_real" if set(o.parts) == set(PARTS) else "_".join(["proof_real", *o.parts]), rows, note=note)


if __name__ == "__main__":
    main()
