"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is imported."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch


def patch_once() -> None:
    """Have the interpreter replace Triton's language once a launch, not again at every call of a function in a kernel.

    Each time it looks at every member of the language, which was a third and more of these tests' time.
    """
    from triton import language
    from triton.runtime import interpreter

    internal: Any = interpreter
    if not all(hasattr(internal, name) for name in ("_patch_lang", "_LangPatchScope", "GridExecutor")):
        return
    patch, launch = internal._patch_lang, internal.GridExecutor.__call__
    modules = {id(language), id(language.core)}
    launches: list[set[int]] = []

    def patch_language(function: Any) -> Any:
        asked = modules & {id(value) for value in function.__globals__.values()}
        if launches and asked <= launches[-1]:
            return internal._LangPatchScope()
        scope = patch(function)
        if launches:
            launches[-1] |= asked
        return scope

    def launched(self: Any, *args: Any, **options: Any) -> Any:
        launches.append(set())
        try:
            return launch(self, *args, **options)
        finally:
            launches.pop()

    internal._patch_lang = patch_language
    internal.GridExecutor.__call__ = launched


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        patch_once()
