"""A whole model under the kernels: prefill with every head read, and generation with heads changed.

A model of Llama-3-8B's shape with random bf16 weights, on one GPU with 24 GB free or more.

python tests/benchmarks/bench_kernels_model.py [layers] [prefill] [generation] [static]
"""

from __future__ import annotations

import signal
import statistics
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from _record import record

import interp
from interp.attention import Edit, Redistribute
from interp.interventions.image_groups import KeyGroups
from interp.tracing.calls import Lasting

Row = dict[str, Any]


def build(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=140000,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Medians of wall time until the GPU is done, every function once a round."""
    return {name: statistics.median(values) for name, values in rounds_of(functions, rounds).items()}


def rounds_of(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Wall time until the GPU is done, of each function in each round."""
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
    return found


def prefill(model: Any) -> list[Row]:
    rows: list[Row] = []
    for n in (1024, 8192, 32768):
        ids = torch.randint(0, 128000, (1, n), device="cuda")
        capture = interp.Capture(row_stats=True, received=True, pooled=64)
        kept: list[Any] = []

        def plain(ids: Any = ids) -> Any:
            return model(ids, logits_to_keep=1, use_cache=True).logits

        def read(ids: Any = ids, capture: Any = capture) -> Any:
            with interp.hooked(model, capture=capture) as run:
                logits = model(ids, logits_to_keep=1, use_cache=True).logits
            kept[:] = [run]
            return logits

        def put_together() -> Any:
            read()
            return kept[0].trace

        same = torch.equal(plain(), read())
        times = seconds(
            {"plain": plain, "all statistics": read, "and the trace made": put_together}, 5 if n < 32768 else 3
        )
        for what, s in times.items():
            rows.append(
                {
                    "what": f"prefill of {n}",
                    "how": what,
                    "ms": round(s * 1e3, 1),
                    "x plain": round(s / times["plain"], 3),
                }
            )
        rows[-2]["logits equal to the bit"] = str(same)
        kept.clear()
        torch.cuda.empty_cache()
    return rows


class Move(interp.Intervention):
    """VAR's redistribution with fixed groups: what the kernels cost, without a method's own choices."""

    def __init__(self, n_image: int) -> None:
        codes = torch.ones(1, 35 + n_image, dtype=torch.int8)
        codes[:, :10], codes[:, 35:] = 0, 2
        self.groups = KeyGroups(codes, beyond=1)
        move = Redistribute((0,), (2,), 0.6, (0, 2), (2,), summ=0.2, rho=0.5)
        self.template = Edit((move,), n_groups=3)

    def before(self, call: Any) -> Edit | None:
        return self.groups.edit(call, self.template)

    def lasting(self, call: Any) -> Lasting | None:
        return Lasting(template=self.template, groups=self.groups)


STEPS = 64


def generators(model: Any, **more: Any) -> dict[str, Callable[[], object]]:
    """Greedy generation after a prompt of 640: plain, with four heads' gains 0, with a redistribution in every head."""
    ids = torch.randint(0, 128000, (1, 640), device="cuda")
    heads = [interp.Head(5, h) for h in range(4)]
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, **more}
    ones = torch.ones_like(ids)

    def plain() -> Any:
        return model.generate(ids, attention_mask=ones, **options)

    def hooked(*interventions: Any) -> Callable[[], Any]:
        def run() -> Any:
            with interp.hooked(model, interventions=list(interventions)):
                return model.generate(ids, attention_mask=ones, **options)

        return run

    return {
        "plain": plain,
        "hooked, nothing changed": hooked(),
        "head gains": hooked(interp.MaskHeads(heads, kind="zero")),
        "redistribution": hooked(Move(576)),
    }


def generation(model: Any) -> list[Row]:
    functions = generators(model)
    each = rounds_of(functions, 9)
    rows: list[Row] = []
    for name, values in each.items():
        # The host's speed drifts: ratios are taken within a round.
        ratios = [plain / s for plain, s in zip(each["plain"], values, strict=True)]
        row = speed(f"generation of {STEPS} after 640", name, statistics.median(values), 1.0)
        row["x plain"] = round(statistics.median(ratios), 3)
        fastest = round(min(each["plain"]) / min(values), 3)
        rows.append(
            {
                **row,
                "lowest": round(min(ratios), 3),
                "highest": round(max(ratios), 3),
                "x plain, fastest rounds": fastest,
            }
        )
    return rows


def speed(what: str, how: str, s: float, plain: float) -> Row:
    return {"what": what, "how": how, "tokens/s": round(STEPS / s, 1), "x plain": round(plain / s, 3)}


def static(model: Any) -> list[Row]:
    """Generation with a static cache, which transformers compiles; a way that fails or takes too long says so in its row."""
    what, rows = f"generation of {STEPS} after 640, static cache, compiled", list[Row]()
    plain = None
    for name, function in generators(model, cache_implementation="static").items():
        try:
            with at_most(STATIC_SECONDS):
                s = seconds({name: function}, 3)[name]
        except Exception as error:
            rows.append({"what": what, "how": name, "failed": f"{type(error).__name__}: {str(error)[:160]}"})
            continue
        plain = s if plain is None else plain
        rows.append(speed(what, name, s, plain))
    return rows


STATIC_SECONDS = 75


@contextmanager
def at_most(limit: int) -> Generator[None]:
    """Raise TimeoutError in what takes longer than so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    numbers = [int(x) for x in sys.argv[1:] if x.isdigit()]
    parts = [x for x in sys.argv[1:] if not x.isdigit()] or ["prefill", "generation", "static"]
    unknown = [x for x in parts if x not in ("prefill", "generation", "static")]
    if unknown:
        print(__doc__)
        raise SystemExit(0 if unknown == ["--help"] else 2)
    if not torch.cuda.is_available():
        print("-- no CUDA GPU here: nothing to measure")
        return
    layers = numbers[0] if numbers else 32
    model = build(layers)
    shape = f"Llama-3-8B's shape, {layers} layers, random bf16 weights, batch 1"
    with torch.no_grad():
        rows = generation(model) if "generation" in parts else []
        if "prefill" in parts:
            rows = prefill(model) + rows
        if rows:
            record("kernels_model", rows, note=f"{shape}; x plain is time for prefill, speed for generation")
        if "static" in parts:
            record("kernels_static", static(model), note=f"{shape}; x plain is speed; compiled by generate's own rules")


if __name__ == "__main__":
    main()
