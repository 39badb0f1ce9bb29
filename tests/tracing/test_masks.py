"""A transformers mask as a description shows what the dense mask of transformers shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as m

from interp.attention import Mask
from interp.tracing.masks import LazyMask

CAUSAL, BOTH_WAYS = m.causal_mask_function, m.bidirectional_mask_function
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


def blocks(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i // 2 == j // 2


def one_pair_at_a_time(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Right for single indices alone: what broadcasting would make of it is another mask."""
    return torch.stack([i, j]).sum() % 3 != 0


def lazy(function: Callable[..., Any], **given: Any) -> LazyMask:
    lengths = {"batch_size": 2, "q_length": 6, "kv_length": 6, "q_offset": 0, "kv_offset": 0}
    return LazyMask("sdpa", {**lengths, "mask_function": function, "device": "cpu", **given})


def visible(mask: Mask, n_queries: int = 6, n_keys: int = 6) -> Tensor:
    seen = mask.visible(2, n_queries, n_keys, torch.device("cpu"))
    return (torch.ones(1, dtype=torch.bool) if seen is None else seen).expand(2, 1, n_queries, n_keys)


# Function, arguments, and what of the description is told apart from a rule: causal, window.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], bool, Any]] = {
    "causal": (CAUSAL, {}, True, None),
    "both ways": (BOTH_WAYS, {}, False, None),
    "window": (m.and_masks(CAUSAL, m.sliding_window_overlay(3)), {}, True, (2, None)),
    "window both ways": (m.and_masks(BOTH_WAYS, m.sliding_window_bidirectional_overlay(2)), {}, False, (2, 2)),
    "two windows": (
        m.and_masks(CAUSAL, m.sliding_window_overlay(2), m.sliding_window_overlay(4)), {}, True, (1, None),
    ),
    "two windows both ways": (
        m.and_masks(m.sliding_window_overlay(2), *map(m.sliding_window_bidirectional_overlay, (1, 3))), {}, False, (1, 1),
    ),
    "causal and a rule": (m.and_masks(CAUSAL, blocks), {}, True, None),
    "window and two rules": (
        m.and_masks(CAUSAL, m.sliding_window_overlay(4), blocks, lambda b, h, i, j: j != 2), {}, True, (3, None),
    ),
    "a rule": (m.or_masks(CAUSAL, blocks), {}, False, None),
    "a rule for single indices": (one_pair_at_a_time, {"use_vmap": True}, False, None),
    "causal and a rule for single indices": (m.and_masks(CAUSAL, one_pair_at_a_time), {"use_vmap": True}, True, None),
}  # fmt: skip


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("name", CASES)
def test_a_description_shows_what_the_dense_mask_shows(name: str, padding: Tensor | None) -> None:
    function, given, causal, window = CASES[name]
    mask = lazy(function, attention_mask=padding, **given)
    told = mask.describe()
    assert (told.causal, told.window) == (causal, window)
    assert (told.rule is None) == ("rule" not in name)
    assert torch.equal(visible(told), mask.dense())


def test_padding_is_cut_to_the_keys_of_a_cache() -> None:
    # Keys 2..5 of a sliding cache; the caller's mask ends before the last key, which is then no real one.
    mask = lazy(CAUSAL, q_length=2, kv_length=4, q_offset=4, kv_offset=2, attention_mask=PADDING[:, :5])
    told = mask.describe()
    assert (told.q_offset, told.kv_offset) == (4, 2)
    assert told.padding is not None and told.first is not None
    assert told.padding.tolist() == [[True, True, True, False]] * 2
    assert told.first.tolist() == [0, 2]
    assert torch.equal(visible(told, 2, 4), mask.dense())


def test_padding_without_a_pad_is_none() -> None:
    told = lazy(CAUSAL, attention_mask=torch.ones(2, 6, dtype=torch.long)).describe()
    assert told.padding is None
    assert told.first is not None and told.first.tolist() == [0, 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function", [CAUSAL, BOTH_WAYS], ids=["causal", "both ways"])
def test_model_code_that_computes_with_a_mask_meets_a_tensor(function: Callable[..., Any]) -> None:
    mask: Any = lazy(function, allow_is_bidirectional_skip=True)
    assert mask.native() is None  # the model's own attention needs no mask here
    whole = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    wanted = whole.tril() if function is CAUSAL else whole
    assert mask.dim() == mask.ndim == 4
    assert mask.shape == wanted.shape
    assert torch.equal(mask[..., :3], wanted[..., :3])
    assert torch.equal(mask & wanted.mT, wanted & wanted.mT)
    assert torch.equal(~mask, ~wanted)
    assert torch.equal(torch.logical_not(mask), ~wanted)
    assert torch.equal(torch.cat([mask, mask], dim=0), torch.cat([wanted, wanted]))
    assert torch.equal(torch.where(condition=mask, input=torch.ones(1), other=torch.zeros(1)), wanted.float())
