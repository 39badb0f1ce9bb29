"""The README's tables of methods applied to the bundled LLaVA, from the recorded result."""

from __future__ import annotations

from _results import result, where


def section() -> str:
    """Every setting that was confirmed, whatever it did."""
    from proof_scenes import markdown

    content = result("proof_scenes")
    return "\n".join([*markdown(content["rows"]), f"*{where(content)}; `{content['command']}`; `proof_scenes.json`*"])
