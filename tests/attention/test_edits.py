"""Edits as values: neutral ones, and the combination of several."""

from __future__ import annotations

import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest
import torch

from interp.attention import (
    AttentionArgumentError,
    Blocks,
    Boost,
    DropKeys,
    Edit,
    Gain,
    GivenRows,
    GroupWeights,
    Mask,
    Readout,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    Uniform,
    attend,
    combine,
    is_neutral,
)

memory: Any = import_module("interp.attention.combine")
NOWHERE = torch.zeros(1, 1, 1, dtype=torch.bool)
HEADS, LENGTH = 4, 12


def operands(seed: int = 0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, LENGTH, 8, generator=random, dtype=torch.float64) for n in (HEADS, 2, 2))
    return {"q": q, "k": k, "v": v, "scale": 0.5, "mask": Mask(causal=True)}


def random_groups(n: int, seed: int, *, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, n, (batch, LENGTH), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def move(source: int, target: int, **given: Any) -> Redistribute:
    return Redistribute((source,), (target,), given.pop("fraction", 0.5), (source,), (target,), **given)


@pytest.mark.parametrize(
    "operation",
    [
        Gain(1.0),
        Gain(torch.ones(1, 4, 1)),
        Gain(0.0, NOWHERE),
        Temperature(1.0),
        Boost(torch.zeros(1, 1, 1, 2)),
        SinkWindow(0, 0, NOWHERE),
        Blocks(4, torch.ones(1, 3, 3, dtype=torch.bool)),
        Threshold(torch.full((1, 1, 1), -torch.inf)),
        DropKeys(torch.full((1, 1, 1, 2), -1)),
        Uniform(NOWHERE),
        GivenRows(torch.tensor([], dtype=torch.int64), torch.tensor([1]), torch.zeros(1, 0, 1, LENGTH)),
        GroupWeights(torch.ones(1, 1, 1, 2), renormalise=True),
        GroupWeights(torch.ones(1, 1, 1, 2), renormalise=False),
        move(0, 1, fraction=0.0),
    ],
    ids=lambda op: type(op).__name__,
)
def test_neutral_operations(operation: Any) -> None:
    edit = Edit((operation,), random_groups(2, 0), n_groups=2)
    assert is_neutral(edit)
    plain = attend(**operands(), backend="reference").output
    torch.testing.assert_close(attend(**operands(), edit=edit, backend="reference").output, plain, atol=1e-14, rtol=0)
    assert attend(**operands(), edit=edit).output.equal(attend(**operands()).output)  # auto leaves the call untouched


@pytest.mark.parametrize(
    "operation",
    [
        Gain(torch.tensor([1.0, 1, 1, 0.5]).view(1, 4, 1)),
        Temperature(1.1),
        Boost(torch.tensor([[[[0.0, 0.1]]]])),
        SinkWindow(1, 2),
        Blocks(4, torch.eye(3, dtype=torch.bool)[None]),
        Threshold(torch.zeros(1, 1, 1)),
        DropKeys(torch.zeros(1, 1, 1, 1, dtype=torch.int64)),
        Uniform(),
        GroupWeights(torch.tensor([[[[1.0, 0.0]]]]), renormalise=True),
        move(0, 1),
    ],
    ids=lambda op: type(op).__name__,
)
def test_operations_that_act_change_the_output(operation: Any) -> None:
    edit = Edit((operation,), random_groups(2, 0), n_groups=2)
    assert not is_neutral(edit)
    plain = attend(**operands()).output
    assert (attend(**operands(), edit=edit).output - plain).abs().max() > 1e-3


def test_a_gain_to_be_differentiated_is_not_neutral() -> None:
    value = torch.ones(1, 4, 1, requires_grad=True)
    assert not is_neutral(Edit((Gain(value),)))
    attend(**operands(), edit=Edit((Gain(value),))).output.sum().backward()
    assert value.grad is not None and value.grad.abs().min() > 0


def test_no_edit_is_neutral() -> None:
    assert is_neutral(None) and is_neutral(Edit())


def test_combining_nothing() -> None:
    gain = Edit((Gain(2.0),))
    assert combine() is None and combine(None, Edit()) is None
    assert combine(None, gain) is gain


def test_the_same_edits_combine_to_one_object_until_a_tensor_changes() -> None:
    beta, gain = torch.full((1, 1, 1, 2), 0.5), torch.ones(1, HEADS, 1)
    first, second = Edit((Boost(beta),), random_groups(2, 1)), Edit((Gain(gain),), random_groups(2, 2))
    together = combine(first, second)
    assert together is not None
    assert combine(first, None, second) is together
    assert combine(second, first) is not together
    beta[..., 1] = 0.25
    again = combine(first, second)
    assert again is not None and again is not together
    assert sorted(again.of(Boost)[0].beta.flatten().tolist()) == [0.25, 0.25, 0.5, 0.5]
    assert combine(first, second) is again


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
def test_groups_of_combined_edits_changed_in_place_are_noticed(inference: bool) -> None:
    with torch.inference_mode(inference):
        groups = random_groups(2, 1)
        first, second = Edit((Boost(torch.ones(1, 1, 1, 2)),), groups), Edit((Gain(2.0),), random_groups(2, 2))
        before = combine(first, second)
        groups.copy_(1 - groups)
        after = combine(first, second)
    assert before is not None and after is not None
    assert before.groups is not None and after.groups is not None
    assert not torch.equal(before.groups, after.groups)


def test_a_combination_made_in_inference_mode_is_not_used_outside() -> None:
    first, second = Edit((Boost(torch.ones(1, 1, 1, 2)),), random_groups(2, 1)), Edit((Temperature(2.0),))
    with torch.inference_mode():
        inside = combine(first, second)
    outside = combine(first, second)
    assert inside is not None and outside is not None
    assert inside.of(Boost)[0].beta.is_inference() and not outside.of(Boost)[0].beta.is_inference()


def test_a_combination_to_be_differentiated_is_made_anew() -> None:
    beta = torch.ones(1, 1, 1, 2, requires_grad=True)
    first, second = Edit((Boost(beta),), random_groups(2, 1)), Edit((Gain(2.0),))
    for _ in range(2):
        together = combine(first, second)
        assert together is not None
        together.of(Boost)[0].beta.sum().backward()
    assert beta.grad is not None and beta.grad.tolist() == [[[[2.0, 2.0]]]]


def test_a_combination_is_let_go_with_its_edits_and_only_so_many_are_kept() -> None:
    kept = Edit((Gain(2.0),))
    other = Edit((Temperature(torch.full((1, 1, 1), 2.0)),))
    together = combine(kept, other)
    assert together is not None
    held = weakref.ref(together.of(Temperature)[0].value)
    del other, together
    gc.collect()
    assert held() is None
    many = [Edit((Temperature(2.0 + n),)) for n in range(memory.KEPT + 8)]
    assert [combine(kept, edit) is not None for edit in many] == [True] * len(many)
    assert len(memory._combined) == memory.KEPT
    assert combine(kept, many[-1]) is combine(kept, many[-1])


def test_edits_combine_in_many_threads() -> None:
    shared = [Edit((Temperature(1.5 + n),)) for n in range(4)]

    def work(number: int) -> bool:
        right = True
        for n in range(200):
            mine = Edit((Gain(float(n + 2)),))
            together = combine(shared[(number + n) % 4], mine)
            assert together is not None
            right &= together.of(Gain)[0].value == n + 2
            right &= together.of(Temperature)[0].value == 1.5 + (number + n) % 4
        return right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(memory._combined) <= memory.KEPT


def edits() -> dict[str, Edit]:
    """Edits whose effects commute, each with a partition of its own."""
    return {
        "weights": Edit(
            (GroupWeights(torch.rand(1, HEADS, 2, 3, dtype=torch.float64), renormalise=False),),
            random_groups(3, 1), random_groups(2, 2),
        ),
        "rows": Edit(
            (GroupWeights(torch.rand(1, 1, 3, 2, dtype=torch.float64), renormalise=False),),
            random_groups(2, 3, batch=2), random_groups(3, 4, batch=2),
        ),
        "no groups": Edit((Gain(torch.rand(1, HEADS, 1, dtype=torch.float64)), SinkWindow(2, 4))),
        "one table row": Edit(
            (GroupWeights(torch.rand(1, 1, 1, 2, dtype=torch.float64), renormalise=False),), random_groups(2, 5)
        ),
        "one row and several": Edit(
            tuple(GroupWeights(torch.rand(1, 1, n, 2, dtype=torch.float64), renormalise=False) for n in (1, 2)),
            random_groups(2, 8), random_groups(2, 9),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("names", list(itertools.permutations(edits(), 2)), ids="+".join)
def test_combined_edits_act_like_both(names: tuple[str, str]) -> None:
    torch.manual_seed(0)
    first, second = (edits()[name] for name in names)
    given = operands()
    asked = Readout(attention=True)
    plain = attend(**given, readout=asked).readings.attention
    window = [op for edit in (first, second) for op in edit.of(SinkWindow)]
    base = attend(**given, readout=asked, edit=Edit(tuple(window))).readings.attention
    # Weights that are not renormalised are factors on p, so the factors of both multiply.
    factors = [
        attend(**given, readout=asked, edit=Edit(tuple(edit.of(GroupWeights)), edit.groups, edit.query_groups)).readings
        for edit in (first, second)
    ]
    wanted = base
    for factor in factors:
        wanted = wanted * torch.nan_to_num(factor.attention / plain)
    got = attend(**given, readout=asked, edit=combine(first, second))
    torch.testing.assert_close(got.readings.attention, wanted, atol=1e-14, rtol=1e-12)
    gains = [op.value for edit in (first, second) for op in edit.of(Gain)]
    gain = gains[0].unsqueeze(-1) if gains else 1.0
    v = given["v"].repeat_interleave(2, dim=1)
    torch.testing.assert_close(got.output, (gain * (wanted @ v)).transpose(1, 2), atol=1e-13, rtol=1e-12)


def test_combined_boost_and_redistribution_speak_of_their_own_groups() -> None:
    a = Edit((Boost(torch.tensor([[[[0.0, 0.7]]]], dtype=torch.float64)),), random_groups(2, 6))
    b = Edit((move(2, 0),), random_groups(3, 7), n_groups=3)
    given = operands()
    asked = Readout(attention=True)
    # By hand: the boosted row, of which half the mass of b's group 2 moves to b's group 0.
    boosted = attend(**given, readout=asked, edit=a).readings.attention
    source, target = b.groups[0] == 2, b.groups[0] == 0
    mass_source, mass_target = boosted[..., source].sum(-1), boosted[..., target].sum(-1)
    is_open = (mass_source > 0) & (mass_target > 0)
    wanted = boosted.clone()
    wanted[..., source] *= torch.where(is_open, 0.5, 1.0)[..., None]
    wanted[..., target] *= torch.where(is_open, 1 + 0.5 * mass_source / mass_target, 1.0)[..., None]
    for pair in ((a, b), (b, a)):
        got = attend(**given, readout=asked, edit=combine(*pair)).readings.attention
        torch.testing.assert_close(got, wanted, atol=1e-14, rtol=1e-12)


def test_more_than_eight_groups_are_refused_after_empty_ones_are_dropped() -> None:
    weights = {n: GroupWeights(torch.rand(1, 1, 1, n), renormalise=False) for n in (3, 4)}
    a = Edit((weights[3],), torch.arange(LENGTH)[None].remainder(3).to(torch.int8))
    crossing = Edit((weights[4],), torch.arange(LENGTH)[None].remainder(4).to(torch.int8))
    with pytest.raises(AttentionArgumentError, match="at most 8 key groups; got 12"):
        combine(a, crossing)
    nested = Edit((weights[4],), torch.arange(LENGTH)[None].remainder(3).to(torch.int8), n_groups=4)
    together = combine(a, nested)
    assert together is not None and together.key_groups == 3
    got = attend(**operands(), edit=together).output
    wanted = weights[3].weight * weights[4].weight[..., :3]
    single = Edit((GroupWeights(wanted, renormalise=False),), a.groups)
    torch.testing.assert_close(got, attend(**operands(), edit=single).output, atol=1e-7, rtol=1e-6)


def test_groups_of_different_calls_are_refused() -> None:
    weights = GroupWeights(torch.rand(1, 1, 1, 2), renormalise=False)
    a, b = (Edit((weights,), torch.zeros(1, n, dtype=torch.int8)) for n in (5, 6))
    with pytest.raises(AttentionArgumentError, match=r"same call; got \(1, 5\) and \(1, 6\)"):
        combine(a, b)


def test_operations_are_sorted_by_stage_and_stable_within_one() -> None:
    gain, first, second, temperature = Gain(2.0), Uniform(NOWHERE), Uniform(), Temperature(2.0)
    assert Edit((gain, first, second, temperature)).operations == (temperature, first, second, gain)


def test_something_else_among_the_operations_is_named() -> None:
    edit = Edit((object(), Gain(2.0)))  # type: ignore[arg-type]
    with pytest.raises(AttentionArgumentError, match=r"edit.operations\[1\]: must be one of .*Gain.*; got object"):
        attend(**operands(), edit=edit)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_without_groups_every_key_is_in_group_0(backend: str) -> None:
    given = {name: x[:1] if isinstance(x, torch.Tensor) else x for name, x in operands().items()}
    boost = Edit((Boost(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)),))
    got = attend(**given, edit=boost, readout=Readout(attention=True), backend=backend).readings.attention
    s = given["scale"] * given["q"] @ given["k"].repeat_interleave(2, dim=1).mT
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    torch.testing.assert_close(got, (s + 0.5 * s.abs()).masked_fill(hidden, -torch.inf).softmax(-1), atol=1e-14, rtol=0)
