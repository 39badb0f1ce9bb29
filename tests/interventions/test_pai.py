"""PAI: the boost against a recomputation, guidance against branches without a cache, and what it refuses."""

import math

import pytest
import torch

import interp
from interp import PAI, InterventionError
from interp.interventions.image_groups import Prompt
from interp.interventions.text_only import TextBranch
from interp.testing import build
from interp.tracing.calls import RunState

IMAGE = 5


def boosted(module, inputs, alpha, layers, rows):
    """Logits of a forward of the plain model with the scores of image keys changed at the given rows, restated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    image = inputs["input_ids"][0] == IMAGE

    def attention(site, q, k, v, mask, scaling, **_):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * scaling
        if site.layer_idx in layers:
            for row in rows:
                for key in torch.nonzero(image).flatten():
                    scores[:, :, row, key] = scores[:, :, row, key] + alpha * scores[:, :, row, key].abs()
        weights = (scores + mask).softmax(-1)
        return (weights @ v).transpose(1, 2), weights

    AttentionInterface.register("literal_pai", attention)
    AttentionMaskInterface.register("literal_pai", eager_mask)
    config = module.config.text_config
    before, config._attn_implementation = config._attn_implementation, "literal_pai"
    try:
        with torch.no_grad():
            return module(**inputs).logits
    finally:
        config._attn_implementation = before


@pytest.mark.parametrize("rows", ["last", "text"])
def test_the_boost_is_the_release_restated(deep_llava, llava_inputs, rows):
    module, inputs = deep_llava(4), llava_inputs()
    n = inputs["input_ids"].shape[1]
    chosen = [n - 1] if rows == "last" else [i for i in range(n) if inputs["input_ids"][0, i] != IMAGE]
    wanted = boosted(module, inputs, 0.7, (2, 3), chosen)
    with torch.no_grad(), interp.hooked(module, interventions=[PAI(0.7, rows=rows)]):
        got = module(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert (got - module(**inputs).logits)[0, -1].abs().max() > 0.01


def test_every_step_is_boosted_and_the_first_may_be_left_out(deep_llava, llava_inputs, run):
    """Generation equals one forward over what it wrote with the boost at every answering row."""
    module, inputs = deep_llava(4), llava_inputs()
    n = inputs["input_ids"].shape[1]
    ids, got, _ = run(module, inputs, [PAI(0.7)], tokens=4)
    whole = {**inputs, "input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    wanted = boosted(module, whole, 0.7, (2, 3), range(n - 1, n + 3))
    torch.testing.assert_close(got[:, 0], wanted[0, n - 1 :], rtol=1e-4, atol=1e-5)
    _, later, _ = run(module, inputs, [PAI(0.7, first_token=False)], tokens=4)
    plain = run(module, inputs, tokens=4)[1]
    torch.testing.assert_close(later[0], plain[0], rtol=1e-5, atol=1e-5)
    assert (later[1] - plain[1]).abs().max() > 1e-3


def test_batch_equals_singles_with_several_images(deep_llava, llava_inputs, batched, run):
    module, pai = deep_llava(4), PAI(0.7, 1.3)
    samples = [llava_inputs(0, images=2), llava_inputs(3, before=2, after=7)]
    options = {"tokens": 4, "output_scores": True}
    both, _, session = run(module, batched(*samples), [pai], **options)
    assert session.extra_forwards == 4
    for n, sample in enumerate(samples):
        alone = run(module, sample, [pai], **options)[0]
        assert torch.equal(alone[0, -4:], both[n, -4:])


def by_hand(module, text, image_logits, generated, gamma, cutoff):
    """Guided log-probabilities with the text branch run from its start, without a cache."""
    with torch.no_grad():
        ids = torch.cat([text, generated], -1)
        plain = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].log_softmax(-1)
    image = image_logits.log_softmax(-1)
    mixed = gamma * (image - plain) + plain
    return mixed.masked_fill(image < math.log(cutoff) + image.max(-1, keepdim=True).values, -torch.inf)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "internvl", "idefics3"])
def test_guidance_is_the_formula_with_a_branch_of_its_own(family):
    specimen = build(family)
    module, inputs = specimen.module, specimen.inputs
    n = inputs["input_ids"].shape[1]
    keep = inputs["input_ids"][0] != IMAGE
    text = inputs["input_ids"][:, keep]
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}
    with torch.no_grad(), interp.hooked(module, interventions=[PAI(0.0, 1.5)]) as session:
        out = module.generate(**inputs, **options, output_scores=True, output_logits=True)
    assert session.extra_forwards == 4
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        wanted = by_hand(module, text, logits, out.sequences[:, n : n + step], 1.5, 0.1)
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)
    # The image branch is the plain model: what the text branch noted on the modules was put back.
    with torch.no_grad():
        again = module(**{**inputs, **_extended(inputs, out.sequences[:, :-1])}).logits[:, n - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), again, rtol=1e-3, atol=1e-3)


def _extended(inputs, ids):
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            more[name] = torch.nn.functional.pad(inputs[name], (0, ids.shape[1] - inputs[name].shape[1]))
    return more


def test_the_branch_follows_beams_and_rejected_tokens(deep_llava, llava_inputs):
    """Rows that move or go back get the logits of a branch run from its start."""
    module, inputs = deep_llava(3), llava_inputs()
    run = RunState(module, interp.anatomy(module), inputs, True, root=module)
    kind = torch.where(inputs["input_ids"] == IMAGE, 2, 1).to(torch.int8)
    branch = TextBranch(PAI(), run, Prompt(kind, torch.zeros_like(kind)))
    text = inputs["input_ids"][:, inputs["input_ids"][0] != IMAGE]
    steps = [
        [[], [], []],
        [[11], [12], [13]],
        [[12, 20], [11, 21], [12, 22]],
        [[12, 22, 30], [12, 20, 31], [12, 20, 32]],
    ]
    steps += [[[12, 40], [12, 41], [11, 42]], [[12, 40, 50, 51], [12, 41, 52, 53], [12, 41, 54, 55]]]
    for generated in steps:
        ids = torch.tensor(generated, dtype=torch.int64).reshape(3, -1)
        whole = torch.cat([text.expand(3, -1), ids], -1)
        with torch.no_grad():
            wanted = module(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[:, -1]
        torch.testing.assert_close(branch.logits(ids), wanted, rtol=1e-4, atol=1e-4)


def test_guided_beams_and_sampling_run(deep_llava, llava_inputs, batched, run):
    module = deep_llava(3)
    inputs = batched(llava_inputs(0), llava_inputs(3, before=2, after=7))
    beams = run(module, inputs, [PAI(0.3, 1.5)], num_beams=3, num_return_sequences=2, tokens=5)[0]
    assert beams.shape[0] == 4
    for n in range(2):
        keep = inputs["attention_mask"][n].bool()
        one = {k: inputs[k][n : n + 1, keep] for k in ("input_ids", "attention_mask")}
        one["pixel_values"] = inputs["pixel_values"][n : n + 1]
        alone = run(module, one, [PAI(0.3, 1.5)], num_beams=3, num_return_sequences=2, tokens=5)[0]
        assert torch.equal(alone[:, -5:], beams[2 * n : 2 * n + 2, -5:])
    torch.manual_seed(0)
    sampled = run(module, inputs, [PAI(0.3, 1.5)], do_sample=True, num_return_sequences=2)[0]
    assert sampled.shape[0] == 4


def test_what_it_refuses(deep_llava, llava_inputs, run):
    module, inputs = deep_llava(3), llava_inputs()
    with pytest.raises(InterventionError, match=r"layers must lie within 0 .. 2 .* got \[5\]"):
        run(module, inputs, [PAI(layers=[5])])
    with pytest.raises(InterventionError, match="leaves the first two layers alone"):
        interp.hooked(build("llava").module, interventions=[PAI()])
    with pytest.raises(InterventionError, match="needs a vision-language model"):
        interp.hooked(build("gpt2").module, interventions=[PAI(layers=[0])])
    with pytest.raises(InterventionError, match="needs image tokens"):
        run(module, {"input_ids": torch.tensor([[1, 11, 12]])}, [PAI()])
    for bad in ({"alpha": math.inf}, {"gamma": -1}, {"cutoff": 1.0}, {"rows": "first"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PAI(**bad)
