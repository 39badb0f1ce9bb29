"""Tables: known answers of figures and differences, forced texts against decoding step by step, and resuming."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.evaluation import VCD, AnswerTask, CaptionTask, DoLa, Setting, evaluate, parse_setting
from interp.evaluation.answers import registered
from interp.evaluation.captions import scene_captions
from interp.evaluation.forced import scene_margins
from interp.evaluation.pope import PopeTask, scene_pope
from interp.evaluation.report import as_csv, as_json, cells, header, write
from interp.evaluation.store import StoreError
from interp.evaluation.tasks import Sample, Statistics
from interp.interventions import PAI, VHR, MaskHeads
from probes.intervals import paired_difference
from probes.mentions import WordMatcher
from probes.pope import Question
from probes.samples import ProbeError

FEW = Statistics(200)
SETTINGS = [parse_setting(t) for t in ("VHR(2)", 'MaskHeads("L1H*,L2H*")')]


# --- what figures say


def caption_task() -> CaptionTask:
    truth = {"a": ("cat", "dog"), "b": ("cat",)}
    return CaptionTask(dict.fromkeys(truth, None), truth, WordMatcher({"cat": ["cat"], "dog": ["dog"], "bee": ["bee"]}))


def told(task: CaptionTask, **texts: str) -> list[tuple[Sample, dict[str, Any]]]:
    return [(Sample(i, i), {"text": texts[i]}) for i in ("a", "b")]


def test_chair_and_its_paired_difference_by_hand() -> None:
    task = caption_task()
    plain = told(task, a="a cat and a bee", b="a dog and a bee")
    better = told(task, a="a cat and a dog", b="a cat")
    one, two = task.figures(plain, FEW), task.figures(better, FEW)
    assert (one["chair_i"].value, one["chair_s"].value, one["recall"].value) == (3 / 4, 1.0, 1 / 3)
    assert (two["chair_i"].value, two["chair_s"].value, two["recall"].value) == (0.0, 0.0, 1.0)
    change = task.differences(better, plain, FEW)
    assert change["chair_i"].value == -3 / 4 and change["words"].value == -1.5
    more = task.more(better, plain, FEW)
    assert more["same_texts"] == 0 and more["matched_recall"]["left_out"] == 1
    # At the first right object of image a both have made up nothing yet.
    assert more["matched_recall"]["differences"]["chair_i"][0] == 0.0
    # Image b is cut to two words: "a dog" against "a cat".
    assert more["matched_words"]["differences"]["chair_s"][0] == -1.0
    assert task.values(plain) == (["a", "b"], [1.0, 1.0])


def test_without_truth_length_and_repetition_are_told() -> None:
    task = CaptionTask({"a": None, "b": None})
    found = told(task, a="one two three four", b="go go go go go")
    figures = task.figures(found, FEW)
    assert figures["words"].value == 4.5 and figures["repetition"].value == 0.25 and set(task.shown) <= set(figures)
    assert "chair_i" not in figures


def test_pope_differences_are_of_the_figures_and_paired() -> None:
    questions: dict[str, list[Question]] = {
        s: [Question(n, f"i{n // 2}", "q", n % 2 == 0, "cat") for n in range(12)] for s in ("random", "popular")
    }
    task = PopeTask(questions, {f"i{k}": None for k in range(6)})
    rng = np.random.default_rng(0)
    samples = [Sample(f"{s} {q.question_id}", q.image, q, None, s) for s, some in questions.items() for q in some]
    one, two = (
        [(s, {"margin": float(m)}) for s, m in zip(samples, rng.normal(size=24), strict=True)] for _ in range(2)
    )
    a, b = task.figures(one, FEW), task.figures(two, FEW)
    change = task.differences(one, two, FEW)
    for name in a:
        assert change[name].value == pytest.approx(a[name].value - b[name].value), name
    assert task.differences(one, one, FEW)["auroc"][:3] == (0.0, 0.0, 0.0)
    right = [float((r["margin"] > 0) == s.content.label) for s, r in one]
    assert task.values(one)[1] == right and np.mean(right) == pytest.approx(a["accuracy"].value)
    # The accuracy of two splits of one size is a plain mean, so its interval is that of the mean by image.
    wrong = [float((r["margin"] > 0) == s.content.label) for s, r in two]
    expected = paired_difference(right, wrong, [s.unit for s in samples], **FEW.options())
    assert change["accuracy"].low == pytest.approx(expected.low) and change["accuracy"].high == pytest.approx(
        expected.high
    )


# --- what is run


def test_margins_are_those_of_decoding_step_by_step(scenes_model: Any) -> None:
    """Under VHR the forced text counts as generated: heads are chosen at the prompt's end, as when the text is decoded."""
    task = scene_margins("against", 2)
    result = evaluate(scenes_model, task, [parse_setting("VHR(3)")], batch=2, how=FEW)
    for (sample, record), item in zip(result.found[result["VHR(3)"].setting.key], task.items, strict=True):
        inputs = scenes_model.encode(item.prompt, image=item.image(), chat=True)
        tokens = scenes_model.tokenizer(item.prefix, add_special_tokens=False)["input_ids"]
        names = [
            scenes_model.tokenizer(f"{item.prefix} {name}", add_special_tokens=False)["input_ids"][len(tokens) :]
            for name in (item.absent, item.present)
        ]
        logs = []
        for name in names:
            with interp.hooked(scenes_model, interventions=[VHR(3.0)]), torch.no_grad():
                out = scenes_model(inputs, use_cache=True)
                total, mask = 0.0, inputs["attention_mask"]
                for token in [*tokens, *name]:
                    total += float(out.logits[0, -1].log_softmax(-1)[token])
                    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                    step = {"input_ids": torch.tensor([[token]]), "attention_mask": mask}
                    out = scenes_model(step, past_key_values=out.past_key_values, use_cache=True)
            logs.append(total)
        assert record["margin"] == pytest.approx(logs[0] - logs[1], abs=2e-3), sample.id
        assert record["extra_passes"] >= 1


def test_decoding_methods_act_on_forced_texts(scenes_model: Any) -> None:
    """Against whole forwards of the model, with both names' logits read where they would stand."""
    task = scene_margins("against", 3)
    vcd, dola = VCD(1.5), DoLa([2])
    chosen = [Setting("vcd", (vcd,)), Setting("dola", (dola,)), Setting("guided", (PAI(0.0, 1.5),))]
    result = evaluate(scenes_model, task, chosen, batch=3, how=FEW)
    picture = scenes_model.config.image_token_id
    head = scenes_model.module.get_output_embeddings()
    for n, item in enumerate(task.items):
        inputs = scenes_model.encode(item.prompt, image=item.image(), chat=True)
        rows = [
            scenes_model.tokenizer(f"{item.prefix} {name}", add_special_tokens=False)["input_ids"]
            for name in (item.absent, item.present)
        ]
        assert [len(r) for r in rows] == [len(rows[0])] * 2 and rows[0][:-1] == rows[1][:-1], (
            "one token tells the names apart"
        )
        ids = torch.cat([inputs["input_ids"], torch.tensor([rows[0][:-1]])], 1)
        grown = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            clean = scenes_model(grown, output_hidden_states=True)
            noisy = scenes_model({**grown, "pixel_values": vcd.noised(grown["pixel_values"])}).logits[0, -1]
            early = head(clean.hidden_states[2][0, -1])
            alone = scenes_model.module(input_ids=ids[ids != picture][None]).logits[0, -1]
        absent, present = rows[0][-1], rows[1][-1]
        margin, other, below, blind = (
            float(x[absent] - x[present]) for x in (clean.logits[0, -1], noisy, early, alone)
        )
        found = {r.setting.name: result.found[r.setting.key][n][1]["margin"] for r in result.rows}
        assert found["greedy"] == pytest.approx(margin, abs=1e-3)
        assert found["vcd"] == pytest.approx(2.5 * margin - 1.5 * other, abs=3e-3)
        assert found["dola"] == pytest.approx(margin - below, abs=1e-3)
        assert found["guided"] == pytest.approx(1.5 * margin - 0.5 * blind, abs=1e-3)


def test_a_table_of_captions(scenes_model: Any, tmp_path: Path) -> None:
    task = scene_captions("test", 3, max_new_tokens=14)
    chosen = [*SETTINGS, parse_setting("VHR(1)"), parse_setting("beam=2")]
    result = evaluate(scenes_model, task, chosen, batch=2, how=FEW)
    assert [r.setting.name for r in result.rows] == ["greedy", "VHR(2)", 'MaskHeads("L1H*,L2H*")', "VHR(1)", "beam=2"]
    greedy, off = result.rows[0], result["VHR(1)"]
    # An independent caption of the second scene, by itself.
    scene = list(task.items.values())[1]()
    inputs = scenes_model.encode("Describe the picture.", image=scene)
    alone = scenes_model.module.generate(**inputs, max_new_tokens=14, do_sample=False)
    text = scenes_model.decode(alone[0, inputs["input_ids"].shape[1] :]).strip()
    assert result.found[greedy.setting.key][1][1]["text"] == text
    assert off.more["same_texts"] == 1 and off.differences["words"][:3] == (0.0, 0.0, 0.0) and not greedy.differences
    assert result['MaskHeads("L1H*,L2H*")'].more["same_texts"] < 1
    assert result["VHR(2)"].extra_passes == 1 and greedy.extra_passes == 0
    assert all(r.tokens_per_second > 0 for r in result.rows)
    assert all(len(cells(result, r)) == len(header(result)) for r in result.rows)
    back = json.loads(json.dumps(as_json(result), allow_nan=False))
    assert back["rows"][1]["figures"]["words"][0] == result.rows[1].figures["words"].value
    lines = list(csv.DictReader(as_csv(result).splitlines()))
    of = next(x for x in lines if x["setting"] == "VHR(2)" and x["figure"] == "words")
    assert float(of["difference"]) == pytest.approx(result.rows[1].differences["words"].value)
    write(result, tmp_path / "made.html")
    page = (tmp_path / "made.html").read_text()
    assert "VHR(2)" in page and '<script src="http' not in page and "frontier" not in page
    with pytest.raises(ValueError, match=r"\.json"):
        write(result, tmp_path / "made.png")


def test_a_killed_run_goes_on_and_nothing_is_done_twice(scenes_model: Any, tmp_path: Path) -> None:
    task = scene_pope(2, splits=("random",))
    whole = evaluate(scenes_model, task, SETTINGS, batch=4, how=FEW)

    def killed(name: str, done: int, total: int) -> None:
        if done == 8 and name == "VHR(2)":
            raise KeyboardInterrupt

    folder = tmp_path / "job"
    with pytest.raises(KeyboardInterrupt):
        evaluate(scenes_model, task, SETTINGS, batch=4, how=FEW, folder=folder, progress=killed)
    files = sorted(folder.glob("*.jsonl"))
    lines = {f.name: f.read_text().splitlines() for f in files}
    assert sorted(map(len, lines.values())) == [4, 8, 8], "two settings have done a batch more"
    # The kill fell into a line.
    files[0].write_text("\n".join(lines[files[0].name][:-1]) + "\n" + lines[files[0].name][-1][:20])
    asked: list[int] = []
    module, original = scenes_model.module, scenes_model.module.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(len(kwargs["input_ids"]))
        return original(*args, **kwargs)

    counted.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    module.forward = counted
    try:
        again = evaluate(scenes_model, task, SETTINGS, batch=4, how=FEW, folder=folder)
    finally:
        del module.forward
    assert again.resumed == 19
    for a, b in zip(whole.rows, again.rows, strict=True):
        assert a.setting.key == b.setting.key
        one, two = (r.found[a.setting.key] for r in (whole, again))
        assert [s.id for s, _ in one] == [s.id for s, _ in two]
        np.testing.assert_allclose([r["margin"] for _, r in one], [r["margin"] for _, r in two], atol=1e-4)
    for file in files:
        ids = [json.loads(line)["id"] for line in file.read_text().splitlines()]
        assert len(ids) == len(set(ids)) == 12
    # Nothing is left to do: the model is asked for the form of its answers alone.
    done = evaluate(scenes_model, task, SETTINGS, batch=4, how=FEW, folder=folder)
    assert done.resumed == 36 and done.rows[1].figures == again.rows[1].figures
    # A changed setting is a new one, an other task is refused, and so is a folder of something else.
    evaluate(scenes_model, task, [parse_setting("VHR(2.5)")], batch=6, how=FEW, folder=folder)
    assert len(list(folder.glob("*.jsonl"))) == 4
    with pytest.raises(StoreError, match="another task"):
        evaluate(scenes_model, scene_pope(3, splits=("random",)), [], folder=folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreError, match="must be new"):
        evaluate(scenes_model, task, [], folder=tmp_path / "other")


def test_what_cannot_act_is_refused_or_told(scenes_model: Any) -> None:
    task = scene_margins("test", 2, batch=2)
    settings = [parse_setting("VAR(tau=2000)"), parse_setting("MaskHeads(L0H0)")]
    with pytest.raises(ValueError, match="VAR"):
        evaluate(scenes_model, task, settings, how=FEW)
    result = evaluate(scenes_model, task, settings, how=FEW, refuse=False)
    assert result.rows[1].problem and not result.rows[1].figures and result.rows[2].figures
    assert "cannot act" in cells(result, result.rows[1])[1] and as_json(result)["rows"][1]["problem"]
    assert "VAR(tau=2000)" in as_csv(result)
    with pytest.raises(ValueError, match="L99H0"):
        evaluate(scenes_model, task, [parse_setting("MaskHeads(L99H0)")])


# --- probes of text


class Digits:
    """Five prompts of several lengths; judged right are answers whose first id is even."""

    max_new_tokens = 3
    judges = "ids"

    def build(self, model: Any) -> list[Any]:
        from probes.samples import Sample as Prompt

        made = []
        for n in range(5):
            sample = Prompt(tuple(range(10 + n, 20 + 2 * n)))
            object.__setattr__(sample, "answer_ids", (30 + n, 40, 41)[: 1 + n % 3])
            made.append(sample)
        return made

    def judge(self, sample: Any, answer: tuple[int, ...]) -> bool:
        return answer[0] % 2 == 0


@pytest.fixture(scope="module")
def llama() -> Any:
    from interp.testing import build
    from tests.probes.test_margin import tiny_tokenizer

    return interp.load(build("llama").module, processor=tiny_tokenizer())


def test_answers_in_batches_are_those_of_single_samples(llama: Any) -> None:
    task = AnswerTask(Digits())
    setting = parse_setting("MaskHeads('L0H*')")
    result = evaluate(llama, task, [setting], batch=3, how=FEW)
    for interventions, row in (([], result.rows[0]), ([MaskHeads("L0H*")], result.rows[1])):
        right, logs = [], []
        for sample in Digits().build(llama):
            with interp.hooked(llama, interventions=interventions), torch.no_grad():
                ids = torch.tensor([sample.ids])
                new = llama.generate({"input_ids": ids}, max_new_tokens=1, do_sample=False)[0, -1]
                answer = torch.tensor([sample.answer_ids])
                out = llama({"input_ids": torch.cat([ids, answer], 1)}).logits[0, ids.shape[1] - 1 : -1]
            right.append(float(int(new) % 2 == 0))
            logs.append(float(out.log_softmax(-1).gather(-1, answer[0][:, None]).sum()))
        assert [r["accuracy"] for _, r in result.found[row.setting.key]] == right
        found = [r["answer_logprob"] for _, r in result.found[row.setting.key]]
        np.testing.assert_allclose(found, logs, atol=1e-4)
        assert row.figures["accuracy"].value == np.mean(right)


def test_probes_by_name() -> None:
    needle = registered("needle", 2, 5, {"lengths": (64,)})
    assert needle.describe()["probe"] == "NeedleInHaystack" and "seed=5" in needle.describe()["settings"]
    assert registered("ScenePairs", 4, 0).name == "contrast" and registered("IndirectObject", 4, 0).name == "answers"
    for name, settings, words in (("nothing", {}, "probe must be"), ("needle", {"depth": 1}, "depth")):
        with pytest.raises(ProbeError, match=words):
            registered(name, None, 0, settings)
