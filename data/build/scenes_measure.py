"""Measure a scenes LVLM as its card reports it: hallucination by evidence and prior, CHAIR, POPE, with and without its image.

``python data/build/scenes_measure.py data/models/scenes-lvlm`` writes ``measured.json`` beside the weights. On a GPU it takes
under two minutes; ``--n 4`` makes a quick one.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from probes.chair import Chair
from probes.intervals import mean_interval
from probes.mentions import WordMatcher
from probes.pope import Pope
from probes.pope_judge import average_splits, judge_pope
from probes.scenes import DESCRIBE, PAIRS, World, draw, picture, prompt, surface_forms
from probes.scenes.world import Scene

CLARITIES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
CONTRASTS = (1.0, 0.7, 0.4, 0.2, 0.1, 0.0)
say = partial(print, flush=True)


class Speaker:
    """A model that answers one request on many scenes at once."""

    def __init__(self, folder: Path, device: str, batch: int = 500) -> None:
        import interp

        self.model = interp.load(folder, device=device, dtype="float32")
        self.device, self.batch = torch.device(device), batch
        self.network: Any = self.model.module
        self.tokenizer: Any = self.model.tokenizer

    def row(self, request: str, *, image: bool = True) -> list[int]:
        """Token ids of a request, with the image's places."""
        text = prompt(request, image=image)
        return self.tokenizer(text.replace("<image>", "<image>" * self.network.config.image_seq_length))["input_ids"]

    def inputs(self, rows: Sequence[list[int]], scenes: Sequence[Scene]) -> dict[str, Any]:
        """A batch of rows of one length, with pictures where there are scenes."""
        ids = torch.tensor(rows, device=self.device)
        found: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if scenes:
            found["pixel_values"] = draw(list(scenes), self.device).float() / 127.5 - 1
        return found

    @torch.inference_mode()
    def captions(self, scenes: Sequence[Scene], request: str = DESCRIBE[0], *, image: bool = True) -> list[str]:
        """Greedy captions."""
        said: list[str] = []
        for k in range(0, len(scenes), self.batch):
            some = scenes[k : k + self.batch]
            given = self.inputs([self.row(request, image=image)] * len(some), some if image else [])
            out = self.model.generate(given, max_new_tokens=160, do_sample=False)
            said += self.tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in said]

    @torch.inference_mode()
    def margins(self, scenes: Sequence[Scene], requests: Sequence[str], *, image: bool = True) -> np.ndarray[Any, Any]:
        """log p(Yes) - log p(No), nats; requests of one length in tokens share a batch."""
        yes, no = (self.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in ("Yes", "No"))
        found = np.zeros(len(scenes))
        given = [self.row(request, image=image) for request in requests]
        by_length: dict[int, list[int]] = {}
        for n, row in enumerate(given):
            by_length.setdefault(len(row), []).append(n)
        for numbers in by_length.values():
            for k in range(0, len(numbers), self.batch):
                some = numbers[k : k + self.batch]
                inputs = self.inputs([given[n] for n in some], [scenes[n] for n in some] if image else [])
                logits = self.network(**inputs, logits_to_keep=1).logits[:, -1].float()
                found[some] = (logits[:, yes] - logits[:, no]).cpu().numpy()
        return found


def surface(speaker: Speaker, n: int) -> dict[str, Any]:
    """How often a caption names the partner, and the yes/no margin, by prior and by what can be seen.

    ``absent``: the partner is not there, at every clarity of the air. ``present``: it is, at every contrast of its drawing.
    """
    world = World("test")
    found: dict[str, Any] = {"n_per_pair": n, "absent": [], "present": [], "n_scenes": 0}
    for kind, levels in (("absent", CLARITIES), ("present", CONTRASTS)):
        for level in levels:
            scenes, pairs = [], []
            for pair in PAIRS:
                how = {"clarity": level} if kind == "absent" else {"contrast": level}
                scenes += [world.with_pair(pair, k, partner=kind == "present", **how) for k in range(n)]
                pairs += [pair] * n
            texts = speaker.captions(scenes)
            named = np.array(
                [re.search(rf"\b{p.partner}s?\b", t) is not None for p, t in zip(pairs, texts, strict=True)]
            )
            margin = speaker.margins(scenes, [f"Is there a {p.partner} in the image?" for p in pairs])
            found["n_scenes"] += len(scenes)
            for prior in sorted({p.prior for p in PAIRS}):
                rows = np.array([p.prior == prior for p in pairs])
                found[kind].append(
                    {
                        "prior": prior, "level": level, "n": int(rows.sum()),
                        "named": list(mean_interval(named[rows].astype(float)))[:3],
                        "says_yes": list(mean_interval((margin[rows] > 0).astype(float)))[:3],
                        "margin": list(mean_interval(margin[rows]))[:3],
                    }
                )  # fmt: skip
            say(f"{kind} {level}: named {named.mean():.3f}, yes {np.mean(margin > 0):.3f}")
    return found


def chair(speaker: Speaker, n: int) -> dict[str, Any]:
    """CHAIR on both test splits, and of captions without the picture."""
    matcher = WordMatcher(surface_forms())
    found: dict[str, Any] = {}
    for split in ("test", "against"):
        scenes = World(split).scenes(n)  # type: ignore[arg-type]
        judge = Chair({s.id: s.names for s in scenes}, matcher)
        for name, image in (("", True), (" without image", False)):
            texts = speaker.captions(scenes, image=image)
            result = judge.judge(dict(zip([s.id for s in scenes], texts, strict=True)))
            found[split + name] = {
                "figures": {key: _plain(value) for key, value in result.figures.items()},
                "examples": texts[:3],
            }
            if image:
                lost = [
                    [float(re.search(rf"\b{p.partner}s?\b", t) is not None) for p in s.absent_partners]
                    for s, t in zip(scenes, texts, strict=True)
                ]
                rates = np.array([np.mean(row) for row in lost if row])
                found[split]["absent_partner_named"] = [*list(mean_interval(rates))[:3], len(rates)]
            say(f"CHAIR {split}{name}: {found[split + name]['figures']}")
    return found


def pope(speaker: Speaker, n_images: int) -> dict[str, Any]:
    """POPE's three splits on scenes of the test split, with the right image, that of another scene, and none."""
    scenes = [s for s in World("test").scenes(12 * n_images) if len(s.names) >= 3][:n_images]
    by_id = {s.id: s for s in scenes}
    maker = Pope({s.id: s.names for s in scenes}, n=n_images)
    others = dict(zip(by_id, [*list(by_id.values())[1:], scenes[0]], strict=True))
    found: dict[str, Any] = {}
    begun = time.perf_counter()
    results = []
    for split in ("random", "popular", "adversarial"):
        asked = maker.build(split)
        for name, table in (("", by_id), (" foreign image", others), (" no image", None)):
            shown = [(table or by_id)[q.image] for q in asked]
            margins = speaker.margins(shown, [q.text for q in asked], image=table is not None)
            result = judge_pope(asked, margins=margins.tolist())
            found[split + name] = {key: _plain(value) for key, value in result.figures.items()}
            if not name:
                results.append(result)
        say(f"POPE {split}: {found[split]}")
    average = average_splits(results)
    found["average"] = {key: _plain(value) for key, value in getattr(average, "figures", average).items()}
    found["seconds"] = round(time.perf_counter() - begun, 1)
    return found


def sinks(speaker: Speaker, n: int) -> dict[str, Any]:
    """First-token sinks by Gu et al.'s metric, what stands out in the hidden states, and whether VAR can act.

    A head is a sink head where the first token gets more than 0.3 of its weight, on average over the prompt's rows.
    """
    import interp
    from interp.interventions import VAR
    from interp.tracing.visual_sinks import calibrate_sinks

    scenes = World("test").scenes(n)
    width = speaker.network.config.text_config.hidden_size
    scaled = 20 * (width / 4096) ** 0.5
    inputs = [speaker.model.encode(DESCRIBE[0], image=picture(s)) for s in scenes]
    rates, shares = [], []
    for given in inputs:
        with interp.hooked(speaker.model, capture=interp.Capture(attention=True)) as run:
            speaker.model.module(**given)
        maps = run.trace["text"].attention.values[0]
        first = maps[:, :, 1:, 0].mean(-1)
        rates.append((first > 0.3).mean())
        shares.append(first.mean())
    found: dict[str, Any] = {
        "n": n, "first_token_sink_heads": list(mean_interval(np.array(rates)))[:3],
        "first_token_weight": list(mean_interval(np.array(shares)))[:3], "tau_scaled_to_width": round(scaled, 3),
    }  # fmt: skip
    try:
        found["sink_dimensions"] = str(calibrate_sinks(speaker.model, inputs, tau=scaled))
    except ValueError as error:
        found["sink_dimensions"] = f"none: {error}"
    try:
        with interp.hooked(speaker.model, interventions=[VAR(tau_unit="width")]):
            speaker.model.generate(inputs[0], max_new_tokens=2, do_sample=False)
        found["var"] = "acts"
    except ValueError as error:
        found["var"] = f"cannot act: {error}"
    say(f"sinks: {found}")
    return found


def blind(speaker: Speaker, n: int) -> dict[str, Any]:
    """A planted model with its named heads masked must not know its image: the largest change of any logit."""
    from interp.tracing.leaks import leak

    scenes = World("test").scenes(n)
    return {
        "n": n,
        "largest_logit_change": max(
            leak(speaker.model, speaker.model.encode(DESCRIBE[0], image=picture(s))) for s in scenes
        ),
    }


def _plain(value: Any) -> Any:
    """An estimate as ``[value, low, high, n]``."""
    if hasattr(value, "value"):
        return [round(float(value.value), 4), round(float(value.low), 4), round(float(value.high), 4), int(value.n)]
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("model", type=Path)
    options.add_argument("--n", type=int, default=30, help="scenes for every pair and level (18 pairs, 12 levels)")
    options.add_argument("--chair", type=int, default=500, help="captions of each split")
    options.add_argument("--pope", type=int, default=50, help="images of each split, six questions each")
    options.add_argument("--batch", type=int, default=500)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--out", type=Path, default=None, help="default: measured.json in the model's folder")
    options.add_argument("--only", nargs="*", default=(), help="parts: sinks pope chair surface blind")
    chosen = options.parse_args(arguments)
    speaker = Speaker(chosen.model, chosen.device, chosen.batch)
    target = chosen.out or chosen.model / "measured.json"
    found: dict[str, Any] = json.loads(target.read_text()) if target.is_file() else {}
    parts = {
        "sinks": partial(sinks, speaker, 20),
        "pope": partial(pope, speaker, chosen.pope),
        "chair": partial(chair, speaker, chosen.chair),
        "surface": partial(surface, speaker, chosen.n),
    }
    if speaker.model.base_edit is not None:
        parts["blind"] = partial(blind, speaker, 5)
    for name, run in parts.items():
        if chosen.only and name not in chosen.only:
            continue
        begun = time.perf_counter()
        found[name] = run()
        seconds = round(time.perf_counter() - begun, 1)
        found[name] |= {"seconds": seconds, "machine": common.machine(chosen.device)}
        say(f"{name}: {seconds} s")
        target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
