"""What the conftest keeps between the interpreter's operations changes no bit of what the kernels compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.attention import Edit, Gain, GroupWeights, Mask, Readout, SinkWindow, Temperature, attend

pytest.importorskip("triton")

N = 20


def case(name: str) -> tuple[list[Tensor], dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    queries = 1 if name == "decoding" else N
    shapes = (1, 2, queries, 16), (1, 1, N, 16), (1, 1, N, 16)
    dtype = torch.bfloat16 if name == "prefill in bfloat16" else torch.float32
    qkv = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
    groups = torch.randint(0, 3, (1, N), generator=random).to(torch.int8)
    weights = GroupWeights(torch.rand(1, 2, 1, 3, generator=random), renormalise=True)
    given: dict[str, Any] = {"scale": 0.3, "mask": Mask(causal=True, q_offset=N - queries)}
    if name == "backward":
        return qkv, {**given, "edit": Edit((Gain(0.5), SinkWindow(2, 9)))}
    readout = Readout(row_stats=True, received=True, pooled=2, topk=2, groups=groups, n_groups=3)
    edit = Edit((weights, SinkWindow(2, 9), Temperature(torch.tensor([[[0.5], [2.0]]]))), groups=groups)
    return qkv, {**given, "edit": edit, "readout": readout, "sinks": torch.randn(2, generator=random)}


def computed(name: str) -> dict[str, Tensor]:
    qkv, given = case(name)
    if name == "backward":
        leaves = [x.requires_grad_() for x in qkv]
        out = attend(*leaves, **given, backend="triton").output
        assert out is not None
        out.square().sum().backward()
        return {
            "output": out.detach(),
            **{f"d{n}": x.grad for n, x in zip("qkv", leaves, strict=True) if x.grad is not None},
        }
    with torch.no_grad():
        got = attend(*qkv, **given, backend="triton")
    assert got.output is not None
    return {"output": got.output, **got.readings.tensors()}


NAMES = ["decoding", "prefill in bfloat16", "backward"]


@pytest.fixture(scope="module")
def quick() -> dict[str, dict[str, Tensor]]:
    # Before any test of this file replaces the interpreter.
    return {name: computed(name) for name in NAMES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not in use")
@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_the_plain_interpreter(name: str, quick: Any, plain_interpreter: None) -> None:
    plain = computed(name)
    assert plain.keys() == quick[name].keys()
    for part, value in plain.items():
        assert value.dtype == quick[name][part].dtype
        assert torch.equal(value.nan_to_num(7.0), quick[name][part].nan_to_num(7.0)), part
