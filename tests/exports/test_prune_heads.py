"""A pruned checkpoint is smaller, loads with plain transformers, and answers as the model with these heads at zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import Head, Heads, MaskHeads, hooked
from interp.exports import PruneError, prune_heads
from interp.exports.prune_plan import cuts, exact
from interp.heads import HeadError
from interp.models.anatomy import Site, anatomy
from interp.testing import build


def output(out: Any) -> Tensor:
    return out.logits if getattr(out, "logits", None) is not None else out[0]


def one_of_each(module: Any, stack: str) -> Heads:
    """One query head of every KV head of every layer, another one in each."""
    found: list[Head] = []
    for site in anatomy(module).stacks[stack]:
        size = site.n_heads // site.n_kv_heads
        if size == 1:
            found.append(Head(site.layer, site.layer % site.n_heads, stack))
        else:
            found += [Head(site.layer, g * size + (site.layer + g) % size, stack) for g in range(site.n_kv_heads)]
    return Heads(found)


def masked(specimen: Any, heads: Heads) -> tuple[Tensor, Tensor]:
    """Output with these heads at zero, and without."""
    with torch.no_grad():
        with hooked(specimen.module, interventions=[MaskHeads(heads, kind="zero")]):
            zero = output(specimen.module(**specimen.inputs))
        return zero, output(specimen.module(**specimen.inputs))


PRUNABLE = [
    ("llama", "text"), ("mistral", "text"), ("qwen3", "text"), ("gemma2", "text"), ("gemma3_text", "text"), ("gpt_oss", "text"),
    ("deepseek_v3", "text"), ("qwen3_next", "text"), ("lfm2", "text"), ("llava", "text"), ("paligemma", "text"), ("gemma3", "text"),
    ("internvl", "text"), ("qwen3_vl", "text"), ("idefics3", "text"), ("vit", "vision"), ("deit", "vision"), ("dinov2", "vision"),
]  # fmt: skip


QUICK = ("llama", "gpt_oss", "llava", "vit", "gpt2", "bert", "mllama")


def cases(rows: list[Any]) -> list[Any]:
    return [pytest.param(*row, marks=() if row[0] in QUICK else pytest.mark.slow) for row in rows]


@pytest.mark.parametrize(("name", "stack"), cases(PRUNABLE))
def test_a_smaller_checkpoint_answers_as_the_model_with_the_heads_at_zero(
    name: str, stack: str, tmp_path: Path
) -> None:
    specimen = build(name)
    before = {key: value.clone() for key, value in specimen.module.state_dict().items()}
    heads = one_of_each(specimen.module, stack)
    got = prune_heads(specimen.module, heads, tmp_path / "small")
    assert got.removed == heads and not got.zeroed and got.parameters[1] < got.parameters[0]
    again: Any = type(specimen.module).from_pretrained(tmp_path / "small").eval()
    zero, plain = masked(specimen, heads)
    with torch.no_grad():
        torch.testing.assert_close(output(again(**specimen.inputs)), zero, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output(got.module(**specimen.inputs)), zero, atol=1e-4, rtol=1e-4)
    assert (zero - plain).abs().max() > 0.05, "these heads do something"
    small, large = (anatomy(m).stacks[stack][0].n_heads for m in (again, specimen.module))
    assert small == large - len(heads) // len({h.layer for h in heads})
    assert all(torch.equal(before[key], value) for key, value in specimen.module.state_dict().items())


@pytest.mark.parametrize(
    ("name", "stack", "says"),
    cases([
        ("gpt2", "text", "makes it hidden_size / heads in text: 3 heads of 12 need 36"), ("gpt_neox", "text", "hidden_size / heads"),
        ("bert", "text", "hidden_size / heads"), ("bart", "encoder", "hidden_size / heads"), ("whisper", "audio", "hidden_size / heads"),
        ("clip", "vision", "hidden_size / heads"),
        ("qwen2_5_vl", "text", "hidden_size / heads"), ("dinov3", "vision", "hidden_size / heads"),
        ("llava", "vision", "not a multiple of the number"),
        ("gemma3", "vision", "must be divisible by num_heads"),
        ("mllama", "text", "'cross 1': 0"), ("t5", "encoder", "must be part of the model's"), ("blip2", "qformer", "'qformer_cross 0': 0"),
    ]),
)  # fmt: skip
def test_a_family_that_cannot_says_why_and_can_have_them_zeroed(
    name: str, stack: str, says: str, tmp_path: Path
) -> None:
    specimen = build(name)
    heads = one_of_each(specimen.module, stack)
    with pytest.raises(PruneError, match=says):
        prune_heads(specimen.module, heads, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
    got = prune_heads(specimen.module, heads, tmp_path / "small", uneven="zero")
    assert got.zeroed == heads and not got.removed and got.parameters[0] == got.parameters[1]
    zero, _ = masked(specimen, heads)
    again: Any = type(specimen.module).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(output(again(**specimen.inputs)), zero, atol=1e-4, rtol=1e-4)


def test_it_generates_and_its_config_says_so(tmp_path: Path) -> None:
    specimen = build("llama")
    heads = Heads.parse("L0H0,L0H1,L1H2,L1H3,L2H0,L2H1")  # a whole KV head of each layer
    got = prune_heads(specimen.module, heads, tmp_path / "small", check=specimen.inputs)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 16)
    sizes = [sum(f.stat().st_size for f in (tmp_path / "small").glob("*.safetensors"))]
    assert sizes[0] < 4 * got.parameters[1] + 20_000 < 4 * got.parameters[0]
    with hooked(specimen.module, interventions=[MaskHeads(heads, kind="zero")]):
        wanted = specimen.module.generate(**specimen.inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(got.module.generate(**specimen.inputs, max_new_tokens=8, do_sample=False), wanted)


def test_uneven_heads_are_removed_as_far_as_they_go() -> None:
    specimen = build("llama")
    heads = Heads.parse("L0H0,L0H1,L0H2,L1H1,L1H2,L2H0,L2H3")
    with pytest.raises(PruneError, match="as many in every layer"):
        prune_heads(specimen.module, heads)
    got = prune_heads(specimen.module, heads, uneven="zero", check=specimen.inputs)
    # One of each KV head of each layer goes; the third of layer 0 stays and writes nothing.
    assert (len(got.removed), str(got.zeroed)) == (6, "L0H1") and {*got.removed, *got.zeroed} == {*heads}
    zero, _ = masked(specimen, heads)
    with torch.no_grad():
        torch.testing.assert_close(output(got.module(**specimen.inputs)), zero, atol=1e-4, rtol=1e-4)


def test_tied_and_low_precision_weights_stay_what_they_are(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from interp.testing.text import DECODER

    module = LlamaForCausalLM(LlamaConfig(**{**DECODER, "tie_word_embeddings": True})).to(torch.bfloat16).eval()
    heads = one_of_each(module, "text")
    got = prune_heads(module, heads, tmp_path / "small", check=build("llama").inputs)
    assert got.module.dtype == torch.bfloat16
    assert got.module.lm_head.weight.data_ptr() == got.module.model.embed_tokens.weight.data_ptr()


def test_a_loaded_model_keeps_what_reads_its_inputs(tmp_path: Path) -> None:
    model = interp.load("scenes-lvlm")
    site = anatomy(model.module).stacks["text"]
    heads = Heads(Head(s.layer, h) for s in site for h in range(4))
    got = prune_heads(model, heads, tmp_path / "small")
    small = interp.load(tmp_path / "small")
    assert anatomy(small.module).shape("text")[1] == 4 and got.folder == tmp_path / "small"
    a, b = (m.encode("Describe the picture.", image=None) for m in (model, small))
    assert torch.equal(a["input_ids"], b["input_ids"]) and type(small.processor) is type(model.processor)


def test_bad_input_is_named(tmp_path: Path) -> None:
    specimen = build("llama")
    module: Any = specimen.module
    with pytest.raises(HeadError, match="L9H0"):
        prune_heads(module, "L9H0")
    with pytest.raises(PruneError, match="at least one head"):
        prune_heads(module, "")
    with pytest.raises(PruneError, match="must leave at least one in every layer"):
        prune_heads(module, "L0H0-3,L1H0-3,L2H0-3")
    with pytest.raises(PruneError, match=r"same number of its 2 query heads.*'text 0': \[1, 0\]"):
        prune_heads(module, "L0H0,L1H0,L2H0")
    with pytest.raises(PruneError, match="uneven must be"):
        prune_heads(module, "L0H0", uneven="maybe")  # type: ignore[arg-type]
    with pytest.raises(FileExistsError):
        prune_heads(module, "L0H0", tmp_path)
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(build("llama").module, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PruneError, match="merge_and_unload"):
        prune_heads(wrapped, "L0H0")


def test_a_norm_over_all_heads_is_refused() -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    from interp.testing.text import DECODER

    changes = {k: v for k, v in DECODER.items() if k not in ("head_dim", "num_key_value_heads")}
    module = Olmo2ForCausalLM(Olmo2Config(**{**changes, "head_dim": 12})).eval()
    with pytest.raises(PruneError, match=r"q_norm|hidden_size / heads"):
        prune_heads(module, "L0-2H1")


def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.exports import prune_weights

    specimen = build("llama")
    monkeypatch.setattr(
        prune_weights,
        "_blocks",
        lambda tensor, axis, count, stay: tensor.narrow(axis, 0, tensor.shape[axis] * len(stay) // count),
    )
    with pytest.raises(PruneError, match="must give the outputs"):
        prune_heads(specimen.module, "L0-2H0,L0-2H2", tmp_path / "small", check=specimen.inputs)
    assert list(tmp_path.iterdir()) == []


def site(n_heads: int, n_kv_heads: int, layer: int = 0) -> Site:
    return Site(f"layer.{layer}", "text", layer, n_heads, n_kv_heads, 8, 8, True, False, "o_proj")


def test_even_cuts_by_hand() -> None:
    a, b = site(8, 2), site(8, 2, 1)
    found = exact({a: frozenset({0, 1, 2, 3, 5}), b: frozenset({1, 4, 5, 6, 7})})
    assert (found.n_heads, found.n_kv_heads) == (3, 1)  # one KV head whole, one query head of the other
    best = cuts({a: frozenset({0, 1, 4, 5, 6}), b: frozenset({2, 3, 6, 7})})[0]
    assert (best.n_heads, best.n_kv_heads, best.size) == (4, 2, 8)
    assert cuts({a: frozenset({0}), b: frozenset({4})}) == []
    with pytest.raises(PruneError, match="the same heads and key-value heads"):
        cuts({a: frozenset({0}), site(4, 4, 1): frozenset({0})})
