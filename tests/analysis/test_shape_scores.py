"""Scores of the shape of attention: by hand, against the full map, and on heads that are known."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis import score
from interp.analysis.attention_distance import hop_profile, places_of, uniform_distance
from interp.analysis.elasticity import slope
from interp.analysis.massive_activations import massive_activations, sink_dims
from interp.analysis.redundancy import head_similarity, overlap
from interp.analysis.running import AnalysisError, forward
from interp.models.model import Model
from interp.testing import build
from interp.tracing.capture import Capture

SHAPE = ["effective_keys", "top_k_mass", "selection_margin", "attention_distance", "redundancy"]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build("llama").module


@pytest.fixture(scope="module")
def vit() -> Any:
    return build("vit")


def maps(module: Any, stack: str = "text", **inputs: Any) -> np.ndarray:
    with interp.hooked(module, capture=interp.Capture(attention=True, stacks=(stack,))) as run, torch.no_grad():
        module(**inputs)
    return run.trace[stack]["attention"].values[0].astype(np.float64)


def ids(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(10, 90, (1, length))}


def uniform(module: Any) -> Any:
    """A copy whose every head spreads its attention evenly."""
    out = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.zero_()
    return out


def test_effective_keys_top_k_and_margin_equal_those_of_the_full_map(tiny: Any) -> None:
    inputs = ids(24)
    a = maps(tiny, **inputs)
    h = -np.where(a > 0, a * np.log(np.maximum(a, 1e-300)), 0).sum(-1)
    got = score("effective_keys", tiny, [inputs])
    np.testing.assert_allclose(got.value.values, np.exp(h).mean(-1), rtol=1e-4)
    share = score("effective_keys", tiny, [inputs], normalise=True)
    np.testing.assert_allclose(share.value.values, (np.exp(h[..., 1:]) / np.arange(2, 25)).mean(-1), rtol=1e-4)
    ordered = -np.sort(-a, axis=-1)
    for k in (3, 10):
        top = score("top_k_mass", tiny, [inputs], k=k, rows=24)
        np.testing.assert_allclose(top.value.values, ordered[:, :, k:, :k].sum(-1).mean(-1), rtol=1e-4)
    margin = score("selection_margin", tiny, [inputs])
    wanted = np.log(ordered[:, :, 1:, 0] / ordered[:, :, 1:, 1]).mean(-1)
    np.testing.assert_allclose(margin.value.values, wanted, rtol=1e-3)
    assert np.isfinite(margin.null.values).all()


def test_uniform_heads_have_their_known_values(tiny: Any) -> None:
    module, inputs = uniform(tiny), ids(20)
    n = np.arange(1, 21)
    known = {
        "entropy": np.log(n).mean(), "effective_keys": n.mean(), "selection_margin": 0.0,
        "attention_distance": ((n - 1) / 2).mean(), "top_k_mass": (4 / n[4:]).mean(), "redundancy": 1.0,
    }  # fmt: skip
    for name, wanted in known.items():
        settings = {"k": 4} if name == "top_k_mass" else {}
        got = score(name, module, [inputs], **settings)
        np.testing.assert_allclose(got.value.values, wanted, rtol=1e-4, atol=1e-6, err_msg=name)
    distance = score("attention_distance", module, [inputs])
    np.testing.assert_allclose(distance.null.values, distance.value.values, rtol=1e-5)
    assert np.allclose(score("elasticity", module, [ids(80)], lengths=(20, 40, 80), rows=4).value.values, 1, atol=0.15)


def test_elasticity_of_fixed_and_growing_spans() -> None:
    x = np.log([10.0, 20, 40])
    assert slope(x, np.log([[5.0], [5.0], [5.0]]))[0] == pytest.approx(0)
    assert slope(x, np.log([[1.0], [2.0], [4.0]]))[0] == pytest.approx(1)
    windowed = build("mistral").module  # a window of 8 in all layers
    fixed = score("elasticity", uniform(windowed), [ids(96)], lengths=(24, 48, 96), rows=4)
    np.testing.assert_allclose(fixed.value.values, 0, atol=1e-4)


@pytest.mark.parametrize("metric", ["euclidean", "hop"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_distance_on_patches_equals_that_of_the_full_map(vit: Any, metric: str, renormalise: bool) -> None:
    a = maps(vit.module, "vision", **vit.inputs)[..., 1:, 1:]
    cells = np.stack(np.meshgrid(np.arange(6), np.arange(4), indexing="ij"), -1).reshape(-1, 2)
    gaps = np.abs(cells[:, None] - cells[None])
    d = np.hypot(gaps[..., 0], gaps[..., 1]) if metric == "euclidean" else gaps.max(-1)
    n = a.sum((-1, -2)) if renormalise else len(cells)
    got = score("attention_distance", vit.module, [vit.inputs], stack="vision", metric=metric, renormalise=renormalise)
    np.testing.assert_allclose(got.value.values, (a * d).sum((-1, -2)) / n, rtol=1e-4)
    mean = d.mean() if renormalise else d.sum(1).mean() / 25
    np.testing.assert_allclose(got.null.values, mean)


@pytest.mark.parametrize("renormalise", [False, True])
def test_distance_of_text_equals_that_of_offset_histograms_and_of_the_full_map(tiny: Any, renormalise: bool) -> None:
    inputs = {"input_ids": torch.cat([torch.tensor([[1]]), ids(40)["input_ids"]], 1)}  # 1 is the beginning: special
    got = score("attention_distance", tiny, [inputs], renormalise=renormalise).value.values
    a = maps(tiny, **inputs)[..., 1:, 1:].astype(np.float64)
    d = np.abs(np.subtract.outer(np.arange(40), np.arange(40)))
    np.testing.assert_allclose(got, (a * d).sum((-1, -2)) / (a.sum((-1, -2)) if renormalise else 40), rtol=1e-5)
    histogram = forward(Model(tiny), inputs, Capture(offset=True, stacks=("text",)), "text")["offset"]
    placed = histogram.isel(offset=slice(None, -1)).astype(np.float64)
    by_histogram = (placed * placed["offset_position"]).sum("offset")[0].values
    np.testing.assert_allclose(got, by_histogram / (placed.sum("offset")[0].values if renormalise else 40), rtol=1e-5)


def test_elasticity_equals_that_of_the_full_maps(tiny: Any) -> None:
    inputs, lengths, reach = ids(40), (10, 20, 40), []
    for n in lengths:
        a = maps(tiny, input_ids=inputs["input_ids"][:, :n])[..., n - 4 :, :].astype(np.float64)
        d = np.abs(np.subtract.outer(np.arange(n - 4, n), np.arange(n)))
        reach.append((a * d).sum((-1, -2)) / a.sum((-1, -2)))
    got = score("elasticity", tiny, [inputs], lengths=lengths, rows=4).value.values
    np.testing.assert_allclose(got, slope(np.log(lengths), np.log(np.stack(reach) + 1)), rtol=1e-4)


def test_uniform_distance_of_text_with_special_tokens(tiny: Any) -> None:
    places = places_of(Model(tiny), {"input_ids": torch.tensor([[1, 20, 30, 40]])}, "text")[0]
    assert np.isnan(places[0, 0])
    # Rows 1, 2, 3 see 2, 3, 4 keys: (0, 1, 1 + 2) over them.
    assert uniform_distance(places, "hop", True, False) == pytest.approx((0 + 1 / 3 + 3 / 4) / 3)
    assert uniform_distance(places, "hop", True, True) == pytest.approx((0 + 1 / 2 + 3 / 3) / 3)


def test_hop_profile_by_hand(vit: Any) -> None:
    profile = hop_profile(vit.module, [vit.inputs, vit.inputs])
    a = maps(vit.module, "vision", **vit.inputs)
    cells = np.stack(np.meshgrid(np.arange(6), np.arange(4), indexing="ij"), -1).reshape(-1, 2)
    hop = np.abs(cells[:, None] - cells[None]).max(-1)
    inner = a[..., 1:, 1:]
    assert profile.sizes["hop"] == 6 and profile["n"] == 2
    for k in range(6):
        np.testing.assert_allclose(profile.mass.values[..., k], (inner * (hop == k)).sum(-1).mean(-1), rtol=1e-4)
        rows = (hop == k).any(1)
        ring = (inner * (hop == k)).sum(-1)[..., rows] / (hop == k).sum(1)[rows]
        np.testing.assert_allclose(profile.strength.values[..., k], ring.mean(-1), rtol=1e-4)
    np.testing.assert_allclose(profile.mass.sum("hop") + profile.patch_to_special, 1, rtol=1e-5)
    np.testing.assert_allclose(profile.special_to_patch + profile.special_to_special, 1, rtol=1e-5)
    np.testing.assert_allclose(profile.special_to_special.values, a[..., 0, 0], rtol=1e-4)
    with pytest.raises(AnalysisError, match="rows and columns"):
        hop_profile(build("llama").module, [ids(8)], stack="text")


def test_overlap_by_hand_and_redundancy(tiny: Any) -> None:
    two = np.array([[[0.5, 0.5], [1, 0]], [[1, 0], [1, 0]], [[np.nan, np.nan], [0, 1]]])
    np.testing.assert_allclose(overlap(two), [[1, 0.75, 0], [0.75, 1, 0], [0, 0, 1]])
    inputs = ids(24)
    alike = head_similarity(tiny, [inputs], grid=24)
    a = maps(tiny, **inputs)
    wanted = np.minimum(a[0, 1], a[2, 3]).sum(-1).mean()
    assert alike.values[0, 1, 2, 3] == pytest.approx(wanted, rel=1e-4)
    result = score("redundancy", tiny, [inputs], grid=24)
    by_layer = alike.values[1, :, 1] - np.eye(4)
    np.testing.assert_allclose(result.value.values[1], by_layer.max(1), rtol=1e-4)
    np.testing.assert_allclose(result.null.values[1], by_layer.sum(1) / 3, rtol=1e-4)
    wider = score("redundancy", tiny, [inputs], grid=24, among="model")
    assert (wider.value.values >= result.value.values - 1e-6).all()


def test_massive_activations_that_were_planted(tiny: Any) -> None:
    module = copy.deepcopy(tiny)
    with torch.no_grad():
        module.model.embed_tokens.weight[1, 7] = -5000.0
    inputs = {"input_ids": torch.cat([torch.tensor([[1]]), ids(47)["input_ids"]], 1)}
    found = massive_activations(module, [inputs], top=2)
    assert found.massive.values[0, :, 0].all() and not found.massive.values[0, 0, 1]
    assert (found.dim.values[0, :, 0] == 7).all() and (found.position.values[0, :, 0] == 0).all()
    assert found.value.values[0, 0, 0] == -5000
    plain = massive_activations(tiny, [inputs])
    assert not plain.massive.values.any()
    assert sink_dims(module, [inputs], tau=5).dims == (7,)
    with pytest.raises(AnalysisError, match="cannot be calibrated"):
        sink_dims(tiny, [inputs])
    with pytest.raises(AnalysisError, match="one sequence each"):
        massive_activations(tiny, [{"input_ids": torch.ones(2, 4, dtype=torch.int64)}])


def test_bad_settings(tiny: Any) -> None:
    for name, settings in (
        ("top_k_mass", {"k": 0}), ("selection_margin", {"normalise": True}), ("attention_distance", {"metric": "l1"}),
        ("elasticity", {"lengths": (64,)}), ("elasticity", {"lengths": (64, 32)}), ("redundancy", {"grid": 1}),
    ):  # fmt: skip
        with pytest.raises(AnalysisError, match="must be"):
            score(name, tiny, [ids(8)], **settings)
    with pytest.raises(AnalysisError, match="probe must be given"):
        score("attention_distance", build("vit").module, stack="vision")


@pytest.mark.parametrize("name", SHAPE)
def test_they_run_on_vision(vit: Any, name: str) -> None:
    result = score(name, vit.module, [vit.batch], stack="vision")
    assert np.isfinite(result.value.values).all() and result.sizes["sample"] == 2


@pytest.mark.real("stories260k")
@pytest.mark.parametrize("name", [*SHAPE, "elasticity"])
def test_they_run_on_real_weights_and_shuffled_tokens(shared: Path, name: str) -> None:
    result = score(
        name,
        interp.load(shared / "models/stories260k"),
        **({"lengths": (32, 64), "rows": 8} if name == "elasticity" else {}),
    )
    assert np.isfinite(result.value.values).all() and np.isfinite(result.null.values).all()
    assert not np.allclose(result.value.values, result.null.values)
