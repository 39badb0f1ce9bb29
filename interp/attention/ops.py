"""The op as PyTorch's compiler sees it: one custom operator, ``headscope::attend``, and its gradient.

What ``attend`` does on a call (checks of values, caches by identity, a choice among backends) cannot be traced, so under
``torch.compile`` it flattens the call into tensors, numbers, sizes and words, and hands these to an operator that the compiler
leaves whole. The operator puts the call together again and runs it as ever, on any backend.

Sizes (every int of a mask, edit or readout) may be symbolic: a length that varies makes no new variant. Floats are constants of
the compiled code, so a gain or temperature that varies should be a tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from interp.attention import kinds
from interp.attention.edits import STAGES, Edit
from interp.attention.mask import Mask
from interp.attention.readouts import READING_AXES, Distances, OffsetBins, Readings, Readout, pooled_edge
from interp.attention.validation import fail

DESCRIBED = (Mask, Edit, Readout, OffsetBins, Distances, *STAGES)
NUMBER_OF = {kind: str(number) for number, kind in enumerate(DESCRIBED)}
FIELDS_OF = {kind: tuple(f.name for f in fields(cast(Any, kind))) for kind in DESCRIBED}
OPERANDS = 3
"""q, k and v come first among the tensors."""

PASSED = ("sinks", "bias", "lse")
"""Operands that may be missing; they come next, and are another tensor on every call."""

KEPT = 64
"""Descriptions whose mask, edit and readout are kept, so that calls of one kind know each other."""
KEPT_BYTES = 1 << 20
"""Largest mask, edit and readout kept: their tensors may be intermediate results, another one on every call."""

BY_ROW = tuple(name for name, axes in READING_AXES.items() if axes == ("batch", "head", "query"))
"""Readings of one number a row."""


@dataclass(eq=False)
class Flat:
    """Arguments of the operator.

    Attributes:
        tensors: q, k, v, then every tensor in the order of the words.
        numbers: floats.
        sizes: ints, perhaps symbolic.
        words: what kind each value is, in prefix order.
    """

    tensors: list[Tensor]
    numbers: list[float]
    sizes: list[int]
    words: list[str]

    def put(self, thing: Any) -> None:
        """Append a value and everything in it."""
        if thing is None:
            self.words.append("n")
        elif isinstance(thing, Tensor):
            self.words.append("t")
            self.tensors.append(thing)
        elif isinstance(thing, bool):
            self.words.append("1" if thing else "0")
        elif isinstance(thing, int):
            self.words.append("i")
            self.sizes.append(thing)
        elif isinstance(thing, float):
            self.words.append("f")
            self.numbers.append(thing)
        elif isinstance(thing, tuple):
            self.words.append(f"({len(thing)}")
            for part in cast(tuple[Any, ...], thing):
                self.put(part)
        elif type(thing) in NUMBER_OF:
            self.words.append("d" + NUMBER_OF[type(thing)])
            for name in FIELDS_OF[type(thing)]:
                value = getattr(thing, name)
                if name == "rule" and value is not None:
                    fail(
                        "mask.rule", "must be None under torch.compile (give the mask as `dense`)", "a Python function"
                    )
                self.put(value)
        else:
            kinds_allowed = "None, a tensor, a number, a tuple or a part of a mask, edit or readout"
            fail("mask, edit, readout", f"under torch.compile a value must be {kinds_allowed}", type(thing).__name__)


def flatten(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Mask, softcap: float | None, sinks: Tensor | None,
    bias: Tensor | None, edit: Edit, readout: Readout, backend: str, want_output: bool, lse: Tensor | None,
) -> tuple[list[Tensor], list[float], list[int], str]:  # fmt: skip
    """The operator's arguments for a call, whose arguments are those of :func:`~interp.attention.api.attend`."""
    flat = Flat([q, k, v], [], [], [])
    for name, thing, kind in (("mask", mask, Mask), ("edit", edit, Edit), ("readout", readout, Readout)):
        if not isinstance(thing, kind):
            fail(name, f"must be None or {kind.__name__}(...)", f"a {type(thing).__name__}")
    for thing in (sinks, bias, lse, want_output, float(scale), softcap, mask, edit, readout):
        flat.put(thing)
    return flat.tensors, flat.numbers, flat.sizes, " ".join([backend, *flat.words])


def compiled(
    q: Tensor, k: Tensor, v: Tensor, *, readout: Readout, backend: str, want_output: bool, **rest: Any
) -> tuple[Tensor | None, Readings]:
    """What :func:`~interp.attention.api.attend` gives under the compiler.

    Readings are contiguous, and name their backend only where it was asked for by name: ``auto`` chooses when the code runs.
    """
    readings = Readings(backend=None if backend == "auto" else backend)
    if readout.pooled:
        readings.pooled_edge = pooled_edge(q.shape[2], k.shape[2], readout.pooled)
    flat = flatten(q, k, v, readout=readout, backend=backend, want_output=want_output, **rest)
    given = torch.ops.headscope.attend(*flat)
    for name, reading in zip(_names(readout), given[1 if want_output else 0 :], strict=True):
        setattr(readings, name, reading)
    return given[0] if want_output else None, readings


def _names(readout: Readout) -> list[str]:
    """The readings that a readout gives, in the order of the operator's results."""
    row_stats = ("lse", "top_weight", "top_key", "entropy", "mass", "sink_share")
    asked = {
        **dict.fromkeys(row_stats, readout.row_stats),
        **dict.fromkeys(("topk_weight", "topk_key"), readout.topk > 0),
        **dict.fromkeys(("received", "received_rows"), readout.received),
        "group_output": readout.group_output is not None,
        "pooled": readout.pooled > 0,
        "offset": readout.offset is not None,
        **dict.fromkeys(("distance", "distance_mass"), readout.distance is not None),
        "rows": readout.rows is not None,
        "attention": readout.attention,
    }
    return [name for name in READING_AXES if asked[name]]


# The way back


@dataclass(eq=False)
class Whole:
    """A call put together again; ``rest`` are the arguments of ``attend`` after q, k and v."""

    q: Tensor
    k: Tensor
    v: Tensor
    rest: dict[str, Any]

    @property
    def readout(self) -> Readout:
        return self.rest["readout"]


_kept: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()
"""Arguments of calls but for the operands; a tensor in them is held, so that its address stands for it alone."""
_lock = threading.Lock()


def unflatten(tensors: Sequence[Tensor], numbers: Sequence[float], sizes: Sequence[int], description: str) -> Whole:
    """The call that :func:`flatten` took apart."""
    backend, *words = description.split(" ")
    values = _values(iter(words), iter(tensors[OPERANDS:]), iter(numbers), iter(sizes))
    names = (*PASSED, "want_output", "scale", "softcap", "mask", "edit", "readout")
    rest = {name: next(values) for name in names}
    q, k, v = tensors[:OPERANDS]
    return Whole(q, k, v, {**rest, "backend": backend})


def _values(
    words: Iterator[str], tensors: Iterator[Tensor], numbers: Iterator[float], sizes: Iterator[int]
) -> Iterator[Any]:
    constants: dict[str, Any] = {"n": None, "1": True, "0": False}
    parts = {"t": tensors, "f": numbers, "i": sizes}
    for word in words:
        if word in constants:
            yield constants[word]
        elif word in parts:
            yield next(parts[word])
        else:
            inner = _values(words, tensors, numbers, sizes)
            if word[0] == "(":
                yield tuple(next(inner) for _ in range(int(word[1:])))
            else:
                kind = DESCRIBED[int(word[1:])]
                yield cast(Any, kind)(*(next(inner) for _ in FIELDS_OF[kind]))


def _recalled(
    tensors: Sequence[Tensor], numbers: Sequence[float], sizes: Sequence[int], description: str
) -> tuple[Whole, bool]:
    """The call, and whether its mask, edit and readout are kept: then those of an earlier call with the same tensors in them.

    ``attend`` knows calls of one kind by the identity of these objects, and looks at the tensors' values only once a kind.
    """
    present = [word == "t" for word in description.split(" ", 4)[1:4]]
    first = OPERANDS + sum(present)
    key = (description, *numbers, *sizes, *map(id, tensors[first:]))
    with _lock:
        kept = _kept.get(key)
        if kept is not None:
            _kept.move_to_end(key)
    if kept is None:
        whole = unflatten(tensors, numbers, sizes, description)
        if sum(tensor.nbytes for tensor in tensors[first:]) > KEPT_BYTES:
            return whole, False
        with _lock:
            _kept[key] = {name: thing for name, thing in whole.rest.items() if name not in PASSED}
            while len(_kept) > KEPT:
                _kept.popitem(last=False)
        return whole, True
    passed = iter(tensors[OPERANDS:first])
    rest = {name: next(passed) if there else None for name, there in zip(PASSED, present, strict=True)}
    q, k, v = tensors[:OPERANDS]
    return Whole(q, k, v, {**kept, **rest}), True


# The operators


def _attend(tensors: list[Tensor], numbers: list[float], sizes: list[int], description: str) -> list[Tensor]:
    from interp.attention.api import attend

    whole, kept = _recalled(tensors, numbers, sizes, description)
    given = attend(whole.q, whole.k, whole.v, **whole.rest)
    if not kept:
        kinds.forget(whole.rest["mask"], whole.rest["edit"], whole.rest["readout"])
    return _apart(_results(whole.readout, *given), tensors)


def _results(readout: Readout, output: Tensor | None, readings: Readings) -> list[Tensor]:
    return [*([] if output is None else [output]), *(getattr(readings, name) for name in _names(readout))]


def _apart(results: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous results of which none shares memory with another or with an input, as the compiler may assume."""
    taken = {x.untyped_storage().data_ptr() for x in inputs}
    out: list[Tensor] = []
    for given in results:
        result = given.contiguous()
        if result.untyped_storage().data_ptr() in taken:
            result = result.clone()
        taken.add(result.untyped_storage().data_ptr())
        out.append(result)
    return out


def _attend_fake(tensors: list[Tensor], numbers: list[float], sizes: list[int], description: str) -> list[Tensor]:
    whole = unflatten(tensors, numbers, sizes, description)
    q, v, asked = whole.q, whole.v, whole.readout
    batch, n_heads, n_queries, _ = q.shape
    n_keys, width = v.shape[2], v.shape[3]
    heads = n_heads if asked.heads is None else asked.heads.shape[0]
    by_row = (batch, heads, n_queries)
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(BY_ROW, by_row),
        "mass": (*by_row, asked.n_groups),
        **dict.fromkeys(("topk_weight", "topk_key"), (*by_row, asked.topk)),
        **dict.fromkeys(("received", "received_rows"), (batch, heads, asked.n_query_groups, n_keys)),
        "attention": (*by_row, n_keys),
    }
    if asked.group_output is not None:
        shapes["group_output"] = (batch, heads, asked.group_output.shape[0], asked.n_groups, width)
    if asked.rows is not None:
        shapes["rows"] = (batch, heads, asked.rows.shape[0], n_keys)
    if asked.pooled:
        edge = pooled_edge(n_queries, n_keys, asked.pooled)
        shapes["pooled"] = (batch, heads, -(-n_queries // edge), -(-n_keys // edge))
    if asked.offset is not None:
        bins = 1
        for n in asked.offset.shape:
            bins = bins * n
        shapes["offset"] = (batch, heads, bins + 1)
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtypes: dict[str, torch.dtype] = dict.fromkeys(("top_key", "topk_key", "received_rows"), torch.int32)
    output = [q.new_empty((batch, n_queries, n_heads, width))] if whole.rest["want_output"] else []
    return output + [q.new_empty(shapes[name], dtype=dtypes.get(name, real)) for name in _names(asked)]


def _gradient(
    tensors: list[Tensor], grads: list[Tensor], of: list[int], to: list[int], numbers: list[float], sizes: list[int],
    description: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of tensors ``to`` from those of the results ``of``, by computing the call again.

    With ``auto`` a backend that differentiates such a call; one asked for by name may lack that, and raises BackendUnavailable.
    """
    from interp.attention.api import attend

    with _autograd_on():
        inputs = [x.detach().requires_grad_(n in to) for n, x in enumerate(tensors)]
        whole = unflatten(inputs, numbers, sizes, description)
        given = attend(whole.q, whole.k, whole.v, **whole.rest)
        kinds.forget(whole.rest["mask"], whole.rest["edit"], whole.rest["readout"])
        results = _results(whole.readout, *given)
        # Without a gradient: a tensor that decides nothing here, such as an edit's on rows that see nothing.
        pairs = [(results[n], grad) for n, grad in zip(of, grads, strict=True) if results[n].requires_grad]
        wanted = [inputs[n] for n in to]
        found = torch.autograd.grad(
            [x for x, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True, materialize_grads=True
        )
    return _apart(list(found), [*tensors, *grads])


@contextmanager
def _autograd_on() -> Generator[None]:
    """Record for a backward pass even within a kernel, which the dispatcher may have called with autograd switched off."""
    dispatcher: Any = cast(Any, torch)._C
    excluded = dispatcher._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(dispatcher.DispatchKey, name))
    included = dispatcher._dispatch_tls_local_include_set()
    with dispatcher._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _gradient_fake(
    tensors: list[Tensor], grads: list[Tensor], of: list[int], to: list[int], numbers: list[float], sizes: list[int],
    description: str,
) -> list[Tensor]:  # fmt: skip
    return [tensors[n].new_empty(tensors[n].shape) for n in to]


def _save(ctx: Any, inputs: tuple[list[Tensor], list[float], list[int], str], output: list[Tensor]) -> None:
    tensors, *ctx.description = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.real = [x.is_floating_point() for x in output]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None, None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError("headscope::attend has no second derivative (create_graph=True) under torch.compile")
    tensors = ctx.saved_tensors
    out: list[Tensor | None] = [None] * len(tensors)
    of = [n for n, grad in enumerate(grads) if grad is not None and ctx.real[n]]
    to = [n for n, needed in enumerate(ctx.needs_input_grad[0]) if needed]
    if of and to:
        given = [grad for n in of if (grad := grads[n]) is not None]
        found = torch.ops.headscope.attend_gradient(list(tensors), given, of, to, *ctx.description)
        for n, grad in zip(to, found, strict=True):
            out[n] = grad
    return out, None, None, None


def _define() -> torch.library.Library:
    """Register both operators; they live as long as the library that is returned."""
    library = torch.library.Library("headscope", "DEF")
    # A captured CUDA graph would replay launches only, and a call may look at the values of its edit.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    rest = "float[] numbers, SymInt[] sizes, str description"
    library.define(f"attend(Tensor[] tensors, {rest}) -> Tensor[]", tags=tags)
    library.define(
        f"attend_gradient(Tensor[] tensors, Tensor[] grads, int[] of, int[] to, {rest}) -> Tensor[]", tags=tags
    )
    for name, run, fake in (("attend", _attend, _attend_fake), ("attend_gradient", _gradient, _gradient_fake)):
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"headscope::{name}", fake, lib=library)
    torch.library.register_autograd("headscope::attend", _backward, setup_context=_save, lib=library)
    return library


LIBRARY = _define()
