"""Interventions on heads while a model generates: caches, batches, beams, turns, the same edit from token to token."""

import itertools
import json

import numpy as np
import pytest
import torch

import interp
from interp.heads import HeadError
from interp.interventions import (
    AddToHeads,
    Custom,
    GateHeads,
    HeadActivations,
    HeadMeans,
    KVGates,
    MaskHeads,
    Near,
    NormScales,
    PatchHeads,
    ScaleHeads,
    Shards,
    SinkRecent,
    Spans,
    Streaming,
    Temperature,
    TopKMask,
)
from interp.testing import build

HEADS = "L0H1,L1H2,L1H3,L2H0"
N = 4

# Every setting acts on all rows alike, so that a forward over the whole text shows what decoding must give.
STEADY = {
    "scale": lambda: ScaleHeads(HEADS, [0.0, 2.0, -1.0, 3.0]),
    "scale by position": lambda: ScaleHeads(HEADS, torch.linspace(0, 3, 26).expand(1, 1, -1)),
    "temperature": lambda: Temperature(HEADS, [0.3, 2.0, 3.0, 4.0]),
    "temperature by position": lambda: Temperature(HEADS, 2.0, beta=0.5),
    "streaming": lambda: Streaming(HEADS, pattern=SinkRecent(2, 4), scope="all"),
    "spans": lambda: Streaming("L*H*", pattern=Spans(np.arange(12).reshape(3, 4), sink=1), scope="all"),
    "near": lambda: Streaming(HEADS, pattern=Near(3), scope="all"),
    "drop": lambda: TopKMask(HEADS, k=3, p=0.7, seed=5),
    "drop the top": lambda: TopKMask(HEADS, k=2, p=1.0, sampling="top"),
    "keep": lambda: TopKMask(HEADS, k=3, mode="keep"),
    "gate": lambda: GateHeads("L*H*", shared=0.25, routed=0.25),
    "soft gate": lambda: GateHeads("L*H*", shared=0.0, routed=0.5, gates="soft"),
    "add": lambda: AddToHeads(HEADS, torch.linspace(-1, 1, 64).view(4, 16), alpha=3.0, scope="all"),
    "mask": lambda: MaskHeads(HEADS, kind="uniform"),
    "first token": lambda: MaskHeads(HEADS, kind="first_token"),
}
ON_DECISION = {
    "add to the deciding row": lambda: AddToHeads(HEADS, torch.linspace(-1, 1, 64).view(4, 16), alpha=3.0),
    "mask the deciding row": lambda: MaskHeads(HEADS, scope="next"),
    "streaming cached": lambda: Streaming(HEADS, pattern=SinkRecent(1, 3)),
    "scale decode": lambda: ScaleHeads(HEADS, -1.0, scope="decode"),
    "scale the prompt's end": lambda: ScaleHeads(HEADS, -2.0, rows=[-1, -2]),
}
ALL = {**STEADY, **ON_DECISION}
# One edit for all tokens where nothing of it depends on the token.
SAME_EDIT = ["scale", "temperature", "streaming", "near", "mask", "scale decode", "streaming cached"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def plain(llama):
    return generate(llama, llama.batch)


def generate(specimen, inputs, *interventions, **options):
    settings = {"max_new_tokens": N, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with interp.hooked(specimen.module, interventions=interventions):
        return specimen.module.generate(**inputs, **settings, **options)


def forward(specimen, inputs, *interventions):
    with torch.no_grad(), interp.hooked(specimen.module, interventions=interventions):
        return specimen.module(**inputs).logits


def alone(batch, sample):
    """A sample of a left-padded batch without its pads."""
    first = int(batch["attention_mask"][sample].argmax())
    return {k: v[sample : sample + 1, first:] for k, v in batch.items()}


@pytest.mark.parametrize("name", STEADY)
def test_decoding_with_a_cache_gives_what_a_forward_over_the_whole_text_gives(llama, name):
    out = generate(llama, llama.inputs, STEADY[name]())
    ids = out.sequences
    # The spans of MoA grow with the prompt, which is longer in the forward; these do not.
    whole = forward(llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, STEADY[name]())
    for step, logits in enumerate(out.logits):
        assert torch.allclose(logits, whole[:, 23 + step], atol=2e-4), step
    assert not torch.allclose(out.logits[-1], generate(llama, llama.inputs).logits[-1], atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_a_left_padded_batch_generates_what_its_samples_generate_alone(llama, name, plain):
    both = generate(llama, llama.batch, ALL[name]())
    changed = False
    for sample in range(2):
        one = generate(llama, alone(llama.batch, sample), ALL[name]())
        for step in range(N):
            assert torch.allclose(both.logits[step][sample], one.logits[step][0], atol=3e-4), (sample, step)
            changed |= not torch.allclose(both.logits[step][sample], plain.logits[step][sample], atol=1e-3)
    assert changed


@pytest.mark.parametrize("name", ALL)
def test_beams_of_a_batch_are_the_beams_of_its_samples(llama, name):
    both = generate(llama, llama.batch, ALL[name](), num_beams=3)
    for sample in range(2):
        one = generate(llama, alone(llama.batch, sample), ALL[name](), num_beams=3)
        assert both.sequences[sample, -N:].tolist() == one.sequences[0, -N:].tolist()


@pytest.mark.parametrize("name", ["scale", "temperature by position", "streaming", "drop", "keep", "gate", "add"])
def test_a_second_turn_on_a_kept_cache_is_a_forward_over_both(llama, name):
    first, second = llama.inputs["input_ids"], build("llama", seed=3).inputs["input_ids"][:, :7]
    both = torch.cat([first, second], 1)
    with torch.no_grad(), interp.hooked(llama.module, interventions=[STEADY[name]()]):
        cache = llama.module(input_ids=first, use_cache=True).past_key_values
        mask = torch.ones_like(both)
        turn = llama.module(input_ids=second, past_key_values=cache, attention_mask=mask).logits
    whole = forward(llama, {"input_ids": both, "attention_mask": mask}, STEADY[name]())
    assert torch.allclose(turn, whole[:, 24:], atol=2e-4)


@pytest.mark.parametrize("name", SAME_EDIT)
def test_tokens_and_layers_that_are_edited_alike_share_one_edit(llama, name):
    edits = {}
    watch = Custom(before=lambda call: edits.setdefault((call.site.layer, call.mask.q_offset), call.edits[-1]) and None)
    generate(llama, llama.inputs, ALL[name](), watch)
    decoding = {layer: {id(e) for (own, at), e in edits.items() if own == layer and at >= 24} for layer in range(3)}
    assert all(len(found) == 1 for found in decoding.values())
    assert all(e is not None for (_, at), e in edits.items() if at >= 24)
    # The same heads in two layers: the same edit, so that the op prepares for it once.
    edits.clear()
    generate(llama, llama.inputs, MaskHeads("L0H1,L2H1"), watch)
    assert edits[0, 25] is edits[2, 25] and edits[1, 25] is None


OFF = {
    "no heads": lambda: ScaleHeads([], 0.0),
    "scale": lambda: ScaleHeads("L*H*", [1.0] * 12),
    "temperature": lambda: Temperature("L*H*", 1.0, beta=0.0),
    "streaming": lambda: Streaming([], scope="all"),
    "streaming gates": lambda: Streaming(KVGates(np.ones((3, 2)), sparsity=0.0)),
    "k": lambda: TopKMask("L*H*", k=0),
    "p": lambda: TopKMask("L*H*", p=0.0),
    "keep all": lambda: TopKMask("L*H*", k=1000, mode="keep"),
    "gate": lambda: GateHeads("L*H*", shared=0.75, routed=0.25),
    "add": lambda: AddToHeads("L0H1", [torch.ones(16)], alpha=0.0),
    "patch": lambda: PatchHeads([], HeadActivations({}, ("z",))),
    "mask": lambda: MaskHeads([]),
}


@pytest.mark.parametrize("name", OFF)
def test_off_is_token_identical_and_leaves_every_call_untouched(llama, name, plain):
    with interp.hooked(llama.module, interventions=[OFF[name]()]) as run:
        out = llama.module.generate(
            **llama.batch, max_new_tokens=N, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))
    assert {kind for used in run.report().values() for kind in used} == {"untouched"}


@pytest.mark.parametrize("name", ["scale", "drop", "streaming", "add to the deciding row"])
def test_sampling_draws_what_it_would_without_a_session(llama, name):
    torch.manual_seed(7)
    options = {"max_new_tokens": N, "do_sample": True}
    before = llama.module.generate(**llama.batch, **options)
    torch.manual_seed(7)
    with interp.hooked(llama.module, interventions=[ScaleHeads("L*H*", 1.0)]):
        assert torch.equal(llama.module.generate(**llama.batch, **options), before)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        with interp.hooked(llama.module, interventions=[ALL[name]()]):
            runs.append(llama.module.generate(**llama.batch, num_return_sequences=2, **options))
    assert torch.equal(*runs)


def test_the_deciding_row_is_the_last_real_one_also_with_pads_on_the_right(llama):
    seen = {}
    watch = Custom(before=lambda call: seen.update({call.site.layer: call.edits[-1]}))
    ids = llama.inputs["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    forward(llama, {"input_ids": ids, "attention_mask": mask}, MaskHeads("L1H2", scope="next"), watch)
    where = seen[1].operations[0].where.expand(2, -1, -1)
    assert [(b, h, r) for b, h, r in where.nonzero().tolist()] == [(0, 2, 23), (1, 2, 19)]


# Per sample


def test_a_batch_of_settings_is_the_settings_one_by_one(llama):
    ids = llama.inputs["input_ids"].repeat(3, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    gain = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, -1.0]])
    t = gain + 1.5
    for cls, table in ((ScaleHeads, gain), (Temperature, t)):
        both = generate(llama, inputs, cls("L1H0,L2H3", table))
        for row in range(3):
            one = generate(llama, llama.inputs, cls("L1H0,L2H3", table[row]))
            for a, b in zip(both.logits, one.logits, strict=True):
                assert torch.allclose(a[row], b[0], atol=2e-4)
    beams = generate(llama, inputs, ScaleHeads("L1H0,L2H3", gain), num_beams=2)
    for row in range(3):
        one = generate(llama, llama.inputs, ScaleHeads("L1H0,L2H3", gain[row]), num_beams=2)
        assert beams.sequences[row].tolist() == one.sequences[0].tolist()
    with pytest.raises(ValueError, match="gain must be for 1 sample.*got 3 for a batch of 1"):
        generate(llama, llama.inputs, ScaleHeads("L1H0,L2H3", gain))


@pytest.mark.parametrize("what", ["z", "q", "k", "v", "pattern"])
def test_patching_in_generation_batches_and_beams(llama, what):
    other = {
        **llama.batch,
        "input_ids": llama.batch["input_ids"].flip(0).masked_fill(llama.batch["attention_mask"] == 0, 0),
    }
    other["input_ids"][1, 7:] = torch.arange(30, 47)
    heads = "L1H2,L1H3"
    if what in "qk":
        # A plain forward counts pads, generate does not, and q and k carry their rotation.
        with pytest.raises(ValueError, match=r"stand at \[0, 0\] here, at \[0, 7\] there.*position_ids"):
            generate(
                llama,
                llama.batch,
                PatchHeads(heads, HeadActivations.collect(llama.module, other, what=[what]), what=what),
            )
    counted = {"position_ids": (other["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    source = HeadActivations.collect(llama.module, {**other, **counted}, what=[what])
    both = generate(llama, llama.batch, PatchHeads(heads, source, what=what))
    beams = generate(llama, llama.batch, PatchHeads(heads, source, what=what), num_beams=2)
    before = generate(llama, llama.batch)
    for sample in range(2):
        single = HeadActivations.collect(llama.module, alone(other, sample), what=[what])
        mine = PatchHeads(heads, single, what=what)
        one = generate(llama, alone(llama.batch, sample), mine)
        for a, b in zip(both.logits, one.logits, strict=True):
            assert torch.allclose(a[sample], b[0], atol=3e-4)
        assert not torch.allclose(both.logits[1][sample], before.logits[1][sample], atol=1e-3)
        one = generate(llama, alone(llama.batch, sample), mine, num_beams=2)
        assert beams.sequences[sample, -N:].tolist() == one.sequences[0, -N:].tolist()
    # The cache itself is not written to: it holds the plain model's keys and values when the session is over.
    inputs, caches = {**llama.batch, **counted}, []
    for interventions in ([], [PatchHeads(heads, source, what=what)]):
        with torch.no_grad(), interp.hooked(llama.module, interventions=interventions):
            caches.append(llama.module(**inputs, use_cache=True).past_key_values.layers[1])
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)


@pytest.mark.parametrize("family", ["llava", "t5", "vit", "qwen2_5_vl", "llava_onevision"])
def test_patching_with_itself_changes_nothing_in_any_stack(family):
    specimen = build(family)
    before = output(specimen)
    stacks = interp.anatomy(specimen.module).stacks
    for what in ("z", "q", "v", "pattern"):
        source = HeadActivations.collect(specimen.module, specimen.inputs, what=[what])
        heads = ",".join(f"{stack}.L*H*" for stack in stacks)
        patched = output(specimen, PatchHeads(heads, source, what=what))
        assert torch.allclose(patched, before, atol=2e-4), (what, (patched - before).abs().max())


def output(specimen, *interventions):
    with torch.no_grad(), interp.hooked(specimen.module, interventions=interventions):
        result = specimen.module(**specimen.inputs)
    return result.logits if "logits" in result else result.last_hidden_state


# Composition


def test_methods_compose_in_the_order_of_the_list_and_of_sessions(llama):
    pairs = [
        ("scale", "temperature"),
        ("streaming", "keep"),
        ("gate", "add"),
        ("drop", "mask"),
        ("temperature", "drop"),
    ]
    for a, b in pairs:
        together = forward(llama, llama.inputs, STEADY[a](), STEADY[b]())
        with torch.no_grad(), interp.hooked(llama.module, interventions=[STEADY[a]()]):
            nested = forward(llama, llama.inputs, STEADY[b]())
        assert torch.equal(together, nested)
        for one in (a, b):
            assert not torch.allclose(together, forward(llama, llama.inputs, STEADY[one]()), atol=1e-3)


def test_every_pair_runs_together(llama):
    for a, b in itertools.combinations(STEADY, 2):
        assert torch.isfinite(forward(llama, llama.inputs, STEADY[a](), STEADY[b]())).all(), (a, b)


def test_keys_dropped_after_a_window_come_from_the_window(llama):
    capture = interp.Capture(attention=True)
    window, drop = (
        Streaming("L1H2", pattern=SinkRecent(0, 6), scope="all"),
        TopKMask("L1H2", k=2, p=1.0, sampling="top"),
    )
    for order in ((window, drop), (drop, window)):
        with torch.no_grad(), interp.hooked(llama.module, capture=capture, interventions=order) as run:
            llama.module(**llama.inputs)
        seen = (run.trace["text"]["attention"].sel(layer=1, head=2).values[0] > 0).sum(-1)
        # Ranks are those within the window, whichever is given first.
        assert (seen[10:] == 4).all()


# What cannot be


@pytest.fixture(scope="module")
def source(llama):
    return HeadActivations.collect(llama.module, llama.inputs, what=["z", "k"])


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (lambda s: ScaleHeads("L1H2", "loud"), (TypeError, ValueError), "."),
        (lambda s: ScaleHeads("L1H2", float("nan")), ValueError, "gain must be finite"),
        (lambda s: ScaleHeads("L1H2", torch.ones(1, 1, 1, 1)), ValueError, "gain must be a number, .*1, 1, 1, 1"),
        (lambda s: Temperature("L1H2", 0.0), ValueError, "value must be finite and > 0"),
        (lambda s: Temperature("L1H2", beta=-0.1), ValueError, "beta must be a number >= 0"),
        (lambda s: TopKMask("L1H2", k=33), ValueError, "at most 32 to drop, got 33"),
        (lambda s: TopKMask("L1H2", k=2.5), ValueError, "k must be a whole number"),
        (lambda s: TopKMask("L1H2", p=1.5), ValueError, "p must be a share"),
        (lambda s: TopKMask("L1H2", mode="hide"), ValueError, "mode must be one of"),
        (lambda s: TopKMask("L1H2", sampling="all"), ValueError, "sampling must be one of"),
        (lambda s: GateHeads("L1H2", shared=0.8, routed=0.5), ValueError, "at most 1, got 0.8"),
        (lambda s: GateHeads("L1H2", routed=-0.5), ValueError, "routed must be a share"),
        (lambda s: GateHeads("L1H2", gates="warm"), ValueError, "gates must be one of"),
        (lambda s: AddToHeads("L1H2", [[float("inf")]]), ValueError, "vectors must be finite"),
        (lambda s: AddToHeads("L1H2", [[1.0]], alpha=float("nan")), ValueError, "alpha must be a finite number"),
        (lambda s: PatchHeads("L1H2", {"z": 1}), TypeError, "source must be HeadActivations.collect"),
        (lambda s: PatchHeads("L1H2", s, what="mlp"), ValueError, "what must be one of"),
        (lambda s: PatchHeads("L1H2", s, source_rows=[1]), ValueError, "source_rows must pair with rows"),
        (lambda s: PatchHeads("L1H2", s, rows=[1, 2], source_rows=[1]), ValueError, "source_rows must pair with rows"),
        (lambda s: PatchHeads("L1H2", s, scope="decode"), ValueError, r"scope must be one of \('all', 'prefill'\)"),
        (lambda s: Streaming("L1H2", pattern="window"), TypeError, "pattern must be SinkRecent"),
        (lambda s: Streaming("L1H2", scope="sometimes"), ValueError, "scope must be one of .*'cached'"),
        (lambda s: SinkRecent(-1, 3), ValueError, "sink must be a whole number"),
        (lambda s: Spans(np.ones(3)), ValueError, "alphas and betas"),
        (lambda s: Shards(block=0), ValueError, "block and stride"),
        (lambda s: Near(1, dimensions=3), ValueError, "dimensions must be 1 or 2"),
        (lambda s: KVGates(np.ones((2, 2)), sparsity=2.0), ValueError, "sparsity must be a share"),
        (lambda s: KVGates(np.ones((2, 2)), sparsity=0.5, threshold=0.5), ValueError, "one of sparsity and threshold"),
        (lambda s: MaskHeads("L1H2", kind="resample"), ValueError, "reference must be given for kind='resample'"),
        (lambda s: MaskHeads("L1H2", kind="resample", reference=s, scope="decode"), ValueError, "no match"),
        (lambda s: MaskHeads("L1H2", kind="mean", reference=s), TypeError, "HeadMeans.collect.*HeadActivations"),
        (lambda s: MaskHeads("L1H2", norms="clean"), TypeError, "norms must be NormScales"),
        (lambda s: HeadActivations.collect(None, {}, what=["mlp"]), ValueError, "what must name some of"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(make, error, what, source):
    with pytest.raises(error, match=what):
        make(source)


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (lambda s: ScaleHeads("L1H9", 2.0), HeadError, r"0\.\.3.*L1H9"),
        (lambda s: ScaleHeads("L9H1", 2.0), HeadError, r"0\.\.2.*L9H1"),
        (lambda s: ScaleHeads("L1H1,L1H2", [1.0, 2.0, 3.0]), ValueError, "one value or 2.*got 3"),
        (lambda s: Temperature("L1H1,L1H2", beta=[0.1, 0.2, 0.3]), ValueError, "one value or 2.*got 3"),
        (lambda s: AddToHeads("L1H1", [torch.ones(15)]), ValueError, "as wide as the head's z, 16 for L1H1, got 15"),
        (lambda s: AddToHeads("L1H1,L1H2", [torch.ones(16)]), ValueError, "one for each of the 2 heads, got 1"),
        (lambda s: AddToHeads("L1H1", [torch.ones(16)], sigma=[1.0, 2.0]), ValueError, "one value or 1.*got 2"),
        (lambda s: PatchHeads("L1H2", s, what="k"), ValueError, r"whole KV groups.*KV head 1 with heads \[3\]"),
        (lambda s: PatchHeads("L1H2", s, what="q"), ValueError, "source must hold 'q'"),
        (lambda s: PatchHeads("L1H2", HeadActivations(dict(list(s.sites.items())[:1]), s.what)), HeadError, "none of L1H2"),
        (lambda s: MaskHeads("L1H2", kind="resample", reference=HeadActivations({}, ("z",))), HeadError, "none of L1H2"),
        (lambda s: Streaming(pattern=Spans(np.ones((2, 4)))), ValueError, r"alphas must be \[layer, head\] \(3, 4\)"),
        (lambda s: Streaming(pattern=Shards(dense=3)), ValueError, "at most the 2 KV heads"),
        (lambda s: Streaming(KVGates(np.ones((3, 4)))), ValueError, r"\[layer, KV head\] \(3, 2\).*\(3, 4\)"),
        (lambda s: Streaming("L1H2", kv=True), HeadError, r"0\.\.1.*L1H2"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_have_is_refused_when_a_session_opens(make, error, what, source, llama):
    with pytest.raises(error, match=what):
        interp.hooked(llama.module, interventions=[make(source)])


@pytest.mark.parametrize("what", ["z", "k"])
def test_a_source_of_another_length_or_width_is_refused_before_the_first_token(llama, what):
    short = {k: v[:, :20] for k, v in llama.inputs.items()}
    source = HeadActivations.collect(llama.module, short, what=["z", "k"])
    heads, produced = "L1H2,L1H3", []

    class Streamer:
        def put(self, ids):
            produced.append(ids)

        def end(self): ...

    for patch in (PatchHeads(heads, source, what=what), MaskHeads(heads, kind="resample", reference=source)):
        produced.clear()
        with pytest.raises(ValueError, match=r"as long as the run.*\[24\] positions, the source \[20\]"):
            generate(llama, llama.inputs, patch, streamer=Streamer())
        # The prompt alone went by.
        assert len(produced) == 1
    with pytest.raises(ValueError, match="match for every patched"):
        generate(llama, llama.inputs, PatchHeads(heads, source, what=what, rows=[22]))
    # Rows named on purpose that both have.
    generate(llama, llama.inputs, PatchHeads(heads, source, what=what, rows=[19]))
    two = HeadActivations.collect(llama.module, llama.batch, what=["z", "k"])
    with pytest.raises(ValueError, match="source must be for 1 sample"):
        generate(llama, llama.inputs, PatchHeads(heads, two, what=what))
    wide = HeadActivations.collect(build("gemma2").module, llama.inputs, what=["z", "k"])
    for key, site in wide.sites.items():
        wide.sites[key].values.update({n: v[..., :8] for n, v in site.values.items()})  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"source must have . of \[heads, dim\]"):
        generate(llama, llama.inputs, PatchHeads(heads, wide, what=what))


def test_shards_of_left_padded_batches_and_grids_of_text_are_refused(llama):
    with pytest.raises(ValueError, match="left pads"):
        generate(llama, llama.batch, Streaming("L1H1", pattern=Shards(4, 1, 2), scope="all"))
    with pytest.raises(ValueError, match="image patches, got 'text'"):
        generate(llama, llama.inputs, Streaming("L1H1", pattern=Near(1, dimensions=2), scope="all"))
    with pytest.raises(ValueError, match="self attention"):
        interp.hooked(build("t5").module, interventions=[Streaming("cross.L0H1", scope="all")])


def test_frozen_norms_are_for_one_forward_on_the_same_inputs(llama):
    scales = NormScales.collect(llama.module, llama.inputs)
    with pytest.raises(ValueError, match="norms must be left out with generate"):
        generate(llama, llama.inputs, MaskHeads("L1H2", norms=scales))
    with pytest.raises(ValueError, match="inputs like those that run"):
        forward(llama, {k: v[:, :20] for k, v in llama.inputs.items()}, MaskHeads("L1H2", norms=scales))
    with pytest.raises(ValueError, match="norms must come from the model that runs"):
        forward(build("gpt2"), llama.inputs, MaskHeads("L1H2", norms=scales))
    assert not any(m._forward_hooks for m in llama.module.modules())
    assert torch.equal(forward(llama, llama.inputs), forward(llama, llama.inputs, MaskHeads([], norms=scales)))


def test_a_trace_says_what_was_done(llama, source):
    means = HeadMeans.collect(llama.module, [llama.inputs])
    interventions = [
        *(make() for make in ALL.values()),
        PatchHeads("L1H2", source, rows=[3]),
        MaskHeads("L1H2", kind="mean", reference=means),
        Streaming(KVGates(np.eye(3, 2)), pattern=Shards()),
    ]
    said = json.loads(json.dumps([i.describe() for i in interventions]))
    assert said[0] == {
        "name": "ScaleHeads", "heads": HEADS, "scope": "all", "rows": None, "gain": [0.0, 2.0, -1.0, 3.0],
    }  # fmt: skip
    assert said[-1]["pattern"]["pattern"] == "shards" and said[-1]["heads"]["gates"] == "array (3, 2)"
    assert said[-3]["source"]["stacks"] == {"text": {"samples": 1, "positions": 24}} and said[-3]["rows"] == [3]
    assert {entry["name"] for entry in interp.interventions()} >= {
        "MaskHeads", "ScaleHeads", "Streaming", "Temperature", "TopKMask", "GateHeads", "PatchHeads", "AddToHeads", "Custom",
    }  # fmt: skip
