"""Every attention site of a Hugging Face model: where it is, what shape it has, and which attention is out of reach.

A site is found by what its class does, not by its name: some method of it asks transformers' ``AttentionInterface`` for an
attention function. Wrappers that are merely called "Attention" are therefore not listed, and modules that compute attention
themselves are named as unreached. Shapes are read from the module and its config; with ``inputs`` the model is run once
and what the run shows overrides what the attributes say.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "proj", "o", "projection", "projection_layer", "wo")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads_total")
CONFIG_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads", "attention_heads")


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
    found: list[tuple[str, nn.Module]] = [(name, sub) for name, sub in module.named_modules() if dispatches(type(sub))]
    described = _place(module, found)
    if inputs is not None:
        from interp.models.dryrun import confirm

        described = confirm(module, described, inputs)
    n_layers, without = _layer_lists(module, described)
    return Anatomy(type(module).__name__, tuple(described), n_layers, _unreached(module, described), without)


@cache
def dispatches(cls: type) -> bool:
    """Does a method of ``cls`` itself ask the attention interface for a function?"""
    if not issubclass(cls, nn.Module) or cls.__module__.startswith("torch."):
        return False
    return any(_names_interface(inspect.unwrap(member)) for member in _methods(cls))


def _methods(cls: type) -> Iterable[Any]:
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "builtins")) or base.__name__ == "PreTrainedModel":
            continue
        yield from (member for member in vars(base).values() if isinstance(member, types.FunctionType))


def _names_interface(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    pending = [code] if code is not None else []
    while pending:
        current = pending.pop()
        if "ALL_ATTENTION_FUNCTIONS" in current.co_names:
            return True
        pending.extend(c for c in current.co_consts if isinstance(c, types.CodeType))
    return False


def _place(module: PreTrainedModel, found: list[tuple[str, nn.Module]]) -> list[Site]:
    """Give every site its stack and layer, then its shapes."""
    placed: list[tuple[str, nn.Module, str, str, list[tuple[str, int]]]] = []
    for name, sub in found:
        indices = _indices(module, name)
        container = indices[0][0] if indices else name.rpartition(".")[0]
        placed.append((name, sub, _stack_kind(module, name, sub), container, indices))
    names = _stack_names([(kind, container) for _, _, kind, container, _ in placed])
    sites: list[Site] = []
    for key, stack in names.items():
        members = [p for p in placed if (p[2], p[3]) == key]
        layers = _layers([indices for *_, indices in members])
        sites.extend(_describe(name, sub, stack, layer) for (name, sub, *_), layer in zip(members, layers, strict=True))
    order = {name: n for n, (name, _) in enumerate(found)}
    return sorted(sites, key=lambda site: order[site.name])


def _indices(module: nn.Module, name: str) -> list[tuple[str, int]]:
    """The layer lists on the way to a module: (path of the list, index in it)."""
    parts = name.split(".")
    return [(".".join(parts[:n]), int(part)) for n, part in enumerate(parts) if part.isdigit()]


def _layers(indices: list[list[tuple[str, int]]]) -> list[int]:
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


def _stack_kind(module: PreTrainedModel, name: str, sub: nn.Module) -> str:
    from transformers import PreTrainedModel

    path = name.lower()
    cross = _is_cross(name, sub)
    if "qformer" in path or "qformer" in type(sub).__name__.lower():
        return "qformer_cross" if cross else "qformer"
    if cross:
        return "cross"
    owner: Any = module
    walked: Any = module
    owner_path = ""
    for n, part in enumerate(name.split(".")):
        walked = getattr(walked, part)
        if isinstance(walked, PreTrainedModel):
            owner, owner_path = walked, ".".join(name.split(".")[: n + 1]).lower()
    source = getattr(owner, "main_input_name", "input_ids")
    model_type = str(getattr(owner.config, "model_type", ""))
    says = f"{owner_path} {model_type} {type(owner).__name__.lower()}"
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


def _describe(name: str, sub: nn.Module, stack: str, layer: int) -> Site:
    config: Any = getattr(sub, "config", None)
    n_heads = _first(sub, HEAD_COUNTS) or _first(config, CONFIG_HEAD_COUNTS) or 0
    groups = _first(sub, ("num_key_value_groups", "n_rep"))
    n_kv = _first(sub, ("num_key_value_heads", "num_kv_heads"))
    if n_kv is None:
        n_kv = n_heads // groups if groups else n_heads
    width = (
        _first(sub, ("embed_dim", "hidden_size", "dim", "all_head_size", "inner_dim"))
        or _first(config, ("hidden_size", "d_model"))
        or 0
    )
    head_dim = _first(sub, ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size"))
    head_dim = head_dim or (width // n_heads if n_heads else 0)
    causal = bool(getattr(sub, "is_causal", False))
    out_proj = next((p for p in OUT_PROJECTIONS if isinstance(getattr(sub, p, None), nn.Module)), None)
    v_dim = _first(sub, ("v_head_dim",)) or head_dim
    return Site(name, stack, layer, n_heads, n_kv, head_dim, v_dim, causal, _is_cross(name, sub), out_proj)


def _first(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _layer_lists(module: nn.Module, sites: list[Site]) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    n_layers: dict[str, int] = {}
    without: dict[str, tuple[int, ...]] = {}
    held = {site.name for site in sites}
    for stack in dict.fromkeys(site.stack for site in sites):
        mine = [site for site in sites if site.stack == stack]
        lists = [i[0] for i in (_indices(module, s.name) for s in mine) if i]
        own = [path for path, index in lists]
        length = max(site.layer for site in mine) + 1
        members: nn.Module | None = None
        if own:
            members = module.get_submodule(own[0])
            if isinstance(members, nn.ModuleList | nn.Sequential) and len(members) >= length:
                length = len(members)
        n_layers[stack] = length
        if isinstance(members, nn.ModuleList | nn.Sequential) and not mine[0].cross:
            empty = [
                n
                for n, layer in enumerate(members)
                if not any(f"{own[0]}.{n}.{name}" in held for name, _ in layer.named_modules())
            ]
            if empty:
                without[stack] = tuple(empty)
    return n_layers, without


def _unreached(module: nn.Module, sites: list[Site]) -> tuple[str, ...]:
    """Modules that look like attention, hold weights of their own and neither contain nor lie in a site."""
    names = [site.name for site in sites]
    missing: list[str] = []
    for name, sub in module.named_modules():
        looks = isinstance(sub, nn.MultiheadAttention) or re.search(r"Attention|SelfAttn", type(sub).__name__)
        if not looks or (
            re.search(r"Linear[A-Z]|Pool$", type(sub).__name__) and not isinstance(sub, nn.MultiheadAttention)
        ):
            continue
        if any(s == name or s.startswith(f"{name}.") or name.startswith(f"{s}.") for s in names):
            continue
        if any(entry.split(" ")[0] and name.startswith(entry.split(" ")[0] + ".") for entry in missing):
            continue
        missing.append(f"{name} ({type(sub).__name__})")
    return tuple(missing)


def with_shapes(site: Site, **changes: Any) -> Site:
    """A copy of ``site`` with what a run has shown."""
    return replace(site, **changes)
