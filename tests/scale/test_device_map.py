"""Models whose weights lie on disk and CPU between calls (accelerate's ``device_map``): the same tokens, readings and scores."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import Capture, InterventionError, Knockout, MaskHeads, PatchHeads, hooked
from interp.interventions import HeadActivations, HeadMeans
from interp.interventions import _classes as interventions
from interp.testing import build
from probes.contrast import ContrastPair
from probes.key_value import KeyValueTokens
from probes.repeated import RepeatedTokens
from probes.samples import Sample

logging.getLogger("accelerate").setLevel(logging.ERROR)
HEADS = "L0H1,L1H2"
ALL = Capture(row_stats=True, attention=True, z=True, received=True, pooled=8)


class Pair:
    """A model in memory, and the same from a folder, in parts on disk, in parts on the CPU."""

    def __init__(self, name: str, folder: Path) -> None:
        specimen = build(name)
        self.module: Any = specimen.module
        self.folder = folder / "model"
        self.module.save_pretrained(self.folder)
        text = "model." if name == "llama" else "model.language_model."
        layers = len(self.module.get_submodule(text + "layers"))
        places = {f"{text}layers.{n}": "cpu" if n == 1 else "disk" for n in range(layers)}
        places |= {text + "embed_tokens": "disk", text + "norm": "disk", text + "rotary_emb": "cpu", "lm_head": "disk"}
        if name == "llava":
            places |= {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu"}
        self.offloaded = interp.load(self.folder, device_map=places, offload_folder=str(folder / "offload"))
        self.inputs: dict[str, Any] = specimen.inputs
        ids = self.inputs["input_ids"]
        other = torch.where((ids > 10) & (ids < 80), ids + 7, ids) if name == "llama" else ids
        self.corrupt = {**self.inputs, "input_ids": other}
        if name == "llava":
            self.corrupt["pixel_values"] = self.inputs["pixel_values"].flip(-1)

    @cached_property
    def plain(self) -> torch.Tensor:
        """Logits without an intervention, which both models agree on."""
        logits = compare(self, NAMED["nothing"])
        assert logits is not None
        return logits

    def generate(self, model: Any, used: list[Any]) -> tuple[Any, Any, Any]:
        with torch.no_grad(), hooked(model, interventions=used, capture=ALL) as run:
            out = model.generate(
                **({"inputs": self.inputs} if model is self.offloaded else self.inputs),
                max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        return out.sequences, torch.stack(out.logits), run.trace


@pytest.fixture(scope="module", params=["llama", "llava"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pytest.importorskip("accelerate")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Pair(request.param, tmp_path_factory.mktemp(request.param))
    torch.set_num_threads(before)


def masked(kind: str, collect: Any = None) -> Callable[[Any, Pair], list[Any]]:
    def make(model: Any, pair: Pair) -> list[Any]:
        given = {} if collect is None else {"reference": collect(model, pair)}
        return [MaskHeads(HEADS, kind=kind, **given)]  # type: ignore[arg-type]

    return make


def patched(what: str) -> Callable[[Any, Pair], list[Any]]:
    return lambda model, pair: [
        PatchHeads("L1H0,L1H1", HeadActivations.collect(model, pair.corrupt, what=(what,)), what=what)  # type: ignore[arg-type]
    ]


NAMED: dict[str, Callable[[Any, Pair], list[Any]]] = {
    "nothing": lambda model, pair: [],
    "zero": masked("zero"), "uniform": masked("uniform"), "first_token": masked("first_token"),
    "mean": masked("mean", lambda model, pair: HeadMeans.collect(model, [pair.inputs, pair.corrupt])),
    "resample": masked("resample", lambda model, pair: HeadActivations.collect(model, pair.corrupt)),
    **{f"patch {what}": patched(what) for what in ("z", "q", "k", "v", "pattern")},
    **{name: (lambda model, pair, c=cls: [c.example(model, strength="on")]) for name, cls in interventions().items()
       if hasattr(cls, "example") and name not in ("MaskHeads", "PatchHeads")},
}  # fmt: skip


def compare(pair: Pair, make: Callable[[Any, Pair], list[Any]]) -> torch.Tensor | None:
    """Logits of the model in memory; None where it refuses, and the other then does with the same words."""
    try:
        ids, logits, trace = pair.generate(pair.module, make(pair.module, pair))
    except InterventionError as error:
        with pytest.raises(InterventionError, match=re.escape(str(error))):
            pair.generate(pair.offloaded, make(pair.offloaded, pair))
        return None
    got_ids, got_logits, got_trace = pair.generate(pair.offloaded, make(pair.offloaded, pair))
    assert torch.equal(ids, got_ids)
    torch.testing.assert_close(got_logits, logits, atol=2e-4, rtol=2e-4)
    assert list(trace) == list(got_trace)
    for stack in trace:
        for name, wanted in trace[stack].data_vars.items():
            np.testing.assert_allclose(got_trace[stack][name], wanted, atol=1e-4, rtol=1e-4, err_msg=f"{stack} {name}")
    return logits


@pytest.mark.parametrize("name", [*NAMED])
def test_interventions_and_readings_are_those_of_the_model_in_memory(pair: Pair, name: str) -> None:
    plain = pair.plain
    changed = plain if name == "nothing" else compare(pair, NAMED[name])
    needs_image = name in ("PAI", "PAINT", "VAR", "VHR")
    assert (changed is None) == (needs_image and "pixel_values" not in pair.inputs)
    assert any(p.device.type == "meta" for p in pair.offloaded.module.parameters()), "weights went back to disk"
    if changed is not None and name in ("zero", "patch z" if "pixel_values" not in pair.inputs else "VAR", "Streaming"):
        assert not torch.equal(changed, plain)


def test_interventions_leave_nothing_behind(pair: Pair) -> None:
    again = compare(pair, NAMED["nothing"])
    assert again is not None and torch.equal(again, pair.plain)


def test_sessions_leave_nothing_behind(pair: Pair) -> None:
    used = Knockout.example(pair.offloaded, strength="on")
    first = pair.generate(pair.offloaded, [used])[1]
    with hooked(pair.offloaded, interventions=[MaskHeads(HEADS)]):
        pair.generate(pair.offloaded, [used])
    assert torch.equal(pair.generate(pair.offloaded, [used])[1], first)


PROMPTS = [{"input_ids": torch.randint(3, 90, (1, 16), generator=torch.Generator().manual_seed(n))} for n in range(2)]
PAIRS = [ContrastPair(Sample((1, 5, 6, 7, 8)), Sample((1, 5, 9, 7, n)), 5, 9) for n in (8, 10)]
NEEDLES = KeyValueTokens(range(10, 50), range(50, 90), n_pairs=(6,))
REPEATED = RepeatedTokens(n=2, length=6, vocabulary=range(10, 60))
PROBES: dict[str, Any] = {
    **dict.fromkeys(
        ("entropy", "effective_keys", "top_k_mass", "selection_margin", "attention_distance", "redundancy", "ablation",
         "direct_effect", "logit_attribution", "head_gates", "write_norm", "entry_influence", "sink", "elasticity",
         "streaming_mass"), PROMPTS),
    **dict.fromkeys(("activation_patching", "attribution_patching", "path_patching"), PAIRS),
    **dict.fromkeys(("previous_token", "duplicate_token", "induction", "prefix_matching", "copying"), REPEATED),
    **dict.fromkeys(("retrieval", "activation_frequency", "needle_contribution", "query_mass", "duo_attention"), NEEDLES),
    **dict.fromkeys(("ov_copying", "qk_matching"), None),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "sink": {"length": 12, "measure": "mass"}, "elasticity": {"lengths": (8, 12, 16), "rows": 4},
    "streaming_mass": {"sink": 1, "recent": 4}, "duo_attention": {"steps": 3, "sink": 1, "recent": 4},
    **{name: {"mode": "teacher_forced"} for name in ("retrieval", "activation_frequency")},
}  # fmt: skip
ON_IMAGES = (
    "vision_aware_divergence",
    "local_vision_divergence",
    "image_mass",
    "image_centric",
    "visual_sink_share",
    "vit_importance",
)


@pytest.mark.parametrize("name", [*PROBES, *ON_IMAGES])
def test_scores_are_those_of_the_model_in_memory(pair: Pair, name: str) -> None:
    sees = "pixel_values" in pair.inputs
    if sees != (name in ON_IMAGES):
        pytest.skip("text scores are for the Llama, image scores for the LLaVA")
    probe = [pair.inputs, pair.corrupt] if sees else PROBES[name]
    wanted, got = (interp.score(name, m, probe, **SETTINGS.get(name, {})) for m in (pair.module, pair.offloaded))
    np.testing.assert_allclose(got["value"], wanted["value"], atol=1e-5, rtol=1e-4)
    assert np.isfinite(got["value"]).any()


def test_the_weights_of_a_head_are_read_from_disk(pair: Pair) -> None:
    from interp.analysis.projections import head_weights, weight_in_memory
    from interp.models.anatomy import anatomy

    site = anatomy(pair.module).stacks["text"][0]
    assert pair.offloaded.module.get_submodule(site.name).q_proj.weight.device.type == "meta"
    a, b = (head_weights(interp.load(m), site) for m in (pair.module, pair.offloaded))
    for part in ("W_Q", "W_K", "W_V", "W_O"):
        torch.testing.assert_close(getattr(a, part), getattr(b, part))
    head = pair.offloaded.module.get_output_embeddings()
    assert torch.equal(weight_in_memory(head), pair.module.get_output_embeddings().weight.detach())
    assert head.weight.device.type == "meta"


def test_a_sweep_begun_in_memory_goes_on_from_disk(pair: Pair, tmp_path: Path) -> None:
    from interp.sweeps import sweep
    from interp.sweeps.plan import fingerprint

    assert fingerprint(pair.offloaded.module) == fingerprint(pair.module)
    other = copy.deepcopy(pair.module)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.001)
    assert fingerprint(other) != fingerprint(pair.module), "a weight that lies on disk in the other model"
    if "pixel_values" in pair.inputs:
        return
    whole = sweep(interp.load(pair.folder), PROMPTS, folder=tmp_path / "job", kind="zero", progress=False)
    (tmp_path / "job" / "task-000001.npz").unlink()
    resumed = sweep(pair.offloaded, PROMPTS, folder=tmp_path / "job", kind="zero", progress=False)
    np.testing.assert_allclose(resumed.value_by_sample, whole.value_by_sample, atol=1e-5)
