"""Sweeps: the same numbers in one go, in parts, after a kill and on Ray; folders that belong to one sweep."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp.analysis import score
from interp.scores import paired_test
from interp.sweeps import SweepError, collect, sweep
from interp.sweeps.plan import Job, Plan, first_writer
from interp.sweeps.progress import Progress
from interp.testing import build
from probes.contrast import ContrastPair
from probes.samples import Sample


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama").module


def prompts(n: int = 4) -> list[dict[str, Any]]:
    return [{"input_ids": torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(i))} for i in range(n)]


def files(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.suffix == ".npz")


def test_a_sweep_is_the_score(llama: Any, tmp_path: Path) -> None:
    plain = score("ablation", llama, prompts(), kind="zero")
    swept = sweep(llama, prompts(), folder=tmp_path / "job", kind="zero", progress=False)
    for name in ("value", "se", "n", "null", "value_by_sample", "null_by_sample"):
        np.testing.assert_array_equal(plain[name], swept[name])
    assert swept.attrs["missing"] == 0 and swept.attrs["failed"] == "{}"
    assert {k: swept.attrs[k] for k in ("name", "unit", "paper", "stack")} == {
        k: plain.attrs[k] for k in ("name", "unit", "paper", "stack")
    }
    paired_test(swept)  # samples are kept: every statistic works on it


def test_without_a_folder_nothing_is_kept(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    sweep(llama, prompts(2), kind="zero", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_was_stopped_goes_on(llama: Any, tmp_path: Path) -> None:
    whole = sweep(llama, prompts(), kind="mean", progress=False)
    folder = tmp_path / "job"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        sweep(llama, prompts(), folder=folder, kind="mean", progress=stop)
    assert len(files(folder)) == 2
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    half = collect(llama, folder, prompts(), kind="mean")
    assert half.attrs["missing"] == 2 and half.sizes["sample"] == 2
    np.testing.assert_array_equal(half["value_by_sample"], whole["value_by_sample"][:2])
    told: list[tuple[int, int]] = []
    resumed = sweep(llama, prompts(), folder=folder, kind="mean", progress=lambda *n: told.append(n))
    assert told == [(2, 4), (3, 4), (4, 4)]
    np.testing.assert_array_equal(resumed["value_by_sample"], whole["value_by_sample"])
    assert all((folder / name).stat().st_mtime_ns == when for name, when in before.items())


KILLED = """
import sys, time, torch
from interp.testing import build
from interp.sweeps import sweep
torch.set_num_threads(1)
prompts = [{"input_ids": torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(i))} for i in range(4)]
def slowly(done, total):
    if done == 2:
        print("two", flush=True)
        time.sleep(60)
sweep(build("llama").module, prompts, folder=sys.argv[1], kind="zero", progress=slowly)
"""


def test_a_killed_process_leaves_whole_files_and_the_next_goes_on(llama: Any, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "two\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(files(folder)) == 2
    resumed = sweep(llama, prompts(), folder=folder, kind="zero", progress=False)
    np.testing.assert_allclose(resumed["value"], score("ablation", llama, prompts(), kind="zero")["value"], atol=1e-6)


def test_a_damaged_file_is_done_again(llama: Any, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    whole = sweep(llama, prompts(), folder=folder, kind="zero", progress=False)
    file = folder / files(folder)[1]
    for content in (file.read_bytes()[:100], b"", b"not a file of ours"):
        file.write_bytes(content)
        again = sweep(llama, prompts(), folder=folder, kind="zero", progress=False)
        np.testing.assert_array_equal(again["value"], whole["value"])


def test_parts_of_an_array_meet_in_the_folder(llama: Any, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    first = sweep(llama, prompts(5), folder=folder, part=(0, 2), kind="zero", progress=False)
    assert first.attrs["missing"] == 2 and first["sample"].values.tolist() == [0, 2, 4]
    second = sweep(llama, prompts(5), folder=folder, part=(1, 2), kind="zero", progress=False)
    assert second.attrs["missing"] == 0
    np.testing.assert_array_equal(second["value"], score("ablation", llama, prompts(5), kind="zero")["value"])


def test_layers_can_be_tasks(llama: Any, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    whole = sweep(llama, prompts(2), folder=folder, split="layer", kind="zero", progress=False)
    assert len(files(folder)) == 6
    np.testing.assert_allclose(whole["value"], score("ablation", llama, prompts(2), kind="zero")["value"], atol=1e-6)
    (folder / files(folder)[0]).unlink()
    # A prompt that lacks a layer is not counted at all.
    assert collect(llama, folder, prompts(2), kind="zero")["sample"].values.tolist() == [1]


def test_a_shortlist_is_exact_for_the_heads_with_the_largest_gradients(llama: Any, tmp_path: Path) -> None:
    whole = score("ablation", llama, prompts(), kind="zero")["value"].values
    gates = score("head_gates", llama, prompts())
    folder = tmp_path / "job"
    got = sweep(llama, prompts(), folder=folder, shortlist=5, kind="zero", progress=False)
    there = ~np.isnan(got["value"].values)
    assert there.sum() == 5 and (there == gates.heads.top(5).mask("text", 3, 4)).all()
    np.testing.assert_allclose(got["value"].values[there], whole[there], atol=1e-6)
    np.testing.assert_allclose(got["gradient"], gates["value"], atol=1e-6)
    assert -1 <= got.attrs["shortlist"]["rho"] <= 1 and got.attrs["shortlist"]["n"] == 5
    assert collect(llama, folder, prompts(), kind="zero").attrs["shortlist"]["k"] == 5
    with pytest.raises(SweepError, match="shortlist of 5 heads, not 4"):
        sweep(llama, prompts(), folder=folder, shortlist=4, kind="zero", progress=False)


def test_any_score_is_swept(llama: Any, tmp_path: Path) -> None:
    pairs = [ContrastPair(Sample((1, 5, 6, 7, 8)), Sample((1, 5, 9, 7, n)), 5, 9) for n in (8, 10)]
    for name, probe in (("entropy", prompts()), ("head_gates", prompts()), ("attribution_patching", pairs)):
        swept = sweep(llama, probe, score=name, folder=tmp_path / name, progress=False)
        np.testing.assert_allclose(swept["value"], score(name, llama, probe)["value"], atol=1e-6)


def test_a_prompt_that_fails_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    module: Any = build("llama").module
    with torch.no_grad():
        module.model.embed_tokens.weight[95] = torch.nan
    good = [tuple(p["input_ids"][0].tolist()) for p in prompts(3)]
    samples = [Sample(good[0]), Sample((*good[1][:-1], 95)), Sample((1,)), Sample(good[2])]
    got = sweep(module, samples, folder=tmp_path / "job", kind="zero", progress=False)
    failed = json.loads(got.attrs["failed"])
    assert list(failed) == ["1", "2"] and "at least two ordinary tokens" in failed["2"]
    assert got["sample"].values.tolist() == [0, 3] and got.attrs["missing"] == 2
    assert not np.isnan(got["value"]).any()


def test_a_mistake_is_not_taken_for_a_failed_prompt(llama: Any, tmp_path: Path) -> None:
    def wrong(logits: Any, answer: int, foil: int) -> Any:
        return logits + "1"

    with pytest.raises(TypeError):
        sweep(llama, prompts(2), folder=tmp_path / "job", kind="zero", metric=wrong, progress=False)


def test_nan_logits_fail_every_prompt_and_say_so(tmp_path: Path) -> None:
    module: Any = build("llama").module
    with torch.no_grad():
        module.lm_head.weight[7] = torch.nan
    with pytest.raises(
        SweepError, match=r"none of 2 did; sample 0: AnalysisError: logits of the clean run must be finite"
    ):
        sweep(module, prompts(2), folder=tmp_path / "job", kind="zero", progress=False)
    with pytest.raises(SweepError, match="must be finite"):
        sweep(module, prompts(2), folder=tmp_path / "part", part=(0, 1), kind="zero", progress=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"probe": prompts(3)}, "another samples"), ({"kind": "mean"}, "another settings"), ({"score": "entropy"}, "another score"),
        ({"split": "layer"}, "another split"), ({"model": 1}, "another model"),
    ],
)  # fmt: skip
def test_a_folder_belongs_to_one_sweep(llama: Any, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = tmp_path / "job"
    sweep(llama, prompts(2), folder=folder, kind="zero", progress=False)
    module = build("llama", seed=1).module if "model" in change else llama
    settings: dict[str, Any] = {"kind": "zero", **{k: v for k, v in change.items() if k not in ("probe", "model")}}
    if "score" in change:
        del settings["kind"]
    with pytest.raises(SweepError, match=says):
        sweep(module, change.get("probe", prompts(2)), folder=folder, progress=False, **settings)


def test_foreign_folders_are_left_alone(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SweepError, match="new, empty or a sweep's"):
        sweep(llama, prompts(2), folder=tmp_path, kind="zero", progress=False)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(SweepError, match=r"must hold a sweep's sweep\.json"):
        sweep(llama, prompts(2), folder=tmp_path, kind="zero", progress=False)
    (tmp_path / "sweep.json").write_text('{"version": 99}')
    with pytest.raises(SweepError, match="must be of version 1, got 99"):
        collect(llama, tmp_path, prompts(2), kind="zero")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"part": (2, 2), "folder": "x"}, "part must be"), ({"part": (0, 2)}, "needs a folder"),
        ({"ray": "local"}, "name or folder with ray"), ({"shortlist": 0}, "shortlist must be"), ({"workers": 0}, "workers must be"),
        ({"score": "nothing"}, "score must be one of"), ({"colour": 1}, "settings of 'ablation' must be among"),
        ({"split": "head"}, "split must be"), ({"score": "entropy", "split": "layer"}, "is for ablations"),
        ({"score": "entropy", "shortlist": 2}, "shortlist is for ablations"),
        ({"shortlist": 2, "heads": "L0H0"}, "shortlist is for ablations of all heads"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(llama: Any, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    if "folder" in settings:
        settings = {**settings, "folder": tmp_path / "job"}
    with pytest.raises(SweepError, match=says):
        sweep(llama, prompts(2), progress=False, **settings)


def test_of_several_first_writers_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "shortlist.json"
    assert first_writer(path, "a") == "a" and first_writer(path, "b") == "a"
    assert [f.name for f in tmp_path.iterdir()] == ["shortlist.json"]


def test_tasks_of_a_plan(tmp_path: Path) -> None:
    plan = Plan("ablation", {}, {}, None, ("a", "b"), (1, 3), "layer")
    assert [(t.number, t.sample, t.layer) for t in plan.tasks] == [(0, 0, 1), (1, 0, 3), (2, 1, 1), (3, 1, 3)]
    job = Job(tmp_path / "job", plan)
    job.write(plan.tasks[2], np.ones((1, 2, 3)), None, 0.5)
    assert job.done() == {2} and job.read(plan.tasks[2])[1] is None and job.read(plan.tasks[0]) is None  # type: ignore[index]
    job.write_error(plan.tasks[0], "why")
    assert job.errors() == {0: "why"}
    job.write(plan.tasks[0], np.ones((1, 2, 3)), np.zeros((1, 2, 3)), 0.5)
    assert job.errors() == {} and job.done() == {0, 2}


def test_time_left_counts_only_what_was_done_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("interp.sweeps.progress.monotonic", lambda: now[0])
    log = io.StringIO()
    with Progress(10, 4, True, log) as bar:
        assert bar.seconds_left is None and "4 of 10" in log.getvalue()
        now[0] = 140.0
        bar.advance()
        assert bar.seconds_left == pytest.approx(40 * 5)
        assert "sweep: 5 of 10 tasks, 3 min left" in log.getvalue()
    quiet = io.StringIO()
    with Progress(2, 0, False, quiet) as bar:
        bar.advance()
    assert quiet.getvalue() == ""


@pytest.mark.slow
def test_ray_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    folder = tmp_path / "model"
    specimen = build("llama")
    specimen.module.save_pretrained(folder)
    here = sweep(str(folder), prompts(3), kind="zero", progress=False)
    told: list[tuple[int, int]] = []
    start = time.monotonic()
    there = sweep(
        str(folder),
        prompts(3),
        kind="zero",
        ray="local",
        workers=2,
        folder=tmp_path / "job",
        progress=lambda *n: told.append(n),
    )
    np.testing.assert_array_equal(here["value_by_sample"], there["value_by_sample"])
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)] and time.monotonic() - start < 300


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    folder = tmp_path / "model"
    build("llama").module.save_pretrained(folder)
    with pytest.raises(SweepError, match=r"pip install headscope\[ray\]"):
        sweep(str(folder), prompts(2), kind="zero", ray="local", progress=False)
