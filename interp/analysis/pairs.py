"""What the patching scores share: contrast pairs, the activations of one run, and putting them into another, head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp.analysis.replay import Before, Change
from interp.analysis.running import AnalysisError, HeadScore
from interp.analysis.targets import Measure, Target, measure, target_of
from interp.attention import Edit, Readout, attend, combine
from interp.models.anatomy import Site
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked

What = Literal["z", "q", "k", "v", "pattern"]
WHAT = ("z", "q", "k", "v", "pattern")
KEYED = ("k", "v")
Direction = Literal["denoise", "noise"]
Rows = Sequence[int] | Callable[[Any], Sequence[int]] | None


class PairRun(NamedTuple):
    """One pair: the run that is patched, the run it is patched from, and what is read.

    ``base`` is the corrupt half for ``denoise``, the clean one for ``noise``.
    """

    base: dict[str, Any]
    source: dict[str, Any]
    target: Target


@dataclass(frozen=True)
class PairScore(HeadScore):
    """A score of heads over contrast pairs, with a metric of the output.

    Args:
        stack: whose heads.
        metric: one of :data:`interp.analysis.targets.MEASURES`, or a function ``(logits [rows, class], answer, foil) -> [rows]``.
        direction: ``"denoise"`` patches the clean run's activations into the corrupt run, ``"noise"`` the other way round.
        normalise: give ``(m_patched - m_base) / (m_source - m_base)``, 0 for no effect, 1 for all of it (NaN where the two runs do
            not differ); else the plain difference.
    """

    stacks: ClassVar[tuple[str, ...]] = ("any",)
    probe: ClassVar[str] = "contrast pairs (IndirectObject)"

    stack: str = "text"
    metric: str | Callable[..., Any] = "logit_difference"
    direction: Direction = "denoise"
    normalise: bool = True

    def __post_init__(self) -> None:
        measure(self.metric)
        if self.metric == "jsd":
            raise AnalysisError("metric must be of one run's output; 'jsd' compares two")
        if self.direction not in ("denoise", "noise"):
            raise AnalysisError(f"direction must be 'denoise' or 'noise', got {self.direction!r}")

    @property
    def result_unit(self) -> str:
        return "fraction of the difference between the runs" if self.normalise else measure(self.metric).unit

    @property
    def measured(self) -> Measure:
        return measure(self.metric)

    def default_probe(self) -> Any:
        if self.stack != "text":
            raise AnalysisError(f"probe must be given for stack {self.stack!r}: an iterable of probes.contrast pairs")
        from probes.indirect_object import IndirectObject

        return IndirectObject(n=8)

    def pair(self, model: Model, sample: Any) -> PairRun:
        """The two runs of a sample.

        Raises:
            AnalysisError: it is no pair, or not aligned token by token.
        """
        for half in ("clean", "corrupt"):
            if not callable(getattr(getattr(sample, half, None), "inputs", None)):
                raise AnalysisError(f"samples must be contrast pairs (probes.contrast), got {type(sample).__name__}")
        if getattr(sample, "ids", ()) and not sample.aligned:
            raise AnalysisError("pairs must be aligned token by token: clean and corrupt have different lengths")
        clean, corrupt = ({**part.inputs(model.device)} for part in (sample.clean, sample.corrupt))
        target = target_of(sample, clean, model)
        base, source = (corrupt, clean) if self.direction == "denoise" else (clean, corrupt)
        return PairRun(base, source, target)

    def scaled(self, change: Tensor, whole: float) -> np.ndarray[Any, Any]:
        """A change of the metric, normalised if asked for."""
        values = change.double().cpu().numpy()
        if not self.normalise:
            return values
        return values / whole if whole else np.full(values.shape, np.nan)


class _Activations(Intervention):
    """Keeps what heads do, by layer."""

    def __init__(self, stack: str, what: What) -> None:
        self.stack, self.what = stack, what
        self.found: dict[int, Tensor] = {}

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == self.stack

    def after(self, call: SiteCall, z: Tensor) -> None:
        if call.site.stack != self.stack:
            return
        if call.site.layer in self.found:
            raise AnalysisError(
                f"stack {self.stack!r} must be called once a forward, and layer {call.site.layer} was not"
            )
        kept = z if self.what == "z" else pattern(call) if self.what == "pattern" else getattr(call, self.what)
        self.found[call.site.layer] = kept.detach().clone()


def pattern(call: SiteCall, heads: Tensor | None = None) -> Tensor:
    """``p [B, H, Lq, Lk]`` of a call, as edited so far."""
    out = attend(
        call.q.detach(), call.k.detach(), call.v.detach(), scale=call.scale, mask=call.mask, softcap=call.softcap,
        sinks=call.sinks, bias=call.bias, edit=combine(*call.edits), want_output=False,
        readout=Readout(heads=heads, attention=True),
    )  # fmt: skip
    assert out.readings.attention is not None
    return out.readings.attention


def activations(model: Model, inputs: dict[str, Any], stack: str, what: What) -> dict[int, Tensor]:
    """By layer, in one forward: ``z [B, Lq, H, Dv]``, ``q [B, H, Lq, D]``, ``k``, ``v [B, H_kv, Lk, D]`` or ``pattern [B, H, Lq, Lk]``."""
    collector = _Activations(stack, what)
    with hooked(model.module, interventions=[collector]), torch.no_grad():
        model.module(**{k: v for k, v in inputs.items() if k != "labels"})
    if not collector.found:
        raise AnalysisError(f"these inputs do not reach the stack {stack!r}: the model did not call it")
    return collector.found


def patch(
    what: What, heads: Tensor, values: Tensor, positions: Sequence[int] | None
) -> tuple[Before | None, Change | None]:
    """An edit and a change that put activations of another run in the place of a head's, at some positions.

    Args:
        what: see :data:`WHAT`.
        heads: bool ``[rows, H]``; for k and v, where it is True for any head of a KV group the group is patched.
        values: as :func:`activations` gives them, of one sequence.
        positions: query positions (key positions for k and v); None is all.
    """
    if what in ("q", *KEYED):
        return _before(what, heads, values, positions), None

    def change(call: SiteCall, z: Tensor, row: Tensor) -> Tensor:
        new = values.to(z.device)
        if what == "pattern":
            v = call.v.repeat_interleave(call.site.n_heads // call.site.n_kv_heads, 1)
            new = (new.to(v.dtype) @ v).transpose(1, 2)
        _require(new.shape[1:], z.shape[1:], what)
        where = heads.to(z.device)[row][:, None, :, None] & _at(z.shape[1], positions, z.device)[None, :, None, None]
        return torch.where(where, new.to(z.dtype), z)

    return None, change


def _before(what: What, heads: Tensor, values: Tensor, positions: Sequence[int] | None) -> Before:
    def before(call: SiteCall, row: Tensor) -> Edit | None:
        own: Tensor = getattr(call, what)
        new = values.to(own.device)
        _require(new.shape[1:], own.shape[1:], what)
        chosen = heads.to(own.device)[row]
        if what in KEYED:
            chosen = chosen.unflatten(1, (call.site.n_kv_heads, -1)).any(-1)
        where = chosen[:, :, None, None] & _at(own.shape[2], positions, own.device)[None, None, :, None]
        setattr(call, what, torch.where(where, new.to(own.dtype), own))
        return None

    return before


def _at(length: int, positions: Sequence[int] | None, device: torch.device) -> Tensor:
    if positions is None:
        return torch.ones(length, dtype=torch.bool, device=device)
    outside = [p for p in positions if not -length <= p < length]
    if outside or not positions:
        raise AnalysisError(f"rows must lie in a run of {length} positions, got {list(positions)}")
    out = torch.zeros(length, dtype=torch.bool, device=device)
    out[[p % length for p in positions]] = True
    return out


def _require(have: torch.Size, wanted: torch.Size, what: str) -> None:
    if have != wanted:
        raise AnalysisError(
            f"both runs must have {what} of one shape, got {list(have)} for {list(wanted)}: align the pair"
        )


def rows_of(rows: Rows, sample: Any) -> list[int] | None:
    """Positions of one pair."""
    if rows is None:
        return None
    return [int(r) for r in (rows(sample) if callable(rows) else rows)]
