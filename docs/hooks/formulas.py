"""Formulas as MathML, made while the site is built: browsers draw it themselves, so a page needs no script and no font."""

from __future__ import annotations

import html
import re

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def drawn(page: str) -> str:
    """HTML with every formula of Arithmatex in MathML.

    Raises:
        ValueError: a formula that cannot be read (says which).
    """
    return _FORMULA.sub(_mathml, page)


def _mathml(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    tag, kind, source = found.groups()
    source = html.unescape(source).strip()
    try:
        made = convert(source, display="block" if kind == "[" else "inline")
    except Exception as why:
        raise ValueError(f"formula {source!r} cannot be read: {why!r}") from why
    if re.search(r"<mtext>\\|<mi>\\", made):
        raise ValueError(f"formula {source!r} has a command that is not known: {made}")
    return f'<{tag} class="formula">{_spaced(made)}</{tag}>'


def _spaced(made: str) -> str:
    """Room around the names of functions, none within bars: browsers give operators of both kinds the same."""
    words = r"<m[oi]>(ln|log|exp|cos|max|min)</m[oi]>"
    made = re.sub(words, r'<mo form="prefix" lspace="0.17em" rspace="0.17em">\1</mo>', made)
    bars = r'<m[oi](?: stretchy="false")?>(\||&#x0?0?07C;|&#x02223;|&#x02016;)</m[oi]>'
    return re.sub(bars, r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', made)
