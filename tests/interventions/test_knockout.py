"""Knockout: against masks put in by hand, groups by name, windows, the report, and what it refuses."""

import pytest
import torch

import interp
from interp import InterventionError, Knockout
from interp.heads import HeadError
from interp.interventions.image_groups import Prompt
from interp.interventions.prompt_groups import members
from interp.testing import build

PAD, SPECIAL, TEXT, IMAGE = -1, 0, 1, 2


def maps(module, inputs, knockout=None):
    policies = [] if knockout is None else [knockout]
    with torch.no_grad(), interp.hooked(module, capture=interp.Capture(attention=True), interventions=policies) as run:
        logits = module(**inputs).logits
    return torch.from_numpy(run.trace["text"].attention.values).nan_to_num(0), logits


def test_groups_by_name():
    kind = torch.tensor([[PAD, SPECIAL, TEXT, IMAGE, IMAGE, TEXT, TEXT, TEXT]], dtype=torch.int8)
    picture = torch.tensor([[-1, -1, -1, 0, 1, -1, -1, -1]], dtype=torch.int16)
    prompt = Prompt(kind, picture)
    wanted = {
        "image": [3, 4], "image:1": [4], "text": [2, 5, 6, 7], "special": [1], "first": [1], "question": [5, 6], "last": [7],
        "prompt": [1, 2, 3, 4, 5, 6, 7], "all": [1, 2, 3, 4, 5, 6, 7], "generated": [],
    }  # fmt: skip
    for name, positions in wanted.items():
        assert members(Knockout("first", "last"), "source", name, prompt)[0].nonzero().flatten().tolist() == positions
    for given in ((2, -1), kind == IMAGE):
        found = members(Knockout("first", "last"), "source", given, prompt)[0].nonzero().flatten().tolist()
        assert found == ([2, 7] if isinstance(given, tuple) else [3, 4])


def test_renormalised_is_minus_infinity_and_zeroed_is_not(deep_llava, llava_inputs):
    module, inputs = deep_llava(3), llava_inputs()
    plain, _ = maps(module, inputs)
    image = inputs["input_ids"][0] == 5
    question = torch.arange(len(image)) > int(image.nonzero()[-1])
    question[-1] = False
    masked, _ = maps(module, inputs, Knockout("image", "question", [0]))
    zeroed, _ = maps(module, inputs, Knockout("image", "question", [0], kind="zero"))
    wanted = plain[0, 0].clone()
    wanted[:, question] *= ~image
    torch.testing.assert_close(zeroed[0, 0], wanted, rtol=1e-5, atol=1e-6)
    wanted[:, question] /= wanted[:, question].sum(-1, keepdim=True)
    torch.testing.assert_close(masked[0, 0], wanted, rtol=1e-4, atol=1e-6)
    heads, _ = maps(module, inputs, Knockout("image", "question", heads="L0H2"))
    assert torch.allclose(heads[0, 0, 2], wanted[2], rtol=1e-4, atol=1e-6)
    assert torch.allclose(heads[0, 0, [0, 1, 3]], plain[0, 0, [0, 1, 3]], atol=1e-6)


def test_a_blocked_image_is_no_image_at_all_below(deep_llava, llava_inputs, run):
    """With every edge from image to text blocked in all layers, another image gives the same text."""
    module, first, second = deep_llava(4), llava_inputs(0), llava_inputs(0)
    second["pixel_values"] = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    assert (run(module, first)[1] - run(module, second)[1]).abs().max() > 0.05
    blocked = [interp.Knockout("image", t) for t in ("text", "special", "generated")]
    one, two = run(module, first, blocked)[1], run(module, second, blocked)[1]
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    # Only the prompt is blocked: decode rows still see the image.
    assert (run(module, first, blocked[:2])[1][1:] - run(module, second, blocked[:2])[1][1:]).abs().max() > 1e-3


def test_last_blocks_every_answering_row(deep_llava, llava_inputs):
    module, inputs = deep_llava(3), llava_inputs()
    with (
        torch.no_grad(),
        interp.hooked(module, capture=interp.Capture(attention=True), interventions=[Knockout("image", "last")]) as run,
    ):
        module.generate(**inputs, max_new_tokens=4, do_sample=False)
    attention = torch.from_numpy(run.trace["text"].attention.values).nan_to_num(0)
    n, image = inputs["input_ids"].shape[1], torch.nonzero(inputs["input_ids"][0] == 5).flatten()
    mass = attention[0][..., image].sum(-1)
    assert not mass[:, :, n - 1 :].any() and mass[:, :, n - 2].all()


def test_batch_equals_singles(deep_llava, llava_inputs, batched, run):
    module, knockout = deep_llava(4), Knockout("image:0", "last", [1, 2])
    samples = [llava_inputs(0, images=2), llava_inputs(3, before=2, after=7)]
    both = run(module, batched(*samples), [knockout], tokens=3)[1]
    for n, sample in enumerate(samples):
        torch.testing.assert_close(both[:, n], run(module, sample, [knockout], tokens=3)[1][:, 0], rtol=1e-4, atol=1e-4)


def test_windows_are_the_scripts():
    def script(layer, window, count):
        return tuple(range(max(0, layer - window // 2), min(count, layer - (-window // 2))))

    for window in (1, 2, 5, 9):
        assert [Knockout.window(n, window, 12) for n in range(12)] == [script(n, window, 12) for n in range(12)]


def test_the_report(deep_llava, llava_inputs, batched):
    module = deep_llava(4)
    inputs = batched(llava_inputs(0), llava_inputs(3, before=2, after=7))
    knockout = Knockout("image", "last", Knockout.window(2, 3, 4))
    effect = knockout.effect(module, inputs)
    with torch.no_grad():
        plain = module(**inputs).logits[:, -1].softmax(-1)
        with interp.hooked(module, interventions=[knockout]):
            blocked = module(**inputs).logits[:, -1].softmax(-1)
    assert torch.equal(effect.answer, plain.argmax(-1))
    for n, token in enumerate(effect.answer.tolist()):
        assert float(effect.change[n]) == pytest.approx(float(blocked[n, token] / plain[n, token] - 1), rel=1e-4)
    profile = Knockout.over_layers(module, inputs, "image", "last", width=3, answer=7)
    assert profile.change.shape == (2, 4) and profile.layers == (0, 1, 2, 3)
    alone = knockout.effect(module, inputs, answer=[7, 7])
    torch.testing.assert_close(profile.change[:, 2], alone.change[:, 0])
    with pytest.raises(ValueError, match="answer must be a token id within 0 .. 95"):
        knockout.effect(module, inputs, answer=1000)


def test_text_models_and_cross_attention(run):
    llama = build("llama")
    attention, _ = maps(llama.module, llama.inputs, Knockout([3], "last"))
    assert not attention[0, :, :, -1, 3].any() and attention[0, :, :, -2, 3].all()
    mllama = build("mllama")
    with torch.no_grad():
        plain = mllama.module(**mllama.inputs).logits
        with interp.hooked(mllama.module, interventions=[Knockout("image", "last", stack="cross")]):
            got = mllama.module(**mllama.inputs).logits
    assert torch.allclose(got[:, :-1], plain[:, :-1], atol=1e-5) and (got - plain)[:, -1].abs().max() > 1e-3


def test_what_it_refuses(deep_llava, llava_inputs, run):
    module, inputs = deep_llava(3), llava_inputs()
    for bad in ({"source": "images"}, {"target": "image:x"}, {"source": [0.5]}, {"kind": "mask"}, {"layers": "all"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Knockout(**{"source": "image", "target": "last", **bad})
    refused = {
        "layers must lie within 0 .. 2": Knockout("image", "last", [3]),
        "stack must be one of": Knockout("image", "last", stack="cross"),
        "stack must be 'text' or one of cross attention": Knockout("image", "last", stack="vision"),
        "source='image:1' must name positions in every sample": Knockout("image:1", "last"),
        "source must lie within the prompt's 38 positions": Knockout([38], "last"),
    }
    for match, policy in refused.items():
        with pytest.raises(InterventionError, match=match):
            run(module, inputs, [policy])
    with pytest.raises(HeadError):
        run(module, inputs, [Knockout("image", "last", heads="L3H0")])
    llama = build("llama")
    with pytest.raises(InterventionError, match="must name positions in every sample"):
        run(llama.module, llama.inputs, [Knockout("image", "last")])
