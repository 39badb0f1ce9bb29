"""HeadVis' data folder: its contract key by key, its metrics by hand, its deciles, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from interp import Capture, Trace, hooked
from interp.exports import ExportError, write_headvis
from interp.exports.headvis import _draw, _sparse
from interp.exports.headvis_metrics import DESCRIPTIONS, Sums, accumulate, entropy, followers
from interp.scores import make_score
from interp.testing import build


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


def trace_of(specimen: Any, seed: int, length: int = 12, batch: int = 1) -> Any:
    ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))
    with hooked(specimen.module, capture=Capture(attention=True)) as run, torch.no_grad():
        specimen.module(input_ids=ids)
    return run.trace


@pytest.fixture(scope="module")
def traces(llama: Any) -> list[Any]:
    return [trace_of(llama, n, 10 + n % 3, 1 + n % 2) for n in range(9)]


def test_the_folder_keeps_the_contract(traces: list[Any], tmp_path: Path) -> None:
    made = make_score(np.arange(12.0).reshape(1, 3, 4), name="mine", unit="nats", paper="none")
    folder = write_headvis(traces, tmp_path / "data", scores=[made], per_interval=1)
    config = read(folder / "config.json")
    pairs = [[layer, head] for layer in range(3) for head in range(4)]
    assert config["heads"] == pairs and (config["n_layers"], config["n_heads"], config["n_intervals"]) == (3, 4, 10)
    assert config["model_name"] == "LlamaForCausalLM" and config["metrics"] == [*DESCRIPTIONS, "mine"]
    assert (
        config["head_data_pattern"] == "L{layer}H{head}.json"
        and config["has_umap"] is False
        and config["umap_heads"] == []
    )
    assert set(config["metric_descriptions"]) == set(config["metrics"])
    rows = read(folder / "scatter_data.json")
    assert [[r["layer"], r["head"]] for r in rows] == pairs and [r["mine"] for r in rows] == list(range(12))
    assert all(isinstance(r[name], float) for r in rows for name in DESCRIPTIONS)
    assert read(folder / "server_config.json") == {} and read(folder / "attributions" / "manifest.json") == {}
    assert sorted(f.name for f in (folder / "heads").iterdir()) == sorted(f"L{i}H{j}.json" for i, j in pairs)
    whole = read(folder / "heads" / "L2H3.json")
    keys = {"sequences", "qk_distance_histogram", "top_query_tokens", "top_key_tokens", "histogram", "statistics"}
    assert set(whole) == keys and whole["statistics"]["sequences"] == 13
    assert [s["interval"] for s in whole["sequences"]] == list(range(10, 0, -1))
    for key in ("qk_distance_histogram", "histogram", *(p["key"] for p in config["custom_plots"])):
        assert len(whole[key]["bin_edges"]) == len(whole[key]["bin_values"]) + 1
    pairs_kept = sum(len(s["attention_values"]) for s in whole["sequences"])
    assert sum(whole["qk_distance_histogram"]["bin_values"]) == pairs_kept
    for table in config["custom_tables"]:
        weights = [entry["weight"] for entry in whole[table["key"]]]
        assert weights == sorted(weights, reverse=True) and sum(weights) == pytest.approx(1, abs=0.01)
    peaks = [s["max_activation"] for s in whole["sequences"]]
    assert peaks == sorted(peaks, reverse=True)


def test_sparse_maps_are_the_maps(llama: Any, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    with hooked(llama.module, capture=Capture(attention=True)) as run, torch.no_grad():
        llama.module(input_ids=ids)
    folder = write_headvis(run.trace, tmp_path / "data", threshold=0.0, heads="L1H2")
    (found,) = read(folder / "heads" / "L1H2.json")["sequences"]
    dense = np.zeros(49)
    dense[found["attention_indices"]] = found["attention_values"]
    p = llama.eager_maps({"input_ids": ids})["text"][1][0, 2].double().numpy()
    np.testing.assert_allclose(dense.reshape(7, 7), p, atol=5.1e-5)
    assert found["seq_len"] == 7 and found["tokens"] == ["5", "6", "7", "8", "5", "6", "7"] and found["interval"] == 10
    inner = p - np.diag(np.diag(p))
    assert found["max_activation"] == pytest.approx(inner[1:, 1:].max(), abs=1e-4)
    row = read(folder / "scatter_data.json")[0]
    # Queries 4, 5, 6 repeat 0, 1, 2: what followed those stands at 1, 2, 3.
    assert row["induction_score"] == pytest.approx((p[4, 1] + p[5, 2] + p[6, 3]) / 7, abs=1e-4)
    assert row["previous_token_score"] == pytest.approx(np.diagonal(p, -1).mean(), abs=1e-4)


def test_metrics_by_hand() -> None:
    p = np.array([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.25, 0.25]])
    sums = Sums()
    accumulate(sums, p, followers(np.array([4, 9, 4])))
    found = sums.means()
    assert found["self_attention_score"] == pytest.approx((1 + 0.75 + 0.25) / 3)
    assert found["previous_token_score"] == pytest.approx(0.25)
    ln = np.log
    rows = [0.0, -(0.25 * ln(0.25) + 0.75 * ln(0.75)), -(0.5 * ln(0.5) + 0.5 * ln(0.25))]
    assert found["pattern_entropy"] == pytest.approx(sum(rows) / 3)
    mean = (0.25 * 1 + 0.5 * 2 + 0.25 * 1) / 3
    assert found["qk_distance"] == pytest.approx(mean)
    assert found["qk_distance_variance"] == pytest.approx((0.25 + 0.5 * 4 + 0.25) / 3 - mean**2)
    # Query 2 repeats token 4 of position 0: what followed is position 1.
    assert found["induction_score"] == pytest.approx(0.25 / 3)
    assert found["top_logit_margin"] == pytest.approx((ln(3) + ln(2)) / 2)
    stds = np.std(ln([0.25, 0.75])), np.std(ln([0.5, 0.25, 0.25]))
    assert found["logit_std"] == pytest.approx(np.mean(stds))
    tops = (ln(0.75) - np.mean(ln([0.25, 0.75]))) / stds[0], (ln(0.5) - np.mean(ln([0.5, 0.25, 0.25]))) / stds[1]
    assert found["logit_z_score"] == pytest.approx(np.mean(tops))
    assert found["query_token_entropy"] is None and entropy({"a": 1.0, "b": 3.0}) == pytest.approx(rows[1])
    assert Sums().means()["logit_std"] is None


def test_scores_before_the_softmax_come_back_from_p() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 6))
    logits[np.triu_indices(6, 1)] = -np.inf
    p = np.exp(logits - logits.max(1, keepdims=True))
    sums = Sums()
    accumulate(sums, p / p.sum(1, keepdims=True), np.zeros((6, 6), bool))
    rows = [logits[q, : q + 1] for q in range(1, 6)]
    assert sums.mean("logit_std") == pytest.approx(np.mean([r.std() for r in rows]))
    assert sums.mean("top_logit_margin") == pytest.approx(np.mean([np.sort(r)[-1] - np.sort(r)[-2] for r in rows]))
    assert sums.mean("logit_z_score") == pytest.approx(np.mean([(r.max() - r.mean()) / r.std() for r in rows]))


def test_patches_repeat_nothing() -> None:
    assert not followers(np.array([-1, -1, -1])).any()
    assert np.argwhere(followers(np.array([7, 7, 8]))).tolist() == [[1, 1]]


def test_deciles_have_equal_size_and_the_highest_is_last() -> None:
    peaks = np.random.default_rng(0).random(200)
    drawn = _draw(peaks, 10, 5, np.random.default_rng(0))
    assert len(drawn) == 50 and sorted(set(drawn.values())) == list(range(1, 11))
    ranks = np.argsort(np.argsort(peaks))
    assert all(ranks[n] // 20 + 1 == interval for n, interval in drawn.items())
    assert _draw([0.3], 10, 5, np.random.default_rng(0)) == {0: 10}
    assert drawn != _draw(peaks, 10, 5, np.random.default_rng(1))


def test_the_largest_of_a_row_are_kept() -> None:
    query, key, weight = _sparse(np.array([[0.1, 0.5, 0.4], [0.004, 0.0, 0.996]]), 2, 0.005)
    assert list(zip(query, key, weight, strict=True)) == [(0, 1, 0.5), (0, 2, 0.4), (1, 2, 0.996)]


def test_saved_traces_and_a_vision_stack(traces: list[Any], tmp_path: Path) -> None:
    kept = [trace.save(tmp_path / f"{n}.zarr") for n, trace in enumerate(traces[:2])]
    one = write_headvis(kept, tmp_path / "saved", heads="L0H0")
    two = write_headvis(traces[:2], tmp_path / "held", heads="L0H0")
    for name in ("config.json", "scatter_data.json", "heads/L0H0.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    vit = build("vit")
    with hooked(vit.module, capture=Capture(attention=True)) as run, torch.no_grad():
        vit.module(**vit.inputs)
    config = read(write_headvis(run.trace, tmp_path / "vit", stack="vision") / "config.json")
    assert config["model_name"].endswith(", vision") and len(config["heads"]) == 12


def test_what_is_there_is_not_replaced(traces: list[Any], tmp_path: Path) -> None:
    folder = write_headvis(traces[0], tmp_path / "data")
    before = (folder / "config.json").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_headvis(traces[0], folder)
    assert (folder / "config.json").stat().st_mtime_ns == before
    write_headvis(traces[0], folder, heads="L0H1", overwrite=True)
    assert [f.name for f in (folder / "heads").iterdir()] == ["L0H1.json"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not HeadVis' data"):
        write_headvis(traces[0], tmp_path / "thesis", overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["data", "thesis"]


def test_bad_input_is_named_before_anything_is_written(llama: Any, traces: list[Any], tmp_path: Path) -> None:
    bare = Trace({"text": xr.Dataset({"entropy": (("sample", "layer", "head", "query"), np.zeros((1, 1, 1, 1)))})})
    other = make_score(np.zeros((1, 2, 4)), name="small", unit="nats", paper="none")
    for arguments, says in (
        (([],), "at least one"), ((bare,), r"Capture\(attention=True\)"), ((traces[0],), "got small without L2H0"),
    ):  # fmt: skip
        with pytest.raises(ExportError, match=says):
            write_headvis(*arguments, tmp_path / "data", scores=[other])
    with pytest.raises(ExportError, match="without L5H0"):
        write_headvis(traces[0], tmp_path / "data", heads="L5H0")
    with pytest.raises(ExportError, match="heads must be of stack"):
        write_headvis(traces[0], tmp_path / "data", heads="vision.L0H0")
    with pytest.raises(ExportError, match="top must be"):
        write_headvis(traces[0], tmp_path / "data", top=0)
    assert list(tmp_path.iterdir()) == []
