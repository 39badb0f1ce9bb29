"""``headscope sweep`` on a tiny saved model: prompts, pairs, probes, folders, and lines that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from interp.cli import app
from interp.scores import open_score

WORDS = [" ".join(f"w{i}" for i in range(start, start + 10)) for start in (10, 25, 40)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


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


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in WORDS))
    return path


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr


def test_texts_are_swept_and_written(llama: str, texts: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "score.json", tmp_path / "job"
    result = run(llama, "--prompts", texts, "--kind", "zero", "--folder", folder, "--out", out, "--top", 3)
    assert result.exit_code == 0, result.output
    assert "ablation, nats" in result.stdout and str(out) in result.stdout
    written = open_score(out)
    assert written.sizes["sample"] == 3 and written.attrs["settings"]["kind"] == "zero"
    again = run(llama, "--prompts", texts, "--kind", "zero", "--folder", folder, "--json", "--top", 12)
    told = json.loads(again.stdout)
    assert told["missing"] == 0 and len(told["heads"]) == 12
    best = {head["id"]: head["value"] for head in told["heads"]}
    np.testing.assert_allclose(best["L1H2"], float(written["value"].sel(layer=1, head=2)))


def test_parts_of_an_array_by_the_command(llama: str, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    first = run(llama, "--prompts", texts, "--kind", "zero", "--folder", folder, "--part", "0/2")
    assert first.exit_code == 0 and "1 tasks are not done" in first.stdout
    second = run(llama, "--prompts", texts, "--kind", "zero", "--folder", folder, "--part", "1/2", "--json")
    assert json.loads(second.stdout)["missing"] == 0


def test_pairs_and_settings(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"text": text, "corrupt": text.replace("w1", "w2"), "answer": " w50", "foil": " w60"} for text in WORDS[:1]
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    result = run(llama, "--prompts", path, "--metric", "logit_difference", "--set", "effect=direct", "--json")
    told = json.loads(result.stdout)
    assert told["settings"]["metric"] == "logit_difference" and told["settings"]["effect"] == "direct"
    assert told["unit"] == "logits"
    other = run(llama, "--prompts", path, "--score", "attribution_patching", "--set", "steps=2", "--json")
    assert json.loads(other.stdout)["settings"]["steps"] == 2


def test_a_shortlist_shows_its_rank_correlation(llama: str, texts: Path) -> None:
    result = run(llama, "--prompts", texts, "--kind", "zero", "--shortlist", 4)
    assert result.exit_code == 0 and "rank correlation of gradient and ablation" in result.stdout


def test_lines_that_cannot_be_used_are_named_and_the_rest_goes_on(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    lines = [
        json.dumps({"text": WORDS[0]}),
        "",
        "{oops",
        json.dumps({"txt": "x"}),
        json.dumps({"text": WORDS[1]}),
        json.dumps([1]),
    ]
    path.write_text("\n".join(lines))
    result = run(llama, "--prompts", path, "--kind", "zero", "--json")
    assert json.loads(result.stdout)["heads"][0]["n"] == 2
    for number, why in ((2, "empty"), (3, "no JSON"), (4, "no text"), (6, "no text")):
        assert f"line {number} of {path} is left out: {why}" in result.stderr, result.stderr
    half = tmp_path / "half.jsonl"
    half.write_text(json.dumps({"text": WORDS[0], "answer": " w50"}))
    refused(run(llama, "--prompts", half), "a pair needs text, corrupt, answer, foil", "at least one line")


def test_a_prompt_too_short_is_left_out_by_name(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in (WORDS[0], "w10", WORDS[1])))
    result = run(llama, "--prompts", path, "--kind", "zero")
    assert result.exit_code == 0 and "prompt 1 is left out" in result.stderr and "two ordinary tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "no.jsonl"], ["--prompts must be a file"]),
        (["--probe", "NoSuch"], ["must be one of"]),
        (["--probe", "Passages", "--prompts", "x"], ["must not both"]),
        (["--part", "3"], ["--part must be i/n"]),
        (["--set", "novalue"], ["--set must be name=value"]),
        (["--out", "x.xlsx"], ["--out must end in"]),
        (["--score", "magic"], ["score must be one of"]),
        (["--kind", "half"], ["kind must be one of"]),
        (["--split", "head"], ["split must be"]),
    ],
)
def test_bad_options_are_named(llama: str, texts: Path, arguments: list[str], words: list[str]) -> None:
    given = [] if "--prompts" in arguments or "--probe" in arguments else ["--prompts", texts]
    refused(run(llama, *given, *arguments), *words)


def test_texts_and_pairs_do_not_mix(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    pair = {"text": WORDS[0], "corrupt": WORDS[1], "answer": " w50", "foil": " w60"}
    path.write_text(f"{json.dumps(pair)}\n{json.dumps({'text': WORDS[2]})}")
    refused(run(llama, "--prompts", path), "all texts or all pairs")


def test_every_score_of_these_is_listed() -> None:
    listed = CliRunner().invoke(app, ["scores", "--json"])
    by_name = {entry["name"]: entry for entry in json.loads(listed.stdout)}
    mine = (
        "ablation", "direct_effect", "logit_attribution", "activation_patching", "attribution_patching", "path_patching",
        "head_gates", "write_norm", "entry_influence", "vit_importance",
    )  # fmt: skip
    for name in mine:
        entry = by_name[name]
        assert entry["paper"] and entry["unit"] and entry["summary"] and entry["control"], name
