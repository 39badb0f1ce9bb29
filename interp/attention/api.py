"""The op: attention that can be edited and read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.attention import kinds, ops
from interp.attention.backends import choose
from interp.attention.call import Call
from interp.attention.combine import is_neutral
from interp.attention.edits import Edit
from interp.attention.mask import Mask
from interp.attention.readouts import Readings, Readout, pooled_edge
from interp.attention.validation import validate
from interp.attention.versions import versions

NO_MASK, NO_EDIT, NO_READOUT = Mask(), Edit(), Readout()


class Attended(NamedTuple):
    """``output [B, Lq, H, Dv]`` in q's dtype (None where not wanted) and the readings."""

    output: Tensor | None
    readings: Readings


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Mask | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    edit: Edit | None = None,
    readout: Readout | None = None,
    backend: str = "auto",
    want_output: bool = True,
    lse: Tensor | None = None,
) -> Attended:
    """Scaled dot product attention with an edit and a readout.

    For sample b, query head h (which reads key-value head ``h // (H / Hkv)``), query row i and key j:

    1. ``s = scale * q_i.k_j / T``; softcap ``s = c tanh(s / c)``; ``+ bias``; boost ``s += beta |s|``
    2. ``V_i`` = causal and window and padding and mask and restrictions
    3. ``p = exp(s) / (sum over V_i of exp(s) + exp(sink_h))`` on ``V_i``
    4. uniform rows ``1 / |V_i|``, given rows
    5. ``p *= w[query group of i, key group of j]``, renormalised or not; redistribution
    6. ``z_i = gain * sum_j p_ij v_j``

    Computed in fp32 (fp64 for fp64 inputs) from the inputs as they are; a row that sees nothing gives 0.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``, not repeated.
        v: ``[B, Hkv, Lk, Dv]``.
        scale: factor on q.k, usually ``D ** -0.5``.
        mask: which keys a row may see; None is all.
        softcap: c of step 1 (Gemma 2).
        sinks: float ``[H]``, learned logits that join the denominator (GPT-OSS).
        bias: additive float ``[B|1, H|1, Lq|1, Lk]``; entries <= finfo.min / 2 of its dtype count as masked.
        edit: what to change; see :mod:`interp.attention.edits`.
        readout: what to return beside the output; see :mod:`interp.attention.readouts`.
        backend: ``reference`` (the specification; holds full maps), ``blockwise`` (exact, memory linear in Lk),
            ``sdpa`` (PyTorch's own; no readings, hardly any edits), ``triton`` (fused kernels; CUDA), or ``auto``: a call that
            nobody edits (or whose edit is neutral) and nobody reads goes to ``sdpa`` where that can express it, everything
            else to ``triton`` on a GPU that it supports, and to ``blockwise`` for what is left.
        want_output: False skips the product with v; the output is then None.
        lse: fp32 ``[B, H, Lq]``, the natural log-sum-exp of this very call (sink included) where the caller has it, say from
            the fused kernel that made the output. It saves a pass where readings are asked for without an output and
            nothing is edited; backends without use for it ignore it.

    Under ``torch.compile`` the call becomes one operator (``fullgraph=True`` works), with gradients by computing the call
    again; tensors, floats and lengths may come from anywhere, a mask's ``rule`` may not. A float that varies is compiled
    for anew: make it a tensor. The backend is chosen when the code runs, so ``readings.backend`` is None with ``auto``.

    Returns:
        The output and the :class:`Readings`; ``readings.backend`` names the backend that computed it.

    Raises:
        AttentionArgumentError: an argument breaks a rule.
        BackendUnavailable: the backend asked for by name is missing or lacks something that this call needs.
    """
    mask = NO_MASK if mask is None else mask
    edit = NO_EDIT if edit is None else edit
    readout = NO_READOUT if readout is None else readout
    if torch.compiler.is_compiling():
        return Attended(
            *ops.compiled(
                q, k, v, scale=scale, mask=mask, softcap=softcap, sinks=sinks, bias=bias, edit=edit, readout=readout,
                backend=backend, want_output=want_output, lse=lse,
            )
        )  # fmt: skip
    family = edit.family if isinstance(edit, Edit) else None
    groups = None if family is None else edit.groups
    rest = (
        _rest(q, k, v, scale, mask, readout, (softcap, backend, want_output), (sinks, bias, lse))
        if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
        else ()
    )
    key = of_family = (id(edit if family is None else family), kinds.shape_of(groups), *rest)
    kind = kinds.known(key)
    if kind is not None and (short := kind.short) is not None:
        return Attended(short(q, k, v, sinks, bias, groups), Readings(backend=kind.backend_name))
    if kind is not None and lse is not None and (read := kind.read) is not None:
        readings = read(q, k, v, lse)
        readings.backend = kind.backend_name
        return Attended(None, readings)
    growing = None
    if kind is None and rest and bias is None and lse is None and not torch.is_grad_enabled():
        others = (id(readout), scale, softcap, backend, want_output, kinds.shape_of(sinks))
        growing = kinds.growing(mask, edit, q, k, v, *others)
        last = None if growing is None else kinds.known(growing)
        grown = None if last is None else last.of_length(k, v, mask, edit, readout)
        if grown is not None and growing is not None and grown.short is not None:
            kinds.remember(key, grown)
            return Attended(grown.short(q, k, v, sinks, bias, groups), Readings(backend=grown.backend_name))
    if family is not None:
        # What a kind without a short way keeps is about its own groups; that it is right and who computes it is not.
        kin, key = kind, (id(edit), *rest)
        # Groups are handed out for all tokens, draws for one.
        drawn = groups is None
        kind = None if drawn and kin is not None else kinds.known(key)
        if kind is None and kin is not None:
            holds = (mask, edit, readout)
            mine = edit if kin.edit.operations else kin.edit
            kind = replace(kin, holds=holds, edit=mine, versions=[] if drawn else versions(*holds), memo={})
            if not drawn:
                kinds.remember(key, kind)
    call = Call(
        q=q,
        k=k,
        v=v,
        scale=scale,
        mask=mask if kind is None else kind.mask,
        softcap=softcap,
        sinks=sinks,
        bias=bias,
        edit=edit if kind is None else kind.edit,
        readout=readout if kind is None else kind.readout,
        want_output=want_output,
        pooled_edge=0 if kind is None else kind.pooled_edge,
        lse=lse,
        memo=None if kind is None else kind.memo,
    )
    if kind is None:
        call, kind = _first_of_kind(call, backend, (mask, edit, readout))
        # A table made by other tensors that want a gradient would be held with all of its history.
        if not any(tensor.grad_fn is not None for tensor, _ in kind.versions):
            kinds.remember(key, kind)
            if family is not None:
                kinds.remember(of_family, kind)
    output, readings = kind.backend.run(call)
    readings.backend = kind.backend_name
    if kind.short is not None and growing is not None:
        kinds.remember(growing, kind)
    return Attended(output, readings)


def kind_of(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Mask, edit: Edit, backend: str = "auto"
) -> kinds.Kind | None:
    """The kind that :func:`attend` has just found for this very call, None where it would look anew.

    For callers who know that their next calls have operands of the same shapes, strides, dtypes and device, the same mask and
    an edit of the same family: going the kind's short way, where it has one, they save asking.
    """
    family, groups = (edit, None) if edit.family is None else (edit.family, edit.groups)
    nothing = (None, None, None)
    rest = _rest(q, k, v, scale, mask, NO_READOUT, (None, backend, True), nothing)
    return kinds.known((id(family), kinds.shape_of(groups), *rest))


def _rest(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask, readout: Readout, plain: tuple[Any, ...],
    others: tuple[Tensor | None, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """What calls of one kind share beside their edit."""
    of = kinds.shape_of
    return (id(mask), id(readout), scale, plain, torch.is_grad_enabled(), of(q), of(k), of(v), *map(of, others))


def _first_of_kind(call: Call, backend: str, holds: tuple[Mask, Edit, Readout]) -> tuple[Call, kinds.Kind]:
    """Check the arguments and choose the backend; the call with defaults filled in, and its kind."""
    mask, edit, readout = holds
    validate(
        call.q, call.k, call.v, scale=call.scale, mask=mask, softcap=call.softcap, sinks=call.sinks, bias=call.bias, edit=edit,
        readout=readout, lse=call.lse,
    )  # fmt: skip
    n_queries, n_keys = call.q.shape[2], call.k.shape[2]
    if backend == "auto" and is_neutral(edit):
        edit = NO_EDIT
    watched = versions(*holds)
    memo: dict[str, Any] = {}
    # Kernels walk index tensors from end to end.
    names = ("heads", "groups", "query_groups", "rows", "group_output")
    given = {name: getattr(readout, name) for name in names}
    loose = {name: x.contiguous() for name, x in given.items() if isinstance(x, Tensor) and not x.is_contiguous()}
    readout = replace(readout, **loose) if loose else readout
    call = replace(
        call, readout=readout, scale=float(call.scale), mask=mask.simplified(n_queries, n_keys), edit=edit, memo=memo,
        pooled_edge=pooled_edge(n_queries, n_keys, readout.pooled) if readout.pooled else 0,
    )  # fmt: skip
    name, chosen = choose(backend, call)
    kind = kinds.Kind(holds, call.mask, edit, call.pooled_edge, name, chosen, watched, readout, memo)
    return call, kind
