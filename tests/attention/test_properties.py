"""Laws that hold for any scores."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.attention import (
    Edit,
    Gain,
    GroupWeights,
    Mask,
    OffsetBins,
    Readout,
    Redistribute,
    Uniform,
    attend,
    blockwise,
)

seeds = st.integers(0, 2**31)
lengths = st.integers(1, 24)


def tensors(seed: int, n_queries: int, n_keys: int, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, n_queries, 4), (2, 2, n_keys, 4), (2, 2, n_keys, 3))
    q, k, v = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return spread * q, k, v


def all_readings(n_queries: int, n_keys: int, seed: int) -> Readout:
    random = torch.Generator().manual_seed(seed)
    bins = OffsetBins(torch.arange(n_queries)[None, :, None], torch.arange(n_keys)[None, :, None], (-99,), (99,))
    return Readout(
        groups=torch.randint(0, 3, (1, n_keys), generator=random), n_groups=3, row_stats=True, received=True, pooled=5,
        offset=bins, group_output=torch.arange(n_queries), attention=True,
    )  # fmt: skip


@settings(max_examples=25)
@given(seeds, lengths, lengths, st.booleans(), st.sampled_from([0.1, 1.0, 30.0]))
def test_every_reading_adds_up_to_the_same_mass(
    seed: int, n_queries: int, n_keys: int, causal: bool, spread: float
) -> None:
    q, k, v = tensors(seed, n_queries, n_keys, spread)
    sinks = torch.linspace(-2, 2, 4, dtype=torch.float64)
    edit = Edit((Gain(torch.rand(2, 4, n_queries, dtype=torch.float64)),))
    asked = all_readings(n_queries, n_keys, seed)
    output, readings = attend(
        q, k, v, scale=1.0, sinks=sinks, mask=Mask(causal=causal), readout=asked, edit=edit, backend="blockwise"
    )
    mass = readings.mass.sum(-1)
    torch.testing.assert_close(mass, 1 - readings.sink_share)
    total = mass.sum(-1)
    torch.testing.assert_close(readings.attention.sum((2, 3)), total)
    torch.testing.assert_close(readings.received.sum((2, 3)), total)
    torch.testing.assert_close(readings.pooled.sum((2, 3)), total)
    torch.testing.assert_close(readings.offset.sum(2), total)
    torch.testing.assert_close(readings.group_output.sum(-2).transpose(1, 2), output)
    assert (readings.entropy >= -1e-12).all()
    assert (readings.entropy <= math.log(n_keys + 1) + 1e-12).all()
    assert (readings.top_weight <= mass + 1e-12).all()
    assert (readings.received <= readings.received_rows + 1e-12).all()


@settings(max_examples=25)
@given(seeds, lengths, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_redistribution_keeps_row_sums(seed: int, length: int, fraction: float, summ: float, rho: float) -> None:
    q, k, v = tensors(seed, length, length, spread=5.0)
    groups = torch.randint(0, 4, (2, length), generator=torch.Generator().manual_seed(seed))
    edit = Edit((Redistribute((0, 2), (1,), fraction, (0, 1), (1,), summ, rho),), groups, n_groups=4)
    given_ = {"scale": 1.0, "mask": Mask(causal=True), "readout": Readout(row_stats=True), "backend": "blockwise"}
    sinks = torch.zeros(4, dtype=torch.float64)
    plain = attend(q, k, v, sinks=sinks, **given_).readings
    moved = attend(q, k, v, sinks=sinks, edit=edit, **given_).readings
    torch.testing.assert_close(moved.mass, plain.mass)
    assert moved.lse.equal(plain.lse)
    assert moved.sink_share.equal(plain.sink_share)


@settings(max_examples=25)
@given(seeds, st.integers(2, 24), st.data())
def test_a_call_on_later_rows_equals_those_rows_of_the_whole_call(seed: int, length: int, data: st.DataObject) -> None:
    # Decoding with a cache: new rows with an offset, a sliding cache that has dropped what the window hides.
    start = data.draw(st.integers(1, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    window = data.draw(st.integers(1, length))
    q, k, v = tensors(seed, length, length)
    mask = Mask(causal=True, window=(window - 1, 0))
    dropped = max(start - window + 1, 0)
    groups = torch.randint(0, 3, (1, length), generator=torch.Generator().manual_seed(seed))
    uniform = (torch.arange(length) % 5 == 0).view(1, 1, -1)
    weights = GroupWeights(torch.rand(1, 4, 1, 3, dtype=torch.float64), renormalise=True)
    given_ = {"scale": 1.0, "readout": Readout(row_stats=True), "backend": "blockwise"}
    whole = attend(q, k, v, mask=mask, edit=Edit((weights, Uniform(uniform)), groups), **given_)
    keys = slice(dropped, stop)
    part = attend(
        q[:, :, start:stop], k[:, :, keys], v[:, :, keys],
        mask=replace(mask, q_offset=start, kv_offset=dropped),
        edit=Edit((weights, Uniform(uniform[..., start:stop])), groups[:, keys]), **given_,
    )  # fmt: skip
    torch.testing.assert_close(part.output, whole.output[:, start:stop])
    for name, values in part.readings.tensors().items():
        torch.testing.assert_close(values, getattr(whole.readings, name)[:, :, start:stop], msg=name)


@settings(max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 60),
    st.integers(1, 10),
    st.integers(1, 9000),
)
def test_tiles_cover_every_pair_once(
    n_queries: int, kv_heads: int, group: int, n_keys: int, batch: int, tile_bytes: int
) -> None:
    from interp.attention.call import Call

    heads = kv_heads * group
    call = Call(
        torch.empty(batch, heads, n_queries, 1), torch.empty(batch, kv_heads, n_keys, 1),
        torch.empty(batch, kv_heads, n_keys, 1), 1.0, Mask(causal=True), None, None, None, Edit(), Readout(), True,
    )  # fmt: skip
    seen = torch.zeros(batch, heads, n_queries, n_keys, dtype=torch.int32)
    for tile in blockwise.tiles(call, tile_bytes):
        within = tile.heads[0] // group == (tile.heads[1] - 1) // group
        assert within or (tile.heads[0] % group == tile.heads[1] % group == 0)
        seen[slice(*tile.batch), slice(*tile.heads), slice(*tile.rows), slice(*tile.keys)] += 1
    visible = torch.ones(n_queries, n_keys).tril() > 0
    assert (seen[..., visible] == 1).all()
    assert (seen <= 1).all()


@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 60), st.integers(1, 4), st.integers(64, 40000),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([Mask(), Mask(causal=True), Mask(window=(3, None))]),
)  # fmt: skip
def test_a_call_said_to_be_one_tile_is_one(
    n_queries: int, kv_heads: int, group: int, n_keys: int, batch: int, tile_bytes: int, dtype: torch.dtype, mask: Mask
) -> None:
    from interp.attention.call import Call

    q = torch.empty(batch, kv_heads * group, n_queries, 4, dtype=dtype)
    k = torch.empty(batch, kv_heads, n_keys, 4, dtype=dtype)
    call = Call(q, k, k, 1.0, mask, None, None, None, Edit(), Readout(), True)
    alone = list(blockwise.tiles(call, tile_bytes)) == [call.whole]
    # Where keys may be hidden the tiles have to be looked at.
    assert blockwise.one_tile(call, tile_bytes) == (alone and mask.trivial)
