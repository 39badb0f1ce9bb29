"""Rollout and relevancy against the matrices written out, with the library's own maps and autograd."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis.relevancy import relevancy
from interp.analysis.rollout import rollout
from interp.analysis.running import AnalysisError
from interp.testing import build
from interp.testing.specimen import configs


def eager(module: Any) -> Any:
    twin = copy.deepcopy(module)
    for config in configs(twin):
        config._attn_implementation_internal = "eager"
    return twin


def product(maps: list[torch.Tensor], drop: tuple[int, ...] = ()) -> torch.Tensor:
    out = torch.eye(maps[0].shape[-1])
    for a in maps:
        mean = a[0].mean(0).clone()
        mean[:, list(drop)] = 0
        mean = mean + torch.eye(len(mean))
        out = (mean / mean.sum(-1, keepdim=True)) @ out
    return out


def chefer(maps: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    out = torch.eye(maps[0].shape[-1])
    for a, g in zip(maps, torch.autograd.grad(y, maps, retain_graph=True, allow_unused=True), strict=True):
        if g is not None:
            out = out + (a * g).clamp(min=0).mean(1)[0].detach() @ out
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
def test_text(family: str) -> None:
    specimen = build(family)
    inputs = {"input_ids": specimen.inputs["input_ids"]}
    run = eager(specimen.module)(**inputs, output_attentions=True)
    rows = [7, -1]
    found = rollout(specimen.module, inputs, rows=rows)
    wanted = product(run.attentions).detach()
    np.testing.assert_allclose(found.relevance.values, wanted[rows], atol=1e-5)
    np.testing.assert_allclose(found.relevance.sum("position"), 1, rtol=1e-5)
    dropped = rollout(specimen.module, inputs, drop=(0,))
    np.testing.assert_allclose(dropped.relevance.values, product(run.attentions, (0,)).detach()[-1:], atol=1e-5)
    map_ = relevancy(specimen.module, inputs, rows=rows, targets=[20, 30])
    for n, (row, target) in enumerate(zip(rows, (20, 30), strict=True)):
        expected = chefer(list(run.attentions), run.logits[0, row, target])[row].numpy()
        expected[row % len(expected)] -= 1
        np.testing.assert_allclose(map_.relevance.values[n], expected, rtol=1e-3, atol=1e-5)
    assert relevancy(specimen.module, inputs).target.item() == int(run.logits[0, -1].argmax())
    assert all(p.grad is None for p in specimen.module.parameters())


def test_an_image_classifier() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8, num_labels=5,
        initializer_range=0.3,
    )  # fmt: skip
    module = ViTForImageClassification(config).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    run = eager(module)(**inputs, output_attentions=True)
    found = rollout(module, inputs, rows=[0], stack="vision")
    wanted = product(run.attentions).detach()[0]
    np.testing.assert_allclose(found.relevance.values[0], wanted, atol=1e-5)
    np.testing.assert_allclose(found.image.values[0], wanted[1:].reshape(4, 4), atol=1e-5)
    for target in (0, 3):
        map_ = relevancy(module, inputs, targets=[target], stack="vision")
        expected = chefer(list(run.attentions), run.logits[0, target])[0].numpy()
        expected[0] -= 1
        np.testing.assert_allclose(map_.relevance.values[0], expected, rtol=1e-3, atol=1e-6)
    assert not np.allclose(
        relevancy(module, inputs, targets=[0], stack="vision").image,
        relevancy(module, inputs, targets=[1], stack="vision").image,
    )


def test_text_to_image_through_the_tower() -> None:
    specimen = build("llava")
    twin = eager(specimen.module)
    tower: list[torch.Tensor] = []
    text: list[torch.Tensor] = []
    for name, part in twin.named_modules():
        if name.endswith("self_attn"):
            part.register_forward_hook(lambda _, a, o, into=tower if "vision" in name else text: into.append(o[1]))
    run = twin(**specimen.inputs, output_attentions=True)
    ids = specimen.inputs["input_ids"][0]
    image = (ids == twin.config.image_token_index).nonzero().flatten()
    assert len(tower) == 3 and len(text) == 2  # the tower's last layer feeds nothing (vision_feature_layer -2)
    found = rollout(specimen.module, specimen.inputs, into_image=True)
    start = torch.zeros(1, tower[0].shape[-1])
    on_text = product(text).detach()[-1]
    start[0, 1:] = on_text[image]
    edge = int(np.sqrt(len(image)))
    wanted = (start @ product(tower[:2]).detach())[0, 1:].reshape(edge, edge)
    np.testing.assert_allclose(found.patches.values[0], wanted, atol=1e-6)
    np.testing.assert_allclose(found.image.values[0], on_text[image].reshape(edge, edge), atol=1e-6)
    map_ = relevancy(specimen.module, specimen.inputs, targets=[33], into_image=True)
    y = run.logits[0, -1, 33]
    on_text = chefer(text, y)[-1]
    start[0, 1:] = on_text[image]
    wanted = (start @ chefer(tower, y))[0, 1:].reshape(edge, edge)
    np.testing.assert_allclose(map_.patches.values[0], wanted, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(map_.image.values[0], on_text[image].reshape(edge, edge), rtol=1e-3, atol=1e-6)


def test_bad_input() -> None:
    specimen = build("llama")
    for run in (rollout, relevancy):
        with pytest.raises(AnalysisError, match="one sequence"):
            run(specimen.module, specimen.batch)
        with pytest.raises(AnalysisError, match="rows must be"):
            run(specimen.module, specimen.inputs, rows=[99])
        with pytest.raises(AnalysisError, match="into_image needs"):
            run(specimen.module, specimen.inputs, into_image=True)
        with pytest.raises(AnalysisError, match="stack must be one of"):
            run(specimen.module, specimen.inputs, stack="vision")
        with (
            interp.hooked(specimen.module, interventions=[interp.ScaleHeads("L0H0", 0.5)]),
            pytest.raises(AnalysisError, match="gain"),
        ):
            run(specimen.module, specimen.inputs)
    with pytest.raises(AnalysisError, match="one id within 96"):
        relevancy(specimen.module, specimen.inputs, targets=[1, 2])
    with pytest.raises(AnalysisError, match="needs a model with logits"):
        relevancy(build("vit").module, build("vit").inputs, stack="vision")
    with pytest.raises(AnalysisError, match="attends to another"):
        rollout(build("t5").module, build("t5").inputs, stack="cross")
