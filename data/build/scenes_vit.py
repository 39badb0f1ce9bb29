"""Train ``scenes-vit``: which objects does a scene show?

One command on a GPU: ``python data/build/scenes_vit.py --minutes 2``; a toy on a CPU: ``--smoke``.

The class token's softmax is trained towards a share of 1/n on each of the n objects of the scene. While it trains, a linear
layer (thrown away afterwards) also names what every patch shows: the language model will read the patches.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import Pace, say
from scenes_card import write_vit_card
from scenes_data import Pictures, present, stream
from scenes_tokenizer import image_processor
from torch import Tensor, nn

from probes.scenes.catalog import NAMES
from probes.scenes.painting import draw
from probes.scenes.world import SIZE, Scene, World

PATCH = 8
GRID = SIZE // PATCH


def config(*, smoke: bool = False) -> Any:
    """Six layers of five heads of 32."""
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=64 if smoke else 160, num_hidden_layers=2 if smoke else 6, num_attention_heads=2 if smoke else 5,
        intermediate_size=128 if smoke else 480, image_size=SIZE, patch_size=PATCH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, id2label=dict(enumerate(NAMES)), label2id={n: k for k, n in enumerate(NAMES)},
    )  # fmt: skip


class Learner(nn.Module):
    """The classifier and the linear layer on its patches."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        from transformers import ViTForImageClassification

        self.model = ViTForImageClassification(settings)
        self.patches = nn.Linear(settings.hidden_size, len(NAMES) + 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model.vit(pixels).last_hidden_state
        return self.model.classifier(hidden[:, 0]), self.patches(hidden[:, 1:])


def pixels_of(batch: dict[str, Tensor], device: str) -> Tensor:
    """Painted scenes as the processor would hand them over, fp32 in [-1, 1]."""
    with torch.no_grad():
        return draw({key: batch[key] for key in ("objects", "air", "paint")}, device).float() / 127.5 - 1


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure on held-out scenes, save."""
    options = common.parser(__doc__ or "", "scenes-vit").parse_args(arguments)
    if options.smoke:
        options.steps, options.batch, options.workers = options.steps or 60, options.batch or 16, 0
    batch = options.batch = options.batch or 256
    torch.manual_seed(options.seed)
    device = options.device
    learner = Learner(config(smoke=options.smoke)).to(device)
    forward: Any = learner
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        forward = learner if options.no_compile else torch.compile(learner)
    none = torch.ones(len(NAMES) + 1, device=device)
    none[-1] = 0.1  # Most patches show nothing.

    def loss_of(one: dict[str, Tensor]) -> Tensor:
        logits, shown = forward(pixels_of(one, device))
        target = one["present"].float()
        whole = F.cross_entropy(logits.float(), target / target.sum(1, keepdim=True))
        return whole + F.cross_entropy(shown.float().flatten(0, 1), one["patches"].flatten(), weight=none)

    pace = Pace(options.steps, options.minutes, 1e-3)
    batches = stream(Pictures(World("train", options.seed), batch, GRID), options.workers, device)
    curve = common.train(pace, learner, batches, loss_of, device, each=20 if options.smoke else 100, label="vit")
    minutes = pace.spent
    metrics = evaluate(learner.model.eval(), device, 64 if options.smoke else 4000)
    metrics |= {
        "loss": curve, "steps": pace.steps, "batch": batch, "minutes": round(minutes, 2), "seed": options.seed,
        "machine": common.machine(device), "command": common.command("scenes_vit.py", options, pace.steps),
    }  # fmt: skip
    save(learner.model, options, metrics)
    return metrics


@torch.no_grad()
def evaluate(model: Any, device: str, n: int) -> dict[str, Any]:
    """Accuracy on scenes of both test splits: is the first class there; are the first n the n that are there?"""
    found: dict[str, Any] = {}
    for split in ("test", "against"):
        scenes = World(split).scenes(n)
        logits = torch.cat([logits_of(model, scenes[k : k + 250], device) for k in range(0, n, 250)]).cpu().numpy()
        truth = present(scenes)
        order = np.argsort(-logits, axis=1)
        first = truth[np.arange(n), order[:, 0]]
        share = [truth[k, order[k, : truth[k].sum()]].mean() for k in range(n)]
        single = truth.sum(1) == 1
        clear = np.array([s.clarity * min(s.evidence(x) / s.clarity for x in s.names) > 0.5 for s in scenes])
        found[split] = {
            "n": n, "first_class_present": interval(first), "recall_at_n": interval(share),
            "single_object_accuracy": interval(first[single]), "recall_at_n_well_seen": interval(np.array(share)[clear]),
        }  # fmt: skip
        say(f"vit {split}: {found[split]}")
    return found


def interval(values: Any, seed: int = 0) -> list[float]:
    """Mean and its bootstrap interval by picture: ``[mean, low, high]`` at 95 %."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        return [float("nan")] * 3
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (1000, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [round(float(v), 4) for v in (values.mean(), low, high)]


def logits_of(model: Any, scenes: list[Scene], device: str) -> Tensor:
    """Class logits ``[scene, object]``."""
    return model(draw(scenes, device).float() / 127.5 - 1).logits.float()


def save(model: Any, options: Namespace, metrics: dict[str, Any]) -> None:
    """Weights in fp16, image processor, metrics, card."""
    shutil.rmtree(options.out, ignore_errors=True)
    model.half().save_pretrained(options.out)
    image_processor(SIZE).save_pretrained(options.out)
    common.save_metrics(options.out, metrics)
    write_vit_card(options.out, metrics)
    common.archive(options.out, options.archive)


if __name__ == "__main__":
    main()
