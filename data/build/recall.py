"""Train ``recall-lm``, or a planted variant of it: ``python data/build/recall.py --out data/models/recall-lm``.

With ``--planted L2H1,L3H4,L4H6`` only these heads have full attention; all others see the first token and the last 16. The
folder then has a ``headscope.json``, by which ``interp.load`` restores the restriction. ``--smoke`` trains a toy on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

say = partial(print, flush=True)
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the model; must be new, or hold an older one"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="cap of the training itself; the schedule still ends"
    )
    parser.add_argument("--planted", default="", metavar="HEADS", help="the only heads with full attention")
    parser.add_argument("--checkpoints", type=int, default=12, help="points of the curve, at log-spaced steps")
    parser.add_argument("--checkpoint-dir", type=Path, help="keep the weights of every point here; not tracked")
    parser.add_argument("--archive", type=Path, help="also write the folder as one tar file")
    parser.add_argument("--tokens", type=int, default=2**16, help="of a batch")
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=min(6, max(0, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--device", default="")
    parser.add_argument(
        "--compile", action="store_true", help="faster steps after two compilations; pays in long trainings"
    )
    parser.add_argument(
        "--shared", action="store_true", help="say in the card that the machine did other work meanwhile"
    )
    parser.add_argument("--sequences", type=int, default=500, help="held-out ones of each task and length")
    parser.add_argument(
        "--smoke", action="store_true", help="a toy, under two minutes on one CPU thread; fails if it does not learn"
    )
    args = parser.parse_args(given)
    if args.smoke:
        args.steps, args.tokens, args.longest, args.layers, args.hidden = 60, 2**10, 64, 2, 64
        args.rate, args.minutes = 4e-3, min(args.minutes, 1.0)
        args.device, args.workers, args.compile, args.sequences, args.checkpoints = "cpu", 0, False, 16, 3
    for name in ("steps", "minutes", "tokens", "longest", "layers", "hidden", "rate", "sequences", "checkpoints"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be greater than 0, got {getattr(args, name)}")
    if not 64 <= args.longest <= 1024 or args.tokens < 3 * args.longest:
        parser.error(
            f"--longest must be 64 to 1024, and --tokens hold 3 of those, got {args.longest} and {args.tokens}"
        )
    if args.seed < 0 or args.seed >= 2**31:
        parser.error(f"--seed must be 0 to 2**31 - 1, got {args.seed}")
    return args


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train, judge, save; returns the metrics."""
    args = arguments(given)
    import torch
    import transformers
    from recall_card import card
    from recall_data import LENGTHS
    from recall_metrics import accuracy, curve_point, heads, leakage
    from recall_model import PLAN, SINK, WINDOW, by_layer, make_model
    from recall_train import Settings, train

    from probes.recall import TASKS, tokenizer

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_float32_matmul_precision("high")
    named = _named(args, by_layer)
    PLAN.far = named or None
    model = make_model(args.seed, layers=args.layers, hidden=args.hidden, feed=args.hidden * 5 // 3).to(device)
    args.out.mkdir(parents=True, exist_ok=True)
    curve: list[dict[str, Any]] = []
    asked = max(2, args.checkpoints)
    points = {0, *np.unique(np.geomspace(min(30, args.steps), args.steps, asked - 1).round().astype(int)).tolist()}
    judged_length = min(256, args.longest)
    began = time.monotonic()

    def watch(step: int, loss: Any) -> None:
        if step % max(1, args.steps // 20) == 0 and step:
            say(f"step {step} loss {loss.item():.3f} {time.monotonic() - began:.0f} s")
        if step in points:
            point = curve_point(model, step, judged_length, args.seed, min(64, args.sequences))
            curve.append({**point, "minutes": round((time.monotonic() - began) / 60, 3)})
            told = {task: round(v["accuracy"], 3) for task, v in point["tasks"].items()}
            say(
                f"  point {step}: {told} induction {point['induction_max']:.2f} sinks {point['sink_rate']:.2f}",
                flush=True,
            )
            if args.checkpoint_dir is not None:
                _save(model, args.checkpoint_dir / f"step-{step:06d}", tokenizer(), named)

    settings = Settings(
        args.seed, args.steps, args.minutes, args.tokens, args.longest, args.rate, args.workers, args.compile
    )
    trained = train(model, settings, device, watch)
    losses = trained.pop("loss")
    if args.smoke and not np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]):
        raise SystemExit(f"the loss did not fall: {losses[:5]} at first, {losses[-5:]} at the end")
    if curve[-1]["step"] != trained["steps"]:
        curve.append(curve_point(model, trained["steps"], judged_length, args.seed, min(64, args.sequences)))
    # What is judged is what is saved: weights rounded to fp16.
    model.half().float()
    lengths = [n for n in LENGTHS if n <= args.longest]
    metrics: dict[str, Any] = {
        "accuracy": {t: {str(n): accuracy(model, t, args.sequences, n, args.seed) for n in lengths} for t in TASKS},
        "heads": heads(model, args.seed),
        "training": {
            **trained, "loss_first": float(np.mean(losses[:10])), "loss_last": float(np.mean(losses[-10:])),
            "seed": args.seed, "tokens_per_step": args.tokens, "peak_rate": args.rate, "compiled": args.compile,
            "parameters": sum(p.numel() for p in model.parameters()), "device": _device(device, args.shared),
            "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
            "command": _command(args),
        },
        "curve": curve,
    }  # fmt: skip
    if named:
        metrics["planted"] = {"heads": args.planted, "sink": SINK, "window": WINDOW}
        metrics["leakage"] = leakage(model, named, args.longest, args.seed, args.sequences)
    _save(model, args.out, tokenizer(), named)
    metrics["minutes_in_all"] = (time.monotonic() - began) / 60
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (args.out / "README.md").write_text(card(args.out.name, metrics))
    if args.archive is not None:
        with tarfile.open(args.archive, "w") as tar:
            tar.add(args.out, args.out.name)
    # 0 on a CPU; another place in a batch may round differently on a GPU.
    if metrics.get("leakage", {}).get("logit_change", 0.0) > 1e-4:
        raise SystemExit(f"the plant leaks: {metrics['leakage']}")
    say(json.dumps({k: metrics[k] for k in ("accuracy", "training", "minutes_in_all")}, indent=1))
    return metrics


def _named(args: argparse.Namespace, by_layer: Any) -> dict[int, list[int]]:
    named = by_layer(args.planted)
    if any(layer >= args.layers or max(found) >= 8 for layer, found in named.items()):
        raise SystemExit(f"--planted must name heads of {args.layers} layers with 8 heads each, got {args.planted}")
    return named


def _save(model: Any, folder: Path, words: Any, named: dict[int, list[int]]) -> None:
    """Weights as fp16 (the model itself stays fp32), tokenizer, and the plant."""
    import copy

    folder.mkdir(parents=True, exist_ok=True)
    small = copy.deepcopy(model).half().cpu()
    small.set_attn_implementation("sdpa")
    small.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    words.save_pretrained(folder)
    if named:
        from recall_model import SINK, WINDOW

        ids = [f"L{layer}H{head}" for layer, found in sorted(named.items()) for head in found]
        edit = {"kind": "only_heads_see_far", "stack": "text", "heads": ids, "sink": SINK, "window": WINDOW}
        (folder / "headscope.json").write_text(json.dumps({"base_edit": edit}, indent=1) + "\n")


def _device(device: Any, shared: bool) -> str:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name} (shared with other trainings)" if shared else name


def _command(args: argparse.Namespace) -> str:
    parts = ["python data/build/recall.py", f"--out data/models/{args.out.name}", f"--seed {args.seed}"]
    parts += ["--smoke"] if args.smoke else [f"--steps {args.steps}", f"--minutes {args.minutes:g}"]
    return " ".join([*parts, *([f"--planted {args.planted}"] if args.planted else [])])


if __name__ == "__main__":
    main()
