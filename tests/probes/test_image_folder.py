"""Folders of images: what belongs to which class, and files that are damaged, huge or not in the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import interp
import interp.testing
from probes.gate import gate
from probes.image_folder import ImageFolder, check_image, read_labels
from probes.samples import ProbeError

NAMES = {0: "tabby, tabby cat", 1: "Dog", 2: "red fox", 3: "dog house"}


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**small, image_size=16, patch_size=8, id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
    module = ViTForImageClassification(config).eval()
    module.classifier.weight.data.zero_()  # every image is a dog
    module.classifier.bias.data = torch.tensor([0.0, 1.0, 0.0, 0.0])
    return interp.load(module, processor=ViTImageProcessor(size={"height": 16, "width": 16}))


def paint(file: Path, size: tuple[int, int] = (8, 6)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(file)
    return file


def test_sub_folders(model: Any, tmp_path: Path) -> None:
    for name in ("dog/b.png", "dog/a.jpg", "tabby/c.png", "Red Fox/d.png"):
        paint(tmp_path / name)
    (tmp_path / "dog/.DS_Store").write_text("")
    (tmp_path / "readme.md").write_text("")
    samples = ImageFolder(tmp_path).build(model)
    assert [(Path(s.image).name, s.label, s.target) for s in samples] == [
        ("d.png", "Red Fox", 2), ("a.jpg", "dog", 1), ("b.png", "dog", 1), ("c.png", "tabby", 0),
    ]  # fmt: skip
    assert samples[0].inputs(model.device)["pixel_values"].shape == (1, 3, 16, 16) and samples.skipped == ()
    found = gate(model, ImageFolder(tmp_path))
    assert found.answers == (1, 1, 1, 1) and found.rate == 0.5 and [s.label for s in found.passed] == ["dog", "dog"]
    assert len(ImageFolder(tmp_path, limit=2).build(model)) == 2


@pytest.mark.parametrize("form", ["csv", "json", "list", "mapping"])
def test_labels_of_a_flat_folder(model: Any, tmp_path: Path, form: str) -> None:
    table = {"a.png": "3", "b.png": "tabby cat"}
    for name in table:
        paint(tmp_path / name)
    labels: Any = tmp_path / f"labels.{'csv' if form == 'csv' else 'json'}"
    if form == "csv":
        labels.write_text("\ufefffile,label\n" + "".join(f"{k},{v}\n" for k, v in table.items()), encoding="utf-8")
    elif form == "mapping":
        labels = table
    else:
        labels.write_text(json.dumps(table if form == "json" else [{"file": k, "label": v} for k, v in table.items()]))
    assert [s.target for s in ImageFolder(tmp_path, labels).build(model)] == [3, 0]


def test_classes_name_what_labels_mean(model: Any, tmp_path: Path) -> None:
    paint(tmp_path / "n001/a.png")
    assert ImageFolder(tmp_path, classes={"n001": "red fox"}).build(model)[0].target == 2
    assert ImageFolder(tmp_path, classes={"n001": 3}).build(model)[0].target == 3
    with pytest.raises(ProbeError, match="label 'n001' must be one of the model's classes, and is none"):
        ImageFolder(tmp_path).build(model)
    with pytest.raises(ProbeError, match="classes must have an entry for every label, and have none for 'n001'"):
        ImageFolder(tmp_path, classes={"n002": 3}).build(model)


def test_without_labels_the_model_is_its_own_judge(model: Any, tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    probe = ImageFolder(tmp_path)
    samples = probe.build(model)
    assert [(s.label, s.target, s.judged_by) for s in samples] == [("Dog", 1, "prediction")] * 2
    assert gate(model, probe, samples).rate == 1
    bias = model.module.classifier.bias.data.clone()
    model.module.classifier.bias.data = torch.tensor([0.0, 1.0, 2.0, 0.0])
    try:
        assert gate(model, probe, samples).rate == 0
    finally:
        model.module.classifier.bias.data = bias
    assert not probe.judge(samples[0], None)


def damage(folder: Path) -> None:
    paint(folder / "a.png")
    whole = paint(folder / "b.jpg", (64, 64)).read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "c.png").write_bytes(b"not an image")
    (folder / "d.png").write_bytes(b"")
    paint(folder / "e.png", (40, 30))


def test_damaged_images_are_named(model: Any, tmp_path: Path) -> None:
    damage(tmp_path)
    with pytest.raises(ProbeError, match=r"image '.*b\.jpg' must be a readable image file"):
        ImageFolder(tmp_path).build(model)
    with pytest.warns(UserWarning, match=r"skipped 4 of 5 images, first: image '.*b\.jpg'"):
        samples = ImageFolder(tmp_path, on_error="skip", max_pixels=1199).build(model)
    assert [Path(s.image).name for s in samples] == ["a.png"]
    assert [s.file.name for s in samples.skipped] == ["b.jpg", "c.png", "d.png", "e.png"]
    assert samples.skipped[-1].reason.endswith("must have at most 1,199 pixels, got 40 x 30")


def test_every_truncation_is_found(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.gif", "a.bmp", "a.tif"):
        file = paint(tmp_path / name, (32, 32))
        check_image(file, 1024)
        whole = file.read_bytes()
        for keep in (1, 10, len(whole) // 3):
            file.write_bytes(whole[:keep])
            with pytest.raises(ProbeError, match=name):
                check_image(file, 1024)


def test_huge_images_are_not_decoded(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    Image.new("1", (15000, 14000)).save(file)  # 210 million pixels in 27 kB: above Pillow's own limit too
    with pytest.raises(ProbeError, match=r"bomb\.png' must have at most 50,000,000 pixels"):
        check_image(file, 50_000_000)
    Image.new("1", (8000, 7000)).save(file)
    with pytest.raises(ProbeError, match=r"at most 50,000,000 pixels, got 8000 x 7000"):
        check_image(file, 50_000_000)


def test_wrong_folders(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="path must be a folder"):
        ImageFolder(tmp_path / "none").build(model)
    with pytest.raises(ProbeError, match="at least one image"):
        ImageFolder(tmp_path).build(model)
    paint(tmp_path / "a.png")
    with pytest.raises(ProbeError, match=r"labels must name files of .*, and 'z\.png' is none \(1 in all\)"):
        ImageFolder(tmp_path, {"a.png": "Dog", "z.png": "Dog"}).build(model)
    paint(tmp_path / "b.png")
    with pytest.raises(ProbeError, match=r"an entry for every image, and have none for '.*b\.png'"):
        ImageFolder(tmp_path, {"a.png": "Dog"}).build(model)
    paint(tmp_path / "dog/c.png")
    with pytest.raises(ProbeError, match="not both"):
        ImageFolder(tmp_path).build(model)
    for name, wrong in (("max_pixels", 0), ("limit", 0), ("on_error", "ignore")):
        with pytest.raises(ProbeError, match=name):
            ImageFolder(tmp_path, **{name: wrong})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "name,class\nx,y\n"),
        ("a.json", "{"),
        ("a.json", "[1]"),
        ("a.csv", "file,label\nx,1\nx,2\n"),
        ("a.csv", "file,label\nx\n"),
    ],
)
def test_wrong_labels(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ProbeError, match="labels must"):
        read_labels(tmp_path / name)
    with pytest.raises(ProbeError, match="labels must be CSV"):
        read_labels(tmp_path / "missing.csv")


def test_models_that_do_not_classify(tmp_path: Path, model: Any) -> None:
    paint(tmp_path / "a.png")
    with pytest.raises(ProbeError, match="needs an interp.Model, got Identity"):
        ImageFolder(tmp_path).build(torch.nn.Identity())
    with pytest.raises(ProbeError, match="must classify images.*got LlamaForCausalLM"):
        ImageFolder(tmp_path).build(interp.load(interp.testing.build("llama").module))
    with pytest.raises(ProbeError, match="needs an image processor"):
        ImageFolder(tmp_path).build(interp.load(model.module))


@pytest.mark.real("deit-tiny", "images")
def test_a_real_classifier(shared: Path, tmp_path: Path) -> None:
    model = interp.load(shared / "models/deit-tiny-patch16-224")
    probe = ImageFolder(
        shared / "images", {"coffee.png": "espresso", "chelsea.png": "tabby, tabby cat"}, on_error="skip"
    )
    with pytest.warns(UserWarning, match="skipped"):
        samples = probe.build(model)
    found = gate(model, probe, samples)
    # The cup is an espresso, the cat one of the other kinds of cat.
    assert [s.target for s in samples] == [281, 967] and found.answers == (285, 967) and found.rate == 0.5
