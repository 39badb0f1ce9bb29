"""Generation of the bundled LLaVA on a CPU with its heads changed, beside the plain model: promised are 1.5 times its time.

One picture, greedy, as many new tokens for all, two threads. VCD and guidance have a second branch and are excepted; they are
shown. Run it on a machine that does nothing else: ``python tests/benchmarks/bench_scenes_cpu.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _record import measure_ratios, record

import interp
from interp.evaluation import parse_setting

METHODS = (
    "MaskHeads('L1H0,L2H4,L3H5')", "MaskHeads('L1H0,L2H4,L3H5',kind=uniform)", "ScaleHeads('L2H4',1.5)", "VHR(2)",
    "VAR(.6,tau=3,dims=[44,247,201])", "PAI(.2)", "PAINT(.7,.4)", "Knockout(question,generated)",
    "Knockout(generated,generated,layers=[4,5,6,7])", "Streaming('L*H*')", "Temperature('L*H*',.8)", "TopKMask('L*H*')",
    "TopKMask('L*H*',k=16,mode=keep)", "GateHeads('L*H*')", "PAI(.2,1.1)", "VCD",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=64, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="methods whose name has this in it")
    parser.add_argument("--look", action="store_true", help="nothing is recorded")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    from probes.scenes import DESCRIBE, World, picture

    model = interp.load("scenes-lvlm", device="cpu", dtype="float32")
    inputs = model.encode(DESCRIBE[0], image=picture(World("test").scene(0)))
    options: dict[str, Any] = {"max_new_tokens": o.steps, "min_new_tokens": o.steps, "do_sample": False}

    def with_method(name: str | None) -> Callable[[], object]:
        used = [] if name is None else parse_setting(name).interventions

        def run() -> object:
            with torch.inference_mode():
                if name is None:
                    return model.generate(inputs, **options)
                with interp.hooked(model, interventions=used):
                    return model.generate(inputs, **options)

        return run

    chosen = [m for m in METHODS if o.only is None or o.only in m]
    seconds, ratios = measure_ratios(
        {"plain": with_method(None), **{m: with_method(m) for m in chosen}}, "plain", repeats=o.rounds
    )
    rows = [
        {
            "how": name, "seconds": round(seconds[name].median, 4), "x plain": round(ratio.median, 3),
            "low": round(ratio.low, 3), "high": round(ratio.high, 3),
        }
        for name, ratio in ratios.items()
    ]  # fmt: skip
    if o.look:
        for row in rows:
            print(row)
        return
    note = (
        f"scenes-lvlm, fp32, {o.threads} threads, one picture, {o.steps} new tokens; x plain is time in the same round, median and "
        "quartiles, promised at most 1.5"
    )
    record("scenes_cpu", rows, note=note)


if __name__ == "__main__":
    main()
