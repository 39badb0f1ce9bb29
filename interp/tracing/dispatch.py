"""How the op gets into a model: transformers' attention and mask interfaces, and the way back.

One name is registered in both interfaces (in one only, the mask would silently be None and causality lost). Installing sets
the implementation of the configs that the sites read; removing puts back what was there. A module that no open session
knows, say of a second model that shares the config object, takes the function it had on entry.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp.attention.sdpa import fused
from interp.tracing.masks import LazyMask

NAME = "interp"

Handler = Callable[..., tuple[Tensor, Any]]

_lock = threading.RLock()
_handlers: dict[int, weakref.WeakMethod[Handler]] = {}
_passed_by: dict[int, dict[int, tuple[Handler, dict[str, int]]]] = {}
_configs: dict[int, list[Any]] = {}


def install(modules: Iterable[nn.Module], configs: Iterable[Any], handler: Handler) -> None:
    """Send the attention calls of ``modules`` to ``handler``; ``configs`` are those the modules and their masks read."""
    _register()
    with _lock:
        for module in modules:
            _handlers[id(module)] = weakref.WeakMethod(handler)
        for config in configs:
            entry = _configs.setdefault(id(config), [config, config._attn_implementation, 0])
            entry[2] += 1
            config._attn_implementation_internal = NAME


def remove(modules: Iterable[nn.Module], configs: Iterable[Any]) -> None:
    """Undo :func:`install`; a config shared with another installed model keeps ours until that one is removed too."""
    with _lock:
        for module in modules:
            _handlers.pop(id(module), None)
        for config in configs:
            entry = _configs.get(id(config))
            if entry is None:
                continue
            entry[2] -= 1
            if entry[2] == 0:
                # What a user set meanwhile is theirs.
                if config._attn_implementation == NAME:
                    config._attn_implementation_internal = entry[1]
                del _configs[id(config)]


def forget(modules: Iterable[int], configs: Iterable[int]) -> None:
    """Ids of modules and configs that were never removed and whose owner is gone."""
    with _lock:
        for module in modules:
            if module in _handlers and _handlers[module]() is None:
                del _handlers[module]
        for config in configs:
            entry = _configs.get(config)
            if entry is not None:
                entry[2] -= 1
                if entry[2] == 0:
                    del _configs[config]


def handler_of(module: nn.Module) -> Handler | None:
    """What the attention calls of a module go to now, None for the model's own function."""
    held = _handlers.get(id(module))
    return held() if held is not None else None


def pass_by(module: nn.Module, used: dict[str, int]) -> None:
    """Send the calls of ``module`` in this thread to the model's own function without asking the handler, and count them in ``used``.

    Until :func:`stop_passing`. Once for a site that nobody touches in a whole run: asking costs a token of a small model a twentieth.
    """
    used.setdefault("untouched", 0)
    _passed_by.setdefault(threading.get_ident(), {})[id(module)] = (original(module), used)


def stop_passing(modules: Iterable[int], thread: int | None = None) -> None:
    """Ask the handlers of modules (by id) again, in one thread or in all."""
    for one in list(_passed_by) if thread is None else (thread,):
        ways = _passed_by.get(one)
        if ways is None:
            continue
        for module in modules:
            ways.pop(module, None)
        if not ways:
            _passed_by.pop(one, None)


def entry_implementation(config: Any) -> str:
    """The implementation a config had when we were installed."""
    entry = _configs.get(id(config))
    found = entry[1] if entry is not None else getattr(config, "_attn_implementation", None)
    return "eager" if found in (None, NAME) else found


def call_original(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """The call as the plain model would have made it: its own function, its own mask."""
    native = mask.native() if isinstance(mask, LazyMask) else mask
    return original(module)(module, query, key, value, native, **options)


def original(module: nn.Module) -> Handler:
    """The function that the plain model's attention module calls now."""
    return _original_function(module, entry_implementation(getattr(module, "config", None)))


class SeenLse(TorchFunctionMode):
    """While the model's own function runs: keep the log-sum-exp that PyTorch's fused kernel computes beside the output.

    The output stays that of the plain model to the bit (the same kernel is asked for one more of its results).

    Attributes:
        lse: float32 ``[B, H, Lq]``, None where the kernel had none to give.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lse: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options: dict[str, Any] = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and len(args) == 3:
            plain = options.get("attn_mask") is None and not options.get("dropout_p")
            if plain and options.keys() <= {"attn_mask", "dropout_p", "scale", "is_causal", "enable_gqa"}:
                made = fused(
                    *args, causal=options.get("is_causal", False), scale=options.get("scale"),
                    enable_gqa=options.get("enable_gqa", False),
                )  # fmt: skip
                if made is not None:
                    z, self.lse = made
                    return z
        return func(*args, **options)


def _original_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    if implementation != "eager":
        return _functions()[implementation]
    found = _home(type(module)).get("eager_attention_forward")
    if found is None:
        raise RuntimeError(
            f"no eager attention function was found for {type(module).__name__}; load the model with attn_implementation='sdpa'"
        )
    return found


@functools.cache
def _functions() -> Any:
    """transformers' attention functions by name; looked up in the module, the table costs as much as the rest of the way."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


@functools.lru_cache(maxsize=256)
def _home(kind: type) -> dict[str, Any]:
    """The names of the source file that holds the eager function of an attention class, empty where there is none."""
    for cls in kind.__mro__:
        for member in vars(cls).values():
            names: dict[str, Any] = getattr(member, "__globals__", {})
            if names.get("eager_attention_forward") is not None and "ALL_ATTENTION_FUNCTIONS" in names:
                return names
    return {}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, Any]:
    """To the session that holds the module, else to the original."""
    handler = handler_of(module)
    if handler is None:
        return call_original(module, query, key, value, attention_mask, **options)
    return handler(module, query, key, value, attention_mask, **options)


# A graph break: which session is open is not for the compiler to bake in. Made on registration, since the compiler's machinery
# imports triton where that is installed.
_uncompiled: Handler = _attention


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, Any]:
    """The function registered as ``interp``."""
    # The way around the compiler costs as much as the rest of an idle call, so it is taken under the compiler alone.
    if torch.compiler.is_compiling():
        return _uncompiled(module, query, key, value, attention_mask, **options)
    ways = _passed_by.get(threading.get_ident())
    if ways is not None and (found := ways.get(id(module))) is not None:
        # All in this one function: each further one that a call goes through costs as much as the rest of this way.
        function, used = found
        used["untouched"] += 1
        native = attention_mask.native() if isinstance(attention_mask, LazyMask) else attention_mask
        return function(module, query, key, value, native, **options)
    return _attention(module, query, key, value, attention_mask, **options)


def mask(**arguments: Any) -> Any:
    """The mask function registered as ``interp``."""
    given = arguments.get("attention_mask")
    if isinstance(given, LazyMask):
        return given
    return LazyMask(entry_implementation(arguments.get("config")), arguments)


def _register() -> None:
    global _uncompiled  # noqa: PLW0603 - one function for the process, which cannot be made at import
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if _uncompiled is _attention:
        _uncompiled = cast(Handler, torch.compiler.disable(_attention))
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def registered() -> bool:
    """Is the name known to both interfaces? (:func:`interp.check` asks.)"""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping  # pyright: ignore[reportPrivateUsage]
    return ALL_ATTENTION_FUNCTIONS.get(NAME) is attention and masks.get(NAME) is mask
