"""Interventions as JSON: what a form must ask, and from a form (or a file of ``headscope generate``) to the object.

A spec is ``{"name": "VHR", "settings": {"alpha": 2.0}}``. Forms are read off the registered classes, so that a new method
has a card by existing.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, NamedTuple

from dashboards.errors import PageError

PLAIN = ("gain", "value", "sigma", "alpha", "vectors")
"""Settings of any type that are numbers, or lists of them."""


class Field(NamedTuple):
    """One setting of a card.

    Attributes:
        kind: ``heads``, ``number``, ``integer``, ``flag``, ``choice``, ``numbers`` (as in ``0,3-5``), ``text`` or ``json``.
        default: None where there is none.
        choices: of a choice.
        help: its line of the docstring.
    """

    name: str
    kind: str
    default: Any
    required: bool
    choices: tuple[str, ...]
    help: str


class Card(NamedTuple):
    """An intervention as the workbench offers it.

    Attributes:
        missing: why it cannot be made from the page, empty where it can.
    """

    name: str
    summary: str
    paper: str
    needs: str
    stacks: tuple[str, ...]
    fields: tuple[Field, ...]
    missing: str


@cache
def cards() -> tuple[Card, ...]:
    """One for each of ``interp.interventions()``."""
    from interp.interventions import interventions

    return tuple(_card(entry) for entry in interventions())


def card(name: str) -> Card:
    for found in cards():
        if found.name == name:
            return found
    raise PageError(f"intervention must be one of {[c.name for c in cards()]}, got {str(name)[:60]!r}")


def build(spec: Mapping[str, Any], heads: str | None = None) -> Any:
    """The intervention of a spec.

    Args:
        heads: put in place of the spec's own heads, for random controls.

    Raises:
        PageError: an unknown name or setting, or a value that the method refuses; the method's own words are kept.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("settings", {}), Mapping):
        raise PageError(f"an intervention must be {{name, settings}}, got {str(spec)[:80]}")
    found = card(str(spec.get("name")))
    if found.missing:
        raise PageError(f"{found.name} cannot be made from JSON: {found.missing}")
    known = {field.name: field for field in found.fields}
    settings: dict[str, Any] = {}
    for name, value in spec.get("settings", {}).items():
        if name not in known:
            raise PageError(f"settings of {found.name} must be among {list(known)}, got {str(name)[:60]!r}")
        settings[name] = read(known[name], value)
    if heads is not None and "heads" in known:
        settings["heads"] = heads
    absent = [f.name for f in found.fields if f.required and settings.get(f.name) in (None, "")]
    if absent:
        raise PageError(f"{found.name} needs {', '.join(absent)}: fill it in, or choose heads first")
    try:
        return _classes()[found.name](
            **{k: v for k, v in settings.items() if v is not None or k in spec.get("settings", {})}
        )
    except (ValueError, TypeError) as error:
        raise PageError(f"{found.name}: {error}") from error


def build_all(specs: Sequence[Mapping[str, Any]], model: Any = None) -> list[Any]:
    """Interventions of specs; with a model, heads and layers are checked against it."""
    from interp.models.anatomy import anatomy

    made = [build(spec) for spec in specs]
    if model is not None:
        for intervention in made:
            intervention.prepare(anatomy(model.module))
    return made


def takes_heads(spec: Mapping[str, Any]) -> bool:
    return any(f.kind == "heads" for f in card(str(spec.get("name"))).fields) and bool(
        spec.get("settings", {}).get("heads")
    )


def read(field: Field, value: Any) -> Any:
    """A setting as the method takes it, from what a form or a file holds.

    Raises:
        PageError: a value of another kind.
    """
    if value is None or (value == "" and not field.required):
        return field.default if value == "" else None
    try:
        if field.kind == "number":
            return float(value)
        if field.kind == "integer":
            if float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if field.kind == "flag":
            if not isinstance(value, bool):
                raise ValueError
            return value
        if field.kind == "choice":
            if value not in field.choices:
                raise ValueError
            return value
        if field.kind == "numbers":
            return _numbers(value)
        if field.kind == "json":
            return json.loads(value) if isinstance(value, str) else value
    except (ValueError, TypeError):
        rule = {"choice": f"one of {list(field.choices)}", "flag": "true or false", "numbers": "numbers such as 0,3-5"}
        wanted = rule.get(field.kind, {"number": "a number", "integer": "a whole number"}.get(field.kind, "JSON"))
        raise PageError(f"{field.name} must be {wanted}, got {str(value)[:60]!r}") from None
    if not isinstance(value, str) or len(value) > 20_000:
        raise PageError(f"{field.name} must be a text, got {str(value)[:60]!r}")
    return value


def code(spec: Mapping[str, Any]) -> str:
    """The spec as Python: ``interp.VHR(alpha=2.0)``; settings at their default are left out."""
    found = card(str(spec.get("name")))
    defaults = {f.name: f.default for f in found.fields if not f.required}
    fields = {f.name: f for f in found.fields}
    settings = {k: read(fields[k], v) for k, v in spec.get("settings", {}).items() if k in fields}
    shown = {k: v for k, v in settings.items() if k not in defaults or defaults[k] != v}
    return f"interp.interventions.{found.name}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


def _classes() -> dict[str, type]:
    from interp import interventions

    return interventions._classes()  # pyright: ignore[reportPrivateUsage]  # the list that `interp.interventions()` shows


def _card(entry: Mapping[str, Any]) -> Card:
    cls = _classes()[entry["name"]]
    try:
        hints = typing.get_type_hints(cls)
    except NameError:
        hints = {}
    helps = _helps(cls)
    fields: list[Field] = []
    missing = ""
    for name, default in entry["settings"].items():
        required = isinstance(default, str) and default == "required"
        hint = hints.get(name, Any)
        kind, choices = _kind(name, hint, None if required else default)
        if kind == "":
            if required or "Callable" in str(inspect.signature(cls).parameters[name].annotation):
                missing = f"{name} is {entry['needs'] or 'an object'}: use Python"
            continue
        fields.append(Field(name, kind, None if required else default, required, choices, helps.get(name, "")))
    return Card(
        entry["name"], entry["summary"], entry["paper"], entry["needs"], tuple(entry["stacks"]), tuple(fields), missing
    )


def _kind(name: str, hint: Any, default: Any) -> tuple[str, tuple[str, ...]]:
    if name == "heads":
        return "heads", ()
    members = [m for m in _members(hint) if m is not type(None)]
    literal = [v for m in members if typing.get_origin(m) is typing.Literal for v in typing.get_args(m)]
    if literal and all(isinstance(v, str) for v in literal):
        return "choice", tuple(literal)
    if bool in members or isinstance(default, bool):
        return "flag", ()
    if int in members and float not in members:
        return "integer", ()
    if float in members or int in members:
        return "number", ()
    if str in members:
        return "text", ()
    if any(typing.get_origin(m) in (Sequence, list, tuple) and int in typing.get_args(m) for m in members):
        return "numbers", ()
    if hint is Any and (name in PLAIN or (isinstance(default, int | float) and not isinstance(default, bool))):
        return "json", ()
    return "", ()


def _members(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, UnionType) else [hint]


def _helps(cls: type) -> dict[str, str]:
    """Lines of the ``Args`` sections, of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = base.__doc__ or ""
        if "Args:" not in text:
            continue
        name = ""
        for line in text.split("Args:", 1)[1].splitlines()[1:]:
            stripped = line.strip()
            indent = len(line) - len(line.lstrip())
            if not stripped or indent <= 4:
                break
            head, colon, rest = stripped.partition(": ")
            if indent == 8 and colon and head.replace("_", "").replace(", ", "").isalnum():
                name = head
                found[name] = rest
            elif name:
                found[name] += f" {stripped}"
    return found


def _numbers(value: Any) -> tuple[int, ...]:
    if isinstance(value, list | tuple):
        return tuple(int(v) for v in value)
    out: list[int] = []
    for part in str(value).split(","):
        first, dash, last = part.strip().partition("-") if not part.strip().startswith("-") else (part.strip(), "", "")
        out.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    return tuple(out)
