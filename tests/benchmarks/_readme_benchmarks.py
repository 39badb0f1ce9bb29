"""The benchmarks section of the README, from the recorded results.

A results file is shown by the function registered for its name, or for the longest beginning of its name: ``shows("kernels_")``
would get every ``kernels_*.json``. A file nobody shows is an error, so that no figure is left out in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from _results import RESULTS, where

Show = Callable[[dict[str, Any]], str]
_shows: dict[str, Show] = {}


def shows(beginning: str) -> Callable[[Show], Show]:
    """Register a function from the content of a results file to Markdown (a line, or lines with a table)."""

    def register(function: Show) -> Show:
        _shows[beginning] = function
        return function

    return register


def section() -> str:
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem.startswith(("proof_", "kernels_", "planted")):  # these have sections of their own
            continue
        content = json.loads(path.read_text())
        known = [beginning for beginning in _shows if path.stem.startswith(beginning)]
        if not known:
            raise ValueError(f"{path.name} must have a function that shows it in {__name__}.py, got none")
        text = _shows[max(known, key=len)](content)
        parts.append(f"- {text} *({where(content)}; `{path.stem}.json`)*")
    return "\n".join(parts)


def by(content: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in content["rows"]}


@shows("import")
def _import(content: dict[str, Any]) -> str:
    rows = by(content, "step")
    cost, use = rows["import interp, after them"]["seconds"], rows["first use of every name of interp"]["seconds"]
    return (
        f"`import interp` costs **{cost * 1e3:.1f} ms** over `import torch, xarray` (promised: at most 500 ms); what its names need "
        f"is imported when they are first used, {use:.1f} s for all of them."
    )


@shows("session")
def _session(content: dict[str, Any]) -> str:
    tasks = [
        f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}) for a {row['task']}"
        for row in content["rows"]
        if "ratio" in row
    ]
    opening = by(content, "task")["opening and closing alone"]["hooked seconds"]
    return (
        "`hooked` that captures and changes nothing, against the plain model of SmolLM2-135M's shape, ratio of times, median "
        f"(quartiles): **{'; '.join(tasks)}** (promised: under 1.03), {opening * 1e3:.1f} ms of it for opening and closing. "
        "Nothing is left on the model."
    )


@shows("statistics_cpu")
def _statistics_cpu(content: dict[str, Any]) -> str:
    row = by(content, "way")["ours, output and all statistics"]
    both = by(content, "way")["eager, output, map and statistics of it"]
    return (
        "Output and all row and column statistics of one causal call, N = 8192, 8 heads of 64, on a CPU: extra peak memory "
        f"**{row['extra peak share of map']:.1%}** of the map's bytes (promised: under 5 %), time "
        f"**{row['time ratio to eager with map']:.2f}** of eager attention that returns its map "
        f"({row['seconds'] / both['seconds']:.2f} of eager that takes the same statistics from it)."
    )


@shows("long_prefill")
def _long_prefill(content: dict[str, Any]) -> str:
    rows = by(content, "way")
    plain, read = rows["plain"], rows["hooked, row statistics"]
    return (
        "Hooked prefill of 32k tokens through 2 layers x 8 heads on a CPU, row statistics of every head: the peak grows by "
        f"**{read['peak mib']:.0f} MiB** (plain model {plain['peak mib']:.0f} MiB), {read['share of a one-byte N x N']:.0%} of the "
        f"smallest N x N tensor there could be and {read['share of the maps']:.1%} of the maps (promised: no N x N tensor)."
    )


@shows("score_long")
def _score_long(content: dict[str, Any]) -> str:
    measured = [row for row in content["rows"] if "seconds" in row]
    longest = max(row["tokens"] for row in measured)
    seconds: dict[str, list[str]] = {}
    for row in measured:
        seconds.setdefault(row["way"], []).append(f"{row['seconds']:.1f}")
    times = [f"{way} **{' / '.join(each)} s**" for way, each in seconds.items()]
    lengths = " / ".join(str(n) for n in dict.fromkeys(row["tokens"] for row in measured))
    peaks = [row["peak MiB"] / 1024 for row in measured if row["tokens"] == longest]
    share = max(row["share of the maps"] for row in measured if row["tokens"] == longest)
    growth = [row["peak over linear"] for row in content["rows"] if "peak over linear" in row]
    linear = (
        f"; up to there it grows {min(growth):.2f} to {max(growth):.2f} times as fast as the length" if growth else ""
    )
    return (
        f"Scores that read statistics, on prompts of {lengths} tokens: {', '.join(times)}. At {longest} tokens the peak beyond the "
        f"weights is {min(peaks):.1f} to {max(peaks):.1f} GiB, at most {share:.1%} of the maps{linear} (promised: linear memory). "
        f"{content['note']}."
    )


@shows("dashboard")
def _dashboard(content: dict[str, Any]) -> str:
    timed = [
        f"{row['what']} **{row['seconds'] * 1e3:.0f} ms** ({row['promised'] * 1e3:.0f})"
        for row in content["rows"]
        if "seconds" in row
    ]
    sizes = [
        f"{row['what']} **{row['bytes'] / 1e3:.0f} kB** ({row['promised_bytes'] / 1e3:.0f})"
        for row in content["rows"]
        if "bytes" in row
    ]
    heap, server = (by(content, "what")[f"500 head switches, {what}"] for what in ("browser heap", "server memory"))
    return (
        f"The dashboard in headless Chromium on two cores, medians (promised): {', '.join([*timed, *sizes])}. Over 500 head switches "
        f"the browser's heap went from {heap['mb_after_a_fifth']:.1f} to {heap['mb_at_the_end']:.1f} MB, the server's memory from "
        f"{server['mb_after_a_fifth']:.0f} to {server['mb_at_the_end']:.0f} MB. {content['note']}"
    )


@shows("sweep_cpu")
def _sweep_cpu(content: dict[str, Any]) -> str:
    loops = ("loop of hooks", "loop of hooks, last logits", "TransformerLens loop")
    lengths = list(dict.fromkeys(row["tokens"] for row in content["rows"]))
    parts: list[str] = []
    for tokens in lengths:
        rows = {row["way"]: row for row in content["rows"] if row["tokens"] == tokens}
        ratios = [f"{way} **{rows[way]['ratio to ours']:.1f} x**" for way in loops if way in rows]
        ours, gates = rows["ours, exact"]["seconds"], rows["ours, gradient gates"]["seconds"]
        parts.append(f"{tokens} tokens {ours:.2f} s ({', '.join(ratios)} as long; gradient gates {gates:.2f} s)")
    worst = max((row.get("largest difference", 0.0) for row in content["rows"]), default=0.0)
    measured = any(row["way"] == "TransformerLens loop" for row in content["rows"])
    absent = "" if measured else " TransformerLens was not installed, so not measured."
    return (
        f"Exact ablation of every head on a CPU: {'; '.join(parts)} (promised: at least 2 x against either loop). Effects differ from "
        f"the loops' by at most {worst:.1e}.{absent} {content['note']}"
    )


@shows("sweep_gpu")
def _sweep_gpu(content: dict[str, Any]) -> str:
    promised = {64: 15.0, 256: 4.5, 1024: 1.7}
    parts = [
        f"{row['tokens']} tokens {row['ours seconds']:.1f} s, **{row['ratio']:.1f} x** faster than the loop's {row['loop seconds']:.0f} s"
        f" (promised {promised[row['tokens']]} x), gradient gates {row['gradient ratio']:.0f} x"
        for row in content["rows"]
    ]
    least = min(row["same order beyond the floor"] for row in content["rows"])
    return (
        f"Exact ablation of every head of an 8B-shaped model on a GPU, one run: {'; '.join(parts)} (promised: 171 x). Pairs of heads "
        f"further apart than the noise of bf16 stand in the loop's order: {least:.0%}. {content['note']}"
    )


FASTEST = "x plain, fastest rounds"


@shows("generation_lvlm")
def _generation_lvlm(content: dict[str, Any]) -> str:
    rows = {row["how"]: row for row in content["rows"]}
    parts = [
        f"{how} **{row['x plain']:.2f}** ({row['lowest']:.2f} to {row['highest']:.2f}; {row['x plain, decode']:.2f} after the first token"
        f"{f', {row[FASTEST]:.2f} by the fastest rounds' if FASTEST in row else ''})"
        for how, row in rows.items()
        if "x plain" in row and how != "plain"
    ]
    met = ", ".join(
        f"{how} {goal:.2f}, **{'met' if rows[how]['x plain'] >= goal else 'not met'}**"
        for how, goal in (("VHR", 0.97), ("VAR", 0.92))
    )
    first = {how: rows[how]["prefill ms"] for how in ("plain", "text only, plain", "VHR", "VAR")}
    return (
        f"Tokens per second of an LVLM under interventions, against the plain model (promised: {met}): {'; '.join(parts)}. To the first "
        f"token the plain model takes {first['plain']:.0f} ms, on the text alone {first['text only, plain']:.0f}, VHR {first['VHR']:.0f}, "
        f"VAR {first['VAR']:.0f}. {content['note']}."
    )


@shows("soak")
def _soak(content: dict[str, Any]) -> str:
    rows = content["rows"]
    n, first, last = rows[-1]["generations"], rows[0], rows[-1]
    settled = [row for row in rows if row["generations"] >= 0.2 * n]
    memory = [row["rss mib collected"] for row in settled]
    objects = [row["objects"] for row in settled]
    return (
        f"A soak on a CPU: {n} generations with interventions, captures and errors in rotation. From a fifth of them to the end resident "
        f"memory stays between **{min(memory):.0f} and {max(memory):.0f} MiB** ({memory[0]:.0f} at first, {memory[-1]:.0f} at last; "
        f"{first['rss mib collected']:.0f} before the first round), Python objects go from {objects[0]} to **{objects[-1]}**, tensors from "
        f"{settled[0]['tensors']} to {last['tensors']}; no hook is left ([figure](tests/benchmarks/results/soak.png)). {content['note']}."
    )


@shows("scenes_cpu")
def _scenes_cpu(content: dict[str, Any]) -> str:
    branched = ("VCD", "PAI(.2,1.1)")
    rows = {row["how"]: row for row in content["rows"] if row["how"] != "plain"}
    own = {how: row for how, row in rows.items() if how not in branched}
    over = [how for how, row in own.items() if row["x plain"] > 1.5]
    told = "; ".join(f"`{how}` **{row['x plain']:.2f}**" for how, row in rows.items())
    return (
        f"Time of the bundled LVLM's generation on a CPU under a method, in times of the plain model's (promised: at most 1.5, methods "
        f"with a second branch excepted: **{len(own) - len(over)} of {len(own)} meet it**): {told}. {content['note']}."
    )
