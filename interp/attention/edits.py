"""What changes attention at one site in one call: tensors, no policy.

An :class:`Edit` is a set of operations plus the key groups they speak of. The order in which operations act is fixed by
their kind (:data:`STAGES`), not by the order in which they were given: temperature, boost, restrictions, top keys, uniform
and given rows, group weights and redistributions, gain. Within one kind they act in the order given.

Shapes: ``where`` is bool, broadcast over ``[B|1, H|1, Lq|1]``, None for everywhere; per-row values broadcast the same
way. ``H`` counts query heads. Tensors indexed by key are indexed by key slot of this call; rules on positions use absolute
positions (see :class:`~interp.attention.mask.Mask`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from torch import Tensor

T = TypeVar("T")

MAX_GROUPS = 8
MAX_DROPPED_KEYS = 32


@dataclass(frozen=True, eq=False)
class Gain:
    """``z_i *= value``. ``value`` is float or ``[B|1, H|1, Lq|1]``. 0 ablates a head; VHR uses 2."""

    value: Tensor | float
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Temperature:
    """``q.k / value``, before softcap; never divides a bias or a sink logit.

    ``value`` is float or ``[B|1, H|1, Lq|1]``, > 0.
    """

    value: Tensor | float
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Boost:
    """``s += beta[group of j] * |s|`` on visible keys (PAI, PAINT). ``beta`` is ``[B|1, H|1, Lq|1, G]``."""

    beta: Tensor
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SinkWindow:
    """Keep the first ``sink`` real keys and the last ``window`` ones: ``j - first < sink or i - j < window``.

    ``sink`` and ``window`` are int or int ``[H|1]`` (per head: DuoAttention, MoA's spans).
    """

    sink: Tensor | int
    window: Tensor | int
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Blocks:
    """Keep key block ``j // block`` for query block ``i // block`` where ``allowed`` says so (such as S2's shards).

    ``allowed`` is bool ``[H|1, Mq, Mk]`` over absolute block numbers.
    """

    block: int
    allowed: Tensor
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Keep keys within ``radius`` (Chebyshev distance) of the query, in 1-D or on a 2-D patch grid.

    ``query_coords`` is int ``[B|1, Lq, n]``, ``key_coords`` int ``[B|1, Lk, n]``, n = 1 or 2. A negative coordinate
    marks a token without a place (class token, text): it sees and is seen by all. ``radius`` is int or int ``[H|1]``.
    """

    radius: Tensor | int
    query_coords: Tensor
    key_coords: Tensor
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Threshold:
    """Keep keys whose score ``s`` (after step 1, boost included) is at least ``value``: top-k forms.

    ``value`` is ``[B|1, H|1, Lq|1]``.
    """

    value: Tensor
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DropKeys:
    """Hide up to 32 keys per row. ``keys`` is int ``[B|1, H|1, Lq|1, n]`` of absolute positions, -1 for none."""

    keys: Tensor
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TopKeys:
    """Keep the ``k`` keys of a row with the largest scores, or hide some of them. Acts behind all other restrictions.

    Without ``draws`` every other key is hidden (top-k attention). With ``draws`` (``[B|1, H|1, Lq|1, k]``) those n <= k that
    the row sees are candidates to be hidden: the ``int(share * n)`` with the smallest draws, or, unless ``exact``, as many
    of those as have a draw below ``share`` (that is, each with probability ``share`` for uniform draws). One visible key
    always stays. Draws stand for candidates by falling score. Of equal scores any may count as the larger.
    """

    k: int
    draws: Tensor | None = None
    share: float = 0.0
    exact: bool = True
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Uniform:
    """``p_ij = 1 / |V_i|`` on the visible set, no sink share, bias ignored. A row that sees nothing stays zero."""

    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Replace p of ``heads [n]`` at query rows ``rows [R]`` of this call by ``p [B|1, n, R, Lk]`` (patching a pattern).

    The given row is used as it is, also where it lies outside the visible set; its sink share becomes 0.
    """

    heads: Tensor
    rows: Tensor
    p: Tensor


@dataclass(frozen=True, eq=False)
class GroupWeights:
    """``p_ij *= weight[query group of i, key group of j]``; ``weight`` is ``[B|1, H|1, Gq|1, G]``, not negative.

    ``renormalise=True`` keeps the row's total: it divides by ``sum_j w p + sink share``, which is what multiplying inside
    the softmax does (weight 0 is then knockout, minus infinity before the softmax), and gives back the total that an
    earlier operation of this stage left. Without it, weight 0 is zeroed attention and rows lose mass. A row that has
    nothing left stays zero; in fp32 that includes a row whose remaining keys score some 87 nats below the ones knocked
    out (e^-87 is the smallest normal fp32 number).
    """

    weight: Tensor
    renormalise: bool
    where: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Redistribute:
    """Move a fraction of the mass on ``source`` groups to ``target`` groups, row by row; row sums stay (VAR).

    With M the row's masses at this stage: open iff the row is selected and ``M_W >= summ`` and ``M_P >= rho * M_W`` and
    ``M_S > 0`` and ``M_T > 0``; then ``w_S = 1 - fraction`` and ``w_T = 1 + fraction * M_S / M_T``. ``fraction`` is
    float or ``[B|1, H|1, Lq|1]`` in [0, 1]. W is ``gate_mass``, P is ``gate_share`` (a subset of W for VAR); an empty
    tuple has mass 0, which leaves its gate open at ``summ = 0`` or ``rho = 0``.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    fraction: Tensor | float
    gate_mass: tuple[int, ...]
    gate_share: tuple[int, ...]
    summ: float = 0.0
    rho: float = 0.0
    where: Tensor | None = None


Operation = (
    Gain
    | Temperature
    | Boost
    | SinkWindow
    | Blocks
    | Neighbourhood
    | Threshold
    | DropKeys
    | TopKeys
    | Uniform
    | GivenRows
    | GroupWeights
    | Redistribute
)
Restriction = (SinkWindow, Blocks, Neighbourhood, Threshold, DropKeys)

STAGES: dict[type, int] = {
    Temperature: 0,
    Boost: 1,
    **dict.fromkeys(Restriction, 2),
    TopKeys: 3,
    Uniform: 4,
    GivenRows: 4,
    GroupWeights: 5,
    Redistribute: 5,
    Gain: 6,
}


@dataclass(frozen=True, eq=False)
class Edit:
    """Operations of one call and the partition they speak of.

    Args:
        operations: any number of the classes above; sorted by stage, stable within one.
        groups: int8 ``[B|1, Lk]`` by key slot, values ``0 .. n_groups - 1``, for Boost, GroupWeights, Redistribute.
        query_groups: int8 ``[B|1, Lq]``; None puts every row in query group 0.
        n_groups: number of key groups (at most 8); None takes it from the operations' tables, else 8.
    """

    operations: tuple[Operation, ...] = ()
    groups: Tensor | None = None
    query_groups: Tensor | None = None
    n_groups: int | None = None

    family: ClassVar[Edit | None] = None
    """The edit that this one is, but for its key groups or draws, where :meth:`regrouped` or :meth:`redrawn` made it."""

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.operations, key=lambda op: STAGES.get(type(op), len(STAGES))))
        object.__setattr__(self, "operations", ordered)

    def regrouped(self, groups: Tensor) -> Edit:
        """The same operations on other key groups, int8 ``[B|1, Lk]``, whose values nobody checks again.

        Decoding calls with edits of one family share everything that is prepared for a call, so that layers may differ in
        their groups at no cost; checking values would make the host wait for the GPU at every layer.
        """
        made = object.__new__(Edit)
        vars(made).update(vars(self), groups=groups, family=self)
        return made

    def redrawn(self, draws: Tensor) -> Edit:
        """The same with other draws, of the same shape, for its only operation, a :class:`TopKeys`."""
        (op,) = self.operations
        made = object.__new__(Edit)
        vars(made).update(vars(self), operations=(replace(op, draws=draws),), family=self)  # pyright: ignore[reportCallIssue]
        return made

    def of(self, *kinds: type[T]) -> list[T]:
        """The operations of the given kinds, in the order in which they act."""
        return [op for op in self.operations if isinstance(op, kinds)]

    @property
    def key_groups(self) -> int:
        """Number of key groups, ``n_groups`` where it was given."""
        if self.n_groups is not None:
            return self.n_groups
        tables = [op.beta.shape[-1] for op in self.of(Boost)] + [op.weight.shape[-1] for op in self.of(GroupWeights)]
        if tables:
            return max(tables)
        return 1 if self.groups is None else MAX_GROUPS

    @property
    def row_groups(self) -> int:
        """Number of query groups that the operations tell apart."""
        return max((op.weight.shape[2] for op in self.of(GroupWeights)), default=1)
