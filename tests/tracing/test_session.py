"""Sessions: installed and restored, seen from every thread, nested, and what the first week of a user brings."""

import threading
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import interp
from interp.attention import Edit, Temperature
from interp.models.anatomy import AnatomyError
from interp.testing import build
from interp.tracing import CaptureError, CaptureTooLargeError, Intervention, SessionError
from interp.tracing.dispatch import NAME

ROWS = interp.Capture(row_stats=True)


@pytest.fixture
def llama():
    specimen = build("llama")
    specimen.module.generation_config.eos_token_id = None
    specimen.module.generation_config.pad_token_id = 0
    return specimen


def ids_of(specimen, length=10):
    return specimen.inputs["input_ids"][:1, :length]


class Scale(Intervention):
    def __init__(self, gain):
        self.gain = gain

    def before(self, call):
        from interp.attention import Edit, Gain

        return Edit((Gain(self.gain),))


def test_generate_gives_one_trace_with_prompt_and_generated_rows(llama):
    ids = ids_of(llama)
    with interp.hooked(llama.module, capture=interp.Capture(row_stats=True, attention=True, received=True)) as run:
        out = llama.module.generate(ids, max_new_tokens=5, do_sample=False)
    data = run.trace["text"]
    assert data.sizes["query"] == 10 + 5 - 1
    assert data["phase"].values.tolist() == ["prefill"] * 10 + ["generated"] * 4
    assert data["token_fed_id"].values[0].tolist() == out[0, :-1].tolist()
    assert data["token_produced_id"].values[0, 9:].tolist() == out[0, 10:].tolist()
    with torch.no_grad(), interp.hooked(llama.module, capture=interp.Capture(attention=True, received=True)) as whole:
        llama.module(out[:, :-1])
    assert np.abs(whole.trace["text"]["attention"].values - data["attention"].values).max() < 1e-5
    split, together = data["received"].values, whole.trace["text"]["received"].values
    assert np.abs(np.nan_to_num(split).sum(3) - np.nan_to_num(together).sum(3)).max() < 1e-4
    assert data["received_rows"].values[0, 0, 0, :, 0].tolist() == [10, 4]


def test_a_loop_of_prompts_gives_a_trace_each_and_trace_refuses_to_choose(llama):
    with torch.no_grad(), interp.hooked(llama.module, capture=ROWS) as run:
        for length in (4, 7, 9):
            llama.module(ids_of(llama, length))
    assert [t["text"].sizes["query"] for t in run.traces] == [4, 7, 9]
    with pytest.raises(SessionError, match="got 3"):
        _ = run.trace


def test_streaming_from_a_thread_is_seen(llama):
    from transformers import TextIteratorStreamer

    class Numbers:
        def decode(self, ids, **options):
            return " ".join(map(str, ids))

    streamer = TextIteratorStreamer(Numbers())
    plain = llama.module.generate(ids_of(llama), max_new_tokens=4, do_sample=False)
    with interp.hooked(llama.module, capture=ROWS) as run:
        options = {"max_new_tokens": 4, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=llama.module.generate, args=(ids_of(llama),), kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text.split()[-1] == str(plain[0, -1].item())
    assert run.trace["text"].sizes["query"] == 13


def test_a_second_thread_may_not_open_a_session_on_the_same_model_but_on_another_it_may(llama):
    other = build("gpt2").module
    caught, entered, release = [], threading.Event(), threading.Event()

    def second():
        try:
            with interp.hooked(llama.module):
                pass
        except SessionError as error:
            caught.append(str(error))
        with interp.hooked(other):
            entered.set()
            release.wait(10)

    with interp.hooked(llama.module):
        thread = threading.Thread(target=second)
        thread.start()
        assert entered.wait(20)
        release.set()
        thread.join()
    assert "MainThread" in caught[0]
    assert llama.module.config._attn_implementation != NAME
    assert other.config._attn_implementation != NAME


def test_sessions_nest_edits_add_up_and_each_keeps_its_traces(llama):
    ids = ids_of(llama)
    with torch.no_grad():
        with interp.hooked(llama.module, interventions=[Scale(0.25)]):
            product = llama.module(ids).logits
        with interp.hooked(llama.module, capture=ROWS, interventions=[Scale(0.5)]) as outer:
            with interp.hooked(llama.module, capture=ROWS, interventions=[Scale(0.5)]) as inner:
                both = llama.module(ids).logits
            llama.module(ids)
    assert torch.allclose(product, both, atol=1e-6)
    assert (len(outer.traces), len(inner.traces)) == (2, 1)


def test_a_capture_inside_an_idle_session_sees_where_sites_begin():
    # A packed tower makes several calls a forward, which are told apart by where the module's forward began.
    specimen = build("qwen2_5_vl")
    capture = interp.Capture(attention=True, stacks=["vision"])
    with torch.no_grad():
        with interp.hooked(specimen.module, capture=capture) as alone:
            specimen.module(**specimen.inputs)
        with interp.hooked(specimen.module):
            specimen.module(**specimen.inputs)
            with interp.hooked(specimen.module, capture=capture) as inner:
                specimen.module(**specimen.inputs)
                specimen.module(**specimen.inputs)
    for trace in inner.traces:
        assert trace["vision"]["attention"].identical(alone.trace["vision"]["attention"])
    assert len(inner.traces) == 2


def test_only_towers_are_watched_for_where_a_site_begins():
    specimen = build("qwen2_5_vl")
    watched = lambda: {  # noqa: E731
        name for name, sub in specimen.module.named_modules() if any("_site_hook" in str(h) for h in sub._forward_pre_hooks.values())
    }  # fmt: skip
    sites = interp.anatomy(specimen.module).sites
    assert {site.stack for site in sites} >= {"text", "vision"}
    with interp.hooked(specimen.module):
        assert not watched()
        with interp.hooked(specimen.module, capture=ROWS):
            assert watched() == {site.name for site in sites if site.stack == "vision"}
    assert not watched()


def test_an_exception_in_the_model_restores_everything_and_leaves_no_trace(llama):
    before = llama.module.config._attn_implementation

    class Breaks(Intervention):
        def before(self, call):
            raise RuntimeError("broken on purpose")

    with (
        pytest.raises(RuntimeError, match="on purpose"),
        interp.hooked(llama.module, capture=ROWS, interventions=[Breaks()]) as run,
    ):
        llama.module(ids_of(llama))
    assert llama.module.config._attn_implementation == before
    assert not run.traces
    assert "generate" not in vars(llama.module)


def test_ctrl_c_while_generating_leaves_a_usable_session_and_a_restored_model(llama):
    class Interrupts(Intervention):
        calls = 0

        def before(self, call):
            self.calls += 1
            if self.calls == 8:
                raise KeyboardInterrupt

    plain = llama.module.generate(ids_of(llama), max_new_tokens=4, do_sample=False)
    with interp.hooked(llama.module, capture=ROWS, interventions=[Interrupts()]) as run:
        with pytest.raises(KeyboardInterrupt):
            llama.module.generate(ids_of(llama), max_new_tokens=6, do_sample=False)
        again = llama.module.generate(ids_of(llama), max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, again)
    assert len(run.traces) == 1
    assert run.trace["text"].sizes["query"] == 13
    assert llama.module.config._attn_implementation != NAME


def test_ctrl_c_in_a_bare_forward_does_not_hide_the_next_one(llama):
    class Interrupts(Intervention):
        done = False

        def before(self, call):
            if not self.done:
                self.done = True
                raise KeyboardInterrupt

    with torch.no_grad(), interp.hooked(llama.module, capture=ROWS, interventions=[Interrupts()]) as run:
        with pytest.raises(KeyboardInterrupt):
            llama.module(ids_of(llama))
        llama.module(ids_of(llama))
    assert len(run.traces) == 1


def test_reset_clears_what_a_notebook_left_open(llama):
    before = llama.module.config._attn_implementation
    session = interp.hooked(llama.module, capture=ROWS)
    session.__enter__()
    assert llama.module.config._attn_implementation == NAME
    assert interp.reset(llama.module) == 1
    assert interp.reset(llama.module) == 0
    assert llama.module.config._attn_implementation == before
    session.__exit__(None, None, None)


def test_multi_turn_with_a_kept_cache_records_the_new_positions(llama):
    from transformers import DynamicCache

    ids = ids_of(llama, 12)
    cache = DynamicCache(config=llama.module.config)
    capture = interp.Capture(attention=True)
    with torch.no_grad(), interp.hooked(llama.module, capture=capture) as run:
        llama.module(ids[:, :7], past_key_values=cache)
        llama.module(ids[:, 7:], past_key_values=cache)
        llama.module(ids)
    second, whole = run.traces[1]["text"], run.traces[2]["text"]
    assert second["query"].values.tolist() == [7, 8, 9, 10, 11]
    assert np.abs(second["attention"].values - whole["attention"].values[:, :, :, 7:]).max() < 1e-5


def test_prompt_lookup_decoding_drops_rejected_drafts(llama):
    ids = ids_of(llama, 6).repeat(1, 3)
    plain = llama.module.generate(ids, max_new_tokens=8, do_sample=False)
    with interp.hooked(llama.module, capture=interp.Capture(attention=True, received=True)) as run:
        out = llama.module.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, out)
    data = run.trace["text"]
    assert data["query"].values.tolist() == list(range(out.shape[1] - 1))
    with torch.no_grad(), interp.hooked(llama.module, capture=interp.Capture(attention=True, received=True)) as whole:
        llama.module(out[:, :-1])
    expected = whole.trace["text"]
    assert np.abs(expected["attention"].values - data["attention"].values).max() < 1e-5
    sums = np.nan_to_num(data["received"].values).sum(3), np.nan_to_num(expected["received"].values).sum(3)
    assert np.abs(sums[0] - sums[1]).max() < 1e-4


def test_assisted_decoding_records_the_main_model_only(llama):
    assistant = build("llama", seed=1).module
    assistant.generation_config.eos_token_id = None
    ids = ids_of(llama)
    plain = llama.module.generate(ids, max_new_tokens=6, do_sample=False)
    with interp.hooked(llama.module, capture=ROWS) as run:
        out = llama.module.generate(ids, max_new_tokens=6, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, out)
    assert run.trace["text"]["query"].values.tolist() == list(range(out.shape[1] - 1))


def test_rows_follow_beams(llama):
    ids = ids_of(llama)
    plain = llama.module.generate(ids, max_new_tokens=5, do_sample=False, num_beams=3, num_return_sequences=2)
    with interp.hooked(llama.module, capture=interp.Capture(attention=True)) as run:
        out = llama.module.generate(ids, max_new_tokens=5, do_sample=False, num_beams=3, num_return_sequences=2)
    assert torch.equal(plain, out)
    data = run.trace["text"]
    assert data.sizes["sample"] == 2
    with torch.no_grad(), interp.hooked(llama.module, capture=interp.Capture(attention=True)) as whole:
        llama.module(out[:, :-1])
    assert np.abs(whole.trace["text"]["attention"].values - data["attention"].values).max() < 1e-5


def test_samples_that_stop_early_end(llama):
    ids = llama.batch["input_ids"] if llama.batch else ids_of(llama).repeat(2, 1)
    mask = (llama.batch or {}).get("attention_mask")
    free = llama.module.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    stop = int(free[0, ids.shape[1] + 1])
    with interp.hooked(llama.module, capture=ROWS) as run:
        out = llama.module.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=stop, pad_token_id=0
        )
    entropy = run.trace["text"]["entropy"].values
    prompt = ids.shape[1]
    for sample, row in enumerate(out.tolist()):
        new = row[prompt:]
        made = new.index(stop) + 1 if stop in new else len(new)
        assert not np.isnan(entropy[sample, 0, 0, prompt : prompt + made - 1]).any()
        assert np.isnan(entropy[sample, 0, 0, prompt + made - 1 :]).all()


def test_peft_wrapped_and_compiled_models_are_seen(llama):
    peft = pytest.importorskip("peft")
    ids = ids_of(llama)
    with torch.no_grad():
        plain = llama.module(ids).logits
        compiled = torch.compile(llama.module, backend="eager")
        compiled(ids)
        for _ in range(2):
            with interp.hooked(compiled, capture=ROWS, interventions=[Scale(0.5)]) as run:
                changed = compiled(ids).logits
            assert run.trace["text"].sizes["query"] == 10
            assert not torch.allclose(plain, changed)
            assert torch.allclose(compiled(ids).logits, plain, atol=1e-6)
    wrapped = peft.get_peft_model(build("llama").module, peft.LoraConfig(target_modules=["q_proj"]))
    with interp.hooked(wrapped, capture=ROWS) as run:
        wrapped.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert run.trace["text"].sizes["query"] == 12


def test_a_pipeline_is_seen_and_answers_as_before(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TextGenerationPipeline

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(96)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", pad_token="w0")
    pipe = TextGenerationPipeline(build("llama").module, tokenizer=tokenizer)
    pipe.model.generation_config.eos_token_id = None

    def ask():
        return pipe("w12 w40 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]

    plain = ask()
    with interp.hooked(pipe, capture=ROWS) as run:
        assert ask() == plain
    with interp.hooked(pipe, interventions=[Scale(0.0)]):
        assert ask() != plain
    assert run.trace["text"].sizes["query"] == 3 + 4 - 1
    assert ask() == plain


def test_several_images_of_one_prompt_stay_apart():
    specimen = build("llava")
    one, module = specimen.inputs, specimen.module
    picture = one["input_ids"][0] == module.config.image_token_id
    first, stop = int(picture.nonzero()[0]), int(picture.nonzero()[-1]) + 1
    ids = torch.cat([one["input_ids"][:, :stop], one["input_ids"][:, first - 1 :]], 1)
    pixels = torch.cat([one["pixel_values"], one["pixel_values"].flip(-1)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    capture = interp.Capture(attention=True, row_stats=True)
    with interp.hooked(module, capture=capture) as run:
        module.generate(**inputs, max_new_tokens=3, do_sample=False)
    with torch.no_grad(), interp.hooked(module, capture=interp.Capture(attention=True, stacks=["vision"])) as alone:
        for image in pixels:
            module(**{**one, "pixel_values": image[None]})
    text, vision = run.trace["text"], run.trace["vision"]
    patches = stop - first
    assert text["image"].values[0, first:stop].tolist() == [0] * patches
    assert text["image"].values[0, stop + 1 : stop + 1 + patches].tolist() == [1] * patches
    assert vision.sizes["sample"] == 2
    assert vision["image"].values[:, 1].tolist() == [0, 1]
    for n, trace in enumerate(alone.traces):
        np.testing.assert_allclose(vision["attention"].values[n], trace["vision"]["attention"].values[0], atol=1e-5)
    on_images = text["attention"].values[0, ..., (text["image"].values[0] >= 0)].sum(0)
    np.testing.assert_allclose(text["mass"].sel(group="image").values[0], on_images, atol=1e-5)


def test_two_models_that_share_a_config_do_not_disturb_each_other():
    from transformers import LlamaForCausalLM

    first = build("llama").module
    torch.manual_seed(3)
    second = LlamaForCausalLM(first.config).eval()
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        alone = second(ids).logits
        with interp.hooked(first, capture=ROWS, interventions=[Scale(0.0)]) as run:
            assert torch.equal(second(ids).logits, alone)
            with interp.hooked(second, capture=ROWS) as other:
                assert torch.equal(second(ids).logits, alone)
            assert first.config._attn_implementation == NAME
    assert not run.traces
    assert len(other.traces) == 1
    assert first.config._attn_implementation == "sdpa"


def test_output_attentions_warns_and_says_what_to_use(llama):
    with warnings.catch_warnings(record=True) as caught, torch.no_grad(), interp.hooked(llama.module, capture=ROWS):
        warnings.simplefilter("always")
        llama.module(ids_of(llama), output_attentions=True)
    assert any("Capture(attention=True)" in str(w.message) for w in caught)


def test_a_softcap_that_sdpa_drops_is_told(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def as_in_transformers_5_17(*args, softcap=None, **options):
        return plain(*args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", as_in_transformers_5_17)
    gemma = build("gemma2")
    for implementation, told in (("sdpa", True), ("eager", False)):
        gemma.module.config._attn_implementation_internal = implementation
        with warnings.catch_warnings(record=True) as caught, torch.no_grad(), interp.hooked(gemma.module, capture=ROWS):
            warnings.simplefilter("always")
            gemma.module(ids_of(gemma))
        assert any("softcap of 3.0, which SDPA drops" in str(w.message) for w in caught) is told


def test_users_own_hooks_keep_working(llama):
    seen = []
    handle = llama.module.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].shape)
    )
    with torch.no_grad(), interp.hooked(llama.module, capture=ROWS):
        llama.module(ids_of(llama))
    llama.module(ids_of(llama))
    handle.remove()
    assert len(seen) == 2


def test_static_cache_and_four_dimensional_masks(llama):
    ids = ids_of(llama)
    capture = interp.Capture(attention=True)

    def generate():
        result = llama.module.generate(
            ids, max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return result.sequences, torch.stack(result.logits)

    plain, plain_logits = generate()
    with interp.hooked(llama.module, capture=capture) as run:
        out, logits = generate()
    assert torch.equal(plain, out)
    assert torch.equal(plain_logits, logits)
    assert run.trace["text"]["query"].values.tolist() == list(range(13))
    mask = torch.ones(1, 1, 13, 13).tril().bool()
    with torch.no_grad(), interp.hooked(llama.module, capture=capture) as whole:
        llama.module(out[:, :-1], attention_mask=mask)
    assert (
        np.abs(whole.trace["text"]["attention"].values - run.trace["text"]["attention"].values[..., :13]).max() < 1e-5
    )


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        ({"row_stats": True, "stacks": ["vision"]}, "stacks must be among"),
        ({"row_stats": True, "layers": [99]}, "layers must be within"),
        ({"row_stats": True, "heads": "L0H99"}, "L0H99|heads"),
        ({"row_stats": True, "groups": [0, 1, 8]}, "at most 8"),
        ({"topk": 9}, "between 0 and 8"),
        ({"rows": "first"}, "must be one of"),
    ],
)
def test_captures_that_cannot_be_are_refused_before_anything_runs(llama, capture, message):
    with pytest.raises(ValueError, match=message):
        interp.hooked(llama.module, capture=interp.Capture(**capture))
    assert llama.module.config._attn_implementation != NAME


def test_a_capture_that_does_not_fit_says_what_to_use_instead(llama):
    capture = interp.Capture(attention=True, memory_limit=1000)
    with (
        pytest.raises(CaptureTooLargeError, match="pooled=64"),
        torch.no_grad(),
        interp.hooked(llama.module, capture=capture),
    ):
        llama.module(ids_of(llama))
    assert llama.module.config._attn_implementation != NAME
    assert issubclass(CaptureTooLargeError, CaptureError)


def test_a_model_without_reachable_attention_is_refused():
    with pytest.raises(AnatomyError, match="at least one reachable attention site"):
        interp.hooked(_falcon())


def _falcon():
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(
        FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()


def test_unknown_things_are_refused(llama):
    with pytest.raises(TypeError, match="Capture"):
        interp.hooked(llama.module, capture={"row_stats": True})
    with pytest.raises(TypeError, match="Intervention"):
        interp.hooked(llama.module, interventions=["mask"])
    with pytest.raises((TypeError, ValueError)):
        interp.hooked(nn.Linear(2, 2))


def test_selection_of_layers_heads_and_rows(llama):
    ids = ids_of(llama)
    with torch.no_grad():
        with interp.hooked(llama.module, capture=interp.Capture(attention=True, row_stats=True)) as run:
            llama.module(ids)
        with interp.hooked(
            llama.module, capture=interp.Capture(attention=True, heads="L1H2,L2H0", queries=[-1, 3])
        ) as part:
            llama.module(ids)
        with interp.hooked(llama.module, capture=interp.Capture(row_stats=True, layers=[1], queries="last")) as last:
            llama.module(ids)
    whole, data = run.trace["text"]["attention"], part.trace["text"]["attention"]
    assert (data.layer.values.tolist(), data["head"].values.tolist(), data["query"].values.tolist()) == (
        [1, 2],
        [0, 2],
        [3, 9],
    )
    assert np.isnan(data.sel(layer=1, head=0)).all()
    assert np.allclose(data.sel(layer=1, head=2), whole.sel(layer=1, head=2, query=[3, 9]), atol=1e-6)
    assert last.trace["text"]["entropy"].sizes == {"sample": 1, "layer": 1, "head": whole.sizes["head"], "query": 1}


def test_offload_to_disk_meta_weights(llama, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = llama.module(ids_of(llama)).logits
    moved = accelerate.cpu_offload(build("llama").module, execution_device="cpu")
    with torch.no_grad(), interp.hooked(moved, capture=ROWS) as run:
        got = moved(ids_of(llama)).logits
    assert torch.allclose(plain, got, atol=1e-6)
    assert run.trace["text"].sizes["query"] == 10


def test_report_tells_which_way_each_site_went(llama):
    with torch.no_grad(), interp.hooked(llama.module, capture=interp.Capture(row_stats=True, layers=[0])) as run:
        llama.module(ids_of(llama))
        time.sleep(0)
    report = run.report()
    assert report["model.layers.0.self_attn"] == {"untouched": 1, "read by blockwise": 1}
    assert report["model.layers.1.self_attn"] == {"untouched": 1}
    edit = interp.Custom(before=lambda call: Edit((Temperature(2.0),)))
    with torch.no_grad(), interp.hooked(llama.module, interventions=[edit], backend="reference") as run:
        llama.module(ids_of(llama))
    assert run.report()["model.layers.0.self_attn"] == {"edited by reference": 1}
