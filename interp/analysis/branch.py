"""What a layer's attention writes to the residual stream, apart from what its MLP and all later layers do with it.

A :class:`Branch` runs one layer with every weight behind the attention's output projection giving what it gave in the clean
forward, and every later layer adding what it added then. What reaches the output is the attention's own write, gates and norms
of the model included (Gemma 2 and OLMo 2 normalise it before it is added); with ``linear`` those norms keep their clean scale, and
the write of a layer is the sum of its heads' writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp.analysis.norms import LinearNorm, is_norm
from interp.analysis.replay import Before, Change, Replay, hidden, repeated
from interp.analysis.running import AnalysisError
from interp.models.anatomy import Site
from interp.tracing.calls import SiteCall


class Branch:
    """The attention branch of one layer of an open :class:`~interp.analysis.replay.Replay`.

    Args:
        replay: open.
        site: whose branch.
        linear: norms behind the attention keep the scale of the clean forward.

    Attributes:
        projection: path of the output projection: the first module with weights that runs behind the attention.

    Raises:
        AnalysisError: a layer that normalises what it gives (BERT): there is no stream that layers add to.
    """

    def __init__(self, replay: Replay, site: Site, *, linear: bool = False) -> None:
        self.replay, self.site = replay, site
        self.path = replay.path(site.layer)
        self.frozen: list[tuple[nn.Module, list[Any]]] = []
        self.norms: list[tuple[nn.Module, list[LinearNorm]]] = []
        seen = _watch(replay, site)
        if seen.normalised:
            raise AnalysisError(
                f"direct effects need a residual stream that layers add to; {type(replay.module).__name__} normalises behind the "
                f"sum ({seen.normalised})"
            )
        self.projection = seen.projection
        for module, results in seen.weights.values():
            self.frozen.append((module, results))
        if linear:
            for module, given in seen.norms.values():
                self.norms.append((module, [LinearNorm.of(module, x) for x in given]))

    def run(
        self, rows: int, *, after: Mapping[int, Change] | None = None, before: Mapping[int, Before] | None = None,
        until: int | None = None, listening: Collection[str] = (),
    ) -> Any:  # fmt: skip
        """As :meth:`Replay.run` from this layer on, all but the branch as in the clean forward.

        Layers whose paths are in ``listening`` run, so that their attention is called; what they give is as frozen as the rest.
        """
        with self._held(rows):
            return self.replay.run(
                self.site.layer, rows, after=after, before=before, frozen=True, until=until, listening=listening
            )

    @contextmanager
    def _held(self, rows: int) -> Iterator[None]:
        undo: list[tuple[Any, Any]] = []
        for module, results in self.frozen:
            undo.append(put(module, _giving(results, rows)))
        for module, norms in self.norms:
            undo.append(put(module, normalising(norms, rows)))
        try:
            yield
        finally:
            for module, previous in reversed(undo):
                del module.forward
                if previous is not None:
                    module.forward = previous


class _Seen:
    """What ran in a layer behind its attention."""

    def __init__(self) -> None:
        self.attended = False
        self.projection: str | None = None
        self.weights: dict[str, tuple[nn.Module, list[Any]]] = {}
        self.norms: dict[str, tuple[nn.Module, list[Tensor]]] = {}
        self.normalised = ""


def _watch(replay: Replay, site: Site) -> _Seen:
    """Run the layer as in the clean forward and note the modules that run behind its attention."""
    seen, root = _Seen(), replay.module
    path = replay.path(site.layer)
    layer = root.get_submodule(path)
    handles: list[Any] = []
    last_norm: list[tuple[str, Tensor]] = []

    def notes(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(sub: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if not seen.attended:
                return
            if is_norm(module):
                if isinstance(result, Tensor):
                    last_norm[:] = [(name, result)]
                    seen.norms.setdefault(name, (module, []))[1].append(args[0].detach())
                return
            inside = name.startswith(f"{site.name}.")
            if seen.projection is None or (inside and not seen.weights):
                # The projection may be of several modules (LoRA): all that is in the site runs.
                seen.projection = seen.projection or name
                return
            if not inside:
                seen.weights.setdefault(name, (module, []))[1].append(result)

        return hook

    for name, module in layer.named_modules(prefix=path):
        if module is layer or site.name.startswith(f"{name}.") or name == site.name:
            continue
        owns = any(p.ndim >= 2 for p in module.parameters(recurse=False))
        if (owns and not isinstance(module, nn.Embedding)) or is_norm(module):
            handles.append(module.register_forward_hook(notes(name, module)))

    def attended(call: SiteCall, z: Tensor, row: Tensor) -> Tensor:
        seen.attended = True
        return z

    try:
        replay.run(site.layer, 1, after={site.layer: attended}, until=site.layer)
    finally:
        for handle in handles:
            handle.remove()
    given = hidden(replay.calls[replay.first_call(site.layer)].result)
    if last_norm and last_norm[0][1].shape == given.shape and torch.equal(last_norm[0][1], given):
        seen.normalised = last_norm[0][0]
    return seen


def put(module: Any, forward: Callable[..., Any]) -> tuple[Any, Any]:
    previous = vars(module).get("forward")
    module.forward = forward
    return module, previous


def _giving(results: list[Any], rows: int) -> Callable[..., Any]:
    """Each call's clean result, in order."""
    left = iter(results)
    return lambda *_, **__: repeated(next(left), rows)


def normalising(norms: list[LinearNorm], rows: int) -> Callable[..., Any]:
    left = iter(norms)
    return lambda x, *_, **__: next(left)(x, rows)
