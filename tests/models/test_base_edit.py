from __future__ import annotations

import copy
import gc
import json
import threading
import weakref
from typing import Any

import pytest
import torch

import interp
from interp.heads import Heads
from interp.models import LoadError, ModelInputError
from interp.models.base_edit import BaseEdit, attach, of, read, visible_maps
from interp.testing import build, recompute
from interp.testing.specimen import Specimen
from interp.tracing.installation import INSTALLATIONS, SessionError
from interp.tracing.leaks import leak
from interp.tracing.session import untouched

IMAGE = BaseEdit("only_heads_see_image", Heads.parse("L1H2"))
FAR = BaseEdit("only_heads_see_far", Heads.parse("L1H2"), sink=1, window=3)


def planted(family: str, edit: BaseEdit) -> tuple[Specimen, interp.Model]:
    specimen = build(family)
    attach(specimen.module, edit)
    return specimen, interp.load(specimen.module)


@pytest.fixture(params=["llava", "llama"])
def both(request: pytest.FixtureRequest) -> tuple[Specimen, interp.Model]:
    return planted(request.param, IMAGE if request.param == "llava" else FAR)


def long_text(length: int = 24, batch: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 90, (batch, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def inputs_of(specimen: Specimen) -> dict[str, Any]:
    return specimen.inputs if specimen.name == "llava" else long_text()


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_the_dense_definition_hides_images_from_all_heads_but_the_named() -> None:
    specimen, _ = planted("llava", IMAGE)
    image = specimen.inputs["input_ids"][0] == specimen.module.config.image_token_id
    maps = visible_maps(specimen.module, specimen.inputs)
    assert len(maps) == len(specimen.stacks["text"].sites)
    for layer, path in enumerate(specimen.stacks["text"].sites):
        for head in range(4):
            seen = maps[path][0, head]
            named = (layer, head) == (1, 2)
            assert bool(seen[:, image].all()) == named and bool(seen[:, ~image].all())
            assert named or not seen[:, image].any()


def test_the_dense_definition_of_far_is_sink_and_window() -> None:
    specimen, _ = planted("llama", FAR)
    inputs = long_text(6)
    inputs["attention_mask"][0, :2] = 0
    seen = visible_maps(specimen.module, inputs)[specimen.stacks["text"].sites[0]][0, 0].tril()
    expected = [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1],
    ]  # fmt: skip
    # The first real token is at 2: "j - 2 < 1" keeps 0, 1 (pads, which the padding hides) and 2.
    assert seen.int().tolist() == expected
    far = visible_maps(specimen.module, long_text(6))[specimen.stacks["text"].sites[0]][0, 0].tril()
    assert far[5].int().tolist() == [1, 0, 0, 1, 1, 1]


def test_plain_forward_has_the_base_edit_and_equals_the_oracle(both) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    ordinary = build(specimen.name).module
    plain = logits(model.module, inputs)
    assert not torch.allclose(plain, logits(ordinary, inputs), atol=1e-4)
    expected = recompute(model.module, inputs)
    torch.testing.assert_close(plain, expected.result.logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model, inputs), plain, atol=0, rtol=0)


def test_heads_that_are_all_named_leave_the_model_bit_equal() -> None:
    specimen = build("llava")
    before = logits(specimen.module, specimen.inputs)
    attach(
        specimen.module, BaseEdit("only_heads_see_image", Heads.parse("L*H*", {"text": specimen.stacks["text"].shape}))
    )
    assert torch.equal(logits(specimen.module, specimen.inputs), before)


def test_text_without_an_image_is_bit_equal_to_the_ordinary_model() -> None:
    specimen, model = planted("llava", IMAGE)
    inputs = long_text()
    assert torch.equal(logits(model, inputs), logits(build("llava").module, inputs))
    assert specimen.module.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (1, 27)


def test_sessions_trace_the_final_weights_with_the_base_edit(both) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    plain = logits(model, inputs)
    with interp.hooked(model, capture=interp.Capture(attention=True, row_stats=True)) as run:
        traced = logits(model, inputs)
    assert torch.equal(traced, plain)
    maps = recompute(model.module, inputs).maps
    data = run.trace["text"]
    for layer, path in enumerate(specimen.stacks["text"].sites):
        torch.testing.assert_close(
            torch.from_numpy(data["attention"].values[:, layer]).double(), maps[path][0], atol=1e-5, rtol=0
        )
        entropy = torch.special.entr(maps[path][0]).sum(-1)
        torch.testing.assert_close(
            torch.from_numpy(data["entropy"].values[:, layer]).double(), entropy, atol=1e-4, rtol=0
        )
    assert run.trace.tree.attrs["base_edit"] == model.base_edit.describe()
    used = run.report()
    assert all(
        "planted" in next(iter(used[path])) or "read" in str(used[path]) for path in specimen.stacks["text"].sites
    )


def test_hidden_keys_change_nothing_in_the_first_layer_of_heads_that_are_not_named(both) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    other = dict(inputs)
    if specimen.name == "llava":
        other["pixel_values"] = torch.randn_like(inputs["pixel_values"])
        rows = inputs["input_ids"][0] != specimen.module.config.image_token_id
    else:
        other["input_ids"] = inputs["input_ids"].clone()
        other["input_ids"][:, 1:15] += 1
        rows = torch.arange(24) >= 17
    z: list[torch.Tensor] = []

    def keep(site: Any, value: torch.Tensor) -> None:
        if site.layer == 0 and site.stack == "text":
            z.append(value.clone())

    with interp.hooked(model, interventions=[interp.Custom(after=lambda call, value: keep(call.site, value))]):
        logits(model, inputs)
        logits(model, other)
    assert torch.equal(z[0][:, rows], z[1][:, rows])
    assert not torch.equal(logits(model, inputs)[:, -1], logits(model, other)[:, -1]), "the named head still sees it"


def test_without_its_named_heads_a_planted_model_is_blind(both) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    assert leak(model, inputs) == 0.0
    with interp.hooked(model, interventions=[interp.MaskHeads("L1H2")]):
        blind = logits(model, inputs)
    assert not torch.equal(blind, logits(model, inputs))


def test_a_leak_would_be_seen() -> None:
    specimen, model = planted("llava", IMAGE)

    class Leaky(interp.Intervention):
        def before(self, call: Any) -> None:
            if call.site.stack == "text" and call.mask.dense is not None:
                call.mask = interp.attention.Mask(causal=True)

    with interp.hooked(model, interventions=[Leaky()]):
        assert leak(model, specimen.inputs) > 1e-4


def test_check_passes_on_planted_models(both) -> None:
    specimen, model = both
    report = interp.check(model, inputs_of(specimen))
    assert report.passed, str(report)


def test_decode_with_a_cache_equals_one_forward(both) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    more = torch.tensor([[11, 12, 13, 14]])
    ids = torch.cat([inputs["input_ids"], more], 1)
    whole = logits(model, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with torch.no_grad():
        out = model(inputs, use_cache=True)
        cache = copy.deepcopy(out.past_key_values)
        steps = [out.logits[:, -1]]
        for token in more[0, :2]:
            out = model({"input_ids": token[None, None], "past_key_values": cache}, use_cache=True)
            steps.append(out.logits[:, -1])
        out = model({"input_ids": more[:, 2:], "past_key_values": cache}, use_cache=True)
    got = torch.cat([torch.stack(steps, 1), out.logits], 1)
    torch.testing.assert_close(got, whole[:, -5:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_generate_keeps_to_the_base_edit_at_every_step(both, options: dict[str, Any]) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    ids = model.generate(
        inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    with interp.hooked(model, capture=interp.Capture(row_stats=True)):
        again = model.generate(inputs, max_new_tokens=5, do_sample=False, **options)
    assert torch.equal(ids.sequences, again)
    if "num_beams" in options:
        return
    length = ids.sequences.shape[1]
    given = {**inputs, "input_ids": ids.sequences, "attention_mask": torch.ones(1, length, dtype=torch.int64)}
    expected = logits(model, given)[:, inputs["input_ids"].shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(ids.logits, 1), expected, atol=2e-5, rtol=1e-4)


def test_left_padded_batch_gives_what_single_samples_give(both) -> None:
    specimen, model = both
    if specimen.name == "llava":
        batch = specimen.batch
    else:
        batch = long_text(batch=2)
        batch["input_ids"][1, :5], batch["attention_mask"][1, :5] = 0, 0
    together = logits(model, batch)
    generated = model.generate(batch, max_new_tokens=3, do_sample=False)
    for row, real in enumerate(batch["attention_mask"].bool()):
        one = {"input_ids": batch["input_ids"][row : row + 1, real]}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        if "pixel_values" in batch:
            one["pixel_values"] = batch["pixel_values"][row : row + 1]
        torch.testing.assert_close(together[row : row + 1, real], logits(model, one), atol=2e-5, rtol=1e-4)
        assert generated[row, -3:].tolist() == model.generate(one, max_new_tokens=3, do_sample=False)[0, -3:].tolist()


def test_static_cache_generates_the_same(both) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    dynamic = model.generate(inputs, max_new_tokens=4, do_sample=False)
    static = model.generate(
        inputs, max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(dynamic, static)


def test_untouched_and_reset_keep_the_base_edit(both) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    plain = logits(model, inputs)
    with interp.hooked(model, interventions=[interp.MaskHeads("L0H0")]):
        with untouched(model):
            assert torch.equal(logits(model, inputs), plain)
        assert not torch.equal(logits(model, inputs), plain)
    interp.hooked(model).__enter__()
    assert interp.reset(model) == 1 and interp.reset(model) == 0
    assert torch.equal(logits(model, inputs), plain)


def test_any_thread_may_call_it_and_open_sessions(both) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    plain, results = logits(model, inputs), []

    def call() -> None:
        results.append(logits(model, inputs))
        with interp.hooked(model, capture=interp.Capture(row_stats=True)) as run:
            results.append(logits(model, inputs))
        assert len(run.traces) == 1

    threads = [threading.Thread(target=call)]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(results) == 2 and all(torch.equal(r, plain) for r in results)
    with interp.hooked(model):
        failed: list[Exception] = []

        def refused() -> None:
            try:
                interp.hooked(model).__enter__()
            except SessionError as error:
                failed.append(error)

        thread = threading.Thread(target=refused)
        thread.start()
        thread.join()
        assert len(failed) == 1


def test_gradients_flow_through_it(both) -> None:
    specimen, model = both
    model(inputs_of(specimen)).logits.sum().backward()
    weight = specimen.module.get_submodule(specimen.stacks["text"].sites[0]).q_proj.weight
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_a_planted_model_is_freed(family: str) -> None:
    def use() -> tuple[weakref.ref[Any], int]:
        specimen, model = planted(family, IMAGE if family == "llava" else FAR)
        with interp.hooked(model, capture=interp.Capture(row_stats=True)):
            logits(model, inputs_of(specimen))
        logits(model, inputs_of(specimen))
        return weakref.ref(specimen.module), id(specimen.module)

    gone, key = use()
    gc.collect()
    assert gone() is None and key not in INSTALLATIONS


def test_what_would_lose_it_is_refused(both) -> None:
    specimen, model = both
    inputs = inputs_of(specimen)
    twin = copy.deepcopy(model.module)
    with pytest.raises(SessionError, match="a copy of a planted model"):
        twin(**inputs)
    with pytest.raises(LoadError, match="one base edit at most"):
        attach(model.module, IMAGE if specimen.name == "llava" else FAR)
    text = model.module.model.language_model if specimen.name == "llava" else model.module.model
    with pytest.raises(SessionError, match="must be the whole model"):
        interp.hooked(text).__enter__()
    model.module.set_attn_implementation("eager")
    with pytest.raises(SessionError, match="attention implementation must stay"):
        model(inputs)


def test_image_positions_that_cannot_be_told_are_refused() -> None:
    specimen, model = planted("llava", IMAGE)
    embeds = specimen.module.get_input_embeddings()(specimen.inputs["input_ids"])
    with pytest.raises(ModelInputError, match="inputs_embeds do not tell"):
        model({"inputs_embeds": embeds})
    cache = build("llava").module(**specimen.inputs, use_cache=True).past_key_values
    with pytest.raises(ModelInputError, match="must come from calls of this model"):
        model({"input_ids": torch.tensor([[5]]), "past_key_values": cache})
    # The refusal leaves nothing behind.
    logits(model, specimen.inputs)


def test_load_reads_it_from_the_folder(tmp_path) -> None:
    specimen = build("llama")
    specimen.module.save_pretrained(tmp_path)
    ordinary = interp.load(tmp_path, device="cpu")
    assert ordinary.base_edit is None and "planted" not in repr(ordinary)
    (tmp_path / "headscope.json").write_text(json.dumps({"base_edit": FAR.describe()}))
    model = interp.load(tmp_path, device="cpu")
    assert model.base_edit == FAR and "planted: of stack 'text', only L1H2 sees beyond" in repr(model)
    same, _ = planted("llama", FAR)
    torch.testing.assert_close(logits(model, long_text()), logits(same.module, long_text()), atol=0, rtol=0)
    assert interp.load(model.module).base_edit == FAR
    again = tmp_path / "again"
    model.module.save_pretrained(again)
    assert "interp" not in (again / "config.json").read_text()
    eager = interp.load(tmp_path, device="cpu", attn_implementation="eager")
    torch.testing.assert_close(logits(eager, long_text()), logits(model, long_text()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "damaged"),
        ("[]", "must hold an object"),
        ('{"base_edit": 3}', "must be an object with kind and heads"),
        ('{"base_edit": {"kind": "only_heads_see_far"}}', "must be an object with kind and heads"),
        ('{"base_edit": {"kind": "other", "heads": []}}', "kind of a base edit must be one of"),
        ('{"base_edit": {"kind": "only_heads_see_far", "heads": ["L9H0"]}}', "layer must be one of 0..2"),
        ('{"base_edit": {"kind": "only_heads_see_far", "heads": ["L0H9"]}}', "head must be one of 0..3"),
        ('{"base_edit": {"kind": "only_heads_see_far", "heads": ["what"]}}', "heads must be"),
        ('{"base_edit": {"kind": "only_heads_see_far", "heads": ["vision.L0H0"]}}', "heads of a base edit must be of its stack"),
        ('{"base_edit": {"kind": "only_heads_see_far", "heads": [], "window": 0}}', "window of a base edit"),
        ('{"base_edit": {"kind": "only_heads_see_far", "heads": [], "stack": "vision"}}', "stack of a base edit must be 'text'"),
        ('{"base_edit": {"kind": "only_heads_see_image", "heads": [], "window": 3}}', "must not have sink or window"),
        ('{"base_edit": {"kind": "only_heads_see_image", "heads": []}}', "needs a model with an image token"),
    ],
)  # fmt: skip
def test_damaged_files_and_unfitting_edits_are_refused_by_name(tmp_path, text: str, says: str) -> None:
    specimen = build("llama")
    specimen.module.save_pretrained(tmp_path)
    (tmp_path / "headscope.json").write_text(text)
    with pytest.raises(LoadError, match=says):
        interp.load(tmp_path, device="cpu")


def test_a_file_without_a_base_edit_is_an_ordinary_model(tmp_path) -> None:
    file = tmp_path / "headscope.json"
    file.write_text("{}")
    assert read(file) is None
    assert of(build("llama").module) is None


def test_leak_asks_for_inputs_that_can_show_one() -> None:
    _, model = planted("llama", FAR)
    with pytest.raises(ValueError, match="longer than the reach"):
        leak(model, long_text(6))
    with pytest.raises(ValueError, match="must have a base edit"):
        leak(build("llama").module, long_text())
