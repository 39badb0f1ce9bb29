"""PAINT: the choice of tokens against the tower's own maps, the boost, and what it refuses."""

import pytest
import torch

import interp
from interp import PAINT, InterventionError
from interp.interventions.paint import outliers, top
from interp.testing import build

IMAGE = 5


def groups_of(module, inputs, paint, **options):
    found = {}

    def look(call):
        if call.site.stack == "text" and "codes" in call.run.of(paint):
            found["codes"] = call.run.of(paint)["codes"]

    with torch.no_grad(), interp.hooked(module, interventions=[paint, interp.Custom(before=look)]):
        module.generate(**inputs, max_new_tokens=2, do_sample=False, **options) if options else module(**inputs)
    return found["codes"]


def generate(specimen, paint):
    with torch.no_grad(), interp.hooked(specimen.module, interventions=[paint]):
        specimen.module.generate(**specimen.inputs, max_new_tokens=2)


def test_outliers_and_top_by_hand():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])
    # Q1 = 2, Q3 = 4: the fence is at 7.
    assert outliers(scores) == 1 and top(scores, 2).tolist() == [4, 3]
    assert outliers(torch.ones(5)) == 0


@pytest.mark.parametrize("images", [1, 3])
def test_tokens_are_the_towers_choice_picture_by_picture(deep_llava, llava_inputs, images):
    module, inputs = deep_llava(4), llava_inputs(images=images)
    maps = [m[:, :, 0, 1:].sum(1) for m in _tower_maps(module, inputs)]
    codes = groups_of(module, inputs, PAINT())
    where = torch.nonzero(inputs["input_ids"][0] == IMAGE).flatten().reshape(images, 16)
    assert not codes[0, inputs["input_ids"][0] != IMAGE].any()
    for picture in range(images):
        first, late = maps[0][picture], maps[-2][picture]
        n = int((late > late.quantile(0.75) + 1.5 * (late.quantile(0.75) - late.quantile(0.25))).sum())
        summary = set(late.topk(n).indices.tolist())
        local = set(first.topk(4).indices.tolist()) - summary
        assert {i for i in range(16) if codes[0, where[picture, i]] == 2} == summary
        assert {i for i in range(16) if codes[0, where[picture, i]] == 1} == local


def _tower_maps(module, inputs):
    tower = module.model.vision_tower
    before, tower.config._attn_implementation = tower.config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            return tower(inputs["pixel_values"], output_attentions=True).attentions
    finally:
        tower.config._attn_implementation = before


def test_the_boost_is_pais_where_both_groups_are_all(deep_llava, llava_inputs, run):
    module, inputs = deep_llava(4), llava_inputs()
    got = run(module, inputs, [PAINT(0.5, 0.5, local_share=1.0)])[1]
    torch.testing.assert_close(got, run(module, inputs, [interp.PAI(0.5)])[1], rtol=1e-5, atol=1e-5)
    one = run(module, inputs, [PAINT(0.5, 0.0)])[1]
    assert (one - got).abs().max() > 1e-3 and (one - run(module, inputs)[1]).abs().max() > 1e-3


def test_merged_patches_share_a_position():
    """Qwen2.5-VL: a position stands for 2 x 2 patches, and its score is their mean."""
    specimen = build("qwen2_5_vl")
    paint = PAINT(layers=[0, 1], scored_by="mean")
    codes = groups_of(specimen.module, specimen.inputs, paint)
    # Two images of 12 and 6 positions: floor(0.25 n) local tokens, without those that are summary tokens.
    image = specimen.inputs["input_ids"][0] == IMAGE
    assert not codes[0, ~image].any()
    assert int((codes == 1).sum()) <= 3 + 1 and codes.any()


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_beams_and_batches_have_each_samples_own(family):
    specimen = build(family)
    paint = PAINT(layers=[0, 1])
    batch = groups_of(specimen.module, specimen.batch, paint)
    beams = groups_of(specimen.module, specimen.batch, paint, num_beams=3)
    assert torch.equal(batch, beams) and not torch.equal(batch[0], batch[1])


def test_a_batch_equals_its_samples(deep_llava, llava_inputs, batched, run):
    module, paint = deep_llava(4), PAINT()
    samples = [llava_inputs(0, images=2), llava_inputs(3, before=2, after=7)]
    both = run(module, batched(*samples), [paint])[1]
    for n, sample in enumerate(samples):
        torch.testing.assert_close(both[:, n], run(module, sample, [paint])[1][:, 0], rtol=1e-4, atol=1e-4)


def test_what_it_refuses():
    def refuse(family, match, **options):
        specimen = build(family)
        with pytest.raises(InterventionError, match=match):
            generate(specimen, PAINT(layers=[0], **options))

    refuse("paligemma", "has none; scored_by='mean'")
    refuse("blip2", "the 8 positions of image 0, tile 0 do not stand for its 16 patches")
    refuse("llava_onevision", "do not stand for", scored_by="mean")
    refuse("llama", "needs a vision-language model")
    for bad in ({"alpha": float("nan")}, {"beta": "x"}, {"local_share": 2}, {"scored_by": "max"}, {"gamma": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PAINT(**bad)
