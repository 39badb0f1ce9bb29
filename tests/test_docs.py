"""The documentation says what the code says: pages of methods and families, messages, and the examples, which are run."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import types
from pathlib import Path

import pytest

import interp
from interp import analysis

DOCS = Path(__file__).resolve().parents[1] / "docs"
sys.path.insert(0, str(DOCS / "hooks"))
import families  # noqa: E402 - found on the path set above
import messages  # noqa: E402 - found on the path set above
import methods  # noqa: E402 - found on the path set above

METHODS = methods.methods()
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, title and text of each block of code of a page."""
    return FENCE.findall((DOCS / page).read_text())


def titled(page: str) -> dict[str, str]:
    return {title: text for _, title, text in blocks(page) if title}


# --- methods


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.kind}/{m.name}")
def test_every_method_has_its_page_with_all_sections_and_options(method: methods.Method) -> None:
    assert not methods.problems(method)
    assert "## Reference" in (page := methods.page(method))
    for option, default in method.settings.items():
        assert f"| `{option}` | {'required' if str(default) == 'required' else f'`{default!r}`'} |" in page


def test_no_page_is_of_a_method_that_does_not_exist() -> None:
    pages = {
        str(p.relative_to(DOCS))
        for kind in ("scores", "interventions", "analyses")
        for p in (DOCS / "methods" / kind).iterdir()
    }
    assert pages == {m.path for m in METHODS}


def test_a_page_that_lacks_something_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "DOCS", tmp_path)
    method = next(m for m in METHODS if m.name == "sink")
    assert methods.problems(method) == ["methods/scores/sink.md is missing"]
    (tmp_path / method.path).parent.mkdir(parents=True)
    (tmp_path / method.path).write_text(
        "## Formula\n\nx\n\n## Defaults\n\n- `key`, `colour`: ours\n\n## When not to use it\n"
    )
    found = "; ".join(methods.problems(method))
    assert "section 'Published numbers'" in found and "section 'When not to use it'" in found
    assert "'colour' is no option" in found and "default of 'epsilon'" in found and "'key'" not in found
    with pytest.raises(ValueError, match="Published numbers"):
        methods.page(method)


def test_the_registry_is_where_page_heads_come_from() -> None:
    method = next(m for m in METHODS if m.name == "sink")
    page = methods.page(method)
    assert "epsilon=0.3" in page and "::: interp.analysis.sink.Sink" in page and "fraction of samples" in page
    assert page.index("## Formula") < page.index("## Defaults") < page.index("## When not to use it")


# --- families


def test_every_family_has_its_page() -> None:
    assert {p.stem for p in (DOCS / "families").glob("*.md")} == {*families.names(), "index"}
    assert set(families.measured()) >= set(families.names())


def test_a_familys_page_lists_its_sites_and_what_is_not_reached() -> None:
    page = families.page("siglip", (DOCS / "families" / "siglip.md").read_text())
    assert "| `vision` | 3 x 4 |" in page and "SiglipMultiheadAttentionPoolingHead" in page and "bit-equal" in page
    page = families.page("mamba", (DOCS / "families" / "mamba.md").read_text())
    assert "no attention of this model can be traced" in page and "bit-equal" not in page


# --- messages


def quoted() -> list[str]:
    """Messages of the index that have a cause and a fix."""
    parts = re.split(r"^`(.+)`$", (DOCS / "errors.md").read_text(), flags=re.M)
    entries = zip(parts[1::2], parts[2::2], strict=True)
    return [message for message, text in entries if text.startswith("\n:   **Cause.** ") and "**Fix.** " in text]


def test_every_message_of_the_index_stands_in_the_sources() -> None:
    entries = re.findall(r"^`.+`$", (DOCS / "errors.md").read_text(), flags=re.M)
    assert len(quoted()) == len(entries) >= 60
    assert [message for message in quoted() if not messages.exists(message)] == []


def test_messages_are_told_apart() -> None:
    assert messages.exists("heads with '*' need a model that says how many there are; got {x} without one")
    assert not messages.exists("heads with '*' need a model that says how many there are; got {x}, {y} without one")
    assert not messages.exists("heads with '+' need a model")
    assert any(m.error == "HeadError" and m.file == "interp/heads.py" for m in messages.messages())


# --- examples


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put the titled blocks of a page where their titles say, below a folder that the packages look into as well."""

    def write(page: str) -> dict[str, types.ModuleType]:
        modules = {}
        for title, text in titled(page).items():
            path = tmp_path / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            name = title.removesuffix(".py").replace("/", ".")
            if title.startswith("interp/") and not title.endswith("__init__.py"):
                package = importlib.import_module(name.rpartition(".")[0])
                monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
                modules[name] = importlib.import_module(name)
        return modules

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if name.startswith(("interp.analysis.self_mass", "interp.interventions.hide_first")):
            del sys.modules[name]
            package, _, child = name.rpartition(".")
            vars(sys.modules[package]).pop(child, None)


def run_tests(folder: Path, *titles: str) -> None:
    """Run a page's tests in this process, where its modules are."""
    for title in titles:
        assert (
            pytest.main(
                [
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    "-p",
                    "no:playwright",
                    "-p",
                    "no:dash",
                    "--rootdir",
                    str(folder),
                    "-c",
                    "/dev/null",
                    str(folder / title),
                ]
            )
            == 0
        )


def test_the_score_of_the_guide_is_right_listed_and_documented(
    written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "guides/add-a-score.md"
    written(page)
    run_tests(tmp_path, "tests/analysis/test_self_mass.py")
    line = titled(page)["interp/analysis/__init__.py"]
    monkeypatch.setitem(analysis._HOMES, "self_mass", ast.literal_eval("{" + line + "}")["self_mass"])
    listed = next(s for s in interp.scores() if s.name == "self_mass")
    assert listed.control == "a uniform head" and listed.settings == {}
    use = next(
        text for language, title, text in blocks(page) if language == "python" and "interp.score(" in text and not title
    )
    space = {"interp": interp, "model": interp.load("recall-lm")}
    exec(use, space)
    assert space["self_mass"]["value"].notnull().all()
    with pytest.raises(analysis.running.AnalysisError, match="needs samples of RepeatedTokens"):
        interp.score("self_mass", space["model"], [space["model"].encode("k3 : v7")])
    documented(tmp_path, monkeypatch, "self_mass")


def test_the_intervention_of_the_guide_is_right_listed_and_documented(
    written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "guides/add-an-intervention.md"
    written(page)
    run_tests(tmp_path, "tests/interventions/test_hide_first.py")
    listed = next(i for i in interp.interventions() if i["name"] == "HideFirst")
    assert listed["settings"]["count"] == 1 and listed["paper"].endswith("2309.17453")
    use = next(text for language, title, text in blocks(page) if language == "python" and not title)
    exec(use, {"interp": interp, "model": interp.load("recall-lm")})
    documented(tmp_path, monkeypatch, "HideFirst")


def documented(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    methods.methods.cache_clear()
    try:
        method = next(m for m in methods.methods() if m.name == name)
    finally:
        methods.methods.cache_clear()
    monkeypatch.setattr(methods, "DOCS", folder / "docs")
    assert not methods.problems(method)


def test_the_first_steps_run(capsys: pytest.CaptureFixture[str]) -> None:
    exec(next(text for language, _, text in blocks("index.md") if language == "python"), {})
    assert "<xarray.DataArray" in capsys.readouterr().out


def test_the_evaluation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(next(text for language, _, text in blocks("guides/evaluation.md") if language == "python"), {})
    assert "VHR(alpha=2) -" in capsys.readouterr().out


def test_the_sentence_stands_where_it_belongs() -> None:
    for page in (
        "index.md",
        "methods/index.md",
        "guides/add-a-score.md",
        "guides/dashboard.md",
        "methods/scores/image_mass.md",
    ):
        assert "ttention is not causation; run the" in " ".join((DOCS / page).read_text().split()), page
