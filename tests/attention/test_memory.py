"""The blockwise backend never holds anything of size queries x keys."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interp.attention import (
    Blocks,
    Boost,
    DropKeys,
    Edit,
    GivenRows,
    GroupWeights,
    Mask,
    Neighbourhood,
    OffsetBins,
    Readout,
    Redistribute,
    SinkWindow,
    Threshold,
    Uniform,
    attend,
    blockwise,
)

N, HEADS = 1024, 2
LINE = torch.arange(N)[None, :, None]
GRID = torch.stack([LINE[..., 0] // 32, LINE[..., 0] % 32], -1)
GROUPS = torch.arange(N)[None].remainder(3).to(torch.int8)
EVERYTHING = Readout(
    row_stats=True, groups=GROUPS, n_groups=3, topk=2, received=True, pooled=16, rows=torch.tensor([1, N - 1]),
    group_output=torch.tensor([0, 7]),
)  # fmt: skip

CALLS: dict[str, dict[str, Any]] = {
    "line": {"readout": Readout(offset=OffsetBins(LINE, LINE, (0,), (N,)))},
    "grid": {"readout": Readout(offset=OffsetBins(GRID, GRID, (-31, -31), (31, 31))), "mask": Mask()},
    "padding": {"mask": Mask(causal=True, padding=torch.arange(N)[None] > 9)},
    "rule": {"mask": Mask(rule=lambda b, h, i, j: (i - j) % 7 < 3)},
    "boost": {"edit": Edit((Boost(torch.ones(1, 2, 1, 3)),), GROUPS)},
    "sink window": {"edit": Edit((SinkWindow(4, torch.tensor([64, 128])),))},
    "blocks": {"edit": Edit((Blocks(64, torch.ones(1, 16, 16).tril() > 0),))},
    "neighbourhood": {"edit": Edit((Neighbourhood(3, GRID, GRID),))},
    "threshold": {"edit": Edit((Threshold(torch.zeros(1, 2, N)),))},
    "drop": {"edit": Edit((DropKeys(torch.zeros(1, 1, N, 32, dtype=torch.int64)),))},
    "uniform": {"edit": Edit((Uniform(),))},
    "given": {"edit": Edit((GivenRows(torch.tensor([0]), torch.tensor([3]), torch.ones(1, 1, 1, N)),))},
    "weights": {
        "edit": Edit(
            (GroupWeights(torch.ones(1, 1, 1, 3) / 2, True), Redistribute((0,), (1,), 0.5, (1,), (1,))), GROUPS
        )
    },
    "sinks and softcap": {"sinks": torch.zeros(2), "softcap": 9.0},
}


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.made_by = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() > self.bytes:
                self.bytes, self.made_by = x.untyped_storage().nbytes(), str(func)
        return made


def largest_tensor(backend: str, **given: Any) -> Largest:
    q, k, v = (torch.randn(1, HEADS, N, 8) for _ in range(3))
    given = {"mask": Mask(causal=True), "readout": EVERYTHING, **given}
    with Largest() as largest:
        attend(q, k, v, scale=0.3, backend=backend, **given)
    return largest


@pytest.mark.parametrize("kind", CALLS)
def test_no_operation_makes_a_map(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tile_bytes = 1 << 17
    monkeypatch.setitem(blockwise.TILE_BYTES, "cpu", tile_bytes)
    one_map = N * N * 4
    largest = largest_tensor("blockwise", **CALLS[kind])
    # Index tensors have eight bytes an element to the scores' four; anything linear in N is smaller than a tile.
    assert largest.bytes <= 2 * tile_bytes, largest.made_by
    assert largest.bytes < one_map / 10
    assert largest_tensor("reference", **CALLS[kind]).bytes >= HEADS * one_map


PEAK = """
import resource, sys
import torch
from interp.attention import Mask, OffsetBins, Readout, attend
torch.set_num_threads(1)
N = int(sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
line = torch.arange(N)[None, :, None]
asked = Readout(row_stats=True, received=True, pooled=64, offset=OffsetBins(line, line, (0,), (N - 1,)))
q, k, v = (torch.randn(1, 2, N, 32) for _ in range(3))
few = OffsetBins(line[:, :64], line[:, :64], (0,), (9,))
attend(q[:, :, :64], k[:, :, :64], v[:, :, :64], scale=0.2, mask=Mask(causal=True), backend="blockwise",
       readout=Readout(row_stats=True, received=True, pooled=64, offset=few))
before = peak()
attend(q, k, v, scale=0.2, mask=Mask(causal=True), backend="blockwise", readout=asked)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is Unix only")
def test_peak_memory_of_the_process_is_linear() -> None:
    n = 4096
    shown = subprocess.run([sys.executable, "-c", PEAK, str(n)], capture_output=True, text=True, check=True)
    extra = int(shown.stdout)
    one_map = n * n * 4
    assert extra < one_map, f"{extra / 2**20:.0f} MiB beyond the inputs; one head's map is {one_map / 2**20:.0f} MiB"
