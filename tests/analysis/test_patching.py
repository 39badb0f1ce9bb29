"""Activation, attribution and path patching against runs of the model with hooks, one head at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.analysis import score
from interp.analysis.attribution_patching import AttributionPatching, between
from interp.analysis.pairs import activations
from interp.analysis.running import AnalysisError
from interp.models.model import Model
from interp.testing import build
from probes.contrast import ContrastPair, evaluate, logit_difference
from probes.samples import Sample

ANSWER, FOIL = 5, 9


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair_of(specimen: Any, *changes: tuple[int, int]) -> ContrastPair:
    ids = specimen.inputs["input_ids"][0].tolist()
    other = list(ids)
    for at, token in changes or ((3, 50), (7, 60)):
        other[at] = token
    return ContrastPair(Sample(tuple(ids)), Sample(tuple(other)), ANSWER, FOIL, positions=(("first", 3),))


def difference(module: Any, sample: Any, interventions: Any = ()) -> float:
    with torch.no_grad(), interp.hooked(module, interventions=list(interventions)):
        return float(logit_difference(module(**sample.inputs()).logits[0, -1].double(), ANSWER, FOIL))


def source(module: Any, sample: Any, what: str) -> Any:
    from interp.interventions.activations import HeadActivations

    return HeadActivations.collect(module, sample.inputs(), what=(what,))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("what", ["z", "q", "k", "v", "pattern"])
def test_patching_is_that_of_the_intervention_head_by_head(family: str, what: str) -> None:
    specimen = build(family)
    module, one = specimen.module, pair_of(specimen)
    result = score("activation_patching", module, [one], what=what, normalise=False)
    clean = source(module, one.clean, what)
    base = difference(module, one.corrupt)
    for site in interp.anatomy(module).stacks["text"]:
        group = site.n_heads // site.n_kv_heads if what in ("k", "v") else 1
        for head in range(0, site.n_heads, group):
            heads = ",".join(f"L{site.layer}H{h}" for h in range(head, head + group))
            wanted = difference(module, one.corrupt, [interp.PatchHeads(heads, clean, what=what)]) - base
            got = result["value"].sel(layer=site.layer).values[head : head + group]
            np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert float(abs(result["null"]).max()) < 2e-5


def test_normalised_values_are_shares_of_the_difference() -> None:
    specimen = build("llama")
    module, one = specimen.module, pair_of(specimen)
    plain, shares = (score("activation_patching", module, [one], normalise=n)["value"] for n in (False, True))
    runs = evaluate(module, [one])
    np.testing.assert_allclose(shares * runs.difference[0], plain, atol=1e-5)


def test_noising_is_denoising_of_the_reversed_pair() -> None:
    specimen = build("llama")
    one = pair_of(specimen)
    turned = ContrastPair(one.corrupt, one.clean, ANSWER, FOIL)
    a = score("activation_patching", specimen.module, [one], direction="noise", normalise=False)
    b = score("activation_patching", specimen.module, [turned], direction="denoise", normalise=False)
    np.testing.assert_allclose(a["value"], b["value"], atol=1e-6)


def test_rows_are_positions_of_the_pair() -> None:
    specimen = build("llama")
    module, one = specimen.module, pair_of(specimen)
    clean = source(module, one.clean, "z")
    result = score("activation_patching", module, [one], rows=lambda p: [p.position("first")], normalise=False)
    base = difference(module, one.corrupt)
    wanted = difference(module, one.corrupt, [interp.PatchHeads("L1H2", clean, rows=[3])]) - base
    assert float(result["value"].sel(layer=1, head=2)) == pytest.approx(wanted, abs=2e-5)
    before = score("activation_patching", module, [one], rows=[0, 1, 2], normalise=False)
    assert float(abs(before["value"]).max()) < 1e-5  # nothing differs before the first changed token


def test_a_pair_that_does_not_differ_has_nothing_to_restore() -> None:
    specimen = build("llama")
    same = Sample(tuple(specimen.inputs["input_ids"][0].tolist()))
    one = ContrastPair(same, same, ANSWER, FOIL)
    assert np.isnan(score("activation_patching", specimen.module, [one])["value"]).all()
    assert float(abs(score("activation_patching", specimen.module, [one], normalise=False)["value"]).max()) < 1e-5


@pytest.mark.parametrize("what", ["z", "q", "k", "v"])
def test_attribution_is_the_derivative_of_patching(what: str) -> None:
    """``d m(base + t (source - base)) / dt`` at 0, by a central difference in double precision."""
    specimen = build("llama", dtype=torch.float64)
    module, one = specimen.module, pair_of(specimen)
    model = Model(module)
    result = score("attribution_patching", module, [one], what=what, normalise=False)
    clean, corrupt = (activations(model, part.inputs(), "text", what) for part in (one.clean, one.corrupt))  # type: ignore[arg-type]
    step = 1e-2
    group = 2 if what in ("k", "v") else 1
    head = 1
    for layer in range(3):
        change = clean[layer] - corrupt[layer]

        def moved(t: float, layer: int = layer, change: torch.Tensor = change) -> float:
            def after(call: Any, z: torch.Tensor) -> torch.Tensor | None:
                return moving(z, 2) if what == "z" and call.site.layer == layer else None

            def before(call: Any) -> None:
                if what != "z" and call.site.layer == layer:
                    setattr(call, what, moving(getattr(call, what), 1))

            def moving(x: torch.Tensor, axis: int) -> torch.Tensor:
                chosen = torch.tensor([head // group])
                return x.index_add(axis, chosen, t * change.index_select(axis, chosen))

            return difference(module, one.corrupt, [interp.Custom(before=before, after=after)])

        wanted = (moved(step) - moved(-step)) / (2 * step)
        assert float(result["value"].sel(layer=layer, head=head)) == pytest.approx(wanted, rel=5e-3, abs=1e-5)


def test_attribution_is_exact_for_a_small_change() -> None:
    specimen = build("llama", dtype=torch.float64)
    module, one = specimen.module, pair_of(specimen)
    embedding: Any = module.get_input_embeddings()
    with torch.no_grad():
        # The two changed tokens become almost the tokens that they replace.
        ids, other = (part.inputs()["input_ids"][0] for part in (one.clean, one.corrupt))
        for at in (3, 7):
            embedding.weight[other[at]] = embedding.weight[ids[at]] + 1e-3 * embedding.weight[other[at]]
    exact = score("activation_patching", module, [one], normalise=False)["value"]
    near = score("attribution_patching", module, [one], normalise=False)["value"]
    np.testing.assert_allclose(near, exact, rtol=0.02, atol=float(abs(exact).max()) * 0.02)


def test_inputs_between_two_runs() -> None:
    specimen = build("gemma2")  # which scales what it looks up
    model, one = Model(specimen.module), pair_of(specimen)
    base, other = one.corrupt.inputs(), one.clean.inputs()
    seen: list[torch.Tensor] = []
    layer: Any = specimen.module.get_submodule("model.layers.0")
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        specimen.module(**base)
        specimen.module(**other)
        with between(model, base, other, 0.25):
            specimen.module(**base)
    handle.remove()
    torch.testing.assert_close(seen[2], seen[0] + 0.25 * (seen[1] - seen[0]))


def test_steps_close_the_gap_to_the_clean_run() -> None:
    """Along the line of inputs the sum over all inputs is the whole difference; for z it need not be, but steps converge."""
    specimen = build("llama", dtype=torch.float64)
    one = pair_of(specimen)
    found = [AttributionPatching(steps=n).run(specimen.module, [one], progress=False)["value"] for n in (16, 64)]
    np.testing.assert_allclose(found[0], found[1], atol=0.02)


def test_controls_differ_from_what_they_control() -> None:
    specimen = build("llama")
    result = score("attribution_patching", specimen.module, [pair_of(specimen)])
    assert float(abs(result["value"] - result["null"]).max()) > 1e-3


def test_path_to_the_output_of_the_last_layer_is_its_patch() -> None:
    """GPT-NeoX: nothing lies behind the last attention, so the direct path is the whole effect."""
    specimen = build("gpt_neox")
    one = pair_of(specimen)
    path = score("path_patching", specimen.module, [one])["value"]
    whole = score("activation_patching", specimen.module, [one])["value"]
    np.testing.assert_allclose(path[-1], whole[-1], atol=1e-5)


@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_path_patching_against_its_definition_with_frozen_modules(family: str, what: str) -> None:
    """Sender patched, all else frozen by hooks; the receivers' projection of that stream, put into the base run by hooks."""
    specimen = build(family)
    module: Any = specimen.module
    # The second change lies within the sliding windows of the last row.
    one = pair_of(specimen, (3, 50), (-5, 60))
    receiver = len(module.model.layers) - 1
    result = score("path_patching", module, [one], receivers=f"L{receiver}H0-1", what=what, normalise=False)
    model = Model(module)
    z_clean = activations(model, one.clean.inputs(), "text", "z")
    base = difference(module, one.corrupt)
    layers = module.model.layers
    kept: dict[str, Any] = {}
    heard: dict[int, torch.Tensor] = {}
    for sender, head in ((0, 1), (receiver - 1, 2)):
        handles = [
            part.register_forward_hook(lambda _, args, out, name=f"{n}.{name}": kept.update({name: out}))
            for n, layer in enumerate(layers)
            for name, part in (("self_attn", layer.self_attn), ("mlp", layer.mlp))
        ]
        difference(module, one.corrupt)
        for handle in handles:
            handle.remove()
        # Frozen: the MLPs from the sender on, the attentions between sender and receiver.
        frozen = [(layers[n].mlp, f"{n}.mlp") for n in range(sender, receiver)]
        frozen += [(layers[n].self_attn, f"{n}.self_attn") for n in range(sender + 1, receiver)]
        handles = [part.register_forward_hook(lambda _, args, out, name=name: kept[name]) for part, name in frozen]

        def send(call: Any, z: torch.Tensor, sender: int = sender, head: int = head) -> torch.Tensor | None:
            if call.site.layer == receiver:
                heard[0] = getattr(call, what).clone()
            if call.site.layer != sender:
                return None
            z = z.clone()
            z[:, :, head] = z_clean[sender][:, :, head]
            return z

        difference(module, one.corrupt, [interp.Custom(after=send)])
        for handle in handles:
            handle.remove()

        def receive(call: Any) -> None:
            if call.site.layer == receiver:
                new = getattr(call, what).clone()
                heads = [0] if what in ("k", "v") else [0, 1]
                new[:, heads] = heard[0][:, heads]
                setattr(call, what, new)

        wanted = difference(module, one.corrupt, [interp.Custom(before=receive)]) - base
        got = float(result["value"].sel(layer=sender, head=head))
        assert got == pytest.approx(wanted, abs=2e-5) and abs(wanted) > 1e-6
    assert np.isnan(result["value"][receiver]).all()


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("activation_patching", {"what": "mlp"}, "what must be one of"),
        ("activation_patching", {"rows": [99]}, "rows must lie"),
        ("activation_patching", {"direction": "up"}, "direction must be"),
        ("activation_patching", {"metric": "jsd"}, "compares two"),
        ("attribution_patching", {"what": "pattern"}, "what must be"),
        ("attribution_patching", {"steps": -1}, "steps must be"),
        ("attribution_patching", {"metric": "accuracy"}, "must have a gradient"),
        ("path_patching", {"what": "z"}, "what must be"),
        ("path_patching", {"receivers": "L2H0", "what": "v"}, "whole KV groups"),
        ("path_patching", {"receivers": "L0H0"}, "senders before"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict[str, Any], says: str) -> None:
    specimen = build("llama")
    with pytest.raises(AnalysisError, match=says):
        score(name, specimen.module, [pair_of(specimen)], **settings)


def test_wrong_samples_are_named() -> None:
    specimen = build("llama")
    with pytest.raises(AnalysisError, match="contrast pairs"):
        score("activation_patching", specimen.module, [specimen.inputs])
    uneven = ContrastPair(Sample((1, 5, 6)), Sample((1, 5)), ANSWER, FOIL)
    with pytest.raises(AnalysisError, match="aligned token by token"):
        score("attribution_patching", specimen.module, [uneven])
