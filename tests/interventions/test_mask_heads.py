"""MaskHeads on tiny models of many families, against hooks on the models themselves."""

import json

import numpy as np
import pytest
import torch

import interp
from interp.heads import HeadError
from interp.interventions import HeadMeans, MaskHeads
from interp.testing import build, recompute
from interp.tracing.session import untouched

FAMILIES = {
    "llama": "text", "gpt2": "text", "gemma2": "text", "gpt_oss": "text", "mistral": "text", "deepseek_v3": "text",
    "qwen3_next": "text", "t5": "cross", "bart": "cross", "vit": "vision",
}  # fmt: skip
ALL = interp.Capture(attention=True, z=True)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama():
    return build("llama")


def target(specimen, stack):
    """The last site of the stack: what the other heads of its layer see is then untouched by the edit."""
    return interp.anatomy(specimen.module).stacks[stack][-1]


def forward(specimen, inputs=None, interventions=(), capture=ALL):
    inputs = specimen.inputs if inputs is None else inputs
    with torch.no_grad(), interp.hooked(specimen.module, capture=capture, interventions=interventions) as run:
        result = specimen.module(**inputs)
    out = result.logits if "logits" in result else result.last_hidden_state
    return out, run.trace


def of(trace, site, name, head=None):
    data = trace[site.stack][name].sel(layer=site.layer)
    return (data if head is None else data.sel(head=head)).values


def plain(specimen, inputs=None):
    with torch.no_grad():
        result = specimen.module(**(specimen.inputs if inputs is None else inputs))
    return result.logits if "logits" in result else result.last_hidden_state


def with_hook(specimen, site, change, inputs=None):
    """The plain model with ``change`` made to what goes into the site's output projection, viewed by head."""
    projection = specimen.module.get_submodule(f"{site.name}.{site.out_proj}")

    def hook(_, args):
        z = args[0].clone()
        change(z.view(*z.shape[:-1], site.n_heads, site.v_head_dim))
        return (z, *args[1:])

    handle = projection.register_forward_pre_hook(hook)
    try:
        return plain(specimen, inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize(("family", "stack"), FAMILIES.items())
def test_zero_is_zeroing_the_slice_of_the_projections_input(family, stack):
    specimen = build(family)
    site = target(specimen, stack)
    head = f"{stack}.L{site.layer}H1"

    def zero(z):
        z[..., 1, :] = 0

    wanted = with_hook(specimen, site, zero)
    got, trace = forward(specimen, interventions=[MaskHeads(head)])
    assert torch.equal(got, wanted)
    assert not torch.equal(got, plain(specimen))
    _, before = forward(specimen)
    others = [h for h in range(site.n_heads) if h != 1]
    z, old = of(trace, site, "z"), of(before, site, "z")
    assert np.array_equal(z[:, others], old[:, others], equal_nan=True)
    assert not np.nan_to_num(z[:, 1]).any() and np.nan_to_num(old[:, 1]).any()


@pytest.mark.parametrize(("family", "stack"), FAMILIES.items())
def test_uniform_is_the_mean_of_the_visible_values(family, stack):
    specimen = build(family)
    site = target(specimen, stack)
    maps = recompute(specimen.module, specimen.inputs).maps[site.name]
    assert len(maps) == 1
    # Every visible key has some weight in the fp64 softmax; the tiny models' scores are far from underflow.
    seen = (maps[0][:, 1] > 0).double()
    wanted = seen / seen.sum(-1, keepdim=True)
    values = {}
    keep = interp.Custom(after=lambda call, z: values.update(v=call.v) if call.site.name == site.name else None)
    _, trace = forward(specimen, interventions=[MaskHeads(f"{stack}.L{site.layer}H1", kind="uniform"), keep])
    got = of(trace, site, "attention", 1)
    assert np.allclose(got, wanted.numpy(), atol=1e-6)
    v = values["v"].double()[:, 1 // (site.n_heads // values["v"].shape[1])]
    assert np.allclose(of(trace, site, "z", 1), (wanted @ v).numpy(), atol=1e-5)
    _, before = forward(specimen)
    others = [h for h in range(site.n_heads) if h != 1]
    assert np.allclose(of(trace, site, "attention")[:, others], of(before, site, "attention")[:, others], atol=1e-6)
    assert not np.allclose(of(before, site, "attention", 1), wanted.numpy(), atol=1e-2)


@pytest.mark.parametrize(("family", "stack"), FAMILIES.items())
@pytest.mark.parametrize("batched", [False, True])
def test_first_token_puts_all_weight_on_the_first_real_key(family, stack, batched):
    specimen = build(family)
    inputs = specimen.batch if batched else specimen.inputs
    site = target(specimen, stack)
    _, trace = forward(specimen, inputs, [MaskHeads(f"{stack}.L{site.layer}H1", kind="first_token")])
    got = of(trace, site, "attention", 1)
    seen = recompute(specimen.module, inputs).maps[site.name][0][:, 1].numpy() > 0
    mask = inputs.get("attention_mask")
    first = np.zeros(len(got), int) if mask is None else mask.int().argmax(1).numpy()
    checked = 0
    for sample in range(len(got)):
        for row in range(got.shape[1]):
            if np.isnan(got[sample, row]).all() or not seen[sample, row].any():
                continue
            wanted = np.zeros(got.shape[-1])
            wanted[first[sample]] = seen[sample, row, first[sample]]
            assert np.array_equal(np.nan_to_num(got[sample, row]), wanted), (sample, row)
            checked += 1
    assert checked >= got.shape[1] // 2


def test_first_token_beyond_a_sliding_window_is_a_zero_row():
    specimen = build("mistral")
    _, trace = forward(specimen, interventions=[MaskHeads("L2H0", kind="first_token")])
    sums = trace["text"]["attention"].sel(layer=2, head=0).sum("key").values[0]
    assert sums.tolist() == [1.0] * 8 + [0.0] * 16
    assert not trace["text"]["z"].sel(layer=2, head=0).values[0, 8:].any()


@pytest.mark.parametrize(
    ("family", "stack"), [("llama", "text"), ("gpt_oss", "text"), ("t5", "cross"), ("vit", "vision")]
)
def test_mean_is_replacing_the_slice_by_the_mean(family, stack):
    specimen = build(family)
    site = target(specimen, stack)
    other = build(family, seed=1).inputs
    means = HeadMeans.collect(specimen.module, [specimen.inputs, other])
    with_means = []
    for inputs in (specimen.inputs, other):
        with_hook(specimen, site, lambda z: with_means.append(z[..., 1, :].clone()), inputs)
    wanted_mean = torch.stack(with_means).mean((0, 1))

    def replace(z):
        z[..., 1, :] = wanted_mean

    wanted = with_hook(specimen, site, replace)
    got, trace = forward(specimen, interventions=[MaskHeads(f"{stack}.L{site.layer}H1", kind="mean", reference=means)])
    assert torch.allclose(got, wanted, atol=1e-5)
    assert not torch.allclose(got, plain(specimen), atol=1e-3)
    _, before = forward(specimen)
    others = [h for h in range(site.n_heads) if h != 1]
    assert np.array_equal(of(trace, site, "z")[:, others], of(before, site, "z")[:, others])


def test_means_leave_pads_out_and_count_positions_from_the_first_real_token(llama):
    batch = llama.batch
    first = int(batch["attention_mask"][1].argmax())
    assert first == 7
    alone = {k: v[1:, first:] for k, v in batch.items()}
    padded = HeadMeans.collect(llama.module, [{k: v[1:] for k, v in batch.items()}])
    single = HeadMeans.collect(llama.module, [alone])
    for key, means in single.sites.items():
        assert padded.sites[key].n == means.n == 17
        assert torch.equal(padded.sites[key].n_by_position, means.n_by_position)
        assert torch.allclose(padded.sites[key].by_position, means.by_position, atol=1e-5)
    intervention = MaskHeads("L1H2", kind="mean", reference=single)
    left, _ = forward(llama, {k: v[1:] for k, v in batch.items()}, [intervention])
    right, _ = forward(llama, alone, [intervention])
    assert torch.allclose(left[:, first:], right, atol=1e-4)


def test_beyond_the_means_positions_the_overall_mean_takes_over(llama):
    means = HeadMeans.collect(llama.module, [llama.inputs], length=5, stacks="text")
    one = means.sites["text", 1]
    assert len(one.n_by_position) == 5 and one.n == 24
    _, trace = forward(llama, interventions=[MaskHeads("L1H2", kind="mean", reference=means)])
    z = trace["text"]["z"].sel(layer=1, head=2).values[0]
    _, before = forward(llama)
    old = before["text"]["z"].sel(layer=1, head=2).values[0]
    assert np.allclose(z[:5], old[:5], atol=1e-6)
    assert np.allclose(z[5:], old.mean(0), atol=1e-6)
    assert json.loads(json.dumps(means.describe())) == {"n_inputs": 1, "stacks": {"text": {"rows": 24, "positions": 5}}}


def generate(specimen, interventions, *, inputs=None, capture=ALL):
    inputs = specimen.inputs if inputs is None else inputs
    with interp.hooked(specimen.module, capture=capture, interventions=interventions) as run:
        out = specimen.module.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return out, run


def test_decode_scope_leaves_the_prefill_bit_equal_and_changes_decode(llama):
    plain_out, before = generate(llama, [])
    out, run = generate(llama, [MaskHeads("L0H1,L0H2", scope="decode")])
    prompt = llama.inputs["input_ids"].shape[1]
    z, old = run.trace["text"]["z"].values, before.trace["text"]["z"].values
    assert np.array_equal(z[:, :, :, :prompt], old[:, :, :, :prompt])
    new = run.trace["text"]["z"].sel(layer=0, head=1).values[:, prompt:]
    assert new.shape[1] == 5 and not new.any()
    assert before.trace["text"]["z"].sel(layer=0, head=1).values[:, prompt:].all()
    assert torch.equal(out.logits[0], plain_out.logits[0]) and not torch.equal(out.logits[1], plain_out.logits[1])


def test_prefill_scope_acts_on_the_prompt_alone(llama):
    _, run = generate(llama, [MaskHeads("L0H1", scope="prefill")])
    z = run.trace["text"]["z"].sel(layer=0, head=1).values
    assert not z[:, :24].any() and z[:, 24:].all()


def test_rows_are_absolute_positions_and_negative_ones_count_from_the_prompts_end(llama):
    _, run = generate(llama, [MaskHeads("L0H1", rows=[3, -1, 25])])
    z = run.trace["text"]["z"].sel(layer=0, head=1).values[0]
    assert np.flatnonzero(~z.any(-1)).tolist() == [3, 23, 25]
    assert torch.equal(
        torch.as_tensor(z[:3]), torch.as_tensor(forward(llama)[1]["text"]["z"].sel(layer=0, head=1).values[0][:3])
    )


@pytest.mark.parametrize("kind", ["zero", "uniform", "first_token", "mean"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mistral", "t5"])
def test_masking_changes_the_logits_of_generation(family, kind):
    specimen = build(family)
    reference = HeadMeans.collect(specimen.module, [specimen.inputs]) if kind == "mean" else None
    inputs = {k: v for k, v in specimen.inputs.items() if not k.startswith("decoder")}
    before, _ = generate(specimen, [], inputs=inputs, capture=None)
    after, _ = generate(specimen, [MaskHeads("L1H*", kind=kind, reference=reference)], inputs=inputs, capture=None)
    # A single query at position 0 has one key, so masking acts on the decoder from its second token on.
    assert not torch.allclose(before.logits[2], after.logits[2], atol=1e-4)


@pytest.mark.parametrize("kind", ["zero", "uniform", "first_token"])
def test_no_heads_change_nothing(llama, kind):
    before, _ = generate(llama, [], capture=None)
    after, run = generate(llama, [MaskHeads([], kind=kind)], capture=None)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    assert {backend for used in run.report().values() for backend in used} == {"untouched"}


def test_uniform_in_left_padded_batches_equals_single_samples(llama):
    first = 7
    intervention = [MaskHeads("L0H1,L2H3", kind="uniform")]
    batch, _ = forward(llama, llama.batch, intervention)
    single, _ = forward(llama, {k: v[1:, first:] for k, v in llama.batch.items()}, intervention)
    assert torch.allclose(batch[1:, first:], single, atol=1e-4)


def test_nested_sessions_add_up(llama):
    both, _ = forward(llama, interventions=[MaskHeads("L0H1,L1H2")])
    with interp.hooked(llama.module, interventions=[MaskHeads("L0H1")]):
        with interp.hooked(llama.module, interventions=[MaskHeads("L1H2")]):
            nested = plain(llama)
        outer = plain(llama)
    assert torch.equal(nested, both)
    assert torch.equal(outer, forward(llama, interventions=[MaskHeads("L0H1")])[0])
    assert not torch.equal(outer, nested)


def test_the_model_is_as_before_after_an_exception_inside_it(llama):
    before = plain(llama)
    implementation = llama.module.config._attn_implementation

    def fail(module, args):
        raise RuntimeError("broken layer")

    handle = llama.module.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        forward(llama, interventions=[MaskHeads("L0H1")])
    handle.remove()
    assert llama.module.config._attn_implementation == implementation
    assert torch.equal(plain(llama), before)


def test_wildcards_pass_over_layers_without_softmax_heads_and_naming_one_is_an_error():
    specimen = build("qwen3_next")
    _, trace = forward(specimen, interventions=[MaskHeads("L*H*")])
    assert not np.nan_to_num(trace["text"]["z"].values).any()
    with pytest.raises(HeadError, match="L0H1"):
        interp.hooked(specimen.module, interventions=[MaskHeads("L0H1")])


@pytest.mark.parametrize(
    ("heads", "what"),
    [("L9H0", r"0\.\.2.*L9H0"), ("L1H7", r"0\.\.3.*L1H7"), ("vision.L0H0", r"\['text'\].*vision")],
)
def test_heads_the_model_does_not_have_are_refused_before_it_runs(llama, heads, what):
    with pytest.raises(HeadError, match=what):
        interp.hooked(llama.module, interventions=[MaskHeads(heads)])


@pytest.mark.parametrize(
    ("settings", "error", "what"),
    [
        ({"kind": "noise"}, ValueError, "kind must be one of .*'noise'"),
        ({"scope": "sometimes"}, ValueError, "scope must be one of .*'sometimes'"),
        ({"rows": [1], "scope": "decode"}, ValueError, "rows must stand alone"),
        ({"rows": "last"}, ValueError, "rows must be whole numbers"),
        ({"kind": "mean"}, ValueError, "reference must be given"),
        ({"kind": "mean", "reference": [1]}, TypeError, "HeadMeans.collect.*list"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, error, what):
    with pytest.raises(error, match=what):
        MaskHeads("L0H1", **settings)


def test_a_reference_must_know_every_head_and_belong_to_the_mean():
    specimen = build("t5")
    means = HeadMeans.collect(specimen.module, [specimen.inputs], stacks=["text"])
    assert {stack for stack, _ in means.sites} == {"text"}
    with pytest.raises(HeadError, match=r"cross\.L0H1"):
        interp.hooked(specimen.module, interventions=[MaskHeads("cross.L0H1", kind="mean", reference=means)])
    with pytest.raises(ValueError, match="reference must be left out"):
        MaskHeads("L0H1", reference=means)
    with pytest.raises(ValueError, match="vision"):
        HeadMeans.collect(specimen.module, [specimen.inputs], stacks=["vision"])
    with pytest.raises(ValueError, match="at least one input"):
        HeadMeans.collect(specimen.module, [])
    with pytest.raises(ValueError, match="never decodes.*encoder"):
        interp.hooked(specimen.module, interventions=[MaskHeads("encoder.L0H1", scope="decode")])


def test_a_trace_says_what_was_masked(llama):
    means = HeadMeans.collect(llama.module, [llama.inputs])
    _, trace = forward(llama, interventions=[MaskHeads([(1, 2)], kind="mean", reference=means, rows=range(2))])
    (said,) = trace.attrs["interventions"]
    assert json.loads(json.dumps(said)) == {
        "name": "MaskHeads", "heads": "L1H2", "kind": "mean", "scope": "all", "rows": [0, 1], "reference": means.describe(),
    }  # fmt: skip


def test_a_session_inside_untouched_leaves_the_suspended_one_in_force(llama):
    with interp.hooked(llama.module, interventions=[MaskHeads("L0H1")]):
        masked = plain(llama)
        with untouched(llama.module):
            unmasked = plain(llama)
            HeadMeans.collect(llama.module, [llama.inputs])
        again = plain(llama)
    assert torch.equal(again, masked) and not torch.equal(unmasked, masked)
    assert torch.equal(unmasked, plain(llama))
