"""The bundled models: they load fast, are small, and do what their cards say."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch

import interp
from probes.scenes import World, picture
from probes.scenes.language import exists

MODELS = Path(__file__).resolve().parents[2] / "data" / "models"
NAMES = ("scenes-vit", "scenes-lvlm", "scenes-lvlm-planted", "recall-lm", "recall-lm-planted")


def test_files_are_small_enough_to_bundle() -> None:
    files = [f for f in MODELS.parent.rglob("*") if f.is_file()]
    assert max(f.stat().st_size for f in files) < 16 * 2**20
    assert sum(f.stat().st_size for f in files) < 44 * 2**20
    assert {f.name for f in MODELS.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_in_under_two_seconds_and_has_a_card(name: str) -> None:
    import transformers  # noqa: F401  (its own import is not the model's)

    interp.load(name, device="cpu")
    # Processor time, so that a busy machine does not fail it; the best of two, because the first may import something.
    seconds: list[float] = []
    for _ in range(2):
        begun = time.process_time()
        model = interp.load(name, device="cpu")
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 2
    assert next(model.module.parameters()).dtype == torch.float32
    card = (MODELS / name / "README.md").read_text()
    for words in ("Apache-2.0", "How it was made", "When not to use", "NVIDIA"):
        assert words in card
    assert json.loads((MODELS / name / "metrics.json").read_text())


def test_the_lvlm_sees_and_its_answers_depend_on_the_picture() -> None:
    model = interp.load("scenes-lvlm", device="cpu")
    yes, no = (model.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in ("Yes", "No"))
    scenes = World("test", clear=True).scenes(9)
    right = []
    for scene, other in itertools.pairwise(scenes):
        away = sorted(other.names - scene.names)
        for name, present in ((sorted(scene.names)[0], True), (away[0] if away else "trumpet", False)):
            given = model.encode(exists(name, present).request, image=picture(scene))
            with torch.no_grad():
                logits = model.module(**given, logits_to_keep=1).logits[0, -1]
            right.append((float(logits[yes]) > float(logits[no])) == (name in scene.names))
    assert sum(right) / len(right) >= 0.9


def test_the_lvlm_describes_a_clear_scene() -> None:
    model = interp.load("scenes-lvlm", device="cpu")
    scene = World("test", clear=True).scene(2)
    given = model.encode("Describe the picture.", image=picture(scene))
    out = model.generate(given, max_new_tokens=120, do_sample=False)
    text = model.decode(out[0, given["input_ids"].shape[1] :])
    assert scene.setting in text
    assert all(name in text for name in scene.names), (text, scene.names)


def test_planted_models_come_with_their_plant() -> None:
    lvlm = interp.load("scenes-lvlm-planted", device="cpu").base_edit
    recall = interp.load("recall-lm-planted", device="cpu").base_edit
    assert lvlm is not None
    assert recall is not None
    assert len(lvlm.heads) == 6
    assert len(recall.heads) == 3
    assert interp.load("scenes-lvlm", device="cpu").base_edit is None


def test_chat_is_the_default_where_a_model_knows_nothing_else(tmp_path: Path) -> None:
    model = interp.load("scenes-lvlm", device="cpu")
    assert model.chat
    plain = model.encode("Describe the picture.", chat=False)["input_ids"][0]
    turned = model.encode("Describe the picture.")["input_ids"][0]
    assert torch.equal(turned, model.encode("Describe the picture.", chat=True)["input_ids"][0])
    assert len(turned) > len(plain)
    assert interp.load(model).chat
    assert not interp.load("recall-lm", device="cpu").chat
