"""Later calls that give statistics of a known softmax go a shorter way; what they give is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.attention import Mask, Readings, Readout, attend, kinds

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, HEADS = 24, 2


def operands(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn((1, heads, N, 16), generator=random).to(DEVICE) for heads in (HEADS, 1, 1))
    return q, k, v


def shorter_ways() -> list[bool]:
    return [kind.read is not None for kind in kinds._kinds.values()]  # pyright: ignore[reportPrivateUsage]


def groups() -> torch.Tensor:
    return (torch.arange(N, device=DEVICE) // 7 % 3)[None].to(torch.int8)


READOUTS = {
    "all": Readout(row_stats=True, groups=groups(), n_groups=3, received=True, pooled=8),
    "rows": Readout(row_stats=True),
    "columns": Readout(received=True),
    "pooled": Readout(pooled=4),
    "some heads": Readout(row_stats=True, received=True, heads=torch.tensor([1], device=DEVICE)),
}


def read(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, readout: Readout, **more: Any) -> Readings:
    lse = attend(q, k, v, scale=0.3, mask=mask, readout=Readout(row_stats=True), backend="reference").readings.lse
    assert lse is not None
    return attend(
        q, k, v, scale=0.3, mask=mask, readout=readout, want_output=False, lse=lse.float(), backend="triton", **more
    ).readings


@pytest.mark.parametrize("name", list(READOUTS))
def test_the_second_call_reads_its_own_tensors(name: str) -> None:
    mask, readout = Mask(causal=True), READOUTS[name]
    kinds.clear()
    read(*operands(0), mask, readout)
    assert any(shorter_ways())
    again = read(*operands(1), mask, readout)
    kinds.clear()
    alone = read(*operands(1), mask, readout)
    assert again.backend == alone.backend == "triton"
    assert again.pooled_edge == alone.pooled_edge
    expected = alone.tensors()
    assert again.tensors().keys() == expected.keys()
    for reading, tensor in again.tensors().items():
        torch.testing.assert_close(tensor, expected[reading], rtol=0, atol=0, msg=reading)
    whole = attend(*operands(1), scale=0.3, mask=mask, readout=readout, backend="reference").readings.tensors()
    for reading, tensor in again.tensors().items():
        torch.testing.assert_close(tensor.double(), whole[reading].double(), rtol=1e-4, atol=1e-4, msg=reading)


def test_groups_changed_in_place_are_noticed() -> None:
    mask, changing = Mask(causal=True), groups()
    readout = Readout(row_stats=True, groups=changing, n_groups=3)
    before = read(*operands(0), mask, readout).mass
    changing.fill_(2)
    after = read(*operands(0), mask, readout).mass
    assert before is not None and after is not None
    assert before[..., 0].max() > 0.1
    assert after[..., :2].abs().max() < 1e-6


@pytest.mark.parametrize(
    "more",
    [{"sinks": torch.zeros(HEADS, device=DEVICE)}, {"bias": torch.zeros(1, 1, N, N, device=DEVICE)}],
    ids=["sinks", "bias"],
)
def test_what_the_shorter_way_lacks_goes_the_longer(more: dict[str, Any]) -> None:
    kinds.clear()
    read(*operands(0), Mask(causal=True), READOUTS["rows"], **more)
    assert not any(shorter_ways())


@pytest.mark.parametrize("row", [0, 5, 20])
def test_a_row_that_is_no_number_stays_none(row: int) -> None:
    q, k, v = operands(0)
    q[0, 0, row] = torch.nan
    got = read(q, k, v, Mask(causal=True), READOUTS["all"])
    assert got.entropy is not None and got.received is not None and got.top_key is not None
    missing = got.entropy.isnan()
    assert missing[0, 0, row] and missing.sum() == 1
    assert got.top_key[0, 0, row] == -1
    assert got.received[0, 0, 0, : row + 1].isnan().all()
    # Keys that the row does not see may get it too, those of other heads may not.
    assert not got.received[0, 1].isnan().any()


def test_a_reading_is_the_callers_own() -> None:
    mask, readout = Mask(causal=True), READOUTS["rows"]
    with torch.inference_mode():
        read(*operands(0), mask, readout)
    for _ in range(2):
        readings = read(*operands(0), mask, readout)
        assert readings.sink_share is not None
        assert not readings.sink_share.is_inference()
        assert not readings.sink_share.any()
        readings.sink_share.add_(1.0)


def test_no_gradient_is_kept() -> None:
    q, k, v = operands(0)
    mask, readout = Mask(causal=True), READOUTS["some heads"]
    lse = torch.zeros(q.shape[:3], device=DEVICE, requires_grad=True)
    for _ in range(2):
        given = attend(
            q, k, v, scale=0.3, mask=mask, readout=readout, want_output=False, lse=lse, backend="triton"
        ).readings
        assert given.lse is not None and not given.lse.requires_grad
