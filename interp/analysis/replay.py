"""One forward of a model, repeated from a chosen layer on with something changed in each row of a batch.

Changing a head of layer l leaves all that comes before l as it was. So one clean forward keeps what every layer gave, and
a repetition serves that to the model for the layers before l; the rest runs as the model's own code, with many changes as
rows of one batch and logits for the read-out positions alone. An all-heads ablation costs ``H L (L + 1) / 2`` layers in
place of ``H L^2`` (Heimersheim and Nanda 2024, https://arxiv.org/abs/2404.15255, count forwards; the saving is exact).

Nothing here knows a family: the layers are the members of the list that holds the stack's sites, and whatever the model
does around them (masks, positions, deep visual features, the last norm) it does itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from interp.analysis.reading import forward_options, logits_of
from interp.analysis.running import AnalysisError, require_stack
from interp.attention import Edit
from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked

Change = Callable[[SiteCall, Tensor, Tensor], Tensor]
"""``(call, z, row)`` to what stands in the place of z ``[B, Lq, H, Dv]``; int64 ``row [B]`` says which of the repetition's rows
each entry of the call's batch belongs to (a sample of several images or tiles has several entries)."""
Before = Callable[[SiteCall, Tensor], Edit | None]
"""``(call, row)`` to an edit of the call; may replace ``call.q``, ``call.k``, ``call.v``."""


class ReplayError(AnalysisError):
    """A model whose forward cannot be repeated in part or in a batch."""


class _Stopped(Exception):
    """Leaves a forward early."""


@dataclass(eq=False)
class LayerCall:
    """One call of one layer in the clean forward: the hidden states it was given, and its result."""

    path: str
    given: Tensor
    result: Any


class Replay:
    """A clean forward of one sample and its repetitions.

    >>> with Replay(model, inputs, positions=[-1]) as replay:  # doctest: +SKIP
    ...     logits = replay.logits(replay.run(3, rows=4, after={3: change}))

    Args:
        model: in eval mode.
        inputs: of one sample, without batch.
        stack: whose layers are counted.
        positions: rows of the output that are read (negative ones from its end); None is all. Models that can leave the
            others out do.

    Raises:
        AnalysisError: no such stack; on entering: a batch, or inputs that do not reach the stack.
    """

    def __init__(
        self, model: Model, inputs: Mapping[str, Any], stack: str = "text", *, positions: Sequence[int] | None = None
    ) -> None:
        require_stack(model, stack)
        self.model, self.module, self.stack = model, model.module, stack
        self.shape: Anatomy = anatomy(self.module)
        self.inputs = _one_sample(inputs)
        self.positions = None if positions is None else tuple(int(p) for p in positions)
        self.paths = layer_paths(self.shape, self.module)
        self.calls: list[LayerCall] = []
        self.output: Any = None
        self._changes = _Changes(stack)
        self._session = hooked(self.module, interventions=[self._changes])
        self._originals: dict[str, Any] = {}
        self._mode: _Mode = _Mode()

    def __enter__(self) -> Self:
        for path in self.paths:
            self._wrap(path)
        try:
            self._session.__enter__()
            self.calls = []
            self.output = self._forward(_Mode(recording=True))
            first = {call.path: call.given for call in reversed(self.calls)}
            self._changes.lengths = {s.layer: len(first[layer_path(s)]) for s in self.sites}
            if not self.sites:
                raise AnalysisError(f"these inputs do not reach the stack {self.stack!r}: the model did not call it")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, error, where)
        for path, previous in self._originals.items():
            layer: Any = self.module.get_submodule(path)
            del layer.forward
            if previous is not None:
                layer.forward = previous
        self._originals.clear()

    def first_call(self, layer: int) -> int:
        """Place of a layer's first call among all calls.

        Raises:
            AnalysisError: the model did not call it.
        """
        path = self.path(layer)
        for number, call in enumerate(self.calls):
            if call.path == path:
                return number
        raise AnalysisError(
            f"layer must be one that the inputs reach, and layer {layer} of {self.stack!r} was not called"
        )

    def path(self, layer: int) -> str:
        """The module of a layer of the stack."""
        site = self.shape.stacks[self.stack][0]
        container = layer_path(site).rpartition(".")[0]
        return f"{container}.{layer}"

    @property
    def sites(self) -> list[Site]:
        """Sites of the stack that the clean forward called, in layer order."""
        seen = {call.path for call in self.calls}
        return [site for site in self.shape.stacks[self.stack] if layer_path(site) in seen]

    def run(
        self,
        layer: int,
        rows: int,
        *,
        after: Mapping[int, Change] | None = None,
        before: Mapping[int, Before] | None = None,
        frozen: bool = False,
        serve: Callable[[LayerCall, Tensor], Tensor | None] | None = None,
        until: int | None = None,
        listening: Collection[str] = (),
    ) -> Any:
        """The model's output for ``rows`` copies of the sample, run from ``layer`` of the stack on.

        Args:
            layer: layers called before it give what they gave in the clean forward.
            rows: of the batch.
            after: by layer of the stack, what is put in the place of z.
            before: by layer of the stack, an edit, or new q, k, v.
            frozen: layers called after it add to their input what they added in the clean forward.
            serve: for every layer that runs (or, frozen, adds): its call in the clean forward and the hidden states it
                gets now; a tensor is its result, None lets it run.
            listening: paths of layers that run although they are frozen, so that changes see their calls; what they give is
                not taken.
            until: leave the forward behind this layer; the result is then its hidden states ``[rows, position, width]``.

        Raises:
            ReplayError: the model calls its layers in another order than in the clean forward.
        """
        self._changes.outputs, self._changes.edits = dict(after or {}), dict(before or {})
        last = None if until is None else self.first_call(until)
        mode = _Mode(
            start=self.first_call(layer),
            rows=rows,
            frozen=frozen,
            serve=serve,
            last=last,
            listening=frozenset(listening),
        )
        try:
            return self._forward(mode)
        except _Stopped:
            return mode.found
        finally:
            self._changes.outputs, self._changes.edits = {}, {}

    def logits(self, output: Any = None) -> Tensor:
        """Logits ``[rows, position, class]``, fp32 at least, of an output (None: of the clean one) at the read-out positions.

        A classifier of whole inputs has one position.

        Raises:
            AnalysisError: the model gives none.
        """
        return logits_of(self.model, self.output if output is None else output, self.positions)

    def _forward(self, mode: _Mode) -> Any:
        options = forward_options(self.model, self.inputs, self.positions)
        self._mode, self._changes.rows = mode, mode.rows
        # Copies, not views: some models view pixel values in another shape.
        inputs = {
            k: v.contiguous() if isinstance(v, Tensor) else v for k, v in repeated(self.inputs, mode.rows).items()
        }
        with torch.no_grad():
            return self.module(**inputs, **options)

    def _wrap(self, path: str) -> None:
        layer: Any = self.module.get_submodule(path)
        original = layer.forward
        self._originals[path] = vars(layer).get("forward")

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._serve(path, original, args, kwargs)

        layer.forward = forward

    def _serve(self, path: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = self._mode
        number = mode.number
        mode.number += 1
        given = _hidden_of(args, kwargs, path)
        if mode.recording:
            self.calls.append(LayerCall(path, given, None))
            result = original(*args, **kwargs)
            self.calls[number].result = result
            return result
        call = self.calls[number] if number < len(self.calls) else None
        if call is None or call.path != path:
            raise ReplayError(
                f"model must call its layers in one order whatever the batch; {type(self.module).__name__} called {path} as "
                f"number {number}, in the clean forward {call.path if call else 'nothing'}: give rows=1"
            )
        if number < mode.start:
            return repeated(call.result, mode.rows)
        made = mode.serve(call, given) if mode.serve is not None else None
        if made is None and mode.frozen and number > mode.start:
            added = hidden(call.result).float() - call.given.float()
            made = (given.float() + repeated(added, mode.rows)).to(given.dtype)
            if path in mode.listening:
                original(*args, **kwargs)
        result = original(*args, **kwargs) if made is None else _with_hidden(repeated(call.result, mode.rows), made)
        if number == mode.last:
            mode.found = hidden(result)
            raise _Stopped
        return result


@dataclass(eq=False)
class _Mode:
    """What the layers do in one forward."""

    recording: bool = False
    start: int = 0
    rows: int = 1
    frozen: bool = False
    serve: Callable[[LayerCall, Tensor], Tensor | None] | None = None
    last: int | None = None
    listening: frozenset[str] = frozenset()
    number: int = 0
    found: Any = None


class _Changes(Intervention):
    """The changes of the running repetition, by layer."""

    def __init__(self, stack: str) -> None:
        self.stack = stack
        self.edits: dict[int, Before] = {}
        self.outputs: dict[int, Change] = {}
        self.rows = 1
        self.lengths: dict[int, int] = {}

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == self.stack and (site.layer in self.edits or site.layer in self.outputs)

    def before(self, call: SiteCall) -> Edit | None:
        edit = self.edits.get(call.site.layer) if call.site.stack == self.stack else None
        return None if edit is None else edit(call, self._row(call))

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        change = self.outputs.get(call.site.layer) if call.site.stack == self.stack else None
        return None if change is None else change(call, z, self._row(call))

    def _row(self, call: SiteCall) -> Tensor:
        batch, device = call.q.shape[0], call.q.device
        if batch % self.rows == 0:
            return torch.arange(self.rows, device=device).repeat_interleave(batch // self.rows)
        # A packed tower, called image by image or window by window: the copies stand one behind the other.
        return torch.full((batch,), call.mask.q_offset // self.lengths[call.site.layer], device=device)

    def describe(self) -> dict[str, Any]:
        return {"name": "Replay", "layers": sorted({*self.edits, *self.outputs})}


def layer_path(site: Site) -> str:
    """Path of the layer that holds a site: up to the part that is its number."""
    parts = site.name.split(".")
    at = [n for n, part in enumerate(parts) if part == str(site.layer)]
    if not at:
        raise ReplayError(f"a site must stand in a numbered layer, and {site.name} does not")
    return ".".join(parts[: at[0] + 1])


def layer_paths(shape: Anatomy, module: nn.Module) -> tuple[str, ...]:
    """Paths of all layers of all stacks, those without heads included."""
    found: dict[str, None] = {}
    for site in shape.sites:
        container = layer_path(site).rpartition(".")[0]
        for name, _ in module.get_submodule(container).named_children():
            found[f"{container}.{name}"] = None
    return tuple(found)


def hidden(result: Any) -> Tensor:
    """Hidden states of a layer's result: the result, or the first part of it."""
    first = result[0] if isinstance(result, tuple | list) else result
    if not isinstance(first, Tensor):
        raise ReplayError(f"a layer must give a tensor, or a tuple that starts with one, got {type(result).__name__}")
    return first


def _with_hidden(result: Any, made: Tensor) -> Any:
    return made if isinstance(result, Tensor) else type(result)([made, *result[1:]])


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> Tensor:
    given = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(given, Tensor):
        raise ReplayError(f"a layer must be given hidden states as its first argument, and {path} is not")
    return given


def repeated(value: Any, rows: int) -> Any:
    """Every tensor in it so many times along its first axis (a packed tower's samples stand one behind the other)."""
    if rows == 1:
        return value
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value
        shape = [-1] * (value.ndim - 1)
        return value.expand(rows, *shape) if value.shape[0] == 1 else value.repeat(rows, *[1] * (value.ndim - 1))
    if isinstance(value, tuple | list):
        return type(value)(repeated(part, rows) for part in value)
    if isinstance(value, Mapping):
        return {key: repeated(part, rows) for key, part in value.items()}
    return value


def _one_sample(inputs: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("input_ids", "decoder_input_ids"):
        ids = inputs.get(name)
        if isinstance(ids, Tensor) and ids.shape[0] != 1:
            raise AnalysisError(f"a sample must be one sequence, got {name} of {list(ids.shape)}")
    return dict(inputs)
