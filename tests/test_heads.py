"""Head ids and sets of heads."""

from __future__ import annotations

import doctest
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import interp.heads
from interp.heads import Head, HeadError, Heads, as_heads

SHAPE = {"text": (6, 4), "vision": (3, [2, 0, 5])}
head_ids = st.builds(Head, st.integers(0, 200), st.integers(0, 200), st.sampled_from(["text", "vision", "qformer_2"]))
head_sets = st.lists(head_ids, max_size=12).map(Heads)


def test_doctests() -> None:
    failed, tried = doctest.testmod(interp.heads)
    assert tried >= 5 and failed == 0


@given(head_ids)
def test_head_text_round_trip(head: Head) -> None:
    assert Head.parse(str(head)) == head
    assert ("." in str(head)) == (head.stack != "text")


@given(head_sets)
def test_heads_text_round_trip(heads: Heads) -> None:
    assert Heads.parse(str(heads)) == heads
    assert as_heads(list(map(str, heads))) == heads
    assert as_heads([(h.layer, h.head, h.stack) for h in heads]) == heads
    assert pickle.loads(pickle.dumps(heads)) == heads


@given(head_sets, head_sets)
def test_set_operations_are_those_of_sets_in_the_left_order(a: Heads, b: Heads) -> None:
    assert set(a | b) == set(a) | set(b)
    assert set(a & b) == set(a) & set(b)
    assert set(a - b) == set(a) - set(b)
    assert (a | b)[: len(a)] == a
    assert list(a - b) == [h for h in a if h not in set(b)]
    for heads in (a | b, a & b, a - b):
        assert len(heads) == len(set(heads))


@given(head_sets)
def test_mask_round_trip(heads: Heads) -> None:
    for stack, members in heads.by_stack().items():
        mask = heads.mask(stack, 201, 201)
        assert mask.sum() == len(members)
        assert set(Heads.from_mask(mask, stack)) == set(members)
        assert [(layer, h) for layer, row in heads.by_layer(stack).items() for h in row] == [
            (h.layer, h.head) for h in sorted(members)
        ]


def test_order_and_duplicates() -> None:
    heads = Heads.parse("L5H1,L3H0,L5H1,vision.L0H0,L5H0")
    assert list(map(str, heads)) == ["L5H1", "L3H0", "vision.L0H0", "L5H0"]
    assert list(map(str, sorted(heads))) == ["L3H0", "L5H0", "L5H1", "vision.L0H0"]
    assert Head(1, 2) in heads | Heads([Head(1, 2)]) and Head(1, 2) not in heads
    assert heads[1:3] == Heads.parse("L3H0,vision.L0H0")


def test_ranges_and_stars() -> None:
    assert str(Heads.parse("L3H1,L5H0-3,vision.L2H*", SHAPE)).split(",")[-5:] == [f"vision.L2H{h}" for h in range(5)]
    assert len(Heads.parse("L*H*", SHAPE)) == 24
    assert Heads.parse("vision.L*H*", SHAPE) == Heads.parse("vision.L0H0-1,vision.L2H0-4")
    assert Heads.parse("L1-2H3") == Heads.parse("L1H3,L2H3")
    assert Heads.parse(" L3H1 , l3h2 ") == as_heads([(3, 1), (3, 2)])
    assert Heads.parse("") == Heads()


def test_shape_may_be_an_anatomy() -> None:
    anatomy = SimpleNamespace(shapes=lambda: {"text": (2, 3)})
    assert len(as_heads("L*H*", anatomy)) == 6
    with pytest.raises(HeadError, match=r"layer must be one of 0\.\.1"):
        as_heads((2, 0), anatomy)


def test_as_heads_reads_the_usual_forms() -> None:
    want = Heads([Head(3, 1)])
    for form in (
        want,
        Head(3, 1),
        "L3H1",
        (3, 1),
        [(3, 1)],
        [Head(3, 1)],
        ["L3H1"],
        np.array([[3, 1]]),
        [np.int64(3), 1],
    ):
        assert as_heads(form) == want
    assert as_heads([]) == Heads()
    assert as_heads(np.array([[3, 1], [2, 0]])) == Heads.parse("L3H1,L2H0")
    assert type(as_heads(np.array([[3, 1]]))[0].layer) is int


def test_mask_sizes_default_to_just_large_enough() -> None:
    mask = Heads.parse("L1H2,vision.L9H9").mask()
    assert mask.shape == (2, 3) and mask.dtype == bool and mask.sum() == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("L3", "written like"),
        ("L3H1,", "written like"),
        ("L3H-1", "written like"),
        ("L3H2-1", "backwards"),
        ("H3L1", "written like"),
        ("a-b.L1H1", "written like"),
        ("L٣H1", "written like"),
        ("L2H*", "need a model"),
    ],
)
def test_malformed_text(text: str, says: str) -> None:
    with pytest.raises(HeadError, match=says) as caught:
        Heads.parse(text)
    assert repr(text.rpartition(",")[-1]) in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        ("L6H0", r"layer must be one of 0\.\.5 in stack 'text', got L6H0"),
        ("L9H*", r"layer must be one of 0\.\.5 in stack 'text'"),
        ("L0H4", r"head must be one of 0\.\.3 in layer 0 of stack 'text', got L0H4"),
        ("vision.L1H0", "the layer has none"),
        ("audio.L0H0", r"stack must be one of \['text', 'vision'\], got 'audio'"),
        ("audio.L0H*", r"stack must be one of \['text', 'vision'\], got 'audio'"),
    ],
)
def test_heads_the_model_does_not_have(heads: str, says: str) -> None:
    with pytest.raises(HeadError, match=says):
        as_heads(heads, SHAPE)


@pytest.mark.parametrize(
    "bad", [3, None, 1.5, [3, 1.5], [(3, True)], [[[1]]], (-1, 2), {"text": 3}, np.ones((2, 2), bool)]
)
def test_unreadable_forms(bad: object) -> None:
    with pytest.raises(HeadError):
        as_heads(bad)


def test_constructors_refuse_what_is_no_head() -> None:
    with pytest.raises(HeadError, match="layer must be"):
        Head(-1, 0)
    with pytest.raises(HeadError, match="head must be"):
        Head(0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(HeadError, match="stack must be"):
        Head(0, 1, "a.b")
    with pytest.raises(HeadError, match="as_heads"):
        Heads(["L1H1"])  # type: ignore[list-item]
    with pytest.raises(HeadError, match="one id like"):
        Head.parse("L1H0-1")
    with pytest.raises(HeadError, match="bool array"):
        Heads.from_mask(np.ones((2, 2)))
    with pytest.raises(HeadError, match="layer must be"):
        Heads.parse("L5H0").mask("text", 3, 3)
