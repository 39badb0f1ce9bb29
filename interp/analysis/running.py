"""What every score shares: from probe to inputs, one traced sample at a time, to the score Dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from interp.models.anatomy import anatomy
from interp.models.model import Model
from interp.tracing.capture import Capture
from interp.tracing.session import hooked
from interp.tracing.text_only import options_of

Floats = NDArray[np.float64]


class AnalysisError(ValueError):
    """A score that does not exist, does not apply to the model, or was given something it cannot use."""


@dataclass(frozen=True)
class HeadScore:
    """A method that gives each head of one stack a number, sample by sample.

    Subclasses set the class variables (what :func:`interp.analysis.scores` lists) and define ``values``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    unit: ClassVar[str]
    stacks: ClassVar[tuple[str, ...]] = ("text",)
    probe: ClassVar[str]
    control: ClassVar[str] = ""
    needs: ClassVar[str] = ""

    @property
    def measured_stack(self) -> str:
        return getattr(self, "stack", "text")

    @property
    def result_unit(self) -> str:
        """Unit with these settings."""
        return self.unit

    def default_probe(self) -> Any:
        """The probe where none is given."""
        raise NotImplementedError

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        """Value and control of one sample of ``probe``, each ``[sample, layer, head]``."""
        raise NotImplementedError

    def arrange(self, samples: list[Any]) -> list[Any]:
        """What ``values`` gets one by one: the samples, or each with another one for a control."""
        return samples

    def notes(self) -> dict[str, Any]:
        """What else belongs among the settings of the result, such as the control."""
        return {"control": self.control} if self.control else {}

    def run(self, model: Any, probe: Any = None, *, progress: bool = True) -> xr.Dataset:
        """The score of every head of the stack, as :func:`interp.score` describes it.

        Raises:
            AnalysisError: the model has no such stack, is in training mode, or the probe has no samples.
        """
        from interp.scores import make_score

        model = as_model(model)
        require_stack(model, self.measured_stack)
        probe = self.default_probe() if probe is None else probe
        samples = self.arrange(build(probe, model))
        found: list[tuple[Floats, Floats | None]] = []
        with torch.no_grad():
            for sample in track(samples, self.name, progress):
                found.append(self.values(model, sample, probe))  # noqa: PERF401 - inside a progress bar
        value = np.concatenate([v for v, _ in found])
        nulls = [null for _, null in found if null is not None]
        # A control of some samples only would be compared with a value of all of them.
        null = np.concatenate(nulls) if len(nulls) == len(found) else None
        settings = {**_plain(asdict(self)), "probe": describe(probe), "model": model.name, **self.notes()}
        return make_score(
            value, name=self.name, unit=self.result_unit, paper=self.paper, settings=settings, stack=self.measured_stack,
            null_by_sample=null,
        )  # fmt: skip


def as_model(model: Any) -> Model:
    """An :class:`interp.Model` of whatever holds a transformers model.

    Raises:
        AnalysisError: it is in training mode: dropout would change attention between two runs of the same sample.
    """
    model = model if isinstance(model, Model) else Model(model)
    if model.module.training:
        raise AnalysisError("model must be in eval mode, and is in training mode: call model.module.eval()")
    return model


def require_stack(model: Model, stack: str) -> None:
    """Raise unless the model has this stack."""
    stacks = list(anatomy(model.module).stacks)
    if stack not in stacks:
        raise AnalysisError(f"stack must be one of {stacks} of {type(model.module).__name__}, got {stack!r}")


def build(probe: Any, model: Model) -> list[Any]:
    """Samples of a probe, or the entries of an iterable of inputs."""
    if isinstance(probe, Mapping):
        raise AnalysisError("probe must be a probe or an iterable of inputs, got one mapping: put it in a list")
    if callable(getattr(probe, "build", None)):
        samples = list(probe.build(model))
    elif isinstance(probe, Iterable):
        samples = list(probe)
    else:
        raise AnalysisError(f"probe must have build(model) or be an iterable of inputs, got {type(probe).__name__}")
    if not samples:
        raise AnalysisError("probe must give at least one sample, got none")
    return samples


def inputs_of(sample: Any, model: Model) -> dict[str, Any]:
    """Inputs of a probe's sample, or inputs as they were given, on the model's device."""
    if isinstance(sample, Mapping):
        return {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in sample.items()}
    if not callable(getattr(sample, "inputs", None)):
        raise AnalysisError(f"a sample must be a mapping of inputs or have inputs(device), got {type(sample).__name__}")
    return sample.inputs(model.device)


def forward(model: Model, inputs: Mapping[str, Any], capture: Capture, stack: str) -> xr.Dataset:
    """Readings of one stack in one forward.

    Logits are made for one position only, where the model can leave the others out: at 32k tokens they would take more memory
    than all that is read.
    """
    options = {} if "logits_to_keep" in inputs else options_of(model.wrapped, logits_to_keep=1)
    with hooked(model, capture=capture) as run:
        model(inputs, **options)
    if stack not in run.trace:
        raise AnalysisError(f"these inputs do not reach the stack {stack!r}: the model did not call it")
    return run.trace[stack]


def on_grid(array: xr.DataArray, model: Model, stack: str) -> Floats:
    """Values ``[sample, layer, head]`` over all layers and heads of the stack; NaN where a layer has no such head."""
    n_layers, n_heads = anatomy(model.module).shape(stack)
    full = array.transpose("sample", "layer", "head").reindex(layer=range(n_layers), head=range(n_heads))
    return full.values.astype(np.float64)


def track(samples: Sequence[Any], label: str, show: bool | Callable[[int, int], None]) -> Iterator[Any]:
    """The samples, with a progress bar where somebody watches.

    Args:
        show: a function of (samples done, samples in all) is called before each sample and after the last instead; what it
            raises ends the work there.
    """
    if callable(show):
        for done, sample in enumerate(samples):
            show(done, len(samples))
            yield sample
        show(len(samples), len(samples))
        return
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    yield from bar(samples, description=label, console=console, disable=not (show and console.is_terminal))


def describe(probe: Any) -> Any:
    """Name and settings of a probe, JSON-able."""
    if hasattr(probe, "__dataclass_fields__"):
        return {"name": type(probe).__name__, **_plain(asdict(probe))}
    return type(probe).__name__


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, range):
        return [value.start, value.stop, value.step]
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
