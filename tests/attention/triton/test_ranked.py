"""Keys by their rank: rows are read in blocks, and what cannot be put to the kernels is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from interp.attention import DropKeys, Edit, Gain, Mask, Readout, Temperature, Threshold, TopKeys, attend
from interp.attention.backends import BackendUnavailable
from interp.attention.triton import ranked

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def given(rows: int, keys: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(rows)
    q, k, v = (
        torch.randn(shape, generator=random).to(DEVICE)
        for shape in ((2, 4, rows, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    )
    return {"q": q, "k": k, "v": v, "scale": 0.5, "mask": Mask(causal=True, q_offset=keys - rows)}


@pytest.mark.parametrize("rows", [1, 24], ids=["decode", "prefill"])
@pytest.mark.parametrize("drawn", [False, True], ids=["keep", "drop"])
def test_rows_by_blocks_are_the_whole(rows: int, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranked, "BLOCK", 2 * 4 * 30 * 7)  # 7 rows at a time
    call = given(rows, 30)
    draws = torch.rand(2, 4, rows, 5, device=DEVICE) if drawn else None
    heads = torch.tensor([True, False, True, True], device=DEVICE).view(1, 4, 1)
    operations = (Temperature(2.0), Gain(0.5), TopKeys(5, draws, 0.6, where=heads))
    readout = Readout(row_stats=True, attention=True)
    got, wanted = (
        attend(**call, edit=Edit(operations), readout=readout, backend=backend) for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got.output, wanted.output, atol=5e-6, rtol=5e-6)
    for name, reading in wanted.readings.tensors().items():
        torch.testing.assert_close(getattr(got.readings, name), reading, atol=2e-5, rtol=2e-5, check_dtype=False)


def test_scores_that_hardly_differ_are_told_apart() -> None:
    # Scores 3, 3 - gap, 1, 1, ...: the first alone is kept where fp32 can tell it from the second.
    for gap, kept in ((2e-5, 1), (1e-7, 2)):
        scores = torch.full((1, 1, 1, 20), 1.0, dtype=torch.float64, device=DEVICE)
        scores[..., 7], scores[..., 3] = 3.0, 3.0 - gap
        q = torch.ones(1, 1, 1, 16, device=DEVICE)
        k = (scores.mT / 16).expand(-1, -1, -1, 16).float().contiguous()
        readout = Readout(attention=True)
        found = attend(
            q, k, k, scale=1.0, edit=Edit((TopKeys(1),)), readout=readout, backend="triton"
        ).readings.attention
        assert found is not None and int((found > 0).sum()) == kept and bool(found[..., 7] > 0)


@pytest.mark.parametrize(
    ("operations", "says"),
    [
        ((TopKeys(2), TopKeys(3)), "one TopKeys at a time"),
        ((TopKeys(2), Threshold(torch.zeros(1, 1, 1))), "TopKeys beside Threshold"),
        (
            (TopKeys(2, torch.zeros(1, 1, 1, 2), 0.5), DropKeys(torch.zeros(1, 1, 1, 1).long())),
            "TopKeys beside DropKeys",
        ),
        ((TopKeys(40, torch.zeros(1, 1, 1, 40), 0.5),), "at most 32 keys"),
    ],
)
def test_what_the_kernels_lack_is_named_and_auto_goes_another_way(operations: Any, says: str) -> None:
    call = given(3, 9)
    edit = Edit(
        tuple(
            type(op)(**{n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in vars(op).items()})
            for op in operations
        )
    )
    with pytest.raises(BackendUnavailable, match=says):
        attend(**call, edit=edit, backend="triton")
    assert attend(**call, edit=edit).readings.backend == "blockwise"
