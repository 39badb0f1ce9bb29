"""Counterfactual pairs and points of mention of the scenes, on the bundled model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from probes.contrast import evaluate
from probes.margin import margins
from probes.samples import ProbeError
from probes.scenes import PAIRS
from probes.scenes.pairs import SceneMargins, ScenePairs


@pytest.fixture(scope="module")
def model() -> interp.Model:
    return interp.load("scenes-lvlm", device="cpu")


def test_a_pair_differs_in_its_object_alone() -> None:
    for full, bare, name in ScenePairs(n=18).scenes():
        assert full.names - bare.names == {name}
        assert bare.names < full.names
    assert {name for *_, name in ScenePairs(n=18).scenes()} == {pair.partner for pair in PAIRS}


def test_the_answer_hangs_on_the_object_where_it_can_be_seen(model: interp.Model) -> None:
    pairs = ScenePairs(n=6).build(model)
    assert all(pair.clean.ids == pair.corrupt.ids for pair in pairs)
    result = evaluate(model, pairs, "logit_difference")
    assert np.mean(result.clean) > 2
    assert np.mean(result.difference) > 2
    # An object that cannot be seen cannot matter.
    unseen = evaluate(model, ScenePairs(n=2, contrast=0.0).build(model), "logit_difference")
    assert np.abs(unseen.difference).max() < 1e-4


def test_points_name_what_is_there_and_what_is_missing(model: interp.Model) -> None:
    probe = SceneMargins(n=12)
    for (scene, present, absent), item in zip(probe.points(), probe.build(), strict=True):
        assert present in scene.names
        assert absent not in scene.names
        trigger = next(pair.trigger for pair in scene.absent_partners if pair.partner == absent)
        assert f" {trigger} at the " in item.prefix
        assert item.prefix.endswith("There is")
        assert item.image_id == scene.id
    found = margins(model, probe.build()[:6], batch_size=6)
    # One of them by hand, token by token.
    item = found[0].item
    given = model.encode(item.prompt, image=item.image)
    for name, value in ((item.present, found[0].present), (item.absent, found[0].absent)):
        ids = model.tokenizer(f"{item.prefix} {name}", add_special_tokens=False)["input_ids"]
        count = len(model.tokenizer(f" {name}", add_special_tokens=False)["input_ids"])
        whole = torch.cat([given["input_ids"], torch.tensor([ids])], 1)
        with torch.no_grad():
            logits = model.module(
                input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=given["pixel_values"]
            ).logits[0]
        chosen = logits.log_softmax(-1)[-count - 1 : -1].gather(1, torch.tensor(ids[-count:])[:, None])
        assert float(chosen.sum()) == pytest.approx(value, abs=1e-3)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ProbeError, match="n must be"):
        ScenePairs(n=0)
    with pytest.raises(ProbeError, match="n must be"):
        SceneMargins(n=0)
