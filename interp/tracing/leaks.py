"""Does a planted model keep to its plant? (:func:`leak`)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interp.attention import Edit, Gain
from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.base_edit import SEE_FAR, BaseEdit, of
from interp.models.model import unwrap
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked


class WithoutHeads(Intervention):
    """The named heads of a base edit give nothing."""

    def __init__(self, edit: BaseEdit) -> None:
        self.layers = edit.heads.by_layer(edit.stack)
        self.stack = edit.stack

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == self.stack and site.layer in self.layers

    def before(self, call: SiteCall) -> Edit | None:
        if not self.acts_on(call.site, call.run):
            return None
        return Edit((Gain(0.0, call.heads(self.layers[call.site.layer])),))


def leak(model: Any, inputs: Mapping[str, Any], *, seed: int = 0) -> float:
    """How much the last row's logits change when what only the named heads may see is replaced and those heads give nothing.

    Replaced are the pixels, or (``only_heads_see_far``) every token that a chain of windows cannot reach from the last row:
    ``layers * (window - 1)`` back, without the first ``sink``. A model without a leak gives exactly 0.

    Args:
        model: a planted model.
        inputs: one sample without padding; with an image, or longer than the reach.
        seed: of what is put there.

    Raises:
        ValueError: not a planted model, or inputs that have nothing to replace.
    """
    module = unwrap(model)
    edit = of(module)
    if edit is None:
        raise ValueError(f"model must have a base edit, {type(module).__name__} has none")
    with torch.no_grad(), hooked(module, interventions=[WithoutHeads(edit)]):
        before, after = (module(**given).logits[:, -1] for given in (inputs, _replaced(module, edit, inputs, seed)))
    return float((before.double() - after.double()).abs().max())


def reach(edit: BaseEdit, shape: Anatomy) -> int:
    """How far back the heads that are not named carry anything, in tokens."""
    return len(shape.stacks[edit.stack]) * (edit.window - 1)


def _replaced(module: Any, edit: BaseEdit, inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    if edit.kind != SEE_FAR:
        pixels: Any = inputs.get("pixel_values")
        if not isinstance(pixels, Tensor):
            raise ValueError(f"inputs must have pixel_values for {edit.kind}, got {sorted(inputs)}")
        return {**inputs, "pixel_values": torch.randn(pixels.shape, generator=generator).to(pixels)}
    ids: Tensor = inputs["input_ids"]
    stop = ids.shape[1] - 1 - reach(edit, anatomy(module))
    if stop <= edit.sink:
        raise ValueError(
            f"inputs must be longer than the reach of the windows, {ids.shape[1] - stop} tokens, got {ids.shape[1]}"
        )
    other = ids.clone()
    drawn = torch.randint(module.config.get_text_config().vocab_size, (len(ids), stop - edit.sink), generator=generator)
    other[:, edit.sink : stop] = drawn.to(ids.device)
    return {**inputs, "input_ids": other}
