"""Path patching: what a head says to chosen later heads, or to the output, and to nobody else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from interp.analysis.branch import Branch
from interp.analysis.pairs import KEYED, PairScore, activations, patch
from interp.analysis.replay import Before, Replay
from interp.analysis.running import AnalysisError, Floats
from interp.heads import Heads, as_heads
from interp.models.model import Model
from interp.tracing.calls import SiteCall


@dataclass(frozen=True)
class PathPatching(PairScore):
    """Path patching of Wang et al. 2022, https://arxiv.org/abs/2211.00593, appendix B (Goldowsky-Dill et al. 2023,
    https://arxiv.org/abs/2304.05969): the effect of every head through one direct path.

    Formula: in the base run the sender's z is the source run's; every layer behind it (and its own MLP) adds what it added in the
    base run, up to the receivers, whose q, k or v are noted; then the base run is repeated with these q, k or v in the receivers
    and nothing else changed. The score is the change of the metric over that between the runs. Without receivers the path is the
    one to the output: the direct effect of the patched head. Norms on the way are the model's own and run; nothing is linearised.

    Unit: fraction of the difference between the runs, or that of the metric with ``normalise=False``.

    Args:
        stack, metric, direction, normalise: see :class:`~interp.analysis.pairs.PairScore`. Wang et al. patch the clean run from
            the corrupt one (``"noise"``).
        receivers: heads, in layers behind the senders; None is the output.
        what: the receivers' ``q``, ``k`` or ``v``. For k and v whole KV groups receive.

    Probe: ``IndirectObject(n=8)``, or any iterable of aligned contrast pairs.
    Control: a row of the same batch in which no sender is patched: the numerical floor.
    When not to use it: for paths through MLPs: they are frozen here, and count among what is not direct.
    """

    name: ClassVar[str] = "path_patching"
    summary: ClassVar[str] = "what the head says directly to chosen heads' queries, keys or values, or to the output"
    paper: ClassVar[str] = "Wang et al. 2022, https://arxiv.org/abs/2211.00593"
    unit: ClassVar[str] = "fraction of the difference between the runs"
    control: ClassVar[str] = "a row in which no sender is patched"
    needs: ClassVar[str] = "contrast pairs; a residual stream (pre-norm)"

    receivers: Any = None
    what: Literal["q", "k", "v"] = "q"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("q", "k", "v"):
            raise AnalysisError(f"what must be 'q', 'k' or 'v', got {self.what!r}")

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        pair = self.pair(model, sample)
        source = activations(model, pair.source, self.stack, "z")
        function = self.measured.function
        with Replay(model, pair.source, self.stack, positions=pair.target.positions) as replay:
            other = replay.logits()
        with Replay(model, pair.base, self.stack, positions=pair.target.positions) as replay:
            base = replay.logits()
            target = pair.target.resolved(base[0])
            own = function(base, base[0], target)
            whole = float(function(other, other[0], target) - own)
            receivers = None if self.receivers is None else self._receivers(replay)
            out, null = (np.full((1, *replay.shape.shape(self.stack)), np.nan) for _ in range(2))
            last = max(receivers) if receivers else None
            for site in replay.sites:
                if last is not None and site.layer >= last:
                    continue
                rows = site.n_heads + 1
                mask = torch.zeros(rows, site.n_heads, dtype=torch.bool)
                mask[torch.arange(1, rows), torch.arange(site.n_heads)] = True
                _, change = patch("z", mask, source[site.layer], None)
                assert change is not None
                branch = Branch(replay, site)
                if receivers is None:
                    output = branch.run(rows, after={site.layer: change})
                else:
                    behind = {layer: heads for layer, heads in receivers.items() if layer > site.layer}
                    heard = self._heard(branch, rows, {site.layer: change}, behind, replay)
                    edits = {layer: self._put(heads, heard[layer]) for layer, heads in behind.items()}
                    output = replay.run(min(behind), rows, before=edits)
                found = function(replay.logits(output), base[0], target)
                out[0, site.layer, : site.n_heads] = self.scaled(found[1:] - found[0], whole)
                null[0, site.layer, : site.n_heads] = self.scaled(found[:1] - own, whole)
        return out, null

    def _receivers(self, replay: Replay) -> dict[int, list[int]]:
        heads: Heads = as_heads(self.receivers, replay.shape)
        wrong = [str(h) for h in heads if h.stack != self.stack]
        if wrong or not heads:
            raise AnalysisError(f"receivers must be heads of stack {self.stack!r}, got {wrong or 'none'}")
        found = heads.by_layer(self.stack)
        if self.what in KEYED:
            for layer, mine in found.items():
                site = replay.shape.site(self.stack, layer)
                group = site.n_heads // site.n_kv_heads
                if any(len([h for h in mine if h // group == kv]) != group for kv in {h // group for h in mine}):
                    raise AnalysisError(
                        f"receivers must be whole KV groups of {group} heads for what={self.what!r}, got {heads}"
                    )
        if min(s.layer for s in replay.sites) >= max(found):
            raise AnalysisError(f"receivers must have senders before them, got {heads}")
        return found

    def _heard(
        self, branch: Branch, rows: int, after: Mapping[int, Any], receivers: dict[int, list[int]], replay: Replay
    ) -> dict[int, Tensor]:
        """What the receivers' q, k or v are when only the sender's own write has changed, ``[rows, H, L, D]``."""
        heard: dict[int, Tensor] = {}

        def note(call: SiteCall, z: Tensor, row: Tensor) -> Tensor:
            heard[call.site.layer] = getattr(call, self.what).detach().clone()
            return z

        live = {replay.path(layer) for layer in receivers}
        listen = {**after, **dict.fromkeys(receivers, note)}
        branch.run(rows, after=listen, until=max(receivers), listening=live)
        return heard

    def _put(self, heads: list[int], values: Tensor) -> Before:
        def before(call: SiteCall, row: Tensor) -> None:
            own: Tensor = getattr(call, self.what)
            group = call.site.n_heads // call.site.n_kv_heads if self.what in KEYED else 1
            mask = torch.zeros(own.shape[1], dtype=torch.bool, device=own.device)
            mask[sorted({h // group for h in heads})] = True
            setattr(call, self.what, torch.where(mask[None, :, None, None], values.to(own.dtype), own))

        return before
