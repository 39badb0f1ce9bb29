"""``headscope export`` and ``headscope prune``: what they write is what the models say, and nothing is left of what failed."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import interp
from interp import Capture, Heads, MaskHeads, cli_common, cli_export, cli_prune, hooked
from interp.cli import app
from interp.models.anatomy import anatomy
from interp.scores import make_score, save_score
from interp.testing import build
from tests.probes.test_margin import tiny_tokenizer

WORDS = "w10 w11 w12 w10 w11"
MORE = "w20 w21 w22"
EVEN = "L0H1,L0H3,L1H0,L1H2,L2H1,L2H2"
"""A query head of each of the two KV heads of every layer."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama of 3 layers x 4 heads with a tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "llama"
    build("llama").module.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trace(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = interp.load(llama)
    with hooked(model, capture=Capture(attention=True, row_stats=True, pooled=8)) as ran, torch.no_grad():
        model(model.encode(WORDS))
    return ran.trace.save(tmp_path_factory.mktemp("traces") / "run.zarr")


@pytest.fixture
def maps(llama: Path) -> list[torch.Tensor]:
    model = interp.load(llama, dtype="float32")
    model.module.set_attn_implementation("eager")
    with torch.no_grad():
        return list(model.module(**model.encode(WORDS), output_attentions=True).attentions)


# --- export


def test_bertviz_and_circuitsvis_as_json(trace: Path, maps: list[torch.Tensor], tmp_path: Path) -> None:
    done = run("export", trace, "--to", "bertviz", "--out", tmp_path / "b.json", "--view", "model")
    assert done.exit_code == 0 and "b.json" in done.stdout, done.output
    told = json.loads((tmp_path / "b.json").read_text())
    assert (told["for"], told["function"]) == ("bertviz", "model_view") and len(told["arguments"]["tokens"]) == maps[
        0
    ].shape[-1]
    for ours, theirs in zip(told["arguments"]["attention"], maps, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, atol=3e-6, rtol=0)
    for options, wanted in (
        (("--heads", "L2H3,L0H1"), torch.stack([maps[2][0, 3], maps[0][0, 1]])), (("--layer", 1), maps[1][0]),
    ):  # fmt: skip
        assert run("export", trace, "--to", "circuitsvis", *options, "--out", tmp_path / "c.json").exit_code == 0
        told = json.loads((tmp_path / "c.json").read_text())
        torch.testing.assert_close(torch.tensor(told["arguments"]["attention"]), wanted, atol=3e-6, rtol=0)
    assert len(told["arguments"]["attention_head_names"]) == 4 and told["arguments"]["mask_upper_tri"] is True


def test_layers_without_maps_are_null() -> None:
    assert cli_export.plain((torch.tensor([torch.nan, 1 / 3]), "word", True)) == [[None, 0.333333], "word", True]


def test_headvis_of_a_model_and_texts(llama: Path, tmp_path: Path) -> None:
    lines = tmp_path / "texts.txt"
    lines.write_text(f"{MORE}\n\n{MORE} w23\n")
    score = make_score(torch.rand(2, 3, 4).numpy(), name="mine", unit="u", paper="p")
    options = ("--text", WORDS, "--lines", lines, "--score", save_score(score, tmp_path / "s.json"))
    done = run("export", llama, "--to", "headvis", *options, "--out", tmp_path / "data")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "data" / "scatter_data.json").read_text())
    assert len(rows) == 12 and "mine" in json.dumps(rows[0])
    sequences = json.loads((tmp_path / "data" / "heads" / "L1H2.json").read_text())
    assert '"sequence_id": 2' in json.dumps(sequences), "three texts"
    refused(run("export", llama, "--to", "headvis", *options, "--out", tmp_path / "data"), "--overwrite")
    again = ("--text", MORE, "--heads", "L0H1", "--overwrite", "--out", tmp_path / "data")
    assert run("export", llama, "--to", "headvis", *again).exit_code == 0
    assert [f.name for f in (tmp_path / "data" / "heads").iterdir()] == ["L0H1.json"]


def test_headvis_of_traces_and_a_page_of_a_model(trace: Path, llama: Path, tmp_path: Path) -> None:
    assert run("export", trace, trace, "--to", "headvis", "--out", tmp_path / "data").exit_code == 0
    page = run("export", llama, "--html", "--text", WORDS, "--out", tmp_path / "p.html", "--heads", "L0H1")
    assert page.exit_code == 0 and "headscopeStandalone" in (tmp_path / "p.html").read_text()


def packaged(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_pages_of_others_are_made_by_their_packages(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def view(**given: Any) -> Any:
        seen.update(given)
        return types.SimpleNamespace(data="<p>bertviz's</p>")

    packaged(monkeypatch, "bertviz", head_view=view)
    attention = types.SimpleNamespace(attention_heads=lambda **given: f"<p>{given['attention_head_names']}</p>")
    packaged(monkeypatch, "circuitsvis", attention=attention)
    assert run("export", trace, "--to", "bertviz", "--out", tmp_path / "b.html").exit_code == 0
    page = (tmp_path / "b.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "<p>bertviz's</p>" in page
    assert seen["html_action"] == "return" and len(seen["attention"]) == 3
    assert run("export", trace, "--to", "circuitsvis", "--layer", 0, "--out", tmp_path / "c.html").exit_code == 0
    assert "['L0H0', 'L0H1', 'L0H2', 'L0H3']" in (tmp_path / "c.html").read_text()


@pytest.mark.parametrize(("form", "more"), [("bertviz", ()), ("circuitsvis", ("--layer", "0"))])
def test_the_real_packages_make_pages(form: str, more: tuple[str, ...], trace: Path, tmp_path: Path) -> None:
    pytest.importorskip(form, reason=f"the package {form} is not installed")
    assert run("export", trace, "--to", form, *more, "--out", tmp_path / "v.html").exit_code == 0
    assert "<script" in (tmp_path / "v.html").read_text()


def test_a_package_that_is_not_there_is_named(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_export, "find_spec", lambda name: None)
    refused(run("export", trace, "--to", "bertviz"), "needs the package bertviz", ".json")
    refused(run("export", trace, "--to", "circuitsvis", "--layer", "0", "--out", tmp_path / "c.html"), "circuitsvis")
    assert not list(tmp_path.iterdir()) and not trace.with_name("run.bertviz.html").exists()


def test_export_says_what_it_needs(trace: Path, llama: Path, tmp_path: Path) -> None:
    model = interp.load(llama)
    with hooked(model, capture=Capture(row_stats=True)) as ran, torch.no_grad():
        model(model.encode(WORDS))
    bare, out = ran.trace.save(tmp_path / "bare.zarr"), ("--out", tmp_path / "x.json")
    refused(run("export", trace), "--to", "headvis", "got none")
    refused(run("export", trace, "--to", "svg"), "--to", "svg")
    refused(run("export", trace, "--html", "--to", "headvis"), "--html")
    refused(run("export", bare, "--to", "bertviz", *out), "Capture(attention=True)", "entropy")
    refused(run("export", bare, "--to", "headvis", "--out", tmp_path / "data"), "Capture(attention=True)")
    refused(run("export", trace, trace, "--to", "bertviz", *out), "SOURCE", "got 2")
    refused(run("export", "no.zarr", "--to", "bertviz", *out), "no.zarr", "--text")
    refused(run("export", llama, "--to", "bertviz", *out), "is not a trace")
    refused(run("export", trace, "--to", "circuitsvis", *out), "--heads", "--layer", "none")
    refused(run("export", trace, "--to", "circuitsvis", "--layer", 0, "--heads", "L0H0", *out), "both")
    refused(run("export", trace, "--to", "circuitsvis", "--heads", "L9H9", *out), "L9H9")
    refused(run("export", trace, "--to", "bertviz", "--heads", "L0H0", *out), "--heads")
    refused(run("export", trace, "--to", "bertviz", "--view", "x", *out), "--view", "'x'")
    refused(run("export", trace, "--to", "bertviz", "--sample", 3, *out), "sample must be one of 0..0")
    refused(run("export", trace, "--to", "bertviz", "--out", "x.pdf"), "--out", ".json")
    refused(run("export", llama, "--to", "bertviz", "--text", "a", "--text", "b", *out), "--text", "got 2")
    refused(run("export", llama, "--to", "headvis", "--text", WORDS), "--out")
    refused(run("export", llama, "--to", "headvis", "--lines", "no.txt", "--out", tmp_path / "data"), "no.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.zarr"]


# --- prune


def test_a_smaller_checkpoint_answers_as_the_masked_model(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = run("prune", llama, "--heads", EVEN, "--out", out, "--text", WORDS, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert Heads.parse(told["removed"]) == Heads.parse(EVEN) and told["zeroed"] == ""
    assert (
        told["parameters_after"] < told["parameters_before"]
        and 0 <= told["largest_difference"] < 1e-4 * told["largest_logit"]
    )
    model, small = interp.load(llama), interp.load(out)
    inputs = model.encode(MORE)
    with torch.no_grad():
        with hooked(model, interventions=[MaskHeads(EVEN, kind="zero")]):
            wanted = model(inputs).logits
        torch.testing.assert_close(small(small.encode(MORE)).logits, wanted, atol=1e-4, rtol=1e-4)
        assert (model(inputs).logits - wanted).abs().max() > 0.01, "these heads do something"
    assert anatomy(small).stacks["text"][0].n_heads == 2
    weights = lambda folder: sum(f.stat().st_size for f in folder.glob("*.safetensors"))  # noqa: E731
    assert weights(out) < weights(llama)
    shown = run("prune", llama, "--heads", EVEN, "--out", tmp_path / "again")
    assert shown.exit_code == 0 and "fewer" in shown.stdout and "loaded again" in shown.stdout


def test_what_cannot_be_removed_is_refused_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small"
    refused(run("prune", llama, "--heads", "L0H0", "--out", out), "as many in every layer", "uneven='zero'")
    refused(run("prune", llama, "--heads", "L9H0", "--out", out), "L9H0")
    refused(run("prune", llama, "--heads", EVEN, "--out", tmp_path), "--out", "must not exist")
    refused(run("prune", llama, "--heads", EVEN, "--out", out, "--uneven", "x"), "--uneven", "'x'")
    done = run("prune", llama, "--heads", "L0H0", "--out", out, "--uneven", "zero", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["zeroed"] == "L0H0"
    gpt2 = interp.load(build("gpt2").module, processor=tiny_tokenizer())
    monkeypatch.setattr(cli_common, "load_model", lambda *a, **k: gpt2)
    refused(run("prune", "gpt2", "--heads", "L*H1", "--out", tmp_path / "gpt2"), "hidden_size / heads", "GPT2")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_checkpoint_that_answers_otherwise_is_taken_away(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cli_prune._difference
    monkeypatch.setattr(cli_prune, "_difference", lambda *a: (1.0 + real(*a)[0], 1.0))
    failed = run("prune", llama, "--heads", EVEN, "--out", tmp_path / "small")
    assert failed.exit_code == 1 and "nothing is written" in failed.stderr

    def broken(*_: Any) -> Any:
        raise OSError("no memory")

    monkeypatch.setattr(cli_prune, "_difference", broken)
    refused(run("prune", llama, "--heads", EVEN, "--out", tmp_path / "small"), "no memory")
    assert list(tmp_path.iterdir()) == []
