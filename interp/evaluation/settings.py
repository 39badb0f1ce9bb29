"""What is compared: interventions and decoding under one name, written ``VHR(alpha=2)+VAR(p=.6)+beam=5``."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from interp.files import jsonable
from interp.heads import Head, Heads
from interp.interventions.selection import resolve_heads
from interp.models.anatomy import Anatomy
from interp.tracing.calls import Intervention

PLAIN = ("greedy", "plain")
OPTIONS = ("beam", "random")
MAKERS = ("from_tsv", "from_score")
"""What may follow a method's name: ``Streaming.from_tsv('full_attention_heads.tsv', sparsity=.5)`` is made from a file."""


class SettingError(ValueError):
    """A setting that cannot be read or made."""


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        name: as the table shows it.
        interventions: applied in this order; none is the plain model.
        beams: of beam search, 1 is greedy.
        random: a seed: every method's heads are replaced by as many other ones of the same layers.
    """

    name: str
    interventions: tuple[Intervention, ...] = ()
    beams: int = 1
    random: int | None = None

    def on(self, anatomy: Anatomy) -> list[Intervention]:
        """The interventions for one model.

        Raises:
            SettingError: random heads are asked for where no method has any, or a layer has too few others.
            interp.heads.HeadError: heads that the model does not have.
        """
        if self.random is None:
            return list(self.interventions)
        if not any(heads_of(i) is not None for i in self.interventions):
            raise SettingError(f"random must stand beside a method with heads, got {self.name!r}")
        made: list[Intervention] = []
        for one in self.interventions:
            heads = heads_of(one)
            changed: Any = one
            if heads is not None:
                changed = replace(changed, heads=other_heads(resolve_heads(heads, anatomy), anatomy, self.random))
            made.append(changed)
        return made

    def describe(self) -> dict[str, Any]:
        """All of it but the name, JSON-able: two settings that do the same are equal here."""
        made: dict[str, Any] = jsonable(
            {"interventions": [i.describe() for i in self.interventions], "beams": self.beams, "random": self.random},
            self.name,
        )
        return made

    @property
    def key(self) -> str:
        """Twelve hex digits that change with anything that changes what it does."""
        return hashlib.sha256(json.dumps(_numbers(self.describe()), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def plain(self) -> bool:
        return not self.interventions and self.beams == 1


GREEDY = Setting("greedy")


def random_control(setting: Setting, seed: int) -> Setting:
    """The same with other heads of the same layers.

    Raises:
        SettingError: no method of it has heads.
    """
    if not any(heads_of(i) is not None for i in setting.interventions):
        raise SettingError(f"a control with random heads needs a method with heads, got {setting.name!r}")
    return replace(setting, name=f"{setting.name}+random={seed}", random=seed)


def other_heads(heads: Heads, anatomy: Anatomy, seed: int) -> Heads:
    """As many heads of the same layers that are not among ``heads``, drawn at random.

    Raises:
        SettingError: a layer has fewer others than it has chosen ones.
    """
    rng = random.Random(f"random heads {seed}")
    found: list[Head] = []
    for stack in sorted({head.stack for head in heads}):
        for layer, chosen in sorted(heads.by_layer(stack).items()):
            free = [n for n in range(anatomy.site(stack, layer).n_heads) if n not in chosen]
            if len(free) < len(chosen):
                raise SettingError(
                    f"random heads of {stack} layer {layer} must be others than the {len(chosen)} chosen, got {len(free)} that are"
                )
            found += [Head(layer, n, stack) for n in sorted(rng.sample(free, len(chosen)))]
    return Heads(found)


def parse_setting(text: str) -> Setting:
    """Read a setting: methods with literal arguments and options, joined by ``+``.

    ``VHR(alpha=2)+VAR(p=.6)``, ``MaskHeads("L3H1,L5H0", kind=uniform)``, ``PAI(.2)+beam=5``, ``MaskHeads(L3H1)+random=0``,
    ``greedy``. Methods are those of ``interp.interventions()``, and ``VCD`` and ``DoLa``. Nothing is evaluated: arguments are
    Python literals, a bare word is a text.

    Raises:
        SettingError: anything else, naming what was got.
    """
    made: list[Intervention] = []
    options: dict[str, int] = {}
    terms = _terms(text)
    for term in terms:
        option = re.fullmatch(r"(\w+)\s*=\s*(.+)", term)
        if option is not None:
            name, value = option[1], option[2]
            if name not in OPTIONS or not value.isdigit() or (name == "beam" and int(value) < 1):
                raise SettingError(f"an option must be beam=N or random=SEED, got {term!r} in {text!r}")
            if name in options:
                raise SettingError(f"{name} must be given once, got {text!r}")
            options[name] = int(value)
        elif term not in PLAIN:
            made.append(_method(term, text))
        elif len(terms) > 1:
            raise SettingError(f"{term} must stand alone, got {text!r}")
    return Setting(text.strip(), tuple(made), options.get("beam", 1), options.get("random"))


def _terms(text: str) -> list[str]:
    """Parts between the ``+`` outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "([{") - (sign in ")]}")
        if sign == "+" and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    found = [part.strip() for part in parts]
    if depth or quote or not all(found):
        raise SettingError(f"a setting must be such as 'VHR(alpha=2)+VAR(p=.6)', got {text!r}")
    return found


def _method(term: str, text: str) -> Intervention:
    try:
        node = ast.parse(term, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SettingError(f"a method must be such as VHR(alpha=2), got {term!r} in {text!r}") from error
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    maker: str | None = None
    function = call.func
    if isinstance(node, ast.Call) and isinstance(function, ast.Attribute) and function.attr in MAKERS:
        maker, function = function.attr, function.value
    if not isinstance(function, ast.Name) or any(k.arg is None for k in call.keywords):
        raise SettingError(f"a method must be such as VHR(alpha=2), got {term!r} in {text!r}")
    known = methods()
    name = function.id
    if name not in known:
        near = get_close_matches(name, list(known), 3, 0.4)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise SettingError(f"a method must be one of {', '.join(known)}, got {name!r}{hint}")
    arguments = [_literal(a, term) for a in call.args]
    keywords = {str(k.arg): _literal(k.value, term) for k in call.keywords}
    make: Any = known[name] if maker is None else getattr(known[name], maker, None)
    if make is None:
        raise SettingError(f"{name} must have {maker} to be made from a file, and has not: {term!r}")
    try:
        return make(*arguments, **keywords)
    except (TypeError, ValueError, OSError) as error:
        raise SettingError(f"{term}: {error}") from error


def _literal(node: ast.expr, term: str) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise SettingError(f"arguments must be literals such as 2, 'L3H1' or [0, 1], got {term!r}") from error


def methods() -> dict[str, type[Intervention]]:
    """Every method that a setting may name."""
    from interp import interventions
    from interp.evaluation.baselines import VCD, DoLa

    listed: dict[str, Any] = interventions._classes()  # pyright: ignore[reportPrivateUsage]  # what `interp.interventions()` shows
    return {**listed, "VCD": VCD, "DoLa": DoLa}


def unique(settings: Sequence[Setting]) -> list[Setting]:
    """Each setting once, the plain model first.

    Raises:
        SettingError: one name for two settings.
    """
    found: dict[str, Setting] = {}
    names: dict[str, str] = {}
    plain = next((s for s in settings if s.plain), GREEDY)
    for setting in (plain, *settings):
        if names.setdefault(setting.name, setting.key) != setting.key:
            raise SettingError(f"a name must stand for one setting, got {setting.name!r} for two")
        found.setdefault(setting.key, setting)
    return list(found.values())


def heads_of(intervention: Intervention) -> Any:
    """The heads that a method was given, None where it has none."""
    return getattr(intervention, "heads", None)


def _numbers(value: Any) -> Any:
    """Whole numbers as floats: alpha=2 is alpha=2.0."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
