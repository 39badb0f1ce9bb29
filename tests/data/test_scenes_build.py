"""The scenes models train: toys of every build script learn, are saved whole, and say with interp what they said in training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BUILD = Path(__file__).resolve().parents[2] / "data" / "build"


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The build scripts as modules; they are no package."""
    sys.path.insert(0, str(BUILD))
    try:
        import scenes_check
        import scenes_lvlm
        import scenes_tokenizer
        import scenes_vit
        import variants

        yield {
            "vit": scenes_vit, "lvlm": scenes_lvlm, "check": scenes_check, "tokenizer": scenes_tokenizer,
            "variants": variants,
        }  # fmt: skip
    finally:
        sys.path.remove(str(BUILD))


@pytest.fixture(scope="module")
def toys(scripts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy ViT, a plain LVLM and a planted one."""
    folder = tmp_path_factory.mktemp("toys")
    common = ["--smoke", "--device", "cpu", "--steps", "40"]
    scripts["vit"].main([*common, "--out", str(folder / "vit"), "--archive", str(folder / "vit.tar")])
    plain = [*common, "--vit", str(folder / "vit")]
    scripts["lvlm"].main([*plain, "--out", str(folder / "lvlm")])
    scripts["lvlm"].main([*plain, "--out", str(folder / "planted"), "--planted", "L0H1,L1H0"])
    return folder


@pytest.mark.slow
def test_toys_learn_and_are_saved_with_their_cards(toys: Path) -> None:
    vit = json.loads((toys / "vit" / "metrics.json").read_text())
    assert vit["loss"][-1] < vit["loss"][0]
    assert (toys / "vit.tar").stat().st_size > 100_000
    for name in ("lvlm", "planted"):
        metrics = json.loads((toys / name / "metrics.json").read_text())
        # Chance over 808 words is 6.7 nats.
        assert metrics["loss"]["text"][-1] < metrics["loss"]["text"][0] < 6.7
        assert metrics["loss"]["pictures"][-1] < metrics["loss"]["pictures"][0]
        assert f"--steps {metrics['steps']}" in metrics["command"]
        assert "When not to use" in (toys / name / "README.md").read_text()
    assert json.loads((toys / "lvlm" / "headscope.json").read_text()) == {"chat": True}


@pytest.mark.slow
def test_a_saved_toy_says_what_it_said_in_training(toys: Path, scripts: Any) -> None:
    import interp
    from probes.scenes import World, picture

    scene = World("test").scene(3)
    yes, no = (
        scripts["tokenizer"].fast_tokenizer().encode(f" {w}", add_special_tokens=False).ids[0] for w in ("Yes", "No")
    )
    for name in ("lvlm", "planted"):
        model = interp.load(toys / name, device="cpu")
        given = model.encode("Is there a dog in the image?", image=picture(scene))
        with torch.no_grad():
            logits = model.module(**given).logits[0, -1]
        assert model.decode(given["input_ids"][0], skip_special_tokens=False).startswith("<s>USER: <image>")
        planted = None
        network: Any = model.module
        if name == "planted":
            assert model.base_edit is not None
            network = type(model.module).from_pretrained(toys / name, dtype=torch.float32)
            planted = scripts["lvlm"].PlantedImage([(0, 1), (1, 0)], 2, 2)
            network.model.language_model.set_attn_implementation(planted.register())
        learner = scripts["lvlm"].Learner(network, planted)
        margin = scripts["check"].answers(learner, [scene], ["dog"], "cpu")[0]
        assert float(logits[yes] - logits[no]) == pytest.approx(float(margin), abs=2e-4)


@pytest.mark.slow
def test_a_planted_toy_does_not_leak(toys: Path) -> None:
    import interp
    from interp.tracing.leaks import leak
    from probes.scenes import World, picture

    model = interp.load(toys / "planted", device="cpu")
    assert leak(model, model.encode("Describe the picture.", image=picture(World("test").scene(1)))) == 0


def test_variants_name_other_heads_for_every_seed(scripts: Any) -> None:
    chosen = [scripts["variants"].heads_of(seed) for seed in scripts["variants"].SEEDS]
    assert len(set(chosen)) == len(chosen)
    assert all(len(set(heads.split(","))) == 6 for heads in chosen)


def test_the_tokenizer_knows_every_word_of_the_world(scripts: Any) -> None:
    from probes.scenes import NAMES, surface_forms
    from probes.scenes.language import sentences

    tokenizer = scripts["tokenizer"].fast_tokenizer()
    for name in NAMES:
        for form in surface_forms()[name]:
            assert len(tokenizer.encode(f" {form}", add_special_tokens=False).ids) == 1, form
    for line in sentences(30, seed=5):
        assert tokenizer.decode(tokenizer.encode(line, add_special_tokens=False).ids, skip_special_tokens=False) == line
