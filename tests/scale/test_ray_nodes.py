"""A sweep over two Ray nodes, its driver killed half way: the next one does what is left, and nothing twice."""

from __future__ import annotations

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

from interp.sweeps import sweep
from interp.testing import build

N = 8
DRIVER = """
import sys, time, torch
from interp.sweeps import sweep
torch.set_num_threads(1)
prompts = [{"input_ids": torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(i))} for i in range(8)]
def slowly(done, total):
    print(done, flush=True)
    if done >= 4:
        time.sleep(600)
sweep(sys.argv[1], prompts, folder=sys.argv[2], kind="zero", ray=sys.argv[3], workers=2, progress=slowly)
"""


def prompts() -> list[dict[str, Any]]:
    return [{"input_ids": torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(i))} for i in range(N)]


@pytest.mark.slow
def test_two_nodes_and_a_killed_driver(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="the package ray is not installed (extra `ray`)")
    from ray.cluster_utils import Cluster

    model, folder = tmp_path / "model", tmp_path / "job"
    build("llama").module.save_pretrained(model)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(model), str(folder), cluster.address], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert driver.stdout is not None
        for line in driver.stdout:
            if int(line) >= 4:
                break
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        kept = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.npz")}
        assert len(kept) == 4
        time.sleep(2)  # its workers die with it and write nothing: only a driver does
        assert {f.name for f in folder.glob("*.npz")} == set(kept)
        told: list[tuple[int, int]] = []
        got = sweep(
            str(model), prompts(), folder=folder, kind="zero", ray=cluster.address, workers=2,
            progress=lambda *n: told.append(n),
        )  # fmt: skip
        assert told == [(n, N) for n in range(4, N + 1)], "only what was left"
        assert {n: (folder / n).stat().st_mtime_ns for n in kept} == kept, "nothing twice"
        assert len(list(folder.glob("*.npz"))) == N and got.attrs["missing"] == 0
        whole = sweep(str(model), prompts(), kind="zero", progress=False)
        np.testing.assert_array_equal(got["value_by_sample"], whole["value_by_sample"])
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
