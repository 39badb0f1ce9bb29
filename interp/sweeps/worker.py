"""What does one task of a sweep: the same wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from interp.analysis.ablation import Ablation
from interp.analysis.running import HeadScore, as_model, build, describe, inputs_of, require_stack
from interp.models.anatomy import anatomy
from interp.models.model import Model
from interp.sweeps.plan import Plan, Split, SweepError, Task, digest_of, fingerprint

Floats = NDArray[np.float64]


def method_of(score: str, settings: Mapping[str, Any]) -> HeadScore:
    """A score with its settings.

    Raises:
        SweepError: no such score, or an unknown setting.
    """
    from interp import analysis

    known = [entry.name for entry in analysis.scores()]
    if score not in known:
        raise SweepError(f"score must be one of {known}, got {score!r}")
    cls: type[HeadScore] = analysis._class(score)  # pyright: ignore[reportPrivateUsage]
    names = [f.name for f in fields(cls)]
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise SweepError(f"settings of {score!r} must be among {names}, got {unknown}")
    return cls(**settings)


class Worker:
    """A model, a score and the samples of a probe.

    Args:
        model: an :class:`interp.Model` or a transformers model.
        score: name.
        settings: of it.
        probe: None is the score's own default.

    Raises:
        SweepError: see :func:`method_of`.
        AnalysisError: the model has no such stack, or the probe no samples.
    """

    def __init__(self, model: Any, score: str, settings: Mapping[str, Any], probe: Any = None) -> None:
        self.score, self.method = score, method_of(score, settings)
        self.model: Model = as_model(model)
        require_stack(self.model, self.method.measured_stack)
        self.probe = self.method.default_probe() if probe is None else probe
        self.built = build(self.probe, self.model)
        self.samples = self.method.arrange(self.built)
        self._shared: Any = None
        self._prepared = False

    def plan(self, split: Split) -> Plan:
        """The plan of the whole sweep.

        Raises:
            SweepError: split by layers for a score that cannot be told which heads.
        """
        stack = self.method.measured_stack
        if split not in ("sample", "layer"):
            raise SweepError(f"split must be 'sample' or 'layer', got {split!r}")
        if split == "layer" and not isinstance(self.method, Ablation):
            raise SweepError(f"split 'layer' is for ablations, got the score {self.score!r}")
        layers = tuple(site.layer for site in anatomy(self.model.module).stacks[stack])
        digests = tuple(digest_of(sample, lambda s: inputs_of(s, self.model)) for sample in self.built)
        module: Any = self.model.module
        model = {
            "name": self.model.name, "revision": self.model.revision, "class": type(module).__name__,
            "dtype": str(module.dtype).removeprefix("torch."), "fingerprint": fingerprint(module),
        }  # fmt: skip
        return Plan(self.score, self.settings(), model, describe(self.probe), digests, layers, split)

    def settings(self) -> dict[str, Any]:
        """JSON-able; functions by their name."""
        if isinstance(self.method, Ablation):
            return self.method.settings()
        found = {f.name: getattr(self.method, f.name) for f in fields(self.method)}
        return {k: v if isinstance(v, str | int | float | bool | type(None)) else _named(v) for k, v in found.items()}

    def run(self, task: Task) -> tuple[Floats, Floats | None, float]:
        """Value and control of a task ``[row, layer, head]``, and seconds."""
        start = perf_counter()
        if isinstance(self.method, Ablation):
            if not self._prepared:
                self._shared, self._prepared = self.method.prepare(self.model, self.samples), True
            method = self.method if task.layer is None else replace(self.method, heads=self._of_layer(task.layer))
            value, null = method.of_sample(self.model, self.samples, task.sample, self._shared)
        else:
            # Scores switch gradients on where they need them.
            with torch.no_grad():
                value, null = self.method.values(self.model, self.samples[task.sample], self.probe)
        return (
            np.asarray(value, np.float64),
            None if null is None else np.asarray(null, np.float64),
            perf_counter() - start,
        )

    def _of_layer(self, layer: int) -> Any:
        from interp.heads import Head, Heads, as_heads

        assert isinstance(self.method, Ablation)
        site = anatomy(self.model.module).site(self.method.stack, layer)
        mine = Heads(Head(layer, h, self.method.stack) for h in range(site.n_heads))
        return mine if self.method.heads is None else mine & as_heads(self.method.heads, anatomy(self.model.module))


def _named(value: Any) -> str:
    return getattr(value, "__name__", str(value))
