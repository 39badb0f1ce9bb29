"""The kernels section of the README: tables from the recorded results, and every goal with what was measured."""

from __future__ import annotations

from typing import Any

from _results import RESULTS, result, table, where

Rows = list[dict[str, Any]]
# Seen in the hardware counters, in the clock and power readings and in the compiled code; holds for every goal on speed beside cuDNN.
REASON = (
    "What keeps the prefill kernels behind: products and arithmetic overlap little on this GPU. By the hardware counters (`ncu`, "
    "4096 tokens) the statistics pass issues in 42 % of its cycles. A form of it in Gluon, with sixteen warps in the place of "
    "eight and one of its own for loading, issues in 49 %, with the tensor cores and the unit of exponentials busy in 36 % each; "
    "cuDNN's forward, which has twice the products for the same exponentials, in 41 %, with 70 % and 36 %. At 16k tokens all of "
    "them run at the card's power limit (700 W, `nvidia-smi`): SDPA's clock falls from 1980 to 1650 MHz, that of the statistics to "
    "1870. What helped is fewer instructions (addresses, masks and top keys, read off the compiled code). Tried without gain that "
    "lasts: that form in Gluon, with explicit waits for products, two groups of warps that take turns, four, and longer loads "
    "(sooner at 4096 tokens, as soon at 16384, later at head dim 64); fewer registers and more programs, tensor-map loads, taller "
    "and wider tiles, deeper pipelines, the next tile's product first, skipping the search for the top key where no row rises, "
    "summing the masses of tiles of several key groups in a second visit (row statistics 1.75 for 1.57 of SDPA's time at 4096 tokens). "
    "Tiles were timed anew by launch; so was whether keys' places are worked out in 64 bits, which moves single launches by up to a "
    "sixth either way, against the count of instructions."
)
LATER = {
    "2d7b783": (
        "After these figures calls of layers that nobody touches in a generation were shortened: beside the model's own function such a "
        "call takes 1.6 us of one CPU core's time for 4.4. The statistics pass lost a kernel (the tables above have that). What both give "
        "a model on a GPU waits to be timed."
    ),
}
"""What a reader of the figures of a commit must know of later ones."""
NO_STATIC = "not measured: stopped after 90 s, while a hooked model was being compiled"
OTHERS = (
    "The other goals that were missed. *Redistribution*: every tile sums its mass by group, and tiles that move, the image's own "
    "run apart, are visited once more; a tile of its walk has up to 709 instructions in the compiled code, a plain one 378. "
    "*Streaming*: a fifth of a block's tiles (7 of 37) lie at an edge or hold the sink and have masks, 416 instructions for 282. "
    "*Prefill of a model*: at 8k tokens the GPU is busy for 275 ms with everything read and for 246 ms without, by the profiler, "
    "29 of them in the statistics pass. *Memory at 4k*: the partial column sums, one a block of 128 rows, are 16 of the 23 MiB. "
    "*Generation*: a token of the plain model takes 23.5 ms of the host's time, the GPU waits for it, and so every line of Python "
    "that a hook adds counts. *Decoding*: no reason was looked for; it is behind at two sizes, by 1 and 3 %. *A static cache*: the "
    "compiler breaks its graph at the attention of every hooked layer (15 graphs for 8 layers where the plain model is one, "
    "counted on a CPU) and compiles each; that is not mended."
)
"""Goals without a place in :data:`REASON`."""


def place(content: dict[str, Any]) -> str:
    """Machine, versions and commit of a table."""
    return f"{where(content)}, commit {content['versions']['commit']}"


def age(content: dict[str, Any], newest: str) -> str:
    """Says so where a table was measured on a day before that of the newest."""
    if content["date"][:10] >= newest:
        return place(content)
    return f"**older**: {place(content)}; kernels and host code have changed since, and it was not measured again"


def later(content: dict[str, Any]) -> list[str]:
    """What has changed since a table was measured, where that matters."""
    text = LATER.get(content["versions"]["commit"])
    return [] if text is None else [text, ""]


def section() -> str:
    prefill, edits, decode, model, host = (
        result(f"kernels_{name}") for name in ("prefill", "edits", "decode", "model", "host")
    )
    newest = max(content["date"][:10] for content in (prefill, edits, decode, model, host))
    return "\n".join(
        [
            (
                "Measured with `python tests/benchmarks/bench_kernels.py` and `bench_kernels_model.py`; medians, side by side in one run; "
                "the results files have all rows. Every table says where."
            ),
            "",
            f"GPU time of one call as a multiple of SDPA's, which is cuDNN's kernel here ({age(prefill, newest)}):",
            "",
            *prefill_table(prefill["rows"]),
            "",
            (
                "Edits inside the kernel, as a multiple of the same kernel without one (32/8 heads of 128, causal; "
                f"{age(edits, newest)}):"
            ),
            "",
            *edits_table(edits["rows"]),
            "",
            f"One new token, as a multiple of SDPA's time (32/8 heads of 128; {age(decode, newest)}):",
            "",
            *decode_table(decode["rows"]),
            "",
            (
                "A model of Llama-3-8B's shape, random weights; time of prefill with row statistics, column sums and pooled maps of all "
                "1024 heads, and speed of generation, both against the plain model. Logits while reading equal the plain ones to the bit "
                f"({age(model, newest)}):"
            ),
            "",
            *model_table(model["rows"]),
            "",
            *later(model),
            "Goals that were set before, and what came out:",
            "",
            *goals(prefill, edits, decode, model, host),
            "",
            (
                "With 257 keys the readings alone (nine numbers a row, 33 x 33 block sums and 257 column sums a head) are 5.5 % of the map."
            ),
            "",
            REASON,
            "",
            OTHERS,
        ]
    )


def of(rows: Rows, **wanted: Any) -> dict[str, Any]:
    return next(row for row in rows if all(row.get(key) == value for key, value in wanted.items()))


def found(rows: Rows, **wanted: Any) -> dict[str, Any] | None:
    """The row, or None where it was not measured."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def prefill_table(rows: Rows) -> list[str]:
    columns = {
        "untouched": "untouched", "own forward": "own forward", "own forward, row statistics": "with row statistics",
        "columns": "output and column sums", "everything": "everything", "FlexAttention": "FlexAttention",
        "FlexAttention twice (columns)": "FlexAttention, column sums",
        "output and column sums as FlagAttention": "SDPA and FlagAttention's column sums", "eager with maps": "eager with maps",
    }  # fmt: skip
    columns = {what: name for what, name in columns.items() if found(rows, what=what) is not None}
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        at = {row["what"]: row for row in rows if row["shape"] == shape}
        cells = [f"{at[what]['x SDPA']:.2f}" if what in at else "-" for what in columns]
        lines.append([shape, f"{at['SDPA']['ms']:.3f} ms ({at['SDPA']['TFLOP/s']} TFLOP/s)", *cells])
    return table(["batch, heads / KV heads, tokens, head dim", "SDPA", *columns.values()], lines)


def edits_table(rows: Rows) -> list[str]:
    kinds = [what for what in dict.fromkeys(row["what"] for row in rows) if what not in ("plain", "SDPA")]
    lines = [
        [str(tokens), *("-" if row is None else f"{row['x plain']:.2f}" for row in at)]
        for tokens in dict.fromkeys(row["tokens"] for row in rows)
        for at in [[found(rows, tokens=tokens, what=what) for what in kinds]]
    ]
    return table(["tokens", *kinds], lines)


def decode_table(rows: Rows) -> list[str]:
    kinds = ["own", "own, row statistics", "own, redistribution", "FlexAttention"]
    lines = []
    for batch, keys in dict.fromkeys((row["batch"], row["keys"]) for row in rows):
        at = {row["what"]: row for row in rows if (row["batch"], row["keys"]) == (batch, keys)}
        lines.append(
            [f"{batch} x {keys}", f"{at['own']['TB/s']:.2f}", *(f"{at[what]['x SDPA']:.2f}" for what in kinds)]
        )
    return table(["batch x keys", "own, TB/s", *kinds], lines)


def model_table(rows: Rows) -> list[str]:
    return table(
        ["what", "how", "ms or tokens/s", "x plain"],
        [[r["what"], r["how"], str(r.get("ms", r.get("tokens/s"))), f"{r['x plain']:.2f}"] for r in rows],
    )


def goals_of_generation() -> Rows:
    """Rows of a model compiled with a static cache, where they were measured."""
    return result("kernels_static")["rows"] if (RESULTS / "kernels_static.json").exists() else []


def output_mib(shape: str) -> float:
    """MiB of the bf16 output of a shape as the results name it: batch, heads / KV heads, tokens, head dim."""
    batch, heads, tokens, dim = (int(part.strip(",").split("/")[0]) for part in shape.split()[:4])
    return batch * heads * tokens * dim * 2 / 2**20


Content = dict[str, Any]


def _on(content: dict[str, Any]) -> str:
    return f"{content['machine']['gpu'].split()[1]}, {content['versions']['commit'].split('-')[0]}"


def goals(*contents: Content) -> list[str]:
    """Every goal with what was measured, from the contents of prefill, edits, decode, model and host."""
    prefill, edits, decode, model, host = (content["rows"] for content in contents)
    machine = [_on(content) for content in contents]
    on_prefill, on_edits, on_decode, on_model, on_host = machine
    short, long, full, vit = list(dict.fromkeys(row["shape"] for row in prefill))
    sdpa = lambda shape, what: of(prefill, shape=shape, what=what)["x SDPA"]  # noqa: E731
    against_own = sdpa(long, "own forward, row statistics, 4 groups") / sdpa(long, "own forward")
    everything = of(prefill, shape=short, what="everything")
    eager = of(prefill, shape=short, what="eager with maps")
    big = [row for row in decode if row["batch"] * row["keys"] >= 131072]
    slowest = min(row["TB/s"] for row in big if row["what"] == "own")
    stats = max(row["x own"] for row in big if row["what"] == "own, row statistics")
    behind = max(row["x SDPA"] for row in decode if row["what"] == "own")
    flex = min(
        of(decode, batch=r["batch"], keys=r["keys"], what="FlexAttention")["ms"] / r["ms"]
        for r in decode
        if r["what"] == "own"
    )
    one = {row["what"]: row["microseconds"] for row in host if row["call"].startswith("one token")}
    many = {row["what"]: row["microseconds"] for row in host if row["call"].startswith("prefill")}
    read = lambda n: of(model, what=f"prefill of {n}", how="all statistics")["x plain"]  # noqa: E731
    speed = lambda how: next(r["x plain"] for r in model if r["how"] == how)  # noqa: E731
    moved = lambda n: of(edits, tokens=n, what="redistribution (VAR)")["x plain"]  # noqa: E731
    streaming = 1 / of(edits, tokens=16384, what="streaming, all heads")["x plain"]
    checks: list[tuple[str, str, str, bool | None, str]] = []
    at = on_prefill

    def at_least(what: str, goal: float, got: float, unit: str = "") -> None:
        checks.append((what, f">= {goal:g}{unit}", f"{got:.3g}{unit}", got >= goal, at))

    def at_most(what: str, goal: float, got: float, unit: str = "") -> None:
        checks.append((what, f"<= {goal:g}{unit}", f"{got:.3g}{unit}", got <= goal, at))

    at_least("own forward, speed against cuDNN, 16k causal", 0.92, 1 / sdpa(long, "own forward"))
    at_least("the same, 4k causal", 0.85, 1 / sdpa(short, "own forward"))
    at_least("the same, 8192 full, head dim 64", 1.0, 1 / sdpa(full, "own forward"))
    at_least("the same, 257 tokens, batch 64", 1.0, 1 / sdpa(vit, "own forward"))
    at_least("untouched call, speed against SDPA, 4k", 0.97, 1 / sdpa(short, "untouched"))
    at = on_host
    at_most("host time over SDPA's, untouched prefill", 40, many["untouched"] - many["SDPA"], " us")
    at_most("host time over SDPA's, untouched step of decoding", 18, one["untouched"] - one["SDPA"], " us")
    at = on_prefill
    at_most("row statistics with the exact top key, of own forward, 16k", 1.20, against_own)
    for what in ("topk 8", "group output of 64 rows"):
        row = found(prefill, shape=long, what=f"row statistics and {what}")
        if row is not None:
            beside = row["x SDPA"] / sdpa(long, "own forward")
            checks.append(
                (f"row statistics and {what}, of own forward, 16k", "a line of its own", f"{beside:.3g}", None, at)
            )
    at_most("everything, of SDPA, 4k causal", 1.8, everything["x SDPA"])
    at_most("everything, of SDPA, 16k causal", 1.7, sdpa(long, "everything"))
    at_most("everything, of SDPA, 8192 full, head dim 64", 1.7, sdpa(full, "everything"))
    at_most("everything, of SDPA, 257 tokens, batch 64", 1.25, sdpa(vit, "everything"))
    at_least("everything, times faster than eager with maps, 4k", 14, eager["ms"] / everything["ms"])
    for shape, name in ((short, "4k causal"), (long, "16k causal"), (full, "8192 full"), (vit, "257 tokens, batch 64")):
        row = of(prefill, shape=shape, what="everything")
        share = 100 * (row["extra MiB"] - output_mib(shape)) / row["map MiB"]
        what = f"everything, memory beyond the output, readings included, of the map's, {name}"
        checks.append((what, "< 1 %", f"{share:.3g} %", share < 1, at))
    at = on_edits
    at_most("redistribution, of own forward, 4k", 1.15, moved(4096))
    at_most("redistribution, of own forward, 16k", 1.15, moved(16384))
    at_least("streaming heads at 16k, times faster than own causal", 5.5, streaming)
    half = found(edits, tokens=32768, what="streaming, half of the heads")
    if half is not None:
        at_least("half of the heads streaming at 32k, times faster than own causal", 1.65, 1 / half["x plain"])
    at = on_decode
    at_least("decoding with 0.5 GB of keys and values or more", 3.44, slowest, " TB/s")
    at_most("decoding, time against SDPA, worst of all sizes", 1.0, behind)
    at_least("decoding, times faster than FlexAttention, worst of all sizes", 1.0, flex)
    at_most("row statistics in decoding, of own, 0.5 GB or more", 1.05, stats)
    at = on_model
    at_most("whole model, prefill of 8k with everything, of the plain one", 1.12, read(8192))
    at_most("whole model, prefill of 32k", 1.30, read(32768))
    at_least("generation with head gains, speed of the plain one", 0.97, speed("head gains"))
    at_least("generation with redistribution", 0.92, speed("redistribution"))
    for how, goal in (("head gains", 0.97), ("redistribution", 0.92)):
        row = found(goals_of_generation(), how=how) or {"failed": NO_STATIC}
        name = f"generation with {how}, compiled with a static cache (stretch)"
        if "x plain" in row:
            at_least(name, goal, row["x plain"])
        else:
            checks.append((name, f">= {goal:g}", row["failed"], False, "-"))
    path = RESULTS / "kernels_long.json"
    content = result(path.stem) if path.exists() else None
    row = None if content is None else found(content["rows"], what="everything")
    timed = row is not None and "ms" in row
    shown = f"{row['ms']} ms" if row is not None and timed else "not timed"
    checks.append(
        (
            "128k tokens, one layer, all statistics",
            "runs, time recorded",
            shown,
            timed,
            "-" if content is None else _on(content),
        )
    )
    words = {True: "yes", False: "**no**", None: "-"}
    header = ["goal", "set", "measured", "met", "on"]
    return table(header, [[what, goal, got, words[met], on] for what, goal, got, met, on in checks])
