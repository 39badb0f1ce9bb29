"""Head ablation: zero, mean, uniform, first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Edit, Gain, Neighbourhood, Uniform
from interp.heads import HeadError, Heads
from interp.interventions.head_means import HeadMeans
from interp.interventions.selection import first_key, heads_at, positions_in_sample, read_heads, resolve_heads
from interp.models.anatomy import Anatomy, Site
from interp.tracing.calls import Intervention, RunState, SiteCall

KINDS = ("zero", "mean", "uniform", "first_token")
SCOPES = ("all", "prefill", "decode")


@dataclass(frozen=True, eq=False)
class MaskHeads(Intervention):
    """Take what chosen heads do out of the model (Michel et al. 2019, https://arxiv.org/abs/1905.10650).

    The kinds are different questions, and their effects never share a ranking:

    - ``zero``: ``z = 0``. What is lost without the head, its constant part included (Michel et al. 2019).
    - ``mean``: z is the head's mean over ``reference`` at the same position. What is lost with the head's dependence on
      this input (Wang et al. 2023, https://arxiv.org/abs/2211.00593).
    - ``uniform``: ``p_ij = 1 / |V_i|`` over the visible keys, no learned sink. What is lost without the choice of keys
      (Wu et al. 2024, Retrieval Head, https://arxiv.org/abs/2404.15574, whose code masks heads so).
    - ``first_token``: ``p = 1`` on the sample's first real key. The head rests where idle heads rest. A row that cannot see
      that key (beyond a sliding window) has ``z = 0``, so read it with care for layers with windows. Towers that call
      their attention window by window use the first key of each call.

    When not to use it: to rank heads by ``zero`` alone where z has a large constant part; take ``mean`` beside it.

    Args:
        heads: what :func:`interp.heads.as_heads` takes. An empty set changes nothing: the tokens stay identical.
        kind: one of the above.
        scope: rows of the prompt (``prefill``), rows after it (``decode``) or ``all``. Encoder and vision rows are prefill.
        rows: absolute positions in the head's query sequence in place of a scope; pads count, negative ones from the
            prompt's end.
        reference: :class:`~interp.interventions.HeadMeans`, for ``mean`` and for nothing else.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model or the reference does not have.
        ValueError: an unknown kind or scope, rows with a scope, ``mean`` without a reference, a scope no head can meet.
        TypeError: a reference that is no HeadMeans.
    """

    heads: Any
    _: KW_ONLY
    kind: Literal["zero", "mean", "uniform", "first_token"] = "zero"
    scope: Literal["all", "prefill", "decode"] = "all"
    rows: Sequence[int] | None = None
    reference: HeadMeans | None = None

    paper: ClassVar[str] = "https://arxiv.org/abs/1905.10650"
    unit: ClassVar[str] = "heads replaced"
    stacks: ClassVar[tuple[str, ...]] = ("any",)
    needs: ClassVar[str] = "kind='mean': HeadMeans of a calibration set"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES} (or give rows=), got {self.scope!r}")
        if self.rows is not None:
            if self.scope != "all":
                raise ValueError(f"rows must stand alone, got rows={self.rows!r} with scope={self.scope!r}")
            if isinstance(self.rows, str) or not all(isinstance(r, int) and not isinstance(r, bool) for r in self.rows):
                raise ValueError(f"rows must be whole numbers, got {self.rows!r}")
            object.__setattr__(self, "rows", tuple(self.rows))
        if self.kind == "mean" and self.reference is None:
            raise ValueError("reference must be given for kind='mean': HeadMeans.collect(model, inputs_list), got None")
        if self.reference is not None and not isinstance(self.reference, HeadMeans):
            raise TypeError(
                f"reference must be HeadMeans.collect(model, inputs_list), got {type(self.reference).__name__}"
            )
        if self.reference is not None and self.kind != "mean":
            raise ValueError(f"reference must be left out unless kind='mean', got one with kind={self.kind!r}")
        object.__setattr__(self, "heads", read_heads(self.heads))

    def prepare(self, anatomy: Anatomy) -> None:
        heads = resolve_heads(self.heads, anatomy)
        for head in heads:
            site = anatomy.site(head.stack, head.layer)
            if self.scope == "decode" and not (site.stack == "text" or site.cross):
                raise ValueError(
                    f"scope must be 'all' or 'prefill' for a stack that never decodes, got 'decode' with {head}"
                )
            if self.reference is None:
                continue
            means = self.reference.sites.get((head.stack, head.layer))
            if means is None or head.head >= means.overall.shape[0]:
                raise HeadError(
                    f"reference must have means of every head, got none of {head}; {self.reference.describe()}"
                )

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.layer in self._heads(run).by_layer(site.stack)

    def before(self, call: SiteCall) -> Edit | None:
        where = None if self.kind == "mean" else self._where(call)
        if where is None:
            return None
        if self.kind in ("zero", "uniform"):
            # One edit as long as the rows are the same: what is prepared for it is found again at the next token.
            kept = call.run.of(self).setdefault("edits", {})
            if kept.get(call.site.name, (None, None))[0] is not where:
                kept[call.site.name] = (where, Edit((Gain(0.0, where) if self.kind == "zero" else Uniform(where),)))
            return kept[call.site.name][1]
        # Radius 0 around a coordinate that only the first key shares: a sink window of one key would also leave the
        # keys after the query, which bidirectional attention sees. Uniform on that one key is 1, learned sink or not.
        keys = torch.arange(call.k.shape[2], device=call.q.device) + call.mask.kv_offset
        others = (keys[None] != first_key(call)[:, None]).int()[..., None]
        centre = torch.zeros(1, call.q.shape[2], 1, dtype=torch.int32, device=call.q.device)
        return Edit((Neighbourhood(0, centre, others, where), Uniform(where)))

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        where = self._where(call) if self.kind == "mean" else None
        if where is None or self.reference is None:
            return None
        means = self.reference.sites[call.site.stack, call.site.layer].at(positions_in_sample(call))
        return torch.where(where.transpose(1, 2).unsqueeze(-1), means.to(z.dtype), z)

    def _where(self, call: SiteCall) -> Tensor | None:
        """Bool ``[1, H, Lq|1]``, or None where nothing of the call is meant."""
        mine = heads_at(call, self._heads(call.run))
        if not mine or self.scope not in ("all", call.phase):
            return None
        kept = call.run.of(self).setdefault("where", {})
        key = (call.site.name, call.site.n_heads, call.q.device)
        if key not in kept:
            kept[key] = call.heads(mine)
        where = kept[key]
        if self.rows is None:
            return where
        end = (call.run.prompt_length or 0) if call.site.stack == "text" or call.site.cross else call.q.shape[2]
        wanted = torch.tensor([r + end if r < 0 else r for r in self.rows], dtype=torch.int64, device=call.q.device)
        selected = torch.isin(call.query_positions(), wanted)
        return where & selected if bool(selected.any()) else None

    def _heads(self, run: RunState) -> Heads:
        state = run.of(self)
        if "heads" not in state:
            state["heads"] = resolve_heads(self.heads, run.anatomy)
        return state["heads"]

    def describe(self) -> dict[str, Any]:
        reference = None if self.reference is None else self.reference.describe()
        rows = None if self.rows is None else list(self.rows)
        return {
            "name": "MaskHeads", "heads": str(self.heads), "kind": self.kind, "scope": self.scope, "rows": rows, "reference": reference,
        }  # fmt: skip
