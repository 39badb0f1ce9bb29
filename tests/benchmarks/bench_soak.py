"""A soak: generations of the bundled LLaVA under interventions switched on and off in rotation; is anything left behind?

Every generation opens what it needs and closes it: captures, methods from papers, sessions inside sessions, a session that an error
leaves. After each round the process is looked at: resident memory before and after a collection, Python objects, tensors, hooks.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, record
from torch import Tensor, nn

import interp

Row = dict[str, Any]
Way = Callable[[Any, Any], object]

SETTLE = 0.2
"""Share of the rounds after which caches have what they will ever hold."""
MEMORY = 0.03
OBJECTS = 0.001
"""Growth from there to the end that counts as flat."""
TOKENS = 8


class Interrupted(Exception):
    """What a user's function raises in the middle of a generation."""


def generate(model: Any, inputs: Any) -> Any:
    return model.generate(inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)


def under(*interventions: interp.Intervention, capture: interp.Capture | None = None, read: bool = True) -> Way:
    """A generation in a session of its own; the trace is made (it is put off until somebody asks) and dropped."""

    def way(model: Any, inputs: Any) -> None:
        with interp.hooked(model, capture=capture, interventions=list(interventions)) as run:
            generate(model, inputs)
        if capture is not None and read:
            assert run.trace["text"].sizes["layer"] > 0

    return way


def nested(model: Any, inputs: Any) -> None:
    with (
        interp.hooked(model, interventions=[interp.ScaleHeads("L0H0", 0.5)]),
        interp.hooked(model, capture=everything()),
    ):
        generate(model, inputs)


def interrupted(model: Any, inputs: Any) -> None:
    seen: list[int] = []

    def after(call: Any, z: Tensor) -> Tensor:
        seen.append(1)
        if len(seen) > 20:
            raise Interrupted
        return z

    try:
        with interp.hooked(model, capture=everything(), interventions=[interp.Custom(after=after)]):
            generate(model, inputs)
    except Interrupted:
        return
    raise RuntimeError("the generation should not have come to its end")


def plain(model: Any, inputs: Any) -> None:
    generate(model, inputs)


def everything() -> interp.Capture:
    return interp.Capture(row_stats=True, received=True, pooled=16)


def ways() -> dict[str, Way]:
    """One round: what each generation has on."""
    return {
        "nothing": plain,
        "row statistics, columns, pooled maps": under(capture=everything()),
        "the same, never looked at": under(capture=everything(), read=False),
        "VHR": under(interp.VHR(2.0)),
        "VAR": under(interp.VAR(0.6, tau=3, dims=[44, 247, 201])),
        "PAI": under(interp.PAI(0.2)),
        "PAINT": under(interp.PAINT(0.7, 0.4)),
        "MaskHeads": under(interp.MaskHeads("L1H*,L3H0", kind="uniform"), capture=interp.Capture(row_stats=True)),
        "Streaming": under(interp.Streaming("L*H0", scope="all")),
        "TopKMask": under(interp.TopKMask("L*H*", k=4)),
        "Temperature and a function": under(
            interp.Temperature("L*H*", 1.5), interp.Custom(after=lambda call, z: 0.9 * z)
        ),
        "a session inside another": nested,
        "an error in the middle": interrupted,
    }


def resident() -> float:
    """MiB that the process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def look(module: nn.Module, generations: int) -> Row:
    before = resident()
    gc.collect()
    objects = gc.get_objects()
    tensors = [x for x in objects if type(x) in (Tensor, nn.Parameter)]
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    row = {
        "generations": generations, "rss mib": round(before, 2), "rss mib collected": round(resident(), 2),
        "objects": len(objects), "tensors": len(tensors),
        "tensor mib": round(sum(x.numel() * x.element_size() for x in tensors) / 2**20, 3),
        "hooks": sum(len(getattr(sub, name)) for sub in module.modules() for name in hooks), "threads": threading.active_count(),
    }  # fmt: skip
    del objects, tensors
    return row


def soak(model: Any, inputs: list[Any], n: int) -> list[Row]:
    chosen = ways()
    # Transformers puts hooks of its own on a model that runs for the first time.
    plain(model, inputs[0])
    rows: list[Row] = [look(model.module, 0)]
    for i in range(n):
        list(chosen.values())[i % len(chosen)](model, inputs[(i // len(chosen)) % len(inputs)])
        if (i + 1) % len(chosen) == 0 or i + 1 == n:
            rows.append(look(model.module, i + 1))
            print(
                f"-- {i + 1} of {n}: {rows[-1]['rss mib collected']:.1f} MiB, {rows[-1]['objects']} objects",
                file=sys.stderr,
            )
    return rows


def growth(rows: list[Row], key: str) -> tuple[float, float]:
    """After the first fifth, and at the end: medians of three looks, so that one does not decide."""
    start = next(i for i, row in enumerate(rows) if row["generations"] >= SETTLE * rows[-1]["generations"])
    first, last = (sorted(row[key] for row in part)[1] for part in (rows[start : start + 3], rows[-3:]))
    return first, last


def figure(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    x = [row["generations"] for row in rows]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(x, [row["rss mib"] for row in rows], color="0.7", label="after a round")
    left.plot(x, [row["rss mib collected"] for row in rows], color="C0", label="after a collection")
    left.set(ylim=(0, 1.15 * max(row["rss mib"] for row in rows)), ylabel="resident memory (MiB)", xlabel="generations")
    left.legend(frameon=False, loc="lower right")
    right.plot(x, [row["objects"] / 1e3 for row in rows], color="C0", label="Python objects")
    right.set(
        ylim=(0, 1.15 * max(row["objects"] for row in rows) / 1e3), ylabel="objects (thousands)", xlabel="generations"
    )
    other = right.twinx()
    other.plot(x, [row["tensors"] for row in rows], color="C1", label="tensors")
    other.set(ylim=(0, 2 * max(row["tensors"] for row in rows)), ylabel="tensors")
    right.legend([*right.lines, *other.lines], ["Python objects", "tensors"], frameon=False, loc="lower right")
    for axis in (left, right, other):
        axis.spines["top"].set_visible(False)
    fig.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="generations")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not Path("/proc/self/statm").exists():
        print("-- no /proc here: resident memory cannot be read")
        return
    from probes.scenes import DESCRIBE, World, picture

    torch.set_num_threads(options.threads)
    model = interp.load("scenes-lvlm")
    scenes = World("test").scenes(options.images)
    inputs = [model.encode(DESCRIBE[0], image=picture(scene)) for scene in scenes]
    with torch.no_grad():
        rows = soak(model, inputs, options.n)
    memory, objects, tensors = (growth(rows, key) for key in ("rss mib collected", "objects", "tensors"))
    flat = (
        memory[1] <= memory[0] * (1 + MEMORY) and objects[1] <= objects[0] * (1 + OBJECTS) and tensors[1] <= tensors[0]
    )
    kinds = ", ".join(ways())
    record(
        "soak", rows,
        note=f"scenes-lvlm, {TOKENS} tokens a generation, {options.images} pictures, one after another: {kinds}; looked at after "
        f"each round; flat is, from {SETTLE:.0%} of the generations to the end, at most {MEMORY:.0%} of resident memory and "
        f"{OBJECTS:.1%} of objects more, and no tensor more",
    )  # fmt: skip
    figure(rows, RESULTS / "soak.png")
    print(
        f"memory {memory[0]:.1f} -> {memory[1]:.1f} MiB, objects {objects[0]} -> {objects[1]}, tensors {tensors[0]} -> {tensors[1]}"
    )
    if not flat or rows[-1]["hooks"] != rows[0]["hooks"]:
        sys.exit("memory is not flat, or hooks were left")


if __name__ == "__main__":
    main()
