"""Gradients of the kernels against torch's own of the specification in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.attention import (
    Boost,
    Edit,
    Gain,
    GroupWeights,
    Mask,
    Operation,
    Readout,
    SinkWindow,
    Temperature,
    Uniform,
    reference,
)
from interp.attention.backends import BackendUnavailable
from interp.attention.call import Call

pytest.importorskip("triton")

from interp.attention.triton import gradients
from interp.attention.triton.configs import Config
from interp.attention.triton.gradients import differentiable, lacks_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def leaf(*shape: int, low: float | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, or uniform ones from ``low`` to ``low + 1``."""
    x = torch.randn(shape) if low is None else torch.rand(shape) + low
    return x.to(DEVICE, dtype).requires_grad_()


def chosen(*shape: int) -> Tensor:
    return torch.rand(shape, device=DEVICE) < 0.5


def a_call(
    lengths: tuple[int, int] = (40, 50),
    *,
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (16, 16),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    mask: Mask | None = None,
    operations: tuple[Operation, ...] = (),
    softcap: float | None = None,
    sinks: bool = False,
) -> Call:
    (rows, keys), (n_heads, kv_heads) = lengths, heads
    return Call(
        q=leaf(batch, n_heads, rows, dims[0], dtype=dtype),
        k=leaf(batch, kv_heads, keys, dims[0], dtype=dtype),
        v=leaf(batch, kv_heads, keys, dims[1], dtype=dtype),
        scale=1.3 * dims[0] ** -0.5,
        mask=Mask() if mask is None else mask,
        softcap=softcap,
        sinks=leaf(n_heads, dtype=dtype) if sinks else None,
        bias=None,
        edit=Edit(operations),
        readout=Readout(),
        want_output=True,
    )


def leaves(call: Call) -> dict[str, Tensor]:
    """Everything of a call that has a gradient."""
    found: dict[str, Any] = {"q": call.q, "k": call.k, "v": call.v, "sinks": call.sinks}
    for number, op in enumerate(call.edit.of(Gain, Temperature)):
        found[f"{type(op).__name__} {number}"] = op.value
    return {name: x for name, x in found.items() if isinstance(x, Tensor) and x.requires_grad}


def exactly(call: Call) -> Call:
    """The call in float64, with leaves of its own."""

    def double(x: Any) -> Any:
        return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    operations = [
        replace(op, value=double(op.value)) if isinstance(op, Gain | Temperature) else op for op in call.edit.operations
    ]
    return replace(
        call,
        q=double(call.q),
        k=double(call.k),
        v=double(call.v),
        sinks=double(call.sinks),
        edit=Edit(tuple(operations)),
    )


def derive(z: Tensor, call: Call, dz: Tensor) -> dict[str, Tensor]:
    inputs = leaves(call)
    return {"z": z.detach(), **dict(zip(inputs, torch.autograd.grad(z, list(inputs.values()), dz), strict=True))}


def assert_right(call: Call, tolerance: float = 2e-5) -> None:
    """Errors are relative to the largest entry of each gradient, or to 1 where all are smaller."""
    assert lacks_gradient(call) is None
    z = differentiable(call)
    dz = torch.randn(z.shape).to(z)
    got = derive(z, call, dz)
    precise = exactly(call)
    z, _ = reference.run(precise)
    assert z is not None
    for name, wanted in derive(z, precise, dz.double()).items():
        assert got[name].shape == wanted.shape
        error = (got[name].double() - wanted).abs().max() / max(1.0, float(wanted.abs().max()))
        assert error <= tolerance, name


MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "causal, later rows": Mask(causal=True, q_offset=17, kv_offset=4),
    "causal, rows that see nothing": Mask(causal=True, q_offset=3, kv_offset=20),
    "window": Mask(window=(9, 5), q_offset=2),
    "causal window": Mask(causal=True, window=(20, 0), q_offset=21),
    "left window": Mask(window=(7, None)),
    "right window": Mask(window=(None, 3)),
    "dense": Mask(
        dense=torch.rand(1, 2, 40, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.4,
        causal=True,
        q_offset=8,
    ),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask: Mask) -> None:
    assert_right(a_call(mask=mask, sinks=mask.causal))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_sink_and_window_under_masks(mask: Mask) -> None:
    assert_right(a_call(mask=mask, operations=(SinkWindow(torch.tensor([5]).to(DEVICE), 11),), sinks=not mask.causal))


def padded(left: int, right: int, causal: bool) -> Mask:
    real = torch.ones(2, 50, dtype=torch.bool, device=DEVICE)
    real[0, :left] = False
    real[1, 50 - right :] = False
    return Mask(causal=causal, q_offset=10, padding=real, first=torch.tensor([left, 0], device=DEVICE))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("operations", [(), (SinkWindow(3, 8),)], ids=["plain", "sink window"])
def test_padding_left_and_right(causal: bool, operations: tuple[Operation, ...]) -> None:
    # 19 keys before row 9's own, so that some rows see nothing under causality.
    assert_right(a_call(batch=2, mask=padded(19, 20, causal), operations=operations))


def test_a_padded_key_may_score_anything() -> None:
    call = a_call(batch=2, mask=padded(5, 20, False))
    with torch.no_grad():
        call.k[0, :, :5] *= 1e3
    assert_right(call)


@pytest.mark.parametrize(
    "where",
    [(1, 2, 1), (1, 1, 40), (2, 2, 40), (2, 1, 1)],
    ids=["by head", "by row", "by sample, head and row", "by sample"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_sink_and_window_of_chosen_rows(where: tuple[int, int, int], causal: bool) -> None:
    op = SinkWindow(torch.tensor([0, 18]).to(DEVICE), torch.tensor([12, 1]).to(DEVICE), where=chosen(*where))
    assert_right(a_call(batch=2, mask=Mask(causal=causal, q_offset=10), operations=(op,)))


def test_an_endless_window() -> None:
    huge = torch.tensor([2**31 - 1, 6], device=DEVICE)
    assert_right(a_call(mask=Mask(causal=True, q_offset=10), operations=(SinkWindow(2, huge),)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 20), (2, 2, 20)], ids=str)
def test_gains_and_temperatures(shape: tuple[int, int, int]) -> None:
    gain, temperature = leaf(*shape), leaf(*shape, low=0.5)
    with torch.no_grad():
        gain[..., 0] = 0.0
    assert_right(a_call((20, 20), batch=2, operations=(Gain(gain), Temperature(temperature)), sinks=True))


def test_several_gains_and_temperatures_with_conditions_and_numbers() -> None:
    operations = (
        Gain(leaf(1, 2, 1), where=chosen(1, 1, 20)),
        Gain(0.5, where=chosen(2, 2, 1)),
        Gain(1.5),
        Temperature(leaf(2, 1, 20, low=0.5), where=chosen(1, 2, 20)),
        Temperature(1.4),
        Temperature(0.7, where=chosen(1, 2, 1)),
    )
    assert_right(a_call((20, 20), batch=2, mask=Mask(causal=True), operations=operations))


@pytest.mark.parametrize("operations", [(), (Temperature(1.2),)], ids=["plain", "temperature"])
def test_softcap(operations: tuple[Operation, ...]) -> None:
    assert_right(a_call(mask=Mask(causal=True, q_offset=10), operations=operations, softcap=0.8, sinks=True))


def test_softcap_with_a_learned_temperature() -> None:
    assert_right(a_call(operations=(Temperature(leaf(1, 2, 40, low=0.5)),), softcap=0.8))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)], ids=str)
def test_heads_that_share_keys(heads: tuple[int, int]) -> None:
    assert_right(a_call((20, 20), heads=heads, mask=Mask(causal=True), sinks=True))


@pytest.mark.parametrize("dims", [(64, 32), (72, 72), (80, 128), (96, 16), (256, 256), (5, 3), (1, 1)], ids=str)
def test_head_dims(dims: tuple[int, int]) -> None:
    assert_right(a_call((18, 21), dims=dims, mask=Mask(causal=True, q_offset=3)))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 33), (33, 1), (16, 16), (17, 47), (48, 32)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(lengths: tuple[int, int], causal: bool) -> None:
    offset = max(lengths[1] - lengths[0], 0)
    assert_right(a_call(lengths, mask=Mask(causal=causal, q_offset=offset), sinks=True))


@pytest.mark.parametrize(("bm", "bn"), [(32, 16), (16, 32)])
def test_tiles_that_are_not_square(bm: int, bn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "forced", (Config(bm, bn, 4, 1), Config(bm, bn, 4, 1)))
    for mask in (Mask(causal=True, q_offset=17), Mask(causal=True, window=(20, 0), q_offset=10)):
        assert_right(a_call((65, 50), mask=mask))
        assert_right(a_call((65, 50), mask=mask, operations=(SinkWindow(18, 19),)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 4e-2)], ids=str)
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    operations = (Gain(leaf(1, 2, 1)), Temperature(leaf(1, 1, 40, low=0.5)), SinkWindow(4, 20))
    mask = Mask(causal=True, q_offset=10)
    assert_right(a_call(dims=(32, 48), dtype=dtype, mask=mask, operations=operations, sinks=True), tolerance)


def test_layouts_and_an_expanded_gradient() -> None:
    q, k, v = (leaf(1, 20, heads, 16) for heads in (4, 2, 2))
    call = replace(
        a_call((20, 20), heads=(4, 2), mask=Mask(causal=True)),
        q=q.transpose(1, 2),
        k=k.transpose(1, 2),
        v=v.transpose(1, 2),
    )
    got = torch.autograd.grad(differentiable(call).sum(), (q, k, v))
    z, _ = reference.run(call)
    assert z is not None
    for mine, wanted in zip(got, torch.autograd.grad(z.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=0)
    scattered = replace(call, q=leaf(1, 4, 16, 20).transpose(2, 3))
    z = differentiable(scattered)
    assert torch.autograd.grad(z, scattered.q, torch.ones_like(z))[0].shape == scattered.q.shape


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks", "gain", "temperature"])
def test_one_gradient_alone(name: str) -> None:
    call = a_call((20, 20), operations=(Gain(leaf(1, 2, 1)), Temperature(leaf(1, 2, 1, low=0.5))), sinks=True)
    gain, temperature = call.edit.of(Gain)[0].value, call.edit.of(Temperature)[0].value
    for other, x in {
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "sinks": call.sinks,
        "gain": gain,
        "temperature": temperature,
    }.items():
        assert isinstance(x, Tensor)
        x.requires_grad_(other == name)
    assert_right(call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="sized for the tiles of the interpreter")
def test_tiles_that_a_rule_hides_are_not_read() -> None:
    # Whole tiles of 16 keys that no row of a tile of rows may see: their keys would turn what they touch into NaN.
    call = a_call(
        (64, 64),
        mask=Mask(causal=True),
        operations=(SinkWindow(16, 1, where=torch.tensor([[[True], [False]]]).to(DEVICE)),),
    )
    with torch.no_grad():
        call.k[:, :, 16:32] = torch.nan
    z = differentiable(call)
    dz = torch.zeros_like(z)
    dz[:, 32:, 0] = 1.0
    dq = torch.autograd.grad(z, call.q, dz)[0]
    assert dq[:, 0, 32:].isfinite().all()
    windowed = a_call((64, 64), mask=Mask(causal=True, window=(15, 0)))
    with torch.no_grad():
        windowed.q[:, :, 48:] = torch.nan
    z = differentiable(windowed)
    dk, dv = torch.autograd.grad(z, (windowed.k, windowed.v), torch.ones_like(z))
    assert dk[:, :, :32].isfinite().all()
    assert dv[:, :, :32].isfinite().all()


def test_rows_that_see_nothing_and_keys_nobody_sees_have_gradient_zero() -> None:
    call = a_call((20, 40), mask=Mask(causal=True, q_offset=4, kv_offset=10), sinks=True)
    z = differentiable(call)
    dq, dk, dv = torch.autograd.grad(z, (call.q, call.k, call.v), torch.ones_like(z))
    assert dq[:, :, :6].abs().max() == 0
    assert dq[:, :, 7:].abs().max() > 0
    assert dk[:, :, 14:].abs().max() == 0
    assert dv[:, :, 14:].abs().max() == 0


def test_repeated_runs_agree_to_the_bit() -> None:
    operations = (Gain(leaf(1, 4, 1)), Temperature(leaf(1, 4, 20, low=0.5)), SinkWindow(2, 9))
    call = a_call((20, 20), heads=(4, 1), mask=Mask(causal=True), operations=operations, sinks=True)
    runs = [derive(z, call, torch.ones_like(z)) for z in (differentiable(call), differentiable(call))]
    for name, first in runs[0].items():
        assert torch.equal(first, runs[1][name]), name


def test_calls_of_a_kind_share_a_plan() -> None:
    memo: dict[str, Any] = {}
    first = replace(a_call((20, 20), mask=Mask(causal=True)), memo=memo)
    assert_right(first)
    plan = dict(memo)
    second = replace(first, q=leaf(1, 2, 20, 16), k=leaf(1, 1, 20, 16), v=leaf(1, 1, 20, 16))
    assert_right(second)
    assert memo == plan


def test_what_is_kept_for_the_backward_pass_is_linear() -> None:
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    call = a_call((96, 96), mask=Mask(causal=True), operations=(Gain(leaf(1, 2, 1)),))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        differentiable(call)
    assert max(sizes) <= 2 * 96 * 16
    assert len(sizes) <= 8


def test_a_second_derivative_is_refused() -> None:
    call = a_call((16, 16))
    z = differentiable(call)
    with pytest.raises(BackendUnavailable, match="'triton' has no second derivative .create_graph=True.; ask for"):
        torch.autograd.grad(z.sum(), call.q, create_graph=True)


def test_what_has_no_gradient_is_named() -> None:
    call = a_call((16, 16))
    groups = torch.zeros(1, 16, dtype=torch.int8, device=DEVICE)
    for op, name in (
        (GroupWeights(torch.ones(1, 1, 1, 1), renormalise=True), "GroupWeights"),
        (Boost(torch.ones(1, 1, 1, 1)), "Boost"),
        (Uniform(), "Uniform"),
    ):
        found = lacks_gradient(replace(call, edit=Edit((op, Gain(2.0)), groups=groups)))
        assert found == f"it has no gradient for {name} (only for Gain, Temperature and SinkWindow)"
    assert lacks_gradient(replace(call, bias=torch.zeros(1, 1, 16, 16))) == (
        "it has no gradient where a bias is added to the scores"
    )
    assert lacks_gradient(replace(call, readout=Readout(row_stats=True))) == "it has no gradient of readings"
