"""Teacher-forced margins: every number against log-probabilities of single forward calls, one more token each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.testing import build
from probes.margin import Margin, MarginItem, margins, summarise_margins, yes_no_margins
from probes.pope import Question
from probes.samples import ProbeError

CHAT = (
    "{% for m in messages %}<s> {% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}{{ p.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}w90{% endif %}"
)
LEFT, RIGHT = [1] + [5] * 16, [20, 21]  # "<s><image>..." and "w20 w21", the ids of every prompt here.


def tiny_tokenizer(end: bool = False) -> Any:
    """Words w10 to w95 are the ids 10 to 95; "<s>" (1) is put before every text, with ``end`` "</s>" (2) behind it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": 5} | {f"w{i}": i for i in range(10, 96)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def llava() -> Any:
    import transformers
    from transformers import LlavaProcessor

    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tiny_tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>", chat_template=CHAT,
    )  # fmt: skip
    return interp.load(build("llava").module, processor=processor)


@pytest.fixture(scope="module")
def llama() -> Any:
    return interp.load(build("llama").module, processor=tiny_tokenizer())


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def by_hand(model: Any, context: list[int], name: list[int], image: Any = None) -> float:
    """Sum of the log-probabilities of ``name``, one forward call a token, each on the ids before it."""
    extra = {}
    if image is not None:
        extra["pixel_values"] = model.processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
    total = 0.0
    for k, token in enumerate(name):
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([context + name[:k]]), **extra).logits[0, -1].double()
        total += float(logits[token] - logits.logsumexp(0))
    return total


def test_one_token_names_with_an_image(llava: Any) -> None:
    (found,) = margins(llava, [MarginItem("w20", " w21", "w40", "w41", image=picture(0))])
    context = LEFT + RIGHT
    assert found.present == pytest.approx(by_hand(llava, context, [40], picture(0)), abs=1e-4)
    assert found.absent == pytest.approx(by_hand(llava, context, [41], picture(0)), abs=1e-4)
    assert found.value == found.absent - found.present and (found.n_present, found.n_absent) == (1, 1)
    # The image is what it depends on, and the order of the names is its sign.
    (other,) = margins(llava, [MarginItem("w20", " w21", "w41", "w40", image=picture(0))])
    assert other.value == pytest.approx(-found.value, abs=1e-5)
    (elsewhere,) = margins(llava, [MarginItem("w20", " w21", "w40", "w41", image=picture(1))])
    assert abs(elsewhere.value - found.value) > 1e-3


def test_longer_names_are_summed_over_their_tokens(llava: Any) -> None:
    (found,) = margins(llava, [MarginItem("w20 w21", "", "w40 w42 w43", "w41", image=picture(0))])
    assert found.present == pytest.approx(by_hand(llava, LEFT + RIGHT, [40, 42, 43], picture(0)), abs=1e-4)
    assert found.absent == pytest.approx(by_hand(llava, LEFT + RIGHT, [41], picture(0)), abs=1e-4)
    assert (found.n_present, found.n_absent) == (3, 1)


def test_any_mixture_comes_back_in_order_whatever_the_batch(llava: Any) -> None:
    items = [
        MarginItem("w20", " w21", "w40 w42", "w41", image=picture(0)),
        MarginItem("w20 w22 w23", "", "w40", "w41"),
        MarginItem("w20", " w21", "w44", "w45", image=picture(1)),
        MarginItem("w30", "", "w40 w41", "w40 w43 w44", image=picture(2)),
        MarginItem("w20", " w24", "w40", "w41", image=picture(3)),
    ] * 3
    together = margins(llava, items, batch_size=4)
    alone = [margins(llava, [item], batch_size=1)[0] for item in items[:5]] * 3
    assert [m.item for m in together] == items
    np.testing.assert_allclose([m.present for m in together], [m.present for m in alone], atol=1e-4)
    np.testing.assert_allclose([m.absent for m in together], [m.absent for m in alone], atol=1e-4)


def test_how_many_rows_run(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    whole = type(llava).__call__

    def spy(self: Any, inputs: Any, **options: Any) -> Any:
        sizes.append(tuple(inputs["input_ids"].shape))
        return whole(self, inputs, **options)

    monkeypatch.setattr(type(llava), "__call__", spy)
    one = [MarginItem("w20", " w21", "w40", "w41", image=picture(k)) for k in range(5)]
    margins(llava, one, batch_size=4)
    assert sizes == [(4, 19), (1, 19)]  # One row an item: both names are read off the same distribution.
    sizes.clear()
    margins(llava, [MarginItem("w20", " w21", "w40 w50", "w40 w51", image=picture(0))])
    assert sizes == [(1, 20)]  # Names that part in their last token only take one row too.
    sizes.clear()
    margins(llava, [MarginItem("w20", " w21", "w40 w50", "w41 w51", image=picture(0))])
    assert sizes == [(2, 20)]


def test_a_text_model(llama: Any) -> None:
    (found,) = margins(llama, [MarginItem("w20", "w21", "w40 w41", "w42")])
    assert found.value != 0  # "w20w21" is one unknown word: no space is put between prompt and prefix.
    assert found.present == pytest.approx(by_hand(llama, [1, 3], [40, 41]), abs=1e-4)
    assert found.absent == pytest.approx(by_hand(llama, [1, 3], [42]), abs=1e-4)


def test_chat_prefix_is_the_beginning_of_the_answer(llava: Any) -> None:
    item = MarginItem("w20 w21", "w30 w31", "w40", "w41 w42", image=picture(0), chat=True)
    (found,) = margins(llava, [item])
    context = [*llava.encode("w20 w21", image=picture(0), chat=True)["input_ids"][0].tolist(), 30, 31]
    assert context == [1, *[5] * 16, 20, 21, 90, 30, 31]
    assert found.present == pytest.approx(by_hand(llava, context, [40], picture(0)), abs=1e-4)
    assert found.absent == pytest.approx(by_hand(llava, context, [41, 42], picture(0)), abs=1e-4)
    (first,) = margins(llava, [MarginItem("w20 w21", "", "w40", "w41", image=picture(0), chat=True)])
    assert first.present == pytest.approx(by_hand(llava, context[:-2], [40], picture(0)), abs=1e-4)


def test_an_end_token_of_the_tokenizer_does_not_count() -> None:
    model = interp.load(build("llama").module, processor=tiny_tokenizer(end=True))
    assert model.encode("w20")["input_ids"].tolist() == [[1, 20, 2]]
    (found,) = margins(model, [MarginItem("w20", "", "w40", "w41 w42")])
    assert (found.n_present, found.n_absent) == (1, 2)
    assert found.present == pytest.approx(by_hand(model, [1, 20], [40]), abs=1e-4)


class Joining:
    """A tokenizer that joins a space with the word behind it, and else gives it a token: "ab " is a, b, space."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids, k = [1] if add_special_tokens else [], 0
        while k < len(text):
            joins = text[k] == " " and k + 1 < len(text)
            ids.append(
                40 + ord(text[k + 1]) - ord("a") if joins else 15 if text[k] == " " else 60 + ord(text[k]) - ord("a")
            )
            k += 2 if joins else 1
        return {"input_ids": ids}


class JoiningModel:
    """A Llama under :class:`Joining`."""

    is_generative, name = True, "joining"

    def __init__(self, module: Any) -> None:
        self.module, self.config, self.tokenizer = module, module.config, Joining()

    def encode(self, text: str, image: Any = None, chat: bool = False) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([self.tokenizer(text)["input_ids"]])}

    def __call__(self, inputs: dict[str, Any], **options: Any) -> Any:
        return self.module(**inputs, **options)


@pytest.mark.parametrize("prefix", ["ab", "ab "])
def test_a_trailing_space_that_joins_the_name(prefix: str) -> None:
    model = JoiningModel(build("llama").module)
    (found,) = margins(model, [MarginItem("", prefix, "d", "ef")])
    assert found.present == pytest.approx(by_hand(model, [1, 60, 61], [43]), abs=1e-4)
    assert found.absent == pytest.approx(by_hand(model, [1, 60, 61], [44, 65]), abs=1e-4)


def test_a_prompt_that_ends_in_a_new_line_keeps_it(llama: Any) -> None:
    (found,) = margins(llama, [MarginItem("w20\n", "", "w40", "w41")])
    assert (found.n_present, found.n_absent) == (1, 1)


def test_interventions_act_on_margins(llava: Any) -> None:
    item = MarginItem("w20", " w21", "w40", "w41", image=picture(0))
    plain = margins(llava, [item])[0].value
    with interp.hooked(llava, interventions=[interp.MaskHeads("L1H0,L1H1,L1H2,L1H3", kind="zero")]):
        masked = margins(llava, [item])[0].value
    assert abs(masked - plain) > 1e-3
    assert margins(llava, [item])[0].value == plain


def test_yes_no_margins(llava: Any) -> None:
    questions = [Question(n, f"{n % 2}.png", f"w2{n} w30", label=bool(n % 2)) for n in range(4)]
    images = {f"{n}.png": picture(n) for n in range(2)}
    found = yes_no_margins(llava, questions, images, prompt="w20 {} w21", yes="w50", no="w51", batch_size=2)
    for n, value in enumerate(found):
        context = [*LEFT, 20, 20 + n, 30, 21]
        expected = by_hand(llava, context, [50], picture(n % 2)) - by_hand(llava, context, [51], picture(n % 2))
        assert value == pytest.approx(expected, abs=1e-4)
    opened: list[str] = []
    again = yes_no_margins(
        llava, questions, lambda name: opened.append(name) or images[name], prompt="w20 {} w21", yes="w50", no="w51"
    )
    np.testing.assert_allclose(again, found, atol=1e-4)
    assert opened == ["0.png", "1.png"] * 2
    with pytest.raises(ProbeError, match="none for 2, first '1.png'"):
        yes_no_margins(llava, questions, {"0.png": picture(0)})
    with pytest.raises(ProbeError, match="prompt must have one {}"):
        yes_no_margins(llava, questions, images, prompt="Is it there?")


def test_summary_resamples_images() -> None:
    def margin(value: float, image: str | None) -> Margin:
        return Margin(MarginItem("", "", "a", "b", image_id=image), present=0.0, absent=value, n_present=1, n_absent=1)

    found = summarise_margins([margin(1.0, "x"), margin(1.0, "x"), margin(-2.0, "y"), margin(-2.0, "y")])
    assert found["margin"].value == -0.5 and found["margin"].n == 4
    assert found["prefers_absent"].value == 0.5
    # Two images: a resample has one of them twice, or both.
    assert (found["margin"].low, found["margin"].high) == (-2.0, 1.0)
    alone = summarise_margins([margin(1.0, None), margin(1.0, None)])
    assert (alone["margin"].low, alone["margin"].high) == (1.0, 1.0)


class Bidirectional(JoiningModel):
    """Later tokens change earlier logits."""

    def __call__(self, inputs: dict[str, Any], **options: Any) -> Any:
        out = self.module(**inputs)
        out.logits = out.logits + 50 * torch.nn.functional.one_hot(inputs["input_ids"][:, -1:], 96)
        return out


def test_a_model_that_reads_both_ways_is_refused() -> None:
    model = Bidirectional(build("llama").module)
    with pytest.raises(ProbeError, match="model must be causal: in items\\[0\\]"):
        margins(model, [MarginItem("", "ab", "de", "fgh")])
    assert margins(model, [MarginItem("", "ab", "d", "e")])[0].n_present == 1


def test_bad_items(llava: Any, llama: Any) -> None:
    fine = MarginItem("w20", "", "w40", "w41")
    with pytest.raises(ProbeError, match="items must be at least one"):
        margins(llama, [])
    with pytest.raises(ProbeError, match="batch_size must be at least 1, got 0"):
        margins(llama, [fine], batch_size=0)
    for present, absent in (("w40", "w40"), (" ", "w40"), ("w40", "w40 ")):
        with pytest.raises(ProbeError, match=r"must be two names, got .* in items\[1\]"):
            margins(llama, [fine, MarginItem("w20", "", present, absent)])
    with pytest.raises(ProbeError, match="must be an interp.Model of a causal language model, got LlamaForCausalLM"):
        margins(llama.module, [fine])
    with pytest.raises(interp.models.ModelInputError, match="takes no images"):
        margins(llama, [MarginItem("w20", "", "w40", "w41", image=picture(0))])
    # A prompt and prefix without any word, behind an image, leave nothing to go on from.
    with pytest.raises(ProbeError, match=r"prompt and prefix of items\[0\] must end in the tokens"):
        margins(llava, [MarginItem("", "", "w40", "w41", image=picture(0))])
    for present, absent in (("knife", "fork"), ("w40", "fork")):
        with pytest.raises(ProbeError, match=r"must give different and known tokens, got .*: \[.*\] and \[3\]"):
            margins(llama, [MarginItem("w20", "", present, absent)])
