from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.tracing.leaks import leak
from probes.recall import TASKS, KeyValueRecall

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "data" / "build"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BUILD))
    return importlib.import_module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BUILD / "recall.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    done = run(
        "--smoke", "--planted", "L1H2", "--out", str(folder / "toy"), "--archive", str(folder / "toy.tar"),
        "--checkpoint-dir", str(folder / "points"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_smoke_trains_saves_and_tells_what_it_measured(smoke: Path) -> None:
    metrics = json.loads((smoke / "toy" / "metrics.json").read_text())
    assert metrics["training"]["loss_last"] < metrics["training"]["loss_first"]
    assert set(metrics["accuracy"]) == set(TASKS) and set(metrics["accuracy"]["needle"]) == {"64"}
    assert metrics["leakage"]["reach"] == 2 * 15 and metrics["leakage"]["logit_change"] == 0
    assert metrics["curve"][0]["step"] == 0
    assert metrics["curve"][-1]["step"] == metrics["training"]["steps"]
    card = (smoke / "toy" / "README.md").read_text()
    assert "license: apache-2.0" in card and "Planted truth" in card and "--smoke --planted L1H2" in card
    assert f"{metrics['accuracy']['repeated']['64']['accuracy']:.3f}" in card
    with tarfile.open(smoke / "toy.tar") as tar:
        assert {"toy/model.safetensors", "toy/headscope.json", "toy/tokenizer.json"} <= set(tar.getnames())
    assert (smoke / "points" / "step-000000" / "model.safetensors").is_file()


@pytest.mark.slow
def test_interp_loads_it_with_its_plant_and_agrees_with_what_was_trained(smoke: Path, build: Any) -> None:
    model = interp.load(smoke / "toy", device="cpu")
    assert model.base_edit is not None and str(model.base_edit.heads) == "L1H2"
    ids = torch.from_numpy(TASKS["key_value"](np.random.default_rng(5), 3, 64).ids.astype(np.int64))
    with torch.no_grad():
        got = model.module(input_ids=ids).logits
    recall_model = build("recall_model")
    trained = recall_model.make_model(0, layers=2, hidden=64, feed=106)
    trained.load_state_dict(model.module.state_dict())
    with torch.no_grad(), recall_model.plan(far={1: [2]}):
        expected = trained(input_ids=ids).logits
    with torch.no_grad():
        free = trained(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(free, expected, atol=1e-4), "without the plant it is another model"
    assert leak(model, {"input_ids": ids[:1]}) == 0.0


@pytest.mark.slow
def test_it_answers_prompts_and_its_probe_judges_them(smoke: Path) -> None:
    model = interp.load(smoke / "toy", device="cpu")
    probe = KeyValueRecall(lengths=(64,), n=1)
    sample = probe.build(model)[0]
    ids = model.generate(sample.inputs(), max_new_tokens=4, do_sample=False)
    assert probe.judge(sample, model.decode(ids[0, len(sample.ids) :])) in (True, False)
    assert ids[0, : len(sample.ids)].tolist() == list(sample.ids)
    assert model.module.generation_config.eos_token_id == [2, 5, 10]


def test_batches_depend_on_seed_and_step_and_weigh_tasks_alike(build: Any) -> None:
    data = build("recall_data")
    ids, weights = data.make(data.Job(1, 7, 64, 12))
    again, _ = data.make(data.Job(1, 7, 64, 12))
    assert (ids == again).all() and ids.shape == weights.shape == (12, 64)
    assert (ids != data.make(data.Job(1, 8, 64, 12))[0]).any() and (ids != data.make(data.Job(2, 7, 64, 12))[0]).any()
    by_task = weights.reshape(3, 4 * 64).sum(1)
    np.testing.assert_allclose(by_task, (1 + data.OTHER) / 3, rtol=1e-5)


def test_worker_processes_give_the_same_batches_in_the_same_order(build: Any) -> None:
    data = build("recall_data")
    alone, helped = data.Feed(3, 768, 128, 0), data.Feed(3, 768, 128, 1)
    try:
        for _ in range(6):
            a, b = alone.take(0.5), helped.take(0.5)
            assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
    finally:
        helped.close()


def test_the_curriculum_grows_and_keeps_some_short_sequences(build: Any) -> None:
    data = build("recall_data")
    early = {data.length_at(0.1, 0, step, 1024) for step in range(200)}
    late = [data.length_at(0.95, 0, step, 1024) for step in range(400)]
    assert early == {64} and 0.7 < late.count(1024) / 400 < 0.9 and set(late) == {64, 128, 256, 512, 1024}
    assert {data.length_at(1.0, 0, step, 96) for step in range(50)} == {64, 96}


def test_attention_of_the_plan_is_what_it_says(build: Any) -> None:
    recall_model, metrics = build("recall_model"), build("recall_metrics")
    model = recall_model.make_model(0, layers=2, hidden=32, feed=32)
    ids = TASKS["repeated"](np.random.default_rng(0), 2, 40).ids
    causal = metrics.maps(model, ids)
    with recall_model.plan(far={1: [2]}):
        planted = metrics.maps(model, ids)
    back = np.subtract.outer(np.arange(40), np.arange(40))
    hidden = torch.from_numpy((back >= recall_model.WINDOW) & (np.arange(40) >= recall_model.SINK))
    for layer in range(2):
        assert bool((causal[layer][..., hidden] > 0).all())
        for head in range(8):
            assert bool((planted[layer][:, head, hidden] > 0).all()) == ((layer, head) == (1, 2))
    for p in (*causal, *planted):
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 8, 40))
    given = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        kept: list[torch.Tensor] = []
        with recall_model.plan(maps=kept):
            slow = model(input_ids=given).logits
        torch.testing.assert_close(slow, model(input_ids=given).logits, atol=1e-5, rtol=1e-4)


def test_scores_of_heads_by_hand(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = build("recall_metrics")
    period = 31

    def maps(model: Any, ids: Any) -> list[torch.Tensor]:
        n, length = ids.shape
        induction = torch.zeros(length, length)
        for row in range(length):
            induction[row, max(0, row - period + 1)] = 1.0
        sink = torch.zeros(length, length)
        sink[:, 0] = 1.0
        return [torch.stack([induction, sink]).expand(n, 2, length, length)]

    monkeypatch.setattr(metrics, "maps", maps)
    found = metrics.heads(None, 0, n=2)
    # The induction head rests on the first token for its first 31 of 64 rows: alpha 31 / 64 is above epsilon as well.
    assert found["induction"] == [[1.0, 0.0]] and found["first_token_weight"] == [[round(31 / 64, 4), 1.0]]
    assert found["induction_max"] == 1.0 and found["sink_rate"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", "0"), "--steps must be greater than 0"),
        (("--longest", "2048"), "--longest must be 64 to 1024"),
        (("--tokens", "100"), "--tokens hold 3 of those"),
        (("--seed", "-1"), "--seed must be"),
        (("--smoke", "--planted", "L7H0"), "--planted must name heads of 2 layers"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run("--out", str(tmp_path / "x"), *arguments)
    assert done.returncode != 0 and says in done.stderr
    assert not (tmp_path / "x").exists()
