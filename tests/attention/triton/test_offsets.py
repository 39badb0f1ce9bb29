"""Offset histograms and distances of the kernels over several pieces and blocks, against the specification in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.attention import Distances, Edit, Gain, Mask, OffsetBins, Readout, attend
from interp.testing.attention_cases import moved

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 300 if DEVICE == "cuda" else 40
PADDING = torch.arange(N)[None] >= torch.tensor([[0], [5]])


def line(length: int, first: int, special: tuple[int, ...]) -> torch.Tensor:
    places = torch.arange(first, first + length)
    places[list(special)] = -1
    return places[None, :, None]


CASES: dict[str, dict[str, Any]] = {
    "causal": {"mask": Mask(causal=True)},
    "a special first token": {"mask": Mask(causal=True), "special": (0,)},
    "special tokens all over": {"mask": Mask(causal=True), "special": (0, 7, 21, 22, N - 1)},
    "later rows of a cache": {"mask": Mask(causal=True, q_offset=12), "queries": N - 12, "special": (3,)},
    "full": {"mask": Mask(), "lo": 1 - N, "special": (2,)},
    "window": {"mask": Mask(causal=True, window=(9, 0)), "special": (0,)},
    "padding, rows that do not count": {"mask": Mask(causal=True, padding=PADDING), "uncounted": True, "special": (6,)},
    "fewer bins": {"mask": Mask(causal=True), "lo": 2, "hi": 18},
    "a gain": {"mask": Mask(causal=True), "edit": Edit((Gain(2.0),)), "special": (0,)},
    "heads": {"mask": Mask(causal=True), "heads": torch.tensor([1])},
}


@pytest.mark.parametrize("name", CASES)
def test_offsets_and_distances_over_several_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.attention.triton import backend, offsets

    case = CASES[name]
    n_queries, special, batch = case.get("queries", N), case.get("special", ()), 2 if case.get("uncounted") else 1
    monkeypatch.setattr(backend, "DECODE_ROWS", 0)
    monkeypatch.setattr(offsets, "MAP_BYTES", 4 * batch * 2 * N * (130 if DEVICE == "cuda" else 17))  # 2 or 3 pieces
    # What a kernel leaves untouched must not be read.
    empty = torch.empty
    spoilt = lambda *size, **how: empty(*size, **how).fill_(float("nan"))  # noqa: E731
    torch.manual_seed(0)
    q, k = torch.randn(batch, 2, n_queries, 16), torch.randn(batch, 1, N, 16)
    skipped = tuple(n - (N - n_queries) for n in special if n >= N - n_queries)
    queries, keys = line(n_queries, N - n_queries, skipped), line(N, 0, special)
    uncounted = torch.zeros(batch, n_queries, dtype=torch.int8)
    uncounted[-1, :5] = -1
    readout = Readout(
        heads=case.get("heads"), query_groups=uncounted if case.get("uncounted") else None,
        offset=OffsetBins(queries, keys, (case.get("lo", 0),), (case.get("hi", N - 1),)), distance=Distances(queries, keys),
    )  # fmt: skip
    given = {"mask": case["mask"], "edit": case.get("edit"), "readout": readout}
    given = moved(given, DEVICE)
    q, k = q.to(DEVICE), k.to(DEVICE)
    wanted = attend(q.double(), k.double(), k.double(), scale=0.4, backend="reference", **given).readings
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", spoilt)
        got = attend(q, k, k, scale=0.4, backend="triton", want_output=False, **given).readings
    for reading in ("offset", "distance", "distance_mass"):
        found, value = getattr(got, reading), getattr(wanted, reading)
        torch.testing.assert_close(found.double(), value, atol=2e-5, rtol=2e-5, msg=lambda m, r=reading: f"{r}: {m}")
