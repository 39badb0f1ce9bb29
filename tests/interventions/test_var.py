"""VAR: phi and sinks by hand, calibration, what is kept over turns, batches, and what it refuses."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import interp
from interp import VAR, InterventionError
from interp.interventions.image_groups import Prompt
from interp.testing import build
from interp.tracing.visual_sinks import calibrate_sinks, known_dimensions, phi, scaled_tau, sink_codes

SOME = {"rho": 0.1, "tau": 1.8, "summ": 0.05, "dims": (0, 1, 2)}


def test_phi_is_the_largest_of_its_dimensions_over_rms():
    x = torch.tensor([[[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])
    assert phi(x, (0, 1))[0].tolist() == pytest.approx([4 / 2.5, 1.0], rel=1e-6)
    assert phi(x, (0,))[0].tolist() == pytest.approx([3 / 2.5, 1.0], rel=1e-6)
    assert phi(x.bfloat16(), (1,)).dtype == torch.float32


def test_groups_of_sinks():
    kind = torch.tensor([[-1, 0, 2, 2, 1], [0, 2, 2, 1, 1]], dtype=torch.int8)
    sinks = torch.tensor([[True, True, True, False, False], [True, False, False, True, False]])
    prompt = Prompt(kind, torch.zeros_like(kind))
    # 1 visual sink, 2 other visual, 3 text sink; a pad is nothing; the second sample has no visual sink.
    assert sink_codes(sinks, prompt, needs_visual=False).tolist() == [[0, 3, 1, 2, 0], [3, 2, 2, 3, 0]]
    assert sink_codes(sinks, prompt, needs_visual=True).tolist() == [[0, 3, 1, 2, 0], [0, 0, 0, 0, 0]]


class Operations(TorchDispatchMode):
    """How many operations ran, and which of them waited for the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_layer_of_the_prompt_costs_a_few_operations_and_no_wait(deep_llava, llava_inputs, monkeypatch):
    """On a GPU each costs the host as much as a small kernel takes; what does not depend on the layer is made once."""
    module, layers = deep_llava(6), []

    def counted(self, *args, note=VAR._note):
        with Operations() as found:
            note(self, *args)
        layers.append(found.names)

    monkeypatch.setattr(VAR, "_note", counted)
    with torch.no_grad(), interp.hooked(module, interventions=[VAR(**SOME, skip_first=0, skip_last=0)]):
        module(**llava_inputs())
    assert len(layers) == 6
    for names in layers[1:]:
        assert len(names) <= 13, names
        assert "aten::_local_scalar_dense" not in names and "aten::_to_copy" not in names


def test_both_conventions():
    assert VAR(0.6).moved_fraction == 0.6
    assert VAR(0.6, p_means="kept").moved_fraction == pytest.approx(0.4)
    assert VAR(rho=0.2, rho_means="sink")._edit(None).operations[0].rho == 0.8
    assert VAR(rho=0.2)._edit(None).operations[0].rho == 0.2
    assert scaled_tau(20, "width", 1024) == 10 and scaled_tau(20, "absolute", 1024) == 20


def test_known_dimensions_are_recognised_by_shape():
    from transformers import LlavaConfig, Qwen2_5_VLConfig

    def named(config):
        return known_dimensions(type("M", (), {"config": config})())

    llava = LlavaConfig(text_config={"model_type": "llama", "hidden_size": 4096, "vocab_size": 32064})
    assert named(llava).dims == (1415, 2533) and named(llava).source == "known"
    llava.text_config.hidden_size = 5120
    assert named(llava).dims == (2100, 4743)
    llava.text_config.hidden_size = 2048
    assert named(llava) is None
    qwen = Qwen2_5_VLConfig(text_config={"hidden_size": 3584, "vocab_size": 152064})
    assert named(qwen).dims == (458, 2570)


def planted(module, dim=7, size=60.0):
    """The beginning-of-text token is massive in one dimension, as in a trained model."""
    with torch.no_grad():
        module.get_input_embeddings().weight[1, dim] = size
    module.config.text_config.bos_token_id = 1
    return module


def test_planted_sinks_are_calibrated_once_and_on_texts_of_its_own(deep_llava, llava_inputs, run):
    module = planted(deep_llava(5))
    var = VAR(tau_unit="width", without_visual_sink="act", summ=0.0, rho=0.0, p=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, got, session = run(module, llava_inputs(), [var])
    assert session.extra_forwards == 1
    assert run(module, llava_inputs(), [var])[2].extra_forwards == 0
    given = VAR(tau_unit="width", without_visual_sink="act", summ=0.0, rho=0.0, p=0.9, dims=(7,))
    assert torch.equal(run(module, llava_inputs(), [given])[1], got)
    assert not torch.equal(run(module, llava_inputs())[1], got)
    found = calibrate_sinks(module, [llava_inputs(n) for n in range(4)], tau=3.0)
    assert found.dims == (7,) and found.peak[0] > 5 * found.typical[0]


def test_a_dimension_that_is_large_everywhere_is_a_sinks_where_a_few_tokens_are_far_larger(deep_llava, llava_inputs):
    """SmolLM2's: |x / RMS(x)| cannot exceed sqrt(width), so that of the sink is not five times that of the others."""
    module, inputs = deep_llava(5), [llava_inputs(n) for n in range(4)]
    with torch.no_grad():
        weight = module.get_input_embeddings().weight
        weight[:, 7] = 4 * weight.std()
    with pytest.raises(InterventionError, match="not at three quarters of them"):
        calibrate_sinks(module, inputs, tau=2.0)
    found = calibrate_sinks(planted(module), inputs, tau=5.0)
    assert found.dims == (7,) and found.peak[0] < 5 * found.typical[0] and found.ratio[0] > 5


def test_sinks_that_cannot_be_calibrated_say_what_was_seen(deep_llava, llava_inputs, run):
    with pytest.raises(
        InterventionError, match=r"a sink dimension must reach tau = 2.17 at some of 192 tokens .* seen"
    ):
        run(deep_llava(5), llava_inputs(), [VAR(tau_unit="width")])
    with pytest.raises(InterventionError, match=r"\|x / RMS\(x\)\| cannot exceed sqrt\(48\) = 6.93, and tau is 20"):
        run(deep_llava(5), llava_inputs(), [VAR(dims=(7,))])


def test_a_layer_without_sinks_warns_and_changes_nothing(deep_llava, llava_inputs, run):
    module, inputs = deep_llava(5), llava_inputs()
    with pytest.warns(
        UserWarning, match=r"VAR changes nothing here: in no layer .* the largest phi of an image token is"
    ):
        _, got, _ = run(module, inputs, [VAR(tau=6.5, dims=(3,))])
    torch.testing.assert_close(got, run(module, inputs)[1], rtol=1e-5, atol=1e-5)


def test_batch_equals_singles_and_nothing_is_left_over(deep_llava, llava_inputs, batched, run):
    module, var = deep_llava(5), VAR(0.9, **SOME)
    samples = [llava_inputs(0), llava_inputs(3, before=2, after=7)]
    singles = [run(module, s, [var])[1] for s in samples]
    assert torch.equal(run(module, samples[1], [var])[1], singles[1])
    both = run(module, batched(*samples), [var])[1]
    plain = run(module, batched(*samples))[1]
    for n, single in enumerate(singles):
        torch.testing.assert_close(both[:, n], single[:, 0], rtol=1e-4, atol=1e-4)
        assert (both[:, n] - plain[:, n]).abs().max() > 0.05


def test_several_images_and_beams(deep_llava, llava_inputs, run):
    module, inputs, var = deep_llava(5), llava_inputs(1, images=3), VAR(0.9, **SOME)
    greedy = run(module, inputs, [var])[1]
    assert (greedy - run(module, inputs)[1]).abs().max() > 0.05
    # The first scores of every beam are those of the greedy run.
    beams = run(module, inputs, [var], num_beams=3)[1]
    # Some releases of transformers keep a beam's logits, some their log-softmax.
    first = [scores[0].log_softmax(-1) for scores in (beams, greedy)]
    torch.testing.assert_close(first[0], first[1].expand(3, -1), rtol=1e-4, atol=1e-4)


def test_an_answer_on_the_cache_in_one_forward_and_by_hand(deep_llava, llava_inputs, run):
    """Sinks are found in the prompt alone: the same logits in generation, teacher forcing and a loop of one's own."""
    module, inputs, var = deep_llava(5), llava_inputs(), VAR(0.9, **SOME)
    ids, logits, _ = run(module, inputs, [var], tokens=4)
    n = inputs["input_ids"].shape[1]
    with torch.no_grad(), interp.hooked(module, interventions=[var]) as session:
        out = module(**inputs, use_cache=True)
        loop = [out.logits[:, -1]]
        for step in range(3):
            out = module(input_ids=ids[:, n + step : n + step + 1], past_key_values=out.past_key_values)
            loop.append(out.logits[:, -1])
        session.prompt_length = n
        whole = {**inputs, "input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
        once = module(**whole).logits[0, n - 1 :]
    torch.testing.assert_close(torch.cat(loop), logits[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(once, logits[:, 0], rtol=1e-4, atol=1e-4)


def test_a_second_turn_keeps_old_sinks_and_finds_new_ones(deep_llava, llava_inputs):
    module, inputs, var = deep_llava(5), llava_inputs(), VAR(0.9, **SOME)
    n, cache, kept = inputs["input_ids"].shape[1], DynamicCache(config=module.config), []

    def look(call):
        if call.site.stack == "text" and call.site.layer == 2 and not call.generated:
            kept.append(call.run.of(var)["sinks"][2].clone())

    with torch.no_grad(), interp.hooked(module, interventions=[var, interp.Custom(before=look)]):
        ids = module.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
        ids = torch.cat([ids, torch.tensor([[11, 12, 13, 14, 15, 16]])], -1)
        module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3)
    first, second = kept
    assert first.shape == (1, n) and second.shape == (1, ids.shape[1])
    assert torch.equal(second[:, :n], first)
    assert not second[:, n : n + 2].any(), "generated tokens are no sinks"
    with (
        pytest.raises(InterventionError, match="this session has not filled"),
        interp.hooked(module, interventions=[var]),
    ):
        module.generate(input_ids=ids, past_key_values=_filled(module, inputs), max_new_tokens=2)


def _filled(module, inputs):
    cache = DynamicCache(config=module.config)
    with interp.tracing.session.untouched(module), torch.no_grad():
        module(**inputs, past_key_values=cache)
    return cache


def test_an_exception_leaves_no_hook_behind(deep_llava, llava_inputs):
    module, inputs = deep_llava(5), llava_inputs()

    def fail(call):
        raise KeyboardInterrupt

    layers = module.model.language_model.layers
    before = [len(layer._forward_pre_hooks) for layer in layers]
    with (
        pytest.raises(KeyboardInterrupt),
        interp.hooked(module, interventions=[VAR(0.9, **SOME), interp.Custom(before=fail, heads="L2H0")]),
    ):
        module.generate(**inputs, max_new_tokens=2)
    assert [len(layer._forward_pre_hooks) for layer in layers] == before


def test_together_with_vhr_pai_and_head_masks(deep_llava, llava_inputs, batched, run):
    """Composition: batch equals singles still, and the order of the list does not matter where stages differ."""
    module = deep_llava(5)
    policies = [VAR(0.9, **SOME), interp.PAI(0.3), interp.VHR(2.0), interp.MaskHeads("L3H1")]
    samples = [llava_inputs(0), llava_inputs(3, before=2, after=7)]
    both = run(module, batched(*samples), policies)[1]
    for n, sample in enumerate(samples):
        torch.testing.assert_close(both[:, n], run(module, sample, policies)[1][:, 0], rtol=1e-4, atol=1e-4)
    swapped = [policies[1], policies[0], policies[3], policies[2]]
    torch.testing.assert_close(run(module, samples[0], swapped)[1][:, 0], both[:, 0], rtol=1e-4, atol=1e-4)
    alone = [run(module, samples[0], [p])[1] for p in policies]
    assert all((both[:, :1] - one).abs().max() > 1e-3 for one in alone)
    halves = [interp.Knockout([n for n in range(38) if n >> bit & 1], "last") for bit in range(4)]
    too_many = [VAR(0.9, **SOME), *halves]
    with pytest.raises(ValueError, match="at most 8 key groups"):
        run(module, samples[0], too_many)


def test_what_it_refuses(deep_llava, llava_inputs, run):
    module, inputs = deep_llava(3), llava_inputs()
    with pytest.raises(InterventionError, match="leaves the first 2 and the last 1 layers alone, and .* has 3"):
        run(module, inputs, [VAR()])
    with pytest.raises(InterventionError, match=r"dims must lie within 0 .. 47 .* got \[48\]"):
        run(module, inputs, [VAR(dims=(1, 48), tau=2.0, layers=[1])])
    with pytest.raises(InterventionError, match="layers must lie within 0 .. 2"):
        run(module, inputs, [VAR(layers=[3])])
    with pytest.raises(InterventionError, match="needs a vision-language model"):
        interp.hooked(build("llama").module, interventions=[VAR()])
    mllama = build("mllama")
    with pytest.raises(InterventionError, match="through cross attention"):
        run(mllama.module, mllama.inputs, [VAR(layers=[0], tau=2.0, dims=(0,))])
    for bad in ({"p": 1.5}, {"rho": -0.1}, {"summ": 2}, {"tau": 0}, {"p_means": "x"}, {"dims": ()}, {"skip_last": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            VAR(**bad)
