"""What every build script of a bundled model shares: options, a schedule, saving, the model card."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODELS = ROOT / "data" / "models"


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """The options that all build scripts have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--seed", type=int, default=0, help="of weights and data")
    options.add_argument("--out", type=Path, default=MODELS / out, help="folder of the finished model")
    options.add_argument("--steps", type=int, default=None, help="optimizer steps; what a model card names")
    options.add_argument(
        "--minutes", type=float, default=None, help="choose the steps so that training takes this long"
    )
    options.add_argument("--batch", type=int, default=None, help="pictures in a step")
    options.add_argument(
        "--workers", type=int, default=min(12, max(1, (os.cpu_count() or 2) - 2)), help="processes that make data"
    )
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--no-compile", action="store_true", help="do not compile the model (compiled on CUDA only)")
    options.add_argument("--archive", type=Path, default=None, help="also write the folder as one tar file")
    options.add_argument("--smoke", action="store_true", help="a toy, under two minutes on a CPU; the loss must fall")
    return options


class Pace:
    """Steps of a training: fixed, or chosen from the speed of its first steps so that it takes some minutes.

    The learning rate rises for 3 % of the steps, stays, and falls over the last 40 % to a hundredth.
    """

    PROBE = 40
    WARM = 20
    """Steps that are timed, after those that compile and fill caches."""

    def __init__(self, steps: int | None, minutes: float | None, rate: float) -> None:
        if steps is None and minutes is None:
            raise SystemExit("give --steps or --minutes")
        self.steps, self.minutes, self.rate = steps, minutes, rate
        self.start = time.perf_counter()
        self._mark = 0.0

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Step numbers and learning rates."""
        step = 0
        while self.steps is None or step < self.steps:
            if self.steps is None:
                self._measure(step)
            yield step, self.rate * self._share(step)
            step += 1

    @property
    def spent(self) -> float:
        """Minutes since the beginning."""
        return (time.perf_counter() - self.start) / 60

    def _measure(self, step: int) -> None:
        if step in (self.WARM, self.WARM + self.PROBE) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == self.WARM:
            self._mark = time.perf_counter()
        if step == self.WARM + self.PROBE:
            assert self.minutes is not None
            now = time.perf_counter()
            each = (now - self._mark) / self.PROBE
            left = self.minutes * 60 - (now - self.start)
            self.steps = step + max(1, int(left / each))
            say(f"{each * 1e3:.1f} ms a step: {self.steps} steps")

    def _share(self, step: int) -> float:
        steps = self.steps or 10**9
        warm = max(10, int(0.03 * steps)) if self.steps else 100
        fall = 0.6 * steps
        if step < warm:
            return (step + 1) / warm
        if step <= fall:
            return 1.0
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - fall) / (steps - fall)))


def optimizer(module: nn.Module, decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=parameters[0].is_cuda)


def train(
    pace: Pace,
    module: nn.Module,
    batches: Iterator[Any],
    loss_of: Callable[[Any], Tensor],
    device: str,
    *,
    clip: float = 1.0,
    each: int = 100,
    label: str = "",
) -> list[float]:
    """Train; the losses, averaged over every ``each`` steps."""
    learner = optimizer(module)
    curve: list[float] = []
    running: list[Tensor] = []
    begun = time.perf_counter()
    for step, rate in pace:
        for group in learner.param_groups:
            group["lr"] = rate
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=device.startswith("cuda")):
            loss = loss_of(next(batches))
        learner.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        learner.step()
        running.append(loss.detach())
        if len(running) == each:
            curve.append(torch.stack(running).mean().item())
            running.clear()
            say(f"{label} step {step + 1}/{pace.steps or '?'} loss {curve[-1]:.4f} {time.perf_counter() - begun:.0f} s")
            if not math.isfinite(curve[-1]):
                raise SystemExit(f"the loss of {label} is no longer finite at step {step + 1}")
    return curve


def say(line: str) -> None:
    """One line of progress."""
    print(line, flush=True)


def machine(device: str) -> str:
    """What it ran on."""
    what = torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU"
    import transformers

    return f"{what}, torch {torch.__version__}, transformers {transformers.__version__}"


def save_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


def archive(folder: Path, target: Path | None) -> None:
    """Write the folder as one tar file, where one is wanted."""
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w") as tar:
            tar.add(folder, arcname=folder.name)
        say(f"{target.name}: {target.stat().st_size / 2**20:.1f} MiB")


def command(script: str, options: argparse.Namespace, steps: int | None) -> str:
    """The command that makes this model again."""
    parts = [f"python data/build/{script} --seed {options.seed} --steps {steps}"]
    names = ("batch", "planted", "strength", "text_steps")
    parts += [
        f"--{name.replace('_', '-')} {value}"
        for name in names
        if (value := getattr(options, name, None)) not in (None, "", 1.0)
    ]
    return " ".join(parts)
