"""Head ids and ordered sets of heads.

A head is always a query head, written ``L5H3``, or ``vision.L5H3`` outside the text stack.

>>> heads = Heads.parse("L3H1,L5H0-2")
>>> heads
Heads('L3H1,L5H0,L5H1,L5H2')
>>> heads & Heads.parse("L5H*", {"text": (6, 2)})
Heads('L5H0,L5H1')
>>> heads.by_layer()
{3: [1], 5: [0, 1, 2]}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import total_ordering
from typing import Any, TypeAlias, overload

import numpy as np

TEXT = "text"
RULE = "written like 'L5H3' or 'vision.L5H3', joined by commas, with ranges 'L5H0-3' and '*' for all"

StackShapes: TypeAlias = Mapping[str, tuple[int, int | Sequence[int]]]
"""Per stack, the number of layers and the number of heads (one for all layers, or one for each)."""

_SPAN = r"\*|\d+(?:-\d+)?"
_ITEM = re.compile(rf"(?:(?P<stack>[A-Za-z_]\w*)\.)?[Ll](?P<layer>{_SPAN})[Hh](?P<head>{_SPAN})", re.ASCII)


class HeadError(ValueError):
    """A head id that is malformed, or that the model does not have."""


@total_ordering
@dataclass(frozen=True)
class Head:
    """One query head. Heads sort by stack, then layer, then head.

    >>> Head(5, 3), str(Head(5, 3, "vision"))
    (Head('L5H3'), 'vision.L5H3')

    Raises:
        HeadError: ``layer`` or ``head`` is not a whole number >= 0, or ``stack`` is no name.
    """

    layer: int
    head: int
    stack: str = TEXT

    def __post_init__(self) -> None:
        for name in ("layer", "head"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if not isinstance(self.stack, str) or not re.fullmatch(r"[A-Za-z_]\w*", self.stack, re.ASCII):
            raise HeadError(f"stack must be a name of letters, digits and underscores, got {self.stack!r}")

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read one id.

        >>> Head.parse("vision.L5H3")
        Head('vision.L5H3')

        Raises:
            HeadError: ``text`` is not the id of exactly one head.
        """
        match = _ITEM.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None or not match["layer"].isdigit() or not match["head"].isdigit():
            raise HeadError(f"head must be one id like 'L5H3' or 'vision.L5H3', got {text!r}")
        return cls(int(match["layer"]), int(match["head"]), match["stack"] or TEXT)

    def __str__(self) -> str:
        return f"{'' if self.stack == TEXT else self.stack + '.'}L{self.layer}H{self.head}"

    def __repr__(self) -> str:
        return f"Head({str(self)!r})"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Head):
            return NotImplemented
        return (self.stack, self.layer, self.head) < (other.stack, other.layer, other.head)


class Heads(Sequence[Head]):
    """An immutable sequence of heads without duplicates (the first occurrence counts).

    ``|``, ``&`` and ``-`` are the set operations and keep the order of the left side. Equality compares the order too;
    compare ``set(a) == set(b)`` to ignore it.
    """

    __slots__ = ("_heads", "_known", "_sites")

    def __init__(self, heads: Iterable[Head] = ()) -> None:
        self._heads = tuple(dict.fromkeys(heads))
        for head in self._heads:
            if not isinstance(head, Head):
                raise HeadError(f"heads must be Head objects (as_heads reads other forms), got {head!r}")
        self._known = frozenset(self._heads)
        self._sites: dict[tuple[str, int], tuple[int, ...]] | None = None

    @classmethod
    def parse(cls, text: str, shape: Any = None) -> Heads:
        """Read a list of ids, e.g. ``"L3H1,L5H0-3,vision.L2H*"``; layers take ranges (both ends count) and ``*`` too.

        Args:
            text: ids joined by commas; the empty string is no head.
            shape: what the model has (see :data:`StackShapes`), or an object with such ``shapes()``
                (:class:`~interp.models.anatomy.Anatomy`). ``*`` needs it; given, every head is checked against it.

        Raises:
            HeadError: malformed text, ``*`` without ``shape``, or a head that ``shape`` does not have.
        """
        if not isinstance(text, str):
            raise HeadError(f"heads must be text, {RULE}; got {text!r}")
        shapes = _shapes(shape)
        found: list[Head] = []
        for item in text.split(",") if text.strip() else ():
            found.extend(_expand(item.strip(), shapes))
        return cls(found).check(shapes)

    @classmethod
    def from_mask(cls, mask: Any, stack: str = TEXT) -> Heads:
        """The heads that are True in a bool array ``[layer, head]``, in layer order.

        >>> Heads.from_mask([[False, True], [True, False]])
        Heads('L0H1,L1H0')
        """
        array = np.asarray(mask)
        if array.ndim != 2 or array.dtype != np.bool_:
            raise HeadError(f"mask must be a bool array [layer, head], got {array.dtype} of shape {array.shape}")
        return cls(Head(int(layer), int(head), stack) for layer, head in np.argwhere(array))

    def mask(self, stack: str = TEXT, n_layers: int | None = None, n_heads: int | None = None) -> np.ndarray:
        """Bool array ``[n_layers, n_heads]``, True for the heads of ``stack`` in this set; other stacks are left out.

        Sizes not given are just large enough.

        Raises:
            HeadError: a head lies outside ``n_layers`` x ``n_heads``.
        """
        mine = [h for h in self if h.stack == stack]
        layers = max((h.layer for h in mine), default=-1) + 1 if n_layers is None else n_layers
        heads = max((h.head for h in mine), default=-1) + 1 if n_heads is None else n_heads
        Heads(mine).check({stack: (layers, heads)})
        array = np.zeros((layers, heads), dtype=np.bool_)
        for head in mine:
            array[head.layer, head.head] = True
        return array

    def by_stack(self) -> dict[str, Heads]:
        """The heads of each stack, stacks in order of first appearance."""
        return {stack: Heads(h for h in self if h.stack == stack) for stack in dict.fromkeys(h.stack for h in self)}

    def by_layer(self, stack: str = TEXT) -> dict[int, list[int]]:
        """``{layer: head numbers}`` of one stack, both ascending; layers without a head of this set are left out."""
        return {layer: list(heads) for (name, layer), heads in self._by_site().items() if name == stack}

    def at(self, layer: int, stack: str = TEXT) -> tuple[int, ...]:
        """Head numbers of one layer, ascending; empty where the set has none there."""
        return self._by_site().get((stack, layer), ())

    def _by_site(self) -> dict[tuple[str, int], tuple[int, ...]]:
        # Sorted once: interventions ask at every call of every site.
        if self._sites is None:
            found: dict[tuple[str, int], tuple[int, ...]] = {}
            for head in sorted(self._heads):
                place = (head.stack, head.layer)
                found[place] = (*found.get(place, ()), head.head)
            self._sites = found
        return self._sites

    def check(self, shape: Any) -> Heads:
        """Return these heads if ``shape`` (see :meth:`parse`; None allows all) has each of them.

        Raises:
            HeadError: naming the first head, layer or stack that does not exist, and what does.
        """
        shapes = _shapes(shape)
        if shapes is not None:
            for head in self:
                n_layers, _ = _stack(shapes, head.stack, str(head))
                if head.layer >= n_layers:
                    raise HeadError(f"layer must be one of 0..{n_layers - 1} in stack {head.stack!r}, got {head}")
                n_heads = _heads_of(shapes, head.stack, head.layer)
                if head.head >= n_heads:
                    last = f"one of 0..{n_heads - 1}" if n_heads else "absent (the layer has none)"
                    raise HeadError(f"head must be {last} in layer {head.layer} of stack {head.stack!r}, got {head}")
        return self

    @overload
    def __getitem__(self, item: int) -> Head: ...
    @overload
    def __getitem__(self, item: slice) -> Heads: ...
    def __getitem__(self, item: int | slice) -> Head | Heads:
        return Heads(self._heads[item]) if isinstance(item, slice) else self._heads[item]

    def __len__(self) -> int:
        return len(self._heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self._heads)

    def __contains__(self, item: object) -> bool:
        return item in self._known

    def __or__(self, other: Heads) -> Heads:
        return Heads((*self, *other)) if isinstance(other, Heads) else NotImplemented

    def __and__(self, other: Heads) -> Heads:
        return Heads(h for h in self if h in other) if isinstance(other, Heads) else NotImplemented

    def __sub__(self, other: Heads) -> Heads:
        return Heads(h for h in self if h not in other) if isinstance(other, Heads) else NotImplemented

    def __eq__(self, other: object) -> bool:
        return self._heads == other._heads if isinstance(other, Heads) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._heads)

    def __str__(self) -> str:
        return ",".join(map(str, self))

    def __repr__(self) -> str:
        return f"Heads({str(self)!r})"


def as_heads(heads: Any, shape: Any = None) -> Heads:
    """Read any usual form of a set of heads: ``Heads``, ``Head``, text, a ``(layer, head)`` pair, or a list of those.

    >>> as_heads([(3, 1), "L5H0-1", Head(2, 0, "vision")])
    Heads('L3H1,L5H0,L5H1,vision.L2H0')

    Args:
        heads: the heads; an integer array ``[n, 2]`` counts as a list of pairs.
        shape: what the model has (see :meth:`Heads.parse`); given, every head is checked against it.

    Raises:
        HeadError: not readable, or not in the model.
    """
    return Heads(_read(heads, _shapes(shape))).check(shape)


def _read(item: Any, shapes: StackShapes | None) -> Iterable[Head]:
    if isinstance(item, Heads):
        return item
    if isinstance(item, Head):
        return (item,)
    if isinstance(item, str):
        return Heads.parse(item, shapes)
    if not isinstance(item, Iterable):
        raise HeadError(f"heads must be Heads, a Head, text, a (layer, head) pair or a list of those, got {item!r}")
    members: list[Any] = list(item)
    if len(members) in (2, 3) and all(_is_number(m) for m in members[:2]):
        return (Head(*members),)
    return [head for member in members for head in _read(member, shapes)]


def _expand(item: str, shapes: StackShapes | None) -> Iterator[Head]:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise HeadError(f"heads must be {RULE}; got {item!r}")
    stack = match["stack"] or TEXT
    if "*" in item and shapes is None:
        raise HeadError(f"heads with '*' need a model that says how many there are; got {item!r} without one")
    n_layers = _stack(shapes, stack, item)[0] if shapes is not None else 0
    for layer in _span(match["layer"], n_layers, item):
        n_heads = _heads_of(shapes, stack, layer) if shapes is not None and layer < n_layers else 0
        if match["head"] == "*" and layer >= n_layers:
            raise HeadError(f"layer must be one of 0..{n_layers - 1} in stack {stack!r}, got {item!r}")
        yield from (Head(layer, head, stack) for head in _span(match["head"], n_heads, item))


def _span(text: str, count: int, item: str) -> range:
    if text == "*":
        return range(count)
    first, _, last = text.partition("-")
    span = range(int(first), int(last or first) + 1)
    if not span:
        raise HeadError(f"a range must not run backwards, got {item!r}")
    return span


def _shapes(shape: Any) -> StackShapes | None:
    if shape is None or isinstance(shape, Mapping):
        return shape
    if hasattr(shape, "shapes"):
        return shape.shapes()
    raise HeadError(f"shape must be {{stack: (layers, heads)}} or an Anatomy, got {shape!r}")


def _stack(shapes: StackShapes, stack: str, item: str) -> tuple[int, int | Sequence[int]]:
    if stack not in shapes:
        raise HeadError(f"stack must be one of {list(shapes)}, got {stack!r} in {item!r}")
    return shapes[stack]


def _heads_of(shapes: StackShapes, stack: str, layer: int) -> int:
    heads = shapes[stack][1]
    return heads if isinstance(heads, int) else heads[layer]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(name: str, value: Any) -> int:
    if not _is_number(value) or value < 0:
        raise HeadError(f"{name} must be a whole number >= 0, got {value!r}")
    return int(value)
