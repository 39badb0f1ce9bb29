"""Pages of methods: what the registries know stands above what was written by hand, and gives the table of defaults its values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
SECTIONS = ("Formula", "Defaults", "When not to use it", "Published numbers", "Paper and code")
# Options of many methods that are no choice of a paper's.
COMMON = {
    "stack": "ours: whose heads are measured",
    "heads": "`interp.heads.as_heads` says what it takes; an empty set changes nothing",
    "scope": "ours: `all` rows, those of the prompt (`prefill`), after it (`decode`), or that decide the next token (`next`)",
    "rows": "ours: positions in place of a scope",
    "shuffle_seed": "ours: of the control",
    "seed": "ours: of the draws",
    "progress": "a bar where the output is a terminal",
    "model": "what `interp.load` gives, or a transformers model",
    "probe": "a probe, or an iterable of inputs; None is the method's own default",
    "sample": "a probe's sample, or inputs of one sequence",
}


@dataclass(frozen=True)
class Method:
    """One entry of the registries.

    Attributes:
        kind: ``scores``, ``interventions`` or ``analyses``; also the folder of its page.
        name: as it is called.
        home: dotted path of its class or function.
        facts: rows of the head of the page.
        settings: option to default.
        call: how it is called.
    """

    kind: str
    name: str
    home: str
    summary: str
    facts: dict[str, str]
    settings: dict[str, Any]
    call: str

    @property
    def path(self) -> str:
        return f"methods/{self.kind}/{self.name}.md"


@cache
def methods() -> tuple[Method, ...]:
    """Every score, intervention and analysis there is."""
    return (*_scores(), *_interventions(), *_analyses())


def _scores() -> list[Method]:
    from interp import analysis

    found = []
    for entry in analysis.scores():
        cls = analysis._class(entry.name)
        facts = {
            "Paper": _links(entry.paper), "Unit": entry.unit, "Stacks": ", ".join(entry.stacks), "Default probe": entry.probe,
            "Control": entry.control, "Needs": entry.needs or "any model",
        }  # fmt: skip
        home = f"{cls.__module__}.{cls.__name__}"
        call = _called(f"interp.score({entry.name!r}, model", entry.settings, first=False)
        found.append(Method("scores", entry.name, home, entry.summary, facts, entry.settings, call))
    return found


def _interventions() -> list[Method]:
    import interp
    from interp import interventions

    classes = interventions._classes()
    found = []
    for entry in interventions():
        cls = classes[entry["name"]]
        facts = {
            "Paper": _links(entry["paper"]) or "none: the escape hatch", "Unit": entry["unit"] or "none",
            "Stacks": ", ".join(entry["stacks"]), "Needs": entry["needs"] or "any model",
        }  # fmt: skip
        where = "interp" if entry["name"] in interp.__all__ else cls.__module__
        call = _called(f"{where}.{entry['name']}(", entry["settings"], first=True)
        home = f"{cls.__module__}.{cls.__name__}"
        summary = entry["summary"].partition(" (")[0].rstrip(".")
        found.append(Method("interventions", entry["name"], home, summary, facts, entry["settings"], call))
    return found


def _analyses() -> list[Method]:
    from interp import analysis

    found = []
    for entry in analysis.analyses():
        facts = {
            "Paper": _links(entry.paper), "Unit": entry.unit, "To hold it against": entry.control, "Needs": entry.needs,
        }  # fmt: skip
        call = f"from {entry.module} import {entry.name}\n\n" + _called(f"{entry.name}(", entry.settings, first=True)
        summary = entry.summary.partition(". ")[0].rstrip(".")
        found.append(
            Method("analyses", entry.name, f"{entry.module}.{entry.name}", summary, facts, entry.settings, call)
        )
    return found


def _links(text: str) -> str:
    return re.sub(r"https?://[^\s;,)]+", lambda m: f"<{m.group()}>", text)


def _called(start: str, settings: dict[str, Any], *, first: bool) -> str:
    parts = [name if default == "required" else f"{name}={default!r}" for name, default in settings.items()]
    if not parts:
        return start + ")"
    line = start + ("" if first else ", ") + ", ".join(parts) + ")"
    if len(line) <= 88:
        return line
    inner = ",\n    ".join(parts)
    return f"{start}{'' if first else ','}\n    {inner},\n)"


def written(method: Method) -> str:
    """What was written by hand.

    Raises:
        FileNotFoundError: nothing yet.
    """
    return (DOCS / method.path).read_text()


def sections(text: str) -> dict[str, str]:
    """Text below each heading of the second order."""
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return {heading.strip(): body.strip() for heading, body in zip(parts[1::2], parts[2::2], strict=True)}


def sources(text: str) -> dict[str, str]:
    """Option to where its default comes from, of a section of bullets: several options of one source share a bullet."""
    found: dict[str, str] = {}
    for names, why in re.findall(r"^- ((?:`\w+`(?:, )?)+): (.+(?:\n  .+)*)", text, flags=re.M):
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), " ".join(why.split()))
    return found


def problems(method: Method) -> list[str]:
    """What a page lacks: sections, or options without a source or that do not exist."""
    try:
        found = sections(written(method))
    except FileNotFoundError:
        return [f"{method.path} is missing"]
    out = [f"{method.path} must have the section {name!r} with a text" for name in SECTIONS if not found.get(name)]
    named = sources(found.get("Defaults", ""))
    out += [f"{method.path}: {name!r} is no option of {method.name}" for name in named if name not in method.settings]
    out += [
        f"{method.path}: Defaults must say where the default of {name!r} comes from"
        for name in method.settings
        if name not in named and name not in COMMON
    ]
    return out


def page(method: Method) -> str:
    """The page.

    Raises:
        ValueError: it lacks something.
    """
    wrong = problems(method)
    if wrong:
        raise ValueError("; ".join(wrong))
    text = written(method)
    known = sources(sections(text)["Defaults"])
    rows = [
        f"| `{name}` | {_default(default)} | {known.get(name) or COMMON[name]} |"
        for name, default in method.settings.items()
    ]
    table = "\n".join(["| option | default | where it comes from |", "| --- | --- | --- |", *rows])
    before, _, rest = text.partition("## Defaults")
    body, _, after = rest.partition("\n## ")
    body = re.sub(r"^- (?:`\w+`(?:, )?)+: .+(?:\n  .+)*\n?", "", body, flags=re.M).strip()
    defaults = "\n\n".join(["## Defaults", *([table] if rows else []), *([body] if body else [])])
    facts = "\n".join(f"| **{key}** | {value} |" for key, value in method.facts.items() if value)
    head = f"# {method.name}\n\n{_sentence(method.summary)}\n\n|  |  |\n| --- | --- |\n{facts}\n\n```python\n{method.call}\n```\n\n"
    reference = f"\n\n## Reference\n\n::: {method.home}\n    options:\n      heading_level: 3\n      members: false\n"
    return f"{head}{before.strip()}\n\n{defaults}\n\n## {after.strip()}{reference}"


def _default(value: Any) -> str:
    return "required" if isinstance(value, str) and value == "required" else f"`{value!r}`"


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?")) else text + "."


def table(kind: str) -> str:
    """All methods of a kind, a row each."""
    rows = [
        f"| [{m.name}]({m.kind}/{m.name}.md) | {_sentence(m.summary)} | {m.facts.get('Unit', '')} |"
        for m in methods()
        if m.kind == kind
    ]
    return "\n".join(["| name | | unit |", "| --- | --- | --- |", *rows])
