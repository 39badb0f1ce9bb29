"""Gates, write norms, logit attribution and entry influence: hand computations and double-precision differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import interp
from interp.analysis import score
from interp.analysis.entry_influence import influence, influence_blocks
from interp.analysis.gradients import gradients
from interp.analysis.head_gates import normalised
from interp.analysis.logit_attribution import components
from interp.analysis.norms import LinearNorm
from interp.analysis.running import AnalysisError
from interp.analysis.targets import measure, target_of
from interp.analysis.write_norm import neuron_activity
from interp.models.model import Model
from interp.testing import build
from interp.testing.weights import randomise
from probes.contrast import ContrastPair
from probes.samples import Sample


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loss_at(module: Any, inputs: dict[str, Any], heads: str, gain: float) -> float:
    target = target_of(inputs, inputs, Model(module))
    with torch.no_grad(), interp.hooked(module, interventions=[interp.ScaleHeads(heads, gain)]):
        logits = module(**inputs).logits[0, list(target.positions or ())]
    return float(cross_entropy(logits.double(), torch.tensor(target.ids)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gates_are_derivatives_of_the_loss(family: str) -> None:
    specimen = build(family, dtype=torch.float64)
    module, inputs = specimen.module, specimen.inputs
    signed = score("head_gates", module, [inputs], signed=True)["value"]
    plain = score("head_gates", module, [inputs])["value"]
    step = 1e-2
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        up, down = (loss_at(module, inputs, f"L{layer}H{head}", 1 + s) for s in (step, -step))
        assert float(signed.sel(layer=layer, head=head)) == pytest.approx(-(up - down) / (2 * step), rel=5e-3, abs=1e-5)
    np.testing.assert_allclose(plain, abs(signed), atol=1e-12)


def test_gates_equal_the_sum_of_z_times_its_gradient() -> None:
    specimen = build("llama")
    model, inputs = Model(specimen.module), specimen.inputs
    target = target_of(inputs, inputs, model)
    _, found, leaves = gradients(model, inputs, target, measure("loss").function, stack="text", what=("gate", "z"))
    for layer in range(3):
        by_hand = (leaves.values["z", layer] * found["z", layer]).sum((0, 1, 3))
        torch.testing.assert_close(found["gate", layer], by_hand, atol=1e-5, rtol=1e-4)


def test_gradients_leave_the_weights_and_their_flags_alone() -> None:
    specimen = build("llama")
    module = specimen.module
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    frozen = score("head_gates", module, [specimen.inputs])["value"]
    for parameter in module.parameters():
        assert parameter.grad is None and not parameter.requires_grad
        parameter.requires_grad_(True)
    np.testing.assert_allclose(frozen, score("head_gates", module, [specimen.inputs])["value"], atol=1e-6)
    assert all(p.grad is None for p in module.parameters())


def test_the_released_normalisation_is_unit_length_by_layer_then_0_to_1() -> None:
    specimen = build("llama")
    made = score("head_gates", specimen.module, [specimen.inputs])
    got = normalised(made).values
    unit = made["value"].values / np.linalg.norm(made["value"].values, axis=1, keepdims=True)
    np.testing.assert_allclose(got, (unit - unit.min()) / (unit.max() - unit.min()))
    assert got.min() == 0 and got.max() == 1


def test_first_order_is_first_order() -> None:
    """Halving the change halves the error of the gate's estimate twice."""
    specimen = build("llama", dtype=torch.float64)
    module, inputs = specimen.module, specimen.inputs
    gate = float(score("head_gates", module, [inputs], signed=True)["value"].sel(layer=1, head=0))
    base = loss_at(module, inputs, "L1H0", 1.0)
    errors = [abs(loss_at(module, inputs, "L1H0", 1 - t) - base - t * gate) for t in (0.02, 0.01)]
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.2)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "deepseek_v3"])
def test_write_norms_are_those_of_the_heads_slice(family: str, norm: int) -> None:
    specimen = build(family)
    module: Any = specimen.module
    paths = {
        "llama": "model.layers.{}.self_attn.o_proj", "gpt2": "transformer.h.{}.attn.c_proj",
        "bert": "encoder.layer.{}.attention.output.dense", "deepseek_v3": "model.layers.{}.self_attn.o_proj",
    }  # fmt: skip
    result = score("write_norm", module, [specimen.inputs], norm=norm)
    for site in interp.anatomy(module, specimen.inputs).stacks["text"]:
        projection = module.get_submodule(paths[family].format(site.layer))
        kept: list[torch.Tensor] = []
        handle = projection.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        with torch.no_grad():
            module(**specimen.inputs)
        handle.remove()
        z = kept[0][0].view(-1, site.n_heads, site.v_head_dim)
        weight = projection.weight if family == "gpt2" else projection.weight.T  # Conv1D is [in, out]
        for head in range(site.n_heads):
            part = weight[head * site.v_head_dim : (head + 1) * site.v_head_dim]
            wanted = float(torch.linalg.vector_norm(z[:, head] @ part, ord=norm, dim=-1).mean().detach())
            assert float(result["value"].sel(layer=site.layer, head=head)) == pytest.approx(wanted, rel=1e-4)


def test_a_projection_that_is_no_linear_layer_is_run_head_by_head() -> None:
    class Wrapped(torch.nn.Linear):
        """Not plain: such as a 4-bit layer, whose weights say nothing."""

    specimen = build("llama")
    plain = score("write_norm", specimen.module, [specimen.inputs])["value"]
    for layer in specimen.module.get_submodule("model.layers"):
        old: Any = layer.self_attn.o_proj
        layer.self_attn.o_proj = Wrapped(old.in_features, old.out_features)  # with a bias, which is no head's
        layer.self_attn.o_proj.weight = old.weight
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    np.testing.assert_allclose(score("write_norm", specimen.module, [specimen.inputs])["value"], plain, rtol=1e-4)


def test_pads_do_not_write() -> None:
    specimen = build("llama")
    ids = specimen.inputs["input_ids"]
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = score("write_norm", specimen.module, [{"input_ids": ids}])["value"]
    other = score(
        "write_norm", specimen.module, [{"input_ids": padded, "attention_mask": mask, "position_ids": positions}]
    )
    np.testing.assert_allclose(other["value"], plain, rtol=1e-4)


def test_neurons_are_inputs_of_the_down_projection() -> None:
    specimen = build("llama")
    module: Any = specimen.module
    got = neuron_activity(module, [specimen.inputs], progress=False)
    kept: list[torch.Tensor] = []
    handle = module.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        module(**specimen.inputs)
    handle.remove()
    np.testing.assert_allclose(got.sel(layer=1), kept[0][0].abs().mean(0).numpy(), rtol=1e-5)
    mixed = neuron_activity(build("deepseek_v3").module, [build("deepseek_v3").inputs], progress=False)
    assert not np.isnan(mixed[0]).any() and np.isnan(mixed[1:]).all()  # experts from layer 1 on


LINEAR = (
    "llama",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "qwen3_next",
    "deepseek_v3",
    "gpt_oss",
    "lfm2",
    "t5",
    "qwen3_vl",
)


@pytest.mark.parametrize("family", LINEAR)
def test_parts_add_up_to_the_logit(family: str) -> None:
    """Known answer 7: heads, the rest of each layer, embedding and bias; norms behind attention included."""
    specimen = build(family)
    parts = components(specimen.module, specimen.inputs)
    spread = max(1.0, abs(float(parts["total"])))
    assert float(parts["sum"]) == pytest.approx(float(parts["total"]), abs=2e-5 * spread)
    assert float(abs(parts["value"]).max()) > 1e-3


def test_parts_add_up_where_all_norms_stand_behind() -> None:
    """OLMo 2 normalises what attention and MLP write, and nothing before them."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    module = Olmo2ForCausalLM(config).eval()
    randomise(module, seed=0, gain=1.4)
    parts = components(module, {"input_ids": torch.randint(3, 90, (1, 12))})
    assert float(parts["sum"]) == pytest.approx(float(parts["total"]), abs=2e-5 * max(1.0, abs(float(parts["total"]))))
    assert float(abs(parts["value"]).min()) > 0 and float(abs(parts["value"]).max()) > 1e-3


def test_the_total_is_the_real_logit_difference() -> None:
    specimen = build("gpt2")
    sample = Sample(tuple(specimen.inputs["input_ids"][0].tolist()))
    pair = ContrastPair(sample, Sample(sample.ids[::-1]), 5, 9)
    parts = components(specimen.module, pair)
    with torch.no_grad():
        logits = specimen.module(**sample.inputs()).logits[0, -1]
    assert float(parts["total"]) == pytest.approx(float(logits[5] - logits[9]), abs=1e-5)
    result = score("logit_attribution", specimen.module, [pair])
    np.testing.assert_allclose(result["value"], parts["value"], atol=1e-6)


def test_a_heads_part_is_its_write_through_the_cached_scale() -> None:
    """``(z_h W_O / s) . w (W_U[a] - W_U[b])``, by hand on Llama."""
    specimen = build("llama")
    module: Any = specimen.module
    sample = Sample(tuple(specimen.inputs["input_ids"][0].tolist()))
    pair = ContrastPair(sample, Sample(sample.ids[::-1]), 5, 9)
    kept: dict[Any, torch.Tensor] = {}
    handles = [module.model.norm.register_forward_pre_hook(lambda _, args: kept.update(stream=args[0]))]
    for n, layer in enumerate(module.model.layers):
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, n=n: kept.update({n: args[0]})))
    with torch.no_grad():
        module(**sample.inputs())
    for handle in handles:
        handle.remove()
    last = kept["stream"][0, -1]
    scale = (last.pow(2).mean() + module.model.norm.variance_epsilon).sqrt()
    direction = module.model.norm.weight * (module.lm_head.weight[5] - module.lm_head.weight[9]) / scale
    result = score("logit_attribution", module, [pair])["value"]
    for n, layer in enumerate(module.model.layers):
        for head in range(4):
            part = slice(16 * head, 16 * head + 16)
            wanted = layer.self_attn.o_proj.weight[:, part] @ kept[n][0, -1, part] @ direction
            assert float(result.sel(layer=n, head=head)) == pytest.approx(float(wanted.detach()), abs=1e-5)


def test_a_norm_behind_attention_that_is_ignored_would_be_noticed() -> None:
    """Negative control: on Gemma 2 the write without its norm is another number."""
    specimen = build("gemma2")
    module: Any = specimen.module
    sample = Sample(tuple(specimen.inputs["input_ids"][0].tolist()))
    pair = ContrastPair(sample, Sample(sample.ids[::-1]), 5, 9)
    right = score("logit_attribution", module, [pair])["value"].values
    for layer in module.model.layers:
        with torch.no_grad():
            layer.post_attention_layernorm.weight.add_(1.0)
    assert np.abs(right - score("logit_attribution", module, [pair])["value"].values).max() > 1e-2


def test_the_mean_over_classes_is_taken_off_without_a_foil() -> None:
    specimen = build("llama")
    whole = components(specimen.module, specimen.inputs, centred=False)
    centred = components(specimen.module, specimen.inputs)
    with torch.no_grad():
        logits = specimen.module(**specimen.inputs).logits[0, -2]
    answer = int(specimen.inputs["input_ids"][0, -1])
    assert float(whole["total"]) == pytest.approx(float(logits[answer]), abs=1e-5)
    assert float(centred["total"]) == pytest.approx(float(logits[answer] - logits.mean()), abs=1e-5)


def test_what_is_not_linear_is_refused() -> None:
    bart = build("bart")
    with pytest.raises(AnalysisError, match="residual stream"):
        score("logit_attribution", bart.module, [bart.inputs])
    llava = build("llava")
    with pytest.raises(AnalysisError, match="writes to the output"):
        score("logit_attribution", llava.module, [llava.inputs], stack="vision")
    llama = build("llama")
    module: Any = llama.module
    head = module.lm_head
    head.register_forward_hook(lambda _, args, out: out.tanh())
    with pytest.raises(AnalysisError, match="must be linear"):
        score("logit_attribution", module, [llama.inputs])


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_as_linear_maps(kind: str) -> None:
    norm: Any = torch.nn.LayerNorm(8) if kind == "layer" else torch.nn.RMSNorm(8, eps=1e-6)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(8))
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    linear = LinearNorm.of(norm, x)
    assert linear.centred == (kind == "layer")
    torch.testing.assert_close(linear(x), norm(x), atol=1e-5, rtol=1e-4)
    zero = linear(torch.zeros_like(x))
    torch.testing.assert_close(linear(x + y) - zero, linear(x) - zero + linear(y) - zero, atol=1e-4, rtol=1e-4)

    class OddNorm(torch.nn.Module):
        eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.abs().mean(-1, keepdim=True) + 1)

    with pytest.raises(AnalysisError, match="OddNorm does something else"):
        LinearNorm.of(OddNorm(), x)


def test_influence_is_the_change_when_a_key_is_dropped() -> None:
    """Known answer 6: against the derivative along ``A -> renormalised A`` and the exact change of a linear loss."""
    torch.manual_seed(0)
    n = 6
    p = torch.softmax(torch.randn(n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf), -1).double()
    v, dz = torch.randn(n, 4).double(), torch.randn(n, 4).double()
    got = influence(p[None, None], dz[None, None], v[None, None])[0, 0].double()
    for i in range(n):
        for j in range(i + 1):
            if i == 0:
                wanted = abs(float(dz[0] @ v[0]))
            else:
                dropped = p[i].clone()
                dropped[j] = 0
                dropped /= dropped.sum()
                # The loss dz . z is linear in z, so its first order is exact.
                wanted = abs(float(dz[i] @ (dropped @ v - p[i] @ v)))
            assert float(got[i, j]) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert float(got.triu(1).abs().max()) == 0


def test_head_influence_is_the_sum_of_its_blocks_and_of_its_entries() -> None:
    specimen = build("llama")
    module, inputs = specimen.module, specimen.inputs
    value = score("entry_influence", module, [inputs])["value"]
    blocks = influence_blocks(module, inputs, block=8)
    np.testing.assert_allclose(blocks.sum(("query_block", "key_block")), value, rtol=1e-4)
    model = Model(module)
    target = target_of(inputs, inputs, model)
    _, found, _ = gradients(model, inputs, target, measure("loss").function, stack="text", what=("z",))
    with interp.hooked(module, capture=interp.Capture(attention=True)) as run, torch.no_grad():
        module(**inputs)
    maps = torch.from_numpy(run.trace["text"]["attention"].values)[0]
    kept: dict[int, torch.Tensor] = {}
    with interp.hooked(
        module, interventions=[interp.Custom(before=lambda call: kept.update({call.site.layer: call.v}))]
    ):
        module(**inputs)
    for layer in range(3):
        v = kept[layer][0].repeat_interleave(2, 0).detach()
        g = found["z", layer][0].transpose(0, 1) @ v.transpose(-1, -2)
        e = maps[layer] * (g - (maps[layer] * g).sum(-1, keepdim=True)).abs() / (1 - maps[layer] + 1e-6)
        e[:, 0, 0] = (maps[layer] * g).abs()[:, 0, 0]
        np.testing.assert_allclose(value.sel(layer=layer), e.sum((1, 2)).numpy(), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("head_gates", {"metric": "accuracy"}, "must have a gradient"),
        ("head_gates", {"metric": "what"}, "metric must be one of"),
        ("write_norm", {"norm": 3}, "norm must be 1 or 2"),
        ("entry_influence", {"metric": "accuracy"}, "must have a gradient"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict[str, Any], says: str) -> None:
    specimen = build("llama")
    with pytest.raises(AnalysisError, match=says):
        score(name, specimen.module, [specimen.inputs], **settings)
    with pytest.raises(AnalysisError, match="block must be at least 1"):
        influence_blocks(specimen.module, specimen.inputs, block=0)
