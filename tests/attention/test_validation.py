"""Every rule about the op's arguments, by the message it gives."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from interp.attention import (
    AttentionArgumentError,
    Blocks,
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
    Readout,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    TopKeys,
    Uniform,
    attend,
)

# B = 2, H = 4, Hkv = 2, Lq = 5, Lk = 7, D = 8
Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 3)
GROUPS = torch.zeros(1, 7, dtype=torch.int8)
ROWS = torch.arange(5)[None, :, None]
COLUMNS = torch.arange(7)[None, :, None]


def long(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def edit(operation: Any, **given: Any) -> dict[str, Any]:
    return {"edit": Edit((operation,), **{"groups": GROUPS, "n_groups": 2, **given})}


def move(**given: Any) -> dict[str, Any]:
    return edit(
        Redistribute(**{"source": (0,), "target": (1,), "fraction": 0.5, "gate_mass": (), "gate_share": (), **given})
    )


def weights(*shape: int) -> GroupWeights:
    return GroupWeights(torch.ones(shape), renormalise=False)


BAD: list[tuple[dict[str, Any], str]] = [
    # Tensors
    ({"q": Q[0]}, "q: must have 4 dimensions [batch, head, position, dim]; got torch.float32 of shape (4, 5, 8)"),
    ({"q": Q.int()}, "q: must be floating point"),
    ({"q": Q[:, :, :0]}, "q: must not be empty; got torch.float32 of shape (2, 4, 0, 8)"),
    ({"k": K.double()}, "k: must be floating point, with q's dtype and device (torch.float32, cpu); got torch.float64"),
    ({"k": K[..., :4]}, "k: must have q's batch 2 and head dim 8; got torch.float32 of shape (2, 2, 7, 4)"),
    ({"v": V[:, :, :6]}, "v: must have k's batch, heads and length (2, 2, 7); got torch.float32 of shape (2, 2, 6, 3)"),
    ({"q": Q[:, :3]}, "k: its number of heads must divide q's 3; got 2"),
    ({"scale": float("nan")}, "scale: must be a finite number; got nan"),
    ({"softcap": 0.0}, "softcap: must be None or a finite number > 0; got 0.0"),
    ({"sinks": torch.zeros(3)}, "sinks: must be a float tensor [H] with H = 4; got torch.float32 of shape (3,)"),
    ({"bias": torch.zeros(5, 7)}, "bias: must be a float tensor [B|1, H|1, Lq|1, Lk] with B = 2, H = 4, Lq = 5, Lk = 7; got"),
    ({"bias": torch.zeros(2, 4, 5, 1)}, "bias: must be a float tensor"),
    ({"bias": torch.zeros(2, 4, 5, 7) > 0}, "bias: must be a float tensor"),
    # Mask
    ({"mask": torch.ones(5, 7) > 0}, "mask: must be None or Mask(...); got a Tensor"),
    ({"edit": Gain(0.0)}, "edit: must be None or Edit(...); got a Gain"),
    ({"readout": "row_stats"}, "readout: must be None or Readout(...); got a str"),
    ({"mask": Mask(q_offset=-1)}, "mask.q_offset: must be an int >= 0; got -1"),
    ({"mask": Mask(window=(1,))}, "mask.window: must be (left, right), each an int or None; got (1,)"),
    ({"mask": Mask(padding=torch.ones(2, 5) > 0)}, "mask.padding: must be a bool tensor [B|1, Lk] with B = 2, Lk = 7; got"),
    ({"mask": Mask(padding=torch.ones(2, 7))}, "mask.padding: must be a bool tensor"),
    ({"mask": Mask(dense=torch.ones(2, 1, 1, 7) > 0)}, "mask.dense: must be a bool tensor [B|1, H|1, Lq, Lk]"),
    ({"mask": Mask(first=torch.zeros(3).int())}, "mask.first: must be an int tensor [B|1] with B = 2; got"),
    ({"mask": Mask(causal=True, cross=True)}, "mask.causal, window: cross attention has none"),
    # Groups of an edit
    (edit(Gain(1.0), groups=GROUPS + 2), "edit.groups: values must lie within 0 .. 1; got 2.0 .. 2.0"),
    (edit(Gain(1.0), groups=GROUPS[:, :5]), "edit.groups: must be an int tensor [B|1, Lk]"),
    (edit(Gain(1.0), n_groups=9), "edit.n_groups: must be an int within 1 .. 8; got 9"),
    (edit(weights(1, 1, 1, 9), n_groups=None), "edit.n_groups: must be an int within 1 .. 8; got 9"),
    (edit(weights(1, 1, 1, 2), groups=None), "edit.groups: must be given where operations speak of 2 key groups; got None"),
    (edit(weights(1, 1, 9, 2)), "edit.query_groups (from the weights' third axis): must be an int within 1 .. 8; got 9"),
    (edit(weights(1, 1, 2, 2)), "edit.query_groups: must be given where weights differ by 2 query groups; got None"),
    (
        edit(weights(1, 1, 2, 2), query_groups=torch.full((1, 5), 2)),
        "edit.query_groups: values must lie within 0 .. 1; got 2.0 .. 2.0",
    ),
    # Operations
    ({"edit": Edit(("gain",))}, "edit.operations[0]: must be one of Temperature, Boost"),
    (edit(Gain("x")), "edit.Gain.value: must be a number or a tensor bhq; got 'x'"),
    (
        edit(Gain(torch.ones(4))),
        "edit.Gain.value: must be a float tensor [B|1, H|1, Lq|1] with B = 2, H = 4, Lq = 5; got torch.float32 of shape (4,)",
    ),
    (edit(Gain(1.0, torch.ones(2, 4, 5))), "edit.Gain.where: must be a bool tensor"),
    (edit(Uniform(torch.ones(3, 1, 1) > 0)), "edit.Uniform.where: must be a bool tensor [B|1, H|1, Lq|1]"),
    (edit(Temperature(0.0)), "edit.Temperature.value: must be > 0; got a smallest value of 0.0"),
    (edit(Temperature(torch.tensor([[[1.0]], [[-1.0]]]))), "edit.Temperature.value: must be > 0; got a smallest value of -1.0"),
    (edit(Boost(torch.ones(1, 1, 1, 3))), "edit.Boost.beta: its last axis must have the edit's 2 key groups; got 3"),
    (edit(SinkWindow(-1, 2)), "edit.SinkWindow.sink: must not be negative; got a smallest value of -1"),
    (edit(SinkWindow(1, long(1, 2))), "edit.SinkWindow.window: must be an int tensor [H|1] with H = 4"),
    (edit(SinkWindow(1, 2.5)), "edit.SinkWindow.window: must be a number or a tensor h; got 2.5"),
    (edit(SinkWindow(1, 2)) | {"mask": Mask(cross=True)}, "edit.SinkWindow: needs self attention"),
    (edit(Blocks(0, torch.ones(1, 9, 9) > 0)), "edit.Blocks.block: must be >= 1; got 0"),
    (edit(Blocks(2, torch.ones(1, 3, 3) > 0)), "edit.Blocks.allowed: must cover absolute blocks [H|1, 3, 4]; got torch.bool"),
    (edit(Neighbourhood(1, ROWS, COLUMNS.expand(1, 7, 2))), "edit.Neighbourhood.query_coords, key_coords: must have the same"),
    (edit(Neighbourhood(-1, ROWS, COLUMNS)), "edit.Neighbourhood.radius: must not be negative; got a smallest value of -1"),
    (edit(Neighbourhood(1, COLUMNS, ROWS)), "edit.Neighbourhood.query_coords: must be an int tensor [B|1, Lq, n]"),
    (edit(Threshold(torch.zeros(1, 1))), "edit.Threshold.value: must be a float tensor"),
    (edit(TopKeys(0)), "edit.TopKeys.k: must be a whole number >= 1; got 0"),
    (edit(TopKeys(3, torch.rand(1, 1, 1, 2))), "edit.TopKeys.draws: its last axis must be k = 3 wide"),
    (edit(TopKeys(3, torch.rand(1, 1, 1, 3), 1.5)), "edit.TopKeys.share: must be a number within 0 .. 1; got 1.5"),
    (edit(TopKeys(3, torch.rand(1, 1, 1, 3), "half")), "edit.TopKeys.share: must be a number within 0 .. 1; got 'half'"),  # type: ignore[arg-type]
    (edit(DropKeys(long(*range(33))[None, None, None])), "edit.DropKeys.keys: at most 32 keys a row; got 33"),
    (edit(GivenRows(long(4), long(0), torch.ones(1, 1, 1, 7))), "edit.GivenRows.heads: values must lie within 0 .. 3; got 4.0"),
    (edit(GivenRows(long(0), long(5), torch.ones(1, 1, 1, 7))), "edit.GivenRows.rows: values must lie within 0 .. 4; got 5.0"),
    (edit(GivenRows(long(1, 1), long(0), torch.ones(1, 2, 1, 7))), "edit.GivenRows.heads: must not name one twice; got [1, 1]"),
    (edit(GivenRows(long(1), long(0), torch.ones(1, 2, 1, 7))), "edit.GivenRows.p: must be a float tensor [B|1, n, R, Lk]"),
    (edit(GivenRows([1], long(0), torch.ones(1, 1, 1, 7))), "edit.GivenRows.heads: must be an int64 tensor [n]; got [1]"),
    (edit(weights(1, 1, 1, 3)), "edit.GroupWeights.weight: its last axis must have the edit's 2 key groups; got 3"),
    (edit(GroupWeights(-torch.ones(1, 1, 1, 2), renormalise=True)), "edit.GroupWeights.weight: must not be negative; got"),
    (move(target=(0,)), "edit.Redistribute.source, target: must be disjoint; got (0,), (0,)"),
    (move(source=()), "edit.Redistribute.source, target: must each name a group; got (), (1,)"),
    (move(target=(2,)), "edit.Redistribute.target: values must lie within 0 .. 1; got 2 .. 2"),
    (move(fraction=1.5), "edit.Redistribute.fraction: values must lie within 0.0 .. 1.0; got 1.5 .. 1.5"),
    (move(fraction=torch.tensor([[[-0.5]]])), "edit.Redistribute.fraction: values must lie within 0.0 .. 1.0; got -0.5 .. -0.5"),
    # Readout
    ({"readout": Readout(n_groups=9)}, "readout.n_groups: must be an int within 1 .. 8; got 9"),
    ({"readout": Readout(n_query_groups=0)}, "readout.n_query_groups: must be an int within 1 .. 8; got 0"),
    ({"readout": Readout(groups=GROUPS + 1)}, "readout.groups: values must lie within 0 .. 0; got 1.0 .. 1.0"),
    ({"readout": Readout(query_groups=torch.full((1, 5), -2))}, "readout.query_groups: values must lie within -1 .. 0; got -2.0"),
    ({"readout": Readout(heads=long(1, 1))}, "readout.heads: must not name one twice; got [1, 1]"),
    ({"readout": Readout(heads=long(-1))}, "readout.heads: values must lie within 0 .. 3; got -1.0 .. -1.0"),
    ({"readout": Readout(topk=9)}, "readout.topk: must be an int within 0 .. 8; got 9"),
    ({"readout": Readout(pooled=-1)}, "readout.pooled: must be an int >= 0; got -1"),
    ({"readout": Readout(rows=long(5))}, "readout.rows: values must lie within 0 .. 4; got 5.0 .. 5.0"),
    ({"readout": Readout(group_output=torch.zeros(1))}, "readout.group_output: must be an int64 tensor [n]"),
    (
        {"readout": Readout(offset=OffsetBins(ROWS, COLUMNS, (0, 0), (1, 1)))},
        "readout.offset.lo, hi: must have 1 entries each, lo <= hi; got (0, 0), (1, 1)",
    ),
    (
        {"readout": Readout(distance=Distances(ROWS, COLUMNS)), "mask": Mask(cross=True)},
        "readout.distance: needs self attention: queries and keys are different sequences; got a cross attention call",
    ),
    ({"readout": Readout(distance=Distances(ROWS.expand(1, 5, 3), COLUMNS.expand(1, 7, 3)))},
     "readout.distance.query_coords, key_coords: must have the same last axis, of (1, 2); got (3, 3)"),
    ({"readout": Readout(distance=Distances(ROWS, COLUMNS.float()))}, "readout.distance.key_coords: must be an int tensor"),
    ({"readout": Readout(offset=OffsetBins(ROWS, COLUMNS, (2,), (1,)))}, "readout.offset.lo, hi: must have 1 entries each"),
    ({"readout": Readout(offset=OffsetBins(COLUMNS, COLUMNS, (0,), (1,)))}, "readout.offset.query_coords: must be an int tensor"),
    (
        {"readout": Readout(offset=OffsetBins(ROWS, COLUMNS, (0,), (1,))), "mask": Mask(cross=True)},
        "readout.offset: needs self attention: queries and keys are different sequences; got a cross attention call",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_each_rule_names_argument_rule_and_what_was_got(given: dict[str, Any], message: str) -> None:
    with pytest.raises(AttentionArgumentError, match=re.escape(message)):
        attend(**{"q": Q, "k": K, "v": V, "scale": 1.0, **given})


def test_what_the_rules_allow() -> None:
    for given in (
        move(fraction=1.0),
        edit(Blocks(2, torch.ones(4, 3, 4) > 0)),
        edit(weights(2, 4, 2, 2), query_groups=torch.ones(2, 5, dtype=torch.int64)),
        {"readout": Readout(query_groups=torch.full((1, 5), -1), received=True)},
        {"bias": torch.zeros(1, 4, 1, 7, dtype=torch.float64), "mask": Mask(first=torch.zeros(1).int())},
    ):
        assert attend(Q, K, V, scale=1, **given).output.shape == (2, 5, 4, 3)


def test_errors_are_value_errors() -> None:
    assert issubclass(AttentionArgumentError, ValueError)
