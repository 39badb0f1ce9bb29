"""What a first launch takes is reported."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from interp.attention.triton import decode_launch, launching
from interp.attention.triton.decode import combine_kernel, decode_kernel
from interp.attention.triton.decode_joined import joined_kernel
from interp.attention.triton.launching import Launch, compile_seconds


class Slow:
    """A kernel whose compilation takes 20 ms, and whose launches take nothing."""

    __name__ = "slow_kernel"
    arg_names = ("q_ptr", "scale", "CAUSAL", "POOLED")

    def __init__(self) -> None:
        self.compiled = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, **__: Any) -> dict[Any, Any]:
            time.sleep(0.02)
            self.compiled += 1
            return {grid: lambda *arguments: arguments}

        return launch


@pytest.fixture(autouse=True)
def nothing_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_seconds", {})
    monkeypatch.setattr(launching, "interpreted", lambda: False)


def aligned() -> torch.Tensor:
    return torch.zeros(64, dtype=torch.bfloat16)


def test_the_first_launch_of_a_variant_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    kernel = Slow()
    launch = Launch(kernel, (4,), {"scale": 0.5, "CAUSAL": True, "POOLED": False}, num_warps=8)
    with caplog.at_level(logging.INFO, "headscope.kernels"):
        launch._launch({"q_ptr": aligned()})
        launch._launch({"q_ptr": aligned()})
    assert kernel.compiled == 1
    (record,) = caplog.records
    assert record.name == "headscope.kernels" and record.levelno == logging.INFO
    assert record.getMessage().startswith("slow_kernel: 0.0")
    assert record.getMessage().endswith("compiled for bfloat16, CAUSAL, num_warps 8")
    assert 0.02 <= compile_seconds()["slow_kernel"] < 1.0


def test_a_variant_found_in_memory_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    class Fast(Slow):
        __name__ = "fast_kernel"

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **_: {grid: None}

    with caplog.at_level(logging.DEBUG, "headscope.kernels"):
        Launch(Fast(), (1,), {"scale": 1.0, "CAUSAL": False, "POOLED": False})._launch({"q_ptr": aligned()})
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert 0 < compile_seconds()["fast_kernel"] < launching.NOTEWORTHY


def test_decoding_reports_too(caplog: pytest.LogCaptureFixture) -> None:
    kernel = Slow()
    start = launching.Start(kernel, (1, 1, 1), (0.5, True, False), 4, 2, None)
    with caplog.at_level(logging.INFO, "headscope.kernels"):
        for is_aligned in (True, True, False, False):
            start((aligned(),), is_aligned)
    (record,) = caplog.records
    assert record.getMessage().endswith("compiled for bfloat16, CAUSAL, num_warps 4, num_stages 2")
    assert 0.02 <= compile_seconds()["slow_kernel"] < 1.0


def test_the_answer_is_a_copy() -> None:
    compile_seconds()["x"] = 1.0
    assert "x" not in compile_seconds()


@pytest.mark.parametrize("kernel", [decode_kernel, combine_kernel, joined_kernel], ids=["walk", "combine", "joined"])
def test_decoding_names_all_arguments(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU the report pairs the arguments of a launch with the kernel's names, by position.
    given: list[int] = []
    monkeypatch.setattr(launching, "interpreted", lambda: not torch.cuda.is_available())
    monkeypatch.setattr(decode_launch, "forced_parts", 2)
    called = launching.Start.__call__

    def spy(self: launching.Start, live: Any, aligned: bool) -> None:
        if self.kernel is kernel:
            given.append(len(live) + len(self.fixed))
        called(self, live, aligned)

    monkeypatch.setattr(launching.Start, "__call__", spy)
    from interp.attention.edits import Edit
    from interp.attention.mask import Mask
    from interp.attention.readouts import Readout
    from interp.attention.triton import decoding

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k = torch.zeros(1, 2, 1, 16, device=device), torch.zeros(1, 1, 40, 16, device=device)
    call = decoding.Call(q, k, k, 0.3, Mask(), None, None, None, Edit(), Readout(), True)
    if kernel is not joined_kernel:
        call = replace(call, readout=Readout(row_stats=True))
    way = decoding.Decoding(call)
    way.run(call)
    if way.short is not None:
        way.short(q, k, k, None, None, None)
    assert given and set(given) == {len(kernel.arg_names)}
