"""The registry of tiny random models, one of each family, and what a test needs to know about each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.testing.weights import randomise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EagerMaps = dict[str, list[Tensor | None]]

SITES = ("", "sites")
"""Take the maps from what each attention module returns, where the library mixes or drops them on the way out."""


@dataclass(frozen=True)
class Stack:
    """The attention modules of one stack, in layer order.

    Args:
        sites: module path of each layer's attention; None for a layer without softmax heads.
        n_heads: query heads a layer.
        maps: where the library's eager run returns the maps of this stack, as ``(module path, output attribute)``,
            or :data:`SITES`; None where it returns none or something else (see the specimen's notes).
    """

    sites: tuple[str | None, ...]
    n_heads: int
    maps: tuple[str, str] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(number of layers, number of query heads a layer)``."""
        return len(self.sites), self.n_heads


def stack(
    pattern: str,
    n_layers: int,
    n_heads: int,
    maps: tuple[str, str] | None = ("", "attentions"),
    *,
    without: Sequence[int] = (),
) -> Stack:
    """A :class:`Stack` whose layer ``i`` is the module ``pattern.format(i)``; ``without`` lists those with no heads."""
    sites = tuple(None if i in without else pattern.format(i) for i in range(n_layers))
    return Stack(sites, n_heads, maps)


@dataclass
class Specimen:
    """A tiny random model of one family in eval mode, with inputs it accepts and the heads it must show.

    Attributes:
        name: family name, as in :func:`families`.
        module: the plain ``PreTrainedModel``, loaded with the library's default attention implementation.
        inputs: keyword arguments of ``module(**inputs)``: one sample.
        stacks: the stacks that go through transformers' attention interface.
        batch: a second set of inputs with two samples of different length (left padded for decoders), or None.
        generates: whether ``module.generate(**inputs)`` works.
        unreached: class names of attention modules that do not go through the interface.
        notes: what the library's eager run returns oddly.
    """

    name: str
    module: PreTrainedModel
    inputs: dict[str, Any]
    stacks: dict[str, Stack]
    batch: dict[str, Any] | None = None
    generates: bool = False
    unreached: tuple[str, ...] = ()
    notes: str = ""

    @property
    def expected_stacks(self) -> dict[str, tuple[int, int]]:
        """``{stack: (number of layers, number of query heads)}``, from the config."""
        return {name: s.shape for name, s in self.stacks.items()}

    @property
    def eager_maps(self) -> Callable[..., EagerMaps] | None:
        """A function returning the library's own eager maps, ``{stack: [map or None for each layer]}``, or None.

        Each map is ``[batch, head, query, key]``. It runs a copy of the model, so the model itself is never touched.
        By default it runs on ``inputs``; give other inputs as its argument.
        """
        if not any(s.maps for s in self.stacks.values()):
            return None
        return self._eager_maps

    def _eager_maps(self, inputs: Mapping[str, Any] | None = None) -> EagerMaps:
        twin = copy.deepcopy(self.module)
        for config in configs(twin):
            config._attn_implementation_internal = "eager"
        wanted = {s.maps[0] for s in self.stacks.values() if s.maps and s.maps != SITES}
        outputs: dict[str, Any] = {}
        own: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for path in wanted - {""}:
                for handle in _ask_for_maps(twin.get_submodule(path), path, outputs):
                    hooks.callback(handle.remove)
            for path in (p for s in self.stacks.values() if s.maps == SITES for p in s.sites if p):
                handle = twin.get_submodule(path).register_forward_hook(_keep_second(path, own))
                hooks.callback(handle.remove)
            top = {"output_attentions": True} if "" in wanted else {}
            with torch.no_grad():
                outputs[""] = twin(**(self.inputs if inputs is None else inputs), **top)
        maps: EagerMaps = {}
        for name, s in self.stacks.items():
            if s.maps == SITES:
                maps[name] = [own[path] if path else None for path in s.sites]
            elif s.maps:
                maps[name] = _by_layer(s, outputs[s.maps[0]][s.maps[1]], f"{self.name}, stack {name}")
        return maps


def _keep_second(path: str, own: dict[str, Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        own[path] = output[1]

    return hook


def _ask_for_maps(tower: nn.Module, path: str, outputs: dict[str, Any]) -> list[Any]:
    """Hooks that make one tower return its maps and keep its output (a VLM's own output has the text stack only)."""

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_attentions": True, "return_dict": True}

    def after(_: nn.Module, __: Any, output: Any) -> None:
        outputs[path] = output

    return [
        tower.register_forward_pre_hook(before, with_kwargs=True),
        tower.register_forward_hook(after),
    ]


def _by_layer(s: Stack, maps: Sequence[Tensor | None], what: str) -> list[Tensor | None]:
    """Put the library's tuple of maps, which skips layers without heads, in layer order."""
    present = [i for i, site in enumerate(s.sites) if site is not None]
    maps = [m for m in maps if m is not None]
    if len(maps) != len(present):
        raise ValueError(f"{what}: eager returned {len(maps)} maps for {len(present)} layers with heads")
    by_layer: list[Tensor | None] = [None] * len(s.sites)
    for i, m in zip(present, maps, strict=True):
        by_layer[i] = m
    return by_layer


def configs(module: nn.Module) -> Iterator[Any]:
    """Every config object any submodule holds, sub-configs included, each once."""
    seen: set[int] = set()
    todo: list[Any] = [getattr(m, "config", None) for m in module.modules()]
    while todo:
        config = todo.pop()
        if id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
            continue
        seen.add(id(config))
        yield config
        todo.extend(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))


@dataclass(frozen=True)
class Draw:
    """Random inputs of a specimen, the same for the same seed."""

    generator: torch.Generator = field(default_factory=torch.Generator)

    def ids(self, batch: int, length: int, low: int = 10, high: int = 90) -> Tensor:
        """Token ids ``[batch, length]`` in ``[low, high)``; the ids below 10 are kept for special tokens (0 is pad)."""
        return torch.randint(low, high, (batch, length), generator=self.generator)

    def floats(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator)

    def text(self, length: int = 24, batch: int = 1) -> dict[str, Tensor]:
        """Unpadded text inputs."""
        ids = self.ids(batch, length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def padded_text(self, length: int = 24, pads: int = 7, side: str = "left") -> dict[str, Tensor]:
        """Two samples, the second with ``pads`` pad tokens on one side."""
        inputs = self.text(length, batch=2)
        where = slice(0, pads) if side == "left" else slice(length - pads, length)
        inputs["input_ids"][1, where] = 0
        inputs["attention_mask"][1, where] = 0
        return inputs


@dataclass(frozen=True)
class _Family:
    builder: Callable[[Draw], Specimen]
    needs: tuple[str, ...]
    gain: float
    reached: bool


_FAMILIES: dict[str, _Family] = {}


def family(
    name: str, *needs: str, gain: float = 1.4, reached: bool = True
) -> Callable[[Callable[[Draw], Specimen]], Callable[[Draw], Specimen]]:
    """Register a builder of the family ``name``.

    Args:
        name: family name.
        needs: top-level transformers classes it is built from; the family exists where they do.
        gain: query and key projections are drawn with this gain, so that attention is far from uniform.
        reached: False for families with attention (or none) that the attention interface does not reach.
    """

    def register(builder: Callable[[Draw], Specimen]) -> Callable[[Draw], Specimen]:
        _FAMILIES[name] = _Family(builder, needs, gain, reached)
        return builder

    return register


def _registry() -> dict[str, _Family]:
    # The builders' modules are imported on first use: they register themselves.
    from interp.testing import (  # noqa: F401
        encoder_decoder,
        multimodal,
        multimodal_cross,
        multimodal_packed,
        text,
        unreached,
        vision,
    )

    return _FAMILIES


@cache
def _classes() -> frozenset[str]:
    # Once a process: transformers makes the list by a search through a list for each of its thousands of names, 0.4 s.
    import transformers

    return frozenset(dir(transformers))


def families(*, reached: bool | None = True) -> list[str]:
    """Names that :func:`build` knows and the installed transformers has.

    Args:
        reached: True for families whose attention goes through transformers' attention interface, False for those
            where it does not (for negative tests), None for both.
    """
    return [
        name
        for name, f in _registry().items()
        if _classes().issuperset(f.needs) and (reached is None or f.reached is reached)
    ]


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Specimen:
    """Build the tiny random model of family ``name``; the same seed gives the same weights and inputs.

    Raises:
        ValueError: no such family, or the installed transformers does not have it.
    """
    if name not in families(reached=None):
        raise ValueError(f"name must be one of interp.testing.families(reached=None), got {name!r}")
    entry = _FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        specimen = entry.builder(Draw(torch.Generator().manual_seed(seed)))
    specimen.name = name
    randomise(specimen.module, seed=seed, gain=entry.gain)
    specimen.module.eval()
    nn.Module.to(specimen.module, dtype)
    if specimen.generates:
        # Without an end token every generation has the length that was asked for.
        specimen.module.generation_config.eos_token_id = None
        specimen.module.generation_config.pad_token_id = 0
    specimen.inputs = _cast(specimen.inputs, dtype)
    specimen.batch = _cast(specimen.batch, dtype) if specimen.batch is not None else None
    return specimen


def _cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floats = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {k: v.to(dtype) if k in floats else v for k, v in inputs.items()}
