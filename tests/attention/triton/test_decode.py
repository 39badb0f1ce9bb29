"""The decoding kernels against the specification in float64: each edit alone and in pairs, each reading, ragged batches."""

from __future__ import annotations

import itertools
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.attention import (
    AttentionArgumentError,
    Blocks,
    Boost,
    DropKeys,
    Edit,
    Gain,
    GroupWeights,
    Mask,
    Neighbourhood,
    OffsetBins,
    Readout,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    Uniform,
    attend,
    combine,
    kinds,
    reference,
)
from interp.attention.call import Call
from interp.attention.readouts import pooled_edge

pytest.importorskip("triton")

from interp.attention.triton import decode_launch, decoding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEYS = 43
RANDOM = torch.Generator()


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=RANDOM)


def groups(batch: int = 2, keys: int = KEYS, n: int = 3) -> Tensor:
    return torch.randint(0, n, (batch, keys), generator=RANDOM).to(torch.int8)


def converted(thing: Any, dtype: torch.dtype | None) -> Any:
    """Every tensor inside on the device under test, floating ones in a dtype."""
    if isinstance(thing, Tensor):
        thing = thing.to(DEVICE if dtype != torch.float64 else "cpu")
        return thing.to(dtype) if dtype is not None and thing.is_floating_point() else thing
    if isinstance(thing, tuple):
        return tuple(converted(x, dtype) for x in thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{f.name: converted(getattr(thing, f.name), dtype) for f in fields(thing)})
    return thing


def call(
    *, batch: int = 2, heads: int = 4, kv_heads: int = 2, queries: int = 1, keys: int = KEYS, dim: int = 16, v_dim: int = 16,
    dtype: torch.dtype = torch.float32, **given: Any,
) -> Call:  # fmt: skip
    q, k, v = (
        torch.randn(shape, generator=RANDOM).to(dtype)
        for shape in ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, v_dim))
    )
    readout = given.get("readout", Readout())
    return Call(
        q=q, k=k, v=v, scale=0.4, mask=given.get("mask", Mask()).simplified(queries, keys), softcap=given.get("softcap"),
        sinks=given.get("sinks"), bias=given.get("bias"), edit=given.get("edit", Edit()), readout=readout,
        want_output=given.get("want_output", True), pooled_edge=pooled_edge(queries, keys, readout.pooled) if readout.pooled else 0,
    )  # fmt: skip


def check(made: Call, splits: int, tolerance: float = 5e-6) -> None:
    assert decoding.supports_decode(made) is None
    exact = {f.name: converted(getattr(made, f.name), torch.float64) for f in fields(made)}
    wanted_z, wanted = reference.run(Call(**exact))
    own = {f.name: converted(getattr(made, f.name), None) for f in fields(made)}
    before, decode_launch.forced_parts = decode_launch.forced_parts, splits
    try:
        z, got = decoding.decode(Call(**own))
    finally:
        decode_launch.forced_parts = before
    if wanted_z is None:
        assert z is None
    else:
        assert z is not None and z.dtype == made.q.dtype and z.is_contiguous() and z.shape == wanted_z.shape
        torch.testing.assert_close(z.cpu().double(), wanted_z, atol=tolerance, rtol=tolerance)
    assert got.tensors().keys() == wanted.tensors().keys()
    assert got.pooled_edge == wanted.pooled_edge
    for name, reading in got.tensors().items():
        right = wanted.tensors()[name]
        assert reading.dtype == (right.dtype if right.dtype == torch.int32 else torch.float32), name
        torch.testing.assert_close(
            reading.cpu().double(), right.double(), atol=5e-6, rtol=5e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(autouse=True)
def seeded() -> None:
    RANDOM.manual_seed(3)


def stats(n: int = 3) -> Readout:
    return Readout(row_stats=True, groups=groups(n=n), n_groups=n)


# One entry per edit; where a table can differ by sample, head or row it does, and rows are selected by `where`.
EDITS: dict[str, Any] = {
    "gain": lambda: Gain(rand(2, 4, 1), where=rand(2, 1, 1) < 0.7),
    "number": lambda: Gain(0.5),
    "temperature": lambda: Temperature(rand(1, 4, 1) + 0.5),
    "boost": lambda: Boost(rand(2, 4, 1, 3), where=rand(1, 4, 1) < 0.7),
    "window": lambda: SinkWindow(torch.tensor([1, 2, 3, 20]), torch.tensor([5, 4, 9, 7])),
    "window of some": lambda: SinkWindow(2, 5, where=torch.tensor([True, False, True, True]).view(1, 4, 1)),
    "blocks": lambda: Blocks(8, rand(4, 6, 6) < 0.6),
    "neighbourhood": lambda: Neighbourhood(
        torch.tensor([1, 2, 3, 4]), torch.randint(-1, 9, (2, 1, 2), generator=RANDOM),
        torch.randint(-1, 9, (1, KEYS, 2), generator=RANDOM),
    ),
    "threshold": lambda: Threshold(rand(1, 4, 1) - 0.5),
    "drop": lambda: DropKeys(torch.randint(-1, KEYS, (2, 4, 1, 3), generator=RANDOM)),
    "uniform": lambda: Uniform(torch.tensor([True, False, False, True]).view(1, 4, 1)),
    "weights": lambda: GroupWeights(rand(2, 4, 1, 3), renormalise=False),
    "knockout": lambda: GroupWeights(torch.tensor([0.0, 1.0, 0.5]).view(1, 1, 1, 3), renormalise=True),
    "redistribute": lambda: Redistribute((0,), (1,), rand(1, 4, 1), (0, 2), (1,), 0.1, 0.3, where=rand(2, 4, 1) < 0.8),
}  # fmt: skip


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("edit", EDITS)
def test_each_edit(edit: str, splits: int) -> None:
    edited = Edit((EDITS[edit](),), groups=groups(), n_groups=3)
    mask = Mask(causal=True, q_offset=39)
    check(call(edit=edited, mask=mask, sinks=rand(4), readout=stats()), splits)


PAIRS = list(itertools.combinations([name for name in EDITS if name != "number"], 2))


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair != ("window", "window of some")], ids="+".join)
def test_pairs(pair: tuple[str, str]) -> None:
    edited = Edit(tuple(EDITS[name]() for name in pair), groups=groups(), n_groups=3)
    number = PAIRS.index(pair)
    score: dict[str, Any] = (
        {}, {"softcap": 2.0}, {"sinks": rand(4)}, {"bias": rand(2, 4, 1, KEYS)}, {"mask": Mask(dense=rand(2, 4, 1, KEYS) < 0.6)},
    )[number % 5]  # fmt: skip
    made = {"mask": Mask(q_offset=40), **score}
    made["mask"] = replace(made["mask"], q_offset=40)
    readout = stats() if number % 2 else Readout()
    check(call(kv_heads=1, edit=edited, readout=readout, **made), (1, 2, 5)[number % 3])


MASKS: dict[str, Any] = {
    "slots to come": lambda: Mask(causal=True, q_offset=20),
    "nothing seen": lambda: Mask(causal=True, q_offset=3, kv_offset=9),
    "sliding": lambda: Mask(causal=True, window=(9, 0), q_offset=40, kv_offset=2),
    "two-sided": lambda: Mask(window=(3, 4), q_offset=20),
    "ragged": lambda: Mask(
        causal=True, q_offset=KEYS - 1, padding=torch.arange(KEYS) >= torch.tensor([[0], [29]]), first=torch.tensor([0, 29])
    ),
    "ragged on the right": lambda: Mask(padding=torch.arange(KEYS) < torch.tensor([[KEYS], [7]])),
    "all pads": lambda: Mask(padding=torch.arange(KEYS) < torch.tensor([[KEYS], [0]])),
    "dense": lambda: Mask(dense=rand(1, 4, 1, KEYS) < 0.5),
    "rule": lambda: Mask(rule=lambda b, h, i, j: (i + j + b) % 3 == 0, q_offset=5),
}  # fmt: skip


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_masks(mask: str, splits: int, sinks: bool) -> None:
    edit = Edit((SinkWindow(3, 6),)) if mask == "ragged" and splits == 3 else Edit()
    check(call(kv_heads=1, mask=MASKS[mask](), sinks=rand(4) if sinks else None, readout=stats(), edit=edit), splits)


def test_a_bias_that_masks() -> None:
    bias = torch.where(rand(2, 1, 1, KEYS) < 0.5, -torch.inf, rand(2, 1, 1, KEYS))
    edit = Edit((Boost(rand(1, 4, 1, 3)),), groups=groups())
    for splits in (1, 2):
        check(call(bias=bias, edit=edit, readout=stats()), splits)


@pytest.mark.parametrize("splits", [1, 2])
def test_several_rows(splits: int) -> None:
    for queries, mask in ((2, Mask(causal=True, q_offset=30)), (5, Mask(causal=True, window=(7, 0), q_offset=38))):
        edit = Edit(
            (
                GroupWeights(rand(1, 4, 2, 3), renormalise=True, where=rand(1, 4, queries) < 0.8),
                Gain(rand(1, 1, queries)),
                SinkWindow(2, 6, where=rand(1, 1, queries) < 0.5),
            ),
            groups=groups(), query_groups=torch.arange(queries)[None].remainder(2).to(torch.int8), n_groups=3,
        )  # fmt: skip
        check(call(queries=queries, mask=mask, readout=stats()), splits)
        check(call(queries=queries, mask=mask, edit=edit, readout=stats()), splits)


def test_more_rows_than_a_block() -> None:
    edit = Edit((GroupWeights(rand(1, 8, 1, 8), renormalise=True),), groups=groups(1, 20, n=8))
    made = call(batch=1, heads=8, kv_heads=1, queries=3, keys=20, edit=edit)
    check(made, 2)


def test_eight_groups() -> None:
    for splits in (1, 2):
        check(call(readout=stats(8)), splits)


def test_weights_in_turn() -> None:
    operations = (
        GroupWeights(rand(1, 4, 1, 3), renormalise=True),
        Redistribute((0,), (2,), 0.5, (), ()),
        GroupWeights(rand(2, 1, 1, 3), renormalise=False),
    )
    for readout in (stats(), Readout(row_stats=True, topk=2, groups=groups(), n_groups=3)):
        check(call(edit=Edit(operations, groups=groups()), sinks=rand(4), readout=readout), 2)


def test_groups_nobody_speaks_of() -> None:
    # Without a table the edit has eight groups; those in no role are one class.
    redistribute = Redistribute((0, 3), (1,), 0.7, (), ())
    check(call(edit=Edit((redistribute,), groups=groups(n=8)), readout=stats()), 2)
    check(call(edit=Edit((GroupWeights(rand(1, 4, 1, 1), renormalise=False),)), readout=stats()), 1)


READINGS: dict[str, Any] = {
    "topk": lambda: Readout(topk=4, row_stats=True, groups=groups(), n_groups=3),
    "received": lambda: Readout(received=True, query_groups=torch.tensor([[0, 1, -1]]).to(torch.int8), n_query_groups=2),
    "pooled": lambda: Readout(pooled=8),
    "offset": lambda: Readout(
        offset=OffsetBins(torch.arange(39, 42).view(1, 3, 1), torch.arange(KEYS).view(1, KEYS, 1), (-2,), (20,))
    ),
    "rows": lambda: Readout(rows=torch.tensor([2, 0])),
    "attention": lambda: Readout(attention=True, heads=torch.tensor([3, 1])),
    "group output": lambda: Readout(group_output=torch.tensor([1]), groups=groups(), n_groups=3),
    "heads": lambda: Readout(row_stats=True, heads=torch.tensor([2, 0])),
}  # fmt: skip


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("edited", [False, True], ids=["", "edited"])
def test_each_reading(reading: str, edited: bool) -> None:
    edit = Edit()
    if edited:
        weights = GroupWeights(rand(1, 4, 1, 3), renormalise=True)
        uniform = Uniform(torch.tensor([False, True, False, False]).view(1, 4, 1))
        edit = Edit((weights, uniform, Gain(rand(1, 4, 1)), SinkWindow(2, 20)), groups=groups())
    mask = Mask(causal=True, q_offset=39)
    check(call(queries=3, mask=mask, edit=edit, sinks=rand(4), readout=READINGS[reading]()), 2)
    check(call(queries=3, mask=mask, edit=edit, readout=READINGS[reading](), want_output=False), 1)


@pytest.mark.parametrize("dims", [(16, 24), (72, 72), (80, 16), (96, 40), (256, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dims_and_dtypes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    made = call(heads=6, dim=dims[0], v_dim=dims[1], dtype=dtype, mask=Mask(causal=True, q_offset=40), readout=stats())
    made = replace(made, scale=dims[0] ** -0.5)
    check(made, 2, tolerance=5e-6 if dtype == torch.float32 else 2e-3)


def test_low_precision_bf16() -> None:
    # The interpreter truncates where hardware rounds, hence the width of this.
    check(call(dtype=torch.bfloat16), 2, tolerance=2e-2)


def test_views_of_a_longer_cache() -> None:
    made = call(heads=4, keys=60, v_dim=32, readout=stats())
    shifted = replace(made, k=made.k[:, :, 5 : 5 + KEYS], v=made.v[:, :, 5 : 5 + KEYS, :16])
    check(shifted, 2)
    check(replace(made, k=made.k[:, :, 5 : 5 + KEYS], v=made.v.mT[:, :, :KEYS, :KEYS].mT), 1)


def test_ties_go_to_the_lowest_key(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not against the specification, whose vectorised exponential leaves equal scores unequal in the last place.
    made = call(readout=stats(), mask=Mask(kv_offset=7, padding=torch.arange(KEYS) >= torch.tensor([[0], [20]])))
    made = replace(made, q=made.q.round(), k=torch.ones_like(made.k))
    own = Call(**{f.name: converted(getattr(made, f.name), None) for f in fields(made)})
    for splits in (1, 2, 5):
        monkeypatch.setattr(decode_launch, "forced_parts", splits)
        key = decoding.decode(own)[1].top_key
        assert key is not None
        assert key[0].unique().tolist() == [7] and key[1].unique().tolist() == [27]


def test_the_same_again() -> None:
    made = call(readout=stats(), sinks=rand(4))
    own = Call(**{f.name: converted(getattr(made, f.name), None) for f in fields(made)})
    (z, first), (z_again, again) = decoding.decode(own), decoding.decode(own)
    assert torch.equal(z, z_again)  # pyright: ignore[reportArgumentType]
    for name, reading in first.tensors().items():
        assert torch.equal(reading, again.tensors()[name])


def test_large_scores() -> None:
    made = call(readout=stats(), mask=Mask(padding=torch.arange(KEYS) > torch.tensor([[20], [40]])))
    check(replace(made, q=made.q * 300), 5, tolerance=3e-5)


def test_number_of_parts() -> None:
    splits = decode_launch.parts_of
    assert splits(8, 512, 132) == 33
    assert splits(256, 16, 132) == 1
    assert splits(64, 1, 132) == splits(1, 0, 132) == 1
    for units, blocks in itertools.product((1, 3, 8, 40, 100, 264, 1000), (0, 1, 2, 7, 64, 500)):
        assert 1 <= splits(units, blocks, 132) <= max(blocks, 1)


def test_what_is_no_decoding() -> None:
    assert "rows" in decoding.supports_decode(call(queries=33))  # pyright: ignore[reportOperatorIssue]
    big = call(keys=8, readout=Readout(attention=True))
    meta = torch.empty(64, 4, 1, 16, device="meta")
    long = torch.empty(64, 2, 1 << 20, 16, device="meta")
    assert "map" in decoding.supports_decode(replace(big, q=meta, k=long, v=long))  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize("splits", [1, 3])
def test_later_calls_of_a_kind_take_the_short_way(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_launch, "forced_parts", splits)
    kinds.clear()
    weight, mask = torch.tensor([0.5, 2.0, 1.0], device=DEVICE).view(1, 1, 1, 3), Mask(causal=True, q_offset=KEYS - 1)
    edit = Edit(
        (Gain(rand(2, 4, 1).to(DEVICE)), GroupWeights(weight, renormalise=True)), groups().to(DEVICE), n_groups=3
    )
    sinks = rand(4).to(DEVICE)
    for n in range(4):
        q, k, v = (x.to(DEVICE) for x in (rand(2, 4, 1, 16), rand(2, 2, KEYS, 16), rand(2, 2, KEYS, 24)))
        if n == 2:
            k = k.transpose(-1, -2).contiguous().transpose(-1, -2)  # another layout, so another kind
        if n == 3:
            weight[..., 0] = 0.0
        given: dict[str, Any] = {"scale": 0.4, "mask": mask, "edit": edit, "sinks": sinks}
        with torch.no_grad():
            got = attend(q, k, v, **given, backend="triton")
        assert got.readings.backend == "triton"
        wanted = attend(q, k, v, **given, backend="reference").output
        torch.testing.assert_close(got.output, wanted, atol=5e-6, rtol=5e-6)
    (short,) = {kind.short is not None for kind in kinds._kinds.values() if kind.backend_name == "triton"}  # pyright: ignore[reportPrivateUsage]
    assert short


FAMILIES = {
    "moved": Edit((Redistribute((1,), (2,), 0.4, (1, 2), (2,), 0.1, 0.2),), n_groups=3),
    "weights": Edit((GroupWeights(torch.tensor([1.0, 0.2, 0.0]).reshape(1, 1, 1, 3), False),), n_groups=3),
    "boost": Edit((Boost(torch.tensor([0.0, 0.3, -0.2]).reshape(1, 1, 1, 3)),), n_groups=3),
}


@pytest.mark.parametrize("gain", [False, True], ids=["", "with a gain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_differ_in_their_groups_share_a_kind(
    family: str, gain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of groups are read by the kernel alone: neither checked nor baked in, and never mistaken for another layer's."""
    kinds.clear()
    template = converted(FAMILIES[family], torch.float32)
    made = call()
    given = {name: getattr(made, name).to(DEVICE) for name in ("q", "k", "v")}
    buffers = [groups(keys=KEYS + 5).to(DEVICE) for _ in range(3)]
    other = Edit((Gain(converted(rand(1, 4, 1), torch.float32)),))
    prepared: list[Call] = []
    init = decoding.Decoding.__init__
    monkeypatch.setattr(decoding.Decoding, "__init__", lambda self, *a: (prepared.append(a[0]), init(self, *a))[1])
    for turn, codes in itertools.product(range(2), buffers):
        # Rows further apart than their keys, and (in the second turn) tables that start anywhere.
        own = ((codes + turn) % 3)[:, turn : turn + KEYS]
        edit = template.regrouped(own)
        if gain:
            edit = combine(edit, other)
            assert edit is not None and edit.family is not None
        with torch.no_grad():
            output = attend(**given, scale=0.4, edit=edit, backend="triton").output
        plain = replace(edit, groups=own.contiguous())
        assert plain.family is None
        exact = reference.run(
            replace(made, **{n: converted(getattr(made, n), torch.float64) for n in ("q", "k", "v")},
                    edit=converted(plain, torch.float64))
        )[0]  # fmt: skip
        assert output is not None and exact is not None
        torch.testing.assert_close(output.cpu().double(), exact, atol=5e-6, rtol=5e-6)
    assert len(prepared) == 1
    kinds.clear()


def test_an_edit_of_a_family_is_checked_for_its_shape() -> None:
    template = Edit((Redistribute((1,), (2,), 0.4, (1, 2), (2,)),), n_groups=3)
    made = call()
    with pytest.raises(AttentionArgumentError, match=r"edit\.groups: .*Lk = 43.*; got .*42"):
        attend(made.q, made.k, made.v, scale=0.4, edit=template.regrouped(groups(keys=42)), backend="reference")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("edit", ["moved", "weights", "temperature"])
def test_a_growing_cache_is_prepared_once(edit: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds.clear()
    monkeypatch.setattr(decode_launch, "forced_parts", splits)
    template = converted(
        FAMILIES.get(edit, Edit((Temperature(torch.tensor([[[0.7], [1.3], [1.0], [2.0]]])),))), torch.float32
    )
    longest = call(keys=52)
    buffer = groups(keys=52).to(DEVICE)
    looked: list[object] = []
    of = decoding.Work.of
    monkeypatch.setattr(decoding.Work, "of", lambda *a: (looked.append(a), of(*a))[1])
    for n in (40, 41, 47, 52):
        now = template if edit == "temperature" else template.regrouped(buffer[:, :n])
        made = replace(longest, k=longest.k[:, :, :n].contiguous(), v=longest.v[:, :, :n].contiguous(), edit=now)
        given = [getattr(made, name).to(DEVICE) for name in ("q", "k", "v")]
        with torch.no_grad():
            mask = Mask(causal=True, q_offset=n - 1)
            outputs = [attend(*given, scale=0.4, mask=mask, edit=now, backend="triton").output for _ in range(2)]
        exact = reference.run(
            replace(made, **{name: converted(getattr(made, name), torch.float64) for name in ("q", "k", "v")},
                    edit=converted(now, torch.float64))
        )[0]  # fmt: skip
        for output in outputs:
            assert output is not None and exact is not None
            torch.testing.assert_close(output.cpu().double(), exact, atol=5e-6, rtol=5e-6)
    assert len(looked) == 1
    # Half of the keys hidden from the row, or fewer values than keys: looked at, and right or refused.
    with torch.no_grad():
        q, k, v = given
        half = attend(q, k, v, scale=0.4, mask=Mask(causal=True, q_offset=25), edit=now, backend="triton").output
        wanted = attend(q, k, v, scale=0.4, mask=Mask(causal=True, q_offset=25), edit=now, backend="reference").output
        torch.testing.assert_close(half, wanted, atol=5e-6, rtol=5e-6)
        with pytest.raises(AttentionArgumentError, match="v: must have k's"):
            attend(q, k, v[:, :, :50], scale=0.4, mask=mask, edit=now, backend="triton")
    kinds.clear()
