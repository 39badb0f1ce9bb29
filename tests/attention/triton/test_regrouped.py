"""Redistributions whose key groups differ by layer, as VAR's sinks do: prepared once, and each layer's own groups are used."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from interp.attention import Edit, Gain, Mask, Redistribute, attend, combine, kinds
from interp.attention.triton import backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, ROWS, KEYS = 2, 20, 28


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device=DEVICE)


@pytest.mark.parametrize(("batch", "mode"), [(1, torch.no_grad), (BATCH, torch.inference_mode)])
def test_layers_differ_in_their_groups_and_share_the_rest(
    batch: int, mode: type[AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(batch)
    kinds.clear()
    prepared = 0
    real = backend.tables

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal prepared
        prepared += 1
        return real(*args, **options)

    monkeypatch.setattr(backend, "tables", counted)
    where = rand(1, 4, ROWS) < 0.7
    family = Edit((Redistribute((0, 1), (2,), 0.6, (1, 2), (2,), rho=0.2, where=where),), n_groups=4)
    gain = Edit((Gain(rand(1, 4, 1)),))
    mask = Mask(causal=True, q_offset=KEYS - ROWS)
    outputs = []
    with mode():
        for layer in range(3):
            q, k, v = rand(BATCH, 4, ROWS, 16), rand(BATCH, 2, KEYS, 16), rand(BATCH, 2, KEYS, 24)
            groups = (4 * rand(batch, KEYS)).to(torch.int8)
            if layer == 1:
                groups = torch.full_like(groups, 3)  # nothing to move
            edit = family.regrouped(groups)
            given: dict[str, Any] = {"scale": 0.4, "mask": mask, "edit": combine(edit, gain)}
            got = attend(q, k, v, **given, backend="triton").output
            wanted = attend(q, k, v, **given, backend="reference").output
            assert got is not None and wanted is not None
            torch.testing.assert_close(got, wanted, atol=5e-6, rtol=5e-6)
            outputs.append((q, k, v, groups, got))
        # The first layer again, after others have been through the same launch.
        q, k, v, groups, before = outputs[0]
        again = attend(q, k, v, scale=0.4, mask=mask, edit=combine(family.regrouped(groups), gain), backend="triton")
        assert torch.equal(again.output, before)  # pyright: ignore[reportArgumentType]
    assert prepared == 1


def test_what_is_read_or_differentiated_is_prepared_by_layer() -> None:
    kinds.clear()
    family = Edit((Redistribute((0,), (1,), 0.5, (0, 1), (1,)),), n_groups=2)
    mask = Mask(causal=True)
    for layer in range(2):
        q, k, v = (rand(1, 2, ROWS, 16) for _ in range(3))
        groups = (2 * rand(1, ROWS)).to(torch.int8)
        for edit in (family.regrouped(groups), family.regrouped(1 - groups)):
            given: dict[str, Any] = {"scale": 0.4, "mask": mask, "edit": edit}
            got, wanted = (attend(q, k, v, **given, backend=name) for name in ("triton", "reference"))
            torch.testing.assert_close(got.output, wanted.output, atol=5e-6, rtol=5e-6, msg=f"layer {layer}")
