"""Visual attention redistribution."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Edit, Redistribute
from interp.interventions._base import Strength
from interp.interventions.image_groups import (
    KeyGroups,
    Prompt,
    prompt_rows,
    reads_text,
    require_images,
    require_vision,
)
from interp.interventions.layers import read_layers, resolve_layers, skipping
from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.model import unwrap
from interp.tracing.calls import NOTHING_LASTS, Intervention, InterventionError, Lasting, RunState, SiteCall
from interp.tracing.visual_sinks import (
    SinkTables,
    phi,
    scaled_tau,
    sink_codes,
    sink_dimensions,
    watch_layer_inputs,
    width_of,
)

SOURCES = {"all": (1, 3), "visual": (1,), "text": (3,)}


@dataclass(frozen=True, eq=False)
class VAR(Intervention):
    """Move attention from sinks to the other image tokens (Kang et al. 2025, https://arxiv.org/abs/2503.03321).

    A token is a sink of layer l where ``phi(x) = max over d in dims of |x[d] / RMS(x)| >= tau`` for the x that enters the layer.
    Of a row's weights let ``M_vs``, ``M_vn``, ``M_ts`` be the sums on visual sinks, other visual tokens and text sinks. A head is
    image-centric for a row where ``M_vs + M_vn >= summ`` and ``M_vn / (M_vs + M_vn) >= rho``; there the sinks keep ``1 - p`` of
    their weight and the rest goes to the other visual tokens in proportion, so row sums stay. Rows are text tokens of the
    prompt and all generated ones. Sinks are found in the prefill and reused in decode; generated tokens are never sinks.

    Paper and release differ, and each difference is an option. ``p``: the paper moves p of the sinks' weight, the release keeps
    p (its 0.6 moves 40 %). ``rho``: the paper wants a share of non-sinks of at least rho, the release of ``1 - rho``. Last layer:
    the paper leaves it out, the release does not (``skip_last=0``). The release also redistributed image rows from the second
    sample on, by a defect that is not reproduced here.

    When not to use it: without the head gate (``summ=0, rho=0`` breaks models, Table 4); with a rho tuned on the test set (the
    gain hangs on it). CHAIR on LLaVA-1.5 got worse in an independent run. In narrow models nothing reaches tau = 20, since
    ``|x / RMS| <= sqrt(width)``: take ``tau_unit="width"``.

    Args:
        p: fraction of the sinks' weight, see ``p_means``; 0 moved is off.
        rho: gate on the share of non-sinks; 0.8 for general, 0.5 for hallucination, 0.9 for vision-centric tasks (paper).
        tau: threshold of phi, 20.
        summ: gate on the image's weight, 0.2 (release).
        p_means: ``moved`` (paper) or ``kept`` (release).
        rho_means: ``non_sink`` (paper) or ``sink`` (release: the sinks' share may be rho at most).
        tau_unit: ``absolute``, or ``width``: tau at a width of 4096, scaled by ``sqrt(width / 4096)``.
        dims: of the residual stream; None takes published ones for known models and calibrates others (one forward of short
            texts, once a model; see :func:`~interp.tracing.visual_sinks.calibrate_sinks`).
        sources: sinks that give: ``all`` (paper), ``visual`` (best in Table 5), ``text``.
        without_visual_sink: a layer that sees a sample without visual sinks leaves it alone (``skip``, release), or moves the
            text sinks' weight (``act``, the paper's formula).
        skip_first, skip_last: layers left alone at both ends, 2 and 1.
        layers: of the text stack in place of those; negative ones count from the last.

    Raises:
        ValueError: a number or name that cannot be.
        InterventionError: before the first token: a model or sample without an image, layers that do not exist or none left,
            a tau that the width rules out, sinks that cannot be calibrated (says what was seen), a KV cache filled elsewhere.

    Warns:
        UserWarning: the prefill has shown no sink to move weight from, so that nothing will change.
    """

    p: float = 0.6
    rho: float = 0.5
    tau: float = 20.0
    summ: float = 0.2
    _: KW_ONLY
    p_means: Literal["moved", "kept"] = "moved"
    rho_means: Literal["non_sink", "sink"] = "non_sink"
    tau_unit: Literal["absolute", "width"] = "absolute"
    dims: Sequence[int] | None = None
    sources: Literal["all", "visual", "text"] = "all"
    without_visual_sink: Literal["skip", "act"] = "skip"
    skip_first: int = 2
    skip_last: int = 1
    layers: Sequence[int] | None = None

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.03321"
    unit: ClassVar[str] = "fraction of the sinks' weight moved"
    stacks: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[str] = "an image in every prompt; sink dimensions (known or calibrated)"
    extra_passes: ClassVar[str] = "one short text once a model whose sink dimensions are not known"

    def __post_init__(self) -> None:
        for name in ("p", "rho", "summ"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number within 0 .. 1, got {value!r}")
        if not isinstance(self.tau, float | int) or not math.isfinite(self.tau) or self.tau <= 0:
            raise ValueError(f"tau must be a finite number > 0, got {self.tau!r}")
        choices = {
            "p_means": ("moved", "kept"), "rho_means": ("non_sink", "sink"), "tau_unit": ("absolute", "width"),
            "sources": tuple(SOURCES), "without_visual_sink": ("skip", "act"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("skip_first", "skip_last"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a whole number >= 0, got {getattr(self, name)!r}")
        object.__setattr__(self, "layers", read_layers(self.layers))
        object.__setattr__(self, "dims", None if self.dims is None else tuple(int(d) for d in self.dims))
        if self.dims == ():
            raise ValueError("dims must name a dimension, got none")

    @property
    def moved_fraction(self) -> float:
        """Fraction of the sinks' weight that is moved, whatever ``p`` means."""
        return float(self.p if self.p_means == "moved" else 1 - self.p)

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> VAR:
        if strength == "off":
            return cls(0.0)
        layers = range(anatomy(unwrap(model)).shape("text")[0])
        return cls(0.9, 0.05, 1.5, 0.01, dims=(0, 1, 2), layers=layers)

    def prepare(self, anatomy: Anatomy) -> None:
        if self.layers is not None:
            resolve_layers(self.layers, anatomy)
        if not self.moved_fraction:
            return
        require_vision(self, anatomy)
        if not self._layers(anatomy):
            raise InterventionError(
                f"VAR leaves the first {self.skip_first} and the last {self.skip_last} layers alone, and {anatomy.model_class} has "
                f"{anatomy.shape('text')[0]}: give skip_first, skip_last or layers"
            )

    def start(self, run: RunState) -> None:
        if not self.moved_fraction or not reads_text(run):
            return
        state, earlier = run.of(self), run.earlier(self)
        if run.cached_length and "sinks" not in earlier:
            raise InterventionError(
                f"VAR finds sinks in the prefill, and past_key_values holds {run.cached_length} positions that this session has not "
                "filled: run the prompt inside the session, on the same cache"
            )
        prompt = require_images(self, run)
        root = run.root if run.root is not None else run.module
        width, tau = width_of(root), scaled_tau(self.tau, self.tau_unit, width_of(root))
        if tau >= math.sqrt(width):
            raise InterventionError(
                f"VAR cannot act on {type(root).__name__}: |x / RMS(x)| cannot exceed sqrt({width}) = {math.sqrt(width):.3g}, and tau "
                f"is {tau:.3g}; take tau_unit='width' or a lower tau"
            )
        dims = sink_dimensions(self, run, self.dims, tau)
        layers = self._layers(run.anatomy)
        sites = [site for site in run.anatomy.stacks["text"] if site.layer in layers]
        state.update(
            layers=layers, dims=dims, tau=tau, phis=list[tuple[int, Tensor]](), template=self._edit(None),
            sinks=dict(earlier.get("sinks", {})), groups=dict[int, KeyGroups](), there=dict[Any, Any](),
            shared=dict[int, KeyGroups | None](),
        )  # fmt: skip

        def note(site: Site, x: Tensor) -> None:
            if run.past_length < prompt.kind.shape[1]:
                self._note(run, prompt, site, x)
            else:
                unwatch()  # a hook on every layer would cost each generated token as much as the edit

        unwatch = watch_layer_inputs(root, sites, note)
        run.at_end.append(unwatch)

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == "text" and site.layer in run.of(self).get("layers", ())

    def before(self, call: SiteCall) -> Edit | None:
        if not self.acts_on(call.site, call.run):
            return None
        state = call.run.of(self)
        prompt: Prompt = state["prompt"]
        if call.generated and call.mask.q_offset >= prompt.kind.shape[1]:
            shared = self._shared(call, state)
            return None if shared is None else shared.edit(call, state["template"])
        groups: KeyGroups = state["groups"][call.site.layer]
        if call.site.layer == state["layers"][-1]:
            self._warn(state)
        # One operation for all layers of a forward: they differ in their groups alone.
        place = (call.run.forwards, call.q.device, call.q.shape[0], call.mask.q_offset, call.q.shape[2])
        known = state.get("prefill")
        if known is None or known[0] != place:
            rows = prompt_rows(call, prompt.real & ~prompt.image, beyond=True)
            known = state["prefill"] = (place, self._edit(rows[:, None]))
        codes = groups.codes
        elsewhere = codes.device != call.q.device
        if elsewhere or call.q.shape[0] != len(codes) or call.mask.kv_offset or call.k.shape[2] != codes.shape[1]:
            codes = groups.of(call)
        return known[1].regrouped(codes)

    def lasting(self, call: SiteCall) -> Lasting | None:
        state = call.run.of(self)
        if call.mask.q_offset < state["prompt"].kind.shape[1]:
            return None
        shared = self._shared(call, state)
        return NOTHING_LASTS if shared is None else Lasting(template=state["template"], groups=shared)

    def _edit(self, where: Tensor | None) -> Edit:
        rho = self.rho if self.rho_means == "non_sink" else 1 - self.rho
        move = Redistribute(
            source=SOURCES[self.sources], target=(2,), fraction=self.moved_fraction, gate_mass=(1, 2), gate_share=(2,),
            summ=self.summ, rho=rho, where=where,
        )  # fmt: skip
        return Edit((move,), n_groups=4)

    def _note(self, run: RunState, prompt: Prompt, site: Site, x: Tensor) -> None:
        """Find the sinks among new positions of the prompt, from what enters a layer ``[B, L, d]``."""
        state, start, length = run.of(self), run.past_length, prompt.kind.shape[1]
        if "template" not in state:
            return
        times = max(1, len(x) // len(prompt))
        x = x if times == 1 else x[::times]
        x = x if x.shape[1] <= length - start else x[:, : length - start]
        there: tuple[SinkTables, Tensor] | None = state["there"].get(x.device)
        if there is None:
            at = torch.tensor(state["dims"].dims, device=x.device)
            there = state["there"][x.device] = SinkTables.of(prompt, x.device), at
        strength = phi(x, there[1])
        sinks = strength >= state["tau"]
        if start or site.layer in state["sinks"]:
            # Between the turns of a conversation stand generated tokens, which are no sinks.
            old: Tensor = state["sinks"].get(site.layer, sinks[:, :0]).to(sinks.device)
            sinks = torch.cat([torch.nn.functional.pad(old, (0, start - old.shape[1])), sinks], -1)
        state["sinks"][site.layer] = sinks
        if state["phis"] is not None:
            state["phis"].append((start, strength))
        codes = there[0].first(sinks.shape[1]).codes(sinks, needs_visual=self.without_visual_sink == "skip")
        state["groups"][site.layer] = KeyGroups(codes)
        state["shared"].clear()

    def _shared(self, call: SiteCall, state: dict[str, Any]) -> KeyGroups | None:
        """The layer's groups in decode: one object for all layers of a device with the same ones, None where nothing moves."""
        layer = call.site.layer
        if layer not in state["groups"] and layer in state["sinks"]:
            # A run of new tokens alone, on a cache whose prompt an earlier run has read.
            sinks, prompt = state["sinks"][layer], state["prompt"]
            known = Prompt(prompt.kind[:, : sinks.shape[1]], prompt.picture[:, : sinks.shape[1]])
            codes = sink_codes(sinks, known, needs_visual=self.without_visual_sink == "skip")
            state["groups"][layer] = KeyGroups(codes)
        if layer not in state["shared"]:
            device = call.q.device
            mine = {n: g for n, g in state["groups"].items() if g.codes.device == device or n == layer}
            codes = torch.stack([g.codes.to(device) for g in mine.values()])
            _, which = torch.unique(codes, dim=0, return_inverse=True)
            acting = self._acts(codes)
            first: dict[int, KeyGroups] = {}
            for (n, groups), same, acts in zip(mine.items(), which.tolist(), acting.tolist(), strict=True):
                state["shared"][n] = first.setdefault(same, groups) if acts else None
        return state["shared"][layer]

    def _acts(self, codes: Tensor) -> Tensor:
        """Is there a sink to take from and a token to give to? Bool ``[layer]`` for codes ``[layer, S, P]``."""
        codes = codes.flatten(1)
        # Both kinds of sink have an odd number.
        gives = codes % 2 == 1 if self.sources == "all" else codes == SOURCES[self.sources][0]
        return (codes == 2).any(1) & gives.any(1)

    def _warn(self, state: dict[str, Any]) -> None:
        if state["phis"] is None:
            return
        alike: dict[Any, list[Tensor]] = {}
        for groups in state["groups"].values():
            alike.setdefault((groups.codes.device, groups.codes.shape), []).append(groups.codes)
        if any(bool(self._acts(torch.stack(codes)).any()) for codes in alike.values()):
            # What is a sink stays one, whatever the prompt's next part brings.
            state["phis"] = None
        else:
            dims, largest = state["dims"], self._largest(state)
            warnings.warn(
                f"VAR changes nothing here: in no layer is there a sink to move weight from, at tau = {state['tau']:.3g} in the sink "
                f"dimensions {list(dims.dims)} ({dims.source}); the largest phi of an image token is {largest:.3g}",
                stacklevel=2,
            )

    def _largest(self, state: dict[str, Any]) -> float:
        """The largest phi of an image token in any layer."""
        alike: dict[Any, list[Tensor]] = {}
        for start, strength in state["phis"]:
            alike.setdefault((strength.device, start, strength.shape[1]), []).append(strength)
        largest = 0.0
        for (device, start, n), strengths in alike.items():
            image = state["there"][device][0].image[:, start : start + n]
            largest = max(largest, float(torch.where(image, torch.stack(strengths), 0.0).max()))
        return largest

    def _layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        if self.layers is not None:
            return resolve_layers(self.layers, anatomy)
        return skipping(self.skip_first, self.skip_last, anatomy)
