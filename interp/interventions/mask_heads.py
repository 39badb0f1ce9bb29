"""Head ablation: zero, mean, resample, uniform, first token."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Edit, Gain, Neighbourhood, Uniform
from interp.heads import HeadError
from interp.interventions._base import HeadPolicy, Strength, every_head
from interp.interventions._patching import patched_outputs
from interp.interventions.activations import HeadActivations
from interp.interventions.head_means import HeadMeans
from interp.interventions.norm_scales import NormScales
from interp.interventions.selection import first_key, positions_in_sample
from interp.models.anatomy import Anatomy
from interp.tracing.calls import Lasting, RunState, SiteCall

KINDS = ("zero", "mean", "resample", "uniform", "first_token")
REFERENCES: dict[str, tuple[type, str]] = {
    "mean": (HeadMeans, "HeadMeans.collect(model, inputs_list)"),
    "resample": (HeadActivations, "HeadActivations.collect(model, corrupt_inputs)"),
}


@dataclass(frozen=True, eq=False)
class MaskHeads(HeadPolicy):
    """Take what chosen heads do out of the model (Michel et al. 2019, https://arxiv.org/abs/1905.10650).

    The kinds are different questions, and their effects never share a ranking:

    - ``zero``: ``z = 0``. What is lost without the head, its constant part included (Michel et al. 2019).
    - ``mean``: z is the head's mean over ``reference`` at the same position. What is lost with the head's dependence on
      this input (Wang et al. 2023, https://arxiv.org/abs/2211.00593).
    - ``resample``: z is what the head gave at the same position of ``reference``, one matched corrupt input of the same
      length. What is lost with what differs between the two inputs (Chan et al. 2022, causal scrubbing; Heimersheim and
      Nanda 2024, https://arxiv.org/abs/2404.15255). Rows after the prompt have no match and stay as they are.
    - ``uniform``: ``p_ij = 1 / |V_i|`` over the visible keys, no learned sink. What is lost without the choice of keys
      (Wu et al. 2024, Retrieval Head, https://arxiv.org/abs/2404.15574, whose code masks heads so, and only in decode).
    - ``first_token``: ``p = 1`` on the sample's first real key. The head rests where idle heads rest. A row that cannot see
      that key (beyond a sliding window) has ``z = 0``, so read it with care for layers with windows. Towers that call
      their attention window by window use the first key of each call.

    ``norms`` freezes the norms downstream at the scales of the clean run (see :class:`NormScales`): for direct effects.

    When not to use it: to rank heads by ``zero`` alone where z has a large constant part; take ``mean`` beside it.

    Args:
        heads: what :func:`interp.heads.as_heads` takes. An empty set changes nothing: the tokens stay identical.
        kind: one of the above.
        scope: rows of the prompt (``prefill``), rows after it (``decode``), ``all``, or those that decide the next token
            (``next``). Encoder and vision rows are prefill.
        rows: absolute positions in the head's query sequence in place of a scope; pads count, negative ones from the
            prompt's end.
        reference: :class:`~interp.interventions.HeadMeans` for ``mean``, :class:`~interp.interventions.HeadActivations` (with
            one sample, or one for each of the batch's) for ``resample``, nothing for the others.
        norms: scales of the clean run on the same inputs; for a forward, not for ``generate``.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model or the reference does not have.
        ValueError: an unknown kind or scope, rows with a scope, a kind without its reference, a scope no head can meet; in
            the run, before the first token: a reference of another length, or ``norms`` with ``generate``.
        TypeError: a reference of another kind.
    """

    _: KW_ONLY
    kind: Literal["zero", "mean", "resample", "uniform", "first_token"] = "zero"
    reference: HeadMeans | HeadActivations | None = None
    norms: NormScales | None = None

    paper: ClassVar[str] = "https://arxiv.org/abs/1905.10650"
    unit: ClassVar[str] = "heads replaced"
    needs: ClassVar[str] = "kind='mean': HeadMeans of a calibration set; 'resample': HeadActivations of a corrupt input"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        super().__post_init__()
        wanted, how = REFERENCES.get(self.kind, (None, ""))
        if wanted is None and self.reference is not None:
            raise ValueError(
                f"reference must be left out unless kind is one of {tuple(REFERENCES)}, got one with kind={self.kind!r}"
            )
        if wanted is not None and self.reference is None:
            raise ValueError(f"reference must be given for kind={self.kind!r}: {how}, got None")
        if wanted is not None and not isinstance(self.reference, wanted):
            raise TypeError(f"reference must be {how}, got {type(self.reference).__name__}")
        if self.kind == "resample" and self.scope in ("decode", "next"):
            raise ValueError(
                f"scope must be 'all' or 'prefill' for kind='resample': a row after the prompt has no match; got {self.scope!r}"
            )
        if self.norms is not None and not isinstance(self.norms, NormScales):
            raise TypeError(f"norms must be NormScales.collect(model, inputs), got {type(self.norms).__name__}")

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> MaskHeads:
        return cls(every_head(model) if strength == "on" else [])

    def prepare(self, anatomy: Anatomy) -> None:
        super().prepare(anatomy)
        heads = self.resolve(anatomy)
        if isinstance(self.reference, HeadActivations):
            self.reference.require(heads, "z", "reference")
        if isinstance(self.reference, HeadMeans):
            for head in heads:
                means = self.reference.sites.get((head.stack, head.layer))
                if means is None or head.head >= means.overall.shape[0]:
                    raise HeadError(
                        f"reference must have means of every head, got none of {head}; {self.reference.describe()}"
                    )

    def start(self, run: RunState) -> None:
        if self.norms is None:
            return
        if run.generating:
            raise ValueError(
                "norms must be left out with generate: tokens to come have no clean run; call the model on one input"
            )
        self.norms.freeze(run.module)

    def before(self, call: SiteCall) -> Edit | None:
        where = None if self.kind in REFERENCES else self.where(call)
        if where is None:
            return None
        if self.kind in ("zero", "uniform"):
            op = Gain(0.0, where) if self.kind == "zero" else Uniform(where)
            return self.kept(call, self.kind, lambda: Edit((op,)), of=(where,))
        # Radius 0 around a coordinate that only the first key shares: a sink window of one key would also leave the
        # keys after the query, which bidirectional attention sees. Uniform on that one key is 1, learned sink or not.
        size = (call.q.shape[2], call.k.shape[2])
        return self.kept(call, size, lambda: _first_token(call, where), of=(where, call.mask), lasting=False)

    def lasting(self, call: SiteCall) -> Lasting | None:
        return self.unvarying(call) if self.kind in ("zero", "uniform") else None

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        where = self.where(call) if self.kind in REFERENCES else None
        if where is None:
            return None
        if isinstance(self.reference, HeadActivations):
            return patched_outputs(call, z, where, self.reference, call.run.of(self), named=self.rows is not None)
        assert self.reference is not None
        means = self.reference.sites[call.site.stack, call.site.layer].at(positions_in_sample(call))
        return torch.where(where.transpose(1, 2).unsqueeze(-1), means.to(z.dtype), z)

    def describe(self) -> dict[str, Any]:
        said = super().describe()
        return said if self.norms is not None else {k: v for k, v in said.items() if k != "norms"}


def _first_token(call: SiteCall, where: Tensor) -> Edit:
    keys = torch.arange(call.k.shape[2], device=call.q.device) + call.mask.kv_offset
    others = (keys[None] != first_key(call)[:, None]).int()[..., None]
    centre = torch.zeros(1, call.q.shape[2], 1, dtype=torch.int32, device=call.q.device)
    return Edit((Neighbourhood(0, centre, others, where), Uniform(where)))
