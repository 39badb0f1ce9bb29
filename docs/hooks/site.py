"""What MkDocs calls while it builds: pages of methods and families, parts of the README, formulas, screenshots."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import families
import formulas
import messages
import methods

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"scores": "Scores", "interventions": "Interventions", "analyses": "Analyses"}


def on_config(config: Any) -> Any:
    """Put the pages of methods and families into the navigation."""
    by_title = {next(iter(entry)): next(iter(entry.values())) for entry in config.nav}
    for kind, title in KINDS.items():
        pages = [{m.name: m.path} for m in methods.methods() if m.kind == kind]
        by_title["Methods"].append({title: pages})
    by_title["Families"].extend({name: f"families/{name}.md"} for name in families.names())
    return config


def on_files(files: Files, config: Any) -> Files:
    """The dashboard's pictures lie beside its code."""
    for picture in sorted((ROOT / "dashboards" / "screenshots").glob("*.webp")):
        files.append(File.generated(config, f"assets/screenshots/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated."""
    path = page.file.src_uri
    try:
        for method in methods.methods():
            if path == method.path:
                return methods.page(method)
        folder, _, name = path.removesuffix(".md").rpartition("/")
        if folder == "families" and name != "index":
            return families.page(name, markdown)
        return re.sub(
            r"<!-- (method|families|readme|messages)(?::? ([\w]+))? -->", lambda m: _part(*m.groups()), markdown
        )
    except ValueError as why:
        raise PluginError(f"{path}: {why}") from why


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Draw formulas, and put drawings into the page itself, so that they have the colours of its palette."""
    drawing = r"(?:<p>)?<!-- drawing: ([\w/.]+) -->(?:</p>)?"
    html = re.sub(drawing, lambda m: f'<div class="drawing">{(ROOT / "docs" / m[1]).read_text()}</div>', html)
    try:
        return formulas.drawn(html)
    except ValueError as why:
        raise PluginError(f"{page.file.src_uri}: {why}") from why


def _part(what: str, name: str | None) -> str:
    if what == "method":
        return methods.table(name or "")
    if what == "families":
        return families.table()
    if what == "messages":
        return messages.table()
    return readme(name or "")


def readme(name: str) -> str:
    """A generated section of the README; its links to files of the repository are left as their text.

    Raises:
        ValueError: no such section.
    """
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- generated: {name} -->\n(.*?)\n<!-- end -->", text, flags=re.S)
    if found is None:
        raise ValueError(f"the README must have the marks of section {name!r}")
    section = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", found.group(1))
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"`\1`", section)
