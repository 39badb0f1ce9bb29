"""Ablation of every head on a CPU: ours beside a loop of transformers hooks and beside TransformerLens' loop, the same weights.

Promised: at least twice as fast as either loop on two cores, and the same effects within 1e-5. TransformerLens is measured where
it is installed (the extra ``lens``). ``--smoke`` runs all ways on a small model once and records nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _record import measure, record, show
from _sweep_loops import difference, hook_loop, lens_loop, lens_of, same_order

from interp.analysis.ablation import ablated
from interp.analysis.head_gates import HeadGates
from interp.analysis.replay import Replay
from interp.analysis.targets import Target
from interp.models.model import Model
from probes.contrast import ContrastPair
from probes.samples import Sample

LIMIT, FLOOR = 2.0, 1e-5
ANSWER, FOIL = 1000, 2000


def gpt2(layers: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    from interp.testing.weights import randomise

    module = GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval()
    # The library's 0.02 would leave every head without effect, and all loops equal.
    randomise(module, seed=0, gain=1.2)
    with torch.no_grad():
        module.transformer.wte.weight.mul_(0.1)
    return module


def ours(model: Model, ids: torch.Tensor) -> tuple[Any, float]:
    with Replay(model, {"input_ids": ids}, positions=(-1,)) as replay:
        value, null = ablated(replay, Target((-1,), (ANSWER,), (FOIL,)), "logit_difference", kind="zero")
    return value[0], float(np.nanmax(np.abs(null)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--smoke", action="store_true", help="2 layers, 16 tokens, one repeat, nothing recorded or promised"
    )
    options = parser.parse_args()
    if options.smoke:
        options.layers, options.lengths, options.repeats = 2, [16], 1
    torch.set_num_threads(options.threads)
    module = gpt2(options.layers)
    model, lens, shape = Model(module), lens_of(module), (options.layers, 12)
    read = difference(ANSWER, FOIL)
    rows: list[dict[str, Any]] = []
    slow: list[str] = []
    with torch.no_grad():
        for n in options.lengths:
            ids = torch.randint(0, 50000, (1, n), generator=torch.Generator().manual_seed(n))
            pair = ContrastPair(Sample(tuple(ids[0].tolist())), Sample(tuple(ids[0].tolist()[::-1])), ANSWER, FOIL)
            gates = HeadGates(metric="logit_difference")
            ways: dict[str, Callable[[], Any]] = {
                "ours, exact": lambda: ours(model, ids),
                "loop of hooks": lambda: hook_loop(module, ids, read),
                "loop of hooks, last logits": lambda: hook_loop(module, ids, read, logits_to_keep=1),
                "ours, gradient gates": lambda: gates.values(model, pair, None),
            }
            if lens is not None:
                ways["TransformerLens loop"] = lambda: lens_loop(lens, ids, read, shape)
            times = measure(ways, options.repeats, warmup=1)
            value, floor = ours(model, ids)
            loops = {"loop of hooks": hook_loop(module, ids, read)}
            if lens is not None:
                loops["TransformerLens loop"] = lens_loop(lens, ids, read, shape)
            base = times["ours, exact"].median
            for name, timing in times.items():
                effects = loops.get(name)
                rows.append(
                    {
                        "tokens": n, "way": name, "seconds": timing.median, "low": timing.low, "high": timing.high,
                        "ratio to ours": timing.median / base,
                        "largest difference": float("nan") if effects is None else float(np.abs(effects - value).max()),
                    }
                )  # fmt: skip
                rows[-1] = {k: v for k, v in rows[-1].items() if isinstance(v, str) or not np.isnan(v)}
            for name, effects in loops.items():
                scale = max(1.0, float(np.abs(value).max()))
                if np.abs(effects - value).max() > FLOOR * scale or same_order(effects, value, FLOOR * scale) < 1:
                    slow.append(f"{name} at {n} tokens has other effects")
                if times[name].median / base < LIMIT:
                    slow.append(f"{name} at {n} tokens takes only {times[name].median / base:.2f} x as long")
            print(f"-- {n} tokens: null row {floor:.1e}, effects up to {np.abs(value).max():.3g}")
    if options.smoke:
        show("sweep_cpu, smoke", rows)
        # Times of a run this small say nothing; effects must agree all the same.
        sys.exit("; ".join(problem for problem in slow if "effects" in problem) or 0)
    record(
        "sweep_cpu", rows,
        note=f"GPT-2's shape, {options.layers} layers x 12 heads, random fp32 weights, {options.threads} threads; zero ablation of every "
        "head, logit difference at the last position. Loops: one forward and one .item() a head. Promised for the exact sweep: "
        f"{LIMIT:.0f} x, effects within {FLOOR:.0e} of the loops' (relative to the largest).",
    )  # fmt: skip
    if slow:
        sys.exit("; ".join(slow))


if __name__ == "__main__":
    main()
