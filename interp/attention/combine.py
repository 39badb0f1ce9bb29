"""Edits as values: which change nothing, and what several of them together are."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields, replace
from functools import reduce
from threading import RLock
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from interp.attention.edits import (
    MAX_GROUPS,
    Blocks,
    Boost,
    DropKeys,
    Edit,
    Gain,
    GivenRows,
    GroupWeights,
    Operation,
    Redistribute,
    Temperature,
    Threshold,
    TopKeys,
)
from interp.attention.validation import AttentionArgumentError
from interp.attention.versions import Seen, tensors, unchanged, versions


def is_neutral(edit: Edit | None) -> bool:
    """Whether an edit provably leaves attention as it is.

    Gains and temperatures of 1, boosts and fractions of 0, weights of 1, thresholds of -inf, no key to drop, no share of
    the top keys, every
    block allowed, no row selected. An operation with a tensor to be differentiated is never neutral: its gradient is
    wanted. A window or neighbourhood that happens to hide nothing counts as an edit.
    """
    if edit is None:
        return True
    if edit.family is not None:
        edit = edit.family  # what it does hangs on its operations alone
    known = _neutral.get(edit)
    if known is not None and known[1] == torch.is_grad_enabled() and unchanged(known[2]):
        return known[0]
    found = all(_does_nothing(op) for op in edit.operations)
    # The answer reads values, for which a GPU must be waited for: an edit that many layers share is asked about once.
    _neutral[edit] = (found, torch.is_grad_enabled(), versions(*edit.operations))
    return found


_neutral: WeakKeyDictionary[Edit, tuple[bool, bool, Seen]] = WeakKeyDictionary()


def _does_nothing(op: Operation) -> bool:
    tensors = [x for x in (getattr(op, f.name) for f in fields(op)) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    where: Tensor | None = getattr(op, "where", None)
    if where is not None and not bool(where.any()):
        return True
    match op:
        case Gain() | Temperature():
            return _all_equal(op.value, 1.0)
        case Boost():
            return _all_equal(op.beta, 0.0)
        case GroupWeights():
            return _all_equal(op.weight, 1.0)
        case Redistribute():
            return _all_equal(op.fraction, 0.0)
        case Threshold():
            return _all_equal(op.value, -torch.inf)
        case DropKeys():
            return bool((op.keys < 0).all())
        case TopKeys():
            return op.draws is not None and op.share <= 0
        case Blocks():
            return bool(op.allowed.all())
        case GivenRows():
            return not len(op.heads) or not len(op.rows)
        case _:
            return False


def _all_equal(value: Tensor | float, neutral: float) -> bool:
    return bool((value == neutral).all()) if isinstance(value, Tensor) else value == neutral


def combine(*edits: Edit | None) -> Edit | None:
    """All edits in one: operations of one stage act in the order of the edits.

    Key and query groups are the product of the edits' partitions (group ``g = a * n_b + b``), and every operation is
    rewritten to speak of it. Product groups without a key are left out if there are more than 8.

    Args:
        edits: None is an edit that does nothing.

    Returns:
        The combined edit, None if there is none.

    Raises:
        AttentionArgumentError: more than 8 groups remain.
    """
    given = [edit for edit in edits if edit is not None and edit.operations]
    if len(given) < 2:
        return given[0] if given else None
    if torch.compiler.is_compiling():
        return reduce(_combine_two, given)
    grouped = [edit for edit in given if edit.groups is not None or edit.query_groups is not None]
    if len(grouped) == 1 and (family := grouped[0].family) is not None:
        groups = grouped[0].groups
        # Its groups are those of all, whatever they are: made once for the family.
        kin = [family if edit is grouped[0] else edit for edit in given]
        together = _known(kin) or _remember(kin, reduce(_combine_two, given))
        return together if groups is None else together.regrouped(groups)
    return _known(given) or _remember(given, reduce(_combine_two, given))


@dataclass(eq=False)
class _Combined:
    """What edits are together, and those edits, which it does not keep alive."""

    of: tuple[ref[Edit], ...]
    versions: Seen
    edit: Edit


KEPT = 32
"""Combinations remembered. A step of generation makes one of each set of edits, and every layer asks for it."""
KEPT_BYTES = 4 << 20
"""Tensors of a combination that is remembered; the kinds of calls (:mod:`~interp.attention.kinds`) keep no more either."""

_combined: OrderedDict[tuple[int | bool, ...], _Combined] = OrderedDict()
_lock = RLock()
"""One that may be taken again: an edit may end, and its combinations with it, while they are added."""


def _key(edits: list[Edit]) -> tuple[int | bool, ...]:
    # Tensors made in inference mode are of no use to whoever differentiates later.
    return (torch.is_inference_mode_enabled(), *map(id, edits))


def _known(edits: list[Edit]) -> Edit | None:
    """One object for the same edits unless a tensor of theirs has changed: calls of one kind know each other by it."""
    found = _combined.get(_key(edits))
    if found is None or any(held() is not edit for held, edit in zip(found.of, edits, strict=True)):
        return None
    return found.edit if unchanged(found.versions) else None


def _remember(edits: list[Edit], together: Edit) -> Edit:
    seen = versions(*edits)
    # What has a gradient to pass on would keep it from one backward pass to the next.
    if (
        any(x.requires_grad for x, _ in seen)
        or sum(x.nbytes for x in (*tensors(together), *(x for x, _ in seen))) > KEPT_BYTES
    ):
        return together
    key = _key(edits)

    def ended(_: object) -> None:
        with _lock:
            if _combined.get(key) is entry:
                del _combined[key]

    entry = _Combined(tuple(ref(edit, ended) for edit in edits), seen, together)
    with _lock:
        _combined.pop(key, None)
        _combined[key] = entry
        while len(_combined) > KEPT:
            _combined.popitem(last=False)
    return together


def _combine_two(a: Edit, b: Edit) -> Edit:
    groups, keys_of_a, keys_of_b = _product(a.groups, b.groups, a.key_groups, b.key_groups, "key")
    rows_a, rows_b = (edit.query_groups if edit.row_groups > 1 else None for edit in (a, b))
    query_groups, rows_of_a, rows_of_b = _product(rows_a, rows_b, a.row_groups, b.row_groups, "query")
    operations = [_rewrite(op, keys_of_a, rows_of_a) for op in a.operations]
    operations += [_rewrite(op, keys_of_b, rows_of_b) for op in b.operations]
    return Edit(tuple(operations), groups, query_groups, len(keys_of_a))


def _product(
    a: Tensor | None, b: Tensor | None, n_a: int, n_b: int, axis: str
) -> tuple[Tensor | None, list[int], list[int]]:
    """The product partition, and for each of its groups the group of ``a`` and the group of ``b`` that it lies in."""
    pairs = [(x, y) for x in range(n_a if a is not None else 1) for y in range(n_b if b is not None else 1)]
    if a is None or b is None:
        groups = b if a is None else a
    elif a.shape[-1] != b.shape[-1]:
        raise AttentionArgumentError(
            f"edits: {axis} groups of all edits must cover the same call; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    else:
        groups = a.long() * n_b + b.long()
        if len(pairs) > MAX_GROUPS:
            used, groups = torch.unique(groups, return_inverse=True)
            pairs = [pairs[g] for g in used.tolist()]
        groups = groups.to(torch.int8)
    if len(pairs) > MAX_GROUPS:
        raise AttentionArgumentError(
            f"edits: together they make at most {MAX_GROUPS} {axis} groups; got {len(pairs)} non-empty ones from "
            f"partitions of {n_a} and {n_b}"
        )
    return groups, [x for x, _ in pairs], [y for _, y in pairs]


def _rewrite(op: Operation, keys: list[int], rows: list[int]) -> Operation:
    """The operation about the product groups, where ``keys[g]`` and ``rows[g]`` are the groups that it knew."""
    match op:
        case Boost():
            return replace(op, beta=op.beta[..., keys])
        case GroupWeights():
            weight = op.weight[..., keys]
            return replace(op, weight=weight if weight.shape[2] == 1 else weight[:, :, rows])
        case Redistribute():
            names = ("source", "target", "gate_mass", "gate_share")
            return replace(
                op, **{name: tuple(g for g, old in enumerate(keys) if old in getattr(op, name)) for name in names}
            )
        case _:
            return op
