"""Interventions on heads against attention written out in eager PyTorch, with the method restated in it."""

import copy
import itertools
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import interp
from interp.interventions import (
    AddToHeads,
    Custom,
    GateHeads,
    HeadActivations,
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
from interp.testing.specimen import configs

NAME = "restated"
PADS = 7


def _attention(module, query, key, value, attention_mask=None, scaling=None, **options):
    step = _attention.step
    layer = module.layer_idx
    query, key, value = step("qkv", layer, (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    scores = step("scores", layer, scores)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    scores = step("masked", layer, scores)
    p = step("p", layer, torch.softmax(scores, -1))
    return step("z", layer, (p @ value).transpose(1, 2).contiguous()), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


def restated(specimen, inputs, **steps):
    """Logits of a twin whose attention is the function above, changed by ``steps`` (name to function of layer and value)."""
    twin = copy.deepcopy(specimen.module)
    for config in configs(twin):
        config._attn_implementation_internal = NAME
    _attention.step = lambda name, layer, value: steps[name](layer, value) if name in steps else value
    with torch.no_grad():
        return twin(**inputs).logits


def logits(specimen, inputs, *interventions):
    with torch.no_grad(), interp.hooked(specimen.module, interventions=interventions):
        return specimen.module(**inputs).logits


def real(values, inputs):
    """Rows that are no pads."""
    return values[inputs["attention_mask"].bool()]


def agree(specimen, inputs, interventions, **steps):
    got, wanted = logits(specimen, inputs, *interventions), restated(specimen, inputs, **steps)
    assert torch.allclose(real(got, inputs), real(wanted, inputs), atol=2e-4), (got - wanted).abs().max()
    plain = restated(specimen, inputs)
    assert not torch.allclose(real(wanted, inputs), real(plain, inputs), atol=1e-3)
    return got


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def positions(inputs):
    """Position in its sample of every row ``[B, L]``, negative on left pads."""
    mask = inputs["attention_mask"]
    return torch.arange(mask.shape[1]) - mask.int().argmax(1)[:, None]


def only(layer, heads, change):
    """A step that changes the given heads (axis 1) of one layer."""

    def step(at, value):
        if at != layer:
            return value
        value = value.clone()
        value[:, heads] = change(value)[:, heads]
        return value

    return step


# Gains and temperatures


def test_gains_by_head_sample_and_position(llama):
    inputs = llama.batch
    gain = torch.rand(2, 3, 9) * 3
    where = positions(inputs)

    def z(layer, value):
        value = value.clone()
        for b, row in np.ndindex(2, 24):
            at = int(where[b, row])
            for n, (own, head) in enumerate([(2, 3), (0, 1), (2, 0)]):
                if own == layer and 0 <= at < 9:
                    value[b, row, head] *= gain[b, n, at]
        return value

    agree(llama, inputs, [ScaleHeads("L2H3,L0H1,L2H0", gain)], z=z)
    one = ScaleHeads("L2H3,L0H1,L2H0", [0.5, 2.0, -1.0])
    factors = {(2, 3): 0.5, (0, 1): 2.0, (2, 0): -1.0}

    def each(layer, value):
        value = value.clone()
        for (own, head), factor in factors.items():
            if own == layer:
                value[:, :, head] *= factor
        return value

    agree(llama, inputs, [one], z=each)


def test_the_gradient_of_a_gain_is_michels_importance(llama):
    gain = torch.ones(12, requires_grad=True)
    with interp.hooked(llama.module, interventions=[ScaleHeads("L*H*", gain)]):
        llama.module(**llama.inputs).logits[0, -1].logsumexp(0).backward()
    eps = 1e-3
    for n, (layer, head) in enumerate(itertools.product(range(3), range(4))):
        ends = [
            logits(llama, llama.inputs, ScaleHeads([(layer, head)], 1 + sign * eps))[0, -1].double().logsumexp(0)
            for sign in (1, -1)
        ]
        assert float(gain.grad[n]) == pytest.approx(float(ends[0] - ends[1]) / (2 * eps), abs=3e-3)


def test_temperature_by_head_and_position(llama):
    inputs = llama.batch
    t = torch.tensor([1.5, 0.5])

    def scores(layer, value):
        if layer != 1:
            return value
        value = value.clone()
        at = positions(inputs).clamp_min(0)
        for n, head in enumerate((0, 3)):
            value[:, head] *= ((1 + 0.3 * torch.log(at + 1.0)) / t[n])[..., None]
        return value

    agree(llama, inputs, [Temperature("L1H0,L1H3", t, beta=0.3)], scores=scores)
    agree(llama, inputs, [Temperature("L1H0", 0.25)], scores=only(1, [0], lambda s: s / 0.25))


# Streaming


def hide(layer, heads, allowed):
    """A step that hides keys: ``allowed [B|1, 1, L, L]``."""
    return only(layer, heads, lambda s: s.masked_fill(~allowed, torch.finfo(s.dtype).min))


def test_sink_and_recent_keys_count_from_the_first_real_token(llama):
    inputs = llama.batch
    at = positions(inputs)
    i, j = at[:, None, :, None], at[:, None, None, :]
    allowed = (j < 2) | (i - j < 3)
    streaming = Streaming("L1H1,L1H2", pattern=SinkRecent(2, 3), scope="all")
    agree(llama, inputs, [streaming], masked=hide(1, [1, 2], allowed))
    with interp.hooked(llama.module, capture=interp.Capture(attention=True), interventions=[streaming]) as run:
        llama.module(**llama.inputs)
    seen = (run.trace["text"]["attention"].sel(layer=1, head=1).values[0] > 0).sum(-1)
    assert seen.tolist() == [min(i + 1, 5) for i in range(24)]


def test_the_deployed_cache_keeps_one_key_more(llama):
    at = torch.arange(24)
    allowed = ((at[None] < 2) | (at[:, None] - at[None] < 4))[None, None]
    streaming = Streaming("L1H1", pattern=SinkRecent(2, 3, counting="cache"), scope="all")
    agree(llama, llama.inputs, [streaming], masked=hide(1, [1], allowed))


def test_kv_heads_are_named_on_request(llama):
    by_kv = Streaming("L1H1", kv=True, pattern=SinkRecent(1, 2), scope="all")
    by_head = Streaming("L1H2,L1H3", pattern=SinkRecent(1, 2), scope="all")
    assert torch.equal(logits(llama, llama.inputs, by_kv), logits(llama, llama.inputs, by_head))


def test_spans_grow_with_the_prompt(llama):
    alphas, betas = np.full((3, 4), 100.0), np.zeros((3, 4))
    alphas[2], betas[2] = [1, 2, 3, 100], [0.25, 0.0, 0.5, 0.0]
    at = torch.arange(24)
    spans = [7, 2, 15, 100]
    allowed = torch.stack([(at[None] < 1) | (at[:, None] - at[None] < s) for s in spans])[None]
    streaming = Streaming(pattern=Spans(alphas, betas, sink=1), scope="all")
    agree(
        llama, llama.inputs, [streaming],
        masked=lambda layer, s: s.masked_fill(~allowed, torch.finfo(s.dtype).min) if layer == 2 else s,
    )  # fmt: skip


def test_shards_are_s2s_blocks(llama):
    block, local, v, kv_heads = 3, 2, 4, 2
    step = max(1, v // kv_heads)
    allowed = torch.zeros(1, 4, 24, 24, dtype=torch.bool)
    for h, i, j in np.ndindex(4, 24, 24):
        m, n = i // block, j // block
        kv = h // 2
        allowed[0, h, i, j] = n <= m and (m - n < local or (n + kv * step) % v == 0)
    streaming = Streaming("L1H*", pattern=Shards(block, local, v), scope="all")
    agree(
        llama, llama.inputs, [streaming],
        masked=lambda layer, s: s.masked_fill(~allowed, torch.finfo(s.dtype).min) if layer == 1 else s,
    )  # fmt: skip
    pattern = Shards(block, local, v, dense=1).allowed(2, 8)
    assert torch.equal(pattern[1], torch.ones(8, 8).tril().bool()) and not torch.equal(pattern[0], pattern[1])
    # Together the heads keep every block where H_kv >= stride.
    assert Shards(block, 0, v).allowed(2, 16)[:, -1].any(0).float().mean() == 0.5
    assert Shards(block, 0, 2).allowed(2, 16)[:, -1].any(0).all()


def test_neighbours_along_the_sequence(llama):
    at = torch.arange(24)
    allowed = ((at[:, None] - at[None]).abs() <= 3)[None, None]
    agree(llama, llama.inputs, [Streaming("L1H1", pattern=Near(3), scope="all")], masked=hide(1, [1], allowed))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_neighbours_in_bidirectional_attention(family):
    specimen = build(family)
    stack = "vision" if family == "vit" else "text"
    pattern = Near(1, dimensions=2) if family == "vit" else Near(2)
    capture = interp.Capture(attention=True)
    with torch.no_grad(), interp.hooked(specimen.module, capture=capture) as before:
        specimen.module(**specimen.inputs)
    with torch.no_grad(), interp.hooked(
        specimen.module, capture=capture, interventions=[Streaming(f"{stack}.L0H1", pattern=pattern, scope="all")]
    ) as run:  # fmt: skip
        specimen.module(**specimen.inputs)
    p, old = (r.trace[stack]["attention"].sel(layer=0, head=1).values[0] for r in (run, before))
    length = len(p)
    side = math.isqrt(length - 1)
    if family == "vit":
        cell = [None] + [divmod(n, side) for n in range(length - 1)]
        near = lambda i, j: not (i and j) or max(abs(a - b) for a, b in zip(cell[i], cell[j], strict=True)) <= 1  # noqa: E731
    else:
        near = lambda i, j: abs(i - j) <= 2  # noqa: E731
    allowed = np.array([[bool(near(i, j)) for j in range(length)] for i in range(length)])
    wanted = old * allowed
    assert 0 < allowed.mean() < 1
    assert np.allclose(p, wanted / wanted.sum(-1, keepdims=True), atol=1e-5)


# Top keys


def test_the_top_keys_are_dropped_and_one_always_stays(llama):
    inputs = llama.batch

    def masked(layer, s):
        if layer != 1:
            return s
        s = s.clone()
        for b, row in np.ndindex(2, 24):
            if not inputs["attention_mask"][b, row]:
                continue
            count = int(positions(inputs)[b, row]) + 1
            drop = min(int(min(4, count) * 0.75), count - 1)
            s[b, 2, row, s[b, 2, row].topk(drop).indices] = torch.finfo(s.dtype).min
        return s

    agree(llama, inputs, [TopKMask("L1H2", k=4, p=0.75, sampling="top")], masked=masked)


def test_only_the_top_keys_are_kept(llama):
    inputs = llama.batch

    def keep(s):
        kth = s.topk(3, -1).values[..., -1:]
        return s.masked_fill(s < kth, torch.finfo(s.dtype).min)

    agree(llama, inputs, [TopKMask("L1H2,L1H0", k=3, mode="keep")], masked=only(1, [0, 2], keep))
    # Ranked as the interventions before it leave them.
    hot = restated(llama, llama.inputs, scores=only(1, [0], lambda s: s / 4), masked=only(1, [0], keep))
    both = [Temperature("L1H0", 4.0), TopKMask("L1H0", k=3, mode="keep")]
    assert torch.allclose(logits(llama, llama.inputs, *both), hot, atol=2e-4)


@pytest.mark.parametrize("sampling", ["count", "bernoulli"])
def test_stochastic_masking_hides_the_share_it_says(llama, sampling):
    capture = interp.Capture(attention=True)
    kept, hidden = [], []
    for seed in range(12):
        mask = TopKMask("L1H*", k=5, p=0.6, sampling=sampling, seed=seed)
        with torch.no_grad(), interp.hooked(llama.module, capture=capture, interventions=[mask]) as run:
            llama.module(**llama.inputs)
        with torch.no_grad(), interp.hooked(llama.module, capture=capture) as before:
            llama.module(**llama.inputs)
        p, old = (r.trace["text"]["attention"].sel(layer=1).values[0] for r in (run, before))
        assert np.allclose(p.sum(-1), 1, atol=1e-5)
        for head, row in np.ndindex(4, 24):
            top = np.argsort(-old[head, row])[:5]
            gone = p[head, row][top[old[head, row][top] > 0]] == 0
            if row >= 5:
                hidden.append(int(gone.sum()))
            elif row < 4:
                kept.append(row + 1 - int(gone.sum()))
    assert min(kept) >= 1
    if sampling == "count":
        assert set(hidden) == {3}
    else:
        assert np.mean(hidden) == pytest.approx(3, abs=4 * math.sqrt(5 * 0.24 / len(hidden)))
        assert np.var(hidden) == pytest.approx(5 * 0.24, rel=0.2)


def test_draws_are_uniform_and_differ_by_place():
    from interp.interventions.top_k_mask import uniform_draws

    draws = uniform_draws(3, 2, [0, 5], torch.arange(2000)[None], 10).double()
    assert draws.shape == (1, 2, 2000, 10)
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.01) and float(draws.var()) == pytest.approx(
        1 / 12, abs=0.005
    )
    flat = draws.flatten()
    assert abs(float(torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1])) < 0.02
    other = uniform_draws(3, 1, [0, 5], torch.arange(2000)[None], 10).double().flatten()
    assert abs(float(torch.corrcoef(torch.stack([flat, other]))[0, 1])) < 0.02
    assert torch.equal(uniform_draws(3, 2, [5], torch.tensor([[7]]), 10)[0, 0, 0], draws[0, 1, 7].float())


# Routing


@pytest.mark.parametrize("gates", ["hard", "soft"])
def test_routing_is_mohs(llama, gates):
    """The released routing: the first half shared, a quarter of all heads by query norm among the other half."""
    kept = {}

    def qkv(layer, value):
        kept[layer] = value[0]
        return value

    def z(layer, value):
        q = kept[layer].transpose(1, 2)
        heads, shared, routed = 4, 2, 1
        norms = torch.stack([torch.norm(q[:, :, i], p=2, dim=-1) for i in range(shared, heads)], -1)
        weights = torch.softmax(norms / norms.std(-1, keepdim=True), -1)
        chosen = torch.topk(weights, routed, -1).indices
        mask = torch.nn.functional.one_hot(chosen, heads - shared).sum(-2).to(value.dtype)
        if gates == "soft":
            mask = mask * weights / (mask * weights).sum(-1, keepdim=True) * routed
        return value * torch.cat([torch.ones_like(mask), mask], -1)[..., None]

    agree(llama, llama.batch, [GateHeads("L*H*", gates=gates)], qkv=qkv, z=z)


def test_soft_gates_of_several_heads_sum_to_their_number():
    from interp.interventions.gate_heads import routing

    gates = routing(torch.randn(2, 6, 5, 8), 3, soft=True)
    assert torch.allclose(gates.sum(1), torch.full((2, 5), 3.0), atol=1e-5) and ((gates > 0).sum(1) == 3).all()


# Patching


@pytest.fixture(scope="module")
def other(llama):
    """Another input of the same length."""
    return build("llama", seed=1).inputs


def kept_values(specimen, inputs):
    """What the restated attention computes: ``{(name, layer): value}``."""
    kept = {}

    def keep(name):
        def step(layer, value):
            kept[name, layer] = value
            return value

        return step

    restated(specimen, inputs, qkv=keep("qkv"), p=keep("p"), z=keep("z"))
    return kept


@pytest.mark.parametrize("what", ["z", "q", "k", "v", "pattern"])
@pytest.mark.parametrize("rows", [None, [3, -2]])
def test_patching_is_replacing_the_tensor(llama, other, what, rows):
    heads = [2, 3]
    there = kept_values(llama, other)
    chosen = slice(None) if rows is None else [3, 22]

    def qkv(layer, value):
        if layer != 1 or what not in "qkv":
            return value
        n = "qkv".index(what)
        changed = value[n].clone()
        axis = heads if what == "q" else [1]
        for head in axis:
            changed[:, head, chosen] = there["qkv", 1][n][:, head, chosen]
        return (*value[:n], changed, *value[n + 1 :])

    def p(layer, value):
        if layer != 1 or what != "pattern":
            return value
        value = value.clone()
        for head in heads:
            value[:, head, chosen] = there["p", 1][:, head, chosen]
        return value

    def z(layer, value):
        if layer != 1 or what != "z":
            return value
        value = value.clone()
        for head in heads:
            value[:, chosen, head] = there["z", 1][:, chosen, head]
        return value

    source = HeadActivations.collect(llama.module, other, heads="L1H2,L1H3", what=[what])
    agree(llama, llama.inputs, [PatchHeads("L1H2,L1H3", source, what=what, rows=rows)], qkv=qkv, p=p, z=z)


def test_a_pattern_and_its_values_make_z(llama, other):
    source = HeadActivations.collect(llama.module, other, what=["pattern", "v", "z"])
    heads = "L1H2,L1H3"
    by_parts = logits(
        llama, llama.inputs, PatchHeads(heads, source, what="pattern"), PatchHeads(heads, source, what="v")
    )
    assert torch.allclose(by_parts, logits(llama, llama.inputs, PatchHeads(heads, source)), atol=1e-4)


@pytest.mark.parametrize("what", ["z", "q", "k", "v", "pattern"])
def test_patching_a_run_with_itself_changes_nothing(llama, what):
    source = HeadActivations.collect(llama.module, llama.batch, what=[what])
    got = logits(llama, llama.batch, PatchHeads("L*H*", source, what=what))
    assert torch.allclose(real(got, llama.batch), real(logits(llama, llama.batch), llama.batch), atol=1e-4)


def test_a_trace_is_a_source(llama, other, tmp_path):
    with torch.no_grad(), interp.hooked(llama.module, capture=interp.Capture(z=True, attention=True)) as run:
        llama.module(**other)
    run.trace.save(tmp_path / "other.zarr")
    trace = interp.Trace.open(tmp_path / "other.zarr")
    for what in ("z", "pattern"):
        direct = HeadActivations.collect(llama.module, other, what=[what])
        got, wanted = (
            logits(llama, llama.inputs, PatchHeads("L1H2", s, what=what, rows=[5, 20])) for s in (trace, direct)
        )
        assert torch.allclose(got, wanted, atol=1e-5)


def test_rows_can_come_from_other_positions(llama, other):
    there = kept_values(llama, other)

    def z(layer, value):
        if layer == 0:
            value = value.clone()
            value[:, 23, 1] = there["z", 0][:, 10, 1]
            value[:, 4, 1] = there["z", 0][:, 22, 1]
        return value

    source = HeadActivations.collect(llama.module, other)
    agree(llama, llama.inputs, [PatchHeads("L0H1", source, rows=[-1, 4], source_rows=[10, -2])], z=z)


def test_resampling_is_patching_z(llama, other):
    source = HeadActivations.collect(llama.module, other)
    got = logits(llama, llama.inputs, MaskHeads("L1H2,L2H0", kind="resample", reference=source))
    assert torch.equal(got, logits(llama, llama.inputs, PatchHeads("L1H2,L2H0", source)))


# Vectors


def test_a_vector_is_added_in_the_heads_own_space(llama):
    vectors = torch.randn(2, 16)

    def z(layer, value):
        value = value.clone()
        if layer == 1:
            value[:, 4:6, 3] += 2.0 * 0.5 * vectors[0]
        if layer == 0:
            value[:, 4:6, 2] += 2.0 * 3.0 * vectors[1]
        return value

    steered = AddToHeads("L1H3,L0H2", vectors, alpha=2.0, sigma=[0.5, 3.0], rows=[4, 5])
    agree(llama, llama.inputs, [steered], z=z)


def test_directions_and_sigmas_are_those_of_the_paper(llama, other):
    third = build("llama", seed=2).inputs
    steered = AddToHeads.mass_mean(llama.module, [llama.inputs, third], [other], "L1H3", alpha=15.0)
    z = [kept_values(llama, inputs)["z", 1][0, -1, 3].numpy() for inputs in (llama.inputs, third, other)]
    direction = (z[0] + z[1]) / 2 - z[2]
    direction /= np.linalg.norm(direction)
    assert np.allclose(steered.vectors[0], direction, atol=1e-5)
    assert steered.sigma[0] == pytest.approx(np.std(np.stack(z) @ direction), rel=1e-4)

    def last(layer, value):
        value = value.clone()
        if layer == 1:
            value[:, -1, 3] += 15 * steered.sigma[0] * torch.from_numpy(direction)
        return value

    agree(llama, llama.inputs, [steered], z=last)
    mean = AddToHeads.function_vectors(llama.module, [llama.inputs, other], "L1H3")
    assert np.allclose(mean.vectors[0], (z[0] + z[2]) / 2, atol=1e-5) and mean.alpha == 1.0


# Norms held


@contextmanager
def norms_held(module, inputs):
    """RMSNorms with the denominators of the clean run, written out for llama."""
    clean = {}
    norms = {n: m for n, m in module.named_modules() if type(m).__name__ == "LlamaRMSNorm"}
    originals = {n: m.forward for n, m in norms.items()}

    def spy(name, norm):
        def forward(x):
            clean[name] = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
            return originals[name](x)

        return forward

    for name, norm in norms.items():
        norm.forward = spy(name, norm)
    with torch.no_grad():
        module(**inputs)
    for name, norm in norms.items():
        norm.forward = lambda x, name=name, norm=norm: norm.weight * x * clean[name]
    yield
    for name, norm in norms.items():
        norm.forward = originals[name]


def test_norms_can_be_frozen_at_the_clean_run(llama):
    scales = NormScales.collect(llama.module, llama.inputs)
    assert len(scales.norms) == 7 and not any(n.centred for n in scales.norms.values())
    got = logits(llama, llama.inputs, MaskHeads("L1H2", norms=scales))
    with norms_held(llama.module, llama.inputs):
        wanted = logits(llama, llama.inputs, MaskHeads("L1H2"))
    assert torch.allclose(got, wanted, atol=1e-4)
    assert not torch.allclose(got, logits(llama, llama.inputs, MaskHeads("L1H2")), atol=1e-3)
    # And nothing is left behind.
    assert torch.equal(logits(llama, llama.inputs), logits(llama, llama.inputs, MaskHeads([], norms=scales)))
    assert not any(m._forward_hooks for m in llama.module.modules())


def test_with_frozen_norms_effects_on_a_linear_path_add_up():
    """gpt2 (LayerNorm) with its last MLP silenced: the path from the last layer's heads to the logits is linear."""
    specimen = build("gpt2")
    torch.nn.init.zeros_(specimen.module.transformer.h[2].mlp.c_proj.weight)
    torch.nn.init.zeros_(specimen.module.transformer.h[2].mlp.c_proj.bias)
    scales = NormScales.collect(specimen.module, specimen.inputs)
    assert all(n.centred for n in scales.norms.values())
    base = logits(specimen, specimen.inputs)
    one, two, both = (
        logits(specimen, specimen.inputs, MaskHeads(h, norms=scales)) - base for h in ("L2H0", "L2H1", "L2H0,L2H1")
    )
    assert torch.allclose(one + two, both, atol=1e-4)
    free = [logits(specimen, specimen.inputs, MaskHeads(h)) - base for h in ("L2H0", "L2H1", "L2H0,L2H1")]
    assert not torch.allclose(free[0] + free[1], free[2], atol=1e-3)
    # The direct effect to the last digit: -(z_h W_O) over the clean scale, through the gain and the unembedding.
    block, head = specimen.module.transformer.h[2], 0
    z = HeadActivations.collect(specimen.module, specimen.inputs).sites["text", 2].values["z"][0, :, head]
    write = z @ block.attn.c_proj.weight[head * 12 : (head + 1) * 12]
    centred = (write - write.mean(-1, keepdim=True)) / scales.scales["transformer.ln_f"][0][0]
    direct = -(centred * specimen.module.transformer.ln_f.weight) @ specimen.module.lm_head.weight.T
    assert torch.allclose(one[0], direct, atol=1e-4)


# Custom


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_plain_python_may_replace_q_k_and_v(llama, which):
    def before(call):
        if call.site.layer == 1:
            setattr(
                call, which, getattr(call, which) * torch.linspace(0.5, 2, getattr(call, which).shape[1])[:, None, None]
            )

    def qkv(layer, value):
        if layer != 1:
            return value
        n = "qkv".index(which)
        changed = value[n] * torch.linspace(0.5, 2, value[n].shape[1])[:, None, None]
        return (*value[:n], changed, *value[n + 1 :])

    agree(llama, llama.inputs, [Custom(before=before)], qkv=qkv)
