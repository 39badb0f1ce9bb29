"""Scores of retrieval on the bundled planted model: three heads see far, so only they can retrieve; and on its untrained twin."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis import score
from interp.analysis.activation_frequency import by_context
from interp.models.model import Model
from probes.recall import NeedleStrings
from probes.repeated import RepeatedTokens

PLANTED = interp.Heads.parse("L2H1,L3H4,L4H6")
# The last depth puts the needle within everybody's window.
FAR = NeedleStrings(lengths=(128, 256), depths=(0.0, 0.5), n=2)
# Random weights retrieve at no length.
NEARER, FEW = (NeedleStrings(lengths=lengths, depths=(0.0, 0.5), n=n) for lengths, n in (((64, 128), 2), ((128,), 1)))


@pytest.fixture(scope="module")
def planted() -> Any:
    return interp.load("recall-lm-planted")


def area(values: np.ndarray) -> float:
    mask = PLANTED.mask("text", *values.shape)
    a, b = values[mask][:, None], values[~mask][None]
    return float(((a > b) + 0.5 * (a == b)).mean())


def test_only_planted_heads_retrieve(planted: Any) -> None:
    found = score("retrieval", planted, FAR)
    assert found.attrs["settings"]["gate_rate"] > 0.9
    others = ~PLANTED.mask("text", *found.value.shape)
    assert (found.value.values[others] == 0).all() and (found.null.values == 0).all()
    assert found.heads.top(1) == interp.Heads.parse("L4H6") and found.value.values[4, 6] > 0.9
    often = score("activation_frequency", planted, FAR)
    assert often.value.values[4, 6] > 0.9 and (often.value.values[others] == 0).all()
    split = by_context(found)
    assert split.agreement.values[0, 1] > 0.8 and split.n.values.sum() == found.n.values[4, 6]


@pytest.mark.parametrize("name", ["query_mass", "induction"])
def test_planted_heads_come_first(planted: Any, name: str) -> None:
    probe = None if name == "induction" else FAR
    found = score(name, planted, probe)
    assert found.heads.top(1) == interp.Heads.parse("L4H6")
    assert area(found.value.values) > 0.8, area(found.value.values)


@pytest.mark.slow
def test_only_planted_heads_write_what_the_needle_says(planted: Any) -> None:
    # Two of them act through later layers, which this direct path leaves out.
    found = score("needle_contribution", planted, FAR)
    others = ~PLANTED.mask("text", *found.value.shape)
    assert (found.value.values[others] == 0).all() and found.value.values[4, 6] > 1
    assert found.heads.top(1) == interp.Heads.parse("L4H6")


@pytest.mark.slow
def test_what_does_not_see_far_streams(planted: Any) -> None:
    found = score("streaming_mass", planted, FAR, sink=1, recent=16)
    others = ~PLANTED.mask("text", *found.value.shape)
    np.testing.assert_allclose(found.value.values[others], 1, rtol=1e-5)
    assert found.value.values[4, 6] < 0.6 and area(-found.value.values) == 1
    short = score("elasticity", planted, NeedleStrings(lengths=(300,), n=1), lengths=(64, 128, 256))
    assert np.abs(short.value.values[others]).max() < 0.35 and short.value.values[4, 6] > 0.5


@pytest.mark.slow
def test_gates_find_the_kv_heads(planted: Any) -> None:
    found = score("duo_attention", planted, FAR, steps=60, lr=0.05, sink=1, recent=16)
    gates = found.gate.values
    group = found.sizes["head"] // found.sizes["kv_head"]
    assert np.unravel_index(gates.argmax(), gates.shape) == (4, 6 // group) and gates[4, 6 // group] > 0.9
    assert np.median(gates) < 0.05 and found.null.values[4, 6] <= found.value.values[4, 6]


def test_an_untrained_twin_retrieves_nothing_and_says_so(planted: Any) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    twin = Model(AutoModelForCausalLM.from_config(copy.deepcopy(planted.config)).eval(), tokenizer=planted.tokenizer)
    with pytest.warns(UserWarning, match=r"solved 0 of 8 \(rate 0\.00\)"):
        found = score("retrieval", twin, NEARER, max_new_tokens=4)
    assert np.isnan(found.value.values).all()
    forced = score("retrieval", twin, NEARER, mode="teacher_forced")
    assert forced.value.values.max() < 0.2 and "gate_rate" not in forced.attrs["settings"]
    random = score("induction", twin, RepeatedTokens(n=2))
    assert np.abs(random.value.values - random.null.values).max() < 0.05
    assert np.abs(score("needle_contribution", twin, FEW).value.values).max() < 0.05
