"""What our mask function hands to the models: a description that turns into a tensor only where somebody insists.

transformers builds masks once per forward through ``AttentionMaskInterface`` and passes what it gets to every layer. A
:class:`LazyMask` keeps the arguments of that call. Our attention reads the description; the model's own attention function
gets the very mask it would have got (so that an untouched call is bit-equal); model code that computes with masks (PaliGemma,
BART's cross attention, attention outside the interface) meets an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from interp.attention import Mask

_MISSING = object()


class LazyMask:
    """The arguments of one call of a transformers mask function."""

    def __init__(self, implementation: str, arguments: Mapping[str, Any]) -> None:
        self.implementation = implementation
        self.arguments = dict(arguments)
        for name in ("q_offset", "kv_offset"):
            if isinstance(self.arguments.get(name), Tensor):
                # A static cache hands over its own counter, which the first layer moves on in place.
                self.arguments[name] = self.arguments[name].clone()
        self._native: Any = _MISSING
        self._dense: Tensor | None = None
        self._description: Mask | None = None
        self._contiguous = False

    @property
    def shape(self) -> torch.Size:
        a = self.arguments
        return torch.Size((a["batch_size"], 1, a["q_length"], a["kv_length"]))

    @property
    def n_keys(self) -> int:
        return self.arguments["kv_length"]

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    @property
    def q_offset(self) -> int:
        return int(self.arguments.get("q_offset", 0))

    @property
    def kv_offset(self) -> int:
        return int(self.arguments.get("kv_offset", 0))

    def follows(self, last: LazyMask) -> bool:
        """Whether this is the mask of ``last`` a token or more later, for one row that sees as far as the keys go."""
        a, b = self.arguments, last.arguments
        same = (
            all(a.get(name) is b.get(name) for name in ("mask_function", "use_vmap"))
            and a["batch_size"] == b["batch_size"]
        )
        ends = self.q_offset - self.kv_offset == a["kv_length"] - 1 and self.kv_offset == last.kv_offset
        return same and ends and a["kv_length"] > b["kv_length"] and a["q_length"] == b["q_length"] == 1

    def native(self) -> Any:
        """What the model's own implementation would have received: a tensor, None, a block mask."""
        if self._native is _MISSING:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

            build: Callable[..., Any] | None = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(self.implementation)  # pyright: ignore[reportPrivateUsage]
            self._native = None if build is None else build(**self.arguments)
        if self._contiguous and isinstance(self._native, Tensor):
            self._native = self._native.contiguous()
        return self._native

    def contiguous(self) -> LazyMask:
        """Itself: generation with a static cache asks for this, and must not get a tensor where the model would get None."""
        self._contiguous = True
        return self

    def dense(self) -> Tensor:
        """A tensor in the native format, for model code that computes with masks; never None."""
        if self._dense is None:
            native = self.native()
            if not isinstance(native, Tensor) or native.ndim != 4:
                from transformers.masking_utils import sdpa_mask

                skips: dict[str, Any] = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
                arguments: dict[str, Any] = {**self.arguments, **skips}
                native = sdpa_mask(**arguments)
                if not isinstance(native, Tensor):
                    raise TypeError(f"sdpa_mask must give a tensor when it may not skip, got {type(native).__name__}")
            self._dense = native
        return self._dense

    def describe(self) -> Mask:
        """The same mask as a :class:`~interp.attention.Mask`, without an N x N tensor."""
        if self._description is None:
            a = self.arguments
            n_keys, kv_offset = int(a["kv_length"]), self.kv_offset
            causal, window, rule = _recognise(a["mask_function"], bool(a.get("use_vmap", False)))
            padding = a.get("attention_mask")
            first = None
            if padding is not None:
                padding = padding.bool()
                missing = n_keys + kv_offset - padding.shape[-1]
                if missing > 0:
                    padding = torch.nn.functional.pad(padding, (0, missing))
                first = padding.int().argmax(-1)
                padding = padding[:, kv_offset : kv_offset + n_keys]
                if bool(padding.all()):
                    padding = None
            self._description = Mask(causal, window, padding, self.q_offset, kv_offset, rule, None, first)
        return self._description

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*_materialised(args), **_materialised(kwargs or {}))


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: LazyMask, *others: Any) -> Any:
        return getattr(self.dense(), name)(*_materialised(others))

    return apply


for _name in (
    "add",
    "sub",
    "mul",
    "and",
    "or",
    "xor",
    "invert",
    "neg",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "radd",
    "rmul",
    "rsub",
):
    setattr(LazyMask, f"__{_name}__", _operator(f"__{_name}__"))


def _materialised(value: Any) -> Any:
    if isinstance(value, LazyMask):
        return value.dense()
    if isinstance(value, list | tuple):
        return type(value)(_materialised(v) for v in value)
    if isinstance(value, dict):
        return {k: _materialised(v) for k, v in value.items()}
    return value


def _recognise(function: Any, use_vmap: bool) -> tuple[bool, tuple[int | None, int | None] | None, Any]:
    """``(causal, window, rule)`` of a transformers mask function; what is not recognised stays a rule, exact but slower."""
    from transformers import masking_utils as m

    if function is m.causal_mask_function:
        return True, None, None
    if function is m.bidirectional_mask_function:
        return False, None, None
    if getattr(function, "__code__", None) is _AND_CODE():
        causal, rest = False, []
        left: int | None = None
        right: int | None = None
        for part in function.__closure__[0].cell_contents:
            size = _closed_over(part, "sliding_window")
            if part is m.causal_mask_function:
                causal = True
            elif part is m.bidirectional_mask_function:
                pass
            elif size is not None and _made_by(part, m.sliding_window_overlay):
                left = _narrower(left, size - 1)
            elif size is not None and _made_by(part, m.sliding_window_bidirectional_overlay):
                left, right = _narrower(left, size), _narrower(right, size)
            else:
                rest.append(part)
        window = None if left is None and right is None else (left, right)
        rule = m.and_masks(*rest) if rest else None
        return causal, window, None if rule is None else _as_rule(rule, use_vmap)
    return False, None, _as_rule(function, use_vmap)


def _narrower(bound: int | None, other: int) -> int:
    return other if bound is None else min(bound, other)


def _AND_CODE() -> Any:
    from transformers import masking_utils as m

    return m.and_masks(m.causal_mask_function).__code__


def _made_by(function: Any, factory: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code in factory.__code__.co_consts


def _closed_over(function: Any, name: str) -> int | None:
    code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or closure is None or name not in code.co_freevars:
        return None
    value = closure[code.co_freevars.index(name)].cell_contents
    return value if isinstance(value, int) else None


def _as_rule(function: Any, use_vmap: bool) -> Any:
    if not use_vmap:
        return function

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # A function users passed need not be index-based, so it is mapped over scalars as transformers does it.
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
        from transformers.masking_utils import _vmap_expansion_sdpa  # pyright: ignore[reportPrivateUsage]

        with TransformGetItemToIndex():
            return _vmap_expansion_sdpa(function)(b.flatten(), h.flatten(), i.flatten(), j.flatten())

    return rule
