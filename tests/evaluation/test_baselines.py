"""VCD and DoLa against loops without a cache that re-state them from the model's own outputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.evaluation import VCD, DoLa
from interp.evaluation.baselines import check_together, scoring
from interp.interventions import PAI, PAINT, VHR
from interp.tracing.calls import InterventionError

NEW = 8


def greedy(model: Any, inputs: dict[str, Tensor], interventions: list[Any], **options: Any) -> list[int]:
    with interp.hooked(model, interventions=interventions), torch.no_grad():
        out = model.generate(inputs, max_new_tokens=NEW, do_sample=False, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def restated(model: Any, inputs: dict[str, Tensor], choose: Any) -> list[int]:
    """Greedy decoding, the whole sequence anew at every step, up to an image token: no forward takes one without a picture."""
    from interp.testing.multimodal import IMAGE

    made: list[int] = []
    while len(made) < NEW and IMAGE not in made:
        ids = torch.cat([inputs["input_ids"], torch.tensor([made], dtype=torch.int64)], 1)
        grown = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            made.append(int(choose(grown).argmax()))
    return made


def noised(pixels: Tensor, step: int) -> Tensor:
    """The release's schedule, step by step in double precision."""
    kept = 1.0
    for n in range(step + 1):
        x = -6 + 12 * n / 999
        kept *= 1 - ((1 / (1 + math.exp(-x))) * (0.5e-2 - 1e-5) + 1e-5)
    noise = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    return math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (3.0, 0.0), (0.5, 0.6)])
def test_vcd_is_the_contrast_of_both_branches(tiny: Any, tiny_inputs: Any, alpha: float, beta: float) -> None:
    inputs = tiny_inputs()
    noisy = noised(inputs["pixel_values"], 500)

    def choose(grown: dict[str, Tensor]) -> Tensor:
        clean = tiny.module(**grown).logits[0, -1].log_softmax(-1)
        other = tiny.module(**{**grown, "pixel_values": noisy}).logits[0, -1].log_softmax(-1)
        mixed = (1 + alpha) * clean - alpha * other
        return mixed.masked_fill(clean.exp() < beta * clean.exp().max(), -torch.inf)

    expected = restated(tiny, inputs, choose)
    assert greedy(tiny, inputs, [VCD(alpha, beta)])[: len(expected)] == expected and len(expected) > 3


def test_vcd_changes_texts_and_is_off_at_zero(tiny: Any, tiny_inputs: Any) -> None:
    plain = [greedy(tiny, tiny_inputs(seed), []) for seed in range(4)]
    assert [greedy(tiny, tiny_inputs(seed), [VCD(0.0)]) for seed in range(4)] == plain
    assert [greedy(tiny, tiny_inputs(seed), [VCD(3.0, 0.0)]) for seed in range(4)] != plain


def test_the_noised_branch_stays_in_step_in_batches(tiny: Any, tiny_inputs: Any) -> None:
    one, two = tiny_inputs(1), tiny_inputs(2)
    both = {name: torch.cat([one[name], two[name]]) for name in one}
    with interp.hooked(tiny, interventions=[VCD(3.0, 0.0)]) as run, torch.no_grad():
        out = tiny.generate(both, max_new_tokens=NEW, do_sample=False)
    assert run.extra_forwards == NEW
    start = one["input_ids"].shape[1]
    assert out[:, start:].tolist() == [greedy(tiny, x, [VCD(3.0, 0.0)]) for x in (one, two)]


def test_a_branch_that_fails_says_what_it_was_to_run_on(tiny: Any, tiny_inputs: Any) -> None:
    branches = 0

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal branches
        branches += kwargs["input_ids"].shape[1] > 1
        if branches == 2:
            raise ValueError("broken")

    hook = tiny.module.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        for method, on in ((VCD(), "the noised image, and"), (PAI(0.0, 1.1, layers=[0]), "the text alone, and")):
            branches = 0
            with pytest.raises(InterventionError, match=f"to run the model on {on} .* refuses .*: ValueError: broken"):
                greedy(tiny, tiny_inputs(), [method])
    finally:
        hook.remove()


@pytest.mark.parametrize("method", [PAI(0.0, 1.7, layers=[0]), PAINT(0.0, 0.0, 0.4, layers=[0], scored_by="mean")])
def test_guidance_acts_on_forced_scores(tiny: Any, tiny_inputs: Any, method: Any) -> None:
    from interp.testing.multimodal import IMAGE

    inputs = tiny_inputs()
    with interp.hooked(tiny, interventions=[method]), torch.no_grad():
        logits = tiny(inputs).logits[:, -3:]
        found, extra = method.forced(tiny, inputs, logits, {})
    text = {"input_ids": inputs["input_ids"][inputs["input_ids"] != IMAGE][None]}
    with torch.no_grad():
        image, alone = (tiny.module(**given).logits[:, -3:].log_softmax(-1) for given in (inputs, text))
    torch.testing.assert_close(found, method.gamma * image + (1 - method.gamma) * alone, atol=2e-5, rtol=1e-5)
    assert extra == 1 and (found - image).abs().max() > 0.1
    assert scoring([method, PAI(0.2), VCD()])[0] is method and len(scoring([method, PAI(0.2), VCD()])) == 2


def test_vcd_needs_an_image(tiny: Any, tiny_inputs: Any) -> None:
    text = {"input_ids": torch.tensor([[1, 20, 21]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    with pytest.raises(InterventionError, match="needs an image"):
        greedy(tiny, text, [VCD()])


@pytest.mark.parametrize("layers", ["low", "high", [0, 1, 3]])
def test_dola_is_the_contrast_with_the_farthest_layer(tiny: Any, tiny_inputs: Any, layers: Any) -> None:
    candidates = {"low": [0], "high": [2, 4]}.get(layers, layers) if isinstance(layers, str) else layers
    head = tiny.module.get_output_embeddings()
    texts = []
    for seed in range(3):
        inputs = tiny_inputs(seed)

        def choose(grown: dict[str, Tensor]) -> Tensor:
            out = tiny.module(**grown, output_hidden_states=True)
            last = out.logits[0, -1].double().log_softmax(-1)
            best, farthest = None, -1.0
            for n in candidates:
                early = head(out.hidden_states[n][0, -1]).double().log_softmax(-1)
                mean = (early.exp() + last.exp()) / 2
                divergence = float(
                    (early.exp() * (early - mean.log())).sum() + (last.exp() * (last - mean.log())).sum()
                )
                if divergence > farthest:
                    best, farthest = early, divergence
            return (last - best).masked_fill(last.exp() < 0.1 * last.exp().max(), -torch.inf)

        texts.append(restated(tiny, inputs, choose))
        assert greedy(tiny, inputs, [DoLa(layers)])[: len(texts[-1])] == texts[-1]
    assert sum(map(len, texts)) >= NEW
    if layers == "low":
        assert texts != [greedy(tiny, tiny_inputs(seed), []) for seed in range(3)]


def test_dola_leaves_nothing_behind_and_does_not_read_other_branches(tiny: Any, tiny_inputs: Any) -> None:
    plain = greedy(tiny, tiny_inputs(), [])
    greedy(tiny, tiny_inputs(), [DoLa()])
    assert not any(m._forward_pre_hooks for m in tiny.module.modules()) and greedy(tiny, tiny_inputs(), []) == plain
    check_together([DoLa(), VHR(2.0), PAI(0.2)])
    for other in (VCD(), PAI(0.2, gamma=1.1)):
        with pytest.raises(InterventionError, match="must not stand beside"):
            check_together([DoLa(), other])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VCD(alpha=-1), "alpha"), (lambda: VCD(beta=1), "beta"), (lambda: VCD(step=1000), "step"),
        (lambda: DoLa("middle"), "layers"), (lambda: DoLa([]), "layers"), (lambda: DoLa([1.5]), "layers"),
        (lambda: DoLa(cutoff=2), "cutoff"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_dola_refuses_layers_that_are_not_there(tiny: Any) -> None:
    with pytest.raises(InterventionError, match="below 5"):
        interp.hooked(tiny, interventions=[DoLa([7])])
