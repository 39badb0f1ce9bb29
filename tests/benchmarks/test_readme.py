"""What the README says was measured is what the results files hold."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from interp.testing import families

sys.path.insert(0, str(Path(__file__).parent))
import _readme_benchmarks
import fill_readme

README = (fill_readme.ROOT / "README.md").read_text()


@pytest.mark.parametrize("section", ["proof", "benchmarks", "kernels", "models", "planted", "scenes"])
def test_the_section_is_what_the_results_give(section: str) -> None:
    again = fill_readme.filled(README, [section])
    assert again == README, f"run python tests/benchmarks/fill_readme.py {section}"


def test_every_family_has_a_row_with_its_checks() -> None:
    table = README.split("<!-- generated: families -->")[1].split("<!-- end -->")[0]
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")
        for line in table.strip().splitlines()[2:]
        if "|" in line
    }
    assert set(rows) >= set(families(reached=None))
    for name in families(reached=True):
        eager, fp64, row, column, equal, checks = rows[name][2:8]
        assert equal == "yes" and len(set(checks.split(" of "))) == 1, name
        assert all(float(error) < 2e-5 for error in (eager, fp64, row, column) if error != "-"), name
        assert re.search(r"[A-Z]", rows[name][-1]) or rows[name][-1] == "-"
    for name in families(reached=False):
        assert rows[name][-1] != "-", "what is not reached is named"


def test_a_result_nobody_shows_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unheard_of.json").write_text(json.dumps({"rows": []}))
    monkeypatch.setattr(_readme_benchmarks, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="unheard_of.json must have a function"):
        _readme_benchmarks.section()


def test_a_section_without_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="marks of section 'proof' once, found 0"):
        fill_readme.filled("no marks here", ["proof"])
