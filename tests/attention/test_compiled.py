"""The op under torch.compile: one graph, the same results as without it, gradients, lengths that vary."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.attention import (
    Attended,
    Blocks,
    Boost,
    Distances,
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
    TopKeys,
    Uniform,
    attend,
    kinds,
    ops,
)
from interp.attention.readouts import READING_AXES

N = 9
GROUPS = (torch.arange(N) % 3)[None].to(torch.int8)
PADDING = torch.arange(N)[None] >= torch.tensor([[0], [3]])
EVERYTHING = Readout(
    heads=torch.tensor([0, 2, 3]), groups=GROUPS, n_groups=3, query_groups=(torch.arange(N) % 2)[None].to(torch.int8),
    n_query_groups=2, row_stats=True, topk=3, group_output=torch.tensor([1, 4]), received=True, pooled=4,
    offset=OffsetBins(torch.arange(N).view(1, N, 1), torch.arange(N).view(1, N, 1), (0,), (4,)), rows=torch.tensor([2]),
    distance=Distances(torch.arange(2 * N).view(1, N, 2), torch.arange(2 * N).view(1, N, 2) // 2, hop=True), attention=True,
)  # fmt: skip
COORDS = torch.arange(N).view(1, N, 1)
EVERY_EDIT = Edit(
    (
        Gain(torch.linspace(0.5, 2, 4).view(1, 4, 1)), Temperature(1.5, torch.arange(N).view(1, 1, N) > 2),
        Boost(torch.tensor([0.0, 0.3, 0.1]).view(1, 1, 1, 3)), SinkWindow(1, torch.tensor([9, 3, 5, 4])),
        Blocks(4, torch.ones(1, 3, 3, dtype=torch.bool).tril()), Neighbourhood(6, COORDS, COORDS),
        Threshold(torch.full((1, 1, 1), -3.0)), DropKeys(torch.tensor([[[[2, -1]]]])),
        TopKeys(3, torch.rand(1, 4, 1, 3), 0.5),
        Uniform(torch.arange(4).view(1, 4, 1) == 3), GroupWeights(torch.tensor([1.0, 0.5, 2.0]).view(1, 1, 1, 3), False),
        Redistribute((0,), (1,), 0.4, (0, 1), (1,), 0.1, 0.2),
    ),
    GROUPS,
)  # fmt: skip


def operands(length: int = N, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 6))
    q, k, v = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return q, k, v


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


def plain(attended: Attended) -> tuple[Tensor | None, dict[str, Tensor], int | None]:
    return attended.output, attended.readings.tensors(), attended.readings.pooled_edge


def assert_same(given: Any, wanted: Any) -> None:
    torch.testing.assert_close(given, wanted, rtol=0, atol=0)


# One graph with many calls: a compilation costs seconds, a call in it next to nothing.


def masks_and_edits(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, padding: Tensor, groups: Tensor, weight: Tensor
) -> list[Any]:
    """Everything is built within the compiled region, from tensors and constants."""
    scale = q.shape[-1] ** -0.5
    cases: list[dict[str, Any]] = [
        {},
        {"mask": Mask(causal=True)},
        {"mask": Mask(causal=True, window=(3, 0)), "edit": Edit((Gain(gain),))},
        {"mask": Mask(causal=True, padding=padding), "edit": Edit((Gain(0.5), Temperature(2.0)))},
        {"mask": Mask(padding=padding), "edit": Edit((SinkWindow(1, 4),))},
        {"edit": Edit((GroupWeights(weight, renormalise=True),), groups), "softcap": 5.0},
        {"mask": Mask(causal=True), "edit": Edit((Redistribute((0,), (1,), 0.5, (0, 1), (1,)),), groups)},
        {"mask": Mask(causal=True), "edit": Edit((Boost(weight), Temperature(gain + 0.5)), groups, n_groups=3)},
    ]
    readouts = (
        None,
        Readout(row_stats=True),
        Readout(groups=groups, n_groups=3, row_stats=True, received=True, pooled=4),
    )
    return [
        plain(attend(q, k, v, scale=scale, readout=readout, **case)) for case in cases for readout in readouts
    ]  # fmt: skip


def test_one_graph_gives_what_eager_gives() -> None:
    given = (torch.rand(1, 4, 1), PADDING, GROUPS, torch.tensor([1.0, 0.5, 0.0]).view(1, 1, 1, 3))
    for_lengths = compiled(masks_and_edits)
    assert_same(for_lengths(*operands(), *given), masks_and_edits(*operands(), *given))


@pytest.mark.slow
@pytest.mark.slow  # most of it is the C++ compiler's
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler")
def test_the_default_compiler_too() -> None:
    # Inductor fuses what is around the operator and plans memory by what it says of its results.
    def around(q: Tensor, k: Tensor, v: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        z, readings = attend(
            q * 2, k, v, scale=0.3, mask=Mask(causal=True), edit=Edit((Gain(gain.sigmoid()),)),
            readout=Readout(row_stats=True),
        )  # fmt: skip
        assert z is not None and readings.entropy is not None
        return z.flatten(2) + 1, readings.entropy.mean(-1)

    gain = torch.randn(1, 4, 1)
    given = compiled(around, backend="inductor")(*operands(), gain)
    torch.testing.assert_close(given, around(*operands(), gain))


def test_objects_made_outside_and_every_operation_and_reading() -> None:
    bias = torch.randn(1, 1, N, N)

    def both(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> list[Any]:
        mask = Mask(causal=True, padding=PADDING, first=torch.tensor([0, 3]))
        return [
            plain(attend(q, k, v, scale=0.4, mask=mask, edit=EVERY_EDIT, readout=EVERYTHING, sinks=sinks, bias=bias)),
            plain(attend(q, k, v, scale=0.4, readout=EVERYTHING, want_output=False, backend="reference")),
            plain(attend(q, k, v, scale=0.4, want_output=False)),
        ]

    sinks = torch.randn(4)
    given, wanted = compiled(both)(*operands(), sinks), both(*operands(), sinks)
    assert_same(given, wanted)
    assert given[0][1].keys() == READING_AXES.keys() and given[1][0] is None and given[2][:2] == (None, {})


def test_lengths_and_offsets_may_be_symbolic() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        mask = Mask(causal=True, window=(k.shape[2] // 2, 0), q_offset=k.shape[2] - q.shape[2])
        edit = Edit((SinkWindow(2, k.shape[2] // 3), Gain(2.0)))
        return plain(attend(q, k, v, scale=0.4, mask=mask, edit=edit, readout=Readout(row_stats=True, received=True)))

    graphs: list[Any] = []

    def counting(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    traced = compiled(step, backend=counting, dynamic=True)
    for length in (11, 14, 31):  # none makes two sizes equal, which the compiler would take for a rule
        q, k, v = operands(length)
        assert_same(traced(q[:, :, 4:], k, v), step(q[:, :, 4:], k, v))
    assert len(graphs) == 1


def test_gradients_are_those_of_eager() -> None:
    def losses(q: Tensor, k: Tensor, v: Tensor, gain: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
        edit = Edit((Gain(gain), Temperature(temperature)))
        z, readings = attend(q, k, v, scale=0.4, mask=Mask(causal=True), edit=edit, readout=Readout(row_stats=True))
        weighted = Edit((GroupWeights(weight, renormalise=True),), GROUPS)
        y, _ = attend(q, k, v, scale=0.4, edit=weighted)
        assert z is not None and y is not None and readings.entropy is not None
        return z.square().sum() + readings.entropy.sum() + y.sin().sum()

    def gradients(function: Callable[..., Tensor]) -> list[Tensor | None]:
        random = torch.Generator().manual_seed(5)
        leaves = [*operands(), torch.rand(2, 4, 1, generator=random), torch.rand(1, 4, N, generator=random) + 0.5]
        leaves.append(torch.rand(1, 4, 1, 3, generator=random))
        for number, leaf in enumerate(leaves):
            leaf.requires_grad_(number != 2)
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    given, wanted = gradients(compiled(losses)), gradients(losses)
    assert given[2] is None and wanted[2] is None
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_errors_name_the_rule() -> None:
    def with_rule(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(q, k, v, scale=0.4, mask=Mask(rule=lambda b, h, i, j: j <= i)).output

    with pytest.raises(Exception, match=r"mask.rule: must be None under torch.compile") as caught:
        compiled(with_rule)(*operands())
    assert type(caught.value).__name__ in {"Unsupported", "AttentionArgumentError"}

    def refused(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(q, k, v, scale=0.4, edit=Edit((Temperature(-1.0),))).output

    with pytest.raises(ValueError, match=r"edit.Temperature.value: must be > 0"):
        compiled(refused, backend="eager")(*operands())


# The operator by itself


def arguments(**given: Any) -> tuple[Any, ...]:
    q, k, v = operands(dtype=given.pop("dtype", torch.float32))
    defaults = {
        "scale": 0.4, "mask": Mask(), "softcap": None, "sinks": None, "bias": None, "edit": Edit(), "readout": Readout(),
        "backend": "auto", "want_output": True, "lse": None,
    }  # fmt: skip
    return ops.flatten(q, k, v, **{**defaults, **given})


SAMPLES: dict[str, dict[str, Any]] = {
    "plain": {"mask": Mask(causal=True)},
    "plain bf16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64, "readout": Readout(row_stats=True)},
    "gain": {"edit": Edit((Gain(torch.rand(1, 4, 1)),)), "mask": Mask(causal=True, window=(3, 0))},
    "redistribution": {
        "edit": Edit((Redistribute((0,), (1,), 0.5, (0, 1), (1,)),), GROUPS),
        "mask": Mask(padding=PADDING),
    },
    "everything": {"edit": EVERY_EDIT, "readout": EVERYTHING, "mask": Mask(causal=True, padding=PADDING)},
    "no output": {"readout": Readout(row_stats=True, topk=2, pooled=4), "want_output": False, "softcap": 3.0},
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str) -> None:
    torch.library.opcheck(torch.ops.headscope.attend.default, arguments(**SAMPLES[sample]))


def test_opcheck_with_gradients() -> None:
    gain = torch.rand(1, 4, 1)
    tensors, *rest = arguments(edit=Edit((Gain(gain),)), readout=Readout(row_stats=True))
    tensors = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.headscope.attend.default, (tensors, *rest))
    grads = [torch.randn(2, N, 4, 6)]
    tensors = [x.detach() for x in tensors]
    torch.library.opcheck(torch.ops.headscope.attend_gradient.default, (tensors, grads, [0], [0, 3], *rest))


def test_no_second_derivative() -> None:
    tensors, *rest = arguments()
    tensors = [x.requires_grad_() for x in tensors]
    (z,) = torch.ops.headscope.attend(tensors, *rest)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(z.square().sum(), tensors[:1], create_graph=True)


def test_unflatten_undoes_flatten() -> None:
    bias = torch.randn(1, 1, N, N)
    given = {"edit": EVERY_EDIT, "readout": EVERYTHING, "mask": Mask(window=(3, None), padding=PADDING), "bias": bias}
    flat = arguments(**given)
    whole = ops.unflatten(*flat)
    assert whole.rest["bias"] is bias and whole.rest["mask"].window == (3, None) and whole.rest["backend"] == "auto"
    again = ops.flatten(whole.q, whole.k, whole.v, **whole.rest)
    assert [id(x) for x in again[0]] == [id(x) for x in flat[0]] and again[1:] == flat[1:]


def test_calls_with_the_same_tensors_are_of_one_kind() -> None:
    gain = torch.rand(1, 4, 1)
    kinds.clear()
    for seed in range(3):
        flat = arguments(edit=Edit((Gain(gain),)))
        torch.ops.headscope.attend([*operands(seed=seed), *flat[0][3:]], *flat[1:])
    assert len(kinds._kinds) == 1
    # Changed in place, it is looked at again.
    gain.fill_(0.0)
    (z,) = torch.ops.headscope.attend([*operands(), gain], *flat[1:])
    assert bool((z == 0).all())


def test_operands_of_a_kept_kind_are_this_calls() -> None:
    kinds.clear()
    for seed in range(3):
        q, k, v = operands(seed=seed)
        given: dict[str, Any] = {"sinks": torch.randn(4), "bias": torch.randn(1, 1, N, N)}
        flat = arguments(**given, mask=Mask(causal=True))
        (z,) = torch.ops.headscope.attend([q, k, v, *flat[0][3:]], *flat[1:])
        assert_same(z, attend(q, k, v, scale=0.4, mask=Mask(causal=True), **given).output)


def test_a_large_mask_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "KEPT_BYTES", 10)
    kinds.clear()
    ops._kept.clear()
    dense = torch.ones(1, 1, N, N, dtype=torch.bool)
    torch.ops.headscope.attend(*arguments(mask=Mask(dense=dense)))
    assert not kinds._kinds and not ops._kept


def test_results_share_no_memory() -> None:
    tensors, *rest = arguments(readout=Readout(row_stats=True, received=True))
    given = torch.ops.headscope.attend(tensors, *rest)
    addresses = [x.untyped_storage().data_ptr() for x in [*tensors, *given]]
    assert len(set(addresses)) == len(addresses) and all(x.is_contiguous() for x in given)
