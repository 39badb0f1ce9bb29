"""PAINT: a boost of the image tokens that the vision tower's class token looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Boost, Edit
from interp.interventions._base import Strength
from interp.interventions.image_boost import as_codes, boost_edit, boost_lasting, check_boost, guidance
from interp.interventions.image_groups import KeyGroups, Prompt, reads_text, require_images, require_vision
from interp.interventions.layers import read_layers, resolve_layers, skipping
from interp.interventions.text_only import guided
from interp.interventions.tower_scores import TowerScores, require_class_token
from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.model import unwrap
from interp.tracing.calls import Intervention, InterventionError, Lasting, RunState, SiteCall


@dataclass(frozen=True, eq=False)
class PAINT(Intervention):
    """Boost local and summary image tokens told by the vision tower (Arif et al. 2025, https://arxiv.org/abs/2501.12206).

    In each picture the tower sees, tokens are scored by the class token's attention, summed over heads. *Local* tokens are the
    top ``local_share`` by the first layer; *summary* tokens are as many of the top by the layer before the last as are outliers
    there (``> Q3 + 1.5 IQR``); a token of both is a summary token. Then, before the softmax of the text layers, all heads alike,
    ``s_ij += alpha |s_ij|`` for local and ``beta |s_ij|`` for summary keys, at the last row of the prompt and of every step. The
    release adds PAI's guidance with ``gamma`` 1.1 (see :class:`~interp.interventions.pai.PAI`), off here unless asked for.

    When not to use it: at the headline setting (alpha 0.7, beta 0.4, the defaults) LLaVA-1.5's captions collapse into repetition (half
    of those that the authors published have fewer than 80 % distinct 4-grams), which lowers CHAIR by repeating right objects. At
    0.3 and 0.3 they do not. The release's *spatial* tokens are ranked by row sums of a softmax, which are all 1, so they are left out.

    Args:
        alpha: boost of local tokens.
        beta: boost of summary tokens.
        gamma: guidance; 1 is none.
        local_share: 0.25 (release).
        scored_by: ``cls``, or ``mean``: the mean over the tower's rows, for towers without a class token (not in the paper).
        layers, rows, first_token, cutoff: as in PAI.

    Raises:
        ValueError: a number or name that cannot be.
        InterventionError: before the first token: a model or sample without an image, layers that do not exist or none left, a tower
            without a class token, or one whose patches cannot be told in the text sequence.
    """

    alpha: float = 0.7
    beta: float = 0.4
    gamma: float = 1.0
    _: KW_ONLY
    local_share: float = 0.25
    scored_by: Literal["cls", "mean"] = "cls"
    layers: Sequence[int] | None = None
    rows: Literal["last", "text"] = "last"
    first_token: bool = True
    cutoff: float = 0.1

    paper: ClassVar[str] = "https://arxiv.org/abs/2501.12206"
    unit: ClassVar[str] = "fraction of the score's size"
    stacks: ClassVar[tuple[str, ...]] = ("text", "vision")
    needs: ClassVar[str] = "an image in every prompt, and patches that stay apart in the text sequence"
    extra_passes: ClassVar[str] = "with guidance, the text alone beside every step"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if not isinstance(self.local_share, float | int) or not 0 <= self.local_share <= 1:
            raise ValueError(f"local_share must be a number within 0 .. 1, got {self.local_share!r}")
        if self.scored_by not in ("cls", "mean"):
            raise ValueError(f"scored_by must be 'cls' or 'mean', got {self.scored_by!r}")
        check_boost(self.gamma, self.cutoff, self.rows)
        object.__setattr__(self, "layers", read_layers(self.layers))

    @property
    def _boosts(self) -> bool:
        return bool(self.alpha or self.beta)

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> PAINT:
        if strength == "off":
            return cls(0.0, 0.0)
        return cls(layers=range(anatomy(unwrap(model)).shape("text")[0]), scored_by="mean")

    def prepare(self, anatomy: Anatomy) -> None:
        if self.layers is not None:
            resolve_layers(self.layers, anatomy)
        if not self._boosts and self.gamma == 1:
            return
        require_vision(self, anatomy)
        if self._boosts and not self._layers(anatomy):
            raise InterventionError(
                f"PAINT leaves the first two layers alone, and {anatomy.model_class} has {anatomy.shape('text')[0]}: give layers"
            )

    def start(self, run: RunState) -> None:
        if not (self._boosts or self.gamma != 1) or not reads_text(run):
            return
        prompt, state, earlier = require_images(self, run), run.of(self), run.earlier(self)
        if not self._boosts:
            return
        if run.cached_length and "codes" not in earlier:
            raise InterventionError(
                f"PAINT reads the vision tower, and past_key_values holds {run.cached_length} positions that this session has not "
                "filled: run the prompt inside the session, on the same cache"
            )
        old: Tensor = earlier.get("codes", torch.zeros(len(prompt), 0, dtype=torch.int8))
        state["codes"] = torch.nn.functional.pad(old, (0, prompt.kind.shape[1] - old.shape[1]))
        tower = run.anatomy.stacks["vision"]
        state["scores"] = TowerScores((tower[0], tower[max(0, len(tower) - 2)]), self.scored_by)
        if self.scored_by == "cls":
            require_class_token(self, run, bool(old.shape[1]))
        state["layers"] = self._layers(run.anatomy)
        state["operations"] = (Boost(torch.tensor([[[[0.0, self.alpha, self.beta]]]])),)

    def logits_processors(self, run: RunState) -> list[Any]:
        return guidance(self, run, self.gamma, self.cutoff)

    def forced(self, model: Any, inputs: Any, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, int]:
        """Scores of given tokens in place of the logits ``[B, n, V]``; see :func:`~interp.interventions.text_only.guided`."""
        return guided(self, model, inputs, logits, self.gamma)

    def acts_on(self, site: Site, run: RunState) -> bool:
        state = run.of(self)
        if site.stack == "vision":
            return "scores" in state and any(site.name == s.name for s in state["scores"].sites)
        return site.stack == "text" and site.layer in state.get("layers", ())

    def before(self, call: SiteCall) -> Edit | None:
        if not self.acts_on(call.site, call.run):
            return None
        state = call.run.of(self)
        if call.site.stack == "vision":
            state["scores"].read(call)
            return None
        if "groups" not in state:
            state["codes"] = self._codes(call.run, state["prompt"], state["codes"], state["scores"])
            state["groups"] = KeyGroups(state["codes"])
        return boost_edit(self, call, self.rows, self.first_token)

    def lasting(self, call: SiteCall) -> Lasting | None:
        return None if call.site.stack == "vision" else boost_lasting(self, call)

    def _codes(self, run: RunState, prompt: Prompt, known: Tensor, scores: TowerScores) -> Tensor:
        """Key groups int8 ``[S, P]``: 0 other, 1 local, 2 summary."""
        if not scores.seen:
            return known
        local, summary = torch.zeros_like(prompt.image), torch.zeros_like(prompt.image)
        for (sample, positions), (first, late) in scores.by_picture(self, run, prompt.kind.shape[1]):
            n = len(positions)
            summary[sample, positions[top(late, outliers(late))]] = True
            local[sample, positions[top(first, math.floor(self.local_share * n))]] = True
        codes = as_codes([local & ~summary, summary])
        return torch.where(codes > 0, codes, known)

    def _layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return skipping(2, 0, anatomy) if self.layers is None else resolve_layers(self.layers, anatomy)


def outliers(scores: Tensor) -> int:
    """How many of ``scores [n]`` lie above ``Q3 + 1.5 IQR``."""
    low, high = scores.quantile(0.25), scores.quantile(0.75)
    return int((scores > high + 1.5 * (high - low)).sum())


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest."""
    return scores.topk(count).indices
