"""Vision-aware head reinforcement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Gain
from interp.interventions._base import Strength
from interp.interventions.image_groups import reads_text, repeats, require_images, require_vision
from interp.interventions.layers import read_layers, resolve_layers
from interp.models.anatomy import Anatomy, Site
from interp.tracing.calls import Intervention, InterventionError, Lasting, RunState, SiteCall
from interp.tracing.text_only import last_z


@dataclass(frozen=True, eq=False)
class VHR(Intervention):
    """Reinforce the heads whose output depends most on the image (He et al. 2025, https://arxiv.org/abs/2412.13949).

    ``VHD_h = || z_h(text, image) - z_h(text) ||^2`` at the row that predicts the first token, z before the output
    projection ``[H, Dv]``; ``z_h *= alpha`` at all rows for the heads of a layer with ``VHD_h > median(VHD)`` (the lower
    median: half of the heads). Layers are taken from below, so a layer's VHD sees the reinforcement of those under it; the
    text branch is the plain model. The choice is made once, in the prefill, for each sample, and kept for as long as the KV
    cache: keys and values of later layers depend on it. The text branch costs one prefill without the image tokens.

    Heads with ``VHD > mean + std`` and ``||z(text)||^2`` likewise lose their VHD first (their output surges when the image is
    taken away), where ``std(VHD) > filter_guard``.

    Default layers: the second and the last 14 of 32 (LLaVA-1.5, LLaVA-NeXT), for BLIP-2 and InstructBLIP the last 18 of 32;
    for another depth the same shares, rounded.

    When not to use it: with ``alpha`` of 4 or more (LLaVA-1.5 then breaks down, Table 6); for a ranking of heads across
    layers (VHD is not normalised: take the score ``vision_aware_divergence``). The release's guard of 1 is an absolute number,
    so the filter is never on in narrow models: lower it there. This is a reimplementation after the paper and ports of the release.

    Args:
        alpha: factor, 2 in the paper; 1 is off.
        layers: of the text stack in place of the default; negative ones count from the last.
        distance: ``squared`` (release) or ``euclidean`` (paper, eq. 4); only the filter tells them apart.
        outlier_filter: eq. 6.
        filter_guard: the smallest std of VHD at which the filter acts, 1 in the release; 0 is the paper.

    Raises:
        ValueError: an alpha, guard, distance or layers that cannot be.
        InterventionError: before the first token: a model or a sample without an image, a model that cannot be run without
            one, layers that do not exist, a prompt that comes in several forwards, a KV cache filled outside the session.
    """

    alpha: float = 2.0
    _: KW_ONLY
    layers: Sequence[int] | None = None
    distance: Literal["squared", "euclidean"] = "squared"
    outlier_filter: bool = True
    filter_guard: float = 1.0

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.13949"
    unit: ClassVar[str] = "factor on z"
    stacks: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[str] = "an image in every prompt"
    extra_passes: ClassVar[str] = "one prefill of the text without the image"

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, float | int) or not math.isfinite(self.alpha) or self.alpha < 0:
            raise ValueError(f"alpha must be a finite number >= 0, got {self.alpha!r}")
        if self.distance not in ("squared", "euclidean"):
            raise ValueError(f"distance must be 'squared' or 'euclidean', got {self.distance!r}")
        if not self.filter_guard >= 0:
            raise ValueError(f"filter_guard must be >= 0, got {self.filter_guard!r}")
        object.__setattr__(self, "layers", read_layers(self.layers))

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> VHR:
        return cls(2.0 if strength == "on" else 1.0)

    def prepare(self, anatomy: Anatomy) -> None:
        if self.layers is not None:
            resolve_layers(self.layers, anatomy)
        if self.alpha != 1:
            require_vision(self, anatomy)

    def start(self, run: RunState) -> None:
        if self.alpha == 1 or not reads_text(run):
            return
        state, earlier = run.of(self), run.earlier(self)
        state["layers"] = self._layers(run)
        if "gains" in earlier:
            state.update(gains=earlier["gains"], samples=earlier["samples"], prompt=earlier["prompt"])
            return
        if run.cached_length:
            raise InterventionError(
                f"VHR chooses its heads in the prefill, and past_key_values holds {run.cached_length} positions that this session "
                "has not filled: run the prompt inside the session, on the same cache"
            )
        prompt = require_images(self, run)
        text = last_z(self, run, prompt, state["layers"])
        state.update(gains={}, samples=len(prompt), rows=_Rows(prompt.last), text=self._of_text(text), factors={})

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == "text" and site.layer in run.of(self).get("layers", ())

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        state = call.run.of(self)
        if not self.acts_on(call.site, call.run):
            return None
        gain = state["gains"].get(call.site.name)
        if gain is None:
            text = state.get("text", {}).get(call.site.name)
            if text is None:
                return None
            gain = state["gains"][call.site.name] = self._choose(call, z, text)
        if len(gain) != len(z):
            gain = gain.repeat_interleave(repeats(len(z), len(gain)), 0)
        return z * gain

    def lasting(self, call: SiteCall) -> Lasting | None:
        gain: Tensor | None = call.run.of(self)["gains"].get(call.site.name)
        if gain is None:
            return None
        gain = gain.repeat_interleave(repeats(len(call.q), len(gain)), 0)
        return Lasting((Gain(gain[..., 0].transpose(1, 2)),))

    def _choose(self, call: SiteCall, z: Tensor, text: _Text) -> Tensor:
        """Gains ``[S, 1, H, 1]`` in z's dtype, from z ``[B, Lq, H, Dv]`` and z of the text alone."""
        state = call.run.of(self)
        rows: _Rows = state["rows"]
        if call.mask.q_offset > 0 or max(rows.numbers) >= z.shape[1]:
            raise InterventionError(
                f"VHR needs the whole prompt in one forward: heads are chosen at its last row and reinforced at all; got rows "
                f"{call.mask.q_offset} .. {call.mask.q_offset + z.shape[1] - 1} of {state['prompt'].kind.shape[1]}"
            )
        rounding = max(8 * torch.finfo(torch.float32).eps, torch.finfo(z.dtype).eps)
        chosen = self._select(rows.of(z.detach() if z.requires_grad else z).float(), text.to(z.device), rounding)
        factors = state["factors"].get((z.device, z.dtype))
        if factors is None:
            # Filled, not copied there: nothing waits for the device.
            factors = tuple(torch.full((), f, device=z.device).to(z.dtype) for f in (float(self.alpha), 1.0))
            state["factors"][z.device, z.dtype] = factors
        return torch.where(chosen.view(len(chosen), 1, -1, 1), *factors)

    def _of_text(self, z: dict[str, Tensor]) -> dict[str, _Text]:
        """What the choice asks of z of the text alone, for all layers at once."""
        alike: dict[Any, list[str]] = {}
        for name, values in z.items():
            alike.setdefault((values.device, values.dtype, values.shape), []).append(name)
        out: dict[str, _Text] = {}
        for names in alike.values():
            text = self._read(torch.stack([z[name] for name in names]).float())
            out.update(zip(names, map(_Text, *text.parts()), strict=True))
        return out

    def select(self, image: Tensor, text: Tensor, rounding: float = 0.0) -> Tensor:
        """The heads to reinforce: bool ``[S, H]`` for last-row z with and without the image, ``[S, H, Dv]``.

        Differences below ``rounding`` times the size of z count as none: where a sliding window hides the image from the last
        row, rounding alone would choose.
        """
        return self._select(image, self._read(text), rounding)

    def _read(self, text: Tensor) -> _Text:
        strength = text.square().sum(-1)
        filters = self.outlier_filter and text.shape[-2] > 1
        high = strength > strength.mean(-1, keepdim=True) + strength.std(-1, keepdim=True) if filters else strength > 0
        return _Text(torch.stack((text, torch.zeros_like(text)), -4), strength, high)

    def _select(self, image: Tensor, text: _Text, rounding: float) -> Tensor:
        divergence, size = (image - text.beside_nothing).square().sum(-1).unbind()
        divergence = divergence.masked_fill(divergence <= rounding**2 * (size + text.strength), 0.0)
        if self.distance == "euclidean":
            divergence = divergence.sqrt()
        if self.outlier_filter and divergence.shape[-1] > 1:
            spread = divergence.std(-1, keepdim=True)
            high = divergence > divergence.mean(-1, keepdim=True) + spread
            divergence = divergence.masked_fill(high & text.high & (spread > self.filter_guard), 0.0)
        return divergence > divergence.median(-1, keepdim=True).values

    def _layers(self, run: RunState) -> tuple[int, ...]:
        if self.layers is not None:
            return resolve_layers(self.layers, run.anatomy)
        depth = run.anatomy.shape("text")[0]
        blip = "blip" in getattr(getattr(run.root or run.module, "config", None), "model_type", "")
        last = max(1, round((18 if blip else 14) / 32 * depth))
        wanted = {*range(depth - last, depth), *(() if blip or depth < 2 else (1,))}
        return resolve_layers(sorted(wanted), run.anatomy)


@dataclass(frozen=True, eq=False)
class _Text:
    """Of last-row z without the image ``[S, H, Dv]``, in fp32.

    Attributes:
        beside_nothing: it and zeros ``[2, S, H, Dv]``: one subtraction gives both the difference and the other z.
        strength: its square ``[S, H]``.
        high: where that is one std above the heads' mean ``[S, H]``.
    """

    beside_nothing: Tensor
    strength: Tensor
    high: Tensor

    def parts(self) -> tuple[tuple[Tensor, ...], ...]:
        """The three of each layer, where they are of several."""
        return self.beside_nothing.unbind(), self.strength.unbind(), self.high.unbind()

    def to(self, device: torch.device) -> _Text:
        if self.strength.device == device:
            return self
        return _Text(self.beside_nothing.to(device), self.strength.to(device), self.high.to(device))


class _Rows:
    """The row of each sample that predicts its first token."""

    def __init__(self, last: Tensor) -> None:
        self.numbers: list[int] = last.tolist()
        self._last, self._places = last, dict[torch.device, tuple[Tensor, Tensor]]()

    def of(self, z: Tensor) -> Tensor:
        """``[S, ...]`` of ``[B, Lq, ...]``, where beams repeat every sample."""
        times = repeats(len(z), len(self.numbers))
        z = z if times == 1 else z[::times]
        if len(set(self.numbers)) == 1:
            return z.select(1, self.numbers[0])
        if z.device not in self._places:
            self._places[z.device] = torch.arange(len(self._last), device=z.device), self._last.to(z.device)
        return z[self._places[z.device]]
