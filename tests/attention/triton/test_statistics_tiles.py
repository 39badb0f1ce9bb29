"""Statistics of a known softmax in tiles of several sizes, which end elsewhere than the keys, the rows and the groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.attention import Mask, Readout, attend, kinds

pytest.importorskip("triton")

from interp.attention.triton import configs, passes
from interp.attention.triton.configs import Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 70
TILES = [Config(16, 64, 4, 1), Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(16, 16, 4, 1)]
REAL = torch.arange(N, device=DEVICE)[None] >= torch.tensor([[0], [9]], device=DEVICE)
MASKS = {
    "all": Mask(), "causal": Mask(causal=True), "window": Mask(window=(20, 3)),
    "padded": Mask(causal=True, padding=REAL, first=torch.tensor([0, 9], device=DEVICE)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that need not start as zeros start as what no reading is."""
    made = torch.empty

    def make(self: passes.Buffer, device: torch.device) -> torch.Tensor:
        whole = torch.zeros(self.shape, dtype=self.dtype, device=device)
        return whole if self.zeros else made(self.shape, dtype=self.dtype, device=device).fill_(-77)

    monkeypatch.setattr(passes.Buffer, "make", make)


@pytest.mark.parametrize("first", [True, False], ids=["masses first", "masses last"])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.bm}x{tile.bn}")
@pytest.mark.parametrize("name", list(MASKS))
def test_equal_the_specification(name: str, tile: Config, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((2, heads, N, 16), generator=random).to(DEVICE) for heads in (2, 1, 1))
    # Each sample's own groups, the last of which begins in the last tile.
    groups = torch.ones(2, N, dtype=torch.int8, device=DEVICE)
    groups[0, :1], groups[0, 66:], groups[1, 30:37], groups[1, 64:] = 0, 2, 2, 0
    readout = Readout(row_stats=True, groups=groups, n_groups=3, received=True, pooled=12)
    call: dict[str, Any] = {"scale": 0.3, "mask": MASKS[name], "readout": readout}
    expected = attend(q, k, v, backend="reference", **call).readings.tensors()
    monkeypatch.setattr(configs, "forced", tile)
    monkeypatch.setattr(configs, "FEW", N if first else 0)
    kinds.clear()
    given = attend(q, k, v, backend="triton", want_output=False, lse=expected["lse"].float(), **call).readings.tensors()
    kinds.clear()
    assert given.keys() == expected.keys()
    for reading, tensor in given.items():
        torch.testing.assert_close(tensor.double(), expected[reading].double(), rtol=1e-4, atol=1e-4, msg=reading)
