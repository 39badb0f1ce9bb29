"""BertViz and CircuitsVis: what they are given is the model's own eager map, and the real packages take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp import Capture, hooked
from interp.exports import ExportError, bertviz_inputs, circuitsvis_inputs
from interp.testing import build


def traced(specimen: Any, inputs: Any = None, **capture: Any) -> Any:
    with hooked(specimen.module, capture=Capture(**{"attention": True, **capture})) as run, torch.no_grad():
        specimen.module(**(inputs or specimen.inputs))
    return run.trace


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_bertviz_gets_the_librarys_own_maps(name: str) -> None:
    specimen = build(name)
    (stack,) = specimen.stacks
    got = bertviz_inputs(traced(specimen))
    assert set(got) == {"attention", "tokens"} and isinstance(got["attention"], tuple)
    eager = specimen.eager_maps()[stack]
    assert len(got["attention"]) == len(eager)
    for ours, theirs in zip(got["attention"], eager, strict=True):
        assert ours.shape == theirs.shape and ours.shape[-1] == len(got["tokens"])
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_pads_are_left_out(llama: Any) -> None:
    trace = traced(llama, llama.batch)
    short = {"input_ids": llama.batch["input_ids"][1:, 7:], "attention_mask": llama.batch["attention_mask"][1:, 7:]}
    assert short["attention_mask"].all()
    got, alone = bertviz_inputs(trace, sample=1), bertviz_inputs(traced(llama, short))
    assert got["tokens"] == alone["tokens"] and len(got["tokens"]) == short["input_ids"].shape[1]
    for ours, single in zip(got["attention"], alone["attention"], strict=True):
        torch.testing.assert_close(ours, single, atol=2e-6, rtol=0)
        torch.testing.assert_close(ours.sum(-1), torch.ones(ours.shape[:-1]))


def test_layers_without_softmax_are_named() -> None:
    got = bertviz_inputs(traced(build("lfm2")))
    assert len(got["attention"]) == 4 and got["include_layers"] == [1, 3]
    assert got["attention"][0].shape == got["attention"][1].shape and got["attention"][0].isnan().all()
    assert not got["attention"][1].isnan().any()


def test_layers_not_captured_are_named(llama: Any) -> None:
    got = bertviz_inputs(traced(llama, layers=(1,)))
    assert len(got["attention"]) == 2 and got["include_layers"] == [1]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoder(name: str) -> None:
    specimen = build(name)
    got = bertviz_inputs(traced(specimen))
    n_encoder, n_decoder = len(got["encoder_tokens"]), len(got["decoder_tokens"])
    assert got["encoder_attention"][0].shape[2:] == (n_encoder, n_encoder)
    assert got["decoder_attention"][0].shape[2:] == (n_decoder, n_decoder)
    assert got["cross_attention"][0].shape[2:] == (n_decoder, n_encoder)
    # 3 encoder and 2 decoder layers: BertViz would ask the decoder for the encoder's third.
    assert got["include_layers"] == [0, 1]
    with pytest.raises(ExportError, match="leave stack out"):
        bertviz_inputs(traced(specimen), "cross")
    assert len(bertviz_inputs(traced(specimen), "encoder")["attention"]) == 3


@pytest.mark.parametrize("name", ["llama", "lfm2", "t5"])
def test_bertviz_itself_takes_them(name: str) -> None:
    bertviz = pytest.importorskip("bertviz", reason="the package bertviz is not installed")
    got = bertviz_inputs(traced(build(name)))
    for view in (bertviz.head_view, bertviz.model_view):
        assert "attn" in view(**got, html_action="return").data


def test_a_generated_trace_has_all_rows(llama: Any) -> None:
    with hooked(llama.module, capture=Capture(attention=True)) as run:
        llama.module.generate(**llama.inputs, max_new_tokens=4, min_new_tokens=4)
    got = bertviz_inputs(run.trace)
    n = llama.inputs["input_ids"].shape[1] + 3
    assert got["attention"][0].shape[-2:] == (n, n) and len(got["tokens"]) == n
    torch.testing.assert_close(got["attention"][2].sum(-1), torch.ones(1, 4, n))


def test_circuitsvis_gets_heads_in_the_order_asked_for(llama: Any) -> None:
    trace = traced(llama)
    maps = llama.eager_maps()["text"]
    got = circuitsvis_inputs(trace, "L2H3,L0H1")
    assert got["attention_head_names"] == ["L2H3", "L0H1"] and got["mask_upper_tri"] is True
    torch.testing.assert_close(got["attention"], torch.stack([maps[2][0, 3], maps[0][0, 1]]), atol=2e-6, rtol=0)
    whole = circuitsvis_inputs(trace, layer=1)
    torch.testing.assert_close(whole["attention"], maps[1][0], atol=2e-6, rtol=0)
    assert whole["attention_head_names"] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert circuitsvis_inputs(traced(build("vit")), layer=0, stack="vision")["mask_upper_tri"] is False


def test_circuitsvis_itself_takes_them(llama: Any) -> None:
    circuitsvis = pytest.importorskip("circuitsvis", reason="the package circuitsvis is not installed")
    got = circuitsvis_inputs(traced(llama), layer=1)
    assert "AttentionHeads" in str(circuitsvis.attention.attention_heads(**got))
    two = {key: got[key] for key in ("tokens", "attention")}
    assert "AttentionPatterns" in str(circuitsvis.attention.attention_patterns(**two))


def test_what_is_missing_is_named(llama: Any) -> None:
    bare = traced(llama, attention=False, row_stats=True)
    with pytest.raises(ExportError, match=r"trace again with Capture\(attention=True\). Captured here: .*entropy"):
        bertviz_inputs(bare)
    with pytest.raises(ExportError, match="attention=True"):
        circuitsvis_inputs(bare, layer=0)
    trace = traced(llama)
    with pytest.raises(ExportError, match=r"stack must be one of \['text'\], got 'vision'"):
        bertviz_inputs(trace, "vision")
    with pytest.raises(ExportError, match=r"sample must be one of 0\.\.0, got 1"):
        bertviz_inputs(trace, sample=1)
    with pytest.raises(ExportError, match="queries='all'; got 1 rows"):
        bertviz_inputs(traced(llama, queries="last"))
    with pytest.raises(ExportError, match="numbers from 0; got L0H1,L0H2,L1H1,L1H2"):
        bertviz_inputs(traced(llama, heads="L0H1,L0H2,L1H1,L1H2"))
    with pytest.raises(ExportError, match="one of heads and layer"):
        circuitsvis_inputs(trace)
    with pytest.raises(ExportError, match="of one stack"):
        circuitsvis_inputs(trace, "L0H0,vision.L0H0")
    with pytest.raises(ExportError, match="got L7H0 and a trace with L0H0"):
        circuitsvis_inputs(trace, "L7H0")
    assert circuitsvis_inputs(traced(llama, heads="L0H1,L2H0"), "L0H1")["attention"].isfinite().all()
