"""The README's example is run and prints what the README says; the citation is that of this version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import interp

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


def test_the_ten_lines_print_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example, more = PYTHON
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    shown = README.split(f"```python\n{example}```")[1].split("```")[1].strip("\n").splitlines()
    split = [line.split(" masked: ") for line in printed]
    assert [heads for heads, _ in split] == [line.split(" masked: ")[0] for line in shown]
    answers, told = [answer for _, answer in split], [line.split(" masked: ")[1] for line in shown]
    # What a broken model says may hang on rounding; that it is wrong may not.
    assert answers[0] == told[0] == "v7 v90"
    assert "v7" not in answers[1]
    assert "v7" not in told[1]
    assert answers[2:] == told[2:] == ["v7 v90"] * 2

    exec(compile(more, "README.md", "exec"), names)
    assert "passed" in capsys.readouterr().out
    assert interp.Trace.open(tmp_path / "out" / "run.zarr")["text"].sizes["layer"] == 6


def test_citations_name_this_version() -> None:
    stated = re.findall(r"version = \{(.+?)\}", README)
    assert stated == [interp.__version__]
    assert f"\nversion: {interp.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
