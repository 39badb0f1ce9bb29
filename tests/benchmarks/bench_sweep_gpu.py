"""Ablation of every head of an 8B-shaped model on one GPU: ours beside a loop of transformers hooks.

Promised: 15 x at 64 tokens, 4.5 x at 256, 1.7 x at 1024; effects within the floor of a null row; gradient gates L * H / 6 x. Give
numbers of tokens to measure others; ``--layers 4`` for a quick look; ``--fp32`` checks effects in fp32 on few layers.
"""

from __future__ import annotations

import argparse
import sys
from time import perf_counter
from typing import Any

import numpy as np
import torch
from _record import record
from _sweep_loops import difference, hook_loop, same_order

from interp.analysis.ablation import ablated
from interp.analysis.head_gates import HeadGates
from interp.analysis.replay import Replay
from interp.analysis.targets import Target
from interp.models.model import Model
from probes.contrast import ContrastPair
from probes.samples import Sample

PROMISED = {64: 15.0, 256: 4.5, 1024: 1.7}
ANSWER, FOIL = 1000, 2000


def llama(layers: int, dtype: torch.dtype) -> Any:
    """Llama-3-8B's shape with random weights that give every head an effect."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def ours(model: Model, ids: torch.Tensor, rows: int) -> tuple[Any, float]:
    with Replay(model, {"input_ids": ids}, positions=(-1,)) as replay:
        value, null = ablated(replay, Target((-1,), (ANSWER,), (FOIL,)), "logit_difference", kind="zero", rows=rows)
    return value[0], float(np.nanmax(np.abs(null)))


def timed(function: Any) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = perf_counter()
    result = function()
    torch.cuda.synchronize()
    return perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="Of ours; the loop runs once.")
    parser.add_argument("--no-short", action="store_true", help="leave out the loop with the last logits alone")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--fp32", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("-- no CUDA GPU here: nothing to measure")
        return
    dtype = torch.float32 if options.fp32 else torch.bfloat16
    module = llama(options.layers, dtype)
    model, read, slow = Model(module), difference(ANSWER, FOIL), list[str]()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for n in options.lengths:
            ids = torch.randint(0, 128000, (1, n), generator=torch.Generator().manual_seed(n)).cuda()
            tokens = tuple(ids[0].tolist())
            pair = ContrastPair(Sample(tokens), Sample(tokens[::-1]), ANSWER, FOIL)
            gates = HeadGates(metric="logit_difference")
            module(ids)
            ours(model, ids, options.rows)
            gates.values(model, pair, None)
            sweeps = [timed(lambda: ours(model, ids, options.rows)) for _ in range(options.repeats)]
            gradient = min(
                timed(lambda: gates._gates(model, pair, pair.inputs("cuda")))[0] for _ in range(options.repeats)
            )
            loop, effects = timed(lambda: hook_loop(module, ids, read))
            short = float("nan")
            if not options.no_short:
                short, _ = timed(lambda: hook_loop(module, ids, read, logits_to_keep=1))
            seconds = sorted(s for s, _ in sweeps)[len(sweeps) // 2]
            value, floor = sweeps[0][1]
            off = float(np.abs(effects - value).max())
            rows.append(
                {
                    "tokens": n, "loop seconds": loop, "loop, last logits, seconds": short, "ours seconds": seconds,
                    "ratio": loop / seconds, "ratio to loop with last logits": short / seconds, "gradient seconds": gradient,
                    "gradient ratio": loop / gradient, "null row": floor, "largest difference": off,
                    "largest effect": float(np.abs(effects).max()),
                    "same order beyond the floor": same_order(effects, value, 4 * max(floor, off)),
                }
            )  # fmt: skip
            rows[-1] = {k: v for k, v in rows[-1].items() if isinstance(v, str) or not np.isnan(v)}
            if options.layers == 32 and not options.fp32:
                if loop / seconds < PROMISED.get(n, 0):
                    slow.append(f"{n} tokens: {loop / seconds:.2f} x, promised {PROMISED[n]} x")
                if n in PROMISED and loop / gradient < options.layers * 32 / 6:
                    slow.append(
                        f"{n} tokens: gradient {loop / gradient:.0f} x, promised {options.layers * 32 / 6:.0f} x"
                    )
            torch.cuda.empty_cache()
    record(
        "sweep_gpu_fp32" if options.fp32 else "sweep_gpu", rows,
        note=f"Llama-3-8B's shape, {options.layers} layers x 32 heads, random {str(dtype).removeprefix('torch.')} weights; zero ablation "
        "of every head, logit difference at the last position, one prompt. Loop: one forward and one .item() a head, full "
        "logits as users write it, and with those of the last position alone. Null row: the floor of one batch against one sample; "
        "the loop's own forwards differ from ours by as much.",
    )  # fmt: skip
    if slow:
        sys.exit("; ".join(slow))


if __name__ == "__main__":
    main()
