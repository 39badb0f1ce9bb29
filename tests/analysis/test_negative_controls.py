"""Scores that stand for something vanish where it is gone: random weights, and tokens in a random order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis import score
from probes.repeated import RepeatedTokens
from probes.samples import Sample


@pytest.fixture(scope="module")
def trained() -> Any:
    return interp.load("recall-lm", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def untrained(trained: Any) -> Any:
    torch.manual_seed(0)
    return interp.Model(type(trained.module)(trained.config).float().eval(), tokenizer=trained.tokenizer)


PROBE = RepeatedTokens(n=4, length=24)
NAMES = ("induction", "duplicate_token", "prefix_matching")


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_have_no_such_heads(trained: Any, untrained: Any, name: str) -> None:
    real, random = (score(name, model, PROBE).value.values for model in (trained, untrained))
    # A head that spreads its attention evenly has about one 25th to one 49th on any key.
    assert np.nanmax(random) < 0.1
    if name == "induction":
        assert np.nanmax(real) > 5 * np.nanmax(random)


def test_a_second_copy_in_a_random_order_has_no_induction(trained: Any) -> None:
    from dataclasses import replace

    samples = PROBE.build(trained)
    rng = np.random.default_rng(0)
    mixed = []
    for sample in samples:
        ids, rows = list(sample.ids), sample.last_copy
        ids[rows.start : rows.stop] = [int(i) for i in rng.permutation(ids[rows.start : rows.stop])]
        mixed.append(replace(sample, ids=tuple(ids)))
    plain, shuffled = (score("induction", trained, given).value.values for given in (samples, mixed))
    assert np.nanmax(plain) > 0.4
    assert np.nanmax(shuffled) < 0.25 * np.nanmax(plain)


def test_random_weights_have_no_sink_and_shuffled_tokens_say_nothing_of_content(trained: Any, untrained: Any) -> None:
    rng = np.random.default_rng(1)
    texts = RepeatedTokens(n=6, length=32).build(trained)
    shuffled = [Sample((s.ids[0], *(int(i) for i in rng.permutation(s.ids[1:])))) for s in texts]
    none = score("sink", untrained, texts, length=64)
    assert np.nanmax(none.value.values) == 0 and np.nanmax(none.null.values) == 0
    # The middle key is the control within the model: no place in the middle of random tokens is a sink.
    found = score("sink", trained, shuffled, length=64)
    assert np.nanmax(found.null.values) <= np.nanmax(found.value.values)
