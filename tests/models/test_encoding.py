"""Text and images to inputs, ids back to text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp.models import Model, ModelInputError, load
from interp.testing import build

SHORT, LONG = "w20 w21", "w20 w21 w22 w23 w24"


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Model:
    return load(llama_folder)


@pytest.fixture
def llava(tokenizer: Callable[..., Any], chat_template: str) -> Model:
    from transformers import LlavaProcessor

    processor = LlavaProcessor(
        small_images("CLIP"),
        tokenizer({"<image>": 5}),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template,
    )
    return load(build("llava").module, processor=processor)


def small_images(kind: str, height: int = 32, width: int = 32) -> Any:
    import transformers

    # Without torchvision only the PIL variants of image processors exist.
    exact = {"height": height, "width": width}
    whole = {"shortest_edge": height} if kind == "CLIP" else exact
    return getattr(transformers, f"{kind}ImageProcessorPil")(size=whole, crop_size=exact)


def test_one_text(llama: Model) -> None:
    inputs = llama.encode(SHORT)
    assert inputs["input_ids"].tolist() == [[1, 20, 21]]
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].device == llama.device
    assert llama(inputs).logits.shape == (1, 3, 96)
    assert torch.equal(llama(inputs).logits, llama(**inputs).logits)


def test_batch_is_padded_on_the_left_and_gives_the_single_answers(llama: Model) -> None:
    assert llama.tokenizer.pad_token is None and llama.tokenizer.padding_side == "right"
    batch = llama.encode([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[2, 2, 2, 1, 20, 21], [1, 20, 21, 22, 23, 24]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert llama.tokenizer.pad_token is None and llama.tokenizer.padding_side == "right"
    new = llama.generate(batch, max_new_tokens=5, do_sample=False)[:, 6:]
    for row, text in zip(new, (SHORT, LONG), strict=True):
        inputs = llama.encode(text)
        alone = llama.generate(inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row.tolist()[: len(alone)] == alone.tolist()


def test_the_tokenizer_has_no_pad_token_even_after_an_error(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("refused")

    monkeypatch.setattr(type(llama.tokenizer), "__call__", refuse)
    with pytest.raises(RuntimeError, match="refused"):
        llama.encode([SHORT, LONG])
    assert llama.tokenizer.pad_token is None


def test_encoders_keep_the_tokenizers_side(tokenizer: Callable[..., Any]) -> None:
    model = load(build("bert").module, tokenizer=tokenizer())
    assert not model.is_generative
    assert model.encode([SHORT, LONG])["attention_mask"].tolist()[0] == [1, 1, 1, 0, 0, 0]
    with pytest.raises(ModelInputError, match=r"model must be able to generate; Bert.* is not"):
        model.generate(model.encode(SHORT))


def test_encoder_decoder(tokenizer: Callable[..., Any]) -> None:
    model = load(build("t5").module, tokenizer=tokenizer())
    batch = model.encode([SHORT, LONG])
    assert batch["attention_mask"].tolist()[0] == [1, 1, 1, 0, 0, 0]
    assert model.generate(batch, max_new_tokens=3, do_sample=False).shape[0] == 2


def test_decode_and_tokens(llama: Model) -> None:
    assert llama.decode([1, 20, 21, 2]) == SHORT
    assert llama.decode(torch.tensor([[1, 20, 21], [1, 22, 23]])) == [SHORT, "w22 w23"]
    assert llama.decode([1, 20], skip_special_tokens=False) == "<s> w20"
    assert llama.tokens(torch.tensor([[1, 20, 21, 2]])) == ["<s>", " w20", " w21", "</s>"]
    assert llama.tokens(np.array([20])) == [" w20"]
    assert llama.tokens([]) == []
    with pytest.raises(ModelInputError, match=r"one sample's.*got \[2, 2\]"):
        llama.tokens([[1, 20], [1, 21]])


def test_tokens_of_a_byte_level_tokenizer() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: n for n, letter in enumerate([*alphabet, "Ġa", "Ã©"])}
    backend = Tokenizer(models.BPE(vocab, [("Ġ", "a"), ("Ã", "©")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    model = load(build("llama").module, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    ids = model.tokenizer("b a\né日")["input_ids"]
    # The three bytes of the last character are tokens of their own and keep their raw form.
    assert model.tokens(ids) == ["b", " a", "\n", "é", "æ", "Ĺ", "¥"]


def test_chat(tokenizer: Callable[..., Any], chat_template: str) -> None:
    model = load(build("llama").module, tokenizer=tokenizer(chat_template=chat_template))
    # The template writes <s> itself, so the tokenizer must not add another.
    assert model.decode(model.encode("w20", chat=True)["input_ids"][0], skip_special_tokens=False) == "<s> w20 w90"
    with_system = model.encode("w20", chat=True, system="w30")["input_ids"][0]
    assert model.decode(with_system, skip_special_tokens=False) == "<s> w30 <s> w20 w90"
    with pytest.raises(ModelInputError, match=r"system must be None without chat=True, got 'w30'"):
        model.encode("w20", system="w30")


def test_template_that_refuses(tokenizer: Callable[..., Any]) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}w20"
    model = load(build("llama").module, tokenizer=tokenizer(chat_template=refusing))
    assert model.encode("w20", chat=True)["input_ids"].tolist() == [[20]]
    with pytest.raises(ModelInputError, match=r"system and text must fit the chat template .* no system here"):
        model.encode("w20", chat=True, system="w30")


@pytest.mark.parametrize("form", ["path", "string", "pil", "array", "grey"])
def test_image_model_takes_every_form_of_image(picture: Path, form: str) -> None:
    from PIL import Image

    opened = Image.open(picture)
    forms = {"path": picture, "string": str(picture), "pil": opened, "array": np.asarray(opened)}
    forms["grey"] = opened.convert("L")
    model = load(build("vit").module, processor=small_images("ViT", 48))
    inputs = model.encode(image=forms[form])
    assert inputs["pixel_values"].shape == (1, 3, 48, 32)
    if form != "grey":
        assert torch.equal(inputs["pixel_values"], model.encode(image=picture)["pixel_values"])
    assert model.encode(image=[forms[form]] * 3)["pixel_values"].shape[0] == 3
    assert torch.isfinite(model(inputs)[0]).all()


def test_camera_rotation_is_undone(tmp_path: Path) -> None:
    from PIL import Image

    from interp.models.encoding import open_image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


def test_pixels_have_the_models_dtype(picture: Path) -> None:
    model = load(build("vit").module.bfloat16(), processor=small_images("ViT", 48))
    assert model.encode(image=picture)["pixel_values"].dtype == torch.bfloat16


def test_image_is_put_before_the_text(llava: Model, picture: Path) -> None:
    inputs = llava.encode(SHORT, image=picture)
    assert inputs["input_ids"].tolist() == [[1, *[5] * 16, 20, 21]]
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert torch.equal(inputs["input_ids"], llava.encode(f"<image> {SHORT}", image=picture)["input_ids"])
    between = llava.encode("w20 <image> w21", image=picture)["input_ids"].tolist()
    assert between == [[1, 20, *[5] * 16, 21]]
    assert llava.generate(inputs, max_new_tokens=2, do_sample=False).shape == (1, 21)


def test_batches_of_images(llava: Model, picture: Path) -> None:
    batch = llava.encode([SHORT, LONG, SHORT], image=[picture, None, [picture, picture]])
    assert [(row == 5).sum().item() for row in batch["input_ids"]] == [16, 0, 32]
    assert batch["pixel_values"].shape[0] == 3
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert llava.encode(SHORT, image=[picture, picture])["pixel_values"].shape[0] == 2
    assert "pixel_values" not in llava.encode(SHORT)


def test_chat_with_an_image(llava: Model, picture: Path) -> None:
    ids = llava.encode("w20", image=picture, chat=True, system="w30")["input_ids"].tolist()
    assert ids == [[30, *[5] * 16, 20, 90]]


def test_no_training_labels(tokenizer: Callable[..., Any], picture: Path) -> None:
    from transformers import PaliGemmaProcessor

    images = small_images("Siglip")
    images.image_seq_length = 16
    model = load(build("paligemma").module, processor=PaliGemmaProcessor(images, tokenizer({"<image>": 5})))
    inputs = model.encode(SHORT, image=picture)
    assert "labels" not in inputs and inputs["input_ids"].tolist()[0].count(5) == 16
    assert getattr(model(inputs), "loss", None) is None


def test_gemma3_writes_the_begin_mark(tokenizer: Callable[..., Any], picture: Path) -> None:
    from transformers import Gemma3Processor

    names = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    reader = tokenizer({"<soft>": 5, "<boi>": 6, "<eoi>": 7}, extra_special_tokens=names)
    model = load(build("gemma3").module, processor=Gemma3Processor(small_images("Gemma3"), reader, image_seq_length=4))
    inputs = model.encode(SHORT, image=picture)
    assert inputs["input_ids"].tolist() == [[1, 6, 5, 5, 5, 5, 7, 20, 21]]
    assert model.generate(inputs, max_new_tokens=2, do_sample=False).shape == (1, 11)


def test_blip2_takes_one_image_a_text(tokenizer: Callable[..., Any], picture: Path) -> None:
    from transformers import Blip2Processor

    processor = Blip2Processor(small_images("Blip"), tokenizer({"<image>": 5}), num_query_tokens=8)
    model = load(build("blip2").module, processor=processor)
    assert model.encode(SHORT, image=picture)["input_ids"].tolist() == [[*[5] * 8, 1, 20, 21]]
    with pytest.raises(ModelInputError, match=r"image must be one image a text for Blip2.*got \[2\]"):
        model.encode(SHORT, image=[picture, picture])
    with pytest.raises(ModelInputError, match="image must be given for Blip2"):
        model.encode(SHORT)


def test_two_towers(tokenizer: Callable[..., Any], picture: Path) -> None:
    from transformers import CLIPProcessor

    model = load(build("clip").module, processor=CLIPProcessor(small_images("CLIP", 40, 40), tokenizer()))
    inputs = model.encode([SHORT, LONG], image=[picture, picture])
    assert inputs["input_ids"].shape == (2, 6) and inputs["pixel_values"].shape[0] == 2
    assert model(inputs).logits_per_image.shape == (2, 2)
    assert set(model.encode(image=picture)) == {"pixel_values"}


def test_what_does_not_fit_names_the_argument(llama: Model, llava: Model, picture: Path, tmp_path: Path) -> None:
    vit = load(build("vit").module, processor=small_images("ViT", 48))
    bare = load(build("llava").module)
    (tmp_path / "note.png").write_text("no picture")
    wrong: list[tuple[Model, dict[str, Any], str]] = [
        (llama, {}, "text or image must be given"),
        (llama, {"image": picture}, "image must be None for LlamaForCausalLM"),
        (llama, {"text": []}, "text must be a text or a list"),
        (llama, {"text": [1, 2]}, "text must be a text or a list"),
        (llama, {"text": SHORT, "chat": True}, "chat must be False for .* no chat template"),
        (vit, {"text": SHORT}, "text must be None for ViTModel"),
        (vit, {"image": []}, "image must be at least one image"),
        (vit, {"image": tmp_path / "absent.png"}, r"image must be a readable image file, got .*absent\.png"),
        (vit, {"image": tmp_path / "note.png"}, r"image must be a readable image file, got .*note\.png"),
        (vit, {"image": "https://example.org/a.png"}, "image must be a readable image file"),
        (vit, {"image": np.zeros((3, 4))}, r"image must be .* got float64 array \(3, 4\)"),
        (vit, {"image": 3}, "image must be a path.*got int"),
        (llava, {"image": picture}, "text must be given for LlavaForConditionalGeneration"),
        (llava, {"text": [SHORT, LONG], "image": picture}, r"one entry a text \(2\), got"),
        (llava, {"text": [SHORT, LONG], "image": [picture]}, r"one entry a text \(2\), got 1 entries"),
        (llava, {"text": "<image> w20", "image": [picture] * 2}, "text must have one <image> an image or none"),
        (llava, {"text": "<image> w20"}, "got 1 with 0 images"),
        (bare, {"text": SHORT}, "tokenizer must be known .* pass tokenizer="),
        (load(bare, tokenizer=llama.tokenizer), {"text": SHORT, "image": picture}, "processor must be known"),
    ]
    for model, given, says in wrong:
        with pytest.raises(ModelInputError, match=says):
            model.encode(**given)
    with pytest.raises(ModelInputError, match="inputs must be a mapping as encode returns it, got str"):
        llama.generate(SHORT)  # type: ignore[arg-type]
    with pytest.raises(ModelInputError, match="inputs must be a mapping"):
        llama(torch.tensor([[1]]))  # type: ignore[arg-type]


def test_empty_text(tokenizer: Callable[..., Any], llama: Model) -> None:
    assert llama.encode("")["input_ids"].tolist() == [[1]]
    bare = tokenizer()
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(ModelInputError, match="text must give at least one token"):
        load(llama, tokenizer=bare).encode("")


@pytest.mark.parametrize("size", [(20_000, 5_001), (20_000, 12_000)])
def test_a_huge_image_is_refused_before_it_is_read(tmp_path: Path, size: tuple[int, int]) -> None:
    from PIL import Image

    path = tmp_path / "huge.png"
    Image.new("1", size).save(path)
    model = load("scenes-lvlm", device="cpu")
    with pytest.raises(ModelInputError, match=r"image must have at most 100,000,000 pixels"):
        model.encode("Describe the picture.", image=path)
