"""Every attention site of a Hugging Face model: where it is, what shape it has, and which attention is out of reach.

A site is found by what its class does, not by its name: some method of it asks transformers' ``AttentionInterface`` for an
attention function. Wrappers that are merely called "Attention" are therefore not listed, and modules that compute attention
themselves are named as unreached. Shapes are read from the module and its config; with ``inputs`` the model is run once
and what the run shows overrides what the attributes say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from interp.models.module_walk import Places, Walk, Walked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "proj", "o", "projection", "projection_layer", "wo")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads_total")
CONFIG_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads", "attention_heads")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads")
GROUPS = ("num_key_value_groups", "n_rep")
WIDTHS = ("embed_dim", "hidden_size", "dim", "all_head_size", "inner_dim")
CONFIG_WIDTHS = ("hidden_size", "d_model")
HEAD_DIMS = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
V_HEAD_DIMS = ("v_head_dim",)
ASKED = frozenset((*OUT_PROJECTIONS, *HEAD_COUNTS, *KV_HEAD_COUNTS, *GROUPS, *WIDTHS, *HEAD_DIMS, *V_HEAD_DIMS))
Shape = tuple[int, int, int, int, str | None]


class AnatomyError(ValueError):
    """The model has no attention site that can be reached."""


@dataclass(frozen=True)
class Site:
    """One attention module that dispatches through transformers' attention interface.

    Attributes:
        name: its dotted path in the model.
        stack: the series it belongs to (``text``, ``vision``, ``encoder``, ``cross``, ``audio``, ``qformer``, ...).
        layer: index in the model's own layer list.
        n_heads: query heads.
        n_kv_heads: key-value heads; ``kv_group = head // (n_heads / n_kv_heads)``.
        head_dim: of queries and keys.
        v_head_dim: of values, hence of z.
        causal: what the module declares; the mask of a call decides.
        cross: keys come from another sequence.
        out_proj: name of the output projection below the module, None where none was recognised.
        z_is_projected: True where the projection's input is z itself; False where the model gates or normalises between
            (Qwen3-Next, BitNet); None where no run has shown it.
        seen: number of attention calls in the dry run, None without one.
    """

    name: str
    stack: str
    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    causal: bool
    cross: bool
    out_proj: str | None = None
    z_is_projected: bool | None = None
    seen: int | None = None


@dataclass(frozen=True)
class Anatomy:
    """All sites of a model.

    Attributes:
        sites: in the order of ``named_modules``.
        n_layers: layers of each stack, counted in the model's own layer list (so with those that have no such heads).
        unreached: dotted path and class of modules that compute attention without the interface.
        without_softmax: layers of a stack that have no softmax attention (linear attention, state space), by stack.
    """

    model_class: str
    sites: tuple[Site, ...]
    n_layers: Mapping[str, int]
    unreached: tuple[str, ...]
    without_softmax: Mapping[str, tuple[int, ...]]

    @property
    def stacks(self) -> dict[str, list[Site]]:
        """Sites by stack, each in layer order."""
        return {stack: list(sites) for stack, sites in self._stacks.items()}

    @cached_property
    def _stacks(self) -> dict[str, list[Site]]:
        out: dict[str, list[Site]] = {}
        for site in self.sites:
            out.setdefault(site.stack, []).append(site)
        return {stack: sorted(sites, key=lambda s: s.layer) for stack, sites in out.items()}

    def shape(self, stack: str = "text") -> tuple[int, int]:
        """``(layers, heads)`` of a stack; heads is the largest count where layers differ.

        Raises:
            KeyError: the model has no such stack.
        """
        return self.n_layers[self._known(stack)], max(s.n_heads for s in self.sites if s.stack == stack)

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {stack: self.shape(stack) for stack in self.stacks}

    def site(self, stack: str, layer: int) -> Site:
        """The site of a layer.

        Raises:
            KeyError: no such stack, or the layer has no softmax attention in it.
        """
        for candidate in self.sites:
            if candidate.stack == self._known(stack) and candidate.layer == layer:
                return candidate
        raise KeyError(
            f"stack {stack!r} has no attention site in layer {layer}; it has {[s.layer for s in self.stacks[stack]]}"
        )

    def _known(self, stack: str) -> str:
        if stack not in self.n_layers:
            raise KeyError(f"stack must be one of {list(self.n_layers)} of {self.model_class}, got {stack!r}")
        return stack

    def require_sites(self) -> None:
        """Raise :class:`AnatomyError` where nothing can be traced."""
        if self.sites:
            return
        why = (
            f"its attention modules do not use transformers' attention interface: {', '.join(self.unreached[:4])}"
            if self.unreached
            else "it has no attention modules (a state-space or convolutional model?)"
        )
        raise AnatomyError(f"model must have at least one reachable attention site; {self.model_class} has none: {why}")


def anatomy(model: Any, inputs: Mapping[str, Any] | None = None) -> Anatomy:
    """List every attention site of ``model``.

    Args:
        model: a ``PreTrainedModel`` (or whatever :func:`interp.models.unwrap` unwraps to one).
        inputs: keyword arguments of one forward call; given, the model is run once without gradients, and sites, shapes and
            ``z_is_projected`` are confirmed by what happened.

    Returns:
        Anatomy: also for a model without any reachable site (see :meth:`Anatomy.require_sites`).
    """
    from interp.models.model import unwrap

    module = unwrap(model)
    walk = Walk(module)
    described = _place(module, walk.sites)
    if inputs is not None:
        from interp.models.dryrun import confirm

        described = confirm(module, described, inputs)
    n_layers, without = _layer_lists(walk, described)
    return Anatomy(type(module).__name__, tuple(described), n_layers, walk.unreached(), without)


def _place(module: PreTrainedModel, found: list[Walked]) -> list[Site]:
    """Give every site its stack and layer, then its shapes."""
    placed: list[tuple[Walked, str, str, bool]] = []
    # Paths that differ in numbers alone, of one class in one owner, are of one kind.
    kinds: dict[tuple[str, type, int, bool], tuple[str, bool]] = {}
    for here in found:
        declared = getattr(here.module, "is_cross_attention", None)
        key = re.sub(r"\d+", "#", here.name), type(here.module), id(here.owner), isinstance(declared, bool) and declared
        if key not in kinds:
            cross = _is_cross(here.name, here.module)
            kinds[key] = _stack_kind(module, here, cross), cross
        container = here.places[0][0] if here.places else here.name.rpartition(".")[0]
        placed.append((here, kinds[key][0], container, kinds[key][1]))
    names = _stack_names([(kind, container) for _, kind, container, _ in placed])
    sites: dict[str, Site] = {}
    shapes = _Shapes()
    for key, stack in names.items():
        members = [(here, cross) for here, kind, container, cross in placed if (kind, container) == key]
        layers = _layers([here.places for here, _ in members])
        for (here, cross), layer in zip(members, layers, strict=True):
            n_heads, n_kv, head_dim, v_dim, out_proj = shapes.of(here.module)
            causal = bool(getattr(here.module, "is_causal", False))
            sites[here.name] = Site(here.name, stack, layer, n_heads, n_kv, head_dim, v_dim, causal, cross, out_proj)
    return [sites[here.name] for here in found]


def _layers(indices: list[Places]) -> list[int]:
    """The layer of each site: the first index that tells the sites of the stack apart, else the running number."""
    depth = min((len(i) for i in indices), default=0)
    for level in range(depth):
        values = [i[level][1] for i in indices]
        if len(set(values)) == len(values):
            return values
    return list(range(len(indices)))


def _stack_names(keys: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """One name for each layer list; the first of a kind is plain, later ones add what their path calls them."""
    names: dict[tuple[str, str], str] = {}
    for kind, container in dict.fromkeys(keys):
        name = kind
        if name in names.values():
            words = [
                part
                for part in container.split(".")
                if not part.isdigit() and part not in ("layers", "layer", "blocks", "block")
            ]
            name = f"{kind}_{words[-1].split('_')[0] if words else len(names)}"
        while name in names.values():
            name += "_2"
        names[kind, container] = name
    return names


def _stack_kind(module: PreTrainedModel, here: Walked, cross: bool) -> str:
    path = here.name.lower()
    if "qformer" in path or "qformer" in type(here.module).__name__.lower():
        return "qformer_cross" if cross else "qformer"
    if cross:
        return "cross"
    owner: Any = here.owner
    source = getattr(owner, "main_input_name", "input_ids")
    model_type = str(getattr(owner.config, "model_type", ""))
    says = f"{here.owner_path.lower()} {model_type} {type(owner).__name__.lower()}"
    if re.search(r"audio|whisperencoder|speech", says) or source in ("input_features", "input_values"):
        if "decoder" not in path:
            return "audio"
    else:
        inside = re.search(r"vision|visual", path) and not re.search(r"text|language", path)
        if inside or source == "pixel_values" or re.search(r"vision|visual|vit\b|image_tower", says):
            return "vision"
    if getattr(module.config, "is_encoder_decoder", False) and re.search(r"(^|\.)encoder(\.|$)", path):
        return "encoder"
    return "text"


def _is_cross(name: str, sub: nn.Module) -> bool:
    declared = getattr(sub, "is_cross_attention", None)
    if isinstance(declared, bool) and declared:
        return True
    return bool(re.search(r"cross|encoder_attn|encdec", f"{name} {type(sub).__name__}".lower()))


class _Shapes:
    """Heads, key-value heads, head dim, value dim and output projection of the sites of one model.

    Asking for an attribute that a module lacks is slow, and a site is asked for some thirty. Sites that hold the same of what
    is asked for, under one config, are of one shape, unless their class has attributes of its own making.
    """

    def __init__(self) -> None:
        self._plain: dict[type, bool] = {}
        self._known: dict[Any, Shape] = {}

    def of(self, sub: nn.Module) -> Shape:
        cls = type(sub)
        plain = self._plain.get(cls)
        if plain is None:
            usual = cls.__getattr__ is nn.Module.__getattr__ and cls.__getattribute__ is object.__getattribute__
            plain = self._plain[cls] = usual and not any(hasattr(cls, name) for name in ASKED)
        if not plain:
            return _read_shape(sub)
        held = vars(sub)
        own = tuple((name, _number(held[name]), isinstance(held[name], nn.Module)) for name in held if name in ASKED)
        registered: dict[str, nn.Module | None] = sub._modules  # pyright: ignore[reportPrivateUsage]
        parts = tuple(name for name, part in registered.items() if part is not None)
        key = cls, id(getattr(sub, "config", None)), own, parts
        if key not in self._known:
            self._known[key] = _read_shape(sub)
        return self._known[key]


def _read_shape(sub: nn.Module) -> Shape:
    config: Any = getattr(sub, "config", None)
    n_heads = _first(sub, HEAD_COUNTS) or _first(config, CONFIG_HEAD_COUNTS) or 0
    groups = _first(sub, GROUPS)
    n_kv = _first(sub, KV_HEAD_COUNTS)
    if n_kv is None:
        n_kv = n_heads // groups if groups else n_heads
    width = _first(sub, WIDTHS) or _first(config, CONFIG_WIDTHS) or 0
    head_dim = _first(sub, HEAD_DIMS)
    head_dim = head_dim or (width // n_heads if n_heads else 0)
    out_proj = next((p for p in OUT_PROJECTIONS if isinstance(getattr(sub, p, None), nn.Module)), None)
    return n_heads, n_kv, head_dim, _first(sub, V_HEAD_DIMS) or head_dim, out_proj


def _first(owner: Any, names: tuple[str, ...]) -> int | None:
    return next((n for n in (_number(getattr(owner, name, None)) for name in names) if n is not None), None)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _layer_lists(walk: Walk, sites: list[Site]) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    n_layers: dict[str, int] = {}
    without: dict[str, tuple[int, ...]] = {}
    places = {here.name: here.places for here in walk.sites}
    holding = {place for found in places.values() for place in found}
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(site.stack, []).append(site)
    for stack, mine in stacks.items():
        own = next((places[site.name][0][0] for site in mine if places[site.name]), None)
        members = None if own is None else walk.lists.get(own)
        n_layers[stack] = max(max(site.layer for site in mine) + 1, 0 if members is None else len(members))
        if members is not None and not mine[0].cross:
            empty = tuple(n for n in range(len(members)) if (own, n) not in holding)
            if empty:
                without[stack] = empty
    return n_layers, without


def with_shapes(site: Site, **changes: Any) -> Site:
    """A copy of ``site`` with what a run has shown."""
    return replace(site, **changes)
