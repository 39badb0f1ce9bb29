"""DuoAttention's gates by KV head, and what streams by them."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.duo_files import read_gates, read_windows, streaming, write_gates
from interp.interventions import KVGates, MaskHeads, SinkRecent, Streaming
from interp.scores_files import ScoreFileError
from interp.testing import build

GATES = np.array([[1.0, 0.25], [-1.4e-3, 1.0], [0.5, 1.0]])


@pytest.fixture
def tsv(tmp_path):
    path = tmp_path / "full_attention_heads.tsv"
    np.savetxt(path, GATES, delimiter="\t")
    return path


def test_gates_are_read_clipped_and_written_as_numpy_writes_them(tsv, tmp_path):
    assert np.array_equal(read_gates(tsv), GATES.clip(0, 1))
    write_gates(GATES, tmp_path / "back.tsv")
    assert (tmp_path / "back.tsv").read_bytes() == tsv.read_bytes()


def test_the_windows_beside_them(tsv):
    assert read_windows(tsv) is None
    tsv.with_name("config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256, "lr": 0.02}))
    assert read_windows(tsv) == (128, 256)
    tsv.with_name("config.json").write_text("{}")
    with pytest.raises(ValueError, match="sink_size and recent_size"):
        read_windows(tsv)


def test_which_heads_stream():
    # The smallest over all layers; of equal ones the first.
    assert streaming(GATES, sparsity=0.5).tolist() == [[False, True], [True, False], [True, False]]
    assert streaming(GATES, sparsity=4 / 6).tolist() == [[True, True], [True, False], [True, False]]
    assert streaming(GATES, threshold=0.5).tolist() == [[False, True], [True, False], [False, False]]
    assert not streaming(GATES, sparsity=0.0).any() and streaming(GATES, sparsity=1.0).all()
    for seed in range(5):
        noisy = streaming(GATES, sparsity=4 / 6, method="quantile", seed=seed)
        assert noisy.sum() == 4 and noisy[0, 1] and noisy[1, 0] and noisy[2, 0]
    picks = {streaming(GATES, sparsity=4 / 6, method="quantile", seed=s).tobytes() for s in range(20)}
    assert len(picks) == 3  # one of the three gates of exactly 1


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, "one of sparsity and threshold"),
        ({"sparsity": 0.5, "threshold": 0.5}, "one of sparsity and threshold"),
        ({"sparsity": 1.5}, "sparsity must be a share"),
        ({"sparsity": 0.5, "method": "noise"}, "method must be one of"),
    ],
)
def test_choices_that_cannot_be(settings, what):
    with pytest.raises(ValueError, match=what):
        streaming(GATES, **settings)
    with pytest.raises(ValueError, match="finite numbers"):
        streaming([[np.nan]], sparsity=0.5)


def logits(specimen, *interventions):
    with torch.no_grad(), interp.hooked(specimen.module, interventions=interventions):
        return specimen.module(**specimen.inputs).logits


def test_a_file_is_an_intervention(tsv):
    llama = build("llama")
    settings = {"pattern": SinkRecent(1, 2), "scope": "all"}
    from_file = Streaming.from_tsv(tsv, **settings)
    # GQA: half of the KV heads, each with its two query heads.
    by_hand = Streaming("L0H2,L0H3,L1H0,L1H1,L2H0,L2H1", **settings)
    assert torch.equal(logits(llama, from_file), logits(llama, by_hand))
    assert not torch.allclose(logits(llama, from_file), logits(llama), atol=1e-3)
    assert from_file.describe()["heads"]["gates"] == "full_attention_heads.tsv"
    fewer = Streaming.from_tsv(tsv, threshold=0.1, **settings)
    assert torch.equal(logits(llama, fewer), logits(llama, Streaming("L1H0,L1H1", **settings)))
    # MHA: three quarters.
    gates = np.linspace(0, 1, 12).reshape(3, 4)
    gpt2 = build("gpt2")
    chosen = KVGates(gates).heads(interp.anatomy(gpt2.module))
    assert str(chosen) == "L0H0,L0H1,L0H2,L0H3,L1H0,L1H1,L1H2,L1H3,L2H0"


def test_the_first_prompt_sees_everything_as_deployed(tsv):
    llama = build("llama")
    streams = Streaming.from_tsv(tsv, pattern=SinkRecent(1, 2))
    assert torch.equal(logits(llama, streams), logits(llama))
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = llama.module.generate(**llama.inputs, **options)
    with interp.hooked(llama.module, interventions=[streams]):
        out = llama.module.generate(**llama.inputs, **options)
    assert torch.equal(out.logits[0], plain.logits[0]) and not torch.allclose(out.logits[1], plain.logits[1], atol=1e-3)


def test_a_score_chooses_kv_heads():
    llama = build("llama")
    values = np.array([[0.9, 0.1, 0.2, 0.2], [0.0, 0.0, 0.3, 0.9], [0.8, 0.8, 0.1, 0.5]])
    score = xr.Dataset(
        {"value": (("layer", "head"), values)}, {"layer": range(3), "head": range(4)}, {"name": "retrieval"}
    )
    shape = interp.anatomy(llama.module)
    names = lambda **s: str(Streaming.from_score(score, **s).resolve(shape))  # noqa: E731
    assert names(share=1 / 3) == "L0H2,L0H3,L1H0,L1H1"
    assert names(threshold=0.35, reduce="mean") == "L0H2,L0H3,L1H0,L1H1,L2H2,L2H3"
    assert names(threshold=0.35) == "L0H2,L0H3,L1H0,L1H1"
    with pytest.raises(ValueError, match="one of share and threshold"):
        Streaming.from_score(score)
    # A layer without softmax heads has no score, and nothing that streams.
    hybrid = build("qwen3_next")
    values = np.full((4, 4), np.nan)
    values[1], values[3] = 0.1, 0.2
    score = xr.Dataset({"value": (("layer", "head"), values)}, {"layer": range(4), "head": range(4)})
    streams = Streaming.from_score(score, share=0.5)
    assert {h.layer for h in streams.resolve(interp.anatomy(hybrid.module))} == {1}


def test_a_file_of_another_shape_is_refused_before_the_model_runs(tsv):
    with pytest.raises(
        ValueError, match=r"\[layer, KV head\] \(3, 4\) for GPT2LMHeadModel, got \(3, 2\) full_attention_heads.tsv"
    ):
        interp.hooked(build("gpt2").module, interventions=[Streaming.from_tsv(tsv)])
    tsv.write_text("1.0\t0.5\n0.5\n")
    with pytest.raises((ScoreFileError, ValueError)):
        Streaming.from_tsv(tsv)
    tsv.write_text("one\ttwo\n")
    with pytest.raises(ScoreFileError, match="no DuoAttention table"):
        Streaming.from_tsv(tsv)
    with pytest.raises(FileNotFoundError):
        Streaming.from_tsv(tsv.with_name("none.tsv"))


def test_a_plan_of_moa_is_read(tmp_path):
    from interp.interventions import Spans

    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"alphas": [[2, 3]], "betas": [[0.5, 0.0]]}))
    spans = Spans.from_json(path, sink=1, length=8)
    assert spans.alphas.tolist() == [[2.0, 3.0]] and spans.betas.tolist() == [[0.5, 0.0]] and spans.length == 8
    path.write_text("[]")
    with pytest.raises(ValueError, match="alphas and betas"):
        Spans.from_json(path)


def test_masking_and_streaming_of_one_head_leave_its_zero():
    llama = build("llama")
    both = logits(llama, MaskHeads("L1H0"), Streaming("L1H0", pattern=SinkRecent(1, 1), scope="all"))
    assert torch.allclose(both, logits(llama, MaskHeads("L1H0")), atol=1e-4)
