"""``headscope generate`` and ``headscope evaluate``: what they print, write and refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import interp
from interp import cli_common
from interp.cli import app


@pytest.fixture(scope="module")
def scenes_model() -> Any:
    return interp.load("scenes-lvlm", device="cpu", dtype="float32")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, scenes_model: Any) -> Any:
    monkeypatch.setattr(cli_common, "load_model", lambda *a, **k: scenes_model)
    return scenes_model


@pytest.fixture
def text_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    from interp.testing import build
    from tests.probes.test_margin import tiny_tokenizer

    model = interp.load(build("llama").module, processor=tiny_tokenizer())
    monkeypatch.setattr(cli_common, "load_model", lambda *a, **k: model)
    return model


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    from probes.scenes import World, picture

    picture(World("against").scene(1)).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_generate_composes_what_the_options_name(given: Any, scene: Path) -> None:
    done = run(
        "generate", "scenes-lvlm", "--image", scene, "--vhr", "3", "--mask", "L3H1", "--with", "PAI(.3)+beam=2",
        "--max-new-tokens", "24", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [i["name"] for i in told["interventions"]] == ["MaskHeads", "VHR", "PAI"] and told["beams"] == 2
    assert told["prompt"] == "Describe the picture." and told["extra_passes"] == 1 and not told["same"]
    # The model's own conversation form is used without being asked for; the plain side is plain.
    inputs = given.encode("Describe the picture.", image=scene)
    ids = given.module.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert told["plain_ids"] == ids.tolist()
    from interp.interventions import PAI, VHR, MaskHeads

    with interp.hooked(given, interventions=[MaskHeads("L3H1"), VHR(3.0), PAI(0.3)]):
        ids = given.generate(inputs, max_new_tokens=24, do_sample=False, num_beams=2)[0, inputs["input_ids"].shape[1] :]
    assert told["masked_ids"] == ids.tolist()


def test_generate_shows_both_texts_and_refuses(given: Any, scene: Path) -> None:
    both = run("generate", "scenes-lvlm", "--image", scene, "--vhr", "1", "--max-new-tokens", "8")
    assert both.exit_code == 0 and "VHR 1" in both.stdout and "The tokens are the same." in both.stdout
    refused(run("generate", "scenes-lvlm", "--image", scene, "--with", "VHR(strenght=2)"), "strenght")
    refused(run("generate", "scenes-lvlm", "--image", scene, "--var", "2"), "p must be")
    refused(run("generate", "scenes-lvlm", "--prompt", "words", "--vhr", "2"), "VHR", "image")
    refused(run("generate", "scenes-lvlm", "--vhr", "2"), "--prompt")
    refused(run("generate", "scenes-lvlm", "--image", scene, "--with", "VCD+DoLa"), "DoLa", "VCD")


def test_evaluate_prints_writes_and_goes_on(given: Any, tmp_path: Path) -> None:
    folder, out = tmp_path / "job", tmp_path / "table.csv"
    arguments = (
        "evaluate", "scenes-lvlm", "--probe", "chair", "--split", "against", "--n", "3", "--max-new-tokens", "24",
        "--with", "VHR(alpha=2)", "--with", "MaskHeads(L3H1)", "--random", "1", "--folder", folder, "--out", out,
    )  # fmt: skip
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    for word in (
        "greedy",
        "VHR(alpha=2)",
        "MaskHeads(L3H1)+random=0",
        "chair i",
        "tokens/s",
        "extra passes",
        "same length",
    ):
        assert word in " ".join(done.stdout.split()), word
    names = {line["setting"] for line in csv.DictReader(out.read_text().splitlines())}
    assert names == {"greedy", "VHR(alpha=2)", "MaskHeads(L3H1)", "MaskHeads(L3H1)+random=0"}
    assert (folder / "results.html").stat().st_size > 1e6 and len(list(folder.glob("*.jsonl"))) == 4
    first = json.loads((folder / "results.json").read_text())
    control = first["rows"][3]
    assert control["heads"].startswith("L3H") and control["heads"] != "L3H1" and control["random"] == 0
    before = {f.name: f.read_bytes() for f in folder.glob("*.jsonl")}
    again = json.loads(run(*arguments, "--json").stdout)
    assert again["resumed"] == 12 and [r["figures"] for r in again["rows"]] == [r["figures"] for r in first["rows"]]
    assert {f.name: f.read_bytes() for f in folder.glob("*.jsonl")} == before


def test_evaluate_takes_the_pages_json_and_other_probes(given: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.json"
    file.write_text(json.dumps([{"name": "VHR", "settings": {"alpha": 2.0}}]))
    done = run("evaluate", "scenes-lvlm", "--probe", "margin", "--n", "2", "--interventions", file, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [r["setting"] for r in told["rows"]] == ["greedy", "page"]
    assert set(told["rows"][1]["differences"]) == {
        "margin",
        "prefers_absent",
    }
    pairs = json.loads(run("evaluate", "scenes-lvlm", "--probe", "ScenePairs", "--n", "2", "--json").stdout)
    assert pairs["n"] == 2 and pairs["rows"][0]["figures"]["effect"][0] > 0, "the object's pixels say yes"


def files_of_coco(folder: Path, n: int = 4) -> Path:
    """Small pictures and an instances file; names are COCO's."""
    from PIL import Image

    categories = ["person", "dog", "cat", "car", "chair", "cup", "bed", "book"]
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for k in range(1, n + 1):
        name = f"{k:012d}.png"
        Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": k, "file_name": name})
        annotations += [{"image_id": k, "category_id": int(c)} for c in rng.permutation(8)[:3]]
    table = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": c} for i, c in enumerate(categories)],
    }
    file = folder / "instances_tiny.json"
    file.write_text(json.dumps(table))
    return file


def test_evaluate_takes_the_users_own_files(given: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    coco = files_of_coco(folder)
    chair = json.loads(
        run(
            "evaluate", "m", "--probe", "chair", "--coco", coco, "--images", folder, "--max-new-tokens", "8", "--json"
        ).stdout
    )
    assert chair["n"] == 4 and chair["task"]["data"] == "coco" and chair["rows"][0]["figures"]["recall"][3] == 12
    built = json.loads(
        run("evaluate", "m", "--probe", "pope", "--coco", coco, "--images", folder, "--n", "2", "--json").stdout
    )
    assert built["n"] == 36 and set(built["rows"][0]["splits"]) == {"random", "popular", "adversarial"}
    questions = tmp_path / "pope.jsonl"
    lines = [
        {
            "question_id": k,
            "image": f"{k:012d}.png",
            "text": "Is there a dog in the image?",
            "label": ("yes", "no")[k % 2],
        }
        for k in range(1, 5)
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = json.loads(
        run("evaluate", "m", "--probe", "pope", "--questions", questions, "--images", folder, "--json").stdout
    )
    assert asked["n"] == 4
    bare = json.loads(
        run("evaluate", "m", "--probe", "captions", "--images", folder, "--max-new-tokens", "8", "--json").stdout
    )
    assert bare["n"] == 4 and set(bare["rows"][0]["figures"]) == {"words", "repetition", "empty"}
    points = folder / "points.jsonl"
    point = {
        "prompt": "Describe the picture.",
        "prefix": " There is a",
        "present": "dog",
        "absent": "cat",
        "image": "000000000001.png",
        "chat": True,
    }
    point["image"] = "000000000001.png"
    points.write_text(json.dumps(point) + "\n")
    margins = json.loads(run("evaluate", "m", "--probe", "margin", "--items", points, "--json").stdout)
    assert margins["n"] == 1 and isinstance(margins["rows"][0]["figures"]["margin"][0], float)
    refused(run("evaluate", "m", "--probe", "chair", "--images", folder), "--coco")
    refused(run("evaluate", "m", "--probe", "pope", "--questions", questions), "--images")
    refused(run("evaluate", "m", "--probe", "pope", "--images", folder), "questions")
    (folder / "000000000002.png").unlink()
    refused(run("evaluate", "m", "--probe", "pope", "--questions", questions, "--images", folder), "000000000002.png")
    points.write_text('{"prompt": "x"}\n')
    refused(run("evaluate", "m", "--probe", "margin", "--items", points), "line 1", "prefix")


def test_evaluate_refuses_before_the_first_token(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a token was made")

    monkeypatch.setattr(given.module, "generate", generate)
    base = ("evaluate", "m", "--probe", "chair", "--n", "2")
    refused(run("evaluate", "m", "--probe", "chairs"), "probe must be", "chairs")
    refused(run(*base, "--with", "VHR(2"), "VHR(2")
    refused(run(*base, "--with", "Nothing()"), "Nothing")
    refused(run(*base, "--with", "MaskHeads(L3H99)"), "L3H99")
    refused(run(*base, "--with", "VHR(layers=[99])"), "99")
    refused(run(*base, "--with", "VHR", "--random", "2"), "--random")
    refused(run(*base, "--split", "train"), "--split", "train")
    refused(run(*base, "--out", "table.png"), "--out", ".csv")
    refused(run(*base, "--questions", "x.jsonl"), "--questions")
    refused(run(*base, "--coco", tmp_path / "no.json"), "--coco", "no.json")
    refused(run(*base, "--set", "n"), "--set")
    refused(run(*base, "--interventions", tmp_path / "no.json"), "no.json")


def test_text_models_answer_needles_and_refuse_pictures(text_model: Any) -> None:
    refused(run("evaluate", "m", "--probe", "needle", "--with", "VHR"), "VHR", "vision-language")
    refused(run("evaluate", "m", "--probe", "chair"), "chair", "images")


@pytest.mark.real("stories260k")
def test_needle_on_a_real_text_model(tmp_path: Path) -> None:
    from tests.conftest import SHARED

    done = run(
        "evaluate", SHARED / "models" / "stories260k", "--probe", "needle", "--set", "lengths=[160]", "--set", "depths=(.5,)", "--n", "4",
        "--with", "MaskHeads(\"L0H0,L1H0\")", "--with", "DoLa", "--random", "1", "--folder", tmp_path / "job", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["n"] == 4 and [r["setting"] for r in told["rows"]][-1].endswith("random=0")
    assert (
        all(r["figures"]["answer_logprob"][0] < 0 for r in told["rows"])
        and told["rows"][1]["differences"]["answer_logprob"][0] != 0
    )
