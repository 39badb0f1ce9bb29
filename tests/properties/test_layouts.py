"""Laws of layouts: every position is one thing, and what generation adds does not change what was there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.models.layout import KINDS, Layout, layout
from interp.testing import build

ARRAYS = ("kind", "token_ids", "tokens", "prompt", "image", "tile", "row", "column", "tile_row", "tile_column")
MODEL = build("llama").module
VOCABULARY = int(MODEL.config.vocab_size)

ids = st.integers(0, VOCABULARY - 1)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[sample, position]``, padded on the left."""
    samples, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rows = [draw(st.lists(ids, min_size=length, max_size=length)) for _ in range(samples)]
    pads = [draw(st.integers(0, length - 1)) for _ in range(samples)]
    mask = torch.tensor([[int(n >= pad) for n in range(length)] for pad in pads])
    return torch.tensor(rows), mask


def laid(tokens: torch.Tensor, mask: torch.Tensor, generated: int = 0) -> Layout:
    return layout(MODEL, {"input_ids": tokens, "attention_mask": mask}, generated=generated)["text"]


def same(a: Layout, b: Layout) -> None:
    for name in ARRAYS:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


@settings(max_examples=40)
@given(prompts(), st.data())
def test_every_position_is_one_thing(prompt: tuple[torch.Tensor, torch.Tensor], data: st.DataObject) -> None:
    tokens, mask = prompt
    found = laid(tokens, mask, data.draw(st.integers(0, tokens.shape[1])))
    pads = mask.numpy() == 0
    assert found.shape == tuple(tokens.shape)
    assert np.array_equal(found.kind == -1, pads)
    times = np.sum([found.mask(kind) for kind in KINDS], axis=0)
    assert np.array_equal(times, (~pads).astype(int))
    groups = found.groups()
    assert groups.dtype == np.int8 and groups.min() >= 0 and groups.max() < len(KINDS) <= 8
    assert np.array_equal(groups[~pads], found.kind[~pads]) and not groups[pads].any()
    assert np.array_equal(found.token_ids, tokens.numpy())
    assert np.array_equal(found.prompt, np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape))
    assert not found.mask("image").any() and (found.row == -1).all()


@settings(max_examples=40)
@given(prompts(), st.data())
def test_what_is_appended_leaves_the_rest_and_comes_in_any_pieces(
    prompt: tuple[torch.Tensor, torch.Tensor], data: st.DataObject
) -> None:
    tokens, mask = prompt
    before = laid(tokens, mask)
    n = data.draw(st.integers(0, 4))
    new = torch.tensor([data.draw(st.lists(ids, min_size=n, max_size=n)) for _ in tokens], dtype=torch.long).reshape(
        len(tokens), n
    )
    stopped = np.array([[m >= data.draw(st.integers(0, n)) for m in range(n)] for _ in tokens], dtype=bool).reshape(
        len(tokens), n
    )
    whole = before.extend(new, pads=stopped)
    assert whole.shape == (len(tokens), tokens.shape[1] + n)
    for name in ARRAYS:
        assert np.array_equal(getattr(whole, name)[:, : tokens.shape[1]], getattr(before, name)), name
    assert np.array_equal(whole.mask("generated")[:, tokens.shape[1] :], ~stopped)
    cut = data.draw(st.integers(0, n))
    same(before.extend(new[:, :cut], pads=stopped[:, :cut]).extend(new[:, cut:], pads=stopped[:, cut:]), whole)
    # The same sequence, said in one go: what was generated is generated, whatever token it is.
    if n and not stopped.any():
        again = laid(torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1), generated=n)
        same(again, whole)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.integers(0, 2**16))
def test_an_overlay_puts_each_patch_where_it_stands(rows: int, columns: int, others: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = rows * columns + others
    order = rng.permutation(n)
    fields: dict[str, Any] = {name: np.full((1, n), -1, np.int32) for name in ARRAYS[3:]}
    kind = np.full((1, n), KINDS.index("text"), np.int8)
    for number in range(rows * columns):
        place = order[number]
        kind[0, place] = KINDS.index("image")
        for name in ("image", "tile"):
            fields[name][0, place] = 0
        fields["row"][0, place], fields["column"][0, place] = divmod(number, columns)
    fields["prompt"][:] = 0
    made = Layout("text", kind, np.zeros((1, n), np.int64), np.full((1, n), "", object), **fields)
    values = rng.normal(size=(2, n))
    assert made.grid() == (rows, columns)
    over = made.overlay(values)
    assert over.shape == (2, rows, columns)
    for number in range(rows * columns):
        assert np.array_equal(over[:, number // columns, number % columns], values[:, order[number]])
    assert np.isclose(over.sum(), values[:, made.mask("image")[0]].sum())
