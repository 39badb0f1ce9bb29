"""Many sets of heads masked in one forward: what each does to the answer of a prompt that is computed once.

Masking acts on the rows that produce the answer, so the prompt's keys and values are the same for every set. The sets stand
side by side in one sequence behind the prompt, each with its own copy of the answer rows, under a mask that hides the other
sets: as rows of a batch, every set would need a copy of the prompt's cache (58 MB a layer for 64 sets on Gemma 3 270M).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import interp
from interp.attention import Edit, Gain, Uniform
from interp.tracing import Intervention, SiteCall

Kind = Literal["zero", "uniform"]


class MaskSets(Intervention):
    """Mask set n in rows ``n * width`` to ``(n + 1) * width`` of the call; ``sets`` is bool ``[set, layer, head]``.

    A width of None is for one set: it is masked in every row.
    """

    def __init__(self, sets: NDArray[np.bool_], kind: Kind, width: int | None) -> None:
        if width is None and len(sets) != 1:
            raise ValueError(f"width must be given for more than one set, got None for {len(sets)}")
        self.sets, self.kind, self.width = torch.as_tensor(sets), kind, width

    def before(self, call: SiteCall) -> Edit | None:
        if call.site.stack != "text":
            return None
        heads = self.sets[:, call.site.layer].to(call.q.device)
        if not heads.any():
            return None
        where = heads if self.width is None else heads.repeat_interleave(self.width, 0)
        where = where.T[None]
        return Edit((Gain(0.0, where),)) if self.kind == "zero" else Edit((Uniform(where),))


@dataclass(frozen=True)
class Outcome:
    """What became of one answer, by set.

    Attributes:
        logprob: ``[set]``, log-probability of the whole answer in nats, teacher-forced.
        exact: ``[set]``, 1 where every token of the answer was the most likely one, else 0.
    """

    logprob: NDArray[np.float64]
    exact: NDArray[np.float64]


def answers(
    model: Any, prompt: Sequence[int], answer: Sequence[int], sets: NDArray[np.bool_], kind: Kind, *, rows: int = 384
) -> Outcome:
    """Log-probability and exact match of ``answer`` after ``prompt`` with each set masked where the answer is produced.

    Args:
        model: an :class:`interp.Model` of a decoder in eval mode.
        prompt, answer: token ids; rows ``len(prompt) - 1`` to ``len(prompt) + len(answer) - 2`` are masked.
        sets: bool ``[set, layer, head]``.
        kind: ``zero`` (z = 0) or ``uniform`` (the same weight on every visible key).
        rows: answer rows of one forward; memory grows with rows times vocabulary.
    """
    from transformers import DynamicCache

    width, kept = len(answer), len(prompt) - 1
    # Without a config every layer keeps all keys; the windows are in our mask.
    cache = DynamicCache()
    fed = torch.tensor([prompt[-1], *answer[:-1]], device=model.device)
    wanted = torch.tensor(answer, device=model.device)
    logprob, exact = [], []
    with torch.no_grad():
        model.module(
            input_ids=torch.tensor([prompt[:-1]], device=model.device), past_key_values=cache, logits_to_keep=1
        )
        for start in range(0, len(sets), max(1, rows // width)):
            part = sets[start : start + max(1, rows // width)]
            n = len(part)
            positions = torch.arange(kept, kept + width, device=model.device).repeat(n)[None]
            with interp.hooked(model, interventions=[MaskSets(part, kind, width)]):
                logits = model.module(
                    input_ids=fed.repeat(n)[None],
                    position_ids=positions,
                    attention_mask=_masks(model.config.get_text_config(), kept, width, n, model.device),
                    past_key_values=cache,
                ).logits[0]
            cache.crop(-n * width)
            target = wanted.repeat(n)
            loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
            logprob.append(-loss.double().view(n, width).sum(-1))
            exact.append((logits.argmax(-1) == target).view(n, width).all(-1).double())
    return Outcome(torch.cat(logprob).cpu().numpy(), torch.cat(exact).cpu().numpy())


def _masks(config: Any, kept: int, width: int, n_sets: int, device: torch.device) -> Any:
    """The dense mask of rows that see the prompt and their own set's earlier rows; one for each type of layer."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is None:
        return _mask(kept, width, n_sets, window, device)
    windows = {"full_attention": None, "sliding_attention": window}
    unknown = set(config.layer_types) - set(windows)
    if unknown:
        raise ValueError(f"layer_types must be among {list(windows)}, got {sorted(unknown)}")
    masks = {name: _mask(kept, width, n_sets, windows[name], device) for name in windows}
    # Models with one type of layer take a tensor, those with two a mapping.
    return masks if len(set(config.layer_types)) > 1 else masks[config.layer_types[0]]


def _mask(kept: int, width: int, n_sets: int, window: int | None, device: torch.device) -> Tensor:
    """Bool ``[1, 1, n_sets * width, kept + n_sets * width]``."""
    within = torch.arange(width, device=device).repeat(n_sets)
    owner = torch.arange(n_sets, device=device).repeat_interleave(width)
    row = kept + within
    column = torch.cat([torch.arange(kept, device=device), row])
    everybody = torch.full((kept,), -1, device=device)
    column_owner = torch.cat([everybody, owner])
    seen = (column_owner == -1) | (column_owner == owner[:, None])
    seen &= column <= row[:, None]
    if window is not None:
        seen &= row[:, None] - column < window
    return seen[None, None]
