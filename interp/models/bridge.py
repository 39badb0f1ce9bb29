"""The transformers model under a TransformerLens bridge.

A ``TransformerBridge`` puts its own modules in the place of the model's (``model.transformer.h`` holds its blocks), and most of its
attention modules compute attention themselves, without transformers' attention interface. What Headscope works on is therefore
a second module tree of the model's own class that holds the very same parameters and buffers (:func:`plain`): nothing is copied, a
weight changed in one is changed in the other.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interp.models.errors import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEGACY = ("HookedTransformer", "HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder")

_plain: weakref.WeakKeyDictionary[Any, PreTrainedModel] = weakref.WeakKeyDictionary()
_bridges: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def is_bridge(model: Any) -> bool:
    """Is it a TransformerLens bridge (or one of its older models)? Never imports TransformerLens."""
    home: Any = sys.modules.get("transformer_lens.model_bridge")
    if home is not None and isinstance(model, home.BridgeCore):
        return True
    return any(c.__name__ in LEGACY and c.__module__.startswith("transformer_lens") for c in type(model).__mro__)


def plain(bridge: Any) -> PreTrainedModel:
    """The transformers model of a bridge, without the bridge's modules, on the same weights; the same object each time.

    Its attention implementation is the one transformers would choose (the bridge asks for eager).

    Raises:
        LoadError: the bridge holds no transformers model in this process (``HookedTransformer``, ``boot_native``, vLLM), its
            weights were processed (``enable_compatibility_mode()``), or its modules are not those its class makes (quantised).
    """
    kind = type(bridge).__name__
    if kind in LEGACY:
        raise LoadError(
            f"model must hold a transformers model; {kind} has weights of its own making: pass the transformers model, or "
            "TransformerBridge.boot_transformers(name) of TransformerLens 4"
        )
    require_unprocessed(bridge)
    if bridge in _plain:
        return _plain[bridge]
    from transformers import PreTrainedModel

    module = getattr(bridge, "original_model", None)
    if not isinstance(module, PreTrainedModel):
        raise LoadError(f"model must be a bridge to a transformers model, got a {kind} to {type(module).__name__}")
    twin = _twin(module)
    _plain[bridge], _bridges[twin] = twin, weakref.ref(bridge)
    return twin


def bridge_of(module: nn.Module) -> Any:
    """The bridge that a model came out of, None for others."""
    held = _bridges.get(module)
    return None if held is None else held()


def require_unprocessed(bridge: Any) -> None:
    """Raise where the bridge's weights are no longer the model's.

    Raises:
        LoadError: ``enable_compatibility_mode()`` or ``process_weights()`` was called.
    """
    if getattr(bridge, "_weights_processed", False):
        raise LoadError(
            "the bridge must have the weights of its transformers model; enable_compatibility_mode() folded layer norms into them: "
            "pass a fresh bridge, or call enable_compatibility_mode(no_processing=True)"
        )


def wrapped(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """``(path, module, original)`` of all that the model's class made: what stands there in a bridged model, and what stood there."""
    original = module
    while "_original_component" in vars(original)["_modules"]:
        original = original.get_submodule("_original_component")
    yield path, module, original
    for name, child in vars(original)["_modules"].items():
        if child is not None:
            yield from wrapped(child, f"{path}.{name}" if path else name)


def _twin(module: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(module.config)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if part is not None:
            vars(part)["_attn_implementation_internal"] = "eager" if capped else None
    # Asked for by the bridge, not by the user; the plain model would make every map for nobody.
    config.output_attentions = False
    try:
        with torch.device("meta"):
            twin = type(module)(config)
    except Exception as error:
        raise LoadError(f"{type(module).__name__} could not be made from the bridge's config: {error}") from error
    mine = {path: original for path, _, original in wrapped(module)}
    for path, sub in twin.named_modules(remove_duplicate=False):
        other = mine.get(path)
        if other is None or _named(other) != _named(sub):
            got = "nothing" if other is None else f"{type(other).__name__} with {_named(other)}"
            raise LoadError(
                f"bridge must hold the modules that {type(module).__name__} makes (unquantised, no adapters): {path or 'the root'} "
                f"must be a {type(sub).__name__} with {_named(sub)}, got {got}"
            )
        for kind in ("_parameters", "_buffers"):
            held, made = getattr(other, kind), getattr(sub, kind)
            # The dictionary itself: a tensor that is moved or replaced in one tree is so in the other. The bridge drops a bias
            # that is None, which the model's class still asks for.
            vars(sub)[kind] = held if held.keys() >= made.keys() else {**made, **held}
    if hasattr(module, "generation_config"):
        twin.generation_config = module.generation_config
    twin.train(module.training)
    return twin


def _named(module: nn.Module) -> list[str]:
    return sorted(name for name, _ in module.named_parameters(recurse=False))
