"""Pay attention to image: a boost of the scores of image tokens, and guidance by the text alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Boost, Edit
from interp.interventions._base import Strength
from interp.interventions.image_boost import boost_edit, boost_lasting, check_boost, guidance
from interp.interventions.image_groups import KeyGroups, reads_text, require_images, require_vision
from interp.interventions.layers import read_layers, resolve_layers, skipping
from interp.interventions.text_only import guided
from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.model import unwrap
from interp.tracing.calls import Intervention, InterventionError, Lasting, RunState, SiteCall


@dataclass(frozen=True, eq=False)
class PAI(Intervention):
    """Raise the scores of image tokens where an answer is predicted (Liu et al. 2024, https://arxiv.org/abs/2407.21771).

    ``s_ij += alpha |s_ij|`` before the softmax, for image keys j and the last row i of the prompt and of every step; all heads.
    With ``gamma`` other than 1 also guidance: ``logp = gamma (logp_image - logp_text) + logp_text`` over the tokens with
    ``logp_image >= log(cutoff) + max logp_image``, where the text branch is the plain model on the text alone with a KV cache of
    its own: one more forward at every step. Where texts are forced (margins, POPE, answers) their scores are mixed too, uncut.

    When not to use it: ``|s|`` lifts a negative score towards 0 for alpha < 1 and past it for more, so that large alphas favour
    the tokens that fitted least. Judge captions by recall, length and repetition beside CHAIR.

    Args:
        alpha: 0.2 (README of the release; PAINT's scripts use 0.5 for LLaVA); 0 is no boost.
        gamma: 1 is no guidance; the release has 1.1 (its CHAIR script 2).
        layers: of the text stack; None is all but the first two (release: 2..31 of 32). Negative ones count from the last.
        rows: ``last`` (release), or ``text``: all text rows of the prompt too.
        first_token: False leaves the first generated token's row alone, as the release does by accident with guidance.
        cutoff: 0.1 (release); 0 cuts nothing.

    Raises:
        ValueError: a number or name that cannot be.
        InterventionError: before the first token: a model or sample without an image, layers that do not exist or none left; with
            guidance, a model that does not run on text alone.
    """

    alpha: float = 0.2
    gamma: float = 1.0
    _: KW_ONLY
    layers: Sequence[int] | None = None
    rows: Literal["last", "text"] = "last"
    first_token: bool = True
    cutoff: float = 0.1

    paper: ClassVar[str] = "https://arxiv.org/abs/2407.21771"
    unit: ClassVar[str] = "fraction of the score's size"
    stacks: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[str] = "an image in every prompt"
    extra_passes: ClassVar[str] = "with guidance, the text alone beside every step"

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, float | int) or not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, got {self.alpha!r}")
        check_boost(self.gamma, self.cutoff, self.rows)
        object.__setattr__(self, "layers", read_layers(self.layers))

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> PAI:
        layers = range(anatomy(unwrap(model)).shape("text")[0])
        return cls(0.5 if strength == "on" else 0.0, layers=layers)

    def prepare(self, anatomy: Anatomy) -> None:
        if self.layers is not None:
            resolve_layers(self.layers, anatomy)
        if self.alpha or self.gamma != 1:
            require_vision(self, anatomy)
        if self.alpha and not self._layers(anatomy):
            raise InterventionError(
                f"PAI leaves the first two layers alone, and {anatomy.model_class} has {anatomy.shape('text')[0]}: give layers"
            )

    def start(self, run: RunState) -> None:
        if not (self.alpha or self.gamma != 1) or not reads_text(run):
            return
        prompt, state = require_images(self, run), run.of(self)
        state["layers"] = self._layers(run.anatomy) if self.alpha else ()
        state["groups"] = KeyGroups(prompt.image.to(torch.int8))
        state["operations"] = (Boost(torch.tensor([[[[0.0, self.alpha]]]])),)

    def logits_processors(self, run: RunState) -> list[Any]:
        return guidance(self, run, self.gamma, self.cutoff)

    def forced(self, model: Any, inputs: Any, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, int]:
        """Scores of given tokens in place of the logits ``[B, n, V]``; see :func:`~interp.interventions.text_only.guided`."""
        return guided(self, model, inputs, logits, self.gamma)

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == "text" and site.layer in run.of(self).get("layers", ())

    def before(self, call: SiteCall) -> Edit | None:
        return boost_edit(self, call, self.rows, self.first_token) if self.acts_on(call.site, call.run) else None

    def lasting(self, call: SiteCall) -> Lasting | None:
        return boost_lasting(self, call)

    def _layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return skipping(2, 0, anatomy) if self.layers is None else resolve_layers(self.layers, anatomy)
