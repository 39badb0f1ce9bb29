"""TransformerLens to and fro: caches, bridges, heads and scores; its head detector and ours on the same weights."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis.head_detector import head_detector
from interp.interventions import MaskHeads
from interp.models.bridge import plain
from interp.models.errors import LoadError
from interp.scores_base import ScoreError
from interp.testing import Specimen, build
from interp.tracing.capture import CaptureError
from interp.tracing.trace import Trace
from interp.tracing.transformer_lens import CacheError

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (extra `lens`)")

EVERYTHING = interp.Capture(
    row_stats=True,
    topk=3,
    received=True,
    pooled=8,
    offset=True,
    attention=True,
    z=True,
    rows="last",
    group_output="last",
)
# What the bridge's eager arithmetic and SDPA differ by in fp32.
ROUNDING = 1e-5


@functools.cache
def bridged(name: str) -> tuple[Any, Specimen]:
    """A bridge to a tiny random model, as TransformerBridge.boot_transformers makes it of a loaded one."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.utilities.attn_implementation import force_eager_attention

    specimen = build(name)
    force_eager_attention(specimen.module)
    kind = type(specimen.module).__name__
    bridge = build_bridge_from_module(specimen.module, kind, hf_config=specimen.module.config)
    return bridge.eval(), specimen


def both(name: str, capture: interp.Capture) -> tuple[Trace, Any]:
    """Our trace of the model under the bridge, and the bridge's cache of the same ids."""
    bridge, specimen = bridged(name)
    model = interp.load(bridge)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(specimen.inputs["input_ids"])
        with interp.hooked(model, capture=capture) as run:
            model(specimen.inputs)
    return run.trace, cache


def logits(model: Any, specimen: Specimen) -> torch.Tensor:
    with torch.no_grad():
        out = model(**specimen.inputs)
    return out["logits"] if "logits" in out else out["last_hidden_state"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_patterns_z_and_every_reading_equal_those_of_the_cache(name: str) -> None:
    ours, cache = both(name, EVERYTHING)
    a, b = ours["text"], interp.from_activation_cache(cache, capture=EVERYTHING)["text"]
    for layer in a["layer"].values:
        np.testing.assert_allclose(a.attention.sel(layer=layer), cache["pattern", layer], atol=ROUNDING)
        z = a.z.sel(layer=layer).transpose("sample", "query", "head", "dim")
        np.testing.assert_allclose(z, cache["z", layer], atol=ROUNDING)
    assert set(a.variables) == set(b.variables) and a.sizes == b.sizes
    for reading in a.data_vars:
        if a[reading].dtype.kind == "i":
            np.testing.assert_array_equal(a[reading], b[reading])
        else:
            np.testing.assert_allclose(a[reading], b[reading], atol=5e-5, equal_nan=True)
    for label in ("token_fed_id", "token", "kind", "position_in_sample"):
        np.testing.assert_array_equal(a[label], b[label])


def test_pads_are_missing_as_in_our_traces() -> None:
    bridge, specimen = bridged("llama")
    assert specimen.batch is not None
    with torch.no_grad():
        _, cache = bridge.run_with_cache(specimen.batch["input_ids"], attention_mask=specimen.batch["attention_mask"])
        with interp.hooked(bridge, capture=EVERYTHING) as run:
            interp.load(bridge)(specimen.batch)
    theirs = interp.from_activation_cache(cache, specimen.batch, capture=EVERYTHING)["text"]
    assert bool(theirs.entropy.isnull().any()) and not bool(theirs.entropy.isnull().all())
    for reading in ("entropy", "lse", "mass", "received", "attention", "z"):
        np.testing.assert_allclose(run.trace["text"][reading], theirs[reading], atol=5e-5, equal_nan=True)


def test_a_cache_without_scores_model_or_batch() -> None:
    ours, cache = both("llama", interp.Capture(row_stats=True, received=True))
    names = {k: v for k, v in cache.cache_dict.items() if k.endswith(("hook_pattern", "hook_z"))}
    bare = interp.from_activation_cache(names)
    assert "lse" not in bare["text"] and "token_fed" not in bare["text"].coords and "z" in bare["text"]
    np.testing.assert_allclose(ours["text"].entropy, bare["text"].entropy, atol=ROUNDING)
    single = interp.from_activation_cache(cache.remove_batch_dim(), capture=interp.Capture(row_stats=True))
    np.testing.assert_allclose(ours["text"].lse, single["text"].lse, atol=ROUNDING)


def test_layers_and_heads_that_the_cache_has() -> None:
    _, cache = both("llama", EVERYTHING)
    some = {k: v for k, v in cache.cache_dict.items() if ".1." in k}
    assert interp.from_activation_cache(some)["text"]["layer"].values.tolist() == [1]
    chosen = interp.from_activation_cache(cache, capture=interp.Capture(attention=True, heads="L1H2"))["text"]
    np.testing.assert_array_equal(chosen.attention.squeeze(), cache["pattern", 1][0, 2])
    with pytest.raises(CacheError, match=r"layers must be in the cache, which has the patterns of \[1\]; got \[0\]"):
        interp.from_activation_cache(some, capture=interp.Capture(attention=True, layers=[0, 1]))


def test_round_trip() -> None:
    trace, cache = both("llama", interp.Capture(attention=True, z=True, row_stats=True, received=True))
    bridge, _ = bridged("llama")
    back = interp.to_activation_cache(trace, bridge)
    assert type(back) is type(cache) and back.model is bridge
    torch.testing.assert_close(back["embed.hook_in"], cache["embed.hook_in"])
    for layer in range(3):
        for name in ("pattern", "z"):
            torch.testing.assert_close(back[name, layer], cache[name, layer], atol=ROUNDING, rtol=0)
    again = interp.from_activation_cache(back)["text"]
    for reading in ("attention", "z", "entropy", "received", "mass"):
        np.testing.assert_allclose(again[reading], trace["text"][reading], atol=ROUNDING)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5", "vit"])
def test_calls_of_the_bridge_are_traced_and_edited_while_a_session_is_open(name: str) -> None:
    bridge, specimen = bridged(name)
    model, root = interp.load(bridge), bridge.original_model
    before = logits(root, specimen)
    stack = "vision" if name == "vit" else "text"
    with interp.hooked(bridge, capture=interp.Capture(attention=True)) as run:
        torch.testing.assert_close(logits(root, specimen), before, atol=5e-5, rtol=0)
        logits(model, specimen)
    through, direct = (trace[stack].attention for trace in run.traces)
    np.testing.assert_allclose(through, direct, atol=ROUNDING)
    with interp.hooked(model, interventions=[MaskHeads(f"{stack}.L1H0", kind="zero")]):
        edited = logits(root, specimen)
        torch.testing.assert_close(edited, logits(model, specimen), atol=5e-5, rtol=0)
    assert float((edited - before).abs().max()) > 1e-3
    assert torch.equal(logits(root, specimen), before)


@pytest.mark.parametrize(("name", "stack"), [("t5", "encoder"), ("vit", "vision"), ("llava", "vision")])
def test_our_edits_act_where_the_bridge_throws_edits_of_patterns_away(name: str, stack: str) -> None:
    bridge, specimen = bridged(name)
    root = bridge.original_model
    before = logits(root, specimen)

    def first_key(p: torch.Tensor, hook: Any) -> torch.Tensor:
        out = torch.zeros_like(p)
        out[..., 0] = 1
        return out

    part = {"encoder": "encoder_blocks", "vision": "vision_encoder" if name == "llava" else "blocks"}[stack]
    points = [p for n, p in bridge.hook_dict.items() if n.startswith(part) and n.endswith("hook_pattern")]
    assert points
    for point in points:
        point.add_hook(first_key)
    try:
        with pytest.warns(UserWarning, match="edit is discarded"):
            assert torch.equal(logits(root, specimen), before)
    finally:
        for point in points:
            point.remove_hooks()
    with interp.hooked(bridge, interventions=[interp.Temperature(f"{stack}.L0H0-3", 50.0)]):
        assert float((logits(root, specimen) - before).abs().max()) > 1e-3


def test_hooks_that_do_not_fire_in_a_session_are_named() -> None:
    bridge, specimen = bridged("llama")
    with interp.hooked(bridge), pytest.warns(UserWarning, match=r"do not fire, 1 here: blocks\.0\.attn\.hook_z"):
        bridge.run_with_hooks(specimen.inputs["input_ids"], fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 0)])
    seen: list[str] = []
    with interp.hooked(bridge), torch.no_grad():
        names = ["blocks.0.hook_resid_post", "blocks.0.hook_attn_out"]
        hooks = [(n, lambda x, hook: seen.append(hook.name)) for n in names]
        bridge.run_with_hooks(specimen.inputs["input_ids"], fwd_hooks=hooks)
    assert len(seen) == 2


def test_weights_are_shared_not_copied() -> None:
    bridge, specimen = bridged("gpt2")
    module = interp.load(bridge).module
    assert module is plain(bridge) and type(module) is type(bridge.original_model)
    before = logits(module, specimen)
    weight = bridge.blocks[0].mlp.out.weight
    with torch.no_grad():
        weight.mul_(2)
        changed = logits(module, specimen)
        torch.testing.assert_close(changed, logits(bridge.original_model, specimen), atol=1e-4, rtol=1e-4)
        weight.div_(2)
    assert not torch.allclose(changed, before) and torch.equal(logits(module, specimen), before)


def test_processed_weights_and_other_models_are_refused() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module = build("gpt2").module
    bridge = build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=module.config).eval()
    bridge.enable_compatibility_mode(no_processing=True)
    assert interp.load(bridge).module is plain(bridge)
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(LoadError, match="enable_compatibility_mode\\(\\) folded layer norms"):
        interp.load(bridge)
    legacy = type("HookedTransformer", (torch.nn.Module,), {"__module__": "transformer_lens.HookedTransformer"})
    with pytest.raises(LoadError, match="HookedTransformer has weights of its own making"):
        interp.load(legacy())
    with pytest.raises(LoadError, match="must not be given with a loaded model"):
        interp.load(bridged("llama")[0], revision="main")


def test_bad_caches_and_traces() -> None:
    trace, cache = both("llama", interp.Capture(row_stats=True))
    z_only = {k: v for k, v in cache.cache_dict.items() if k.endswith("hook_z")}
    for held, options, error, match in (
        (3, {}, CacheError, "cache must be an ActivationCache or a mapping"),
        (z_only, {}, CacheError, r"cache must hold blocks\.0\.attn\.hook_pattern or decoder_blocks"),
        (cache, {"inputs": torch.zeros(1, 3, dtype=torch.int64)}, CacheError, r"inputs must be ids .* got shape \[1, 3\]"),
        (cache, {"capture": interp.Capture(attention=True, layers=[7])}, CaptureError, "layers must be within 0..2"),
        (cache, {"stack": "encoder"}, CacheError, r"encoder_blocks\.0\.attn\.hook_pattern"),
        ({"blocks.0.attn.hook_pattern": torch.zeros(4, 4)}, {}, CacheError, r"must be \[batch, head, query, key\]"),
        ({k: v for k, v in cache.cache_dict.items() if "hook_z" not in k}, {"capture": EVERYTHING}, CacheError, "z needs"),
        ({k: v for k, v in cache.cache_dict.items() if "hook_v" not in k}, {"capture": EVERYTHING}, CacheError, "needs hook_v"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            interp.from_activation_cache(held, **options)
    with pytest.raises(CacheError, match=r"Capture\(attention=True\) or Capture\(z=True\)"):
        interp.to_activation_cache(trace)
    some, _ = both("llama", interp.Capture(attention=True, heads="L0H1"))
    with pytest.raises(CacheError, match=r"must hold every head, .* got heads \[1\]"):
        interp.to_activation_cache(some)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, _ = both("llama", interp.Capture(attention=True))
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(ImportError, match=r"pip install 'headscope\[lens\]'"):
        interp.to_activation_cache(trace)


def test_heads_and_scores_both_ways() -> None:
    assert interp.heads_to_lens("L3H1,vision.L2H0,L5H0-1") == [(3, 1), (5, 0), (5, 1)]
    assert interp.heads_from_lens([(3, 1), (5, 0)]) == interp.Heads.parse("L3H1,L5H0")
    assert interp.heads_from_lens({5: [0, 2], 3: [1]}, stack="vision") == interp.Heads.parse(
        "vision.L5H0,vision.L5H2,vision.L3H1"
    )
    values = torch.tensor([[0.5, -1.0], [0.25, 1.0]])
    score = interp.scores_from_lens(values, name="induction", missing=-1)
    assert score.heads.top(1) == interp.Heads.parse("L1H1") and np.isnan(score.value[0, 1])
    back = interp.scores_to_lens(score, shape=(3, 2))
    torch.testing.assert_close(back[:2], torch.tensor([[0.5, torch.nan], [0.25, 1.0]]).double(), equal_nan=True)
    assert bool(back[2].isnan().all())
    samples = interp.scores_from_lens(torch.stack([values, values + 1]), name="x")
    assert samples.n.values.tolist() == [[2, 2], [2, 2]]
    with pytest.raises(ScoreError, match=r"at least \(2, 2\), got \(1, 2\)"):
        interp.scores_to_lens(score, shape=(1, 2))


# --- the head detector


def booted(name: str, folder: Path) -> Any:
    """A bridge from a folder, with a tokenizer whose words are w1, w2, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, 96)}}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<s>")
    build(name).module.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_the_head_detector_agrees_with_theirs(name: str, tmp_path: Path) -> None:
    from transformer_lens.head_detector import detect_head

    bridge = booted(name, tmp_path)
    text = " ".join(f"w{i}" for i in [11, 12, 13, 14, 15, 12, 11, 12, 13, 14, 15, 12])
    ids = bridge.to_tokens(text)
    model = interp.load(bridge)
    # A BOS of the bridge's own stands before the text.
    assert ids.shape == (1, 13) and ids[0, 0] == 0
    assert torch.equal(model.encode(text)["input_ids"], ids)
    for pattern in ("previous_token", "duplicate_token", "induction"):
        for options in (
            {},
            {"exclude_bos": True},
            {"exclude_current_token": True},
            {"exclude_bos": True, "exclude_current_token": True},
        ):
            ours = {k.replace("exclude_bos", "exclude_first").replace("_token", ""): v for k, v in options.items()}
            for measure, close in (("mul", 1e-5), ("abs", 5.1e-4)):  # abs is rounded to 3 decimals there
                theirs = detect_head(bridge, text, f"{pattern}_head", error_measure=measure, **options)
                found = head_detector(model, {"input_ids": ids}, pattern, measure=measure, **ours)
                np.testing.assert_allclose(found, theirs, atol=close)
    some = detect_head(bridge, text, "induction_head", heads=interp.heads_to_lens("L1H2,L0H3"))
    assert interp.scores_from_lens(some, name="induction", missing=-1).heads.top(5) in (
        interp.Heads.parse("L1H2,L0H3"), interp.Heads.parse("L0H3,L1H2"),
    )  # fmt: skip
