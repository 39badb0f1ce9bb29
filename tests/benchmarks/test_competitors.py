"""What the benchmarks compare with computes what it should."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))
from _competitors import column_sums

from interp.attention import Mask, Readout, attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [16, 45])
def test_column_sums(n: int, causal: bool) -> None:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, n, 16, generator=random).to(DEVICE) for heads in (4, 2))
    readout = Readout(row_stats=True, received=True)
    wanted = attend(q, k, k, scale=0.3, mask=Mask(causal=causal), readout=readout, backend="reference").readings
    assert wanted.lse is not None
    assert wanted.received is not None
    got = column_sums(q, k, wanted.lse, scale=0.3, causal=causal)
    torch.testing.assert_close(got, wanted.received[:, :, 0], atol=1e-5, rtol=1e-5)
