"""Maps of all layers, one at a time and from the last to the first: what rollout and relevancy multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.analysis.running import AnalysisError, require_stack
from interp.attention import Edit, Gain, Mask, Readout, attend, combine
from interp.models.anatomy import Site, anatomy
from interp.models.layout import Layout, LayoutError, layout
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall


@dataclass(eq=False)
class Kept:
    """What one call of a site computed with, and where the gradient of z arrives."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None
    edit: Edit | None
    leaf: Tensor | None

    @torch.no_grad()
    def attention(self) -> Tensor:
        """The full map ``[H, query, key]`` in fp32: the only one that is held."""
        found = attend(
            self.q, self.k, self.v, scale=self.scale, mask=self.mask, softcap=self.softcap, sinks=self.sinks, bias=self.bias,
            edit=self.edit, readout=Readout(attention=True), want_output=False,
        ).readings.attention  # fmt: skip
        assert found is not None
        return found[0].float()

    def gradient(self, dz: Tensor) -> Tensor:
        """``dy / dA [H, query, key]`` from ``dy / dz [1, query, H, Dv]``: exact, for z is linear in A."""
        v = self.v[0].float().repeat_interleave(dz.shape[2] // self.v.shape[1], 0)
        return torch.einsum("ihd,hjd->hij", dz[0].float(), v)


class SiteReader(Intervention):
    """Keeps every call of the wanted stacks, linear in length; with ``leaves`` z gets a zero added that takes its gradient."""

    def __init__(self, stacks: Sequence[str], leaves: bool = False) -> None:
        self.stacks, self.leaves = tuple(stacks), leaves
        self.found: dict[str, dict[int, Kept]] = {stack: {} for stack in stacks}

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack in self.stacks

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        if call.site.stack not in self.stacks:
            return None
        mine = self.found[call.site.stack]
        if call.site.layer in mine or z.shape[0] != 1:
            raise AnalysisError(
                f"stack {call.site.stack!r} must be called once, with one sequence: got a batch of {z.shape[0]}"
                + (" in several calls" if call.site.layer in mine else "")
            )
        edit = combine(*call.edits)
        if edit is not None and edit.of(Gain):
            raise AnalysisError("open sessions must not scale heads: maps do not show a gain")
        leaf = torch.zeros_like(z, requires_grad=True) if self.leaves else None
        q, k, v = (x.detach() for x in (call.q, call.k, call.v))
        mine[call.site.layer] = Kept(q, k, v, call.mask, call.scale, call.softcap, call.sinks, call.bias, edit, leaf)
        return None if leaf is None else z + leaf


def descend(kept: Mapping[int, Kept], start: Tensor, step: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``start [row, position]`` times each layer's matrix, from the last layer to the first: no product of maps is made."""
    out = start
    for layer in sorted(kept, reverse=True):
        out = step(layer, out)
    return out


def unit_rows(rows: Sequence[int], length: int, device: torch.device) -> Tensor:
    """One-hot rows ``[row, length]``."""
    out = torch.zeros(len(rows), length, device=device)
    out[torch.arange(len(rows)), torch.tensor(list(rows))] = 1
    return out


def chosen_rows(rows: Sequence[int] | None, length: int) -> list[int]:
    """Positions of the rows asked for; None is the last.

    Raises:
        AnalysisError: a position outside the sequence, or none at all.
    """
    wanted = [-1] if rows is None else [int(row) for row in rows]
    wrong = [row for row in wanted if not -length <= row < length]
    if wrong or not wanted:
        raise AnalysisError(f"rows must be at least one position within {length}, got {wrong or wanted}")
    return [row % length for row in wanted]


def check_stack(model: Model, stack: str, into_image: bool) -> list[str]:
    """Stacks that must be read."""
    require_stack(model, stack)
    stacks = list(anatomy(model.module).stacks)
    if any(site.cross for site in anatomy(model.module).stacks[stack]):
        raise AnalysisError(f"stack must attend to itself, and {stack!r} attends to another sequence")
    if not into_image:
        return [stack]
    if stack != "text" or "vision" not in stacks:
        raise AnalysisError(f"into_image needs the text stack of a vision-language model, got {stack!r} of {stacks}")
    return ["text", "vision"]


def image_places(model: Model, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Layout]:
    """Positions of image tokens in the text, positions of their patches in the tower, and the tower's layout.

    Raises:
        AnalysisError: the image has another number of tokens than of patches.
    """
    found = layout(model.module, inputs, model.tokenizer)
    text, vision = found["text"].mask("image")[0], found["vision"].mask("image")
    if vision.shape[0] != 1 or text.sum() != vision.sum():
        raise AnalysisError(
            f"into_image needs one image with a token for each of its patches, got {int(text.sum())} tokens and {int(vision.sum())} patches"
        )
    return torch.from_numpy(np.flatnonzero(text)), torch.from_numpy(np.flatnonzero(vision[0])), found["vision"]


def used_layers(model: Model, n_layers: int) -> int:
    """How many layers of the tower feed the language model (LLaVA leaves the last one out)."""
    chosen = getattr(model.config, "vision_feature_layer", None)
    if chosen is None:
        return n_layers
    if not isinstance(chosen, int):
        raise AnalysisError(f"into_image needs one vision_feature_layer, got {chosen}")
    return chosen if chosen >= 0 else n_layers + 1 + chosen


def as_dataset(
    relevance: Tensor, rows: Sequence[int], model: Model, inputs: Mapping[str, Any], stack: str, patches: Tensor | None,
    attrs: dict[str, Any],
) -> xr.Dataset:  # fmt: skip
    """``relevance (row, position)``, ``image (row, y, x)`` on the stack's patch grid and ``patches (row, y, x)`` on the tower's."""
    variables: dict[str, Any] = {"relevance": (("row", "position"), relevance.cpu().numpy())}
    coords: dict[str, Any] = {"row": list(rows)}
    found = layout(model.module, inputs, model.tokenizer)
    if stack in found:
        coords["token"] = ("position", found[stack].tokens[0].astype(str))
        # Text without an image, or tiles without a common grid, have none.
        with suppress(LayoutError):
            variables["image"] = (("row", "y", "x"), found[stack].overlay(relevance.cpu().numpy()))
    if patches is not None:
        variables["patches"] = (("row", "patch_y", "patch_x"), found["vision"].overlay(patches.cpu().numpy()))
    return xr.Dataset(variables, coords=coords, attrs={**attrs, "stack": stack, "model": model.name})
