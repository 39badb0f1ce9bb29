"""Maps of heads: features, places, clusters, the autoencoder, and queries with keys."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from interp.analysis import score
from interp.analysis.autoencoder import fit_autoencoder
from interp.analysis.head_maps import adjusted_rand, cluster, embed, head_features, pca
from interp.analysis.query_key_embedding import joint, query_key_embedding
from interp.analysis.running import AnalysisError
from interp.testing import build


def texts(n: int = 3, length: int = 40) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(10, 90, (1, length))} for _ in range(n)]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build("llama").module


def test_features_of_a_text_model(tiny: Any) -> None:
    inputs = texts()
    found = head_features(tiny, inputs, grid=8)
    assert found.values.shape[0] == 12 and [str(h) for h in found.heads[:5]] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    np.testing.assert_allclose(found.maps.sum(-1), 1, rtol=1e-5)
    for block in found.blocks.values():
        part = found.values[:, block]
        np.testing.assert_allclose(part.mean(0), 0, atol=1e-9)
        assert (part**2).sum(1).mean() == pytest.approx(1)
    assert found.layer.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    entropy = score("entropy", tiny, inputs)
    wider = head_features(tiny, inputs, grid=8, scores=[entropy, entropy])
    assert wider.blocks["scores"].stop - wider.blocks["scores"].start == 2
    only = head_features(tiny, inputs, grid=8, include=("scores",), scores=[entropy])
    ranks = np.argsort(only.values[:, 0])
    np.testing.assert_array_equal(ranks, np.argsort(entropy.value.values.ravel()))


def test_features_of_a_vision_model_and_of_lengths_that_differ(tiny: Any) -> None:
    specimen = build("vit")
    found = head_features(specimen.module, [specimen.inputs], stack="vision", grid=8)
    assert found.values.shape[0] == 12 and found.heads[0].stack == "vision"
    assert np.isfinite(head_features(tiny, [*texts(1, 20), *texts(1, 70)], grid=8).values).all()


def test_principal_components_by_hand() -> None:
    points = np.array([[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0]])
    places, share = pca(points, 2)
    np.testing.assert_allclose(places, points[:, :2], atol=1e-12)
    np.testing.assert_allclose(share, [0.8, 0.2])


def test_adjusted_rand_by_hand() -> None:
    assert adjusted_rand([0, 0, 1, 1], [5, 5, 3, 3]) == 1
    assert adjusted_rand([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)
    assert adjusted_rand([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(4 / 7)
    rng = np.random.default_rng(0)
    chance = [adjusted_rand(rng.integers(3, size=60), rng.integers(3, size=60)) for _ in range(200)]
    assert abs(np.mean(chance)) < 0.01
    sklearn = pytest.importorskip("sklearn.metrics")
    a, b = rng.integers(4, size=50), rng.integers(3, size=50)
    assert adjusted_rand(a, b) == pytest.approx(sklearn.adjusted_rand_score(a, b))


def test_clusters_that_are_there_are_stable_and_noise_is_not() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    centres = np.array([[8.0, 0, 0, 0], [0, 8, 0, 0]])
    truth = np.repeat([0, 1], [30, 20])
    found = cluster(centres[truth] + rng.normal(size=(50, 4)), 2)
    assert found.stability > 0.99 and found.stability_low > 0.99 and found.null < 0.9
    np.testing.assert_array_equal(found.labels, truth)
    noise = cluster(rng.normal(size=(50, 12)), 4)
    assert noise.stability < 0.7
    for k in (1, 50):
        with pytest.raises(AnalysisError, match="k must lie in"):
            cluster(centres[truth], k)


def test_places(tiny: Any) -> None:
    features = head_features(tiny, texts(), grid=8)
    assert embed(features).shape == (12, 2) and embed(features, dims=3).shape == (12, 3)
    with pytest.raises(AnalysisError, match="method must be"):
        embed(features, "tsne")  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="finite"):
        embed(np.full((9, 3), np.nan))


@pytest.mark.slow
def test_umap_keeps_groups_together() -> None:
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], 30)
    points = 10 * truth[:, None] + rng.normal(size=(60, 5))
    places = embed(points, "umap", seed=1)
    gap = np.linalg.norm(places[truth == 0].mean(0) - places[truth == 1].mean(0))
    assert gap > 2 * places[truth == 0].std(0).max()
    np.testing.assert_allclose(places, embed(points, "umap", seed=1))


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("umap", "umap-learn"), ("sklearn.cluster", "scikit-learn")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"needs the package {name}: pip install 'headscope\[analysis\]'"):
            embed(np.eye(5), "umap") if module == "umap" else cluster(np.eye(5), 2)


def patterns(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sink, previous-token and uniform maps with noise."""
    rng = np.random.default_rng(seed)
    causal = np.tril(np.ones((32, 32)))
    kinds = [np.zeros((32, 32)), np.eye(32, k=-1), np.ones((32, 32))]
    kinds[0][:, 0] = 1
    truth = rng.integers(3, size=n)
    maps = np.stack([(kinds[t] + 0.02 * rng.random((32, 32))) * causal for t in truth])
    return maps / maps.sum(-1, keepdims=True), truth


@pytest.mark.slow
def test_the_autoencoder_learns_patterns_and_decodes_archetypes() -> None:
    pytest.importorskip("sklearn")
    maps, truth = patterns(48)
    found = fit_autoencoder(maps, latent=4, epochs=250)
    assert found.losses[-1] < 0.35 * found.losses[0] and found.error < 1.3 * found.pca_error
    shapes, labels = found.archetypes(3)
    assert adjusted_rand(labels, truth) > 0.9 and shapes.shape == (3, 32, 32)
    np.testing.assert_allclose(shapes.sum(-1), 1, rtol=1e-4)
    sink = shapes[labels[np.flatnonzero(truth == 0)[0]]]
    assert sink[10:, 0].mean() > 0.5 > shapes[labels[np.flatnonzero(truth == 2)[0]]][10:, 0].mean()
    np.testing.assert_allclose(found.encode(maps), found.latents, atol=1e-5)
    again = fit_autoencoder(maps, latent=4, epochs=2)
    np.testing.assert_array_equal(again.latents, fit_autoencoder(maps, latent=4, epochs=2).latents)
    assert len(fit_autoencoder(maps, epochs=500, seconds=0.0).losses) == 1
    for bad in (maps[:, :16], maps[:3], np.full((5, 32, 32), np.nan)):
        with pytest.raises(AnalysisError, match="maps must be"):
            fit_autoencoder(bad)


def test_moving_and_scaling_leave_attention_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = 5 * rng.normal(size=(30, 8)) + 2, 0.2 * rng.normal(size=(30, 8)) - 3
    a, b, scale, agreement = joint(q, k)

    def attention(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        s = np.exp(x @ y.T - (x @ y.T).max(1, keepdims=True))
        return s / s.sum(1, keepdims=True)

    np.testing.assert_allclose(attention(a, b), attention(q, k), rtol=1e-6)
    assert scale < 1 and agreement < -0.5
    np.testing.assert_allclose((a / scale).mean(0), (b * scale).mean(0))


def test_queries_and_keys_of_a_head(tiny: Any) -> None:
    found = query_key_embedding(tiny, texts(2, 9), "L1H3")
    assert found.place.shape == (36, 2) and found.kind.values.tolist() == ["query"] * 18 + ["key"] * 18
    assert found["sample"].values.tolist() == ([0] * 9 + [1] * 9) * 2
    assert found.attrs["head"] == "L1H3" and -1 <= found.attrs["agreement"] <= 1
    vit = build("vit")
    patches = query_key_embedding(vit.module, [vit.inputs], "vision.L0H1")
    assert patches.row.values.max() == 5 and patches.row.values.min() == -1
    with pytest.raises(AnalysisError, match="one head, got 4"):
        query_key_embedding(tiny, texts(1), "L1H*")
    with pytest.raises(AnalysisError, match="one call with one sequence"):
        query_key_embedding(tiny, [{"input_ids": torch.ones(2, 5, dtype=torch.int64)}], "L0H0")


def test_rotation_keeps_norms(tiny: Any) -> None:
    inputs = texts(1, 9)
    with_position, without = (query_key_embedding(tiny, inputs, "L1H3", rotated=r) for r in (True, False))
    np.testing.assert_allclose(with_position.norm.values, without.norm.values, rtol=1e-4)
    assert not np.allclose(np.abs(with_position.place.values), np.abs(without.place.values), rtol=1e-2)
