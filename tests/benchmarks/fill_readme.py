"""Write the generated sections of the README: families (checked now), proof and benchmarks (from the recorded results).

python tests/benchmarks/fill_readme.py            # all sections
python tests/benchmarks/fill_readme.py proof      # one of them
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import _readme_benchmarks
import _readme_families
import _readme_kernels
import _readme_models
import _readme_planted
import _readme_proof
import _readme_scenes
import torch

ROOT = Path(__file__).resolve().parents[2]
SECTIONS: dict[str, Callable[[], str]] = {
    "families": _readme_families.table,
    "proof": _readme_proof.section,
    "benchmarks": _readme_benchmarks.section,
    "kernels": _readme_kernels.section,
    "models": _readme_models.section,
    "planted": _readme_planted.section,
    "scenes": _readme_scenes.section,
}


def filled(text: str, names: Sequence[str]) -> str:
    """``text`` with what stands between the marks of each named section replaced.

    Raises:
        ValueError: a section has no marks in the text.
    """
    for name in names:
        content = f"<!-- generated: {name} -->\n{SECTIONS[name]()}\n<!-- end -->"
        text, count = re.subn(rf"<!-- generated: {name} -->.*?<!-- end -->", lambda _, c=content: c, text, flags=re.S)
        if count != 1:
            raise ValueError(f"the README must have the marks of section {name!r} once, found {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="which; all where none is named")
    names = parser.parse_args().sections or list(SECTIONS)
    torch.set_num_threads(1)
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(), names))


if __name__ == "__main__":
    main()
