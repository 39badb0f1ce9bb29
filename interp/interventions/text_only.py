"""The model without the image beside a generation: guidance of PAI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp.interventions.image_groups import require_images
from interp.models.anatomy import anatomy
from interp.tracing.calls import Intervention, RunState
from interp.tracing.prompt import Prompt
from interp.tracing.text_only import TEXT_ALONE, options_of, plain_model, text_module, text_only_inputs


class TextBranch:
    """The plain model on the text alone, token by token beside a generation, with its own KV cache."""

    on: ClassVar[str] = TEXT_ALONE

    def __init__(self, who: Intervention, run: RunState, prompt: Prompt) -> None:
        self.who, self.run = who, run
        self.inputs = text_only_inputs(run, prompt)
        self.module = text_module(run, self.inputs, who)
        self.cache: Any = None
        self.mask = self.inputs["attention_mask"]
        self.fed: Tensor | None = None
        self.deltas: dict[int, Any] = {}

    def logits(self, generated: Tensor) -> Tensor:
        """Scores of the next token ``[B, V]`` after ``generated [B, n]``; rows may have moved since the last call (beams)."""
        from transformers import DynamicCache

        with plain_model(self.who, self.run, self.module, self.deltas, on=self.on):
            batch = len(generated)
            if self.cache is None or self.fed is None or len(self.fed) != batch:
                times = batch // len(self.mask)
                inputs = {name: value.repeat_interleave(times, 0) for name, value in self.inputs.items()}
                self.cache = DynamicCache(config=getattr(self.module, "config", None))
                self.fed = generated[:, :0]
                out = self._forward(inputs, inputs["attention_mask"])
                if not generated.shape[1]:
                    return out
            common = self._follow(generated)
            new = generated[:, common:]
            self.fed = generated
            times = batch // len(self.mask)
            ones = torch.ones_like(generated)
            mask = torch.cat([self.mask.repeat_interleave(times, 0), ones], -1)
            inputs = {"input_ids": new}
            if "token_type_ids" in self.inputs:
                inputs["token_type_ids"] = torch.zeros_like(new)
            return self._forward(inputs, mask)

    def _forward(self, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
        options = options_of(self.module, use_cache=True, logits_to_keep=1)
        out: Any = self.module(**{**inputs, "attention_mask": mask}, past_key_values=self.cache, **options)
        return out.logits[:, -1]

    def _follow(self, generated: Tensor) -> int:
        """Make the cache hold a common beginning of every row's tokens; how many tokens that is, one row short of all."""
        fed = self.fed
        assert fed is not None
        length = min(fed.shape[1], generated.shape[1] - 1)
        times = len(generated) // len(self.mask)
        sample = torch.arange(len(generated), device=fed.device) // times
        same = (generated[:, None, :length] == fed[None, :, :length]).cumprod(-1).sum(-1)
        same = torch.where(sample[:, None] == sample[None], same, -1)
        # The row itself where it fits as well as any: without beams nothing moves.
        own = torch.arange(len(generated), device=fed.device)
        best, source = same.max(-1)
        source = torch.where(same[own, own] == best, own, source)
        common = int(best.min())
        if not torch.equal(source, own):
            self.cache.reorder_cache(source)
        excess = fed.shape[1] - common
        if excess:
            self.cache.crop(-excess)
        return common


def guided(
    who: Intervention, model: Any, inputs: Mapping[str, Any], logits: Tensor, gamma: float
) -> tuple[Tensor, int]:
    """Scores ``[B, n, V]`` of given tokens under guidance, and extra forwards: what :class:`Guidance` mixes, without its cutoff.

    A given token below the cutoff would have probability 0.

    Args:
        who: named in errors.
        model: an :class:`interp.Model`.
        inputs: of the forward that gave the logits: an image in every sample, pads on the left alone.
        logits: of its last n positions, none of them an image token.
        gamma: 1 gives the logits back.

    Raises:
        InterventionError: a sample without an image, a model that does not run without one.
    """
    if gamma == 1:
        return logits, 0
    run = RunState(
        module=model.module, anatomy=anatomy(model.module), inputs=dict(inputs), generating=False,
        tokenizer=model.tokenizer, root=model.module,
    )  # fmt: skip
    alone = text_only_inputs(run, require_images(who, run))
    module = text_module(run, alone, who)
    n = logits.shape[1]
    with plain_model(who, run, module):
        out: Any = module(**alone, **options_of(module, use_cache=False, logits_to_keep=n))
    image, text = logits.float().log_softmax(-1), out.logits[:, -n:].to(logits.device).float().log_softmax(-1)
    return gamma * (image - text) + text, run.extra_forwards


class Guidance:
    """Logits processor: ``logp = gamma (logp_image - logp_text) + logp_text`` where ``logp_image`` is high enough.

    Tokens with ``logp_image < log(cutoff) + max logp_image`` get minus infinity.
    """

    def __init__(self, branch: TextBranch, gamma: float, cutoff: float) -> None:
        self.branch, self.gamma, self.cutoff = branch, gamma, cutoff
        self.start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.start is None:
            # What counts as the prompt here differs: generation from embeddings starts with no ids.
            self.start = input_ids.shape[1]
        image = scores.float().log_softmax(-1)
        text = self.branch.logits(input_ids[:, self.start :]).to(image.device).float().log_softmax(-1)
        mixed = self.gamma * (image - text) + text
        if self.cutoff > 0:
            floor = image.max(-1, keepdim=True).values + torch.log(torch.tensor(self.cutoff))
            mixed = mixed.masked_fill(image < floor, -torch.inf)
        return mixed.to(scores.dtype)
