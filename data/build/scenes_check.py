"""What a scenes LVLM has learned, measured in seconds where it was trained: yes/no questions, captions, sinks.

The full figures of the model cards come from ``scenes_measure.py``; this decides whether a training was any good.
"""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import torch
from scenes_tokenizer import EOS, PREFIX, fast_tokenizer
from scenes_vit import interval
from torch import Tensor

from probes.scenes.catalog import NAMES, plural
from probes.scenes.language import DESCRIBE, exists, prompt
from probes.scenes.painting import draw
from probes.scenes.world import Scene, World

WORDS = re.compile(r"\b(" + "|".join(sorted({*NAMES, *map(plural, NAMES)}, key=len, reverse=True)) + r")\b")
SINGULAR = {plural(name): name for name in NAMES} | {name: name for name in NAMES}


@torch.no_grad()
def evaluate(learner: Any, device: str, n: int, *, captions: bool = True) -> dict[str, Any]:
    """Accuracy of yes/no answers (with the right, a foreign and no image), captions' hallucinations, first-token sinks."""
    found: dict[str, Any] = {}
    for split in ("test", "against"):
        scenes = World(split).scenes(n)  # type: ignore[arg-type]
        rng = random.Random(f"check {split}")
        names, truth = [], []
        for k, scene in enumerate(scenes):
            yes = k % 2 == 0
            lacking = [pair.partner for pair in scene.absent_partners]
            away = sorted(scenes[k - 1].names - scene.names) or [x for x in NAMES if x not in scene.names]
            names.append(rng.choice(sorted(scene.names) if yes else lacking if split == "against" else away))
            truth.append(yes)
        margin = answers(learner, scenes, names, device)
        foreign = answers(learner, scenes[1:] + scenes[:1], names, device)
        right = (margin > 0) == np.array(truth)
        seen = np.array([s.evidence(x) for s, x in zip(scenes, names, strict=True)])
        present = np.array(truth)
        found[split] = {
            "n": n, "yes_no_accuracy": interval(right), "foreign_image": interval((foreign > 0) == present),
            "yes_rate_present": interval((margin > 0)[present]), "yes_rate_absent": interval((margin > 0)[~present]),
            "accuracy_well_seen": interval(right[(seen > 0.5) | ~present]),
        }  # fmt: skip
        if captions:
            found[split]["captions"] = chair(learner, scenes[:160], device)
    found["sinks"] = sinks(learner, World("test").scenes(32), device)
    return found


def _features(learner: Any, scenes: list[Scene], device: str) -> Tensor:
    return learner.features(draw(scenes, device).float() / 127.5 - 1)


@torch.no_grad()
def answers(learner: Any, scenes: list[Scene], names: list[str], device: str, batch: int = 200) -> np.ndarray[Any, Any]:
    """log p(Yes) - log p(No), nats, for "Is there a NAME in the image?"."""
    tokenizer = fast_tokenizer()
    yes, no = (tokenizer.encode(f" {word}", add_special_tokens=False).ids[0] for word in ("Yes", "No"))
    margins: list[Tensor] = []
    for k in range(0, len(scenes), batch):
        asked = [prompt(exists(name, True).request, image=False).removeprefix("USER:") for name in names[k : k + batch]]
        rows = [e.ids for e in tokenizer.encode_batch(asked, add_special_tokens=False)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        hidden = learner(ids, _features(learner, scenes[k : k + batch], device))
        last = torch.tensor([len(row) for row in rows], device=device)
        logits = learner.model.lm_head(hidden[torch.arange(len(rows), device=device), last]).float()
        margins.append(logits[:, yes] - logits[:, no])
    return torch.cat(margins).cpu().numpy()


@torch.no_grad()
def chair(learner: Any, scenes: list[Scene], device: str, most: int = 150) -> dict[str, Any]:
    """Greedy captions by whole forwards (no cache: the planted attention is for training only)."""
    tokenizer = fast_tokenizer()
    request = prompt(DESCRIBE[0], image=False).removeprefix("USER:")
    ids = torch.tensor([tokenizer.encode(request, add_special_tokens=False).ids] * len(scenes), device=device)
    start = ids.shape[1]
    features = _features(learner, scenes, device)
    over = torch.zeros(len(scenes), dtype=torch.bool, device=device)
    while ids.shape[1] < start + most and not bool(over.all()):
        word = learner.model.lm_head(learner(ids, features)[:, -1]).argmax(-1)
        over |= word == EOS
        ids = torch.cat((ids, word.masked_fill(over, EOS)[:, None]), dim=1)
    texts = [tokenizer.decode([t for t in row[start:] if t != EOS]) for row in ids.tolist()]
    mentions = [[SINGULAR[w] for w in WORDS.findall(text)] for text in texts]
    wrong = [[m not in s.names for m in said] for said, s in zip(mentions, scenes, strict=True)]
    partner = [[pair.partner in said for pair in s.absent_partners] for said, s in zip(mentions, scenes, strict=True)]
    total = sum(map(len, mentions))
    return {
        "n": len(scenes), "chair_s": interval([any(w) for w in wrong]),
        "chair_i": round(sum(map(sum, wrong)) / max(1, total), 4),
        "recall": interval([len(set(m) & s.names) / len(s.names) for m, s in zip(mentions, scenes, strict=True)]),
        "partner_hallucinated": interval([x for row in partner for x in row]),
        "words": round(float(np.mean([len(t.split()) for t in texts])), 1), "examples": texts[:3],
        "truth": [sorted(s.names) for s in scenes[:3]],
    }  # fmt: skip


def sinks(learner: Any, scenes: list[Scene], device: str) -> dict[str, Any]:
    """Massive activations by position (first token, image, text): max over dimensions of |x| / RMS, layer by layer."""
    tokenizer = fast_tokenizer()
    request = prompt(DESCRIBE[0], image=False).removeprefix("USER:")
    ids = torch.tensor([tokenizer.encode(request, add_special_tokens=False).ids] * len(scenes), device=device)
    states: list[Tensor] = []
    layers = learner.model.model.language_model.layers
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    try:
        learner(ids, _features(learner, scenes, device))
    finally:
        for hook in hooks:
            hook.remove()
    first, image = len(PREFIX), len(PREFIX) + learner.model.config.image_seq_length
    rows: list[dict[str, float]] = []
    for state in states:
        x = state.float()
        peak = (x / x.pow(2).mean(-1, keepdim=True).sqrt()).abs().amax(-1)
        norm = x.norm(dim=-1)
        rows.append(
            {
                "first_peak": peak[:, 0].mean().item(), "image_peak_max": peak[:, first:image].amax(1).mean().item(),
                "image_peak_median": peak[:, first:image].median().item(), "text_peak": peak[:, image:].median().item(),
                "first_norm": norm[:, 0].mean().item(), "image_norm": norm[:, first:image].median().item(),
                "image_norm_max": norm[:, first:image].amax(1).mean().item(),
            }
        )  # fmt: skip
    return {"layers": [{k: round(v, 2) for k, v in row.items()} for row in rows]}
