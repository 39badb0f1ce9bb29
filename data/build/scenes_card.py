"""Model cards of the scenes models."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_vit_card(folder: Path, metrics: dict[str, Any]) -> None:
    (folder / "README.md").write_text("# scenes-vit\n")


def write_lvlm_card(folder: Path, metrics: dict[str, Any]) -> None:
    (folder / "README.md").write_text("# scenes-lvlm\n")
