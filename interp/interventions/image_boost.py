"""What PAI and PAINT share: a boost of key groups at the rows that predict an answer, and guidance by the text alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from interp.attention import Boost, Edit
from interp.interventions.image_groups import KeyGroups, Prompt, answering_rows, prompt_rows
from interp.interventions.text_only import Guidance, TextBranch
from interp.tracing.calls import NOTHING_LASTS, Intervention, Lasting, RunState, SiteCall


def check_boost(gamma: Any, cutoff: Any, rows: Any) -> None:
    """Raise :class:`ValueError` unless the options that PAI and PAINT share can be."""
    if not isinstance(gamma, float | int) or not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a finite number >= 0 (1 is no guidance), got {gamma!r}")
    if not isinstance(cutoff, float | int) or not 0 <= cutoff < 1:
        raise ValueError(f"cutoff must be a number within 0 .. 1, below 1, got {cutoff!r}")
    if rows not in ("last", "text"):
        raise ValueError(f"rows must be 'last' or 'text', got {rows!r}")


def guidance(who: Intervention, run: RunState, gamma: float, cutoff: float) -> list[Any]:
    """The logits processor of a generation, where gamma asks for one."""
    prompt: Prompt | None = run.of(who).get("prompt")
    if gamma == 1 or prompt is None:
        return []
    return [Guidance(TextBranch(who, run, prompt), gamma, cutoff)]


def boost_edit(who: Intervention, call: SiteCall, rows: str, first_token: bool) -> Edit | None:
    """The edit of one call: the same object for every layer of a forward.

    ``run.of(who)`` holds ``prompt``, ``groups`` (:class:`KeyGroups`) and ``operations`` (boosts of them).
    """
    state: dict[str, Any] = call.run.of(who)
    groups: KeyGroups = state["groups"]
    prompt: Prompt = state["prompt"]
    key = (call.run.forwards, call.q.device, call.q.shape[2])
    made = state.get("template")
    if made is None or made[0] != key:
        chosen = answering_rows(call, prompt, first_token=first_token)
        if chosen is None and made is not None and made[2] and made[0][1] == call.q.device:
            # Every row of every step: one template, so that the edit lives as long as no key is added.
            made = (key, made[1], True)
        else:
            made = (key, _template(call, prompt, state["operations"], rows, chosen), chosen is None)
        state["template"] = made
    template: Edit | None = made[1]
    return None if template is None else groups.edit(call, template)


def boost_lasting(who: Intervention, call: SiteCall) -> Lasting | None:
    """What :func:`boost_edit` says of all rows still to come."""
    state: dict[str, Any] = call.run.of(who)
    made: tuple[Any, Edit | None, bool] | None = state.get("template")
    if made is None or not made[2] or made[0][1] != call.q.device:
        return None
    return NOTHING_LASTS if made[1] is None else Lasting(template=made[1], groups=state["groups"])


def _template(
    call: SiteCall, prompt: Prompt, operations: tuple[Boost, ...], rows: str, chosen: Tensor | None
) -> Edit | None:
    where: Tensor | None = None
    if chosen is not None:
        if rows == "text":
            chosen = chosen | prompt_rows(call, prompt.real & ~prompt.image, beyond=True)
        if not bool(chosen.any()):
            return None
        where = chosen[:, None]
    moved = tuple(replace(op, beta=op.beta.to(call.q.device), where=where) for op in operations)
    return Edit(moved, n_groups=operations[0].beta.shape[-1])


def as_codes(flags: list[Tensor]) -> Tensor:
    """Int8 ``[S, P]`` codes 1, 2, ... of disjoint bool tensors, 0 elsewhere."""
    codes = torch.zeros(flags[0].shape, dtype=torch.int8)
    for number, flag in enumerate(flags, 1):
        codes[flag] = number
    return codes
