"""What ``headscope demo`` does with the bundled LLaVA: caption scenes, catch a hallucination, find the heads that look."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import typer

SCENES = "scenes-lvlm"
SHOWN = 6


def is_scenes_model(model: Any) -> bool:
    """Was this model taught on the bundled world of scenes?"""
    return model.name.rpartition("/")[2].startswith(SCENES)


def captions(model: Any, scenes: Sequence[Any], most: int = 140) -> list[str]:
    """Greedy captions of all scenes at once, under whatever session is open."""
    from probes.scenes import DESCRIBE, picture

    inputs = model.encode([DESCRIBE[0]] * len(scenes), image=[picture(scene) for scene in scenes])
    out = model.generate(inputs, max_new_tokens=most, do_sample=False)
    return [text.strip() for text in model.decode(out[:, inputs["input_ids"].shape[1] :])]


def marked(text: str, scene: Any) -> str:
    """The caption with ``*word*`` where an object is named that the scene does not have."""
    from probes.mentions import WordMatcher
    from probes.scenes import surface_forms

    for mention in reversed(WordMatcher(surface_forms())(text)):
        if mention.name not in scene.names:
            text = f"{text[: mention.start]}*{text[mention.start : mention.stop]}*{text[mention.stop :]}"
    return text


def judged(texts: Sequence[str], scenes: Sequence[Any]) -> str:
    """CHAIR of some captions in one line."""
    from probes.chair import Chair
    from probes.mentions import WordMatcher
    from probes.scenes import surface_forms

    judge = Chair({scene.id: scene.names for scene in scenes}, WordMatcher(surface_forms()), n_resamples=200)
    figures = judge.judge(dict(zip([scene.id for scene in scenes], texts, strict=True))).figures
    return f"CHAIR_I {figures['chair_i']}, recall {figures['recall']}"


def matched(heads: Any, model: Any, seed: int = 0) -> list[Any]:
    """As many other heads of the same layers, drawn at random."""
    from interp.heads import Head
    from interp.models.anatomy import anatomy

    rng = random.Random(seed)
    chosen = {(head.layer, head.head) for head in heads}
    widths = {site.layer: site.n_heads for site in anatomy(model.module).stacks["text"]}
    found: list[Any] = []
    for head in heads:
        free = [n for n in range(widths[head.layer]) if (head.layer, n) not in chosen]
        if free:
            n = rng.choice(free)
            chosen.add((head.layer, n))
            found.append(Head(head.layer, n))
    return found


def scenes_trip(model: Any, show_score: Any, n_heads: int) -> None:
    """Caption, judge, score, mask; every step says what it does."""
    import interp
    from interp import analysis
    from interp.interventions import VHR, MaskHeads
    from probes.scenes import World
    from probes.scenes.described import SceneDescriptions

    scenes = World("against").scenes(SHOWN)
    typer.echo(
        f"2. Describing {SHOWN} pictures in which a typical companion is missing. *Marked*: named, but not there."
    )
    plain = captions(model, scenes)
    order = sorted(range(SHOWN), key=lambda n: "*" not in marked(plain[n], scenes[n]))
    for n in order[:3]:
        typer.echo(f"   in the picture: {', '.join(sorted(scenes[n].names))}")
        typer.echo(f"   caption:        {marked(plain[n], scenes[n])}")
    typer.echo("3. Scoring every head: how much of its weight goes to the image while the model answers?")
    result = analysis.score("image_mass", model, SceneDescriptions(n=4))
    show_score(result, 8)
    best = result.heads.top(n_heads)
    typer.echo(f"4. The same pictures without {best}, without as many random heads of the same layers, with VHR.")
    with interp.hooked(model, interventions=[MaskHeads(best)]):
        without = captions(model, scenes)
    with interp.hooked(model, interventions=[MaskHeads(matched(best, model))]):
        control = captions(model, scenes)
    with interp.hooked(model, interventions=[VHR(alpha=2.0)]):
        reinforced = captions(model, scenes)
    typer.echo(f"   all heads:       {judged(plain, scenes)}")
    typer.echo(f"   without them:    {judged(without, scenes)}")
    typer.echo(f"   without others:  {judged(control, scenes)}")
    typer.echo(f"   VHR, alpha 2:    {judged(reinforced, scenes)}")
    typer.echo(f"   without them:    {marked(without[order[0]], scenes[order[0]])}")
    typer.echo(f"   ({SHOWN} pictures show how it works and prove nothing; `headscope evaluate` measures.)")
