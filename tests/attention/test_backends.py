"""Which backend computes a call, what SDPA gives, and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.attention import (
    AttentionArgumentError,
    BackendUnavailable,
    Boost,
    Edit,
    Gain,
    GroupWeights,
    Mask,
    Readout,
    Redistribute,
    Temperature,
    Uniform,
    attend,
    backends,
    blockwise,
)


def operands(n_queries: int = 9, n_keys: int = 9, width: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 4, n_queries, 8), (2, 2, n_keys, 8), (2, 2, n_keys, width))
    q, k, v = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return {"q": q, "k": k, "v": v, "scale": 0.4}


PADDING = torch.arange(9)[None] >= torch.tensor([[0], [4]])
MASKED = torch.tensor([0.0, torch.finfo(torch.float32).min] * 5)[:9].view(1, 1, 1, 9)

PLAIN: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"mask": Mask(causal=True)},
    "same offsets": {"mask": Mask(causal=True, q_offset=5, kv_offset=5)},
    "window": {"mask": Mask(causal=True, window=(2, 0))},
    "left padding": {"mask": Mask(causal=True, padding=PADDING)},
    "empty rows": {"mask": Mask(causal=True, kv_offset=3)},
    "rule": {"mask": Mask(rule=lambda b, h, i, j: (i + j + b) % 2 == 0)},
    "dense per head": {"mask": Mask(dense=torch.rand(1, 4, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.6)},
    "bias": {"bias": torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(2)), "mask": Mask(causal=True)},
    "masking bias": {"bias": MASKED, "mask": Mask(padding=PADDING)},
    "all masked": {"bias": MASKED, "mask": Mask(padding=torch.arange(9)[None] % 2 == 1)},
    "gain": {"edit": Edit((Gain(torch.rand(2, 4, 1)), Gain(0.0, torch.arange(9).view(1, 1, 9) > 5)))},
    "temperature": {"edit": Edit((Temperature(1.7),)), "mask": Mask(causal=True), "bias": torch.rand(1, 1, 9, 9)},
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 5])
def test_sdpa_equals_the_reference(kind: str, dtype: torch.dtype, width: int) -> None:
    given = {**operands(width=width, dtype=dtype), **PLAIN[kind]}
    wanted = attend(**given, backend="reference").output
    got = attend(**given, backend="auto")
    assert got.readings.backend == "sdpa"
    assert got.output.is_contiguous() and got.output.dtype == dtype
    # The reference rounds once, SDPA in low precision several times: a few units in the last place.
    atol = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(got.output, wanted, atol=atol, rtol=atol)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(9, 5), (5, 9), (1, 9)])
def test_sdpa_causality_by_offsets(n_queries: int, n_keys: int) -> None:
    for q_offset in (0, 4, 8):
        given = {**operands(n_queries, n_keys), "mask": Mask(causal=True, q_offset=q_offset)}
        torch.testing.assert_close(attend(**given, backend="sdpa").output, attend(**given, backend="reference").output)


@pytest.mark.parametrize("kind", ["full", "causal", "same offsets"])
def test_sdpa_gets_no_mask_where_it_needs_none(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Tensor, **given: Any) -> Tensor:
        seen.append(given["attn_mask"])
        return real(*args, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    attend(**operands(), **PLAIN[kind])
    decode = {**operands(1, 9), "mask": Mask(causal=True, window=(8, 0), q_offset=8, padding=torch.ones(1, 9) > 0)}
    attend(**decode)
    assert seen == [None, None]


@pytest.mark.parametrize(
    "given",
    [
        {"softcap": 3.0},
        {"sinks": torch.zeros(4)},
        {"edit": Edit((Uniform(),))},
        {"edit": Edit((Temperature(torch.full((1, 4, 1), 2.0)),))},
        {"readout": Readout(row_stats=True)},
    ],
    ids=["softcap", "sinks", "edit", "temperatures", "readout"],
)
def test_a_backend_asked_for_never_falls_back(given: dict[str, Any]) -> None:
    with pytest.raises(BackendUnavailable, match=r"'sdpa' cannot compute this call: it (has|gives|cannot)"):
        attend(**operands(), **given, backend="sdpa")
    assert attend(**operands(), **given).readings.backend == "blockwise"


def test_unknown_and_missing_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AttentionArgumentError, match="must be one of auto, reference, blockwise, sdpa, triton; got 'flash'"
    ):
        attend(**operands(), backend="flash")
    monkeypatch.setitem(backends.BACKENDS, "triton", "interp.attention.nowhere")
    with pytest.raises(BackendUnavailable, match="'triton' is not built yet"):
        attend(**operands(), backend="triton")


def test_auto_makes_no_large_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "SDPA_MASK_BYTES", 161)
    # A mask of its own: the choice is remembered for calls with the same mask.
    padded = Mask(causal=True, padding=PADDING)
    assert attend(**operands(), mask=padded).readings.backend == "blockwise"  # 2 x 9 x 9 bytes
    assert attend(**operands(), **PLAIN["window"]).readings.backend == "sdpa"
    assert attend(**operands(), **PLAIN["causal"]).readings.backend == "sdpa"


def test_nothing_wanted_gives_nothing() -> None:
    output, readings = attend(**operands(), want_output=False)
    assert output is None and readings.tensors() == {}


# Gradients


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("case", ["plain", "edited", "padded"])
def test_gradients(backend: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blockwise.TILE_BYTES, "cpu", 64)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 3, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    gain, temperature = (1 + torch.rand(1, 2, 1, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(1, 2, 1, 2, dtype=torch.float64)
    sinks = torch.randn(2, dtype=torch.float64)
    groups = torch.tensor([[0, 1, 0, 1, 1]], dtype=torch.int8)
    padding = torch.arange(5)[None] >= 2 if case == "padded" else None
    extras = [x.requires_grad_() for x in (gain, temperature, weight, sinks)] if case != "plain" else []

    def run(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = {}
        if extras:
            gain, temperature, weight, sinks = extras
            edit = Edit(
                (
                    Gain(gain), Temperature(temperature), Boost(0.3 * weight), GroupWeights(weight, renormalise=True),
                    Redistribute((0,), (1,), 0.4, (), ()), Uniform(torch.arange(5).view(1, 1, 5) == 3),
                ),
                groups,
            )  # fmt: skip
            given = {"edit": edit, "sinks": sinks, "softcap": 2.0}
        asked = Readout(row_stats=True, received=True, pooled=2, groups=groups, n_groups=2)
        mask = Mask(causal=True, padding=padding)
        output, readings = attend(q, k, v, scale=0.7, mask=mask, readout=asked, backend=backend, **given)
        read = (readings.entropy, readings.mass, readings.received, readings.pooled, readings.top_weight)
        lse = readings.lse if case != "padded" else readings.lse[..., 2:]
        return (output, *read, lse)

    # In fast mode one random direction instead of every input: a blockwise call is a dozen tiles here.
    assert torch.autograd.gradcheck(run, (q, k, v, *extras), fast_mode=backend == "blockwise")


def test_gradients_keep_no_map() -> None:
    q, k, v = (torch.randn(1, 2, 1024, 4, requires_grad=True) for _ in range(3))

    def differentiate(backend: str) -> tuple[int, tuple[Tensor, ...]]:
        kept = [0]

        def pack(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = attend(q, k, v, scale=0.5, mask=Mask(causal=True), backend=backend).output
        return max(kept), torch.autograd.grad(output.square().sum(), (q, k, v))

    kept, wanted = differentiate("reference")
    assert kept == 2 * 1024 * 1024
    kept, got = differentiate("blockwise")
    assert kept <= q.numel()
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_large_masks_are_not_kept_with_their_kind() -> None:
    from interp.attention import kinds

    def kept(mask: Mask) -> bool:
        attend(**operands(64, 64), mask=mask)
        return any(kind.holds[0] is mask for kind in kinds._kinds.values())

    assert kept(Mask(dense=torch.ones(1, 1, 64, 64, dtype=torch.bool)))
    before = kinds.KEPT_BYTES
    try:
        kinds.KEPT_BYTES = 64 * 64 - 1
        assert not kept(Mask(dense=torch.ones(1, 1, 64, 64, dtype=torch.bool)))
    finally:
        kinds.KEPT_BYTES = before


@pytest.mark.parametrize(
    "lse",
    [torch.zeros(2, 4, 8), torch.zeros(2, 4, 9, dtype=torch.float64), torch.zeros(2, 9, 4).mT],
    ids=lambda x: str(x.shape),
)
def test_a_log_sum_exp_of_another_form_is_refused(lse: Tensor) -> None:
    rule = r"lse: must be contiguous float32 \(2, 4, 9\); got torch.float(32|64) of shape \(2, 4, [89]\)"
    with pytest.raises(AttentionArgumentError, match=rule):
        attend(**operands(), readout=Readout(row_stats=True), lse=lse)
