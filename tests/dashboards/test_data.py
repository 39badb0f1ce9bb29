"""What the page is given, against the model itself and by hand, through the addresses that the page asks."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from dashboards import embedding
from dashboards.app import code_sheet
from dashboards.code import show_code
from dashboards.dissect import kind_parts
from dashboards.errors import PageError
from dashboards.forcing import answer_log_probs, forced_inputs
from dashboards.generation import matched_random, token_diff, verdict
from dashboards.metrics import metrics_of, pooled_mean, received_mean
from dashboards.overview import cluster_order
from dashboards.runs import Run, run_id
from dashboards.workspace import Workspace
from interp.heads import Heads
from tests.dashboards.conftest import PROMPT, Client, bundled, picture, synthetic_trace


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


@pytest.fixture(scope="module")
def run(client: Client) -> str:
    return client.run()


def eager(model: Any, layer: int, head: int, ids: list[int]) -> np.ndarray:
    before = model.module.config._attn_implementation
    model.module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model.module(torch.tensor([ids]), output_attentions=True)
    finally:
        model.module.set_attn_implementation(before)
    return out.attentions[layer][0, head].numpy()


# -- metrics by hand


def test_metrics_by_hand() -> None:
    row = ("sample", "layer", "head", "query")
    data = xr.Dataset(
        {
            "entropy": (row, [[[[0.0, 0.5, np.nan]]]]),
            "top_key": (row, np.array([[[[0, 0, -1]]]])),
            "received": (("sample", "layer", "head", "query_group", "key"), [[[[[2.0, 0.5, 0.5]]]]]),
            "received_rows": (("sample", "layer", "head", "query_group", "key"), [[[[[3, 2, 1]]]]]),
            "mass": ((*row, "group"), [[[[[1.0, 0.0], [0.5, 0.5], [np.nan, np.nan]]]]]),
        },
        coords={"layer": [2], "head": [0], "query": [0, 1, 2], "key": [0, 1, 2], "group": ["special", "image"]},
    )
    found = {m.key: float(m.values(data).values[0, 0]) for m in metrics_of(data)}
    assert found == pytest.approx(
        {"entropy": 0.25, "first_key": 2 / 3, "reach": 0.5, "mass_special": 0.75, "mass_image": 0.25}
    )
    np.testing.assert_allclose(received_mean(data).values.ravel(), [2 / 3, 0.25, 0.5])


def test_pooled_maps_become_mean_rows() -> None:
    # 5 rows in blocks of 2: the last block has one row.
    pooled = np.array([[[[[2.0, 0, 0], [1, 1, 0], [0.2, 0.3, 0.5]]]]], np.float32)
    data = xr.Dataset(
        {"pooled": (("sample", "layer", "head", "query_block", "key_block"), pooled)},
        coords={"layer": [0], "head": [0], "query": range(5), "phase": ("query", ["prefill"] * 5), "block_edge": 2},
    )
    np.testing.assert_allclose(pooled_mean(data)[0, 0], [[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])


def test_clustering_puts_alike_maps_side_by_side() -> None:
    a, b = np.eye(8, dtype=np.float32), np.full((8, 8), 1 / 8, np.float32)
    order = cluster_order(np.stack([np.stack([a, b, a, b]), np.stack([b, b, a, a])]))
    kinds = [["abab"[i] for i in order[0]], ["bbaa"[i] for i in order[1]]]
    assert kinds[0] == kinds[1] and kinds[0] in (list("aabb"), list("bbaa")), "one axis for every layer"


# -- runs


def test_a_run_is_known_by_what_it_is_of(client: Client, run: str) -> None:
    info = client.json(f"run/{run}")
    assert info["stacks"]["text"] | {"kv_group": 0} == {
        "layers": 3, "heads": 4, "queries": 9, "keys": 9, "pooled": True, "full": True, "kv_group": 0,
    }  # fmt: skip
    assert info["tokens"]["text"]["keys"][:6] == PROMPT.split() or info["tokens"]["text"]["keys"][1:7] == PROMPT.split()
    again = client.post("run", {"model": "tiny-llama", "prompt": PROMPT, "max_new_tokens": 4})
    assert again == {"run": run, "job": None}, "the same wish is the same run, not traced twice"


def test_maps_rows_and_columns_are_the_models(client: Client, run: str, model: Any) -> None:
    found = client.space.run(run)
    expected = eager(model, 2, 1, found.ids[:-1])
    meta = client.json(f"run/{run}/map/text/2/1")
    assert (meta["rows"], meta["columns"], meta["pooled"], meta["head"]) == (*expected.shape, False, "L2H1")
    row = np.frombuffer(client.get(f"run/{run}/line/text/2/1?q=5").data, "<f4")
    np.testing.assert_allclose(row, expected[5], atol=1e-5)
    column = np.frombuffer(client.get(f"run/{run}/line/text/2/1?k=0").data, "<f4")
    np.testing.assert_allclose(column, expected[:, 0], atol=1e-5)
    normal = np.frombuffer(client.get(f"run/{run}/line/text/2/1?q=5&norm=1").data, "<f4")
    np.testing.assert_allclose(normal, expected[5] / expected[5].max(), atol=1e-5)
    tile = client.get(f"run/{run}/tile/text/2/1.png?x0=2&x1=5&y0=1&y1=4&w=800")
    assert tile.headers["X-Tile"] == "2,5,1,4,1" and "immutable" in tile.headers["Cache-Control"]
    import io

    saved = np.load(io.BytesIO(client.get(f"run/{run}/npz/text/2/1.npz").data), allow_pickle=False)
    np.testing.assert_allclose(saved["attention"], expected, atol=1e-5)
    ranks = {n["key"]: (n["rank"], n["of"]) for n in meta["numbers"]}
    assert ranks["p:entropy"][1] == 12 and 1 <= ranks["p:entropy"][0] <= 12


def test_a_head_that_was_not_traced_whole_is_run_again(client: Client, run: str, model: Any) -> None:
    found = client.space.run(run)
    bare = interp.Trace({"text": found.trace["text"].drop_vars("attention")}, found.trace.attrs)
    again = Run("ab" * 8, found.spec, bare, "bare", ids=found.ids, prompt_length=found.prompt_length)
    client.space.keep_run(again)
    row = np.frombuffer(client.get(f"run/{again.id}/line/text/1/3?q=7").data, "<f4")
    np.testing.assert_allclose(row, eager(model, 1, 3, found.ids[:-1])[7], atol=1e-5)
    assert client.json(f"run/{again.id}/map/text/1/3")["pooled"] is False
    del client.space.runs[again.id]


def test_overview_numbers_and_their_table(client: Client, run: str) -> None:
    data = client.json(f"run/{run}/overview/text")
    assert (data["layers"], data["heads"], data["pooled"]) == (3, 4, [6, 6]) and len(data["order"]) == 3
    entropy = next(m for m in data["metrics"] if m["key"] == "p:entropy")
    trace = client.space.run(run).trace["text"]
    np.testing.assert_allclose(
        floats(entropy["values"]).reshape(3, 4), trace["entropy"].isel(sample=0).mean("query"), rtol=1e-5
    )
    names = {m["name"] for m in data["metrics"] if m["key"].startswith("s:")}
    assert names == {info.name for info in interp.scores() if "text" in info.stacks or "any" in info.stacks}
    lines = client.get(f"run/{run}/table/text.csv").text.splitlines()
    assert len(lines) == 13 and lines[1].startswith("L0H0,0,0,") and "entropy" in lines[0]
    assert client.get(f"run/{run}/sprite/text.png").data[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_score_is_computed_as_a_job_and_kept(client: Client, run: str, model: Any, tmp_path: Path) -> None:
    job = client.finish("score", {"run": run, "score": "previous_token"})
    assert job.state == "done" and job.done == job.total > 0, job.error
    entry = next(m for m in client.json(f"run/{run}/overview/text")["metrics"] if m["key"] == "s:previous_token")
    expected = interp.score("previous_token", model, progress=False)["value"].values
    assert entry["ready"] and entry["n"] > 0
    np.testing.assert_allclose(floats(entry["values"]).reshape(3, 4), expected, atol=1e-6)
    later = Workspace({"tiny-llama": model}, state=client.space.state)
    assert later.score("tiny-llama", "previous_token") is not None, "the next process has it too"
    later.close()
    refused = client.finish("score", {"run": run, "score": "nonsense"})
    assert refused.state == "failed" and "score must be one of" in refused.error


def test_sinks_by_hand(client: Client) -> None:
    found = Run("cd" * 8, {}, synthetic_trace(3, 4, keys=64, missing=(1,)), "synthetic")
    client.space.keep_run(found)
    data = client.json(f"run/{found.id}/sinks/text?threshold=0.3")
    assert data["n_sinks"] == 1 and data["keys"][0] | {"mass": 0} == {
        "position": 0,
        "token": "t0",
        "kind": 0,
        "share": 1.0,
        "mass": 0,
    }
    assert data["keys"][0]["mass"] == pytest.approx(0.6, abs=1e-6)
    on = floats(data["on_sinks"]).reshape(3, 4)
    np.testing.assert_allclose(on[[0, 2]], 0.6, atol=1e-6)
    assert np.isnan(on[1]).all(), "a layer without such heads is missing, not 0"
    assert client.json(f"run/{found.id}/sinks/text?threshold=0.7")["n_sinks"] == 0
    client.json(f"run/{found.id}/sinks/text?threshold=7", 400)
    client.json(f"run/{found.id}/sinks/text?rows=nonsense", 400)
    exists = floats(client.json(f"run/{found.id}/overview/text")["exists"]).reshape(3, 4)
    assert np.isnan(exists[1]).all() and (exists[[0, 2]] == 1).all()
    client.json(f"run/{found.id}/map/text/1/0", 404)


def test_maps_of_heads() -> None:
    found = Run("ef" * 8, {}, synthetic_trace(4, 8), "synthetic")
    places = embedding.embed(found, "text")
    assert places["index"] == list(range(32)) and len(places["x"]) == 32
    index, table = embedding.features(found, "text")
    centred = table - table.mean(0)
    *_, vt = np.linalg.svd(centred, full_matrices=False)
    assert np.abs(np.corrcoef(places["x"], centred @ vt[0])[0, 1]) == pytest.approx(1, abs=1e-3)
    with pytest.raises(PageError, match="method must be one of"):
        embedding.embed(found, "text", "nonsense")
    kinds = embedding.archetypes(found, "text", 4)
    assert sorted(i for a in kinds["archetypes"] for i in a["heads"]) == index.tolist()


def test_kmeans_finds_what_is_apart() -> None:
    points = np.concatenate([np.random.default_rng(n).normal(5 * n, 0.1, (20, 3)) for n in range(3)]).astype(np.float32)
    labels = embedding.kmeans(points, 3, 0)
    assert [len(set(labels[i : i + 20])) for i in (0, 20, 40)] == [1, 1, 1] and len(set(labels)) == 3


# -- answers


def test_answers_log_probabilities_are_the_models(client: Client, run: str, model: Any) -> None:
    found = client.space.run(run)
    inputs = model.encode(PROMPT)
    answer = found.ids[found.prompt_length :]
    with torch.no_grad():
        logits = model.module(torch.tensor([found.ids])).logits[0].double().log_softmax(-1)
    expected = [float(logits[found.prompt_length - 1 + n, token]) for n, token in enumerate(answer)]
    np.testing.assert_allclose(answer_log_probs(model, inputs, answer), expected, atol=1e-5)
    longer = forced_inputs(inputs, [5, 6])
    assert (
        longer["input_ids"][0, -2:].tolist() == [5, 6]
        and longer["attention_mask"].sum() == longer["input_ids"].shape[1]
    )


def test_before_and_after(client: Client, model: Any) -> None:
    kept = {k: v.clone() for k, v in model.module.state_dict().items()}
    spec = {"model": "tiny-llama", "prompt": PROMPT, "max_new_tokens": 6}
    mask = {"name": "MaskHeads", "settings": {"heads": "L0H1,L2H3"}}
    job = client.finish("generate", spec | {"interventions": [mask]})
    assert job.state == "done", job.error
    result = job.result
    inputs = model.encode(PROMPT)
    plain = model.generate(inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    with interp.hooked(model, interventions=[interp.MaskHeads("L0H1,L2H3")]):
        changed = model.generate(inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert result["ids"] == {"before": plain, "after": changed}
    expected = answer_log_probs(model, inputs, plain, [interp.MaskHeads("L0H1,L2H3")]) - answer_log_probs(
        model, inputs, plain
    )
    assert result["effect"]["change"] == pytest.approx(expected.sum(), abs=1e-6)
    assert len(result["effect"]["random"]) == 5 and "random heads" in result["verdict"]
    for other in result["effect"]["random"]:
        drawn = Heads.parse(other["heads"])
        assert not set(drawn) & {*Heads.parse("L0H1,L2H3")} and sorted(h.layer for h in drawn) == [0, 2]
    assert all(torch.equal(kept[k], v) for k, v in model.module.state_dict().items())
    # Each side is a run of its own, and the changed head is changed in it.
    info = client.json(f"run/{result['runs']['after']}")
    assert info["interventions"] == [mask]

    saved = client.post(f"job/{job.id}/save")["saved"]
    assert client.json(f"saved/{saved}")["result"]["text"] == result["text"]
    assert [e["value"] for e in client.json("saved")["saved"]] == [saved]


def test_no_effect_is_said_plainly(client: Client) -> None:
    spec = {"model": "tiny-llama", "prompt": PROMPT, "max_new_tokens": 4}
    nothing = client.finish("generate", spec | {"interventions": []})
    assert nothing.result["same"] and nothing.result["verdict"].startswith("No effect: the same tokens")
    neutral = client.finish(
        "generate", spec | {"interventions": [{"name": "ScaleHeads", "settings": {"heads": "L0H0", "gain": 1}}]}
    )
    assert neutral.result["verdict"].startswith("No effect"), neutral.error
    found = {"same": False, "effect": {"change": -1.0, "random": [{"change": -2.0}, {"change": 0.5}]}}
    assert "No effect beyond that of random heads" in verdict(found)
    found["effect"]["change"] = -9.0
    assert "More than random heads do" in verdict(found)
    found["effect"]["change"] = 1.0
    assert "Outside what random heads do" in verdict(found)


def test_a_failing_or_stopped_generation_leaves_the_model_as_it_was(client: Client, model: Any) -> None:
    inputs = model.encode(PROMPT)
    with torch.no_grad():
        before = model.module(**inputs).logits.clone()
    spec = {"model": "tiny-llama", "prompt": PROMPT, "max_new_tokens": 8}
    bad = client.finish("generate", spec | {"interventions": [{"name": "VHR", "settings": {}}]})
    assert (bad.state == "failed" and "VHR" in bad.error) or "image" in bad.error
    job = client.space.queue.get(
        client.post(
            "generate",
            spec | {"max_new_tokens": 64, "interventions": [{"name": "MaskHeads", "settings": {"heads": "L0H*"}}]},
        )["job"]
    )
    for entry in client.space.queue.events(0, keep_alive=2):
        if entry is None or (
            entry[1] == "token" and json.loads(entry[2])["job"] == job.id and json.loads(entry[2])["n"] >= 2
        ):
            break
    client.post(f"job/{job.id}/cancel")
    assert client.space.queue.wait(job, 20).state == "cancelled"
    with torch.no_grad():
        after = model.module(**inputs).logits
    assert torch.equal(before, after) and interp.reset(model) == 0


def test_sampling_follows_its_seed(client: Client) -> None:
    spec = {
        "model": "tiny-llama",
        "prompt": PROMPT,
        "max_new_tokens": 8,
        "do_sample": True,
        "temperature": 2.0,
        "interventions": [],
    }
    texts = [client.finish("generate", spec | {"seed": seed}).result["ids"]["before"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"interventions": [{"name": "Nonsense"}]}, "intervention must be one of"),
        ({"interventions": [{"name": "MaskHeads", "settings": {}}]}, "MaskHeads needs heads"),
        ({"interventions": [{"name": "MaskHeads", "settings": {"heads": "what"}}]}, "heads must be"),
        ({"interventions": [{"name": "MaskHeads", "settings": {"heads": "L0H0", "kind": "half"}}]}, "kind must be one of"),
        ({"interventions": [{"name": "MaskHeads", "settings": {"other": 1}}]}, "settings of MaskHeads must be among"),
        ({"interventions": [{"name": "Custom", "settings": {}}]}, "cannot be made from JSON"),
        ({"interventions": "all"}, "interventions must be a list"),
        ({"seed": -1}, "seed must be"), ({"temperature": 0}, "temperature must be"), ({"max_new_tokens": 5000}, "max_new_tokens must be"),
        ({"max_new_tokens": True}, "max_new_tokens must be"), ({"prompt": 7}, "prompt must be"), ({"model": ""}, "model must be picked"),
        ({"image": "ff" * 32}, "image is not there any more"),
    ],
)  # fmt: skip
def test_bad_wishes_are_refused_before_the_model_runs(client: Client, change: dict[str, Any], words: str) -> None:
    said = client.http.post(
        "/api/generate",
        json={"model": "tiny-llama", "prompt": PROMPT, **change},
        headers={"Host": "127.0.0.1", "X-Headscope": "1"},
    )
    assert said.status_code >= 400 and re.search(words, said.json["error"]), said.json


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"prompt": " ".join(["w10"] * 5000)}, "prompt must have at most"), ({"prompt": ""}, "prompt must not be empty"),
        ({"interventions": [{"name": "MaskHeads", "settings": {"heads": "L9H0"}}]}, "L9H0"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit_are_told(client: Client, spec: dict[str, Any], words: str) -> None:
    job = client.finish("run", {"model": "tiny-llama", "prompt": PROMPT, "max_new_tokens": 0} | spec)
    assert job.state == "failed" and words in job.error


def test_a_model_that_does_not_load_is_told_and_the_next_one_works(client: Client) -> None:
    root = client.space.roots[0]
    (root / "broken").mkdir(exist_ok=True)
    (root / "broken" / "config.json").write_text("{ this is no JSON", encoding="utf-8")
    job = client.finish("run", {"model": str(root / "broken"), "prompt": "x"})
    assert job.state == "failed" and "broken" in job.error
    assert client.run(prompt="w20 w21")


def test_out_of_memory_is_told(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import dashboards.workspace as w

    def none_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(w, "trace_prompt", none_left)
        job = client.finish("run", {"model": "tiny-llama", "prompt": "w30 w31"})
    assert job.state == "failed" and "out of memory: tried to allocate 80 GiB" in job.error
    assert client.run(prompt="w30 w31"), "the page goes on"


def test_saved_traces_open_and_one_that_is_deleted_is_told(client: Client) -> None:
    root = client.space.roots[0]
    path = synthetic_trace(3, 4).save(root / "kept.zarr")
    entry = next(r for r in client.json("models")["runs"] if r["label"] == "saved: kept.zarr")
    assert entry["value"] == run_id({"trace": str(path)})
    info = client.json(f"run/{entry['value']}")
    assert info["saved"] and info["stacks"]["text"]["full"] is False
    meta = client.json(f"run/{entry['value']}/map/text/0/0")
    assert meta["pooled"] and meta["rows"] == 32 and meta["edge"] == 2
    client.json(f"run/{entry['value']}/activations", 409)
    (path / "zarr.json").write_text("{}", encoding="utf-8")
    del client.space.runs[entry["value"]]
    assert "kept.zarr cannot be opened" in client.json(f"run/{entry['value']}", 410)["error"]
    shutil.rmtree(path)
    synthetic_trace(3, 4).save(path)
    client.json(f"run/{entry['value']}")
    shutil.rmtree(path)
    assert "was deleted while it was open" in client.json(f"run/{entry['value']}", 410)["error"]


def test_a_run_that_is_gone_is_made_again_from_its_address(client: Client) -> None:
    found = client.run(prompt="w40 w41 w42")
    del client.space.runs[found]
    client.json(f"run/{found}", 404)
    made = client.post(f"run/{found}/reopen")
    assert made["run"] == found and client.space.queue.wait(client.space.queue.get(made["job"]), 30).state == "done"
    assert client.json(f"run/{found}")["prompt"] == "w40 w41 w42"
    assert "is not known here" in client.post("run/abcdef12/reopen", status=404)["error"]


# -- parts


def test_parts_of_a_head() -> None:
    parts = kind_parts([0, 1, 1])
    assert list(parts) == ["special keys", "text keys", "all but special keys", "all but text keys", "all"]
    assert parts["text keys"].tolist() == [[False, True, True]] * 3 and parts["all"].all()
    assert list(kind_parts([1, 1])) == ["all"]


def test_a_head_taken_apart(client: Client, run: str, model: Any) -> None:
    job = client.finish("dissect", {"run": run, "head": "L1H2"})
    assert job.state == "done", job.error
    rows = {row["name"]: row for row in job.result["rows"]}
    found = client.space.run(run)
    answer = found.ids[found.prompt_length :]
    inputs = model.encode(PROMPT)
    plain = answer_log_probs(model, inputs, answer)
    masked = answer_log_probs(model, inputs, answer, [interp.MaskHeads("L1H2")])
    assert rows["all"]["change"] == pytest.approx((masked - plain).sum(), abs=1e-5)
    assert rows["all"]["zeroed"] == pytest.approx(rows["all"]["renormalised"]) and rows["all"]["mass"] == pytest.approx(
        1
    )
    without = [interp.Knockout("text", "all", kind="zero", heads="L1H2")]
    blocked = answer_log_probs(model, inputs, answer, without)
    assert rows["text keys"]["change"] == pytest.approx((blocked - plain).sum(), abs=1e-4)
    assert rows["text keys"]["mass"] + rows["all but text keys"]["mass"] == pytest.approx(1, abs=1e-5)
    assert "no head L7H0" in client.post("dissect", {"run": run, "head": "L7H0"}, 404)["error"]


def test_the_autoencoders_training_is_cancelled_midway(client: Client) -> None:
    found = Run("bd" * 8, {}, synthetic_trace(4, 6), "synthetic")
    client.space.keep_run(found)
    job = client.space.queue.get(client.post("archetypes", {"run": found.id, "stack": "text"})["job"])
    began = time.monotonic()
    while job.done < 2 and not job.ended and time.monotonic() - began < 30:
        time.sleep(0.01)
    client.post(f"job/{job.id}/cancel")
    assert client.space.queue.wait(job, 30).state == "cancelled" and 2 <= job.done < job.total


def test_a_job_of_an_earlier_process_traces_its_run_again(client: Client) -> None:
    found = client.run(prompt="w70 w71 w72")
    del client.space.runs[found]
    job = client.space.queue.submit("dissect", "left over", {"run": found, "head": "L0H0"}, 4, partial={"rows": []})
    assert client.space.queue.wait(job, 60).state == "done" and found in client.space.runs, job.error
    lost = client.space.queue.submit("dissect", "lost", {"run": "abcdef12", "head": "L0H0"}, 4)
    assert "not there any more" in client.space.queue.wait(lost, 60).error


def test_archetypes_of_the_autoencoder(client: Client) -> None:
    pytest.importorskip("sklearn")
    found = Run("bc" * 8, {}, synthetic_trace(4, 6), "synthetic")
    client.space.keep_run(found)
    index, maps = embedding.square_maps(found, "text")
    assert maps.shape == (24, 32, 32)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-9)
    assert client.json(f"run/{found.id}/archetypes/text")["note"].startswith("k-means")
    job = client.finish("archetypes", {"run": found.id, "stack": "text"})
    assert job.state == "done", job.error
    got = client.json(f"run/{found.id}/archetypes/text")
    assert (
        got["note"].startswith("autoencoder")
        and sorted(i for a in got["archetypes"] for i in a["heads"]) == index.tolist()
    )


def test_examples_are_rows_of_other_texts(client: Client) -> None:
    found = client.run()
    rows = client.json(f"run/{found}/examples/text/1/1")["examples"]
    assert all(r["weight"] <= rows[0]["weight"] and 0 <= r["key"] <= r["query"] < len(r["tokens"]) for r in rows)


def test_a_probe_with_and_without(client: Client) -> None:
    recall = bundled("recall-lm")
    client.space.sources = (*client.space.sources, recall)
    body = {"model": recall, "prompt": "", "probe": "KeyValueTokens", "n": 4, "interventions": []}
    from dashboards.evaluate import judged_probes

    names = [entry["value"] for entry in judged_probes()]
    body["probe"] = "NeedleStrings" if "NeedleStrings" in names else names[0]
    job = client.finish(
        "evaluate", body | {"interventions": [{"name": "ScaleHeads", "settings": {"heads": "L0H*", "gain": 0}}]}
    )
    assert job.state == "done", job.error
    got = job.result
    assert got["n"] == 4 and got["plain"] == np.mean([row[0] for row in got["rows"]]) and got["lost"] >= 0
    assert got["plain_interval"][0] <= got["plain"] <= got["plain_interval"][1]
    assert client.finish("evaluate", body | {"probe": "nonsense"}).error.startswith("probe must be one of")
    assert "n must be" in client.finish("evaluate", body | {"n": 100000}).error


# -- helpers


def test_random_heads_match_layer_by_layer() -> None:
    chosen = Heads.parse("L0H0,L0H1,L2H3,vision.L1H0")
    drawn = matched_random(chosen, {"text": (3, 4), "vision": (2, 2)}, 0)
    assert not set(drawn) & set(chosen)
    assert [(h.stack, h.layer) for h in drawn] == [("text", 0), ("text", 0), ("text", 2), ("vision", 1)]
    assert matched_random(chosen, {"text": (3, 4), "vision": (2, 2)}, 0) == drawn
    assert len(matched_random(Heads.parse("L0H0,L0H1,L0H2"), {"text": (1, 4)}, 0)) == 1, "only one other head is left"


def test_token_diff() -> None:
    rows = token_diff(["a", "b", "c"], ["a", "x", "c", "d"])
    assert [(r["op"], r["before"], r["after"]) for r in rows] == [
        ("equal", "a", "a"),
        ("replace", "b", "x"),
        ("equal", "c", "c"),
        ("insert", "", "d"),
    ]


# -- code and pages


@pytest.mark.parametrize("view", ["overview", "head", "image", "map", "importance", "sinks"])
def test_shown_code_runs_and_rebuilds_the_view(
    client: Client, run: str, model: Any, view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = show_code(
        client.space,
        {"run": run, "view": view, "stack": "text", "layer": 2, "head": 1, "metric": "p:first_key", "q": 5},
    )
    monkeypatch.setattr(interp, "load", lambda name: model, raising=False)
    names: dict[str, Any] = {}
    run_code = compile(text, "shown", "exec")
    from builtins import exec as run_it

    run_it(run_code, names)
    trace = client.space.run(run).trace["text"]
    if view in ("head", "image"):
        np.testing.assert_allclose(
            names["attention"], trace["attention"].isel(sample=0).sel(layer=2, head=1), atol=1e-6
        )
    elif view == "sinks":
        assert names["sinks"].dims == ("key",)
    else:
        entry = next(m for m in client.json(f"run/{run}/overview/text")["metrics"] if m["key"] == "p:first_key")
        np.testing.assert_allclose(names["values"].values.ravel(), floats(entry["values"]), atol=1e-6)


def test_the_code_window_says_what_is_missing(client: Client) -> None:
    assert code_sheet(client.space, 1, {})[0].startswith("# trace a prompt first")
    assert code_sheet(client.space, 1, {"run": "abcdef12"})[0].startswith("# this run is not there")


def test_an_exported_page_holds_everything(client: Client, run: str) -> None:
    page = client.get(f"run/{run}/page.html?heads=L2H1").text
    data = json.loads(re.search(r'id="headscope-data">(.*?)</script>', page, re.DOTALL)[1])
    held = data["maps"]["L2H1"]
    values = np.frombuffer(base64.b64decode(held["values"]), "<f2").reshape(held["rows"], held["columns"])
    np.testing.assert_allclose(values, client.space.run(run).full_map("text", 2, 1), atol=1e-3)
    assert not re.search(r"<(link|script|img|iframe|object)[^>]*\s(src|href|data)=", page), "nothing is fetched"


def test_text_of_a_prompt_cannot_leave_its_place_in_a_page(client: Client) -> None:
    found = client.run(prompt="w10 </script><script>alert(1)</script>")
    page = client.get(f"run/{found}/page.html").text
    assert "<script>alert(1)" not in page


def test_direct_logits_add_up_with_all_heads(client: Client, run: str, model: Any) -> None:
    made = client.json(f"run/{run}/logits/text/2/1")
    assert made["row"] == client.space.run(run).prompt_length - 1 and len(made["up"]) == 10
    assert made["up"][0][1] >= made["up"][-1][1] >= made["down"][-1][1]
    assert client.json(f"run/{run}/pairs/text/2/1")["pairs"][0]["weight"] > 0
    got = client.json(f"run/{run}/activations")
    assert len(got["rows"]) == 4 and got["rows"][0]["largest"] > got["rows"][0]["median"] > 0


def test_pictures_of_a_prompt(client: Client) -> None:
    vit = bundled("scenes-vit")
    client.space.sources = (*client.space.sources, vit)
    sent = client.http.post(
        "/api/image", data=picture(112, 112), headers={"Host": "127.0.0.1", "X-Headscope": "1"}
    ).json
    assert "reads pictures" in client.finish("run", {"model": vit, "prompt": ""}).error
    found = client.run(model=vit, prompt="", image=sent["image"])
    info = client.json(f"run/{found}")
    stack = next(iter(info["stacks"]))
    panels = client.json(f"run/{found}/images/{stack}")
    (panel,) = panels["panels"]
    assert panel["rows"] * panel["columns"] == len(panel["positions"]) and panels["special"][0]["position"] == 0
    looks = np.frombuffer(client.get(f"run/{found}/looks/{stack}?heads={stack}.L0H0,{stack}.L1H1&q=0").data, "<f4")
    trace = client.space.run(found).trace[stack]["attention"].isel(sample=0, query=0)
    np.testing.assert_allclose(looks, (trace.sel(layer=0, head=0) + trace.sel(layer=1, head=1)) / 2, atol=1e-6)
    hops = client.json(f"run/{found}/hops/{stack}/1/1")
    full = client.space.run(found).full_map(stack, 1, 1)
    at = np.array(panel["positions"])
    assert sum(hops["head"]) == pytest.approx(full[np.ix_(at, at)].sum() / len(at), rel=1e-4)
    assert client.finish("score", {"run": found, "score": "entropy", "stack": stack}).state == "done"
    entry = next(m for m in client.json(f"run/{found}/overview/{stack}")["metrics"] if m["key"] == "s:entropy")
    assert entry["ready"] and entry["probe"] == "this prompt"


def test_code_says_what_was_done_not_what_was_wished(client: Client) -> None:
    run = client.run(chat=True)
    code = show_code(client.space, {"run": run, "view": "overview"})
    assert "chat=True" not in code, "this model has no chat template"
    blind = client.space.run(run)
    blind.takes_text, blind.images = False, ()
    try:
        assert "model.encode(None)" in show_code(client.space, {"run": run, "view": "overview"})
    finally:
        blind.takes_text = True


def test_the_workbenchs_code_runs_its_cards(
    client: Client, run: str, model: Any, monkeypatch: Any, capsys: Any
) -> None:
    cards = [{"name": "ScaleHeads", "settings": {"heads": "L1H2", "gain": 0.5}}]
    state = {
        "run": run,
        "view": "workbench",
        "wb": json.dumps(cards),
        "wnew": 3,
        "seed": 5,
        "sample": True,
        "temp": 0.7,
    }
    code = show_code(client.space, state)
    assert "ScaleHeads(heads='L1H2', gain=0.5)" in code and "temperature=0.7" in code and "manual_seed(5)" in code
    monkeypatch.setattr(interp, "load", lambda *_: model)
    exec(code, {})
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
    assert "cannot be read" in code_sheet(client.space, 1, state | {"wb": "[1"})[0]


def test_scene_tasks_are_told_without_nan() -> None:
    from dashboards.evaluate import judged_probes, scene_summary
    from interp.evaluation.captions import scene_captions

    assert {"chair", "pope"} <= {entry["value"] for entry in judged_probes()}
    task = scene_captions("test", 2)
    samples = task.samples(None)
    present = sorted(task.truth[samples[0].unit])[0]
    right, wrong = f"There is a {present} here.", "There is nothing."
    told = scene_summary(task, "chair", samples, [[{"text": right}, {"text": wrong}]])
    json.dumps(told, allow_nan=False)
    recall = next(f for f in told["figures"] if f["name"] == "recall")
    assert recall["plain"][0] > recall["changed"][0] == 0 and recall["plain"][1] is None
    assert (told["n"], told["total"]) == (1, 2)
