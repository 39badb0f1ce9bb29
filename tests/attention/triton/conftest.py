"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is imported.

The interpreter is Triton's compiler with NumPy behind it, and nearly all of its time is spent on the types of tiles of a
few numbers: the language is replaced again at each call, and each operation makes its shapes and types anew. What is
here does that work once. No value is computed otherwise: ``test_interpreter.py`` compares the bits with and without it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch


class Faster:
    """The interpreter with its repeated work kept; ``patch.undo`` gives back Triton's own.

    Raises:
        AttributeError: this Triton's interpreter has not the parts that are replaced.
    """

    def __init__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        from triton import language
        from triton.language import core, semantic
        from triton.runtime import interpreter

        self.language: Any = language
        self.core: Any = core
        self.semantic: Any = semantic.TritonSemantic
        self.interpreter: Any = interpreter
        try:
            self._patch_once_a_launch()
            self._keep_types()
            self._skip_what_changes_nothing()
        except BaseException:
            self.patch.undo()
            raise

    def _patch_once_a_launch(self) -> None:
        """Have the language replaced once a launch, not again at every call of a function in a kernel."""
        internal = self.interpreter
        patch, launch, no_change = internal._patch_lang, internal.GridExecutor.__call__, internal._LangPatchScope
        modules = {id(self.language), id(self.core)}
        asked_by: dict[int, tuple[Any, set[int]]] = {}
        launches: list[set[int]] = []

        def patch_language(function: Any) -> Any:
            names = function.__globals__
            if id(names) not in asked_by:
                asked_by[id(names)] = names, modules & {id(value) for value in names.values()}
            asked = asked_by[id(names)][1]
            if launches and asked <= launches[-1]:
                return no_change()
            scope = patch(function)
            if launches:
                launches[-1] |= asked
            return scope

        def launched(executor: Any, *args: Any, **options: Any) -> Any:
            launches.append(set())
            try:
                return launch(executor, *args, **options)
            finally:
                launches.pop()

        def patch_attribute(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
            del builder  # there is one

            def called(*args: Any, **named: Any) -> Any:
                named["_semantic"] = own
                return member(*args, **named)

            scope.set_attr(owner, name, called)

        own = self.semantic(internal.interpreter_builder)
        self.patch.setattr(internal, "_patch_attr", patch_attribute)
        self.patch.setattr(internal, "_patch_lang", patch_language)
        self.patch.setattr(internal.GridExecutor, "__call__", launched)

    def _keep_types(self) -> None:
        """A block type of an element type and a shape is made once, and so is what a tensor takes from its type."""
        core, internal = self.core, self.interpreter
        make_block, make_tensor, of_numpy = core.block_type.__init__, core.tensor.__init__, internal._get_np_dtype
        equal = core.dtype.__eq__
        constant, plain = core.constexpr, (list, tuple, core.tuple)
        blocks: dict[Any, dict[str, Any]] = {}

        def block(made: Any, element_ty: Any, shape: Any) -> None:
            if type(shape) not in plain:
                return make_block(made, element_ty, shape)
            sizes = tuple([x.value if type(x) is constant else x for x in shape])
            key = id(element_ty), sizes
            if key not in blocks:
                make_block(made, element_ty, shape)
                made.sizes = sizes
                # The element type is kept with it, so its id stays its own.
                blocks[key] = dict(made.__dict__)
            made.__dict__ = blocks[key]
            return None

        def tensor(made: Any, handle: Any, type: Any) -> None:
            known = type.__dict__.get("of_tensor")
            if known is None:
                make_tensor(made, handle, type)
                type.__dict__["of_tensor"] = made.shape, made.numel, made.dtype
                return
            made.handle, made.type = handle, type
            made.shape, made.numel, made.dtype = known

        def numpy_type(of: Any) -> Any:
            known = of.__dict__.get("of_numpy")
            if known is None:
                known = of.__dict__["of_numpy"] = of_numpy(of)
            return known

        self.patch.setattr(core.block_type, "__init__", block)
        self.patch.setattr(core.tensor, "__init__", tensor)
        self.patch.setattr(internal, "_get_np_dtype", numpy_type)
        self.patch.setattr(core.dtype, "__eq__", lambda one, other: one is other or equal(one, other))

    def _skip_what_changes_nothing(self) -> None:
        """Operands of one type are not converted, those of one shape not broadcast; no overflow is looked for in vain.

        The interpreter computes every sum of integers a second time in int64, for an assertion that it then leaves out.
        """
        semantic, builder = self.semantic, self.interpreter.interpreter_builder
        tensor_type, block_type = self.core.tensor, self.core.block_type
        check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
        compute = semantic.computation_type_impl
        names = ("int1", "int8", "int32", "int64", "uint32", "float16", "float32", "float64")
        same = {id(getattr(self.language, name)) for name in names}
        computed: dict[Any, Any] = {}

        def checked(own: Any, one: Any, other: Any, *given: Any, **named: Any) -> Any:
            divides = named.get("div_or_mod") or len(given) > 3
            tensors = type(one) is tensor_type and type(other) is tensor_type
            if tensors and not divides and one.dtype is other.dtype and id(one.dtype) in same:
                return own.broadcast_impl_value(one, other)
            return check(own, one, other, *given, **named)

        def computing(own: Any, one: Any, one_is_number: bool, other: Any, other_is_number: bool, divides: bool) -> Any:
            key = id(one), one_is_number, id(other), other_is_number, divides
            if id(one) not in same or id(other) not in same:
                return compute(own, one, one_is_number, other, other_is_number, divides)
            if key not in computed:
                computed[key] = compute(own, one, one_is_number, other, other_is_number, divides)
            return computed[key]

        def broadcasted(own: Any, one: Any, other: Any) -> Any:
            first, second = one.type.__dict__.get("sizes"), other.type.__dict__.get("sizes")
            if first == second and (first is not None or not (one.type.is_block() or other.type.is_block())):
                return one, other
            if first is None and not one.type.is_block():
                return spread(own, one, other.type.sizes), other
            if second is None and not other.type.is_block():
                return one, spread(own, other, one.type.sizes)
            if first is None or second is None or len(first) != len(second):
                return broadcast(own, one, other)
            sizes = tuple([b if a == 1 else a for a, b in zip(first, second, strict=True)])
            if any(b not in (1, size) for b, size in zip(second, sizes, strict=True)):
                return broadcast(own, one, other)  # which says what does not fit
            return widened(own, one, sizes), widened(own, other, sizes)

        def spread(own: Any, value: Any, sizes: tuple[int, ...]) -> Any:
            wide = block_type(value.type.scalar, list(sizes))
            return own.tensor(own.builder.create_splat(wide, value.handle), wide)

        def widened(own: Any, value: Any, sizes: tuple[int, ...]) -> Any:
            if value.type.sizes == sizes:
                return value
            wide = block_type(value.type.scalar, list(sizes))
            return own.tensor(own.builder.create_broadcast(value.handle, list(sizes)), wide)

        self.patch.setattr(semantic, "binary_op_type_checking_impl", checked)
        self.patch.setattr(semantic, "computation_type_impl", computing)
        self.patch.setattr(semantic, "broadcast_impl_value", broadcasted)
        if not builder.options.debug:
            self.patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))


FASTER: list[Faster] = []
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        # Another Triton may lack a part: slower, and as right.
        with suppress(AttributeError):
            FASTER.append(Faster())


@pytest.fixture
def plain_interpreter() -> Iterator[None]:
    """Triton's interpreter as it comes."""
    if not FASTER:
        pytest.skip("the interpreter is not in use, or is Triton's own anyway")
    FASTER.pop().patch.undo()
    try:
        yield
    finally:
        FASTER.append(Faster())
