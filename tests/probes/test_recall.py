from __future__ import annotations

import numpy as np
import pytest

from probes.recall import (
    BOS,
    COLON,
    FIRST_KEY,
    FIRST_VALUE,
    FIRST_WORD,
    NEEDLE,
    QUESTION,
    SEMICOLON,
    SPECIAL,
    STOP,
    TASKS,
    VOCABULARY,
    Batch,
    KeyValueRecall,
    NeedleStrings,
    key_values,
    needles,
    repeated,
    tokenizer,
)
from probes.repeated import RepeatedTokens
from probes.samples import ProbeError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def test_vocabulary_is_512_different_words() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 512
    assert VOCABULARY[:4] == SPECIAL
    assert [VOCABULARY[i] for i in (COLON, SEMICOLON, QUESTION, NEEDLE, STOP)] == [":", ";", "?", "needle", "."]
    assert [VOCABULARY[i] for i in (FIRST_KEY, FIRST_VALUE, FIRST_WORD)] == ["k0", "v0", "w0"]


def test_tokenizer_reads_text_and_puts_bos(words) -> None:
    ids = words("k3 : v7 ;   ? k3 :")["input_ids"]
    assert ids == [BOS, FIRST_KEY + 3, COLON, FIRST_VALUE + 7, SEMICOLON, QUESTION, FIRST_KEY + 3, COLON]
    assert words.decode(ids, skip_special_tokens=True) == "k3 : v7 ; ? k3 :"
    assert words("hello")["input_ids"] == [BOS, words.unk_token_id]


def test_tokenizer_survives_saving(words, tmp_path) -> None:
    from transformers import AutoTokenizer

    words.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "w1 needle k3 is v7 v1 v2 ."
    assert again(text)["input_ids"] == words(text)["input_ids"]
    assert (again.bos_token, again.eos_token, again.pad_token, again.padding_side) == (
        "<bos>",
        "<eos>",
        "<pad>",
        "left",
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [64, 257, 1024])
def test_every_answer_token_is_a_copy_of_an_earlier_one(task: str, length: int) -> None:
    batch = TASKS[task](rng(), 5, length)
    assert batch.ids.shape == (5, length) and (batch.ids[:, 0] == BOS).all()
    assert (batch.ids[:, 1:] >= len(SPECIAL)).all() and (batch.ids < len(VOCABULARY)).all()
    row, at = np.nonzero(batch.answer)
    source = batch.source[row, at]
    assert (source < at).all() and (source > 0).all()
    assert (batch.ids[row, at] == batch.ids[row, source]).all()
    assert (batch.source[~batch.answer] == -1).all() and (batch.question[~batch.answer] == -1).all()
    assert not (batch.answer & batch.end).any()
    assert batch.answer.any(1).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_batch_and_another_seed_another(task: str) -> None:
    one, two, three = (TASKS[task](rng(seed), 3, 96) for seed in (1, 1, 2))
    assert (one.ids == two.ids).all() and (one.source == two.source).all()
    assert (one.ids != three.ids).any()


def test_repeated_has_the_period_that_was_asked_for() -> None:
    batch = repeated(rng(), 2, 32, period=10)
    assert (batch.ids[:, 11:] == batch.ids[:, 1:-10]).all()
    assert batch.answer[0].tolist() == [False] * 11 + [True] * 21
    assert batch.question[0, [11, 20, 21, 31]].tolist() == [0, 0, 1, 2]


def test_key_values_read_as_pairs_with_different_keys_and_one_question(words) -> None:
    batch = key_values(rng(3), 4, 128)
    for row in range(4):
        text = words.decode(batch.ids[row].tolist())
        facts, asked = text.split(" ? ")
        pairs = dict(pair.strip().split(" : ") for pair in facts.split(";") if ":" in pair)
        first = next(iter(pairs))
        pairs[first.split()[-1]] = pairs.pop(first)
        key, value = asked.removesuffix(" ;").split(" : ")
        assert pairs[key] == value and len(value.split()) in (2, 3)
        assert len(pairs) >= 15, "the sequence is full of pairs"
        assert words.convert_ids_to_tokens(batch.ids[row][batch.answer[row]].tolist()) == value.split()
        assert (batch.end[row].nonzero()[0] == [127]).all()


def test_key_values_ask_different_keys() -> None:
    batch = key_values(rng(), 6, 256, questions=8)
    keys = [batch.ids[row, np.flatnonzero(batch.ids[row] == QUESTION) + 1].tolist() for row in range(6)]
    assert all(len(set(k)) == 8 for k in keys)
    assert (batch.question.max(1) == 7).all() and (batch.end.sum(1) == 8).all()


@pytest.mark.parametrize(("depth", "begin"), [(0.0, 1), (0.5, 25), (1.0, 49)])
def test_needle_stands_at_its_depth(depth: float, begin: int) -> None:
    batch = needles(rng(), 3, 64, depth=depth)
    assert (batch.ids[:, begin] == NEEDLE).all()
    assert (batch.source.max(1) == begin + 5).all()


def test_needles_are_all_there_and_the_asked_one_is_copied() -> None:
    batch = needles(rng(), 4, 200, count=5, questions=2)
    for row in range(4):
        starts = np.flatnonzero(batch.ids[row] == NEEDLE)
        assert len(starts) == 7
        keys = batch.ids[row, starts + 1].tolist()
        assert len(set(keys[:5])) == 5 and set(keys[5:]) < set(keys[:5])
        for question, start in enumerate(starts[5:]):
            origin = starts[keys.index(keys[5 + question])]
            assert batch.source[row, start + 3 : start + 6].tolist() == list(range(origin + 3, origin + 6))


def test_hay_has_zipf_frequencies_and_bigrams() -> None:
    ids = needles(rng(), 64, 1024).ids
    hay = ids[ids >= FIRST_WORD] - FIRST_WORD
    counts = np.bincount(hay)
    assert counts[0] > 4 * counts[60:].mean()
    after = hay[1:][hay[:-1] == 0]
    seen = np.sort(np.bincount(after))
    # Half of the followers of w0 are one of four words; by Zipf's law alone the first four words are 36 % of all.
    assert (seen > 0).sum() > 50 and seen[-4:].sum() / seen.sum() > 0.45


@pytest.mark.parametrize("probe", [KeyValueRecall(n=3), NeedleStrings(n=2, depths=(0.0, 0.3, 1.0))])
def test_probes_give_prompts_with_exact_spans(probe, words) -> None:
    samples = probe.build(words)
    assert len(samples) == 2 * (3 if isinstance(probe, KeyValueRecall) else 6)
    for sample in samples:
        assert list(sample.ids) == words(sample.text)["input_ids"]
        first, last = sample.answer_span
        assert (
            sample.ids[first:last]
            == sample.answer_ids
            == tuple(words(sample.answer, add_special_tokens=False)["input_ids"])
        )
        begin, stop = sample.needle_span
        assert begin < first < last < stop and words.decode(list(sample.ids[begin:stop])) == sample.needle
        assert sample.text.endswith(sample.question) and sample.question.startswith("? ")
        assert probe.judge(sample, f"{sample.answer} ; ? k3") and probe.judge(sample, sample.answer)
        assert not probe.judge(sample, f"{sample.answer} v1") and not probe.judge(sample, "")
        assert 0 <= sample.depth <= 1


def test_probes_are_seeded_and_refuse_foreign_tokenizers(words) -> None:
    assert KeyValueRecall().build(words) == KeyValueRecall().build(words)
    assert KeyValueRecall(seed=1).build(words) != KeyValueRecall().build(words)
    other = tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(ProbeError, match="must be that of recall-lm"):
        KeyValueRecall().build(other)


def test_the_general_probe_of_repeated_tokens_works_on_this_vocabulary(words) -> None:
    sample = RepeatedTokens(n=1, length=20).build(words)[0]
    assert sample.ids[0] == BOS and sample.ids[1:21] == sample.ids[21:]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: repeated(rng(), 1, 32, period=16), "period must be 1 to 15"),
        (lambda: key_values(rng(), 1, 64, questions=5), "leave room for their pairs"),
        (lambda: needles(rng(), 1, 32, count=3), "must fit"),
        (lambda: needles(rng(), 1, 64, count=2, depth=0.5), "needs count=1"),
        (lambda: needles(rng(), 0, 64), "n must be at least 1"),
        (lambda: KeyValueRecall(lengths=()), "must not be empty"),
        (lambda: KeyValueRecall(seed=2**32), "seed"),
        (lambda: NeedleStrings(depths=(1.5,)), r"depths must lie in \[0, 1\]"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(call, says: str) -> None:
    with pytest.raises(ProbeError, match=says):
        call()


def test_batches_hold_arrays_of_one_shape() -> None:
    batch = key_values(rng(), 2, 64)
    assert isinstance(batch, Batch)
    assert {a.shape for a in vars(batch).values()} == {(2, 64)}
