"""Answers that need no weights: uniform rows by a query of zero, and how much S2-Attention's blocks keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.attention import Edit, Mask, Readout, Uniform, attend
from interp.interventions.patterns import Shards
from interp.testing import build
from interp.tracing.calls import SiteCall


def test_a_query_of_zero_gives_the_rows_of_the_uniform_edit() -> None:
    q, k, v = (torch.randn(1, h, 9, 8, dtype=torch.float64) for h in (4, 2, 2))
    given: dict[str, Any] = {"scale": 0.3, "mask": Mask(causal=True), "readout": Readout(attention=True)}
    zero = attend(torch.zeros_like(q), k, v, **given)
    edited = attend(q, k, v, edit=Edit((Uniform(torch.ones(1, 1, 1, dtype=torch.bool)),)), **given)
    wanted = torch.ones(9, 9, dtype=torch.float64).tril() / torch.arange(1, 10)[:, None]
    for got in (zero, edited):
        assert got.readings.attention is not None and got.output is not None
        torch.testing.assert_close(got.readings.attention.double(), wanted.expand(1, 4, 9, 9), atol=1e-7, rtol=0)
        means = (wanted @ v).repeat_interleave(2, 1).transpose(1, 2)
        torch.testing.assert_close(got.output.double(), means, atol=1e-6, rtol=1e-6)
    plain = attend(q, k, v, **given).readings.attention
    assert plain is not None and (plain.double() - wanted).abs().max() > 0.1


def test_zeroing_a_heads_query_is_masking_it_as_uniform() -> None:
    """The released code of the retrieval-head paper masks so: q = 0 of the head, before the softmax."""
    specimen = build("llama")

    def zero(call: SiteCall) -> None:
        if call.site.layer == 1:
            call.q = call.q.index_fill(1, torch.tensor([2]), 0.0)

    logits: list[torch.Tensor] = []
    for used in (interp.Custom(before=zero), interp.MaskHeads("L1H2", kind="uniform"), None):
        with torch.no_grad(), interp.hooked(specimen.module, interventions=[used] if used else []):
            logits.append(specimen.module(**specimen.inputs).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("heads", "stride", "local", "offset"), [(2, 4, 2, 0), (4, 8, 3, 0), (8, 8, 1, 5), (3, 8, 0, 1), (16, 8, 2, 0)]
)
def test_shards_keep_the_blocks_that_their_density_says(heads: int, stride: int, local: int, offset: int) -> None:
    blocks = 32
    got = Shards(16, local, stride, offset).allowed(heads, blocks)
    step = max(1, stride // heads)
    kept = np.zeros((heads, blocks), dtype=int)
    for h, m in np.ndindex(heads, blocks):
        # Recent blocks, and every stride-th of those before them from the head's own first one on.
        before, first = max(0, m + 1 - local), -(h * step + offset) % stride
        kept[h, m] = min(m + 1, local) + max(0, -(-(before - first) // stride))
    np.testing.assert_array_equal(got.sum(-1).numpy(), kept)
    # Together they keep all that is there iff there is a head for every residue: with H * step >= stride, as it is often put, two
    # heads would do for a stride of 4, and they keep every other block.
    together = got.any(0)[torch.arange(blocks)[:, None] - torch.arange(blocks)[None] >= local]
    assert bool(together.all()) == (heads >= stride)
    assert together.float().mean() == pytest.approx(min(1.0, heads / stride), abs=0.04)
