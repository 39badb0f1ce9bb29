"""The notebooks as they are tracked: run, readable, small, honest at the end. `make notebooks` executes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.:/])/(work|home|tmp|root|Users)/")


def of(kind: str, notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in of("code", notebook) for output in cell["outputs"]]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path) -> None:
    text = path.read_text()
    notebook = json.loads(text)
    assert len(text.encode()) < 2**20
    assert not MACHINE.search(text), MACHINE.search(text)

    assert source(notebook["cells"][0]).startswith("# ")
    last = notebook["cells"][-1]
    assert last["cell_type"] == "markdown" and source(last).startswith("## What this does not show")

    code = [cell for cell in of("code", notebook) if source(cell).strip()]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run from top to bottom, once"
    kinds = [output["output_type"] for output in outputs(notebook)]
    assert kinds and "error" not in kinds
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"], "warnings are no result"
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook)), "no figure"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_one_run_is_kept(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert [cell["metadata"] for cell in notebook["cells"]] == [{}] * len(notebook["cells"])
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{i}" for i in range(len(notebook["cells"]))]


@pytest.mark.parametrize(("page", "folder"), [(FOLDER / "README.md", ""), (FOLDER.parent / "README.md", "notebooks/")])
def test_readmes_list_each_once(page: Path, folder: str) -> None:
    rows = re.findall(rf"^\| \[(\w+)\]\({folder}(\w+)\.ipynb\) \| (.+) \|$", page.read_text(), re.MULTILINE)
    assert all(name == link and line for name, link, line in rows)
    assert sorted(name for name, _, _ in rows) == [path.stem for path in NOTEBOOKS]
