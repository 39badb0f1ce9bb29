"""Gains on head outputs: any number for each head, sample and position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from interp.attention import Edit, Gain
from interp.interventions._base import HeadPolicy, HeadValues, Strength, every_head
from interp.models.anatomy import Anatomy, Site
from interp.tracing.calls import Lasting, RunState, SiteCall


@dataclass(frozen=True, eq=False)
class ScaleHeads(HeadPolicy):
    """Multiply what chosen heads write: ``z_h *= gain`` (the gates of Michel et al. 2019, https://arxiv.org/abs/1905.10650).

    0 removes a head, 1 leaves it, 2 is what VHR does to its heads, -1 turns it round. A tensor that wants a gradient keeps
    it: ``d loss / d gain`` at 1 is Michel's importance.

    When not to use it: on a model that normalises after attention (Gemma 2 and 3, OLMo 2), where scaling all heads of a layer
    alike is undone.

    Args:
        heads: what :func:`interp.heads.as_heads` takes. An empty set changes nothing.
        gain: a number; ``[n]``, one for each of ``heads`` in their order; ``[S|1, n|1]``, by sample of the batch; or
            ``[S|1, n|1, P]``, by position counted from the sample's first real token, 1 from P on. Beams and returned sequences
            take their sample's. Gains of 1 change nothing: the tokens stay identical.
        scope, rows: as for :class:`~interp.interventions.MaskHeads`.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model does not have.
        ValueError: a gain of another shape or not finite; in the run, before the first token, for another number of samples.
    """

    gain: Any

    paper: ClassVar[str] = "https://arxiv.org/abs/1905.10650"
    unit: ClassVar[str] = "factor on z"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_gain", HeadValues("gain", self.gain, 1.0))

    @property
    def values(self) -> HeadValues:
        """The gain as a table."""
        return vars(self)["_gain"]

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> ScaleHeads:
        # Half of the heads: a model that normalises after attention would undo a factor on all of them.
        heads = [head for head in every_head(model) if head.head % 2 == 0]
        return cls(heads, 0.25 if strength == "on" else 1.0)

    def prepare(self, anatomy: Anatomy) -> None:
        super().prepare(anatomy)
        self.values.check(self.resolve(anatomy))

    def acts_on(self, site: Site, run: RunState) -> bool:
        return not self.values.is_neutral and super().acts_on(site, run)

    def lasting(self, call: SiteCall) -> Lasting | None:
        return None if self.values.by_position or self.values.differentiable else self.unvarying(call)

    def before(self, call: SiteCall) -> Edit | None:
        where = None if self.values.is_neutral else self.where(call)
        if where is None:
            return None
        values, heads = self.values, self.heads_of(call.run)
        if values.number is not None:
            number = values.number
            return self.kept(call, "number", lambda: Edit((Gain(number, where),)), of=(where,))
        if values.differentiable:
            return Edit((Gain(values.at(call, heads), where),))
        place = (call.mask.q_offset, call.q.shape[2]) if values.by_position else ()
        key = (values.key(call, heads), place)
        return self.kept(
            call, key, lambda: Edit((Gain(values.at(call, heads), where),)), of=(where,), lasting=not values.by_position
        )
