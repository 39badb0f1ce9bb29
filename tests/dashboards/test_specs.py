from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import interp
from dashboards.errors import PageError
from dashboards.specs import Field, build, build_all, card, cards, code, read, takes_heads
from interp.cli import app


def test_every_registered_intervention_has_a_card() -> None:
    found = {c.name: c for c in cards()}
    assert set(found) == {entry["name"] for entry in interp.interventions()}
    for name, one in found.items():
        assert one.summary and {f.kind for f in one.fields} <= {
            "heads",
            "number",
            "integer",
            "flag",
            "choice",
            "numbers",
            "text",
            "json",
        }, name
    for name in ("VHR", "VAR", "PAI", "MaskHeads", "Streaming", "Knockout", "Temperature", "TopKMask", "ScaleHeads"):
        assert not found[name].missing, name
    assert found["Custom"].missing
    fields = {f.name: f for f in found["VHR"].fields}
    assert (fields["alpha"].kind, fields["alpha"].default) == ("number", 2.0) and "factor" in fields["alpha"].help
    assert (fields["layers"].kind, fields["outlier_filter"].kind, fields["distance"].choices) == (
        "numbers",
        "flag",
        ("squared", "euclidean"),
    )
    assert next(f for f in found["MaskHeads"].fields if f.name == "heads").required


def test_what_a_form_holds_becomes_the_method() -> None:
    made = build({"name": "VHR", "settings": {"alpha": "1.5", "layers": "1,3-5", "outlier_filter": False}})
    assert (made.alpha, tuple(made.layers), made.outlier_filter) == (1.5, (1, 3, 4, 5), False)
    masked = build({"name": "MaskHeads", "settings": {"heads": "L0H1", "kind": "uniform", "scope": ""}}, heads="L2H2")
    assert str(masked.heads) == "L2H2" and masked.kind == "uniform" and masked.scope == "all"
    assert build({"name": "ScaleHeads", "settings": {"heads": "L0H0", "gain": "0.5"}}).gain == 0.5
    knock = build_all([{"name": "Knockout", "settings": {"source": "image", "target": "last"}}])[0]
    assert knock.source == "image"
    assert takes_heads({"name": "MaskHeads", "settings": {"heads": "L0H0"}}) and not takes_heads(
        {"name": "VHR", "settings": {}}
    )


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("number", "many", "must be a number"),
        ("integer", 1.5, "whole number"),
        ("flag", "yes", "true or false"),
        ("choice", "c", "one of"),
        ("numbers", "1,x", "numbers such as"),
        ("json", "{", "must be JSON"),
        ("text", 7, "must be a text"),
        ("heads", 7, "must be a text"),
    ],
)
def test_values_of_another_kind_are_refused(kind: str, value: object, words: str) -> None:
    with pytest.raises(PageError, match=words):
        read(Field("x", kind, None, True, ("a", "b"), ""), value)


def test_the_methods_own_words_are_kept() -> None:
    with pytest.raises(PageError, match="MaskHeads: "):
        build({"name": "MaskHeads", "settings": {"heads": "nonsense"}})
    with pytest.raises(PageError, match="must be"):
        build({"name": "VAR", "settings": {"p": 7}})
    with pytest.raises(PageError, match="an intervention must be"):
        build("VHR")  # type: ignore[arg-type]
    with pytest.raises(PageError, match="intervention must be one of"):
        card("Nonsense")


def test_code_of_a_spec_makes_the_same_object() -> None:
    spec = {"name": "MaskHeads", "settings": {"heads": "L3H1,L5H0", "kind": "uniform", "scope": "all"}}
    assert code(spec) == "interp.interventions.MaskHeads(heads='L3H1,L5H0', kind='uniform')"


def test_generate_takes_what_the_page_exports(tmp_path: Path, model: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp import cli_common

    monkeypatch.setattr(cli_common, "load_model", lambda *a, **k: model)
    file = tmp_path / "made.json"
    file.write_text(
        json.dumps(
            {
                "format": "headscope-generate",
                "prompt": "w10 w11 w12",
                "chat": False,
                "interventions": [{"name": "MaskHeads", "settings": {"heads": "L0H*,L1H*,L2H*"}}],
            }
        ),
        encoding="utf-8",
    )
    done = CliRunner().invoke(
        app, ["generate", "tiny", "--interventions", str(file), "--max-new-tokens", "4", "--json"]
    )
    assert done.exit_code == 0, done.output
    got = json.loads(done.stdout)
    assert (
        got["prompt"] == "w10 w11 w12"
        and got["interventions"][0]["name"] == "MaskHeads"
        and got["masked_ids"] != got["plain_ids"]
    )
    for content, words in (
        ("{", "must be JSON"),
        ('{"interventions": 7}', "must hold a list"),
        ('[{"name": "Nonsense"}]', "must be one of"),
    ):
        file.write_text(content, encoding="utf-8")
        refused = CliRunner().invoke(app, ["generate", "tiny", "--prompt", "w10", "--interventions", str(file)])
        assert refused.exit_code == 2 and words in refused.output


def test_export_writes_one_page(tmp_path: Path) -> None:
    from tests.dashboards.conftest import synthetic_trace

    path = synthetic_trace(3, 4).save(tmp_path / "run.zarr")
    done = CliRunner().invoke(app, ["export", str(path), "--html", "--heads", "L0H1"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert '"L0H1"' in page and "headscopeStandalone" in page
    for arguments, words in (
        (["export", str(path)], "--to must be given"),
        (["export", str(tmp_path / "no.zarr"), "--html"], "cannot be opened here"),
        (["export", str(path), "--html", "--heads", "L9H9"], "L9H9"),
    ):
        refused = CliRunner().invoke(app, arguments)
        assert refused.exit_code == 2 and words in refused.output
