"""While a session is open on the model under a TransformerLens bridge, calls of the bridge are seen and changed, too.

The bridge's attention modules then hand their calls to the model's own (which ask transformers' attention interface, hence the
session). Hooks of the bridge outside attention fire as ever, and so do ``hook_in`` and ``hook_out`` of attention modules (hence
``attn_out``); those inside them (q, k, v, z, scores, pattern) do not, which a warning says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from interp.models.anatomy import Site
from interp.models.bridge import bridge_of, require_unprocessed, wrapped

Enter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
Leave = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


def link(module: nn.Module, sites: Iterable[Site], enter: Enter, leave: Leave) -> Callable[[], None]:
    """Lead calls of the bridge that ``module`` came out of through ``module``'s attention, until the result is called.

    Args:
        module: a model, from a bridge or not.
        sites: its sites.
        enter, leave: called around each forward of the bridge as hooks of ``module`` would be.
    """
    bridge = bridge_of(module)
    if bridge is None:
        return lambda: None
    root: nn.Module = bridge.original_model
    above = {path: outer for path, outer, original in wrapped(root) if outer is not original and _is_attention(outer)}
    taken: dict[str, Any] = {}
    for site in sites:
        parts = site.name.split(".")
        # The bridge may wrap a module that holds the site (ViT's).
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in above), None)
        if path is not None:
            taken[path] = above[path]
    own = root.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        require_unprocessed(bridge)
        _warn_of_hooks(bridge, taken.values())
        enter(module, args, kwargs)
        result = None
        try:
            result = own(*args, **kwargs)
        finally:
            leave(module, args, kwargs, result)
        return result

    # Past the __setattr__ of the bridge's modules, which sets the attribute on the model's instead.
    placed = {id(root): (root, forward)}
    placed.update({id(outer): (outer, _to(outer, module.get_submodule(path))) for path, outer in taken.items()})
    before = {key: vars(outer).get("forward") for key, (outer, _) in placed.items()}
    for outer, function in placed.values():
        vars(outer)["forward"] = function

    def undo() -> None:
        for key, (outer, _) in placed.items():
            if before[key] is None:
                vars(outer).pop("forward", None)
            else:
                vars(outer)["forward"] = before[key]

    return undo


def _is_attention(outer: nn.Module) -> bool:
    return hasattr(outer, "hook_pattern")


def _to(outer: Any, target: nn.Module) -> Callable[..., Any]:
    """The forward of a bridge's attention module that leads to ``target``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        for name in ("query_input", "hidden_states"):
            if name in kwargs:
                kwargs[name] = outer.hook_in(kwargs[name])
                break
        else:
            if args and isinstance(args[0], Tensor):
                args = (outer.hook_in(args[0]), *args[1:])
        result = target(*args, **kwargs)
        return (outer.hook_out(result[0]), *result[1:]) if isinstance(result, tuple) else outer.hook_out(result)

    return forward


def _warn_of_hooks(bridge: Any, attention: Iterable[nn.Module]) -> None:
    inside = {
        id(point)
        for outer in attention
        for name, point in outer.named_modules()
        if name not in ("hook_in", "hook_out")
        and any(not getattr(hook, "is_permanent", False) for hook in getattr(point, "fwd_hooks", ()))
    }
    # A point has several names, the one that people use last.
    silent = list({id(point): name for name, point in bridge.hook_dict.items() if id(point) in inside}.values())
    if silent:
        warnings.warn(
            f"while an interp session is open, TransformerLens hooks inside attention do not fire, {len(silent)} here: "
            f"{', '.join(silent[:3])}; take patterns and z from the session (Capture(attention=True, z=True)), edit them with "
            "interventions",
            stacklevel=4,
        )
