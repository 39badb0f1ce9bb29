"""Partial sums, and what a prepared launch holds on to."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from interp.attention import Edit, GroupWeights, Mask, Readout, Redistribute, attend, kinds, sdpa
from interp.attention.triton import backend, summing
from interp.attention.triton.launching import Launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def operands(batch: int = 2, heads: int = 2, n: int = 40) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, 16, generator=random).to(DEVICE) for _ in range(3))
    return {"q": q, "k": k, "v": v, "scale": 0.3, "mask": Mask(causal=True)}


def test_only_the_first_axis_of_a_grid_grows_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # The others end at 65535, which batch x heads x query groups may exceed.
    grids: list[tuple[str, tuple[int, ...]]] = []
    called = Launch.__call__

    def spy(self: Launch, live: dict[str, torch.Tensor]) -> None:
        grids.append((self.kernel.__name__, self.grid))
        called(self, live)

    monkeypatch.setattr(Launch, "__call__", spy)
    given = operands(batch=3, heads=5)
    query_groups = (torch.arange(40, device=DEVICE) % 2)[None].to(torch.int8)
    readout = Readout(row_stats=True, received=True, pooled=4, query_groups=query_groups, n_query_groups=2)
    got = attend(**given, readout=readout, backend="triton").readings
    wanted = attend(**given, readout=readout, backend="reference").readings
    assert {"sum_parts_kernel", "statistics_kernel"} <= {name for name, _ in grids}
    assert all(grid[1:] == (1, 1) for _, grid in grids)
    for name in ("received", "pooled"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("edited", [False, True], ids=["read", "edited"])
def test_groups_made_in_inference_mode(edited: bool) -> None:
    with torch.inference_mode():
        groups = (torch.arange(40, device=DEVICE) // 11)[None].to(torch.int8)
        given = operands()
        if edited:
            move = Redistribute((0,), (2,), 0.6, (0, 2), (2,), summ=0.1, rho=0.1)
            call: dict[str, Any] = {"edit": Edit((move,), groups, n_groups=4)}
        else:
            call = {"readout": Readout(row_stats=True, groups=groups, n_groups=4, received=True)}
        for _ in range(2):
            got = attend(**given, **call, backend="triton")
            wanted = attend(**given, **call, backend="reference")
            torch.testing.assert_close(got.output, wanted.output, atol=1e-5, rtol=1e-5)
            for name, value in wanted.readings.tensors().items():
                torch.testing.assert_close(getattr(got.readings, name), value, atol=1e-5, rtol=1e-5, check_dtype=False)
            groups[:] = 3 - groups


@pytest.mark.parametrize("rows", [40, 1], ids=["prefill", "decoding"])
def test_a_plan_holds_no_operand(rows: int) -> None:
    kinds.clear()
    given = operands()
    given["q"] = given["q"][:, :, :rows].contiguous()
    groups = torch.zeros(1, 40, dtype=torch.int8, device=DEVICE)
    weight = torch.tensor([0.5], device=DEVICE).view(1, 1, 1, 1)
    edit = Edit((GroupWeights(weight, renormalise=False),), groups)
    readout = Readout(row_stats=True, received=True, pooled=4)
    result = attend(**given, edit=edit, readout=readout, backend="triton")
    assert len(kinds._kinds) == 1
    seen = [weakref.ref(given[name]) for name in "qkv"] + [weakref.ref(x) for x in result.readings.tensors().values()]
    del given, result
    gc.collect()
    kept = [ref() for ref in seen[:3]]
    assert kept == [None, None, None]
    # What does not depend on the operands may be kept: the number of rows that see a key.
    assert sum(ref() is not None for ref in seen[3:]) <= 1


def test_the_log_sum_exp_of_sdpa_is_not_asked_for_where_it_has_no_softcap(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(True)
        plain = attend(q, k, v, scale=0.3, mask=Mask(causal=True), readout=Readout(row_stats=True), backend="reference")
        assert plain.output is not None
        assert plain.readings.lse is not None
        return plain.output.transpose(1, 2), plain.readings.lse

    monkeypatch.setattr(sdpa, "fused", fused)
    monkeypatch.setattr(backend, "DECODE_ROWS", 0)
    readout = Readout(row_stats=True, received=True)
    for softcap, sinks in ((None, None), (2.0, None), (None, torch.randn(2, device=DEVICE))):
        given: dict[str, Any] = {**operands(), "softcap": softcap, "sinks": sinks, "readout": readout}
        got, wanted = attend(**given, backend="triton"), attend(**given, backend="reference")
        torch.testing.assert_close(got.output, wanted.output, atol=1e-5, rtol=1e-5)
        for name in ("lse", "entropy", "received", "sink_share"):
            torch.testing.assert_close(
                getattr(got.readings, name), getattr(wanted.readings, name), atol=2e-5, rtol=1e-5
            )
    assert len(asked) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("rows", [40, 1], ids=["prefill", "decoding"])
def test_a_second_gpu(rows: int) -> None:
    given = operands()
    given["q"] = given["q"][:, :, :rows].contiguous()
    readout = Readout(row_stats=True, received=True)
    first = attend(**given, readout=readout, backend="triton")
    there: dict[str, Any] = {name: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    second = attend(**there, readout=readout, backend="triton")
    assert second.output is not None
    assert second.output.device.index == 1
    assert first.output is not None
    assert torch.equal(second.output.to(first.output.device), first.output)


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    class There:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device.index)

        def __exit__(self, *_: object) -> None: ...

    class Elsewhere(torch.Tensor):
        @property
        def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
            return torch.device("cuda", 1)

    from interp.attention.triton import launching

    monkeypatch.setattr(launching, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", There)
    launched: list[Any] = []
    launch = Launch(object(), (1,), {})
    monkeypatch.setattr(launch, "_launch", launched.append)
    launch({"q_ptr": torch.zeros(1).as_subclass(Elsewhere)})
    assert entered == [1]
    assert len(launched) == 1


def test_spans_are_whole_chunks() -> None:
    assert summing.spans(5, 1) == [(0, 5)]
    assert summing.spans(40, summing.PART_BYTES) == [(0, 16), (16, 32), (32, 40)]
