"""Cross-references of docstrings (``:class:`~interp.heads.Heads```) as links of the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")


def linked(text: str) -> str:
    """``text`` with its roles as links; a name that no page documents is left as code."""
    return _ROLE.sub(_link, text)


def _link(found: re.Match[str]) -> str:
    short, target = found.groups()
    shown = target.rpartition(".")[2] if short else target
    # A list in a docstring may hold it, so no Markdown inside. Optional: not every name has a page.
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'


class Roles(griffe.Extension):
    """Runs over every object that has a docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = linked(obj.docstring.value)
