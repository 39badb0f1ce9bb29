"""The released algorithms of VAR and VHR restated literally in eager PyTorch, against ours."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import interp
from interp import VAR, VHR
from interp.attention import Mask
from interp.interventions.image_groups import KeyGroups

IMAGE = 5


@contextmanager
def eager_text(module, function):
    """The text layers' attention is ``function(weights [B, H, Lq, Lk], module) -> weights``, then times v."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def attention(site, q, k, v, mask, scaling, **_):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * scaling
        if mask is not None:
            scores = scores + mask[..., : k.shape[2]]
        weights, after = function(scores.float().softmax(-1).to(q.dtype), site)
        return after((weights @ v).transpose(1, 2).contiguous()), weights

    AttentionInterface.register("literal", attention)
    AttentionMaskInterface.register("literal", eager_mask)
    config = module.config.text_config
    before = config._attn_implementation
    config._attn_implementation = "literal"
    try:
        yield
    finally:
        config._attn_implementation = before


class LiteralVAR:
    """VisAttnSink's DimProspector, head fork and VARProcessor, loop by loop, for one sample with one image.

    Positions and stage are kept for one sample only: the release's stale sinks of the first sample are not restated.
    """

    def __init__(self, module, ids, *, dims, tau, rho, summ, p, layers):
        where = torch.nonzero(ids[0] == IMAGE).flatten()
        self.start, self.length = int(where[0]), len(where)
        self.dims, self.tau, self.rho, self.summ, self.p, self.layers = dims, tau, rho, summ, p, layers
        self.sinks, self.moved, self.sums = {}, [], []
        self.handles = [
            layer.register_forward_pre_hook(self.prospect(n), with_kwargs=True)
            for n, layer in enumerate(module.model.language_model.layers)
        ]

    def prospect(self, layer):
        def hook(_, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if x.shape[1] == 1:  # sinks are searched in the prefill alone
                return
            x = x.to(torch.float32)
            rms = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            values = torch.stack([rms[..., d] for d in self.dims], -1).abs().max(-1).values
            self.sinks[layer] = torch.nonzero(values[0] > self.tau).flatten().tolist()

        return hook

    def __call__(self, weights, site):
        layer = site.layer_idx
        if layer in self.layers:
            weights = self.redistribute(weights.clone(), layer)
        self.sums.append(weights.sum(-1))
        return weights, lambda z: z

    def redistribute(self, weights, layer):
        image = range(self.start, self.start + self.length)
        sinks = self.sinks[layer]
        visual = [j for j in sinks if j in image]
        if not visual:
            return weights
        rest = [j for j in image if j not in visual]
        rows = range(self.start + self.length, weights.shape[2]) if weights.shape[2] > 1 else [0]
        for head in range(weights.shape[1]):
            for row in rows:
                a = weights[0, head, row]
                if a[list(image)].sum() < self.summ:
                    continue
                if a[visual].sum() / (a[list(image)] + 1e-6).sum() > self.rho:
                    continue
                budget = (1 - self.p) * a[sinks].sum()
                share = a[rest] / a[rest].sum()
                a[sinks] *= self.p
                a[rest] += budget * share
                self.moved.append((layer, weights.shape[2] == 1))
        return weights

    def remove(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_var_is_the_release_restated(deep_llava, llava_inputs, run, seed, release):
    module, inputs = deep_llava(5, seed), llava_inputs(seed)
    settings = {"tau": 1.8, "summ": 0.1, "dims": (0, 1, 2)}
    if release:
        ours = VAR(0.6, 0.4, **settings, p_means="kept", rho_means="sink", skip_last=0)
        literal = LiteralVAR(module, inputs["input_ids"], rho=0.4, p=0.6, layers=(2, 3, 4), **settings)
    else:
        ours = VAR(0.7, 0.6, **settings)
        literal = LiteralVAR(module, inputs["input_ids"], rho=0.4, p=0.3, layers=(2, 3), **settings)
    with eager_text(module, literal):
        _, wanted, _ = run(module, inputs)
    literal.remove()
    _, got, session = run(module, inputs, [ours])
    _, plain, _ = run(module, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
    assert (got - plain).abs().max() > 0.05
    assert {True, False} == {decode for _, decode in literal.moved}, "prefill and decode rows must both be moved"
    assert {layer for layer, _ in literal.moved} <= ({2, 3, 4} if release else {2, 3})
    assert max(float((s - 1).abs().max()) for s in literal.sums) < 1e-5
    report = session.report()
    untouched = {0, 1} if release else {0, 1, 4}
    for site in session.anatomy.stacks["text"]:
        assert any("edited" in how for how in report[site.name]) == (site.layer not in untouched), report[site.name]


def test_var_row_sums_stay_one_in_prefill_and_decode(deep_llava, llava_inputs):
    module, inputs = deep_llava(5), llava_inputs()
    var = VAR(0.9, 0.1, 1.8, 0.05, dims=(0, 1, 2))
    maps = {}
    for name, policies in (("plain", []), ("var", [var])):
        with (
            torch.no_grad(),
            interp.hooked(module, capture=interp.Capture(attention=True), interventions=policies) as s,
        ):
            module.generate(**inputs, max_new_tokens=4, do_sample=False)
        maps[name] = torch.from_numpy(s.trace["text"].attention.values).nan_to_num(0)
    sums = maps["var"].sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    n = inputs["input_ids"].shape[1]
    # The same x enters layer 2, so its maps differ by the redistribution alone: image rows by nothing, text rows by something.
    moved = (maps["var"] - maps["plain"])[0, 2].abs().amax((0, 2))
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    assert moved[image].max() < 1e-6
    assert moved[int(image[-1]) + 1 : n].max() > 1e-3
    assert torch.allclose(maps["var"][0, :2, :, :n], maps["plain"][0, :2, :, :n], atol=1e-6)


class LiteralVHR:
    """The ports of VHR: last-row outputs of a text-only forward, then selection head by head while the image branch runs."""

    def __init__(self, alpha, layers, guard):
        self.alpha, self.layers, self.guard = alpha, layers, guard
        self.text, self.chosen, self.filtered, self.stage = {}, {}, 0, "text"

    def __call__(self, weights, site):
        layer = site.layer_idx

        def after(z):
            if self.stage == "text":
                self.text[layer] = z[0, -1].float()
                return z
            if layer not in self.layers:
                return z
            if layer not in self.chosen:
                self.chosen[layer] = self.choose(self.text[layer], z[0, -1].float())
            z = z.clone()
            for head in self.chosen[layer]:
                z[:, :, head] = self.alpha * z[:, :, head]
            return z

        return weights, after

    def choose(self, text, image):
        vhd = ((text - image) ** 2).sum(-1)
        activation = (text**2).sum(-1)
        if vhd.std() > self.guard:
            mask = (vhd > vhd.mean() + vhd.std()) & (activation > activation.mean() + activation.std())
            self.filtered += int(mask.sum())
            vhd[mask] = 0
        return torch.nonzero(vhd > torch.median(vhd)).flatten().tolist()


@pytest.mark.parametrize("seed", range(4))
def test_vhr_is_the_release_restated(deep_llava, llava_inputs, run, seed):
    module, inputs = deep_llava(6, seed, heads=8), llava_inputs(seed)
    layers = (1, 3, 4, 5)  # the second and round(14 / 32 * 6) = 3 last
    literal = LiteralVHR(2.0, layers, 0.02)
    keep = inputs["input_ids"][0] != IMAGE
    text = {
        "input_ids": inputs["input_ids"][:, keep],
        "attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.long),
    }
    with eager_text(module, literal):
        with torch.no_grad():
            module(**text, use_cache=False)
        literal.stage = "image"
        _, wanted, _ = run(module, inputs)
    _, got, session = run(module, inputs, [VHR(2.0, filter_guard=0.02)])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
    assert session.extra_forwards == 1
    assert (got - run(module, inputs)[1]).abs().max() > 0.05
    if not literal.filtered:
        assert all(len(heads) == 4 for heads in literal.chosen.values())


def test_the_outlier_filter_acts_as_restated():
    generator = torch.Generator().manual_seed(0)
    acted = 0
    for _ in range(200):
        text, image = torch.randn(2, 8, 6, generator=generator).mul(torch.rand(8, 1, generator=generator) * 3)
        literal = LiteralVHR(2.0, (), 1.0)
        wanted = literal.choose(text, image)
        got = VHR().select(image[None], text[None])[0].nonzero().flatten().tolist()
        assert got == wanted
        acted += literal.filtered
    assert acted > 20


def test_groups_of_a_prompt_grow_with_the_sequence(deep_llava, llava_inputs, run):
    """One edit object for all layers with the same sinks, as long as no key is added."""
    module, inputs = deep_llava(5), llava_inputs()
    seen = []
    look = interp.Custom(before=lambda call: seen.append((call, list(call.edits))) if call.generated else None)
    run(module, inputs, [interp.PAI(0.5), look], tokens=3)
    decode = {}
    for call, edits in seen:
        decode.setdefault(call.k.shape[2], set()).update(id(e) for e in edits if e is not None)
    assert len(decode) == 2 and all(len(ids) == 1 for ids in decode.values())
    groups = KeyGroups(torch.tensor([[0, 1]], dtype=torch.int8), beyond=1)
    call = SimpleNamespace(q=torch.zeros(2, 1, 1, 1), k=torch.zeros(2, 1, 4, 1), mask=Mask())
    assert groups.of(call).tolist() == [[0, 1, 1, 1]] * 2
