"""Which layers a policy acts on: given by the user, or by the paper's rule carried over to any depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from interp.models.anatomy import Anatomy
from interp.tracing.calls import InterventionError


def read_layers(layers: Any) -> tuple[int, ...] | None:
    """``layers=`` as far as it can be read without a model.

    Raises:
        ValueError: not None and not whole numbers.
    """
    if layers is None:
        return None
    given: list[Any] = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in given):
        raise ValueError(f"layers must be whole numbers (negative ones from the last layer), got {layers!r}")
    return tuple(given)


def resolve_layers(layers: Sequence[int], anatomy: Anatomy, stack: str = "text") -> tuple[int, ...]:
    """The layers on one model, in order; those without softmax heads drop out.

    Raises:
        InterventionError: no such stack, or a layer that the model does not have.
    """
    if stack not in anatomy.stacks:
        raise InterventionError(f"stack must be one of {list(anatomy.stacks)} of {anatomy.model_class}, got {stack!r}")
    count = anatomy.shape(stack)[0]
    unknown = [layer for layer in layers if not -count <= layer < count]
    if unknown:
        raise InterventionError(
            f"layers must lie within 0 .. {count - 1} of stack {stack!r} of {anatomy.model_class}, got {unknown}"
        )
    wanted = {layer % count for layer in layers}
    return tuple(site.layer for site in anatomy.stacks[stack] if site.layer in wanted)


def skipping(first: int, last: int, anatomy: Anatomy, stack: str = "text") -> tuple[int, ...]:
    """All layers but the first and last few: papers name these by number, whatever the depth."""
    if stack not in anatomy.stacks:
        return ()
    return resolve_layers(range(first, anatomy.shape(stack)[0] - last), anatomy, stack)
