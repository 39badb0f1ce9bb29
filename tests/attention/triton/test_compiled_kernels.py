"""The kernels behind the compiler's operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.attention import Edit, Gain, GroupWeights, Mask, Readout, SinkWindow, Temperature, attend, ops

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 21


def operands() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(DEVICE) for shape in ((1, 2, N, 16), (1, 1, N, 16), (1, 1, N, 16))]


def edit(gain: torch.Tensor) -> Edit:
    weight = torch.tensor([1.0, 0.5], device=DEVICE).view(1, 1, 1, 2)
    groups = (torch.arange(N, device=DEVICE) % 2)[None].to(torch.int8)
    return Edit((Gain(gain), Temperature(1.5), SinkWindow(2, 9), GroupWeights(weight, renormalise=True)), groups)


@pytest.mark.parametrize(
    "readout", [Readout(), Readout(row_stats=True, received=True, pooled=4)], ids=["output", "read"]
)
def test_opcheck(readout: Readout) -> None:
    q, k, v = operands()
    given: dict[str, Any] = {
        "softcap": None,
        "sinks": None,
        "bias": None,
        "lse": None,
        "want_output": True,
        "scale": 0.3,
    }
    flat = ops.flatten(
        q, k, v, mask=Mask(causal=True), edit=edit(torch.rand(1, 2, 1, device=DEVICE)), readout=readout, backend="triton",
        **given,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.headscope.attend.default, flat)


def test_compiled_with_gradients() -> None:
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gain: torch.Tensor) -> Any:
        change = Edit((Gain(gain), Temperature(1.5)))
        return attend(q, k, v, scale=0.3, mask=Mask(causal=True), edit=change, backend="triton").output

    def run(function: Any) -> list[torch.Tensor]:
        leaves = [*operands(), torch.linspace(0.5, 1, 2, device=DEVICE).view(1, 2, 1)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        z = function(*leaves)
        return [z.detach(), *torch.autograd.grad(z.square().sum(), leaves)]

    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step))
