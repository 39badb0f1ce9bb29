"""Gains on z: one rounding, other heads to the bit, and tensors that change in place."""

from __future__ import annotations

import pytest
import torch

from interp.attention import Gain
from interp.tracing.gains import scaled


def z(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def where(*heads: int) -> torch.Tensor:
    found = torch.zeros(1, 4, 1, dtype=torch.bool)
    found[:, list(heads)] = True
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 2.0, 0.3])
def test_chosen_heads_are_rounded_once_and_others_stay(dtype: torch.dtype, value: float) -> None:
    x = z(dtype)
    got = scaled(x, Gain(value, where(1, 3)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = (x.to(wide) * torch.tensor(value, dtype=wide)).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got[:, :, [1, 3]], wanted[:, :, [1, 3]])
    assert torch.equal(got[:, :, [0, 2]], x[:, :, [0, 2]])


def test_a_value_for_each_sample_head_and_row() -> None:
    value = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    got = scaled(z(), Gain(value))
    assert torch.equal(got, z() * value.transpose(1, 2)[..., None])


@pytest.mark.parametrize("inference", [False, True])
def test_a_gain_changed_in_place_is_noticed(inference: bool) -> None:
    with torch.inference_mode(inference):
        value = torch.ones(1, 4, 1)
        gain, x = Gain(value), z()
        assert torch.equal(scaled(x, gain), x)
        value[:, 2] = 0.5
        assert torch.equal(scaled(x, gain)[:, :, 2], x[:, :, 2] / 2)
        assert torch.equal(scaled(x.bfloat16(), gain)[:, :, 2], x.bfloat16()[:, :, 2] / 2)


def test_gradients_reach_gain_and_z() -> None:
    value, x = torch.ones(1, 4, 1, requires_grad=True), z().requires_grad_()
    gain = Gain(value, where(0))
    for _ in range(2):
        made = torch.autograd.grad(scaled(x, gain).sum(), (value, x))
        torch.testing.assert_close(
            made[0].flatten(), torch.tensor([float(x[:, :, 0].sum()), 0, 0, 0]), atol=1e-5, rtol=0
        )
        assert torch.equal(made[1], torch.ones_like(x))
