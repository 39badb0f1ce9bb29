"""Weights of heads and what is read off them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis import score
from interp.analysis.circuits import composition, eigenvalue_score
from interp.analysis.projections import _folded, head_weights, layer_module
from interp.analysis.running import AnalysisError
from interp.models.anatomy import anatomy
from interp.models.model import Model
from interp.testing import build
from interp.tracing.calls import Intervention


def test_eigenvalues_by_hand() -> None:
    eye = torch.eye(2)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    wide = torch.randn(2, 5, 2)
    inverse = torch.linalg.pinv(wide)
    for small, wanted in ((eye, 1), (-eye, -1), (turn, 0)):
        # W_V W_O shares its non-zero eigenvalues with the small product W_O W_V = small.
        np.testing.assert_allclose(eigenvalue_score(wide @ small, inverse), wanted, atol=1e-5)
    assert np.isnan(eigenvalue_score(torch.zeros(1, 3, 2), torch.zeros(1, 2, 3)))[0]
    middle = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    a = torch.eye(3)[None]
    np.testing.assert_allclose(eigenvalue_score(a, a, middle), 1 / 3, atol=1e-12)


class Qkv(Intervention):
    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def before(self, call: Any) -> None:
        self.found[call.site.name] = (call.q.clone(), call.k.clone(), call.v.clone())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "vit"])
def test_weights_are_those_that_the_model_uses(family: str) -> None:
    specimen = build(family)
    model = Model(specimen.module)
    text = "input_ids" in specimen.inputs
    stack = "text" if text else "vision"
    if text:
        runs = [{"input_ids": torch.full((1, 3), token)} for token in (20, 60)]
    else:
        runs = [{"pixel_values": torch.randn_like(specimen.inputs["pixel_values"])} for _ in range(2)]
    sites = anatomy(specimen.module).stacks[stack]
    seen: list[tuple[Any, dict[str, torch.Tensor]]] = []
    for inputs in runs:
        reader, entering = Qkv(), {}
        handles = []
        for site in sites:
            layer = layer_module(model, site)

            def keep(_: Any, args: Any, kwargs: Any, name: str = site.name, into: Any = entering) -> None:
                into[name] = args[0] if args else kwargs["hidden_states"]

            handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
        with interp.hooked(model, interventions=[reader]), torch.no_grad():
            specimen.module(**inputs)
        for handle in handles:
            handle.remove()
        seen.append((reader.found, entering))
    for site in sites:
        weights = head_weights(model, site)
        layer = layer_module(model, site)
        group = site.n_heads // site.n_kv_heads
        xs = []
        for _, entering in seen:
            x = entering[site.name][0, 0]
            norm = next(
                (getattr(layer, n) for n in ("input_layernorm", "ln_1", "layernorm_before") if hasattr(layer, n)), None
            )
            if norm is not None:
                eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
                x = x - x.mean() if isinstance(norm, torch.nn.LayerNorm) else x
                x = x / (x.square().mean() + eps).sqrt()
            xs.append(x)
        # Position 0 is not rotated; the difference of two inputs has no bias.
        names = ("q", "k", "v")
        for name in names:
            at = "qkv".index(name)
            weight = {"q": weights.W_Q, "k": weights.W_K, "v": weights.W_V}[name]
            got = torch.einsum("d,hdn->hn", xs[0] - xs[1], weight)
            used = seen[0][0][site.name][at][0, :, 0] - seen[1][0][site.name][at][0, :, 0]
            used = used if name == "q" else used.repeat_interleave(group, 0)
            torch.testing.assert_close(got, used, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", ["plain", "one more", "centred"])
def test_a_norm_is_folded_as_it_acts_whatever_it_is_called(rule: str) -> None:
    class OwnNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 1.5]))
            self.eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x - x.mean(-1, keepdim=True) if rule == "centred" else x
            x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
            return x * (self.weight + 1 if rule == "one more" else self.weight)

    weight = torch.arange(8.0).reshape(4, 2)
    wanted = weight * {"one more": torch.tensor([1.5, 0.0, 3.0, 2.5])}.get(rule, OwnNorm().weight.detach())[:, None]
    wanted = wanted - wanted.mean(0) if rule == "centred" else wanted
    torch.testing.assert_close(_folded(OwnNorm(), weight), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_equals_the_large_matrices(kind: Any) -> None:
    module = build("llama").module
    found = composition(module, kind)
    model = Model(module)
    w = [head_weights(model, site) for site in anatomy(module).stacks["text"]]
    first = (w[0].W_V @ w[0].W_O).double()
    second = {
        "Q": w[2].W_Q @ w[2].W_K.transpose(1, 2),
        "K": w[2].W_K @ w[2].W_Q.transpose(1, 2),
        "V": w[2].W_V @ w[2].W_O,
    }[kind].double()
    for a, b in ((0, 0), (1, 3), (3, 2)):
        wanted = (first[a] @ second[b]).norm() / (first[a].norm() * second[b].norm())
        assert found.value.values[0, a, 2, b] == pytest.approx(wanted.item(), rel=1e-5)
    assert np.isnan(found.value.values[1, :, 0]).all() and np.isnan(found.value.values[1, :, 1]).all()
    # Random matrices of this size compose by chance: 1 / sqrt(width) and more.
    assert 0.05 < np.nanmean(found.null.values) < 0.5
    assert found.null.equals(composition(module, kind).null)


def test_bad_input() -> None:
    module = build("llama").module
    with pytest.raises(AnalysisError, match="kind must be"):
        composition(module, "X")  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="probe must be None"):
        score("ov_copying", module, [1])
    with pytest.raises(AnalysisError, match="needs output embeddings"):
        score("ov_copying", build("vit").module, stack="vision", through="tokens")
    with pytest.raises(AnalysisError, match="stack must be one of"):
        score("qk_matching", module, stack="vision")


def test_of_random_weights_nothing_stands_out() -> None:
    for name, settings in (("ov_copying", {}), ("ov_copying", {"through": "tokens"}), ("qk_matching", {})):
        result = score(name, build("llama").module, **settings)
        assert np.abs(result.value.values).max() < 0.9 and np.abs(result.null.values).mean() < 0.5
        assert (result.n.values == 1).all() and np.isnan(result.se.values).all()
