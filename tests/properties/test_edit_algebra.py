"""Laws of edits: how they combine does not depend on brackets, and what does nothing does nothing in any company."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.attention import (
    Boost,
    DropKeys,
    Edit,
    Gain,
    GroupWeights,
    Mask,
    Readout,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    TopKeys,
    Uniform,
    attend,
    combine,
    is_neutral,
)

BATCH, HEADS, ROWS, KEYS = 2, 4, 5, 7
F64: Any = torch.float64
seeds = st.integers(0, 2**31)


def given_call(seed: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, ROWS, 4, generator=random, dtype=F64)
    k, v = (torch.randn(BATCH, 2, KEYS, 4, generator=random, dtype=F64) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": v,
        "scale": 0.7,
        "mask": Mask(causal=True, q_offset=KEYS - ROWS),
        "readout": Readout(row_stats=True),
    }


def outcome(edit: Edit | None, call: dict[str, Any]) -> dict[str, torch.Tensor]:
    rest = {name: value for name, value in call.items() if name not in "qkv"}
    made = attend(call["q"], call["k"], call["v"], edit=edit, backend="reference", **rest)
    readings = made.readings
    return {"output": made.output, "entropy": readings.entropy, "lse": readings.lse, "top": readings.top_weight}


def alike(a: Edit | None, b: Edit | None, call: dict[str, Any]) -> None:
    left, right = outcome(a, call), outcome(b, call)
    for name, values in left.items():
        torch.testing.assert_close(
            values, right[name], msg=lambda text, name=name: f"{name}: {text}", rtol=1e-9, atol=1e-12
        )


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """One or two operations of any kind over a partition of the keys in two."""
    random = torch.Generator().manual_seed(draw(seeds))

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random, dtype=F64)

    makers = {
        "gain": lambda: Gain(2 * rand(1, HEADS, 1)), "temperature": lambda: Temperature(0.5 + rand(BATCH, 1, ROWS)),
        "boost": lambda: Boost(rand(1, HEADS, 1, 2)), "window": lambda: SinkWindow(1, 3),
        "drop": lambda: DropKeys(torch.randint(-1, KEYS, (1, HEADS, 1, 2), generator=random)),
        "top": lambda: TopKeys(3, rand(1, HEADS, ROWS, 3), 0.7) if draw(st.booleans()) else TopKeys(3),
        "uniform": lambda: Uniform(rand(1, HEADS, ROWS) < 0.3),
        "weights": lambda: GroupWeights(rand(1, HEADS, 1, 2), renormalise=draw(st.booleans())),
        "move": lambda: Redistribute((0,), (1,), draw(st.floats(0, 1)), (0, 1), (1,)),
    }  # fmt: skip
    chosen = draw(st.lists(st.sampled_from(sorted(makers)), min_size=1, max_size=2, unique=True))
    groups = (rand(1, KEYS) < 0.5).to(torch.int8)
    return Edit(tuple(makers[name]() for name in chosen), groups, n_groups=2)


@st.composite
def idle(draw: st.DrawFn) -> Edit:
    """An edit at strength "off"."""
    nothing = torch.zeros(1, HEADS, 1, dtype=torch.bool)
    operation = draw(
        st.sampled_from(
            [
                Gain(1.0), Gain(torch.ones(1, HEADS, 1, dtype=F64)), Gain(0.0, nothing), Temperature(1.0),
                Temperature(3.0, nothing), Boost(torch.zeros(1, 1, 1, 2, dtype=F64)), Uniform(nothing), SinkWindow(0, 1, nothing),
                GroupWeights(torch.ones(1, 1, 1, 2, dtype=F64), renormalise=True), Redistribute((0,), (1,), 0.0, (0, 1), (1,)),
                Redistribute((0,), (1,), 1.0, (0, 1), (1,), where=nothing), DropKeys(torch.full((1, 1, 1, 3), -1)),
                TopKeys(2, torch.zeros(1, 1, 1, 2, dtype=F64)), TopKeys(1, where=nothing),
                Threshold(torch.full((1, 1, 1), -torch.inf, dtype=F64)),
            ]
        )
    )  # fmt: skip
    return Edit((operation,), torch.arange(KEYS)[None].remainder(2).to(torch.int8), n_groups=2)


@settings(max_examples=40)
@given(edits(), edits(), edits(), seeds)
def test_brackets_do_not_matter(a: Edit, b: Edit, c: Edit, seed: int) -> None:
    call = given_call(seed)
    flat = combine(a, b, c)
    alike(flat, combine(combine(a, b), c), call)
    alike(flat, combine(a, combine(b, c)), call)


@settings(max_examples=40)
@given(edits(), idle(), seeds, st.booleans())
def test_what_is_off_changes_nothing_alone_or_beside_another(edit: Edit, off: Edit, seed: int, first: bool) -> None:
    call = given_call(seed)
    assert is_neutral(off) and is_neutral(combine(off, off)) and is_neutral(None)
    alike(off, None, call)
    together = combine(off, edit) if first else combine(edit, off)
    alike(together, edit, call)
    assert is_neutral(together) == is_neutral(edit)


@given(edits())
def test_nothing_is_the_identity(edit: Edit) -> None:
    assert combine(edit) is edit and combine(None, edit) is edit and combine(edit, None, Edit()) is edit
    assert combine() is None and combine(None, Edit()) is None


@settings(max_examples=40)
@given(edits(), edits(), seeds)
def test_edits_of_different_stages_commute(a: Edit, b: Edit, seed: int) -> None:
    from interp.attention.edits import STAGES

    stages = [{STAGES[type(op)] for op in edit.operations} for edit in (a, b)]
    # Restrictions are an intersection and gains and temperatures factors: of these, order does not matter either.
    free = {0, 1, 2, 6}
    if (stages[0] & stages[1]) - free:
        return
    alike(combine(a, b), combine(b, a), given_call(seed))


@settings(max_examples=30)
@given(
    seeds,
    st.lists(st.floats(0, 3), min_size=HEADS, max_size=HEADS),
    st.lists(st.floats(0, 3), min_size=HEADS, max_size=HEADS),
)
def test_gains_multiply(seed: int, first: list[float], second: list[float]) -> None:
    call = given_call(seed)
    a, b = (torch.tensor(values, dtype=F64).view(1, HEADS, 1) for values in (first, second))
    alike(combine(Edit((Gain(a),)), Edit((Gain(b),))), Edit((Gain(a * b),)), call)
    plain = outcome(None, call)["output"]
    torch.testing.assert_close(outcome(Edit((Gain(a),)), call)["output"], plain * a.view(1, 1, HEADS, 1))


def test_a_renormalising_weight_keeps_the_total_that_an_earlier_one_left() -> None:
    groups = torch.tensor([[0, 1, 2, 0, 1, 2, 0]], dtype=torch.int8)

    def weights(values: list[float], renormalise: bool) -> Edit:
        table = torch.tensor(values, dtype=F64).view(1, 1, 1, 3)
        return Edit((GroupWeights(table, renormalise=renormalise),), groups, n_groups=3)

    call = given_call(3)
    call["readout"] = Readout(row_stats=True, groups=groups, n_groups=3)
    rest = {name: value for name, value in call.items() if name not in "qkv"}
    read = lambda edit: attend(call["q"], call["k"], call["v"], edit=edit, backend="reference", **rest).readings  # noqa: E731
    before = read(None).mass
    halved = before * torch.tensor([0.5, 1.0, 1.0], dtype=F64)
    # Half of group 0 is lost; hiding group 1 after that shares its weight among the others and brings nothing back.
    both = combine(weights([0.5, 1.0, 1.0], False), weights([1.0, 0.0, 1.0], True))
    kept = halved * torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    expected = kept * (halved.sum(-1) / kept.sum(-1)).unsqueeze(-1)
    torch.testing.assert_close(read(both).mass, expected)
