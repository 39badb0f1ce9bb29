"""VHR: the choice of heads by hand, when it is made, what keeps it, and what it refuses."""

import pytest
import torch
from transformers import DynamicCache

import interp
from interp import VHR, InterventionError
from interp.models.anatomy import Anatomy, Site
from interp.testing import build
from interp.tracing.calls import RunState
from interp.tracing.prompt import Prompt
from interp.tracing.text_only import text_only_inputs


def gains(session_module, inputs, vhr, forward=True, **options):
    """Gains by layer that a run used, read while it runs."""
    found = {}

    def look(call, z):
        if call.site.stack == "text" and "gains" in call.run.of(vhr):
            gain = call.run.of(vhr)["gains"].get(call.site.name)
            if gain is not None:
                found[call.site.layer] = gain[:, 0, :, 0].clone()

    with torch.no_grad(), interp.hooked(session_module, interventions=[vhr, interp.Custom(after=look)]):
        session_module(**inputs) if forward else session_module.generate(**inputs, **options)
    return found


def test_the_lower_median_half_of_the_heads():
    text = torch.zeros(1, 4, 2)
    image = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 4.0]]])
    assert VHR(outlier_filter=False).select(image, text).tolist() == [[False, True, False, True]]
    assert VHR(outlier_filter=False, distance="euclidean").select(image, text).tolist() == [[False, True, False, True]]


def test_a_head_that_surges_without_the_image_is_filtered():
    text, image = torch.zeros(1, 6, 1), torch.arange(6.0)[None, :, None] / 10
    text[0, 5] = 9.0
    # VHD is 0, .01, .04, .09, .16, 72.3: head 5 is an outlier there and in ||z(text)||^2. Its 0 lowers the median to .01.
    assert VHR().select(image, text)[0].tolist() == [False, False, True, True, True, False]
    assert VHR(outlier_filter=False).select(image, text)[0].tolist() == [False, False, False, True, True, True]
    assert VHR(filter_guard=1e6).select(image, text)[0].tolist() == [False, False, False, True, True, True]
    small = VHR(filter_guard=1.0).select(image / 100, text / 100)[0]
    assert small[5], "the guard is absolute, as in the release"
    assert not VHR(filter_guard=0.0).select(image / 100, text / 100)[0, 5]


def test_rounding_chooses_no_head():
    """Gemma 3's last row does not see the image in a layer of sliding windows: z is the same but for rounding."""
    text = torch.randn(1, 4, 8)
    image = text * (1 + 1e-7 * torch.randn(1, 4, 8))
    assert VHR().select(image, text).any()
    assert not VHR().select(image, text, 1e-6).any()
    specimen, vhr = build("gemma3"), VHR(2.0, layers=[0])
    assert all((gain == 1).all() for gain in gains(specimen.module, specimen.inputs, vhr).values())


def test_the_text_alone_is_padded_anew():
    kind = torch.tensor([[-1, 0, 2, 2, 1, 1], [0, 2, 1, 2, 2, 2]], dtype=torch.int8)
    ids = torch.arange(12).reshape(2, 6) + 10
    given = {"input_ids": ids, "token_type_ids": ids * 2, "attention_mask": (kind >= 0).long(), "pixel_values": None}
    run = RunState(torch.nn.Module(), Anatomy("M", (), {}, (), {}), given, True)
    found = text_only_inputs(run, Prompt(kind, torch.zeros_like(kind)))
    assert {name: value.tolist() for name, value in found.items()} == {
        "attention_mask": [[1, 1, 1], [0, 1, 1]],
        "input_ids": [[11, 14, 15], [0, 16, 18]],
        "token_type_ids": [[22, 28, 30], [0, 32, 36]],
    }
    run.inputs.update(input_ids=ids[:1], token_type_ids=None)
    even = text_only_inputs(run, Prompt(kind[:1], kind[:1]))
    assert even["input_ids"].tolist() == [[11, 14, 15]] and even["attention_mask"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, (1, *range(18, 32))), (28, (1, *range(16, 28))), (2, (1,)), (1, (0,)), (3, (1, 2))]
)
def test_the_papers_layers_at_any_depth(depth, layers):
    sites = tuple(Site(f"layers.{n}.attn", "text", n, 4, 4, 8, 8, True, False) for n in range(depth))
    run = RunState(torch.nn.Module(), Anatomy("M", sites, {"text": depth}, (), {}), {}, True)
    assert VHR()._layers(run) == layers


def test_exactly_half_of_the_heads_in_its_layers_alone(deep_llava, llava_inputs):
    module, inputs = deep_llava(6, heads=8), llava_inputs()
    vhr = VHR(2.0)
    found = gains(module, inputs, vhr)
    assert sorted(found) == [1, 3, 4, 5]
    assert all(int((gain == 2).sum()) == 4 and int((gain == 1).sum()) == 4 for gain in found.values())


def test_a_gain_acts_on_all_rows_of_its_heads(deep_llava, llava_inputs):
    module, inputs = deep_llava(3), llava_inputs()
    z = {}
    for name, policies in (("plain", []), ("vhr", [VHR(3.0, layers=[0])])):
        with torch.no_grad(), interp.hooked(module, capture=interp.Capture(z=True), interventions=policies) as run:
            module(**inputs)
        z[name] = run.trace["text"].z.sel(layer=0).values[0]
    ratio = z["vhr"] / z["plain"]
    assert sorted(float(ratio[h].mean().round(3)) for h in range(4)) == [1, 1, 3, 3]


def test_samples_choose_for_themselves_and_nothing_is_left_over(deep_llava, llava_inputs, batched, run):
    module, vhr = deep_llava(6, heads=8), VHR(2.0)
    samples = [llava_inputs(0), llava_inputs(3, before=2, after=7)]
    singles = [run(module, s, [vhr])[1] for s in samples]
    again = run(module, samples[1], [vhr])[1]
    assert torch.equal(again, singles[1])
    _, both, session = run(module, batched(*samples), [vhr])
    assert session.extra_forwards == 1
    for n, single in enumerate(singles):
        torch.testing.assert_close(both[:, n], single[:, 0], rtol=1e-4, atol=1e-4)
    chosen = gains(module, batched(*samples), vhr)
    assert any(not torch.equal(gain[0], gain[1]) for gain in chosen.values())


def test_beams_and_returned_sequences_share_their_samples_heads(deep_llava, llava_inputs, batched, run):
    module, vhr = deep_llava(4), VHR(2.0)
    inputs = batched(llava_inputs(0), llava_inputs(3, before=2, after=7))
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        found = gains(module, inputs, vhr, forward=False, max_new_tokens=4, **{"do_sample": False, **options})
        assert all(gain.shape == (2, 4) for gain in found.values())
    wanted, got = (
        run(module, {k: v[:1] for k, v in inputs.items()}, p, num_beams=3, tokens=6)[0] for p in ([VHR(1.0)], [])
    )
    assert torch.equal(wanted, got)


def test_an_answer_given_after_the_prompt_meets_the_prompts_heads(deep_llava, llava_inputs, run):
    """Generation, a prompt and then an answer on one cache, and both in one forward with prompt_length: the same logits."""
    module, inputs, vhr = deep_llava(5), llava_inputs(), VHR(2.0)
    ids, logits, _ = run(module, inputs, [vhr], tokens=4)
    n = inputs["input_ids"].shape[1]
    answer = ids[:, n:-1]
    cache = DynamicCache(config=module.config)
    with torch.no_grad(), interp.hooked(module, interventions=[vhr]) as session:
        first = module(**inputs, past_key_values=cache).logits[:, -1]
        mask = torch.ones(1, n + answer.shape[1], dtype=torch.long)
        rest = module(input_ids=answer, attention_mask=mask, past_key_values=cache).logits[0]
        assert session.extra_forwards == 1
        session.prompt_length = n
        whole = {**inputs, "input_ids": ids[:, :-1], "attention_mask": mask}
        once = module(**whole).logits[0, n - 1 :]
    torch.testing.assert_close(torch.cat([first, rest]), logits[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(once, logits[:, 0], rtol=1e-4, atol=1e-4)


def test_a_second_turn_keeps_the_heads_of_its_cache(deep_llava, llava_inputs, run):
    module, inputs, vhr = deep_llava(5), llava_inputs(), VHR(2.0)
    cache = DynamicCache(config=module.config)
    with torch.no_grad(), interp.hooked(module, interventions=[vhr]) as session:
        ids = module.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
        ids = torch.cat([ids, torch.tensor([[11, 12, 13]])], -1)
        mask = torch.ones_like(ids)
        two = module.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert session.extra_forwards == 1
        session.prompt_length = inputs["input_ids"].shape[1]
        whole = {**inputs, "input_ids": two.sequences[:, :-1], "attention_mask": torch.ones_like(two.sequences[:, :-1])}
        once = module(**whole).logits[0, ids.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(two.logits)[:, 0], once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["llava_onevision", "paligemma", "gemma3", "internvl", "blip2", "qwen2_5_vl", "idefics3"]
)
def test_a_batch_equals_its_samples_text_branch_and_all(family):
    """Row n of a left-padded batch has the heads that the sample has alone: the plain z of text and image agree."""
    specimen = build(family)
    vhr = VHR(2.0, layers=[0])
    with torch.no_grad(), interp.hooked(specimen.module, interventions=[vhr]) as session:
        batch = specimen.module(**specimen.batch).logits[:, -1]
        assert session.extra_forwards == 1
    assert batch.isfinite().all()
    if any(v.shape[0] != 2 for v in specimen.batch.values()):
        return
    for n in range(2):
        keep = specimen.batch["attention_mask"][n].bool()
        one = {k: v[n : n + 1] for k, v in specimen.batch.items()}
        one = {k: v[:, keep] if v.shape[1:] == keep.shape else v for k, v in one.items()}
        with torch.no_grad(), interp.hooked(specimen.module, interventions=[vhr]):
            alone = specimen.module(**one).logits[:, -1]
        torch.testing.assert_close(batch[n], alone[0], rtol=1e-3, atol=1e-3)


def test_blip2_has_its_language_model_run_alone():
    specimen = build("blip2")
    called = []
    handle = specimen.module.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: called.append(
            kwargs["input_ids"].shape if kwargs.get("input_ids") is not None else None
        ),
        with_kwargs=True,
    )
    with torch.no_grad(), interp.hooked(specimen.module, interventions=[VHR(2.0)]):
        specimen.module(**specimen.inputs)
    handle.remove()
    n_text = int((specimen.inputs["input_ids"] != 5).sum())
    assert called[0] == (1, n_text) and len(called) == 2


def test_what_it_refuses_before_the_first_token(deep_llava, llava_inputs, batched):
    module, inputs = deep_llava(3), llava_inputs()
    forwards = []
    handle = module.model.language_model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def refuse(match, given, *policies, error=InterventionError):
        with pytest.raises(error, match=match), torch.no_grad(), interp.hooked(module, interventions=policies):
            module.generate(**given, max_new_tokens=2)

    refuse("layers must lie within 0 .. 2", inputs, VHR(layers=[1, 3]))
    text = {k: v for k, v in inputs.items() if k != "pixel_values"}
    refuse("needs image tokens", {k: v[:, -5:] for k, v in text.items()}, VHR())
    mixed = batched(inputs, inputs)
    mixed["input_ids"][1, mixed["input_ids"][1] == 5] = 11
    mixed["pixel_values"] = mixed["pixel_values"][:1]
    refuse(r"every sample of the batch; samples \[1\] of 2", mixed, VHR())
    assert not forwards
    cache = DynamicCache(config=module.config)
    with torch.no_grad():
        module(**inputs, past_key_values=cache)
    forwards.clear()
    more = torch.cat([inputs["input_ids"], torch.tensor([[11]])], -1)
    refuse("this session has not filled", {"input_ids": more, "past_key_values": cache}, VHR())
    assert not forwards
    handle.remove()
    for bad in ({"alpha": -1}, {"alpha": float("nan")}, {"distance": "l1"}, {"layers": "1"}, {"filter_guard": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            VHR(**bad)
    with pytest.raises(InterventionError, match="needs a vision-language model"):
        interp.hooked(build("llama").module, interventions=[VHR()])


def test_the_model_is_as_it_was_after_a_refusal(deep_llava, llava_inputs, run):
    module, inputs = deep_llava(3), llava_inputs()
    plain = run(module, inputs)[1]
    text = {k: v[:, -5:] for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(InterventionError), interp.hooked(module, interventions=[VHR()]):
        module(**text)
    assert torch.equal(run(module, inputs)[1], plain)
    with interp.hooked(module, interventions=[VHR()]), torch.no_grad():
        module.model.vision_tower(inputs["pixel_values"])
