"""Policies that say what they do to every row still to come do just that, and are asked no more."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import PAI, VAR, VHR, Head, Knockout, MaskHeads, ScaleHeads, Streaming, Temperature
from interp.tracing import installation

HEADS = [Head(1, 0), Head(3, 2)]
SOME = {"rho": 0.05, "tau": 1.5, "summ": 0.01, "dims": (0, 1, 2), "skip_first": 1}
LAST = {
    "zero": lambda: [MaskHeads(HEADS, kind="zero")],
    "uniform": lambda: [MaskHeads(HEADS, kind="uniform")],
    "decode only": lambda: [MaskHeads(HEADS, kind="zero", scope="decode")],
    "prefill only": lambda: [MaskHeads(HEADS, kind="zero", scope="prefill")],
    "scale": lambda: [ScaleHeads(HEADS, 0.3)],
    "temperature": lambda: [Temperature(HEADS, 3.0)],
    "streaming": lambda: [Streaming(HEADS, pattern=interp.interventions.SinkRecent(1, 6))],
    "VHR": lambda: [VHR(2.0)],
    "VAR": lambda: [VAR(0.9, **SOME)],
    "PAI": lambda: [PAI(0.5, layers=range(5))],
    "knockout": lambda: [Knockout("image", "generated")],
    "VHR, VAR, scale": lambda: [VHR(2.0), VAR(0.9, **SOME), ScaleHeads(HEADS, 0.3)],
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", LAST)
def test_asked_once_is_asked_always(name, options, deep_llava, llava_inputs, batched, run, monkeypatch):
    module = deep_llava(5)
    inputs = batched(llava_inputs(0), llava_inputs(3, before=2, after=7))
    asked: list[str] = []
    settle = installation.settle

    def counted(call, *rest):
        found = settle(call, *rest)
        asked.append("settled" if found is not None else "not")
        return found

    monkeypatch.setattr(installation, "settle", counted)
    ids, logits, session = run(module, inputs, LAST[name](), **options)
    assert set(asked) == {"settled"}
    monkeypatch.setattr(installation, "settle", lambda *_: None)
    always, wanted, other = run(module, inputs, LAST[name](), **options)
    assert torch.equal(ids, always)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert sum(map(sum, (x.values() for x in session.report().values()))) == sum(
        map(sum, (x.values() for x in other.report().values()))
    )


def test_a_policy_that_may_change_its_mind_is_asked_at_every_token(deep_llava, llava_inputs, run):
    steps: list[int] = []

    def after(call, z):
        steps.append(call.mask.q_offset)
        return z * len(steps)

    module = deep_llava(2)
    run(module, llava_inputs(), [VHR(2.0), interp.Custom(after=after)], tokens=4)
    n = llava_inputs()["input_ids"].shape[1]
    assert sorted(set(steps)) == [0, n, n + 1, n + 2]
    assert len([s for s in steps if s == n + 2]) == len([s for s in steps if s == n]) > 0


def test_two_edits_that_last_are_put_together_at_every_token(deep_llava, llava_inputs, run, monkeypatch):
    module, inputs = deep_llava(5), llava_inputs()
    both = [VAR(0.9, **SOME), Temperature(HEADS, 3.0)]
    _, logits, _ = run(module, inputs, both)
    monkeypatch.setattr(installation, "settle", lambda *_: None)
    assert torch.equal(logits, run(module, inputs, both)[1])


def test_a_capture_sees_every_token(deep_llava, llava_inputs, run):
    module, inputs = deep_llava(5), llava_inputs()
    with (
        torch.no_grad(),
        interp.hooked(
            module, capture=interp.Capture(row_stats=True), interventions=[MaskHeads(HEADS, kind="zero")]
        ) as session,
    ):
        module.generate(**inputs, do_sample=False, max_new_tokens=4)
    n = inputs["input_ids"].shape[1]
    assert session.trace["text"].sizes["query"] == n + 3


def test_a_second_branch_has_masks_of_its_own(deep_llava, llava_inputs, batched, monkeypatch):
    # Guidance runs the model on a cache of its own, whose masks hide nothing, between tokens of one whose masks do.
    text = deep_llava(4).model.language_model
    from transformers import LlamaForCausalLM

    module = LlamaForCausalLM(text.config).eval()
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def generate():
        with interp.hooked(module, interventions=[Temperature([Head(1, 0), Head(2, 1)], 3.0)]):
            out = module.generate(
                ids, attention_mask=mask, max_new_tokens=6, do_sample=False, guidance_scale=2.0, pad_token_id=0,
                eos_token_id=None, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        return torch.stack(out.logits)

    logits = generate()
    monkeypatch.setattr(installation, "settle", lambda *_: None)
    torch.testing.assert_close(logits, generate(), rtol=1e-5, atol=1e-5)


def test_sites_stay_settled_while_a_text_branch_runs_at_every_token(deep_llava, llava_inputs, run, monkeypatch):
    asked: list[str] = []
    site_call = installation.site_call
    monkeypatch.setattr(
        installation, "site_call", lambda site, *rest: (asked.append(site.name), site_call(site, *rest))[1]
    )
    counts = []
    for tokens in (4, 8):
        asked.clear()
        run(deep_llava(5), llava_inputs(), [PAI(0.5, 1.5, layers=range(5))], tokens=tokens)
        counts.append(len(asked))
    assert counts[0] == counts[1]


def test_a_batch_that_is_another_after_a_token_is_looked_at_anew(deep_llava, llava_inputs, batched):
    module, inputs = deep_llava(3), batched(llava_inputs(0), llava_inputs(3))
    with torch.no_grad(), interp.hooked(module, interventions=[VHR(2.0)]):
        seen = {}

        def loop(model, input_ids, **options):
            past = model(**inputs, use_cache=True).past_key_values
            token = input_ids[:, -1:]
            for step in range(3):
                if step == 2:
                    past.batch_repeat_interleave(3)
                    token = token.repeat_interleave(3, 0)
                mask = torch.ones(len(token), past.get_seq_length() + 1, dtype=torch.int64)
                out = model(input_ids=token, attention_mask=mask, past_key_values=past, use_cache=True)
                seen[step] = out.logits
            return input_ids

        module.generate(**inputs, custom_generate=loop)
    assert seen[2].shape[0] == 3 * seen[1].shape[0]
    torch.testing.assert_close(seen[2][0], seen[2][2])
