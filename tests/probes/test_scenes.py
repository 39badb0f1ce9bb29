"""The world of scenes: its truth is exact, its priors are what they say, its pictures show what is in it and no more."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

from probes.samples import ProbeError
from probes.scenes import NAMES, PAIRS, SETTINGS, World, caption, draw, picture, question, surface_forms
from probes.scenes.catalog import BY_TRIGGER, PLACES, plural
from probes.scenes.catalog import NAMES as ORDER
from probes.scenes.language import NUMBERS, prompt
from probes.scenes.painting import atlas, pack
from probes.scenes.world import MOST, SIZE, Placed, Scene


def one(name: str = "dog", *, cell: int = 4, size: float = 32.0, **how: object) -> Placed:
    step = SIZE / 3
    return Placed(name, cell, ((cell % 3 + 0.5) * step, (cell // 3 + 0.5) * step), size, **how)  # type: ignore[arg-type]


def test_the_catalogue_is_large_and_consistent() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 48
    assert len(SETTINGS) == 6
    assert {name for s in SETTINGS for name in s.objects} <= set(NAMES)
    assert all(len(set(s.objects)) == 8 for s in SETTINGS)
    assert min(p.prior for p in PAIRS) == 0.5
    assert max(p.prior for p in PAIRS) == 0.99
    # The prior of the texts runs the other way.
    strong = [p for p in PAIRS if p.prior >= 0.95]
    assert all(p.text_prior <= 0.54 for p in strong)


def test_a_scene_is_the_same_every_time_and_scenes_differ() -> None:
    assert World("test", 3).scene(7) == World("test", 3).scene(7)
    scenes = World("test", 3).scenes(30)
    assert len({s.id for s in scenes}) == 30
    assert len({s.objects for s in scenes}) == 30
    others = [World(split, seed).scene(7) for split in ("train", "dev", "test") for seed in (0, 1)]  # type: ignore[arg-type]
    assert len({s.objects for s in others}) == 6


def test_partners_come_as_often_as_the_prior_says() -> None:
    scenes = World("train").scenes(30_000)
    for pair in PAIRS:
        with_trigger = [s for s in scenes if pair.trigger in s.names]
        share = np.mean([pair.partner in s.names for s in with_trigger])
        # Scenes of more than six objects are drawn again, which takes a little from partners; sampling noise beside it.
        assert share == pytest.approx(pair.prior, abs=0.06), pair


def test_text_scenes_follow_the_text_prior_and_strength_draws_priors_to_a_half() -> None:
    pair = BY_TRIGGER["stoplight"]
    for world, wanted in ((World(prior="text"), pair.text_prior), (World(strength=0.0), 0.5)):
        found = [pair.partner in s.names for s in world.scenes(12_000) if pair.trigger in s.names]
        assert np.mean(found) == pytest.approx(wanted, abs=0.07)


def test_against_the_prior_every_typical_partner_is_absent() -> None:
    for scene in World("against").scenes(500):
        assert scene.absent_partners
        assert not scene.present_pairs
        assert 1 <= len(scene.objects) <= MOST


def test_dials_change_nothing_but_what_they_are_for() -> None:
    world, pair = World("test"), BY_TRIGGER["bread"]
    for number in range(20):
        full = world.with_pair(pair, number, partner=True)
        assert full.evidence(pair.partner) == pytest.approx(
            min(1, next(t.size for t in full.objects if t.name == pair.partner) / 28)
        )
        faint = world.with_pair(pair, number, partner=True, contrast=0.2, clarity=0.5)
        assert faint.evidence(pair.partner) == pytest.approx(0.1 * full.evidence(pair.partner))
        without = world.with_pair(pair, number, partner=False)
        assert without.objects == tuple(t for t in full.objects if t.name != pair.partner)
        assert [t.cell for t in faint.objects] == [t.cell for t in full.objects]
        assert pair in without.absent_partners
        assert full.count(pair.trigger) == full.count(pair.partner) == 1


def test_objects_carry_their_prior() -> None:
    world = World("train")
    for scene in world.scenes(300):
        for thing in scene.objects:
            pair = next((p for p in PAIRS if p.partner == thing.name and p.trigger in scene.names), None)
            if pair is not None:
                assert thing.prior == pair.prior
            else:
                assert thing.prior == world.chance(thing.name, scene.setting)


def test_evidence_is_contrast_times_what_can_be_seen_times_size_times_clarity() -> None:
    scene = Scene("x", "desk", (one("dog", contrast=0.5, hidden=0.2, size=14.0), one("cat", cell=0)), clarity=0.9)
    assert scene.evidence("dog") == pytest.approx(0.5 * 0.8 * 0.5 * 0.9)
    assert scene.evidence("cat") == pytest.approx(0.9)
    assert scene.evidence("egg") == 0
    assert scene.seen_with(contrast=0.1, name="cat").evidence("cat") == pytest.approx(0.09)
    assert scene.seen_with(clarity=0.5).evidence("cat") == pytest.approx(0.5)
    with pytest.raises(ProbeError, match="contrast must lie"):
        scene.seen_with(contrast=1.5)
    with pytest.raises(ProbeError, match="name must be an object"):
        scene.seen_with(contrast=0.5, name="egg")


def test_patches_of_an_object_are_those_its_box_covers() -> None:
    scene = Scene("x", "desk", (Placed("dog", 0, (20.0, 12.0), 16.0),))
    mask = scene.patches("dog")
    # Box (12, 4, 28, 20): columns 1 (4 px), 2 (8), 3 (4); rows 0 (4), 1 (8), 2 (4). A quarter is 16 of 64 pixels.
    wanted = np.zeros((14, 14), dtype=bool)
    wanted[0:3, 1:4] = True
    assert (mask == wanted).all()
    assert not scene.patches("cat").any()


def test_the_counterfactual_differs_in_the_objects_pixels_only() -> None:
    for scene in World("test", clear=True).scenes(20):
        name = sorted(scene.names)[0]
        a, b = draw([scene, scene.without(name)])
        changed = (a != b).any(0).numpy()
        assert changed.any()
        reach = np.zeros((SIZE, SIZE), dtype=bool)
        for thing in scene.objects:
            if thing.name == name:
                left, top, right, bottom = thing.box
                # Mats reach below their object.
                reach[
                    max(0, int(top) - 6) : int(bottom + 0.35 * thing.size) + 6, max(0, int(left) - 6) : int(right) + 6
                ] = True
        assert not (changed & ~reach).any()
    with pytest.raises(ProbeError, match="name must be an object"):
        scene.without("nothing")


def test_an_object_without_contrast_cannot_be_seen() -> None:
    scene = Scene("x", "beach", (one("crab"),))
    a, b, c = draw([scene.seen_with(contrast=0.0), scene.without("crab"), scene])
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_pictures_do_not_depend_on_the_batch() -> None:
    scenes = World("dev").scenes(5)
    together = draw(scenes)
    assert together.shape == (5, 3, SIZE, SIZE)
    assert together.dtype == torch.uint8
    for n, scene in enumerate(scenes):
        assert torch.equal(draw([scene])[0], together[n])
    assert picture(scenes[0]).size == (SIZE, SIZE)
    assert torch.equal(draw(pack(scenes)), together)


def test_the_noise_has_mean_zero_and_variance_one() -> None:
    from probes.scenes.painting import _noise  # pyright: ignore[reportPrivateUsage]

    noise = _noise(torch.arange(64), 32)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.var().item() == pytest.approx(1, abs=0.03)
    # Neighbours, colours and scenes are independent.
    flat = noise.flatten(1)
    assert abs(torch.corrcoef(flat)[0, 1:]).max() < 0.1
    assert abs(torch.corrcoef(torch.stack((noise[..., :-1].flatten(), noise[..., 1:].flatten())))[0, 1]) < 0.02


def test_every_object_has_its_own_pictogram() -> None:
    sheet = atlas()
    assert sheet.shape == (len(NAMES), 4, 48, 48)
    flat = sheet.flatten(1)
    distance = torch.cdist(flat, flat) + 1e3 * torch.eye(len(NAMES))
    assert distance.min() > 5
    assert (sheet[:, 3].mean((1, 2)) > 0.15).all()


def test_captions_name_exactly_what_is_there() -> None:
    rng = random.Random(0)
    forms = {form: name for name, some in surface_forms().items() for form in some}
    lengths: list[int] = []
    for scene in World("train").scenes(800):
        text = caption(scene, rng)
        words = re.findall(r"[a-z]+", text.lower())
        assert {forms[word] for word in words if word in forms} == scene.names
        sentences = [part for part in text.split(".") if part.strip()]
        assert 3 <= len(sentences) <= 8
        lengths.append(len(re.findall(r"\w+|[.,]", text)))
        for pair in scene.present_pairs:
            at = {
                n: min(k for k, word in enumerate(words) if forms.get(word) == n) for n in (pair.trigger, pair.partner)
            }
            assert at[pair.trigger] < at[pair.partner], text
    assert np.percentile(lengths, 2) >= 58
    assert max(lengths) <= 150


def test_captions_are_true_in_places_counts_mats_and_relations() -> None:
    rng = random.Random(1)
    places = "|".join(sorted(PLACES, key=len, reverse=True))
    checked = 0
    for scene in World("train").scenes(600):
        text = caption(scene, rng)
        if found := re.search(r"(?:That makes|In total there (?:is|are)|All in all we count) (\w+) thing", text):
            assert NUMBERS.index(found[1].lower()) == len(scene.objects)
            checked += 1
        for name in scene.names:
            things = [t for t in scene.objects if t.name == name]
            if len(things) > 1:
                assert f"{NUMBERS[len(things)]} {plural(name)}" in text.lower()
            elif found := re.search(rf"\b{name}(?: on a (\w+) mat)? (?:is|has its place) at the ({places})\b", text):
                assert found[2] == things[0].place
                if found[1]:
                    assert found[1] == things[0].mat
                checked += 1
        if found := re.search(rf"(?:stands at the|At the) ({places})(?: there is nothing|\.)", text):
            cells = {t.cell for t in scene.objects}
            assert PLACES.index(found[1]) not in cells or "Nothing at all" not in text
    assert checked > 400


def test_questions_have_true_answers_and_cannot_be_answered_blind() -> None:
    rng = random.Random(2)
    scenes = World("train").scenes(6000)
    asked: dict[str, list[bool]] = {}
    for scene, other in zip(scenes[1:], scenes, strict=False):
        turn = question(scene, other, rng)
        if turn.kind == "exists":
            found = re.search(r"there an? (\w+) in", turn.request)
            assert found is not None
            assert turn.answer == ("Yes." if found[1] in scene.names else "No.")
            asked.setdefault(found[1], []).append(turn.answer == "Yes.")
        elif turn.kind == "count":
            found = re.search(r"How many (\w+) are", turn.request)
            assert found is not None
            number = next(scene.count(n) for n in ORDER if plural(n) == found[1])
            assert turn.answer == ("None." if not number else f"{NUMBERS[number].capitalize()}.")
        else:
            found = re.search(r"Where is the (\w+) in", turn.request)
            assert found is not None
            assert turn.answer == f"At the {next(t.place for t in scene.objects if t.name == found[1])}."
    rates = np.array([np.mean(v) for v in asked.values() if len(v) > 60])
    assert np.mean([x for v in asked.values() for x in v]) == pytest.approx(0.5, abs=0.03)
    # No object is asked for almost only where it is, or is not.
    assert rates.min() > 0.25
    assert rates.max() < 0.75


def test_prompts_are_llavas() -> None:
    assert prompt("Describe the picture.") == "USER: <image> Describe the picture. ASSISTANT:"
    assert prompt("Describe the picture.", image=False) == "USER: Describe the picture. ASSISTANT:"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "valid"}, "split must be one of"),
        ({"prior": "audio"}, "prior must be"),
        ({"strength": 2.0}, "strength must lie"),
    ],
)
def test_a_world_that_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        World(**settings)  # type: ignore[arg-type]
    with pytest.raises(ProbeError, match="number must be"):
        World().scene(-1)
