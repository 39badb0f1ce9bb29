"""A token's attention in one launch: equal to the specification, and ready for the next launch when it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from interp.attention import reference
from interp.attention.call import Call
from interp.attention.edits import Edit, Gain, GroupWeights, Operation, Redistribute, SinkWindow
from interp.attention.mask import Mask
from interp.attention.readouts import Readout
from interp.attention.triton import decode_joined, decode_launch
from interp.attention.triton.decoding import Decoding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEYS = 45
MOVE = Redistribute((0,), (1,), 0.7, (0, 1), (1,), 0.1, 0.2)


def call(
    *operations: Operation, batch: int = 2, heads: int = 4, kv_heads: int = 2, v_dim: int = 16, keys: int = KEYS,
    seed: int = 0, **given: Any,
) -> Call:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, 1, 32), (batch, kv_heads, keys, 32), (batch, kv_heads, keys, v_dim)
    q, k, v = (torch.randn(shape, generator=random).to(DEVICE) for shape in shapes)
    groups = torch.randint(0, 3, (batch, keys), generator=random).to(torch.int8).to(DEVICE)
    mask = given.pop("mask", Mask(causal=True, q_offset=keys - 1)).simplified(1, keys)
    settings = {"softcap": None, "sinks": None, "bias": None, **given}
    return Call(
        q=q, k=k, v=v, scale=0.4, mask=mask, edit=Edit(operations, groups if operations else None), readout=Readout(),
        want_output=True, **settings,
    )  # fmt: skip


def exact(made: Call) -> torch.Tensor:
    z, _ = reference.run(replace(made, q=made.q.double(), k=made.k.double(), v=made.v.double()))
    assert z is not None
    return z


def short(way: Decoding, made: Call) -> torch.Tensor:
    assert way.short is not None
    return way.short(made.q, made.k, made.v, None, None, made.edit.groups)


CASES: dict[str, dict[str, Any]] = {
    "a head a key-value head": {"kv_heads": 4},
    "grouped": {},
    "values of their own width": {"v_dim": 48},
    "one sample": {"batch": 1, "kv_heads": 1},
    "a window": {"mask": Mask(causal=True, window=(20, 0), q_offset=KEYS - 1)},
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("operations", [(), (MOVE,)], ids=["plain", "moved"])
@pytest.mark.parametrize("case", CASES)
def test_as_specified(
    case: str, operations: tuple[Operation, ...], splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_launch, "forced_parts", splits)
    first, second = (call(*operations, seed=seed, **CASES[case]) for seed in (0, 1))
    way = Decoding(first)
    assert way.main.joined is not None
    for made in (first, second, first):
        torch.testing.assert_close(short(way, made).double(), exact(made), atol=5e-6, rtol=5e-6)
    room = decode_joined.shared_room(first.q.device)
    assert room is not None and not room[0].any()


@pytest.mark.parametrize("splits", [(3, 3), (3, 2)], ids=["as many parts", "fewer"])
@pytest.mark.parametrize("operations", [(), (MOVE,)], ids=["plain", "moved"])
def test_a_cache_grows(
    operations: tuple[Operation, ...], splits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_launch, "forced_parts", splits[0])
    way = Decoding(call(*operations))
    assert way.main.joined is not None
    grown = call(*operations, seed=1, keys=KEYS + 3)
    prepared: list[int] = []
    general = way._of_length
    monkeypatch.setattr(way, "_of_length", lambda *given: (prepared.append(0), general(*given))[1])
    monkeypatch.setattr(decode_launch, "forced_parts", splits[1])
    for _ in range(2):
        longer = way.of_length(grown.k, grown.v, grown.edit.groups)
        assert longer is not None
        for groups in (grown.edit.groups, None):
            z = longer(grown.q, grown.k, grown.v, None, None, groups)
            torch.testing.assert_close(z.double(), exact(grown), atol=5e-6, rtol=5e-6)
    assert len(prepared) == (splits[0] != splits[1])  # what was prepared for so many parts serves the next length, too
    wide = torch.zeros(2, 2, KEYS + 4, 36, device=DEVICE)[..., :32]
    assert way.of_length(wide, wide, None) is None


def test_layers_may_have_groups_of_their_own() -> None:
    made = call(MOVE)
    assert made.edit.groups is not None
    other = replace(made, edit=Edit((MOVE,), made.edit.groups.flip(1)))
    way = Decoding(made)
    torch.testing.assert_close(short(way, other).double(), exact(other), atol=5e-6, rtol=5e-6)
    assert not torch.allclose(exact(other), exact(made))


OTHERS: dict[str, tuple[tuple[Operation, ...], dict[str, Any]]] = {
    "a gain by head": ((Gain(torch.rand(1, 4, 1, device=DEVICE)),), {}),
    "weights": ((GroupWeights(torch.rand(1, 1, 1, 3, device=DEVICE), renormalise=False),), {}),
    "a fraction by head": ((replace(MOVE, fraction=torch.rand(1, 4, 1, device=DEVICE)),), {}),
    "a window of keys": ((SinkWindow(2, 9),), {}),
    "softcap": ((), {"softcap": 5.0}),
    "sinks": ((), {"sinks": torch.zeros(4, device=DEVICE)}),
    "padding": ((), {"mask": Mask(padding=torch.arange(KEYS, device=DEVICE)[None].expand(2, -1) > 3)}),
    "many heads a key-value head": ((), {"heads": 16, "kv_heads": 1}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_cannot_say_goes_the_general_way(name: str) -> None:
    operations, given = OTHERS[name]
    made = call(*operations, **given)
    way = Decoding(made)
    assert way.main.joined is None
    z, _ = way.run(made)
    assert z is not None
    torch.testing.assert_close(z.double(), exact(made), atol=5e-6, rtol=5e-6)


def test_graphs_are_captured_without_shared_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    made = call(MOVE)
    way = Decoding(made)
    z = short(way, made)
    monkeypatch.setattr(decode_joined, "shared_room", lambda _: None)
    torch.testing.assert_close(short(way, made), z, atol=5e-6, rtol=5e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_may_run_beside_others() -> None:
    made = call(MOVE)
    way = Decoding(made)
    short(way, made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = short(way, made)
    z.zero_()
    graph.replay()
    torch.testing.assert_close(z.double(), exact(made), atol=5e-6, rtol=5e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_again_and_again() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 32, n, 128, generator=random).bfloat16().cuda() for n in (1, 4096, 4096))
    groups = torch.randint(0, 3, (4, 4096), generator=random).to(torch.int8).cuda()
    made = replace(
        call(), q=q, k=k, v=v, mask=Mask(causal=True, q_offset=4095).simplified(1, 4096), edit=Edit((MOVE,), groups)
    )
    way = Decoding(made)
    assert way.main.joined is not None
    first = short(way, made)
    wanted = exact(made)
    assert (first.double() - wanted).norm() / wanted.norm() < 5e-3
    assert all(torch.equal(short(way, made), first) for _ in range(200))
