"""Sets side by side in one forward give what each gives alone, in a whole forward of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp.heads import Heads
from interp.testing import build

sys.path.insert(0, str(Path(__file__).parent))
from _head_sets import MaskSets, answers


def alone(model: interp.Model, prompt: list[int], answer: list[int], one: np.ndarray, kind: str) -> tuple[float, float]:
    """The direct way: prompt and answer through the model at once, the library's own masks, the public intervention."""
    rows = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    masking = interp.MaskHeads(Heads.from_mask(one), kind=kind, rows=list(rows))
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    with torch.no_grad(), interp.hooked(model, interventions=[masking]):
        logits = model.module(input_ids=ids).logits[0, rows].double()
    wanted = torch.tensor(answer)
    logprob = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
    return float(logprob), float((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("kind", ["zero", "uniform"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_sets_side_by_side_equal_each_alone(family: str, kind: str) -> None:
    model = interp.Model(build(family).module)
    rng = np.random.default_rng(0)
    shape = interp.anatomy(model.module).shape("text")
    sets = rng.random((7, *shape)) < 0.3
    sets[0] = False
    prompt, answer = rng.integers(10, 90, 40).tolist(), rng.integers(10, 90, 3).tolist()
    # Three rows a set and eight a forward: the last forward is shorter than the others.
    got = answers(model, prompt, answer, sets, kind, rows=8)
    expected = np.array([alone(model, prompt, answer, one, kind) for one in sets])
    np.testing.assert_allclose(got.logprob, expected[:, 0], atol=2e-4)
    assert got.exact.tolist() == expected[:, 1].tolist()
    assert np.ptp(got.logprob) > 0.05, "the sets must differ for this to say anything"


def test_an_answer_the_model_gives_is_an_exact_match() -> None:
    model = interp.Model(build("llama").module)
    prompt = list(range(20, 40))
    written = model.module.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0, 20:].tolist()
    none = np.zeros((1, *interp.anatomy(model.module).shape("text")), bool)
    assert answers(model, prompt, written, none, "zero").exact.tolist() == [1.0]
    other = [written[0], written[1], (written[2] + 1) % 90]
    assert answers(model, prompt, other, none, "zero").exact.tolist() == [0.0]


def test_more_than_one_set_needs_a_width() -> None:
    with pytest.raises(ValueError, match="width must be given"):
        MaskSets(np.zeros((2, 1, 1), bool), "zero", None)
