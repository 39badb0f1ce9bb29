"""Generation of an LVLM with its heads changed: tokens per second beside the plain model.

LLaVA-1.5-7B's shape with random bf16 weights, one picture of 576 tokens. Promised of plain SDPA generation: VHR 0.97, VAR 0.92; and
that VHR's prefill costs one text-only prefill more. On one GPU with 20 GB free; ``--layers 4`` for a quick look.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from _record import record
from torch import Tensor

import interp

N_TEXT, N_IMAGE, IMAGE = 64, 576, 32000
Row = dict[str, Any]


def build(layers: int, device: str) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=N_IMAGE,
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def prompt(device: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 31999, (1, N_TEXT), generator=draw)
    ids = torch.cat([ids[:, :35], torch.full((1, N_IMAGE), IMAGE), ids[:, 35:]], 1)
    pixels = torch.randn(1, 3, 336, 336, generator=draw).bfloat16()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(device) for name, value in inputs.items()}


def methods(layers: int) -> dict[str, list[interp.Intervention] | None]:
    """None is the plain model. Sinks of random weights are chosen by a threshold that a few tokens in a hundred pass."""
    return {
        "plain": None,
        "hooked, nothing changed": [],
        "VHR": [interp.VHR(2.0)],
        "VAR": [interp.VAR(0.6, tau=2.5, dims=(1, 2, 3))],
        "MaskHeads, 20 heads": [interp.MaskHeads([interp.Head(k % layers, k) for k in range(20)], kind="zero")],
        "PAI, no guidance": [interp.PAI(0.2, gamma=1.0)],
        "VHR and VAR": [interp.VHR(2.0), interp.VAR(0.6, tau=2.5, dims=(1, 2, 3))],
    }


def medians(
    functions: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, list[float]]]:
    """Wall time until the GPU is done: medians, of every round the ratio plain / this, and the time."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = perf_counter()
            function()
            torch.cuda.synchronize()
            found[name].append(perf_counter() - start)
    ratios = {name: [p / s for p, s in zip(found["plain"], values, strict=True)] for name, values in found.items()}
    return {name: statistics.median(values) for name, values in found.items()}, ratios, found


def measure(
    model: Any, chosen: dict[str, list[interp.Intervention] | None], steps: int, rounds: int, device: str
) -> list[Row]:
    inputs = prompt(device)
    tokens: dict[str, Tensor] = {}

    def generate(name: str, n: int) -> Callable[[], object]:
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}

        def run() -> object:
            if chosen[name] is None:
                tokens[name] = model.generate(**inputs, **options)
            else:
                with interp.hooked(model, interventions=chosen[name]):
                    tokens[name] = model.generate(**inputs, **options)
            return None

        return run

    def text_only() -> object:
        ids = inputs["input_ids"][inputs["input_ids"] != IMAGE][None]
        return model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)

    first, _, _ = medians({**{name: generate(name, 1) for name in chosen}, "text only, plain": text_only}, rounds)
    whole, ratios, times = medians({name: generate(name, steps) for name in chosen}, rounds)
    # The host's speed drifts: ratios are taken within a round.
    after = {name: [s - first[name] for s in values] for name, values in times.items()}
    decode = {
        name: statistics.median(p / s for p, s in zip(after["plain"], values, strict=True))
        for name, values in after.items()
    }
    rows: list[Row] = [
        {
            "how": name, "tokens/s": round(steps / whole[name], 2), "x plain": round(statistics.median(ratios[name]), 3),
            "lowest": round(min(ratios[name]), 3), "highest": round(max(ratios[name]), 3), "prefill ms": round(first[name] * 1e3, 1),
            "decode ms a token": round((whole[name] - first[name]) / (steps - 1) * 1e3, 2), "x plain, decode": round(decode[name], 3),
            "x plain, fastest rounds": round(min(times["plain"]) / min(times[name]), 3),
            "tokens unlike plain": int((tokens[name] != tokens["plain"]).sum()),
        }
        for name in chosen
    ]  # fmt: skip
    rows.append({"how": "text only, plain", "prefill ms": round(first["text only, plain"] * 1e3, 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=96, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these methods beside the plain model")
    options = parser.parse_args()
    known = methods(options.layers)
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        parser.error(f"--only must name some of {list(known)}, got {unknown}")
    chosen = {name: known[name] for name in known if options.only is None or name in ("plain", *options.only)}
    if not torch.cuda.is_available():
        print("-- no CUDA GPU here: nothing to measure")
        return
    model = build(options.layers, "cuda")
    with torch.no_grad():
        rows = measure(model, chosen, options.steps, options.rounds, "cuda")
    record(
        "generation_lvlm", rows,
        note=f"LLaVA-1.5-7B's shape, {options.layers} layers, random bf16 weights, {N_TEXT} text and {N_IMAGE} image tokens, "
        f"{options.steps} new tokens, batch 1, eager transformers; x plain is speed, median of the rounds' ratios; of the fastest rounds: "
        "what is left where the host disturbs neither",
    )  # fmt: skip


if __name__ == "__main__":
    main()
