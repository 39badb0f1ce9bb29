"""The Triton kernels on one GPU, beside SDPA, FlexAttention and eager attention.

python tests/benchmarks/bench_kernels.py [prefill] [edits] [decode] [host] [long]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _competitors import column_sums
from _gpu import gpu_times, host_microseconds, peak_extra_mib
from _record import record

from interp.attention import (
    Boost,
    Edit,
    Gain,
    GroupWeights,
    Mask,
    Readout,
    Redistribute,
    SinkWindow,
    Temperature,
    attend,
)  # fmt: skip
from interp.attention.sdpa import fused

SHAPES = {
    "1, 32/8, 4096, 128 causal": (1, 32, 8, 4096, 128, True),
    "1, 32/8, 16384, 128 causal": (1, 32, 8, 16384, 128, True),
    "1, 16/16, 8192, 64 full": (1, 16, 16, 8192, 64, False),
    "64, 16/16, 257, 64 full": (64, 16, 16, 257, 64, False),
}
Row = dict[str, Any]


def operands(batch: int, heads: int, kv_heads: int, n: int, dim: int, keys: int | None = None) -> list[torch.Tensor]:
    """Random bf16 operands from a fixed seed, ``[batch, head, token, dim]`` laid out by token as projections leave them."""
    torch.manual_seed(0)
    lengths = (n, keys or n, keys or n)
    return [
        torch.randn(batch, length, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h, length in zip((heads, kv_heads, kv_heads), lengths, strict=True)
    ]


def groups_of(n: int, special: int = 1, image: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Key groups of a prompt: its first tokens special (0), an image (2), text (1)."""
    groups = torch.ones(1, n, dtype=torch.int8, device="cuda")
    groups[:, :special] = 0
    groups[:, image[0] : image[1]] = 2
    return groups


def prefill() -> None:
    """Output and statistics of one call, against SDPA, FlexAttention and eager attention with its map."""
    rows: list[Row] = []
    for name, (batch, heads, kv_heads, n, dim, causal) in SHAPES.items():
        q, k, v = operands(batch, heads, kv_heads, n, dim)
        scale, mask = dim**-0.5, Mask(causal=causal)
        gqa = heads != kv_heads
        text, image = groups_of(n), groups_of(n, image=(35, min(611, n - 9)))
        everything = Readout(row_stats=True, groups=text, n_groups=4, received=True, pooled=64)
        with_image = Readout(row_stats=True, groups=image, n_groups=4, received=True, pooled=64)
        some_rows = torch.arange(64, device="cuda") * (n // 64)

        def sdpa(q: Any = q, k: Any = k, v: Any = v, causal: bool = causal, gqa: bool = gqa) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        def call(
            readout: Readout | None = None, backend: str = "auto", _call: Any = (q, k, v, scale, mask), **more: Any
        ) -> Any:
            q, k, v, scale, mask = _call
            return lambda: attend(q, k, v, scale=scale, mask=mask, readout=readout, backend=backend, **more)

        functions: dict[str, Callable[[], object]] = {
            "SDPA": sdpa,
            "untouched": call(),
            "own forward": call(backend="triton"),
            "own forward, row statistics": call(Readout(row_stats=True), backend="triton"),
            "own forward, row statistics, 4 groups": call(
                Readout(row_stats=True, groups=text, n_groups=4), backend="triton"
            ),
            "topk 8": call(Readout(topk=8), backend="triton"),
            "group output of 64 rows": call(Readout(group_output=some_rows, groups=text, n_groups=4), backend="triton"),
            "row statistics and topk 8": call(Readout(row_stats=True, topk=8), backend="triton"),
            "row statistics and group output of 64 rows": call(
                Readout(row_stats=True, group_output=some_rows, groups=text, n_groups=4), backend="triton"
            ),
            "columns": call(Readout(received=True), backend="triton"),
            "everything": call(everything),
            "everything, 576 image tokens": call(with_image),
        }
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            functions[f"SDPA {backend.split('_')[0].lower()}"] = pinned(sdpa, backend)
        functions["output and column sums as FlagAttention"] = with_column_sums(q, k, v, scale, causal, gqa)
        if n <= 4096:
            functions["eager with maps"] = eager(q, k, v, scale, causal)
        flex = compiled_flex(q, k, v, causal, gqa) if batch == 1 else {}
        times = gpu_times({**functions, **flex})
        base = times["SDPA"]
        for what, ms in times.items():
            flop = 4 * batch * heads * n * n * dim / (2 if causal else 1)
            row: Row = {"shape": name, "what": what, "ms": round(ms, 4), "x SDPA": round(ms / base, 3)}
            if what in ("SDPA", "own forward", "untouched") or what.startswith(("SDPA", "Flex")):
                row["TFLOP/s"] = round(flop / ms / 1e9)
            if what in ("everything", "eager with maps"):
                row["extra MiB"] = round(peak_extra_mib(functions[what]), 1)
                row["map MiB"] = round(batch * heads * n * n * 4 / 2**20)
            rows.append(row)
        del q, k, v, functions
        torch.cuda.empty_cache()
    record(
        "kernels_prefill",
        rows,
        note="GPU time (CUDA graphs, median of 7 rounds side by side), bf16; shapes are batch, heads / KV heads, tokens, head dim; "
        "map MiB is the fp32 map that is never made",
    )


def pinned(function: Callable[[], object], backend: str) -> Callable[[], object]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run() -> object:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return function()

    return run


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> Callable[[], object]:
    """What an eager Hugging Face model does, the probabilities kept."""
    repeat = q.shape[1] // k.shape[1]

    def run() -> object:
        keys, values = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = q @ keys.mT * scale
        if causal:
            n = q.shape[2]
            scores = scores + torch.full((n, n), torch.finfo(q.dtype).min, device=q.device, dtype=q.dtype).triu(1)
        p = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return p @ values, p

    return run


def with_column_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, gqa: bool
) -> Callable[[], object]:
    """SDPA with its log-sum-exp, and then FlagAttention's pass for column sums: all of what that system reads."""

    def run() -> object:
        made = fused(q, k, v, causal=causal, scale=scale, enable_gqa=gqa)
        assert made is not None
        return made[0], column_sums(q, k, made[1], scale=scale, causal=causal)

    return run


def compiled_flex(q: Any, k: Any, v: Any, causal: bool, gqa: bool) -> dict[str, Callable[[], object]]:
    """FlexAttention, and its column sums: a second call with queries and keys swapped and the log-sum-exp subtracted."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    flex = torch.compile(flex_attention, dynamic=False)
    n = q.shape[2]
    forward = create_block_mask(
        lambda b, h, i, j: (i >= j) if causal else (i >= 0), None, None, n, k.shape[2], device="cuda"
    )
    swapped = create_block_mask(
        lambda b, h, i, j: (j >= i) if causal else (i >= 0), None, None, k.shape[2], n, device="cuda"
    )
    wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)

    def once() -> Any:
        return flex(q, k, v, block_mask=forward, enable_gqa=gqa, return_lse=True)

    def twice() -> Any:
        z, lse = once()
        columns = flex(
            wide, q, q, score_mod=lambda s, b, h, i, j: s - lse[b, h, j], block_mask=swapped, return_lse=True
        )[1]
        return z, columns.exp()

    return {"FlexAttention": once, "FlexAttention twice (columns)": twice}


def edits() -> None:
    """Edits inside the kernel, against the plain forward of the same kernel."""
    rows: list[Row] = []
    for n in (4096, 16384, 32768):
        q, k, v = operands(1, 32, 8, n, 128)
        mask, scale = Mask(causal=True), 128**-0.5
        ones = torch.ones(1, 32, 1, device="cuda")
        groups = groups_of(n, special=10, image=(35, 611))
        var = Edit(
            (Redistribute(source=(0,), target=(2,), fraction=0.6, gate_mass=(0, 2), gate_share=(2,), summ=0.2, rho=0.5),), groups,
            n_groups=3,
        )  # fmt: skip
        knockout = torch.tensor([1.0, 1.0, 0.0], device="cuda").view(1, 1, 1, 3)
        halves = torch.where(torch.arange(32, device="cuda") < 16, 1024, n).int()
        cases = {
            "plain": None,
            "gain": Edit((Gain(ones * 1.5),)),
            "temperature": Edit((Temperature(ones * 1.5),)),
            "boost of the image": Edit((Boost(torch.tensor([0.0, 0.0, 0.3], device="cuda").view(1, 1, 1, 3)),), groups),
            "knockout of the image": Edit((GroupWeights(knockout, True),), groups),
            "redistribution (VAR)": var,
            "streaming, all heads": Edit((SinkWindow(64, 1024),)),
            "streaming, half of the heads": Edit((SinkWindow(64, halves),)),
        }
        # Long prompts are there for the streaming heads.
        chosen = {what: edit for what, edit in cases.items() if n < 32768 or what.startswith(("plain", "streaming"))}
        functions = {
            what: (
                lambda edit=edit, q=q, k=k, v=v: attend(q, k, v, scale=scale, mask=mask, edit=edit, backend="triton")
            )
            for what, edit in chosen.items()
        }
        functions["SDPA"] = lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        times = gpu_times(functions)
        for what, ms in times.items():
            row: Row = {"tokens": n, "what": what, "ms": round(ms, 4), "x plain": round(ms / times["plain"], 3)}
            rows.append({**row, "x SDPA": round(ms / times["SDPA"], 3)})
        del q, k, v, functions
        torch.cuda.empty_cache()
    record(
        "kernels_edits",
        rows,
        note="1 x 32/8 heads, head dim 128, causal, bf16; plain is this kernel without an edit; streaming keeps 64 + 1024 keys",
    )


def decode() -> None:
    """One new token: bandwidth, and what statistics and edits add."""
    rows: list[Row] = []
    for batch, keys in ((1, 4096), (1, 32768), (1, 131072), (32, 4096), (8, 32768)):
        q, k, v = operands(batch, 32, 8, 1, 128, keys)
        mask, scale = Mask(causal=True, q_offset=keys - 1), 128**-0.5
        groups = groups_of(keys, special=10, image=(35, 611))
        var = Edit(
            (Redistribute(source=(0,), target=(2,), fraction=0.6, gate_mass=(0, 2), gate_share=(2,), summ=0.2, rho=0.5),), groups,
            n_groups=3,
        )  # fmt: skip
        stats = Readout(row_stats=True, groups=groups, n_groups=4)

        def sdpa(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def own(_call: Any = (q, k, v, mask), **more: Any) -> Any:
            q, k, v, mask = _call
            return lambda: attend(q, k, v, scale=scale, mask=mask, backend="triton", **more)

        functions: dict[str, Callable[[], object]] = {
            "SDPA": sdpa, "own": own(), "own, row statistics": own(readout=stats), "own, gain": own(edit=Edit((Gain(1.5),))),
            "own, redistribution": own(edit=var), "FlexAttention": compiled_flex(q, k, v, False, True)["FlexAttention"],
        }  # fmt: skip
        times = gpu_times(functions)
        gigabytes = 2 * k.numel() * k.element_size() / 1e9
        for what, ms in times.items():
            row: Row = {
                "batch": batch,
                "keys": keys,
                "what": what,
                "ms": round(ms, 4),
                "x SDPA": round(ms / times["SDPA"], 3),
            }
            rows.append({**row, "TB/s": round(gigabytes / ms, 2), "x own": round(ms / times["own"], 3)})
        del q, k, v, functions
        torch.cuda.empty_cache()
    record(
        "kernels_decode",
        rows,
        note="one query row, 32/8 heads, head dim 128, bf16; TB/s counts K and V once (small caches stay in L2 between replays)",
    )


def host() -> None:
    """What a call costs the host, which is what bounds a small model."""
    rows: list[Row] = []
    for what, n in (("prefill of 512", 512), ("one token after 512", 1)):
        q, k, v = operands(1, 32, 8, n, 128, 512)
        mask = Mask(causal=True, q_offset=512 - n)
        readout = Readout(row_stats=True, received=True, pooled=64)
        cases: dict[str, Callable[[], object]] = {
            "SDPA": lambda q=q, k=k, v=v, n=n: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=n > 1, enable_gqa=True
            ),
            "untouched": lambda q=q, k=k, v=v, mask=mask: attend(q, k, v, scale=0.1, mask=mask),
            "own forward": lambda q=q, k=k, v=v, mask=mask: attend(q, k, v, scale=0.1, mask=mask, backend="triton"),
            "everything": lambda q=q, k=k, v=v, mask=mask: attend(q, k, v, scale=0.1, mask=mask, readout=readout),
        }
        rows += [
            {"call": what, "what": name, "microseconds": round(host_microseconds(f), 1)} for name, f in cases.items()
        ]
    record("kernels_host", rows, note="until the call returns; calls of one kind after the first")


def long() -> None:
    """A prompt of 128k tokens, one layer."""
    n = 131072
    q, k, v = operands(1, 32, 8, n, 128)
    readout = Readout(row_stats=True, groups=groups_of(n), n_groups=4, received=True, pooled=64)
    # One mask for all calls: a new one makes a new kind, whose tables cannot be made while a graph is captured.
    mask = Mask(causal=True)
    sdpa = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    call = lambda: attend(q, k, v, scale=128**-0.5, mask=mask, readout=readout)  # noqa: E731
    times = gpu_times({"SDPA": sdpa, "everything": call}, rounds=3)
    rows: list[Row] = [
        {"what": what, "ms": round(ms, 2), "x SDPA": round(ms / times["SDPA"], 3)} for what, ms in times.items()
    ]
    if "everything" not in times:
        rows.append({"what": "everything", "failed": "it could not be captured in a CUDA graph"})
    rows[-1].update({"extra MiB": round(peak_extra_mib(call)), "map MiB": 32 * n * n * 4 // 2**20})
    record(
        "kernels_long", rows, note="128k tokens, one layer of 32/8 heads, head dim 128, causal, bf16, all statistics"
    )


SECTIONS = {"prefill": prefill, "edits": edits, "decode": decode, "host": host, "long": long}


def main() -> None:
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")] or list(SECTIONS)
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown or "--help" in sys.argv:
        print(__doc__, "sections:", ", ".join(SECTIONS))
        raise SystemExit(2 if unknown else 0)
    if not torch.cuda.is_available():
        print("-- no CUDA GPU here: nothing to measure")
        return
    with torch.no_grad():
        for name in chosen:
            SECTIONS[name]()


if __name__ == "__main__":
    main()
