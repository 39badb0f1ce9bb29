"""Named groups of a prompt's positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.models.layout import KINDS
from interp.tracing.calls import Intervention, InterventionError, RunState
from interp.tracing.prompt import Prompt

NAMES = ("image", "image:N", "text", "special", "first", "question", "last", "generated", "prompt", "all")


def check_group(argument: str, group: Any) -> Any:
    """A name, a tuple of whole numbers, or a bool tensor ``[S, P]``.

    Raises:
        ValueError: anything else.
    """
    if isinstance(group, str):
        head, colon, number = group.partition(":")
        known = (group in NAMES and not colon) or (head == "image" and colon and number.isdigit())
        if not known:
            raise ValueError(f"{argument} must be one of {NAMES}, positions or a bool tensor, got {group!r}")
        return group
    if isinstance(group, Tensor) and group.dtype == torch.bool and group.ndim == 2:
        return group
    numbers = group.tolist() if isinstance(group, Tensor) else group
    if not isinstance(numbers, Sequence) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise ValueError(
            f"{argument} must be one of {NAMES}, whole numbers or a bool tensor [sample, position], got {group!r}"
        )
    return tuple(numbers)


def members(who: Intervention, argument: str, group: Any, prompt: Prompt) -> Tensor:
    """The prompt's positions in a group, bool ``[S, P]`` (positions after the prompt are the caller's).

    Raises:
        InterventionError: a sample has none, or positions lie beyond the prompt.
    """
    shape = prompt.kind.shape
    if isinstance(group, Tensor):
        if group.shape != shape:
            raise InterventionError(
                f"{type(who).__name__}: {argument} must be [sample, position] = {list(shape)}, got {list(group.shape)}"
            )
        found = group.cpu() & prompt.real
    elif isinstance(group, tuple):
        beyond = [n for n in group if not -shape[1] <= n < shape[1]]
        if beyond:
            raise InterventionError(
                f"{type(who).__name__}: {argument} must lie within the prompt's {shape[1]} positions, got {beyond}"
            )
        found = torch.zeros(shape, dtype=torch.bool)
        found[:, [n % shape[1] for n in group]] = True
    else:
        found = _named(group, prompt)
    empty = torch.nonzero(~found.any(-1)).flatten().tolist()
    if empty and group not in ("generated", ()):
        raise InterventionError(
            f"{type(who).__name__}: {argument}={group!r} must name positions in every sample; samples {empty} of {shape[0]} have none"
        )
    return found


def _named(group: str, prompt: Prompt) -> Tensor:
    kind, real = prompt.kind, prompt.real
    places = torch.arange(kind.shape[1])[None]
    is_last = places == prompt.last[:, None]
    head, _, number = group.partition(":")
    match head:
        case "image":
            return prompt.image & (prompt.picture == int(number)) if number else prompt.image
        case "text" | "special":
            return kind == KINDS.index(head)
        case "first":
            return real & (real.cumsum(-1) == 1)
        case "last":
            return is_last
        case "question":
            after = torch.where(prompt.image, places, -1).amax(-1, keepdim=True)
            return real & (places > after) & ~is_last
        case "generated":
            return torch.zeros_like(real)
        case _:
            return real


def key_prompt(who: Intervention, run: RunState, stack: str) -> Prompt:
    """The keys of a stack of cross attention.

    Raises:
        InterventionError: what they are cannot be told.
    """
    found = run.layouts.get(stack)
    if found is None:
        raise InterventionError(
            f"{type(who).__name__} must know what the keys of stack {stack!r} are; {type(run.module).__name__} does not tell. "
            f"{run.layout_problem}"
        )
    return Prompt(torch.from_numpy(found.kind.copy()), torch.from_numpy(found.image.astype("int16")))
