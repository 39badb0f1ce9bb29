"""The kernels against the specification in float64, on random calls: every mask, edit and reading, alone and in company.

On a CPU the kernels run in Triton's interpreter, on small shapes; on a GPU they run compiled, on larger ones.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from interp.attention import (
    AttentionArgumentError,
    BackendUnavailable,
    Edit,
    GivenRows,
    Readout,
    Temperature,
    attend,
)
from interp.testing.attention_cases import EDITS, MASKS, SCORES, Case, Maker, moved
from interp.testing.budget import assert_within_error_budget

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZES: dict[str, Any] = (
    {"queries": (1, 300), "keys": (2, 400), "dims": (32, 64, 72, 80, 96, 128, 256)}
    if GPU
    else {"queries": (1, 24), "keys": (2, 40), "dims": (8, 16, 24)}
)
# bfloat16 arithmetic is wrong in the interpreter, so there it is only upcast first; its own path is tested on a GPU.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)
EDITS_HERE = tuple(edit for edit in EDITS if edit != "given-rows")
REFUSED = (("threshold", "top-keys"), ("drop-keys", "drop-top-keys"), ("top-keys", "drop-top-keys"))
"""Pairs of edits that are put to the kernels as two of one kind."""
NOTHING: dict[str, Any] = {
    "row_stats": False, "topk": 0, "group_output": None, "received": False, "pooled": 0, "offset": None, "rows": None,
    "distance": None,
}  # fmt: skip
TOP_KEYS = ("top_key", "topk_key")


@pytest.fixture(autouse=True)
def few_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """These kernels are for many rows, but must be right for few; test_decode.py has those that take over there."""
    from interp.attention.triton import backend

    monkeypatch.setattr(backend, "DECODE_ROWS", 0)


def make(seed: int, mask: str, edits: tuple[str, ...], scores: tuple[str, ...], dtype: torch.dtype) -> Case:
    case = Maker(seed, torch.float64, **SIZES).case(mask, edits, scores)
    case["scale"] = float(case["q"].shape[-1]) ** -0.5
    # Tables as users give them: operands in low precision, numbers per row and head in float32.
    case = moved(case, DEVICE, torch.float32)
    for name in ("q", "k", "v"):
        case[name] = case[name].to(dtype)
    if not GPU:
        # The interpreter takes its time: each case asks for the map, which the others are judged by, and a few more.
        chosen = random.Random(seed).sample(sorted(NOTHING), 3)
        case["readout"] = replace(case["readout"], **{name: NOTHING[name] for name in NOTHING if name not in chosen})
    return case


def check(case: Case, what: str) -> None:
    got = attend(**case, backend="triton")
    # Blocks of a GPU finish in any order; the interpreter has one.
    again = attend(**case, backend="triton") if GPU else got
    wanted = attend(**moved(case, DEVICE, torch.float64), backend="reference")
    assert got.readings.backend == "triton"
    assert got.output is not None and wanted.output is not None and again.output is not None
    low = attend(**case, backend="blockwise").output
    assert low is not None
    # exp2 takes scores times log2(e), rounded once more than exp's: no part of the error in low precision, a third in fp32,
    # and all of it where a row sees so few keys that PyTorch is exact.
    factor, units = (3.0, 2.0) if got.output.dtype == torch.float32 else (2.0, 1.0)
    assert_within_error_budget(
        got.output, wanted.output, low.to(got.output.dtype), factor=factor, units=units, what=f"{what}: output"
    )
    assert torch.equal(got.output, again.output), f"{what}: repeated runs differ"
    full = wanted.readings.attention
    assert full is not None
    for name, value in wanted.readings.tensors().items():
        found = getattr(got.readings, name)
        assert found is not None and found.shape == value.shape, f"{what}: {name}"
        assert torch.equal(found, getattr(again.readings, name)), f"{what}: {name} differs between runs"
        if name in TOP_KEYS:
            check_keys(found, value, full, case, f"{what}: {name}")
        elif name == "received_rows":
            assert torch.equal(found, value), f"{what}: {name}"
        elif name == "group_output":
            rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[case["q"].dtype]
            close(found, value, rounding, rounding, f"{what}: {name}")
        else:
            assert found.dtype in (torch.float32, torch.int32)
            atol = 1e-4 if name == "entropy" else 1e-5
            close(found, value, atol, 2e-5, f"{what}: {name}")


def check_keys(found: torch.Tensor, wanted: torch.Tensor, full: torch.Tensor, case: Case, what: str) -> None:
    """Equal, or the key named has as much of the row as the wanted one, to rounding."""
    differ = found != wanted
    if not differ.any():
        return
    assert bool(((found >= 0) == (wanted >= 0))[differ].all()), what
    slots = lambda keys: (keys - case["mask"].kv_offset).clamp_min(0).long()  # noqa: E731
    squeeze = found.ndim == 3
    there = full.gather(-1, slots(found[..., None] if squeeze else found))
    best = full.gather(-1, slots(wanted[..., None] if squeeze else wanted))
    chosen = differ[..., None] if squeeze else differ
    close(there[chosen], best[chosen], 1e-7, 1e-5, what)


def close(found: torch.Tensor, wanted: torch.Tensor, atol: float, rtol: float, what: str) -> None:
    torch.testing.assert_close(found.double(), wanted, atol=atol, rtol=rtol, msg=lambda m: f"{what}: {m}")


def cases() -> list[Any]:
    """Masks, edits and score variants alone, and pairs of edits: a rotation through all of them."""
    listed: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    listed += [(mask, ("none",), ("plain",)) for mask in MASKS]
    listed += [(MASKS[n % len(MASKS)], (edit,), ("plain",)) for n, edit in enumerate(EDITS_HERE)]
    listed += [("causal", (edit,), ("plain",)) for edit in EDITS_HERE]
    listed += [(MASKS[(3 * n) % len(MASKS)], ("none",), (score,)) for n, score in enumerate(SCORES)]
    pairs = [pair for pair in itertools.combinations(EDITS_HERE[1:], 2) if pair not in REFUSED]
    random.Random(0).shuffle(pairs)
    for n, pair in enumerate(pairs[:24]):
        listed.append((MASKS[(7 * n) % len(MASKS)], pair, (SCORES[n % len(SCORES)],)))
    return [
        pytest.param(n, *case, DTYPES[n % len(DTYPES)], id=f"{n}-{case[0]}-{'+'.join(case[1])}-{case[2][0]}")
        for n, case in enumerate(listed)
    ]


@pytest.mark.parametrize(("seed", "mask", "edits", "scores", "dtype"), cases())
def test_kernels_equal_the_specification(
    seed: int, mask: str, edits: tuple[str, ...], scores: tuple[str, ...], dtype: torch.dtype
) -> None:
    check(make(seed, mask, edits, scores, dtype), f"{mask} {edits} {scores} {dtype}")


def test_what_the_kernels_lack_is_said_by_name() -> None:
    case = make(3, "causal", ("given-rows",), ("plain",), torch.float32)
    assert any(isinstance(op, GivenRows) for op in case["edit"].operations)
    with pytest.raises(BackendUnavailable, match="'triton' cannot compute this call: .*GivenRows"):
        attend(**case, backend="triton")
    wide = make(4, "causal", ("none",), ("plain",), torch.float32)
    wide["q"], wide["k"] = (torch.zeros(*x.shape[:3], 264, device=DEVICE) for x in (wide["q"], wide["k"]))
    with pytest.raises(BackendUnavailable, match="its head dims end at 256, and this call has 264"):
        attend(**wide, backend="triton")
    exact = moved(make(5, "causal", ("none",), ("plain",), torch.float32), DEVICE, torch.float64)
    with pytest.raises(BackendUnavailable, match="computes in float32, and q is torch.float64"):
        attend(**exact, backend="triton")


def test_a_log_sum_exp_given_must_fit() -> None:
    case = make(6, "causal", ("none",), ("plain",), torch.float32)
    with pytest.raises(AttentionArgumentError, match="lse: must be contiguous float32"):
        attend(**case, lse=torch.zeros(1, 2, 3), backend="triton")


def test_strided_index_tensors_and_blocks_of_rows_that_do_not_count() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 180, 16, device=DEVICE), torch.randn(1, 2, 180, 16, device=DEVICE)
    groups = torch.randint(0, 3, (1, 360), device=DEVICE).to(torch.int8)[:, ::2]
    rows_count = torch.zeros(1, 360, dtype=torch.int8, device=DEVICE)[:, ::2]
    rows_count[:, :140] = -1  # whole blocks of rows, whatever the tile
    readout = Readout(
        row_stats=True, groups=groups, n_groups=3, received=True, query_groups=rows_count,
        heads=torch.arange(4, device=DEVICE)[::3], rows=torch.arange(180, device=DEVICE)[::97],
    )  # fmt: skip
    got = attend(q, k, k, scale=0.2, readout=readout, backend="triton").readings
    wanted = attend(q.double(), k.double(), k.double(), scale=0.2, readout=readout, backend="reference").readings
    for name, value in wanted.tensors().items():
        close(getattr(got, name), value.double(), 1e-4, 1e-5, name)


def test_a_log_sum_exp_of_the_unedited_softmax_is_no_answer_for_an_edited_one() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 24, 16, device=DEVICE), torch.randn(1, 2, 24, 16, device=DEVICE)
    plain = attend(q, k, k, scale=0.5, readout=Readout(row_stats=True), backend="triton").readings.lse
    assert plain is not None
    edit, readout = Edit((Temperature(2.0),)), Readout(row_stats=True, received=True)
    got = attend(
        q, k, k, scale=0.5, edit=edit, readout=readout, lse=plain, want_output=False, backend="triton"
    ).readings
    wanted = attend(q, k, k, scale=0.5, edit=edit, readout=readout, backend="reference").readings
    assert got.received is not None
    assert wanted.received is not None
    close(got.received, wanted.received.double(), 1e-5, 1e-5, "received")
