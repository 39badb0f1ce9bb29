"""The base edit of a planted model at work: what each call's heads may see, whoever calls.

It acts as a part of the call's mask, so that readings, edits and interventions that recompute attention all speak of the model
with it. Where the image tokens of a prompt stood is remembered with the KV cache, since later calls have the new ids alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.attention import Mask
from interp.models.anatomy import Anatomy, Site
from interp.models.base_edit import SEE_IMAGE, BaseEdit, image_token, near
from interp.models.errors import ModelInputError
from interp.tracing.calls import RunState, SiteCall
from interp.tracing.runs import begin_run

_MEMORY = "_headscope_image_keys"


@dataclass(eq=False)
class _Forward:
    """One top-level forward: its run, and the image positions so far ``[batch, position]`` or why they are not known."""

    run: RunState
    image: Tensor | None = None
    problem: str = ""
    any_image: bool = True
    masks: dict[Any, tuple[Mask, Mask]] = field(default_factory=dict[Any, tuple[Mask, Mask]])


class Plant:
    """The base edit of one model."""

    def __init__(self, module: nn.Module, shape: Anatomy, edit: BaseEdit) -> None:
        self.edit = edit
        self.token = image_token(module)
        self.sites = {s.name: edit.restricted(s.layer, s.n_heads) for s in shape.sites if s.stack == edit.stack}
        self.shape = shape
        self._forwards: dict[int, list[_Forward]] = {}

    def enter(self, thread: int, sub: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A top-level forward begins."""
        run = RunState(sub, self.shape, {}, generating=False)
        begin_run(run, sub, args, kwargs)
        forward = _Forward(run)
        if self.edit.kind == SEE_IMAGE:
            self._find_images(forward)
        self._forwards.setdefault(thread, []).append(forward)

    def leave(self, thread: int, result: Any) -> None:
        """It has ended; ``result`` is None where it raised."""
        forwards = self._forwards.get(thread)
        if not forwards:
            return
        forward = forwards.pop()
        if not forwards:
            del self._forwards[thread]
        if forward.image is not None and result is not None:
            _remember(_cache_in(result), forward.image)

    def acts_on(self, site: Site, thread: int) -> bool:
        """Whether calls of a site are restricted in the forward that runs.

        Raises:
            ModelInputError: it cannot be told.
        """
        if not self.sites.get(site.name):
            return False
        forwards = self._forwards.get(thread)
        if not forwards:
            raise ModelInputError(
                f"a planted model ({self.edit}) must be called as a whole; {site.name} was called by itself"
            )
        if forwards[-1].problem:
            raise ModelInputError(f"a planted model ({self.edit}) must know where images stand: {forwards[-1].problem}")
        return forwards[-1].any_image

    def run(self, thread: int) -> RunState:
        """The forward that runs."""
        return self._forwards[thread][-1].run

    def mask(self, call: SiteCall, thread: int) -> Mask:
        """The call's mask with the restriction; one object for all layers with the same heads."""
        masks = self._forwards[thread][-1].masks
        heads = self.sites[call.site.name]
        key = (id(call.mask), heads, call.k.shape[2], call.q.shape[2], call.q.device)
        if key not in masks:
            visible = self._visible(call, heads, self._forwards[thread][-1].image)
            dense = visible if call.mask.dense is None else visible & call.mask.dense.to(visible.device)
            masks[key] = (call.mask, replace(call.mask, dense=dense))
        return masks[key][1]

    def _visible(self, call: SiteCall, heads: tuple[int, ...], image: Tensor | None) -> Tensor:
        """Bool ``[B|1, H, Lq, Lk]``."""
        n_queries, n_keys, device = call.q.shape[2], call.k.shape[2], call.q.device
        i, j = call.mask.positions(n_queries, n_keys, device)
        restricted = torch.zeros(call.q.shape[1], dtype=torch.bool, device=device)
        restricted[list(heads)] = True
        if image is None:
            first = 0 if call.mask.first is None else call.mask.first.to(device)[:, None, None, None]
            seen = near(i[:, None], j, first, self.edit)
            seen = seen if seen.ndim == 4 else seen[None, None]
        else:
            # A static cache has slots for keys to come, which are no images.
            known = image.to(device)[:, j.clamp(max=image.shape[1] - 1)] & (j < image.shape[1])
            seen = ~known[:, None, None, :]
        return (seen | ~restricted[:, None, None]).expand(-1, -1, n_queries, -1)

    def _find_images(self, forward: _Forward) -> None:
        ids = forward.run.inputs.get("input_ids")
        past, cache = forward.run.past_length, forward.run.cache
        if not isinstance(ids, Tensor):
            forward.problem = "input_ids must be given, inputs_embeds do not tell"
            return
        image = ids == self.token
        if past:
            before = getattr(cache, _MEMORY, None)
            if before is None or before.shape[1] < past:
                held = 0 if before is None else before.shape[1]
                forward.problem = (
                    f"past_key_values must come from calls of this model; it has {past} positions, known are {held}"
                )
                return
            if len(ids) % len(before):
                forward.problem = f"past_key_values was filled by {len(before)} samples, and input_ids has {len(ids)}"
                return
            # Beams and repeats of a sample follow one another; a cache that was cut holds fewer positions than it did.
            before = before[:, :past].repeat_interleave(len(ids) // len(before), 0).to(ids.device)
            image = torch.cat([before, image], 1)
        forward.image = image
        forward.any_image = bool(image.any())
        _remember(cache, image)


def _remember(cache: Any, image: Tensor) -> None:
    # On the object itself: whoever copies a cache copies this with it.
    if cache is not None:
        setattr(cache, _MEMORY, image)


def _cache_in(result: Any) -> Any:
    found = getattr(result, "past_key_values", None)
    if found is None and isinstance(result, tuple):
        found = next((part for part in result if hasattr(part, "get_seq_length")), None)
    return found
