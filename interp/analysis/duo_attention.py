"""DuoAttention: which KV heads need all keys, found by training a gate for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.running import AnalysisError, HeadScore, as_model, build, describe, require_stack, track
from interp.attention import Edit
from interp.attention.edits import SinkWindow
from interp.models.anatomy import Site, anatomy
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked
from interp.tracing.text_only import options_of


@dataclass(frozen=True)
class DuoAttention(HeadScore):
    """Gates of DuoAttention, Xiao et al. 2024, https://arxiv.org/abs/2410.10819, section 2.2.

    One gate ``a`` for each KV head, kept in [0, 1], from 1: ``z = a z_full + (1 - a) z_stream``, z_stream with the first ``sink`` and the
    last ``recent`` keys alone. As in the release, z_full comes from the untouched model (no gradient), z_stream from the mixed one.
    Trained: ``sum over labelled rows of mean_d (h_full - h_mix)^2 / rows + reg * mean |a|``, h the hidden states behind the final norm,
    by AdamW without decay, learning rate warmed up and down over a fifth of the steps each (floor 0.1). Gradients of the gates alone.

    Unit: gate, 1 full attention, 0 streaming. ``gate (layer, kv_head)`` goes into DuoAttention's file with
    :func:`interp.duo_files.write_gates`; ``loss (step)`` is what was trained.

    Args:
        steps: 2000 in the paper, one prompt each.
        lr: 0.02.
        reg: 0.05.
        sink, recent: 128 and 256 in training; smaller than the prompts, or there is nothing to learn.
        with_control: train the control too (twice the time).

    Needs: a decoder with output embeddings. Probe: ``NeedleInHaystack`` in place of the paper's ten passkeys; labelled rows are those of
    the question (where the sample has one) and of the answer.
    Control: the same training with the needle cut out of the prompt: what still has a high gate is not needed for retrieval.
    When not to use: under GQA nearly all gates end near 1, so only their ranks mean something.
    """

    name: ClassVar[str] = "duo_attention"
    summary: ClassVar[str] = "trained gate: does a KV head need more than sink and recent keys?"
    paper: ClassVar[str] = "Xiao et al. 2024, https://arxiv.org/abs/2410.10819"
    unit: ClassVar[str] = "gate (1 full attention, 0 streaming)"
    probe: ClassVar[str] = "NeedleInHaystack"
    control: ClassVar[str] = "the same training with the needle cut out"
    needs: ClassVar[str] = "a language model with output embeddings"

    steps: int = 2000
    lr: float = 0.02
    reg: float = 0.05
    sink: int = 128
    recent: int = 256
    with_control: bool = True

    def __post_init__(self) -> None:
        if min(self.steps, self.recent) < 1 or self.sink < 0 or self.lr <= 0 or self.reg < 0:
            raise AnalysisError(
                "steps and recent must be at least 1, lr above 0, sink and reg at least 0, got "
                f"{self.steps}, {self.recent}, {self.lr}, {self.sink}, {self.reg}"
            )

    def default_probe(self) -> Any:
        from probes.needle import NeedleInHaystack

        return NeedleInHaystack(lengths=(1024, 2048), n=5)

    def run(self, model: Any, probe: Any = None, *, progress: Any = True, **_: Any) -> xr.Dataset:
        """Train the gates.

        Raises:
            AnalysisError: samples without an answer or no longer than the window, no output embeddings, a loss that is not finite.
        """
        from interp.scores import make_score

        model = as_model(model)
        require_stack(model, "text")
        if model.module.get_output_embeddings() is None:
            raise AnalysisError(f"duo_attention needs output embeddings, and {type(model.module).__name__} has none")
        probe = self.default_probe() if probe is None else probe
        samples = [_Forced.of(sample, model) for sample in build(probe, model)]
        longest = max(len(sample.ids) for sample in samples)
        if longest <= self.sink + self.recent:
            raise AnalysisError(
                f"sink + recent = {self.sink + self.recent} must be less than the longest prompt, {longest} tokens: a streaming head "
                "would see all of it"
            )
        gates, losses = self.train(model, samples, progress)
        cut = [without for sample in samples if (without := sample.without_needle()) is not None]
        control = self.train(model, cut, progress)[0] if self.with_control and cut else None
        sites = anatomy(model.module).stacks["text"]
        settings = {
            **asdict(self),
            "probe": describe(probe),
            "model": model.name,
            "sink_size": self.sink,
            "recent_size": self.recent,
        }
        score = make_score(
            _by_query(gates, model), name=self.name, unit=self.unit, paper=self.paper,
            settings={**settings, **self.notes()}, null_by_sample=None if control is None else _by_query(control, model),
        )  # fmt: skip
        n_kv = max(site.n_kv_heads for site in sites)
        score["gate"] = (("layer", "kv_head"), _table(gates, model, n_kv))
        score["loss"] = ("step", np.array(losses))
        return score

    def train(self, model: Model, samples: list[_Forced], progress: Any) -> tuple[dict[int, Tensor], list[float]]:
        """Gates ``[KV head]`` by layer, within [0, 1], and the loss of every step."""
        sites = anatomy(model.module).stacks["text"]
        gates = {s.layer: torch.ones(s.n_kv_heads, device=model.device, requires_grad=True) for s in sites}
        optimizer: Any = torch.optim.AdamW(gates.values(), lr=self.lr, weight_decay=0.0)
        losses: list[float] = []
        with _frozen(model):
            for step in track(range(self.steps), self.name, progress):
                sample = samples[step % len(samples)]
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * factor(step, self.steps)
                with torch.no_grad():
                    for gate in gates.values():
                        gate.clamp_(0, 1)
                loss = self._loss(model, sample, gates)
                if not torch.isfinite(loss):
                    raise AnalysisError(f"the loss must be finite, got {float(loss)} in step {step}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        # The release leaves the last step unclamped (its files have gates down to -1.4e-3) and clips them when it reads them.
        return {layer: gate.detach().clamp(0, 1) for layer, gate in gates.items()}, losses

    def _loss(self, model: Model, sample: _Forced, gates: dict[int, Tensor]) -> Tensor:
        inputs = sample.inputs(model)
        full = _Keep()
        with torch.no_grad(), hooked(model, interventions=[full]):
            wanted = _last_hidden(model, inputs, sample.rows)
        mixed = _Mix(full.z, gates, self.sink, self.recent)
        with torch.enable_grad(), hooked(model, interventions=[mixed]):
            got = _last_hidden(model, inputs, sample.rows)
            distance = (got.float() - wanted.float()).square().mean(-1).mean()
            return distance + self.reg * torch.cat([g.clamp(0, 1) for g in gates.values()]).mean()


def factor(step: int, steps: int) -> float:
    """Factor of the learning rate: a fifth of the steps up, a fifth down, at least 0.1."""
    fifth = max(1, steps // 5)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


@dataclass(frozen=True)
class _Forced:
    """A prompt with its answer, and which rows are labelled."""

    ids: tuple[int, ...]
    rows: tuple[int, ...]
    needle: tuple[int, int] | None

    @classmethod
    def of(cls, sample: Any, model: Model) -> _Forced:
        answer: tuple[int, ...] = tuple(getattr(sample, "answer_ids", ()))
        given: tuple[int, ...] = tuple(getattr(sample, "ids", ()))
        if not answer or not given:
            raise AnalysisError(f"duo_attention needs samples with ids and answer_ids, got {type(sample).__name__}")
        from interp.analysis.query_mass import question_rows

        prompt = len(given)
        needle = getattr(sample, "needle_span", None)
        try:
            first = question_rows(sample, model).start if needle is not None else prompt
        except AnalysisError:
            first = prompt
        ids = (*given, *answer)
        return cls(ids, tuple(range(min(first, prompt - 1), len(ids))), needle)

    def without_needle(self) -> _Forced | None:
        if self.needle is None:
            return None
        start, stop = self.needle
        rows = tuple(row - (stop - start) for row in self.rows)
        return replace(self, ids=self.ids[:start] + self.ids[stop:], rows=rows, needle=None)

    def inputs(self, model: Model) -> dict[str, Tensor]:
        ids = torch.tensor([self.ids], device=model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Keep(Intervention):
    """z of every text site, as the plain model has it."""

    def __init__(self) -> None:
        self.z: dict[str, Tensor] = {}

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == "text"

    def after(self, call: SiteCall, z: Tensor) -> None:
        if call.site.stack == "text":
            self.z[call.site.name] = z.detach()


class _Mix(Intervention):
    """Streams in every head, and mixes in what the plain model had by the gates."""

    def __init__(self, full: Mapping[str, Tensor], gates: Mapping[int, Tensor], sink: int, recent: int) -> None:
        self.full, self.gates = full, gates
        self.edit = Edit((SinkWindow(sink, recent),))

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == "text"

    def before(self, call: SiteCall) -> Edit | None:
        return self.edit if call.site.stack == "text" else None

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        if call.site.stack != "text":
            return None
        group = call.site.n_heads // call.site.n_kv_heads
        gate = self.gates[call.site.layer].clamp(0, 1).repeat_interleave(group)[None, None, :, None].to(z.dtype)
        return gate * self.full[call.site.name] + (1 - gate) * z


def _last_hidden(model: Model, inputs: dict[str, Tensor], rows: tuple[int, ...]) -> Tensor:
    """What the output embeddings get at the rows, ``[row, d]``."""
    found: list[Tensor] = []
    head: Any = model.module.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    keep = inputs["input_ids"].shape[1] - rows[0]
    try:
        model(inputs, **options_of(model.module, logits_to_keep=keep, use_cache=False))
    finally:
        handle.remove()
    return found[0][0, -keep:]


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Only the gates want gradients."""
    wanted = [p for p in model.module.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _by_query(gates: dict[int, Tensor], model: Model) -> np.ndarray[Any, Any]:
    out = np.full(anatomy(model.module).shape("text"), np.nan)
    for site in anatomy(model.module).stacks["text"]:
        values = gates[site.layer].repeat_interleave(site.n_heads // site.n_kv_heads)
        out[site.layer, : site.n_heads] = values.cpu().numpy()
    return out


def _table(gates: dict[int, Tensor], model: Model, n_kv: int) -> np.ndarray[Any, Any]:
    out = np.full((anatomy(model.module).n_layers["text"], n_kv), np.nan)
    for layer, gate in gates.items():
        out[layer, : len(gate)] = gate.cpu().numpy()
    return out
