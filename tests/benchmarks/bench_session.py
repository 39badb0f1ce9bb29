"""What an open session costs where it captures and changes nothing (promised are under 3 %), and that it leaves nothing.

A Llama of the shape of SmolLM2-135M with random weights: a prompt of 256 tokens, and greedy generation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from _record import Timing, measure, measure_ratios, record
from torch import nn

import interp

LIMIT = 0.03


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def state(module: nn.Module) -> list[Any]:
    """Whatever a session could leave: hooks, attributes, attention implementations."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    found: list[Any] = []
    for name, sub in module.named_modules():
        config = getattr(sub, "config", None)
        found.append((name, sorted(vars(sub)), getattr(config, "_attn_implementation", None)))
        found.append([list(getattr(sub, kind).values()) for kind in hooks])
    return found


def tasks(module: Any) -> dict[str, Callable[[], object]]:
    prompt = torch.randint(0, 49152, (1, 256), generator=torch.Generator().manual_seed(0))
    return {
        "prompt of 256 tokens": lambda: module(prompt),
        "generation of 16 tokens after 16": lambda: module.generate(prompt[:, :16], max_new_tokens=16, do_sample=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = model()

    def inside(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with interp.hooked(module):
                return call()

        return run

    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for name, call in tasks(module).items():
            call()
            before = state(module)
            times, ratios = measure_ratios({"plain": call, "hooked": inside(call)}, "plain", options.repeats)
            if state(module) != before:
                sys.exit("hooked left something on the model: hooks, attributes or implementations differ after exit")
            ratio: Timing = ratios["hooked"]
            rows.append(
                {
                    "task": name,
                    "plain seconds": times["plain"].median,
                    "hooked seconds": times["hooked"].median,
                    "ratio": ratio.median,
                    "low": ratio.low,
                    "high": ratio.high,
                    "rounds": ratio.repeats,
                }
            )
        opening = measure({"open": inside(lambda: None)}, options.repeats)["open"].median
        rows.append({"task": "opening and closing alone", "hooked seconds": opening, "rounds": options.repeats})
    record(
        "session",
        rows,
        note="The session is opened and closed in every round; ratio: median and quartiles of hooked / plain in the same round. "
        f"Promised: under {1 + LIMIT}. Hooks, attributes and attention implementations of every module were the same after as before.",
    )
    worst = max(row["ratio"] for row in rows if "ratio" in row)
    if worst >= 1 + LIMIT:
        sys.exit(
            f"hooked without capture or interventions took {worst:.3f} of the plain model's time; promised are under {1 + LIMIT}"
        )


if __name__ == "__main__":
    main()
