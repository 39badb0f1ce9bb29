"""The README's section on the bundled models, from what was recorded beside their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parents[2] / "data" / "models"


def section() -> str:
    """What every model is and does, and how the LVLM hallucinates."""
    vit, lvlm, planted = (_held(name, "metrics") for name in ("scenes-vit", "scenes-lvlm", "scenes-lvlm-planted"))
    recall, held_far = (_held(name, "metrics")["accuracy"] for name in ("recall-lm", "recall-lm-planted"))
    measured = _held("scenes-lvlm", "measured")
    rows = [
        (
            "scenes-vit",
            "ViT, 52 kinds of objects",
            f"first class is there: {_three(vit['test']['first_class_present'])}",
        ),
        ("scenes-lvlm", "LLaVA, 196 image tokens", _yes_no(lvlm["check"])),
        ("scenes-lvlm-planted", "only 6 named heads see the image", _yes_no(planted["check"])),
        ("recall-lm", "Llama, up to 1,024 tokens", _recall(recall)),
        ("recall-lm-planted", "3 named heads see beyond 16 tokens", _recall(held_far)),
    ]
    lines = ["| model | what it is | size | held-out figures |", "|---|---|---|---|"]
    lines += [f"| [{n}](data/models/{n}/README.md) | {what} | {_size(n)} | {says} |" for n, what, says in rows]
    chair = {split: measured["chair"][split]["figures"] for split in ("test", "against")}
    surface = measured["surface"]
    looks, prior = _three(lvlm["check"]["test"]["foreign_image"]), _three(chair["test"]["chair_s"])
    text = (
        f"The LVLM looks (with another scene's picture it is right in {looks}) and hallucinates: "
        f"CHAIR_S {prior} on scenes from its prior, {_three(chair['against']['chair_s'])} where typical "
        f"companions are missing (500 captions each). Over {surface['n_scenes']:,} scenes, with prior and evidence set by hand:"
    )
    lines += ["", text, "", "![Hallucination over evidence and prior](data/models/scenes-lvlm/surface.svg)"]
    return "\n".join(lines)


def _held(name: str, what: str) -> dict[str, Any]:
    return json.loads((MODELS / name / f"{what}.json").read_text())


def _size(name: str) -> str:
    return f"{(MODELS / name / 'model.safetensors').stat().st_size / 1e6:.0f} MB"


def _yes_no(check: dict[str, Any]) -> str:
    right = [_three(check[split]["yes_no_accuracy"]) for split in ("test", "against")]
    return f"yes/no right: {right[0]}; against the prior {right[1]}"


def _recall(accuracy: dict[str, Any]) -> str:
    parts = [accuracy[task]["1024"] for task in ("key_value", "needle")]
    values = [_three([p["accuracy"], p["low"], p["high"]]) for p in parts]
    return f"at 1,024 tokens: key-value {values[0]}, needle {values[1]}"


def _three(value: list[float]) -> str:
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
