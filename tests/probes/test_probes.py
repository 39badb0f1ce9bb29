"""Probes: spans are where the needle is, splits share nothing, samples are what they say and the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import interp
from probes.needle import CITIES, NeedleInHaystack, NeedleSample, locate_by_decoding
from probes.repeated import RepeatedTokens, ordinary_ids
from probes.samples import ProbeError
from probes.text import ClosedBook, Passages, filler, paragraphs, sentences

CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(shared: Path) -> Any:
    if not (shared / "models/stories260k").exists():
        pytest.skip("stories260k is not in the shared folder")
    return interp.load(shared / "models/stories260k")


@pytest.mark.parametrize("chat", [False, True])
def test_needle_spans_are_the_needle(model: Any, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", CHAT)
    probe = NeedleInHaystack(lengths=(200, 320), depths=(0.0, 0.5, 1.0), chat=chat)
    samples = probe.build(model)
    assert len(samples) == 6
    for sample in samples:
        decode = model.tokenizer.decode
        assert decode(list(sample.answer_ids)).strip() == sample.answer
        assert sample.answer_ids == sample.ids[slice(*sample.answer_span)]
        assert decode(list(sample.ids[slice(*sample.needle_span)])).strip() == sample.needle
        # A longer prompt would not have fitted, a shorter one would have had room for another sentence.
        assert sample.target_length - 120 < len(sample.ids) <= sample.target_length
    assert [s.depth for s in samples[::3]] == [0.0, 0.0] and samples[2].depth == 1.0
    assert samples[0].needle_span[0] < samples[1].needle_span[0] < samples[2].needle_span[0]
    assert probe.build(model) == samples


def test_offsets_and_decoding_find_the_same_span(model: Any) -> None:
    for sample in NeedleInHaystack(lengths=(220,), n=3).build(model):
        assert locate_by_decoding(model.tokenizer, sample.ids, sample.needle) == sample.needle_span
        assert locate_by_decoding(model.tokenizer, sample.ids, sample.answer) == sample.answer_span
    with pytest.raises(ProbeError, match="must give 'xyzzy' back"):
        locate_by_decoding(model.tokenizer, (400, 401), "xyzzy")


def test_splits_share_nothing(model: Any) -> None:
    assert not set(CITIES["detect"]) & set(CITIES["test"])
    for split, parity in (("detect", 0), ("test", 1)):
        for sample in NeedleInHaystack(lengths=(150,), n=4, split=split).build(model):
            assert int(sample.answer) % 2 == parity and len(set(sample.answer)) == 5
            assert any(city in sample.needle for city in CITIES[split])


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 48213.", True), ("148213", False), ("482130", False), ("4821 3", False), ("is 48213, yes", True)],
)
def test_needle_judge(text: str, right: bool) -> None:
    assert NeedleInHaystack().judge(NeedleSample((), answer="48213"), text) is right


@pytest.mark.parametrize(
    "settings", [{"split": "train"}, {"depths": (1.5,)}, {"lengths": ()}, {"n": 0}], ids=lambda s: next(iter(s))
)
def test_wrong_needle_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ProbeError, match=next(iter(settings))):
        NeedleInHaystack(**settings)


def test_too_short_a_haystack(model: Any) -> None:
    with pytest.raises(ProbeError, match=r"leave room .* got 30"):
        NeedleInHaystack(lengths=(30,)).build(model)


def test_repeated_tokens(model: Any) -> None:
    probe = RepeatedTokens(n=3, length=20, repeats=3)
    ordinary = set(ordinary_ids(model.tokenizer, model.config))
    assert not ordinary & set(model.tokenizer.all_special_ids) and len(ordinary) > 200
    for sample in probe.build(model):
        assert sample.ids[0] == model.tokenizer.bos_token_id and sample.start == 1
        copy = sample.ids[1:21]
        assert sample.ids[1:] == copy * 3 and len(set(copy)) == 20 and set(copy) <= ordinary
        assert list(sample.last_copy) == list(range(41, 61))
        assert len(sample.control_ids) == len(sample.ids) and len(set(sample.control_ids)) == len(sample.ids)
    assert probe.build(model) == probe.build(model) != RepeatedTokens(n=3, length=20, repeats=3, seed=1).build(model)
    assert RepeatedTokens(bos=False).build(model)[0].start == 0


def test_repeated_tokens_refuse_special_ones(model: Any) -> None:
    with pytest.raises(ProbeError, match=r"without the model's special tokens, got \[1, 2\]"):
        RepeatedTokens(vocabulary=range(1, 90)).build(model)


def test_passages(model: Any) -> None:
    samples = Passages(n=50, length=64).build(model)
    assert {len(s.ids) for s in samples} == {64}
    assert len({s.ids for s in samples}) == len(paragraphs()) < 50
    assert max(len(s.ids) for s in Passages(n=5, length=700).build(model)) == 700


def test_prose_is_what_needles_need() -> None:
    text = " ".join(paragraphs())
    assert len(text.split()) > 3000 and not any(c.isdigit() for c in text)
    assert not any(city in text for cities in CITIES.values() for city in cities)
    stream = filler(0)
    assert sorted(next(stream) for _ in sentences()) == sorted(sentences())


def test_closed_book(model: Any) -> None:
    probe = ClosedBook()
    france = probe.build(model)[0]
    assert france.answer == "Paris" and len(probe.build(model)) == 20
    assert (
        probe.judge(france, " It is paris.")
        and not probe.judge(france, "Parisian")
        and not probe.judge(france, "no\nParis")
    )


def test_no_tokenizer() -> None:
    for probe in (Passages(), NeedleInHaystack(), RepeatedTokens(), ClosedBook()):
        with pytest.raises(ProbeError, match="needs a tokenizer"):
            probe.build(object())
