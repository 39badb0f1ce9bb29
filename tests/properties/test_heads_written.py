"""What may be written for a set of heads, against a plain reading of the same."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.heads import Head, HeadError, Heads, as_heads

SHAPE = {"text": (6, 4), "vision": (3, [2, 5, 1])}

stacks = st.sampled_from(["text", "vision"])
numbers = st.integers(0, 5)
spans = st.one_of(numbers, st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair))), st.just("*"))
items = st.tuples(stacks, spans, spans)


def written(item: tuple[str, object, object], upper: bool) -> str:
    def span(value: object) -> str:
        return f"{value[0]}-{value[1]}" if isinstance(value, tuple) else str(value)

    layer, head = ("L", "H") if upper else ("l", "h")
    stack, layers, heads = item
    return f"{'' if stack == 'text' else stack + '.'}{layer}{span(layers)}{head}{span(heads)}"


def width(stack: str, layer: int) -> int:
    heads = SHAPE[stack][1]
    return heads if isinstance(heads, int) else heads[layer]


def meant(item: tuple[str, object, object]) -> list[tuple[str, int, int]] | None:
    """Stack, layer and head of each, one after the other; None where the model does not have one of them."""
    stack, layers, heads = item
    n_layers = SHAPE[stack][0]

    def values(span: object, n: int) -> list[int]:
        if span == "*":
            return list(range(n))
        return list(range(span[0], span[1] + 1)) if isinstance(span, tuple) else [span]  # type: ignore[list-item]

    found = []
    for layer in values(layers, n_layers):
        if layer >= n_layers:
            return None
        for head in values(heads, width(stack, layer)):
            if head >= width(stack, layer):
                return None
            found.append((stack, layer, head))
    return found


@settings(max_examples=60)
@given(st.lists(items, min_size=1, max_size=4), st.booleans(), st.sampled_from([",", " , "]))
def test_what_is_written_is_what_is_read(given_: list[tuple[str, object, object]], upper: bool, comma: str) -> None:
    text = comma.join(written(item, upper) for item in given_)
    parts = [meant(item) for item in given_]
    if any(part is None for part in parts):
        with pytest.raises(HeadError, match="must be"):
            Heads.parse(text, SHAPE)
        return
    want = list(dict.fromkeys(one for part in parts if part is not None for one in part))
    read = Heads.parse(text, SHAPE)
    assert [(head.stack, head.layer, head.head) for head in read] == want
    # What it writes needs no model to be read, and gives the same again.
    assert Heads.parse(str(read)) == read == as_heads(text, SHAPE)
    assert "*" not in str(read) and "-" not in str(read)


@settings(max_examples=60)
@given(st.lists(items, min_size=1, max_size=3))
def test_a_star_needs_a_model_and_nothing_else_does(given_: list[tuple[str, object, object]]) -> None:
    text = ",".join(written(item, True) for item in given_)
    if "*" in text:
        with pytest.raises(HeadError, match="need a model"):
            Heads.parse(text)
    else:
        alone = Heads.parse(text)
        parts = [meant(item) for item in given_]
        assert any(part is None for part in parts) or alone == Heads.parse(text, SHAPE)


@settings(max_examples=150)
@given(st.text(st.sampled_from("LlHh0123-*,. vision_٣é"), max_size=12) | st.text(max_size=8))
def test_any_text_is_read_or_refused_with_what_was_got(text: str) -> None:
    read, said = None, ""
    try:
        read = Heads.parse(text, SHAPE)
    except HeadError as error:
        said = str(error)
    if read is None:
        assert "must" in said and "got" in said
        return
    assert Heads.parse(str(read), SHAPE) == read
    assert all(re.fullmatch(r"(vision\.)?L\d+H\d+", str(head)) for head in read)


@given(
    st.lists(st.builds(Head, numbers, numbers, stacks), max_size=8),
    st.lists(st.builds(Head, numbers, numbers, stacks), max_size=8),
)
def test_the_laws_of_sets_hold(a: list[Head], b: list[Head]) -> None:
    left, right = Heads(a), Heads(b)
    assert left | Heads() == left == left | left == left & left and left - left == Heads() == left & Heads()
    assert (left - right) | (left & right) == Heads(h for h in left if h not in right) | Heads(
        h for h in left if h in right
    )
    assert set(left | right) == set(right | left) and set(left & right) == set(right & left)
    assert (left == right) == (tuple(left) == tuple(right)) and (left != right or hash(left) == hash(right))
    assert sum(len(part) for part in left.by_stack().values()) == len(left)
