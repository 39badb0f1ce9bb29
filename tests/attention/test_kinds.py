"""What calls of one kind share: noticed when a tensor changes, let go of when nobody needs it, safe between threads."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from interp.attention import (
    Boost,
    Edit,
    Gain,
    GroupWeights,
    Mask,
    Readout,
    Redistribute,
    SinkWindow,
    TopKeys,
    attend,
    is_neutral,
    kinds,
    reference,
)
from interp.attention.versions import unchanged, versions


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    kinds.clear()
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)
    kinds.clear()


def operands(n: int = 6) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=random) for _ in range(3))
    return {"q": q, "k": k, "v": v, "scale": 0.3}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("backend", ["auto", "blockwise"])
def test_an_edit_changed_in_place_is_noticed(inference: bool, backend: str) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        gain = torch.ones(1, 2, 1)
        edit, given = Edit((Gain(gain),)), operands()
        plain = attend(**given, edit=edit, backend=backend).output
        assert plain is not None
        gain.fill_(2.0)
        torch.testing.assert_close(attend(**given, edit=edit, backend=backend).output, 2 * plain)
        gain.fill_(3.0)
        torch.testing.assert_close(attend(**given, edit=edit, backend=backend).output, 3 * plain)
        gain.fill_(1.0)
        torch.testing.assert_close(attend(**given, edit=edit, backend=backend).output, plain)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
def test_whether_an_edit_is_neutral_is_asked_anew_when_it_changes(inference: bool) -> None:
    with torch.inference_mode(inference):
        gain = torch.ones(1, 2, 1)
        edit = Edit((Gain(gain),))
        assert is_neutral(edit)
        gain[0, 1] = 0.5
        assert not is_neutral(edit)
        gain[0, 1] = 1.0
        assert is_neutral(edit)


def test_groups_changed_in_inference_mode_are_noticed() -> None:
    with torch.inference_mode():
        groups = torch.zeros(1, 6, dtype=torch.int8)
        readout, given = Readout(row_stats=True, groups=groups, n_groups=2), operands()
        first = attend(**given, readout=readout).readings.mass
        groups[:] = 1
        second = attend(**given, readout=readout).readings.mass
    assert first is not None
    assert second is not None
    assert torch.equal(first.flip(-1), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
def test_groups_of_an_edit_changed_in_place_are_noticed(inference: bool) -> None:
    # The table of a kind's groups is kept from call to call.
    with torch.inference_mode(inference), torch.no_grad():
        groups = torch.tensor([[0, 1, 1, 0, 1, 1]], dtype=torch.int8)
        edit, given = Edit((GroupWeights(torch.tensor([[[[1.0, 0.0]]]]), renormalise=True),), groups), operands()
        for _ in range(3):
            groups.copy_(1 - groups)
            again = Edit(edit.operations, groups.clone())
            wanted = attend(**given, edit=again, backend="reference").output
            for _ in range(2):
                torch.testing.assert_close(attend(**given, edit=edit, backend="blockwise").output, wanted)


def test_a_table_made_in_inference_mode_serves_no_gradient() -> None:
    beta = torch.ones(1, 1, 1, 2, requires_grad=True)
    given, edit = operands(), Edit((Boost(beta),), torch.zeros(1, 6, dtype=torch.int8))
    with torch.inference_mode(), torch.enable_grad():
        for _ in range(2):
            attend(**given, edit=edit, backend="blockwise")
    out = attend(**given, edit=edit, backend="blockwise").output
    assert out is not None and len(kinds._kinds) == 1
    out.sum().backward()
    assert beta.grad is not None and bool(beta.grad[..., 0].isfinite())


def test_a_table_of_a_kind_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made = reference.one_hot, []
    monkeypatch.setattr(reference, "one_hot", lambda *given: made.append(given) or plain(*given))
    edit = Edit((Boost(torch.ones(1, 1, 1, 2)),), torch.tensor([[0, 1, 1, 0, 1, 1]], dtype=torch.int8))
    given = operands()
    first, second = (attend(**given, edit=edit, backend="reference").output for _ in range(2))
    assert first is not None and second is not None and torch.equal(first, second)
    assert len(made) == 1


def test_the_short_way_of_a_kind_gets_the_operands() -> None:
    given = {**operands(), "sinks": torch.zeros(2), "bias": torch.zeros(1, 1, 6, 6), "mask": Mask(causal=True)}
    attend(**given, backend="blockwise")
    (kind,) = kinds._kinds.values()
    seen: list[tuple[Any, ...]] = []
    z = torch.zeros(1, 6, 2, 8)
    # As the kernels of a GPU leave it there.
    kind.memo[kinds.SHORT] = lambda *operands: seen.append(operands) or z
    got = attend(**given, backend="blockwise")
    assert got.output is z and got.readings.backend == "blockwise"
    assert len(seen) == 1
    assert all(
        a is b for a, b in zip(seen[0][:5], (given[name] for name in ("q", "k", "v", "sinks", "bias")), strict=True)
    )


def test_what_was_seen_of_tensors() -> None:
    plain = torch.zeros(2)
    with torch.inference_mode():
        odd = torch.zeros(2)
        seen = versions(Edit((Gain(odd[None, :, None]),)), (plain, odd))
        assert len(seen) == 3
        assert unchanged(seen)
        odd[0] = 1
        assert not unchanged(seen)
        odd[0] = 0
        assert unchanged(seen)
    plain += 1
    assert not unchanged(seen)
    assert unchanged(versions((torch.empty(2, device="meta"),)))


def test_a_kind_holds_no_operand() -> None:
    given = operands()
    readout = Readout(row_stats=True, received=True)
    attend(**given, readout=readout, mask=Mask(causal=True))
    seen = [weakref.ref(given[name]) for name in "qkv"]
    del given
    gc.collect()
    assert len(kinds._kinds) == 1
    assert [ref() for ref in seen] == [None, None, None]


def test_kinds_come_and_go_in_many_threads() -> None:
    given = operands()
    wanted = attend(**given, mask=Mask(causal=True), backend="blockwise").output

    def work(number: int) -> bool:
        equal = True
        for n in range(60):
            mask = Mask(causal=True)
            equal &= torch.equal(attend(**given, mask=mask, backend="blockwise").output, wanted)  # pyright: ignore[reportArgumentType]
            if n % 3 == number % 3:
                kinds.forget(mask)
            if n % 20 == number:
                kinds.clear()
        return equal

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(kinds._kinds) <= kinds.KEPT


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
def test_layers_that_differ_in_their_groups_are_checked_once(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.attention import api

    kinds.clear()
    torch.set_grad_enabled(grad)  # put back by the fixture
    checked = 0
    real = api.validate

    def counted(*args: Any, **options: Any) -> None:
        nonlocal checked
        checked += 1
        real(*args, **options)

    monkeypatch.setattr(api, "validate", counted)
    family = Edit((Redistribute((0,), (1,), 0.5, (0, 1), (1,)),), n_groups=3)
    readout = Readout(row_stats=True)
    random = torch.Generator().manual_seed(0)
    for reads in (None, readout):
        given: dict[str, Any] = {"scale": 0.5, "readout": reads}
        for layer in range(3):
            q, k, v = (torch.randn(1, 2, 9, 8, generator=random) for _ in range(3))
            groups = torch.randint(0, 3, (1, 9), generator=random).to(torch.int8)
            edit = family.regrouped(groups)
            for changed in (False, True):
                if changed and layer < 2:
                    continue
                if changed:
                    groups.copy_(groups.roll(1, 1))  # what was prepared for these groups is of no use now
                got, wanted = (
                    attend(q, k, v, edit=edit, **given, backend=b).output for b in ("blockwise", "reference")
                )
                torch.testing.assert_close(got, wanted)
    assert checked == 4  # both backends, with and without a readout


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
def test_other_draws_are_checked_once_and_used(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.attention import api

    torch.set_grad_enabled(grad)  # put back by the fixture
    checked: list[str] = []
    real = api.validate
    monkeypatch.setattr(api, "validate", lambda *args, **options: (checked.append(""), real(*args, **options)))
    given = operands(9)
    random = torch.Generator().manual_seed(0)
    draws = [torch.rand(1, 2, 9, 4, generator=random) for _ in range(3)]
    family = Edit((TopKeys(4, draws[0], 0.5),))
    got = [attend(**given, edit=family.redrawn(each), backend="blockwise").output for each in draws]
    assert len(checked) == 1
    for each, output in zip(draws, got, strict=True):
        wanted = attend(**given, edit=Edit((TopKeys(4, each, 0.5),)), backend="reference").output
        torch.testing.assert_close(output, wanted)
    assert not torch.equal(got[0], got[1])  # pyright: ignore[reportArgumentType]


GROWING: dict[str, tuple[Any, bool]] = {
    "a gain": (Gain(torch.tensor([2.0, 0.5]).view(1, 2, 1)), True),
    "weights": (GroupWeights(torch.tensor([1.0, 0.0, 0.5]).view(1, 1, 1, 3), renormalise=True), True),
    "a boost": (Boost(torch.tensor([0.0, 0.3, -0.2]).view(1, 1, 1, 3)), True),
    "moved": (Redistribute((0,), (1,), 0.5, (0, 1), (1,)), True),
    "a window": (SinkWindow(1, 3), False),
}
"""Operations, and whether what was prepared for one length of the cache serves the next."""


@pytest.mark.parametrize("name", GROWING)
def test_a_growing_cache_is_checked_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.attention import api

    operation, lasts = GROWING[name]
    checked: list[int] = []
    real = api.validate
    monkeypatch.setattr(api, "validate", lambda *args, **options: (checked.append(1), real(*args, **options)))
    random = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 1, 2, 12, 8, generator=random)
    family = Edit((operation,), n_groups=3)
    with torch.no_grad():
        for n in (8, 9, 10):
            mask = Mask(causal=True, q_offset=n - 1)
            k, v = cache[:, :, :, :n].contiguous()
            for _ in range(2):  # layers
                q = torch.randn(1, 2, 1, 8, generator=random)
                groups = torch.randint(0, 3, (1, n), generator=random).to(torch.int8)
                got = attend(q, k, v, scale=0.4, mask=mask, edit=family.regrouped(groups), backend="blockwise").output
                asked = len(checked)
                own = Edit((operation,), groups, n_groups=3)
                wanted = attend(q, k, v, scale=0.4, mask=mask, edit=own, backend="reference").output
                del checked[asked:]
                torch.testing.assert_close(got, wanted)
    assert len(checked) == (1 if lasts else 3)
