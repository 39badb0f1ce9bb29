"""Attention sinks told by massive activations: the dimensions they show in, and phi of the tokens that enter a layer."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.layout_tokens import special_ids
from interp.models.model import unwrap
from interp.tracing.calls import InterventionError, RunState
from interp.tracing.prompt import Prompt
from interp.tracing.session import untouched
from interp.tracing.text_only import text_module

EPSILON = 1e-6
STANDS_OUT = 5.0
"""``|x|`` in a sink dimension is at least so many times larger at its sink token than at three quarters of the tokens."""

KNOWN: dict[tuple[str, int, int], tuple[int, ...]] = {
    ("llama", 4096, 32000): (1415, 2533),
    ("llama", 5120, 32000): (2100, 4743),
    ("llama", 4096, 128256): (788, 1384, 4062),
    ("mixtral", 4096, 32000): (2070, 3398),
    ("qwen2", 3584, 152064): (458, 2570),
    ("qwen2", 2048, 151936): (1819, 1874),
    ("internlm2", 4096, 92544): (3584,),
    ("qwen3", 4096, 151936): (1838, 2276),
}
"""Sink dimensions by (family of the language model, width, vocabulary without what a vision-language model adds to it).

LLaMA-2 7B and 13B: the release of VAR. Qwen2-7B and InternLM2-7B: its paper. LLaMA-3-8B, Mixtral: Sun et al. 2024, Massive
Activations, https://arxiv.org/abs/2402.17762. Qwen2.5-VL-7B shares Qwen2-7B's; Qwen2.5-VL-3B and
Qwen3-VL-8B: calibrated by ports of VAR.
"""


@dataclass(frozen=True)
class SinkDimensions:
    """Dimensions of the residual stream in which sink tokens are massive.

    Attributes:
        dims: their numbers.
        peak: for each, the largest ``|x / RMS(x)|`` of any token (median over layers); empty where they were known.
        typical: for each, its 75th percentile over tokens.
        ratio: for each, ``|x|`` at the token of the peak over the 75th percentile of ``|x|`` (median over layers).
        source: ``given``, ``known`` or ``calibrated``.
    """

    dims: tuple[int, ...]
    peak: tuple[float, ...] = ()
    typical: tuple[float, ...] = ()
    ratio: tuple[float, ...] = ()
    source: str = "calibrated"


def width_of(module: nn.Module) -> int:
    """Width of the language model's residual stream."""
    config: Any = module.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.hidden_size)


def phi(x: Tensor, dims: Sequence[int] | Tensor) -> Tensor:
    """``max over dims of |x[d] / RMS(x)|`` in fp32, ``[B, L]`` for ``x [B, L, d]``; RMS with 1e-6 and no weight.

    ``dims`` are best an int64 tensor on x's device where many layers are asked: a list is copied there each time.
    """
    x = (x.detach() if x.requires_grad else x).float()
    rms = (x.square().mean(-1) + EPSILON).sqrt()
    at = dims if isinstance(dims, Tensor) else torch.tensor(dims, dtype=torch.int64, device=x.device)
    return torch.linalg.vector_norm(x.index_select(-1, at), torch.inf, -1) / rms


def known_dimensions(module: nn.Module) -> SinkDimensions | None:
    """Published sink dimensions of the language model inside, recognised by family, width and vocabulary."""
    config: Any = module.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    family = str(getattr(text, "model_type", "")).removesuffix("_text").removesuffix("_vl").replace("qwen2_5", "qwen2")
    for (name, width, vocabulary), dims in KNOWN.items():
        # Vision-language models add a few tokens and round up.
        added = int(getattr(text, "vocab_size", 0)) - vocabulary
        if family == name and width_of(module) == width and 0 <= added <= 512:
            return SinkDimensions(dims, source="known")
    return None


_calibrated: WeakKeyDictionary[nn.Module, SinkDimensions] = WeakKeyDictionary()


def sink_dimensions(who: Any, run: RunState, dims: Sequence[int] | None, tau: float) -> SinkDimensions:
    """Given, known or calibrated (once for a model, on texts of its own, so that no sample changes another's).

    Raises:
        InterventionError: a dimension the model does not have, or no dimension stands out.
    """
    root = run.root or run.module
    width = width_of(root)
    if dims is not None:
        beyond = [d for d in dims if not 0 <= d < width]
        if beyond:
            raise InterventionError(
                f"dims must lie within 0 .. {width - 1} of {type(root).__name__}'s residual stream, got {beyond}"
            )
        return SinkDimensions(tuple(dims), source="given")
    known = known_dimensions(root)
    if known is not None:
        return known
    if root not in _calibrated:
        texts = _texts(root)
        module = text_module(run, {"input_ids": texts}, who)
        run.extra_forwards += 1
        _calibrated[root] = _calibrate(root, run.anatomy, [lambda: module(input_ids=texts)], tau)
    return _calibrated[root]


def calibrate_sinks(model: Any, inputs_list: Iterable[Mapping[str, Any]], *, tau: float = 20.0) -> SinkDimensions:
    """Find the sink dimensions of a model on inputs of your own.

    Every token's ``|x / RMS(x)|`` is taken where it enters each text layer from the third on. A dimension counts where its
    largest token (median over layers) reaches ``tau`` and a quarter of the largest such dimension, three quarters of the tokens stay
    below ``tau``, and ``|x|`` at that token is 5 times its 75th percentile: large at a few tokens, not large everywhere. The last is
    asked of x itself, as Sun et al. do: ``|x / RMS(x)|`` cannot exceed sqrt(width), so in a narrow model in which the dimension is
    also the largest of ordinary tokens (SmolLM2-135M, width 576: 24 against 13) it hides a factor of about a hundred.

    Args:
        model: as :func:`interp.hooked` takes.
        inputs_list: keyword arguments of one forward each, images included where the model wants them.
        tau: the threshold the sinks must reach.

    Raises:
        InterventionError: no dimension stands out; says what was seen.
    """
    module = unwrap(model)
    calls = [lambda i=inputs: module(**i) for inputs in inputs_list]
    if not calls:
        raise ValueError("inputs_list must have at least one input, got none")
    return _calibrate(module, anatomy(module), calls, tau)


def _calibrate(root: nn.Module, shape: Anatomy, calls: Sequence[Callable[[], Any]], tau: float) -> SinkDimensions:
    sites = shape.stacks["text"]
    sites = sites[min(2, len(sites) - 1) :]
    seen: dict[str, list[Tensor]] = {}

    def note(site: Site, x: Tensor) -> None:
        seen.setdefault(site.name, []).append(x.detach().float().flatten(0, -2).cpu())

    undo = watch_layer_inputs(root, sites, note)
    try:
        with untouched(root), torch.no_grad():
            for call in calls:
                call()
    finally:
        undo()
    if not seen:
        raise InterventionError(f"sinks of {type(root).__name__} cannot be calibrated: none of its text layers ran")
    layers = [_stand_out(torch.cat(parts)) for parts in seen.values()]
    peak, typical, ratio = (torch.stack(values).median(0).values for values in zip(*layers, strict=True))
    order = peak.argsort(descending=True)[:8]
    top = float(peak[order[0]])
    large = (peak >= max(tau, top / 4)) & (typical < tau) & (ratio >= STANDS_OUT)
    found = sorted(int(d) for d in order if large[d])
    if found:
        shares = [tuple(float(values[d]) for d in found) for values in (peak, typical, ratio)]
        return SinkDimensions(tuple(found), peak=shares[0], typical=shares[1], ratio=shares[2])
    shown = ", ".join(
        f"{int(d)}: {float(peak[d]):.3g} (75 % of tokens below {float(typical[d]):.3g}; |x| {float(ratio[d]):.3g} times theirs)"
        for d in order[:3]
    )
    n_tokens = sum(len(part) for part in next(iter(seen.values())))
    raise InterventionError(
        f"sinks of {type(root).__name__} cannot be calibrated: a sink dimension must reach tau = {tau:.3g} at some of "
        f"{n_tokens} tokens and not at three quarters of them, with an |x| of {STANDS_OUT:g} times theirs; seen, by dimension: {shown}. "
        "Pass dims=, or a lower tau, or run calibrate_sinks on inputs of your own"
    )


def _stand_out(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Peak, typical and ratio ``[d]`` of :class:`SinkDimensions`, of the tokens ``[token, d]`` that enter one layer."""
    size = x.abs()
    relative = size / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    peak, at = relative.max(0)
    return peak, relative.quantile(0.75, dim=0), size.gather(0, at[None])[0] / size.quantile(0.75, dim=0)


def _texts(root: nn.Module) -> Tensor:
    """Ids ``[4, 48]`` that start a text and go on at random, without special tokens."""
    config: Any = root.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = special_ids(config, None)
    usable = torch.tensor([i for i in range(int(text.vocab_size)) if i not in special][:100_000])
    draw = torch.randint(len(usable), (4, 48), generator=torch.Generator().manual_seed(0))
    ids = usable[draw]
    start = getattr(text, "bos_token_id", None)
    if isinstance(start, int) and 0 <= start < int(text.vocab_size):
        ids[:, 0] = start
    device = next((p.device for p in root.parameters() if p.device.type != "meta"), torch.device("cpu"))
    return ids.to(device)


def watch_layer_inputs(
    root: nn.Module, sites: Sequence[Site], note: Callable[[Site, Tensor], None]
) -> Callable[[], None]:
    """Call ``note(site, x)`` with what enters each site's layer ``[B, L, d]``, in this thread; returns what undoes it."""
    thread = threading.get_ident()

    def enters(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if threading.get_ident() == thread and isinstance(x, Tensor):
            note(site, x)

    disable: Any = torch.compiler.disable
    uncompiled = disable(enters)

    def hook_for(site: Site) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The way around the compiler costs as much as the rest, so it is taken under the compiler alone.
            (uncompiled if torch.compiler.is_compiling() else enters)(site, args, kwargs)

        return hook

    handles = [
        root.get_submodule(layer_of(site)).register_forward_pre_hook(hook_for(site), with_kwargs=True) for site in sites
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def layer_of(site: Site) -> str:
    """Path of the decoder layer that holds a site: what enters it is the residual stream."""
    parts = site.name.split(".")
    for n, part in enumerate(parts):
        if part.isdigit() and int(part) == site.layer:
            return ".".join(parts[: n + 1])
    return site.name.rpartition(".")[0]


def scaled_tau(tau: float, unit: str, width: int) -> float:
    """tau itself, or what it is at this width where it was given at a width of 4096."""
    return tau if unit == "absolute" else tau * math.sqrt(width / 4096)


def sink_codes(sinks: Tensor, prompt: Prompt, *, needs_visual: bool) -> Tensor:
    """Key groups of a prompt: 0 other, 1 visual sink, 2 other visual, 3 text sink; int8 ``[S, P]`` for bool sinks.

    A sample without a visual sink gets 0 throughout where ``needs_visual`` says so.
    """
    return SinkTables.of(prompt, sinks.device).codes(sinks, needs_visual=needs_visual)


@dataclass(frozen=True, eq=False)
class SinkTables:
    """What :func:`sink_codes` takes from the prompt, once for all layers of a device.

    Attributes:
        sink, other: int8 ``[S, P]``, the group of each position where it is a sink and where it is none.
        image: bool ``[S, P]``.
    """

    sink: Tensor
    other: Tensor
    image: Tensor

    @classmethod
    def of(cls, prompt: Prompt, device: torch.device) -> SinkTables:
        image = prompt.image
        other = 2 * image.to(torch.int8)
        sink = torch.where(image, other - 1, 3 * prompt.real.to(torch.int8))
        sink, other = torch.stack((sink, other)).to(device).unbind()
        return cls(sink, other, other > 0)

    def first(self, n: int) -> SinkTables:
        """Of the first n positions."""
        if n == self.image.shape[1]:
            return self
        return SinkTables(self.sink[:, :n], self.other[:, :n], self.image[:, :n])

    def codes(self, sinks: Tensor, *, needs_visual: bool) -> Tensor:
        """As :func:`sink_codes`."""
        codes = torch.where(sinks, self.sink, self.other)
        return codes * (sinks & self.image).any(-1, keepdim=True) if needs_visual else codes
