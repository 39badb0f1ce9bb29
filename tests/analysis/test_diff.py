"""Two checkpoints compared, from Python and from the command line; rank-data from the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import interp
from interp.analysis import score
from interp.analysis.diff import diff, diff_figure, diff_table
from interp.analysis.running import AnalysisError
from interp.cli import app
from interp.testing import build
from probes.repeated import RepeatedTokens

PROBE = RepeatedTokens(n=4, length=12, vocabulary=range(10, 90))


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    base = build("llama").module
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        # Head 1 of layer 1 is made to look elsewhere; nothing below it changes.
        tuned.model.layers[1].self_attn.q_proj.weight[16:32] *= -1
    return base, tuned


def test_the_head_that_was_tuned_stands_out(pair: tuple[Any, Any]) -> None:
    result = diff(*pair, scores=("induction", "previous_token"), probe=PROBE)
    a, b = (score("induction", m, PROBE) for m in pair)
    one = result.sel(score="induction")
    np.testing.assert_allclose(one.difference.values, b.value.values - a.value.values)
    assert (
        (one.difference.values[0] == 0).all()
        and one.difference.values[1, 1] != 0
        and (one.difference.values[1, [0, 2, 3]] == 0).all()
    )
    paired = b.value_by_sample.values - a.value_by_sample.values
    np.testing.assert_allclose(one.se.values[1, 1], paired[:, 1, 1].std(ddof=1) / 2)
    assert (one.p_adjusted.values >= one.p.values - 1e-12)[np.isfinite(one.p.values)].all()
    rows = diff_table(result, top=1)
    assert len(rows) == 2 and rows[0]["score"] == "induction" and rows[0]["difference"] != 0
    drawn: Any = diff_figure(result).data
    assert [t.type for t in drawn] == ["heatmap", "scatter", "scatter"] * 2
    np.testing.assert_array_equal(np.array(drawn[0].z), one.difference.values)
    told: Any = diff_figure(result).layout.meta
    assert told["headscope"]["a"] == result.attrs["a"] and set(told["headscope"]["settings"]) == {
        "induction",
        "previous_token",
    }


def test_a_model_against_itself_and_weights_alone(pair: tuple[Any, Any]) -> None:
    base, tuned = pair
    same = diff(base, base, scores=("induction",), probe=PROBE)
    assert (same.difference.values == 0).all() and (same.p.values == 1).all() and float(same.rho[0]) == pytest.approx(1)
    weights = diff(base, tuned, scores=("qk_matching",))
    assert np.isnan(weights.p.values).all()
    np.testing.assert_allclose(weights.b.values[0, 1, 1], -weights.a.values[0, 1, 1], rtol=1e-5)


def test_what_cannot_be_compared(pair: tuple[Any, Any]) -> None:
    base, _ = pair
    with pytest.raises(AnalysisError, match="same heads"):
        diff(base, build("gemma2").module, scores=("induction",), probe=PROBE)
    with pytest.raises(AnalysisError, match="without repeats"):
        diff(base, base, scores=("induction", "induction"))

    class Own:
        def build(self, model: Any) -> Any:
            return RepeatedTokens(n=2, length=6, seed=id(model), vocabulary=range(10, 90)).build(model)

    with pytest.raises(AnalysisError, match="same samples"):
        diff(base, copy.deepcopy(base), scores=("induction",), probe=Own())


@pytest.fixture(scope="module")
def folders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base = shared / "models/stories260k"
    model = interp.load(base)
    with torch.no_grad():
        model.module.model.layers[2].self_attn.q_proj.weight.mul_(0.2)
    tuned = tmp_path_factory.mktemp("tuned")
    model.module.save_pretrained(tuned)
    model.tokenizer.save_pretrained(tuned)
    return str(base), str(tuned)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.real("stories260k")
def test_the_command_diff(folders: tuple[str, str], tmp_path: Path) -> None:
    done = run("diff", *folders, "--score", "previous_token", "--score", "entropy", "--json", "--top", 2)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["scores"]) == {"previous_token", "entropy"} and len(found["heads"]) == 4
    assert all(int(row["id"][1]) >= 2 for row in found["heads"])
    for name in ("diff.json", "diff.csv", "diff.html"):
        done = run("diff", *folders, "--score", "previous_token", "--out", tmp_path / name)
        assert done.exit_code == 0 and (tmp_path / name).stat().st_size > 500, done.output
    assert len((tmp_path / "diff.csv").read_text().splitlines()) == 41
    assert len(json.loads((tmp_path / "diff.json").read_text())["heads"]) == 40
    for wrong, word in ((("--score", "nothing"), "--score must be one of"), (("--out", "x.txt"), "--out must end in")):
        done = run("diff", *folders, *wrong)
        assert done.exit_code == 2 and word in done.stderr


@pytest.mark.real("stories260k")
def test_the_command_rank_data(folders: tuple[str, str], tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "ranked.jsonl"
    data.write_text(
        '{"text": "Once upon a time there was a cat."}\n\n{"text": 3}\n{"text": "Tom and Tom went to the park."}\n'
    )
    done = run("rank-data", folders[0], data, "--heads", "L1H0-3", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["scored"] == 2 and [n for n, _ in found["left_out"]] == [2, 3]
    assert (
        "line 2 is left out: the line is empty" in done.stderr and "line 3 is left out: must have a text" in done.stderr
    )
    assert [json.loads(line)["rank"] for line in out.read_text().splitlines()] == [1, 2]
    scores = tmp_path / "heads.json"
    scores.write_text(json.dumps({f"{n}-{h}": [float(n == 4 and h == 6)] for n in range(5) for h in range(8)}))
    done = run("rank-data", folders[0], data, "--from-score", scores, "--json")
    # 5 % of 40 heads.
    assert (
        json.loads(done.stdout)["heads"].startswith("L4H6,") and len(json.loads(done.stdout)["heads"].split(",")) == 2
    )
    done = run("rank-data", folders[0], data, "--heads", "L9H0")
    assert done.exit_code == 2 and "L9H0" in done.stderr
    done = run("rank-data", folders[0], tmp_path / "none.jsonl", "--heads", "L1H0")
    assert done.exit_code == 2 and "FILE must be" in done.stderr
    with pytest.warns(UserWarning, match="no sample passed the gate"):
        done = run("rank-data", folders[0], data)
    assert done.exit_code == 2 and "no numbers" in done.stderr


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A saved tiny Llama with a tokenizer, and a LoRA adapter of it that changes layer 1's queries alone."""
    import peft
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("lora")
    base = build("llama").module
    base.save_pretrained(root / "base")
    words = {"<s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 96)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    tokenizer.save_pretrained(root / "base")
    torch.manual_seed(0)
    config: Any = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(root / "adapter")
    return str(root / "base"), str(root / "adapter")


def test_the_command_diff_takes_an_adapter_of_the_base(adapter: tuple[str, str]) -> None:
    done = run("diff", *adapter, "--score", "induction", "--json", "--top", 12)
    assert done.exit_code == 0, done.output
    heads = json.loads(done.stdout)["heads"]
    moved = {row["id"].partition("H")[0] for row in heads if row["difference"] != 0}
    # What lies below the adapted layer is untouched.
    assert "L1" in moved and "L0" not in moved


def test_an_adapter_that_does_not_fit_or_comes_first_is_refused(adapter: tuple[str, str], tmp_path: Path) -> None:
    base, folder = adapter
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "target_modules": ["nothing_like_it"], "r": 8})
    )
    for arguments, words in (((base, other), "B must be an adapter of A"), ((folder, base), "got the PEFT adapter")):
        done = run("diff", *arguments, "--score", "induction")
        assert done.exit_code == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.output
