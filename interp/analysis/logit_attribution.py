"""Direct logit attribution: the output as a sum of what each head, each MLP and the embedding write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from interp.analysis.branch import Branch, normalising, put
from interp.analysis.norms import LinearNorm, is_norm
from interp.analysis.replay import LayerCall, Replay, hidden
from interp.analysis.running import AnalysisError, Floats, HeadScore, as_model, inputs_of, require_stack
from interp.analysis.targets import Positions, Target, target_of
from interp.models.anatomy import Site
from interp.models.model import Model
from interp.tracing.calls import SiteCall

TOLERANCE = 1e-2


@dataclass(frozen=True)
class LogitAttribution(HeadScore):
    """Direct logit attribution, as in Elhage et al. 2021, https://transformer-circuits.pub/2021/framework/index.html, for heads.

    Formula: ``DLA_h = ((r_h - mean r_h) / s) . (w * (W_U[answer] - W_U[foil]))`` with r_h what head h writes to the residual stream
    at the read-out position, s the scale of the final norm in the real run (not that of the component), w its gain; RMSNorm has
    no mean. Without a foil: of the answer's logit alone; ``centred=True`` of the logit less its mean over all classes.

    r_h is found by running the model's own layer with one head at a time: a norm behind the attention (Gemma 2 and 3, OLMo 2) has
    the scale of the real run too, so heads stay additive. Logits are those before a final softcap. Everything else (embedding,
    MLPs, biases) is in :func:`components`, whose sum is the logit; a run in which it is not raises.

    Unit: logits, averaged over read-out positions.

    Args:
        stack: whose heads; the last stack of the model, which writes to the output.
        positions: read-out positions of a text; see :func:`~interp.analysis.targets.target_of`.
        centred: for samples without a foil, see above.

    Probe: ``Passages(n=8, length=64)``, contrast pairs (answer minus foil), or an iterable of inputs.
    Control: the same for another class, drawn at random: what a head writes to just any logit.
    When not to use it: for what a head does through others, or on models that normalise behind the sum (BERT): refused.
    """

    name: ClassVar[str] = "logit_attribution"
    summary: ClassVar[str] = "what the head writes to the right answer's logit, linearly"
    paper: ClassVar[str] = "Elhage et al. 2021, https://transformer-circuits.pub/2021/framework/index.html"
    unit: ClassVar[str] = "logits"
    control: ClassVar[str] = "a class drawn at random in the answer's place"
    needs: ClassVar[str] = "a residual stream (pre-norm), and the stack that writes to the output"
    stacks: ClassVar[tuple[str, ...]] = ("text", "vision")
    probe: ClassVar[str] = "Passages"

    stack: str = "text"
    positions: Positions = "last"
    centred: bool = True
    seed: int = 0

    def default_probe(self) -> Any:
        if self.stack != "text":
            raise AnalysisError(
                f"probe must be given for stack {self.stack!r}: an iterable of inputs, as model.encode makes them"
            )
        from probes.text import Passages

        return Passages(n=8, length=64)

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        inputs = inputs_of(sample, model)
        target = target_of(sample, inputs, model, self.positions)
        parts = _parts(model, inputs, target, self.stack)
        rng = np.random.default_rng(self.seed)
        other = tuple(int(i) for i in rng.integers(parts.n_classes, size=len(parts.target.ids)))
        value = parts.heads(parts.target, centred=self.centred)
        return value[None], parts.heads(Target(target.positions, other, target.foils), centred=self.centred)[None]


def components(
    model: Any, sample: Any, *, stack: str = "text", positions: Positions = "last", centred: bool = True
) -> xr.Dataset:
    """All parts of the answer's logit (minus the foil's), averaged over read-out positions.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        sample: of a probe, or inputs.
        stack: as for :class:`LogitAttribution`.
        positions: likewise.
        centred: likewise.

    Returns:
        ``value (layer, head)``; ``rest (layer)``: MLPs and biases of the layer; scalars ``embedding``, ``bias`` (of the final norm and
        of the output), ``remainder`` (what is added between layers), ``sum`` of them all, and ``total``, the real logit.

    Raises:
        AnalysisError: an output that is not linear in the residual stream (a pooler), or a norm that is not recognised.
    """
    model = as_model(model)
    require_stack(model, stack)
    inputs = inputs_of(sample, model)
    parts = _parts(model, inputs, target_of(sample, inputs, model, positions), stack)
    return parts.dataset(centred=centred)


@dataclass(eq=False)
class _Parts:
    """Contributions of every component to the logits of all read-out positions, ``[..., position, class]``, on the CPU."""

    target: Target
    head: dict[int, Tensor]
    rest: dict[int, Tensor]
    embedding: Tensor
    bias: Tensor
    total: Tensor
    shape: tuple[int, int]
    n_classes: int

    def number(self, logits: Tensor, target: Target, *, centred: bool) -> Tensor:
        """``[...]`` of contributions ``[..., position, class]``."""
        at = torch.arange(len(target.ids))
        found = logits[..., at, list(target.ids)]
        if target.foils is not None:
            found = found - logits[..., at, list(target.foils)]
        elif centred:
            found = found - logits.mean(-1)
        return found.double().mean(-1)

    def heads(self, target: Target, *, centred: bool) -> Floats:
        out = np.full(self.shape, np.nan)
        for layer, logits in self.head.items():
            numbers = self.number(logits, target, centred=centred).numpy()
            out[layer, : len(numbers)] = numbers
        return out

    def dataset(self, *, centred: bool) -> xr.Dataset:
        def number(logits: Tensor) -> float:
            return float(self.number(logits, self.target, centred=centred))

        rest = np.full(self.shape[0], np.nan)
        for layer, logits in self.rest.items():
            rest[layer] = number(logits)
        heads = self.heads(self.target, centred=centred)
        known = float(np.nansum(heads) + np.nansum(rest)) + number(self.embedding) + number(self.bias)
        total = number(self.total)
        return xr.Dataset(
            {
                "value": (("layer", "head"), heads), "rest": ("layer", rest), "embedding": number(self.embedding),
                "bias": number(self.bias), "sum": known, "total": total, "remainder": total - known,
            },
            coords={"layer": range(self.shape[0]), "head": range(self.shape[1])},
            attrs={"name": "logit attribution", "unit": "logits", "paper": LogitAttribution.paper},
        )  # fmt: skip


def _parts(model: Model, inputs: Mapping[str, Any], target: Target, stack: str) -> _Parts:
    given = {k: v for k, v in inputs.items() if k != "labels"}
    with _without_softcap(model), Replay(model, given, stack, positions=target.positions) as replay:
        clean = replay.logits()[0]
        target = target.resolved(clean)
        tail = _Tail(replay)
        zero = tail.logits(torch.zeros_like(hidden(tail.last.result)))[0]
        head: dict[int, Tensor] = {}
        rest: dict[int, Tensor] = {}
        between = torch.zeros_like(hidden(tail.last.result), dtype=torch.float32)
        previous: LayerCall | None = None
        sites = {replay.path(site.layer): site for site in replay.sites}
        for call in tail.calls:
            if previous is not None:
                between += call.given.float() - hidden(previous.result).float()
            layer = int(call.path.rpartition(".")[2])
            increment = hidden(call.result).float() - call.given.float()
            site = sites.get(call.path)
            if site is not None:
                writes, increment = _writes(replay, site, call)
                head[layer] = torch.cat([tail.logits(w[None]) for w in writes]).cpu() - zero.cpu()
            rest[layer] = tail.logits(increment)[0].cpu() - zero.cpu()
            previous = call
        embedding = tail.logits(tail.calls[0].given + between.to(tail.calls[0].given.dtype))[0].cpu() - zero.cpu()
        parts = _Parts(
            target, head, rest, embedding, zero.cpu(), clean.cpu(), replay.shape.shape(stack), clean.shape[-1]
        )
    _require_additive(parts, model)
    return parts


def _require_additive(parts: _Parts, model: Model) -> None:
    known = parts.embedding + parts.bias + sum(parts.rest.values()) + sum(h.sum(0) for h in parts.head.values())
    off = float((known - parts.total).abs().max())
    spread = float(parts.total.abs().max()) + 1e-6
    limit = TOLERANCE if model.module.dtype in (torch.float32, torch.float64) else 0.1
    if not off <= limit * spread:
        raise AnalysisError(
            f"the output must be linear in the residual stream behind the final norm; in {type(model.module).__name__} the parts add up "
            f"to logits that are off by {off:.3g} of {spread:.3g}"
        )


def _writes(replay: Replay, site: Site, call: LayerCall) -> tuple[Tensor, Tensor]:
    """Residual write of each head ``[H, ...]``, and what else the layer adds ``[1, ...]``, fp32."""
    rows = site.n_heads + 1
    alone = torch.zeros(rows, site.n_heads, dtype=torch.bool, device=call.given.device)
    alone[torch.arange(1, rows), torch.arange(site.n_heads)] = True

    def keep(call: SiteCall, z: Tensor, row: Tensor) -> Tensor:
        return z.masked_fill(~alone[row][:, None, :, None], 0)

    branch = Branch(replay, site, linear=True)
    out: Tensor = branch.run(rows, after={site.layer: keep}, until=site.layer).float()
    if out.shape[0] != rows:
        raise AnalysisError(
            f"stack {replay.stack!r} must have one sequence a sample, got a batch of {out.shape[0] // rows}"
        )
    return out[1:] - out[:1], out[:1] - call.given.float()


class _Tail:
    """What comes behind the last layer of a stack, as a linear map of its residual stream."""

    def __init__(self, replay: Replay) -> None:
        container = replay.path(0).rpartition(".")[0]
        self.replay = replay
        self.calls = [c for c in replay.calls if c.path.rpartition(".")[0] == container]
        self.last = self.calls[-1]
        if len({c.path for c in self.calls}) < len(self.calls) or self.last is not replay.calls[-1]:
            raise AnalysisError(
                f"stack must be the one that writes to the output, once a forward; {replay.stack!r} is not"
            )
        self.norms = self._norms()

    def logits(self, stream: Tensor) -> Tensor:
        """Logits ``[rows, position, class]`` for a residual stream ``[rows, position, width]``."""
        undo = [put(module, normalising(norms, len(stream))) for module, norms in self.norms]
        try:
            return self.replay.logits(self._run(stream))
        finally:
            for module, previous in undo:
                del module.forward
                if previous is not None:
                    module.forward = previous

    def _run(self, stream: Tensor) -> Any:
        layer = int(self.last.path.rpartition(".")[2])
        stream = stream.to(self.last.given.dtype)
        return self.replay.run(layer, len(stream), serve=lambda call, given: stream if call is self.last else None)

    def _norms(self) -> list[tuple[nn.Module, list[LinearNorm]]]:
        found: dict[str, tuple[nn.Module, list[LinearNorm]]] = {}
        handles: list[Any] = []
        active = [False]

        def watch(name: str, module: nn.Module) -> None:
            def hook(sub: nn.Module, args: tuple[Any, ...], result: Any) -> None:
                if active[0]:
                    active[0] = False
                    found.setdefault(name, (module, []))[1].append(LinearNorm.of(module, args[0]))
                    active[0] = True

            handles.append(module.register_forward_hook(hook))

        for name, module in self.replay.module.named_modules():
            if is_norm(module):
                watch(name, module)

        def serve(call: LayerCall, given: Tensor) -> Tensor | None:
            active[0] = call is self.last
            return hidden(call.result) if call is self.last else None

        try:
            self.replay.run(int(self.last.path.rpartition(".")[2]), 1, serve=serve)
        finally:
            for handle in handles:
                handle.remove()
        return list(found.values())


@contextmanager
def _without_softcap(model: Model) -> Iterator[None]:
    """A final softcap is no linear map: logits are read in front of it."""
    configs: list[Any] = [model.config, model.config.get_text_config()]
    before = [
        (c, c.final_logit_softcapping) for c in configs if getattr(c, "final_logit_softcapping", None) is not None
    ]
    for config, _ in before:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        for config, value in before:
            config.final_logit_softcapping = value
