"""Scores as files from the command line: released formats there and back, figures, and a file in place of a score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner, Result

import interp
from interp import analysis, cli_common
from interp.cli import app
from interp.duo_files import read_gates, read_windows
from interp.evaluation.settings import SettingError, parse_setting
from interp.interventions import Streaming
from interp.models.anatomy import anatomy
from interp.scores import ScoreFileError, make_score, open_score, read_image_settings, read_score, save_score
from interp.testing import build


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    """3 layers x 4 heads, 2 KV heads."""
    model = interp.load(build("llama").module)
    monkeypatch.setattr(cli_common, "load_model", lambda *a, **k: model)
    return model


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[str, xr.Dataset]:
    """What the scores give, so that only files are tested here."""
    rng = np.random.default_rng(0)
    gates = rng.uniform(size=(3, 2))
    duo = make_score(
        gates.repeat(2, 1),
        name="duo_attention",
        unit="gate",
        paper="p",
        settings={"sink_size": 64, "recent_size": 128, "seed": 1},
    )
    duo["gate"] = (("layer", "kv_head"), gates)
    found = {
        "retrieval": make_score(rng.uniform(size=(5, 3, 4)), name="retrieval", unit="fraction", paper="p", settings={"model": "tiny"}),
        "duo_attention": duo,
    }  # fmt: skip
    monkeypatch.setattr(analysis, "score", lambda name, model: found[name])
    return found


def test_retrieval_head_there_and_back(llama: Any, scored: dict[str, xr.Dataset], tmp_path: Path) -> None:
    first, again, kept = (tmp_path / "head_score" / n for n in ("tiny.json", "again.json", "kept.json"))
    assert run("score", "m", "retrieval", "--out", first, "--format", "retrieval-head").exit_code == 0
    told = json.loads(first.read_text())
    assert list(told)[:5] == ["0-0", "0-1", "0-2", "0-3", "1-0"] and len(first.read_text().splitlines()) == 1
    assert told["2-1"] == scored["retrieval"]["value_by_sample"].values[:, 2, 1].tolist()
    done = run("score", "--from", first, "--out", again, "--format", "retrieval-head", "--json")
    assert done.exit_code == 0 and again.read_bytes() == first.read_bytes()
    assert json.loads(done.stdout)["heads"][0]["id"] == str(scored["retrieval"].heads.top(1))
    assert run("score", "--from", first, "--out", kept, "--format", "score").exit_code == 0
    np.testing.assert_array_equal(open_score(kept)["value_by_sample"], scored["retrieval"]["value_by_sample"])


def test_duo_attention_there_and_back(llama: Any, scored: dict[str, xr.Dataset], tmp_path: Path) -> None:
    first, again = tmp_path / "full_attention_heads.tsv", tmp_path / "again" / "full_attention_heads.tsv"
    assert run("score", "m", "duo_attention", "--out", first).exit_code == 0
    np.testing.assert_array_equal(read_gates(first), scored["duo_attention"]["gate"])
    assert read_windows(first) == (64, 128)
    assert run("score", "m", "--from", first, "--out", again).exit_code == 0
    assert again.read_bytes() == first.read_bytes() and not again.with_name("config.json").exists()
    # Only a score that says its window looks at the config beside it, and never replaces another's.
    assert run("score", "m", "duo_attention", "--out", first).exit_code == 0
    (tmp_path / "config.json").write_text('{"sink_size": 1, "recent_size": 128}')
    refused(run("score", "m", "duo_attention", "--out", first), "config.json", "'sink_size': 64")
    refused(run("score", "--from", first), "MODEL", ".tsv")


def test_a_score_of_query_heads_as_gates(llama: Any, scored: dict[str, xr.Dataset], tmp_path: Path) -> None:
    out = tmp_path / "gates.tsv"
    refused(run("score", "m", "retrieval", "--out", out), "reduce='mean' or 'max'")
    assert not out.exists()
    assert run("score", "m", "retrieval", "--out", out, "--reduce", "max").exit_code == 0
    np.testing.assert_allclose(read_gates(out), scored["retrieval"]["value"].values.reshape(3, 2, 2).max(-1))


def test_files_are_what_streaming_takes(llama: Any, scored: dict[str, xr.Dataset], tmp_path: Path) -> None:
    tsv, released = tmp_path / "g.tsv", tmp_path / "r.json"
    run("score", "m", "duo_attention", "--out", tsv)
    run("score", "m", "retrieval", "--out", released, "--format", "retrieval-head")
    shape = anatomy(llama)
    from_tsv = parse_setting(f"Streaming.from_tsv({str(tsv)!r}, sparsity=.5)").interventions[0]
    assert from_tsv.resolve(shape) == Streaming.from_tsv(tsv, sparsity=0.5).resolve(shape)
    assert len(from_tsv.resolve(shape)) == 6
    from_score = parse_setting(f"Streaming.from_score({str(released)!r}, share=.5)").interventions[0]
    assert from_score.resolve(shape) == Streaming.from_score(scored["retrieval"], share=0.5).resolve(shape)
    key = parse_setting(f"Streaming.from_tsv({str(tsv)!r})").key
    tsv.write_text(tsv.read_text().replace("e-01", "e-02", 1))
    assert parse_setting(f"Streaming.from_tsv({str(tsv)!r})").key != key, "another table is another setting"
    for text, words in (
        ("Streaming.from_tsv('no.tsv')", "no.tsv"), ("VHR.from_tsv('a.tsv')", "must have from_tsv"),
        ("Streaming.example(1)", "must be such as"), ("Streaming.from_tsv.x('a')", "must be such as"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=words):
            parse_setting(text)


def test_every_file_is_read_by_one_reader(scored: dict[str, xr.Dataset], tmp_path: Path, llama: Any) -> None:
    one = scored["retrieval"]
    for name in ("t.csv", "t.json"):
        run("score", "m", "retrieval", "--out", tmp_path / name)
        back = read_score(tmp_path / name)
        np.testing.assert_allclose(back["value"], one["value"], rtol=1e-12)
        np.testing.assert_array_equal(back["n"], one["n"])
        assert back.attrs["name"] == "retrieval" and back.heads.top(3) == one.heads.top(3)
    assert read_score(tmp_path / "t.json").attrs["settings"] == {"model": "tiny"}
    xr.testing.assert_identical(read_score(save_score(one, tmp_path / "s.json")), one)
    for name, text, words in (
        ("a.csv", "x,y\n1,2\n", "score and stack"), ("b.csv", "", "no table"),
        ("c.json", '{"heads": [{"layer": 0, "head": 0}]}', "layer, head and value"),
        ("d.json", '{"heads": [{"layer": 0, "head": 0, "value": "x"}]}', "must hold numbers"),
        ("e.json", '{"heads": [{"layer": 0, "head": 0, "value": 1}, {"layer": 0, "head": 0, "value": 2}]}', "once"),
        ("f.json", "{", "damaged"), ("g.json", '{"a": [1]}', "Retrieval_Head"), ("h.tsv", "1\t0\n", "group_size"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(ScoreFileError, match=words):
            read_score(tmp_path / name)


def test_a_figure_is_written_with_what_made_it(llama: Any, scored: dict[str, xr.Dataset], tmp_path: Path) -> None:
    assert run("score", "m", "retrieval", "--out", tmp_path / "f.html").exit_code == 0
    pytest.importorskip("matplotlib")
    assert run("score", "m", "retrieval", "--out", tmp_path / "f.pdf").exit_code == 0
    assert read_image_settings(tmp_path / "f.pdf")["settings"] == {"model": "tiny"}


def test_what_does_not_go_together_is_refused(llama: Any, tmp_path: Path) -> None:
    refused(run("score", "m", "sink", "--out", "x.xlsx"), "--out", ".csv", ".tsv", ".pdf")
    refused(run("score", "m", "sink", "--out", "x.csv", "--format", "score"), "--out", ".json for score")
    refused(run("score", "m", "sink", "--format", "nonsense"), "--format", "duo-attention")
    refused(run("score", "m", "sink", "--format", "table"), "--out", "given")
    refused(run("score", "m", "sink", "--from", "x.json"), "NAME", "'sink'")
    refused(run("score", "--from", "no.json"), "no.json")
    refused(run("score", "m", "sink", "--reduce", "min"), "--reduce", "'min'")
    refused(run("score", "", "--from", tmp_path / "x.json", "--out", "y.tsv"), "MODEL", "duo-attention")
