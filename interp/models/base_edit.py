"""Planted truth: a restriction of attention that belongs to a checkpoint and that its architecture cannot hold.

A folder may have a ``headscope.json`` beside the weights::

    {"base_edit": {"kind": "only_heads_see_image", "stack": "text", "heads": ["L2H3", "L4H0"]}}
    {"base_edit": {"kind": "only_heads_see_far", "stack": "text", "heads": ["L2H1"], "sink": 1, "window": 16}}

``interp.load`` reads it and puts it on the model: it holds in every forward, with or without a session, before any edit, and
"plain" and "off" mean with it. The heads that are not named cannot see image tokens (of any query row, image rows included), or
see only the first ``sink`` tokens of their sample and the last ``window``; what they cannot see is left out of the softmax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.heads import HeadError, Heads, as_heads
from interp.models.anatomy import Anatomy, anatomy
from interp.models.errors import LoadError

FILE = "headscope.json"
SEE_IMAGE, SEE_FAR = "only_heads_see_image", "only_heads_see_far"
KINDS = (SEE_IMAGE, SEE_FAR)

HOLDS = {"interp"}
"""Attention implementations that keep to a base edit; with any other one a planted model refuses to run."""

_ATTRIBUTE = "_headscope_base_edit"


@dataclass(frozen=True)
class BaseEdit:
    """What the heads of a planted model may see.

    Attributes:
        kind: ``"only_heads_see_image"`` or ``"only_heads_see_far"``.
        heads: the named ones, which are not restricted, all of one stack.
        stack: which heads the restriction is about: all of this stack's that are not named.
        sink: first tokens of a sample that every head sees (``only_heads_see_far``).
        window: last tokens that every head sees, the query's own included (likewise).
    """

    kind: str
    heads: Heads
    stack: str = "text"
    sink: int = 1
    window: int = 16

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LoadError(f"kind of a base edit must be one of {KINDS}, got {self.kind!r}")
        if self.stack != "text":
            raise LoadError(
                f"stack of a base edit must be 'text', the one with image keys and a past, got {self.stack!r}"
            )
        for name, least in (("sink", 0), ("window", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise LoadError(f"{name} of a base edit must be a whole number of at least {least}, got {value!r}")
        other = [str(h) for h in self.heads if h.stack != self.stack]
        if other:
            raise LoadError(f"heads of a base edit must be of its stack {self.stack!r}, got {other}")

    def restricted(self, layer: int, n_heads: int) -> tuple[int, ...]:
        """Heads of a layer that are not named."""
        named = {h.head for h in self.heads if h.layer == layer}
        return tuple(h for h in range(n_heads) if h not in named)

    def describe(self) -> dict[str, Any]:
        """As in the file."""
        far = {"sink": self.sink, "window": self.window} if self.kind == SEE_FAR else {}
        return {"kind": self.kind, "stack": self.stack, "heads": [str(h) for h in self.heads], **far}

    def __str__(self) -> str:
        what = "the image" if self.kind == SEE_IMAGE else f"beyond the first {self.sink} and last {self.window} tokens"
        return f"of stack {self.stack!r}, only {self.heads or 'no head'} sees {what}"


def chat_by_default(file: Path) -> bool:
    """Does a ``headscope.json`` say that its model knows conversations only (``{"chat": true}``)?

    Raises:
        LoadError: not JSON, or another value than true and false.
    """
    given = _held(file).get("chat", False)
    if not isinstance(given, bool):
        raise LoadError(f"chat in {file} must be true or false, got {given!r}")
    return given


def _held(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} must be readable JSON, it is damaged: {error}") from error
    if not isinstance(held, dict):
        raise LoadError(f"{file} must hold an object, got {type(held).__name__}")
    return held


def read(file: Path) -> BaseEdit | None:
    """The base edit of a ``headscope.json``; None where the file has none.

    Raises:
        LoadError: not JSON, an unknown field or kind, heads that cannot be read.
    """
    given = _held(file).get("base_edit")
    if given is None:
        return None
    known = {"kind", "stack", "heads", "sink", "window"}
    if not isinstance(given, dict) or not {"kind", "heads"} <= set(given) <= known:
        raise LoadError(f"base_edit in {file} must be an object with kind and heads, of {sorted(known)}; got {given!r}")
    if given["kind"] == SEE_IMAGE and {"sink", "window"} & set(given):
        raise LoadError(f"base_edit in {file} must not have sink or window with kind {SEE_IMAGE!r}, got {given!r}")
    fields: dict[str, Any] = {**given}
    try:
        fields["heads"] = as_heads(fields["heads"])
        return BaseEdit(**fields)
    except (HeadError, LoadError) as error:
        raise LoadError(f"base_edit in {file}: {error}") from error


def attach(module: Any, edit: BaseEdit) -> None:
    """Put a base edit on a model, for as long as the model lives.

    Raises:
        LoadError: the model has no such heads, or no image token for a restriction on images; or it has a base edit already.
    """
    shape = anatomy(module)
    try:
        edit.heads.check(shape)
        if edit.stack not in shape.shapes():
            raise HeadError(f"stack must be one of {list(shape.shapes())}, got {edit.stack!r}")
    except HeadError as error:
        raise LoadError(f"the base edit does not fit this {type(module).__name__}: {error}") from error
    if edit.kind == SEE_IMAGE and image_token(module) is None:
        raise LoadError(f"{SEE_IMAGE} needs a model with an image token, {type(module).__name__} has none")
    if of(module) is not None:
        raise LoadError(f"a model must have one base edit at most, this {type(module).__name__} has: {of(module)}")
    # This layer does not know that one: it is told by name that the model has something to hold to.
    import_module("interp.tracing.session").plant(module, edit)
    setattr(module, _ATTRIBUTE, edit)


def of(module: Any) -> BaseEdit | None:
    """The base edit of a ``PreTrainedModel``, None for an ordinary one."""
    return getattr(module, _ATTRIBUTE, None)


def image_token(module: Any) -> int | None:
    """Id that stands for an image patch in the text, None where the model has none."""
    config = module.config
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def near(i: Tensor, j: Tensor, first: Tensor | int, edit: BaseEdit) -> Tensor:
    """Bool, broadcast: key position ``j`` is among the first tokens, or the last ones before query position ``i``."""
    return (j - first < edit.sink) | (i - j < edit.window)


def visible_maps(module: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """By path of an attention module, what the base edit lets its heads see: bool ``[batch, head, query, key]``, dense.

    The definition, for checks of one forward without a cache; causality and padding are not in it.
    """
    edit = of(module)
    if edit is None:
        return {}
    ids: Tensor = inputs["input_ids"]
    batch, length = ids.shape
    place = torch.arange(length, device=ids.device)
    if edit.kind == SEE_IMAGE:
        seen = (ids != image_token(module))[:, None, None, :].expand(-1, 1, length, -1)
    else:
        real = inputs.get("attention_mask")
        first = torch.zeros(batch, dtype=torch.int64) if real is None else real.long().argmax(1)
        seen = near(place[:, None], place, first.to(ids.device)[:, None, None, None], edit)
    out: dict[str, Tensor] = {}
    for site in _sites(anatomy(module), edit):
        hidden = torch.zeros(site.n_heads, dtype=torch.bool, device=ids.device)
        hidden[list(edit.restricted(site.layer, site.n_heads))] = True
        out[site.name] = seen | ~hidden[:, None, None]
    return out


def _sites(shape: Anatomy, edit: BaseEdit) -> list[Any]:
    return [s for s in shape.sites if s.stack == edit.stack and edit.restricted(s.layer, s.n_heads)]
