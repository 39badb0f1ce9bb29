"""Answers worked out by hand, on every backend that can give them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.attention import (
    Attended,
    Boost,
    Distances,
    DropKeys,
    Edit,
    Gain,
    GivenRows,
    GroupWeights,
    Mask,
    Neighbourhood,
    OffsetBins,
    Readings,
    Readout,
    Redistribute,
    SinkWindow,
    Temperature,
    TopKeys,
    Uniform,
    attend,
    blockwise,
)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["reference", "blockwise"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(blockwise.TILE_BYTES, "cpu", 64)  # several tiles even at these sizes
    return request.param


def call(scores: Tensor, backend: str, v: Tensor | None = None, **given: Any) -> Attended:
    """Attend with the given scores ``[Lq, Lk]`` (or ``[B, H, Lq, Lk]``): q is the identity, so that q.k is the table."""
    scores = scores.double()
    scores = scores if scores.ndim == 4 else scores[None, None]
    batch, heads, n_queries, n_keys = scores.shape
    q = torch.eye(n_queries, dtype=torch.float64).expand(batch, heads, -1, -1)
    v = torch.ones(batch, heads, n_keys, 1, dtype=torch.float64) if v is None else v
    given.setdefault("readout", Readout(row_stats=True, attention=True))
    return attend(q, scores.mT, v, scale=1.0, backend=backend, **given)


def groups(*numbers: int) -> Tensor:
    return torch.tensor([numbers], dtype=torch.int8)


def logs(*shares: float) -> Tensor:
    """One row of scores whose softmax is the given shares."""
    return torch.tensor([shares], dtype=torch.float64).log()


def close(got: Tensor | None, wanted: Any) -> None:
    assert got is not None
    torch.testing.assert_close(got.double(), torch.as_tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=1e-12)


def row(readings: Readings) -> Tensor:
    assert readings.attention is not None
    return readings.attention[0, 0, 0]


# Softmax and masks


def test_equal_scores_under_causality_spread_evenly(backend: str) -> None:
    readings = call(torch.zeros(6, 6), backend, mask=Mask(causal=True)).readings
    counts = torch.arange(1, 7).double()
    close(readings.entropy, counts.log()[None, None])
    close(readings.lse, counts.log()[None, None])
    close(readings.top_weight, 1 / counts[None, None])
    close(readings.top_key, torch.zeros(1, 1, 6))  # a tie: the lowest
    close(readings.mass, torch.ones(1, 1, 6, 1))
    close(readings.sink_share, torch.zeros(1, 1, 6))


def test_window_counts_keys(backend: str) -> None:
    mask = Mask(causal=True, window=(2, 0))
    readings = call(torch.zeros(5, 5), backend, mask=mask, readout=Readout(attention=True, received=True)).readings
    assert ((readings.attention[0, 0] > 0).sum(-1)).tolist() == [1, 2, 3, 3, 3]
    assert readings.received_rows[0, 0, 0].tolist() == [3, 3, 3, 2, 1]


def test_sink_takes_its_share(backend: str) -> None:
    # exp: 1 and 2 on keys, 3 on the sink.
    readings = call(torch.tensor([[0.0, math.log(2)]]), backend, sinks=torch.tensor([math.log(3)])).readings
    close(row(readings), [1 / 6, 2 / 6])
    close(readings.sink_share, [[[0.5]]])
    close(readings.lse, [[[math.log(6)]]])
    close(readings.mass, [[[[0.5]]]])
    close(readings.entropy, [[[math.log(6) / 6 + math.log(3) / 3]]])


def test_row_that_sees_nothing(backend: str) -> None:
    mask = Mask(padding=torch.zeros(1, 3, dtype=torch.bool))
    output, readings = call(torch.randn(2, 3), backend, mask=mask, readout=Readout(row_stats=True, topk=2))
    close(output, torch.zeros(1, 2, 1, 1))
    for name in ("top_weight", "entropy", "sink_share"):
        close(getattr(readings, name), torch.zeros(1, 1, 2))
    close(readings.mass, torch.zeros(1, 1, 2, 1))
    assert readings.lse.tolist() == [[[-math.inf, -math.inf]]]
    assert readings.top_key.tolist() == [[[-1, -1]]] and readings.topk_key.tolist() == [[[[-1, -1], [-1, -1]]]]


def test_row_that_sees_only_the_sink(backend: str) -> None:
    mask = Mask(padding=torch.zeros(1, 3, dtype=torch.bool))
    output, readings = call(torch.randn(2, 3), backend, mask=mask, sinks=torch.tensor([0.7]))
    close(output, torch.zeros(1, 2, 1, 1))
    close(readings.lse, torch.full((1, 1, 2), 0.7))
    close(readings.sink_share, torch.ones(1, 1, 2))
    assert readings.top_key.tolist() == [[[-1, -1]]]


def test_uniform_row_that_sees_nothing_stays_zero(backend: str) -> None:
    mask = Mask(padding=torch.zeros(1, 3, dtype=torch.bool))
    output, readings = call(torch.randn(2, 3), backend, mask=mask, edit=Edit((Uniform(),)))
    close(output, torch.zeros(1, 2, 1, 1))
    assert readings.top_key.tolist() == [[[-1, -1]]]


def test_bias_at_half_the_smallest_number_means_masked(backend: str) -> None:
    limit = torch.finfo(torch.float32).min / 2
    bias = torch.tensor([[[[0.0, limit, torch.finfo(torch.float32).min, -torch.inf, -1e30]]]], dtype=torch.float32)
    readings = call(torch.zeros(1, 5), backend, bias=bias, edit=Edit((Uniform(),))).readings
    close(row(readings), [0.5, 0, 0, 0, 0.5])  # -1e30 is a small number, not a mask; and uniform ignores it


def test_softcap_before_bias(backend: str) -> None:
    readings = call(torch.tensor([[3.0, -1.0]]), backend, softcap=2.0, bias=torch.tensor([[[[0.5, 0.0]]]])).readings
    scores = torch.tensor([2 * math.tanh(1.5) + 0.5, 2 * math.tanh(-0.5)], dtype=torch.float64)
    close(row(readings), scores.softmax(-1))


def test_left_padded_sample_equals_the_sample_alone(backend: str) -> None:
    alone = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    padded = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    padded[..., 3:, 3:] = alone
    padding = torch.tensor([[False] * 3 + [True] * 5])
    first = torch.tensor([3])
    edit = Edit((SinkWindow(sink=1, window=2),))
    want = call(alone, backend, mask=Mask(causal=True), edit=edit).readings
    got = call(padded, backend, mask=Mask(causal=True, padding=padding, first=first), edit=edit).readings
    close(got.attention[..., 3:, 3:], want.attention)
    close(got.entropy[..., 3:], want.entropy)
    assert (got.top_key[..., 3:] - 3).equal(want.top_key)
    close(got.attention[..., :3, :], torch.zeros(1, 1, 3, 8))  # pads see no pads


def test_offsets_place_a_sliding_cache(backend: str) -> None:
    # Tokens 10 and 11 are new; the cache holds 7 .. 11 and the window is 3 tokens: 8, 9, 10 and 9, 10, 11.
    mask = Mask(causal=True, window=(2, 0), q_offset=10, kv_offset=7)
    readings = call(torch.zeros(2, 5), backend, mask=mask).readings
    assert (readings.attention[0, 0] > 0).tolist() == [
        [False, True, True, True, False],
        [False, False, True, True, True],
    ]
    assert readings.top_key.tolist() == [[[8, 9]]]


def test_query_heads_share_key_value_heads(backend: str) -> None:
    q = torch.randn(1, 6, 4, 3, dtype=torch.float64)
    k, v = torch.randn(1, 2, 5, 3, dtype=torch.float64), torch.randn(1, 2, 5, 2, dtype=torch.float64)
    output, readings = attend(q, k, v, scale=0.5, readout=Readout(attention=True), backend=backend)
    for head in range(6):
        p = (0.5 * q[0, head] @ k[0, head // 3].mT).softmax(-1)
        close(readings.attention[0, head], p)
        close(output[0, :, head], p @ v[0, head // 3])


def test_low_precision_inputs_are_computed_in_fp32(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16).bfloat16() for _ in range(3))
    output, readings = attend(q, k, v, scale=0.25, readout=Readout(row_stats=True, attention=True), backend=backend)
    exact = (0.25 * q.double() @ k.double().mT).softmax(-1)
    assert output.dtype == torch.bfloat16 and readings.attention.dtype == readings.lse.dtype == torch.float32
    torch.testing.assert_close(readings.attention.double(), exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.double(), (exact @ v.double()).transpose(1, 2), atol=0, rtol=2**-8)


# Edits


def test_gain_leaves_other_heads_bit_equal(backend: str) -> None:
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float32) for heads in (4, 2, 2))
    where = torch.zeros(1, 4, 1, dtype=torch.bool)
    where[0, 2] = True
    plain = attend(q, k, v, scale=0.3, backend=backend).output
    edited = attend(q, k, v, scale=0.3, edit=Edit((Gain(0.0, where),)), backend=backend).output
    assert edited[:, :, [0, 1, 3]].equal(plain[:, :, [0, 1, 3]])
    assert not edited[:, :, 2].any()


def test_gains_multiply(backend: str) -> None:
    output = call(torch.zeros(1, 2), backend, edit=Edit((Gain(2.0), Gain(torch.full((1, 1, 1), 3.0))))).output
    close(output, [[[[6.0]]]])


def test_temperature_divides_neither_bias_nor_sink(backend: str) -> None:
    readings = call(
        torch.tensor([[2.0, 4.0]]), backend, bias=torch.tensor([[[[1.0, 0.0]]]]), sinks=torch.tensor([0.5]),
        edit=Edit((Temperature(2.0),)),
    ).readings  # fmt: skip
    close(torch.cat([row(readings), readings.sink_share[0, 0]]), torch.tensor([2.0, 2.0, 0.5]).double().softmax(-1))


def test_temperature_is_inside_the_softcap(backend: str) -> None:
    readings = call(torch.tensor([[3.0, 0.0]]), backend, softcap=1.0, edit=Edit((Temperature(0.5),))).readings
    close(row(readings), torch.tensor([math.tanh(6.0), 0.0], dtype=torch.float64).softmax(-1))


def test_boost_raises_negative_scores_and_never_unmasks(backend: str) -> None:
    # Group 1 at beta 0.5: -2 -> -1 and 2 -> 3; the masked key stays masked.
    beta = torch.tensor([0.0, 0.5])[None, None, None]
    padding = torch.tensor([[True, True, True, False]])
    edit = Edit((Boost(beta),), groups=groups(0, 1, 1, 1))
    readings = call(torch.tensor([[1.0, -2.0, 2.0, 9.0]]), backend, mask=Mask(padding=padding), edit=edit).readings
    close(row(readings), torch.tensor([1.0, -1.0, 3.0, -torch.inf]).double().softmax(-1))


def test_boost_with_a_masking_bias_is_finite(backend: str) -> None:
    beta = torch.full((1, 1, 1, 1), -1.0)
    bias = torch.tensor([[[[0.0, torch.finfo(torch.float32).min, -torch.inf]]]], dtype=torch.float32)
    readings = call(torch.zeros(1, 3), backend, bias=bias, edit=Edit((Boost(beta),), groups=groups(0, 0, 0))).readings
    close(row(readings), [1.0, 0.0, 0.0])


@pytest.mark.parametrize(("sink", "recent"), [(1, 2), (2, 3), (0, 4), (3, 1)])
def test_duo_attention_allows_sink_plus_recent(sink: int, recent: int, backend: str) -> None:
    edit = Edit((SinkWindow(sink, recent),))
    readings = call(torch.zeros(9, 9), backend, mask=Mask(causal=True), edit=edit).readings
    assert (readings.attention[0, 0] > 0).sum(-1).tolist() == [min(i + 1, sink + recent) for i in range(9)]


def test_dropped_keys_get_nothing(backend: str) -> None:
    keys = torch.tensor([5, 7, -1])[None, None, None]
    readings = call(torch.zeros(1, 4), backend, mask=Mask(kv_offset=4), edit=Edit((DropKeys(keys),))).readings
    close(row(readings), [0.5, 0, 0.5, 0])


def test_neighbourhood_on_a_grid_with_a_class_token(backend: str) -> None:
    # A class token and a 3 x 3 grid of patches: the corner sees itself, 3 neighbours and the class token.
    y, x = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    coords = torch.cat([torch.tensor([[-1, -1]]), torch.stack([y, x], -1).flatten(0, 1)])[None]
    readings = call(torch.zeros(10, 10), backend, edit=Edit((Neighbourhood(1, coords, coords),))).readings
    counts = (readings.attention[0, 0] > 0).sum(-1).tolist()
    assert counts == [10, 5, 7, 5, 7, 10, 7, 5, 7, 5]


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3])])
def test_weight_zero_renormalised_is_knockout(sinks: Tensor | None, backend: str) -> None:
    scores = torch.randn(4, 6)
    edit = Edit((GroupWeights(torch.tensor([1.0, 0.0])[None, None, None], renormalise=True),), groups(0, 1, 0, 0, 1, 0))
    got = call(scores, backend, sinks=sinks, edit=edit)
    bias = torch.zeros(1, 1, 1, 6).masked_fill(edit.groups == 1, -torch.inf)
    want = call(scores, backend, sinks=sinks, bias=bias)
    close(got.output, want.output)
    close(got.readings.attention, want.readings.attention)
    close(got.readings.sink_share, want.readings.sink_share)


def test_weight_zero_not_renormalised_loses_mass(backend: str) -> None:
    edit = Edit((GroupWeights(torch.tensor([1.0, 0.0])[None, None, None], renormalise=False),), groups(0, 1, 1))
    readings = call(logs(0.5, 0.3, 0.2), backend, edit=edit).readings
    close(row(readings), [0.5, 0.0, 0.0])
    close(readings.lse, [[[0.0]]])  # of the softmax, before the weights


def test_renormalised_row_with_nothing_left_stays_zero(backend: str) -> None:
    edit = Edit((GroupWeights(torch.zeros(1, 1, 1, 1), renormalise=True),), groups(0, 0, 0))
    output, readings = call(logs(0.5, 0.3, 0.2), backend, edit=edit)
    close(output, [[[[0.0]]]])
    assert readings.top_key.item() == -1 and readings.entropy.item() == 0


def test_weights_by_query_group(backend: str) -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 2.0]])[None, None]
    edit = Edit((GroupWeights(weight, renormalise=False),), groups(0, 1), query_groups=groups(1, 0))
    readings = call(torch.zeros(2, 2), backend, edit=edit).readings
    close(readings.attention[0, 0], [[0.0, 1.0], [0.5, 0.5]])


# Visual sinks 0, image 1, text sinks 2, the rest 3: masses 0.2, 0.1 + 0.2, 0.3, 0.2.
VAR = (0.2, 0.1, 0.2, 0.3, 0.2)
VAR_GROUPS = groups(0, 1, 1, 2, 3)


def var(**given: Any) -> Redistribute:
    return Redistribute(
        **{"source": (0, 2), "target": (1,), "fraction": 0.4, "gate_mass": (0, 1), "gate_share": (1,), **given}
    )


def test_var_moves_sink_mass_to_the_image(backend: str) -> None:
    # 0.4 of 0.5 moves: sinks keep 0.6 of theirs, image tokens grow by 1 + 0.2 / 0.3.
    readings = call(logs(*VAR), backend, edit=Edit((var(),), VAR_GROUPS), readout=Readout(
        row_stats=True, attention=True, groups=VAR_GROUPS, n_groups=4)).readings  # fmt: skip
    close(row(readings), [0.12, 0.1 * 5 / 3, 0.2 * 5 / 3, 0.18, 0.2])
    close(readings.mass, [[[[0.12, 0.5, 0.18, 0.2]]]])


@pytest.mark.parametrize(
    ("gates", "is_open"),
    [
        ({"summ": 0.49}, True),
        ({"summ": 0.51}, False),
        ({"rho": 0.59}, True),
        ({"rho": 0.61}, False),
        ({"where": torch.zeros(1, 1, 1, dtype=torch.bool)}, False),
        ({"target": (5,)}, False),
        ({"source": (4,)}, False),
    ],
)
def test_var_gates(gates: dict[str, Any], is_open: bool, backend: str) -> None:
    # The image has 0.2 + 0.3 = 0.5 of the mass, and 0.3 / 0.5 of that is not on sinks.
    readings = call(logs(*VAR), backend, edit=Edit((var(**gates),), VAR_GROUPS)).readings
    assert (row(readings)[4] == row(readings)[0]).item() != is_open


def test_redistribution_sees_what_the_weights_before_it_left(backend: str) -> None:
    halve_sinks = GroupWeights(torch.tensor([0.5, 1, 1, 1])[None, None, None], renormalise=False)
    readings = call(logs(*VAR), backend, edit=Edit((halve_sinks, var(source=(0,), fraction=1.0)), VAR_GROUPS)).readings
    close(row(readings), [0.0, 0.1 * 4 / 3, 0.2 * 4 / 3, 0.3, 0.2])
    other_order = Edit((var(source=(0,), fraction=0.5), halve_sinks), VAR_GROUPS)
    close(row(call(logs(*VAR), backend, edit=other_order).readings), [0.05, 0.1 * 4 / 3, 0.2 * 4 / 3, 0.3, 0.2])


def test_given_rows_are_taken_as_they_are(backend: str) -> None:
    p = torch.tensor([0.25, 0.25, 0.0, 0.5])[None, None, None]
    edit = Edit((GivenRows(heads=torch.tensor([0]), rows=torch.tensor([1]), p=p),))
    readings = call(torch.zeros(4, 4), backend, mask=Mask(causal=True), sinks=torch.zeros(1), edit=edit).readings
    close(readings.attention[0, 0, 1], p[0, 0, 0])  # beyond the diagonal too
    close(readings.attention[0, 0, 0], [0.5, 0, 0, 0])
    close(readings.sink_share[0, 0], [1 / 2, 0, 1 / 4, 1 / 5])


def test_uniform_has_no_sink_share(backend: str) -> None:
    where = torch.tensor([True, False])[None, None]
    readings = call(
        torch.tensor([[5.0, 0], [0, 0]]), backend, sinks=torch.zeros(1), edit=Edit((Uniform(where),))
    ).readings
    close(readings.attention[0, 0], [[0.5, 0.5], [1 / 3, 1 / 3]])
    close(readings.sink_share[0, 0], [0.0, 1 / 3])
    close(readings.lse[0, 0], [math.log(math.exp(5) + 2), math.log(3)])


# Readings


@pytest.mark.parametrize(
    ("length", "grid", "edge"), [(7, 4, 2), (8, 4, 2), (9, 4, 4), (9, 9, 1), (5, 64, 1), (9, 1, 16)]
)
def test_pooled_edges_and_sums(length: int, grid: int, edge: int, backend: str) -> None:
    readings = call(torch.zeros(length, length), backend, readout=Readout(pooled=grid)).readings
    blocks = math.ceil(length / edge)
    assert readings.pooled_edge == edge and readings.pooled.shape == (1, 1, blocks, blocks)
    sizes = torch.tensor([min(edge, length - n * edge) for n in range(blocks)]).double()
    close(readings.pooled[0, 0], sizes[:, None] * sizes / length)


def test_offsets_in_one_dimension(backend: str) -> None:
    places = torch.arange(4)[None, :, None]
    bins = OffsetBins(places, places, lo=(0,), hi=(2,))
    readings = call(torch.zeros(4, 4), backend, mask=Mask(causal=True), readout=Readout(offset=bins)).readings
    # By distance: itself, one back, two back (three back is not counted), special.
    close(readings.offset[0, 0], [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 0])


def test_distances_in_one_dimension(backend: str) -> None:
    places = torch.tensor([-1, 1, 2, 3])[None, :, None]
    readings = call(
        torch.zeros(4, 4), backend, mask=Mask(causal=True), readout=Readout(distance=Distances(places, places))
    ).readings
    # The special token counts on neither side, and nothing is renormalised.
    close(readings.distance[0, 0], [0, 0, 1 / 3, (1 + 2) / 4])
    close(readings.distance_mass[0, 0], [0, 1 / 2, 2 / 3, 3 / 4])


@pytest.mark.parametrize(("hop", "far"), [(False, math.sqrt(2)), (True, 1.0)])
def test_distances_on_a_grid(backend: str, hop: bool, far: float) -> None:
    places = torch.tensor([[-1, -1], [0, 0], [0, 1], [1, 0], [1, 1]])[None]
    readings = call(torch.zeros(5, 5), backend, readout=Readout(distance=Distances(places, places, hop=hop))).readings
    close(readings.distance[0, 0], [0] + 4 * [(1 + 1 + far) / 5])
    close(readings.distance_mass[0, 0], [0] + 4 * [4 / 5])


def test_offsets_in_two_dimensions_with_specials(backend: str) -> None:
    # A class token and a 2 x 2 grid; every pair has 1/5.
    coords = torch.tensor([[[-1, -1], [0, 0], [0, 1], [1, 0], [1, 1]]])
    bins = OffsetBins(coords, coords, lo=(-1, -1), hi=(1, 1))
    readings = call(torch.zeros(5, 5), backend, readout=Readout(offset=bins)).readings
    close(5 * readings.offset[0, 0], [1, 2, 1, 2, 4, 2, 1, 2, 1, 9])


def test_pads_are_not_counted(backend: str) -> None:
    asked = Readout(received=True, pooled=1, query_groups=groups(-1, 0, 1), n_query_groups=2,
        offset=OffsetBins(torch.arange(3)[None, :, None], torch.arange(3)[None, :, None], (-9,), (9,)))  # fmt: skip
    readings = call(torch.zeros(3, 3), backend, mask=Mask(causal=True), readout=asked).readings
    close(readings.received[0, 0], [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert readings.received_rows[0, 0].tolist() == [[1, 1, 0], [1, 1, 1]]
    close(readings.pooled[0, 0], [[2.0]])
    close(readings.offset[0, 0].sum(), 2.0)


def test_ties_go_to_the_lowest_key(backend: str) -> None:
    scores = torch.zeros(1, 700)
    scores[0, [650, 130, 131, 699]] = 1.0
    readings = call(scores, backend, mask=Mask(kv_offset=5), readout=Readout(row_stats=True, topk=6)).readings
    assert readings.topk_key[0, 0, 0].tolist() == [135, 136, 655, 704, 5, 6]
    assert readings.top_key.item() == 135


@pytest.mark.parametrize("n_keys", [300, 1024, 1025, 1087])
def test_topk_of_long_rows(n_keys: int) -> None:
    scores = torch.randint(0, 40, (1, 1, 400, n_keys), generator=torch.Generator().manual_seed(n_keys)).double()
    readings = call(scores, "reference", readout=Readout(topk=8, attention=True)).readings
    order = readings.attention.sort(dim=-1, descending=True, stable=True)
    assert readings.topk_key.equal(order.indices[..., :8].int())
    assert readings.topk_weight.equal(order.values[..., :8])


def test_group_output_sums_to_z_with_gain(backend: str) -> None:
    v = torch.tensor([[1.0, 0], [0, 1], [2, 2]], dtype=torch.float64)[None, None]
    asked = Readout(group_output=torch.tensor([0]), groups=groups(0, 1, 0), n_groups=2)
    output, readings = call(logs(0.5, 0.3, 0.2), backend, v=v, edit=Edit((Gain(2.0),)), readout=asked)
    close(readings.group_output[0, 0, 0], [[1.8, 0.8], [0.0, 0.6]])
    close(output[0, 0, 0], [1.8, 1.4])


def test_output_is_left_out_where_not_wanted(backend: str) -> None:
    asked = Readout(row_stats=True, heads=torch.tensor([1]))
    output, readings = call(torch.zeros(1, 3, 4, 4), backend, readout=asked, want_output=False)
    assert output is None and readings.entropy.shape == (1, 1, 4)


def test_keys_by_their_rank(backend: str) -> None:
    # Weights 8 : 1 : 4 : 2; of the second row the second and the last key are visible.
    scores = torch.tensor([[3.0, 0.0, 2.0, 1.0]]).expand(2, -1) * math.log(2)
    dense = torch.tensor([[True] * 4, [False, True, False, True]])[None, None]
    kept = call(scores, backend, mask=Mask(dense=dense), edit=Edit((TopKeys(2),))).readings
    wanted = torch.tensor([[2 / 3, 0, 1 / 3, 0], [0, 1 / 3, 0, 2 / 3]])
    torch.testing.assert_close(kept.attention[0, 0], wanted)  # pyright: ignore[reportOptionalSubscript]
    # Of the three largest, 8 4 2, int(0.7 * 3) with the smallest draws go: 4 and 8. A row of two keys keeps one of them.
    draws = torch.tensor([0.2, 0.1, 0.9]).view(1, 1, 1, 3)
    dropped = call(scores, backend, mask=Mask(dense=dense), edit=Edit((TopKeys(3, draws, 0.7),))).readings
    wanted = torch.tensor([[0, 1 / 3, 0, 2 / 3], [0, 0, 0, 1.0]])
    torch.testing.assert_close(dropped.attention[0, 0], wanted)  # pyright: ignore[reportOptionalSubscript]
    by_chance = call(
        scores, backend, mask=Mask(dense=dense), edit=Edit((TopKeys(3, draws, 0.15, exact=False),))
    ).readings
    wanted = torch.tensor([[8 / 11, 1 / 11, 0, 2 / 11], [0, 0, 0, 1.0]])
    torch.testing.assert_close(by_chance.attention[0, 0], wanted)  # pyright: ignore[reportOptionalSubscript]
