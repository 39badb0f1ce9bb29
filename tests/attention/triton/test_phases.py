"""The order in which the row-stationary kernel walks over tiles: the run that moves together first, edges last, ties by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from interp.attention import Edit, Gain, Mask, Readout, Redistribute, SinkWindow, attend, kinds
from interp.attention.triton import backend, configs, passes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 90


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "forced", configs.Config(16, 16, 4, 1))
    monkeypatch.setattr(backend, "DECODE_ROWS", 0)


def operands(batch: int = 2) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    shapes = ((batch, 2, N, 16), (batch, 1, N, 16), (batch, 1, N, 24))
    q, k, v = (torch.randn(shape, generator=random).to(DEVICE) for shape in shapes)
    return {"q": q, "k": k, "v": v, "scale": 0.4}


def laid_out(*parts: tuple[int, int, int], n: int = N) -> Tensor:
    """Groups ``[1, n]``: 1 but for parts (group, start, stop)."""
    groups = torch.ones(1, n, dtype=torch.int8, device=DEVICE)
    for group, start, stop in parts:
        groups[:, start:stop] = group
    return groups


LAYOUTS = {
    "an image": laid_out((0, 0, 5), (2, 20, 70)),
    "at the start, in whole tiles": laid_out((2, 0, 48), (0, 48, 52)),
    "at the end": laid_out((0, 3, 5), (2, 44, N)),
    "two images": laid_out((0, 0, 2), (2, 10, 34), (2, 36, 85)),
    "a long source": laid_out((0, 17, 70), (2, 75, 80)),
    "only target": laid_out((2, 0, N), (0, 1, 2)),
    "no whole tile": laid_out((0, 0, 3), (2, 20, 30)),
    "by sample": torch.cat([laid_out((0, 0, 5), (2, 40, 70)), laid_out((0, 70, 75), (2, 5, 60))]),
}
MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(causal=True, window=(40, None)),
    "two-sided window": Mask(window=(33, 20)),
    "later rows": Mask(causal=True, q_offset=30, kv_offset=10),
}


def agree(got: Any, wanted: Any, *names: str) -> None:
    torch.testing.assert_close(got.output, wanted.output, atol=2e-5, rtol=2e-5)
    for name in names:
        torch.testing.assert_close(getattr(got.readings, name), getattr(wanted.readings, name), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("mask", "layout"),
    [("causal", layout) for layout in LAYOUTS] + [(mask, "an image") for mask in MASKS if mask != "causal"],
)
def test_redistribution_of_runs(mask: str, layout: str) -> None:
    move = Redistribute((0,), (2,), 0.6, (0, 2), (2,), summ=0.05, rho=0.2)
    groups = LAYOUTS[layout]
    given = {**operands(len(groups)), "mask": MASKS[mask], "edit": Edit((move,), groups, n_groups=3)}
    plain = attend(**{**given, "edit": None}, backend="reference").output
    wanted = attend(**given, backend="reference")
    agree(attend(**given, backend="triton"), wanted)
    assert plain is not None
    assert wanted.output is not None
    if layout != "no whole tile":
        assert (plain - wanted.output).abs().max() > 1e-2, "nothing moved, so nothing was tested"


def test_redistribution_of_a_run_beside_other_edits_and_sinks() -> None:
    sinks = torch.randn(2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    where = (torch.arange(N, device=DEVICE) % 3 > 0).view(1, 1, N)
    fraction = torch.rand(2, 2, N, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    move = Redistribute((0,), (2,), fraction, (0, 2), (2,), summ=0.01, rho=0.1, where=where)
    edit = Edit((SinkWindow(7, 60), move), LAYOUTS["an image"], n_groups=3)
    given = {**operands(), "mask": Mask(causal=True), "edit": edit, "sinks": sinks, "softcap": 3.0}
    agree(attend(**given, backend="triton"), attend(**given, backend="reference"))


def test_redistribution_under_padding_has_no_run() -> None:
    padding = torch.ones(2, N, dtype=torch.bool, device=DEVICE)
    padding[0, :21] = False
    move = Redistribute((0,), (2,), 0.6, (0, 2), (2,))
    given = {
        **operands(), "mask": Mask(causal=True, padding=padding), "edit": Edit((move,), LAYOUTS["an image"], n_groups=3),
    }  # fmt: skip
    agree(attend(**given, backend="triton"), attend(**given, backend="reference"))


EDGES: dict[str, tuple[Mask, Edit | None]] = {
    "window": (Mask(causal=True, window=(40, None)), None),
    "two-sided window": (Mask(window=(33, 20)), None),
    "sink and window": (Mask(causal=True), Edit((SinkWindow(20, 50),))),
    "sink and window, not causal": (Mask(), Edit((SinkWindow(5, 31),))),
    "sink and window by head": (
        Mask(causal=True), Edit((SinkWindow(torch.tensor([1, 40]).to(DEVICE), torch.tensor([20, 1]).to(DEVICE)),)),
    ),
    "sink within the window": (Mask(causal=True), Edit((SinkWindow(60, 70),))),
    "of some rows": (
        Mask(causal=True), Edit((SinkWindow(20, 40, where=(torch.arange(N, device=DEVICE) > 50).view(1, 1, N)),)),
    ),
    "sink and window within a window": (Mask(causal=True, window=(60, None)), Edit((SinkWindow(20, 40),))),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_edges_walked_last(edge: str) -> None:
    mask, edit = EDGES[edge]
    given = {**operands(batch=1), "mask": mask, "edit": edit}
    # Every key comes several times over, so every row has ties within and between tiles.
    given["k"] = given["k"][:, :, :1] * (torch.arange(N, device=DEVICE) % 23).view(1, 1, N, 1)
    readout = Readout(
        row_stats=True, topk=3, received=True, pooled=8, groups=LAYOUTS["an image"], n_groups=3, attention=True
    )
    for wanted_readout in (readout, Readout(row_stats=True, groups=LAYOUTS["an image"], n_groups=3)):
        got = attend(**given, readout=wanted_readout, backend="triton")
        wanted = attend(**given, readout=wanted_readout, backend="reference")
        names = ("lse", "top_weight", "entropy", "mass")
        agree(got, wanted, *names, *(("received", "pooled", "topk_weight", "attention") if wanted_readout.topk else ()))
        assert got.readings.top_key is not None
        assert wanted.readings.top_key is not None
        assert torch.equal(got.readings.top_key, wanted.readings.top_key)
        if wanted_readout.topk:
            assert got.readings.topk_key is not None
            assert wanted.readings.topk_key is not None
            assert torch.equal(got.readings.topk_key, wanted.readings.topk_key)


def test_places_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    edit = Edit((Gain(torch.full((1, 2, 1), 0.5, device=DEVICE)),))
    call: dict[str, Any] = {"mask": Mask(causal=True), "edit": edit, "readout": Readout(row_stats=True, received=True)}
    call |= {**operands(), "backend": "triton"}
    near = attend(**call)
    monkeypatch.setattr(passes, "FAR", 0)
    kinds.clear()
    far = attend(**call)
    assert far.output is not None and near.output is not None
    torch.testing.assert_close(far.output, near.output, rtol=0, atol=0)
    for name, tensor in far.readings.tensors().items():
        torch.testing.assert_close(tensor, near.readings.tensors()[name], rtol=0, atol=0, msg=name)


def test_keys_that_lie_far_apart() -> None:
    """Their places need 64 bits; the memory between them is never touched."""
    n, apart, random = 20, 2**27, torch.Generator().manual_seed(0)
    try:
        memory = torch.empty(n * apart, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 5 GiB that may be promised")
    q = torch.randn((1, 1, n, 16), generator=random).half().to(DEVICE)
    k, v = (memory[first:].as_strided((1, 1, n, 16), (16, 16, apart, 1)) for first in (0, 64))
    for x in (k, v):
        x.copy_(torch.randn((1, 1, n, 16), generator=random))
    call: dict[str, Any] = {"scale": 0.25, "mask": Mask(causal=True), "backend": "triton"}
    edit = Edit((Gain(torch.full((1, 1, 1), 0.5, device=DEVICE)),))
    readout = Readout(row_stats=True, received=True)
    far, near = (
        attend(q, *kv, edit=edit, readout=readout, **call) for kv in ((k, v), (k.contiguous(), v.contiguous()))
    )
    assert far.output is not None and near.output is not None
    torch.testing.assert_close(far.output, near.output)
    for name, tensor in far.readings.tensors().items():
        torch.testing.assert_close(tensor, near.readings.tensors()[name], msg=name)
