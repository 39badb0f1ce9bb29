"""Faithfulness and completeness against runs with the heads masked, and pruning of vision transformers against hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

import interp
from interp.analysis import score
from interp.analysis.faithfulness import faithfulness
from interp.analysis.partial_pruning import map_parts, partial_pruning
from interp.analysis.running import AnalysisError
from interp.analysis.targets import target_of
from interp.analysis.vit_importance import GLOBAL, LOCAL
from interp.models.model import Model
from interp.testing import build
from interp.testing.weights import randomise


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loss(module: Any, inputs: dict[str, Any], masked: str) -> float:
    target = target_of(inputs, inputs, Model(module))
    with torch.no_grad(), interp.hooked(module, interventions=[interp.MaskHeads(masked)] if masked else []):
        logits = module(**inputs).logits[0, list(target.positions or ())]
    return float(cross_entropy(logits, torch.tensor(target.ids)))


def test_curves_are_those_of_masked_runs() -> None:
    specimen = build("llama")
    module, inputs = specimen.module, specimen.inputs
    every = interp.Heads.parse("L*H*", interp.anatomy(module))
    ranking = interp.Heads.parse("L1H0,L2H3,L0H1,L0H2")
    got = faithfulness(module, ranking, [inputs], kind="zero", metric="loss", n_random=3, progress=False)
    assert got["k"].values.tolist() == [0, 1, 2, 4]
    whole, none = loss(module, inputs, ""), loss(module, inputs, str(every))
    for n, k in enumerate((0, 1, 2, 4)):
        top = ranking[:k]
        kept = (loss(module, inputs, str(every - top)) - none) / (whole - none)
        left = (loss(module, inputs, str(top)) - none) / (whole - none)
        assert float(got["faithfulness"][n]) == pytest.approx(kept, abs=1e-3)
        assert float(got["completeness"][n]) == pytest.approx(left, abs=1e-3)
    assert got["metric_by_sample"].values[0] == pytest.approx([whole, none], abs=1e-5)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_no_head_and_all_heads_are_the_ends_whatever_the_ranking(kind: Any) -> None:
    module = build("llama").module
    samples = [
        {"input_ids": torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(n))} for n in range(3)
    ]
    every = interp.Heads.parse("L*H*", interp.anatomy(module))
    got = faithfulness(module, every, samples, kind=kind, metric="loss", ks=[0, 12], n_random=2, progress=False)
    np.testing.assert_allclose(got["faithfulness"], [0, 1], atol=1e-4)
    np.testing.assert_allclose(got["completeness"], [1, 0], atol=1e-4)
    np.testing.assert_allclose(got["random_faithfulness"], [[0, 1]] * 2, atol=1e-4)


def test_a_set_that_does_it_beats_random_ones() -> None:
    """All heads but one write nothing: that one alone is the model, and no random set without it is."""
    specimen = build("llama")
    module: Any = specimen.module
    with torch.no_grad():
        for n, layer in enumerate(module.model.layers):
            keep = torch.zeros(64)
            if n == 1:
                keep[16:32] = 1
            layer.self_attn.o_proj.weight.mul_(keep)
    ranking = interp.Heads.parse("L1H1,L0H0,L2H2")
    got = faithfulness(
        module, ranking, [specimen.inputs], kind="zero", metric="loss", ks=[0, 1, 3], n_random=20, progress=False
    )
    assert float(got["faithfulness"][1]) == pytest.approx(1, abs=1e-4)
    assert float(got["completeness"][1]) == pytest.approx(0, abs=1e-4)
    chance = float(got["random_faithfulness"].isel(k=1).mean())
    assert 0 <= chance < 0.6  # of its layer's 4 heads one is it
    assert got.attrs["area"] > 0


def test_random_rankings_are_matched_by_layer() -> None:
    from interp.analysis.faithfulness import _random

    module = build("llama").module
    every = interp.Heads.parse("L*H*", interp.anatomy(module))
    heads = interp.Heads.parse("L1H0,L1H2,L0H3")
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = _random(heads, every, "layer", rng)
        assert [h.layer for h in drawn] == [1, 1, 0] and len(set(drawn)) == 3
        assert len(set(_random(heads, every, "none", rng))) == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "uniform"}, "kind must be"), ({"ks": [99]}, "ks must be"), ({"matched": "size"}, "matched must be"),
        ({"ranking": "L0H0", "stack": "vision"}, "stack must be one of"), ({"ranking": interp.Heads()}, "ranking must be"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], says: str) -> None:
    specimen = build("llama")
    ranking = settings.pop("ranking", "L1H0")
    with pytest.raises(AnalysisError, match=says):
        faithfulness(
            specimen.module, ranking, [specimen.inputs], metric="loss", progress=False, **{"kind": "zero", **settings}
        )


# --- vision transformers


def classifier(**more: Any) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=(48, 32), patch_size=8,
        num_labels=7, **more,
    )  # fmt: skip
    module = ViTForImageClassification(config).eval()
    randomise(module, seed=0, gain=1.4)
    return module


def images(n: int) -> list[dict[str, Any]]:
    return [{"pixel_values": torch.randn(1, 3, 48, 32, generator=torch.Generator().manual_seed(i))} for i in range(n)]


def pruned(
    module: Any, inputs: dict[str, Any], layer: int, heads: list[int], replaced: Any = None
) -> tuple[Any, torch.Tensor]:
    """Logits and the layer's output, with z of some heads 0 (or what ``replaced`` says) by a hook on the projection."""
    part = module.get_submodule(f"vit.layers.{layer}.attention.o_proj")
    kept: list[torch.Tensor] = []

    def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = args[0].clone().view(*args[0].shape[:-1], 4, 12)
        z[:, :, heads] = 0 if replaced is None else replaced
        return (z.flatten(2),)

    handles = [part.register_forward_pre_hook(hook)] if heads else []
    whole = module.get_submodule(f"vit.layers.{layer}")
    handles.append(
        whole.register_forward_hook(lambda _, args, out: kept.append(out[0] if isinstance(out, tuple) else out))
    )
    with torch.no_grad():
        logits = module(**inputs).logits[0]
    for handle in handles:
        handle.remove()
    return logits, kept[0].reshape(-1, 48)


@pytest.mark.parametrize("keep", ["all_but_one", "one"])
@pytest.mark.parametrize("metric", [*GLOBAL, *LOCAL])
def test_vit_metrics_are_their_formulas(metric: str, keep: str) -> None:
    module, (inputs,) = classifier(), images(1)
    got = score("vit_importance", module, [inputs], metric=metric, keep=keep)
    logits, _ = pruned(module, inputs, 0, [])
    c = int(logits.argmax())
    p = logits.softmax(-1)
    for layer in range(3):
        _, tokens = pruned(module, inputs, layer, [])
        for head in range(4):
            heads = [head] if keep == "all_but_one" else [h for h in range(4) if h != head]
            other, changed = pruned(module, inputs, layer, heads)
            q, m = other.softmax(-1), (p + other.softmax(-1)) / 2
            wanted = {
                "probability": p[c] - q[c], "logit": logits[c] - other[c], "loss": (p[c] / q[c]).log(),
                "accuracy": 1.0 - float(other.argmax() == c),
                "jsd": ((p * (p / m).log2()).sum() + (q * (q / m).log2()).sum()) / 2,
                "cls_shift": 1 - cosine_similarity(tokens[0], changed[0], dim=0),
                "cls_distance": (tokens[0] - changed[0]).norm() / tokens[0].norm(),
                "layer_shift": ((tokens - changed).norm(dim=-1) / tokens.norm(dim=-1)).mean(),
            }[metric]  # fmt: skip
            assert float(got["value"].sel(layer=layer, head=head)) == pytest.approx(float(wanted), abs=2e-6)
    assert float(abs(got["null"]).max()) < 2e-6


def test_labels_take_the_place_of_the_models_own_choice() -> None:
    module, (inputs,) = classifier(), images(1)
    logits, _ = pruned(module, inputs, 0, [])
    wrong = int(logits.argmin())
    got = score("vit_importance", module, [{**inputs, "labels": torch.tensor([wrong])}], metric="logit")
    other, _ = pruned(module, inputs, 1, [2])
    assert float(got["value"].sel(layer=1, head=2)) == pytest.approx(float(logits[wrong] - other[wrong]), abs=1e-5)


def test_parts_of_a_map_are_cls_rings_and_keys() -> None:
    module = classifier()
    parts = map_parts(Model(module), images(1)[0], "vision", None, [3])
    n = 25  # CLS and 6 x 4 patches
    assert parts["cls_row"].sum() == 24 and parts["cls_row"][0, 1:].all()
    assert parts["cls_column"].sum() == 24 and parts["cls_column"][1:, 0].all()
    assert parts["key 3"][:, 3].all() and parts["key 3"].sum() == n
    assert parts["ring 0"].sum() == 24 and parts["ring 0"].diagonal()[1:].all()
    # Patch 0 is a corner: itself, then 3 neighbours; rings tile all pairs of patches.
    assert parts["within 1"][1].sum() == 4 and parts["ring 1"][1].sum() == 3
    rings = torch.stack([part for name, part in parts.items() if name.startswith("ring")])
    assert (rings.sum(0) == (parts["within 5"].int())).all() and "ring 6" not in parts
    assert (parts["within 2"] ^ parts["beyond 2"]).sum() == 24 * 24


def test_partial_pruning_is_a_product_with_the_map() -> None:
    module, (inputs,) = classifier(), images(1)
    got = partial_pruning(module, "vision.L1H2", [inputs], rings=[1], keys=[4], metric="logit", progress=False)
    with interp.hooked(module, capture=interp.Capture(attention=True)) as run, torch.no_grad():
        module(**inputs)
    a = torch.from_numpy(run.trace["vision"]["attention"].sel(layer=1, head=2).values[0])
    kept: list[torch.Tensor] = []
    with interp.hooked(module, interventions=[interp.Custom(before=lambda call: kept.append(call.v))]):
        module(**inputs)
    v = kept[1][0, 2].detach()
    logits, _ = pruned(module, inputs, 0, [])
    c = int(logits.argmax())
    for name, part in map_parts(Model(module), inputs, "vision", [1], [4]).items():
        left = a * ~part
        whole = left / left.sum(-1, keepdim=True).clamp_min(1e-30)
        for renormalised, p in ((False, left), (True, whole)):
            other, _ = pruned(module, inputs, 1, [2], (p @ v)[None, :, None])
            value = got["value"].sel(head="vision.L1H2", part=name, renormalised=renormalised)
            assert float(value) == pytest.approx(float(logits[c] - other[c]), abs=1e-4)
        assert float(got["mass"].sel(head="vision.L1H2", part=name)) == pytest.approx(
            float((a * part).sum() / a.sum()), abs=1e-5
        )


def test_all_of_a_map_is_the_head() -> None:
    module, samples = classifier(), images(2)
    whole = score("vit_importance", module, samples, metric="jsd")["value"].sel(layer=2, head=1)
    part = partial_pruning(module, "vision.L2H1", samples, rings=[], progress=False)["value"].sel(
        part="all", renormalised=False
    )
    assert float(part[0]) == pytest.approx(float(whole), abs=1e-6)


def test_towers_without_a_cls_token_are_told() -> None:
    siglip = build("siglip")
    with pytest.raises(AnalysisError, match="CLS token"):
        score("vit_importance", siglip.module, [siglip.inputs], metric="cls_shift")
    vit = build("vit")
    with pytest.raises(AnalysisError, match="must give logits"):
        score("vit_importance", vit.module, [vit.inputs])
    assert not np.isnan(score("vit_importance", vit.module, [vit.inputs], metric="cls_shift")["value"]).any()
    for settings, says in (({"metric": "size"}, "metric must be"), ({"keep": "two"}, "keep must be")):
        with pytest.raises(AnalysisError, match=says):
            score("vit_importance", vit.module, [vit.inputs], **settings)
    with pytest.raises(AnalysisError, match="rings must lie"):
        partial_pruning(classifier(), "vision.L0H0", images(1), rings=[9])
    with pytest.raises(AnalysisError, match="keys must lie"):
        partial_pruning(classifier(), "vision.L0H0", images(1), keys=[99])
