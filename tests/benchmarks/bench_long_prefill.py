"""A hooked prefill of 32k tokens on a CPU: peak memory beside what one N x N tensor would take.

Promised: it never holds an N x N tensor. The smallest one there could be is a mask of one byte an entry.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from _record import peak_memory, record

import interp

LAYERS, HEADS, HEAD_DIM = 2, 8, 16
WAYS = ("plain", "hooked, nothing captured", "hooked, row statistics")


def prepare(way: str, n: int, threads: int) -> Callable[[], object]:
    from transformers import LlamaConfig, LlamaModel

    torch.set_num_threads(threads)
    config = LlamaConfig(
        vocab_size=512, hidden_size=HEADS * HEAD_DIM, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=n,
    )  # fmt: skip
    torch.manual_seed(0)
    module = LlamaModel(config).eval()
    ids = torch.randint(0, 512, (1, n))
    capture = interp.Capture(row_stats=True) if way == WAYS[2] else None

    def call() -> Any:
        start = perf_counter()
        with torch.no_grad():
            if way == WAYS[0]:
                return module(ids, use_cache=False), None
            with interp.hooked(module, capture=capture, backend="blockwise") as run:
                result = module(ids, use_cache=False)
        if capture is not None and run.trace["text"].sizes["query"] != n:
            raise RuntimeError(f"the trace must have {n} rows, got {run.trace['text'].sizes['query']}")
        print(f"{way}: {perf_counter() - start:.0f} s", flush=True)
        return result, run

    # Code that is loaded on first use is no memory of the call; so few tokens need none to speak of.
    with torch.no_grad(), interp.hooked(module, capture=capture):
        module(ids[:, :64], use_cache=False)
    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    n = options.n
    smallest = n * n
    rows = []
    for way in WAYS:
        growth = peak_memory(prepare, way, n, options.threads).growth
        rows.append(
            {
                "way": way,
                "peak mib": growth / 2**20,
                "share of a one-byte N x N": growth / smallest,
                "share of the maps": growth / (LAYERS * HEADS * smallest * 4),
            }
        )
    record(
        "long_prefill",
        rows,
        note=f"Growth of the peak in one forward of a Llama with {LAYERS} layers x {HEADS} heads of {HEAD_DIM}, {n} tokens, "
        f"fp32. One N x N tensor of bytes is {smallest / 2**20:.0f} MiB, the maps of all heads are "
        f"{LAYERS * HEADS * smallest * 4 / 2**30:.0f} GiB; promised: no N x N tensor.",
    )
    worst = max(row["peak mib"] for row in rows) * 2**20
    if worst >= smallest:
        sys.exit(
            f"the peak grew by {worst / 2**20:.0f} MiB, which has room for an N x N tensor of {smallest / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
