"""Retrieval heads."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from interp.analysis.running import (
    AnalysisError,
    Floats,
    HeadScore,
    as_model,
    build,
    describe,
    forward,
    inputs_of,
    on_grid,
)
from interp.models.model import Model
from interp.tracing.capture import Capture
from interp.tracing.session import hooked

Span = tuple[int, int]


@dataclass(frozen=True)
class Retrieval(HeadScore):
    """Retrieval score of Wu et al. 2025, https://arxiv.org/abs/2404.15574, section 2.

    Greedy decoding after a needle-in-a-haystack prompt. In the step that produces token w, a head copies iff w is among the
    needle's tokens k and its largest weight in the row that produces w is at a key j in the needle's span with x_j = w.
    Formula: ``|g_h & k| / |k|``, g_h = the tokens that head h copied. Reads ``topk_key [sample, layer, head, query, 1]`` of the
    last row of each forward: memory is linear in the number of steps.

    Unit: fraction of the needle's tokens, 0 to 1 (with ``dedupe=False`` it can pass 1). The paper calls a head a retrieval
    head from a mean of 0.1 on.

    Args:
        dedupe: True is the paper's set of tokens; False is the released code, which adds ``1 / len(span)`` at every step.
        mode: ``"generate"`` (paper), or ``"teacher_forced"``: one forward over prompt and right answer, rows that should
            produce the answer's tokens. Cheaper, and no sample fails; another question, so do not mix the two.
        gate: only samples whose answer the probe judges right count (the others are NaN); None is True for
            ``"generate"``. The released code asks for ROUGE-1 recall > 50 % instead, and skips failures too.
        max_new_tokens: 50, the released code's; decoding also ends with the first newline, as there.
        skip_first: the largest weight is looked for among all keys but the first position, where many heads keep a sink. The
            paper and its code count it.

    The result has coordinates ``length``, ``depth`` and, where the probe judges, ``solved`` by sample: with ``gate=False`` the
    scores conditional on success and not are both in it. ``settings["gate_rate"]`` is the share that was solved.

    Needs: a decoder with a tokenizer; the span is the *answer's* (the released code's ``real_needle``), not the sentence's.
    Probe: ``NeedleInHaystack``. Control: the same count for a span of the same length elsewhere in the same prompt.
    When not to use: a model that fails the task has no score (all NaN, with a warning). Compare heads within one mode.
    """

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "share of a hidden fact's tokens that a head attends to most while the model writes them"
    paper: ClassVar[str] = "Wu et al. 2025, https://arxiv.org/abs/2404.15574"
    unit: ClassVar[str] = "fraction of needle tokens"
    probe: ClassVar[str] = "NeedleInHaystack"
    control: ClassVar[str] = "a span of the same length elsewhere in the prompt"

    dedupe: bool = True
    mode: Literal["generate", "teacher_forced"] = "generate"
    gate: bool | None = None
    max_new_tokens: int = 50
    skip_first: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("generate", "teacher_forced"):
            raise AnalysisError(f"mode must be 'generate' or 'teacher_forced', got {self.mode!r}")
        if self.gate and self.mode == "teacher_forced":
            raise AnalysisError(
                "gate must not be True with mode='teacher_forced': nothing is generated that could be judged"
            )
        if self.max_new_tokens < 1:
            raise AnalysisError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    def default_probe(self) -> Any:
        from probes.needle import NeedleInHaystack

        return NeedleInHaystack()

    def run(self, model: Any, probe: Any = None, **options: Any) -> xr.Dataset:
        """See :meth:`HeadScore.run`; warns where no sample passed the gate."""
        probe = self.default_probe() if probe is None else probe
        if self._gated and not callable(getattr(probe, "judge", None)):
            raise AnalysisError(
                f"gate=True needs a probe with judge(sample, text), got {type(probe).__name__}: pass gate=False"
            )
        judged = _Judged(probe, build(probe, as_model(model)))
        score = super().run(model, judged, **options)
        score.attrs["settings"]["probe"] = describe(probe)
        labels = {name: [getattr(s, name, np.nan) for s in judged.samples] for name in ("depth", "target_length")}
        score = score.assign_coords(
            length=("sample", labels["target_length"]), depth=("sample", np.asarray(labels["depth"], dtype=np.float64))
        )
        if judged.verdicts:
            rate = float(np.mean(judged.verdicts))
            score = score.assign_coords(solved=("sample", judged.verdicts))
            score.attrs["settings"]["gate_rate"] = rate
            if self._gated and not rate:
                warnings.warn(
                    f"no sample passed the gate: the model solved 0 of {len(judged.verdicts)} (rate 0.00), so there is no "
                    f"{self.name} score",
                    stacklevel=2,
                )
        return score

    @property
    def _gated(self) -> bool:
        return self.mode == "generate" if self.gate is None else self.gate

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        missing = [n for n in ("ids", "answer_span", "needle_span", "answer_ids") if not hasattr(sample, n)]
        if missing:
            raise AnalysisError(
                f"retrieval needs samples of NeedleInHaystack, got {type(sample).__name__} without {missing}"
            )
        top_key, produced, text = (
            self._forced(model, sample) if self.mode == "teacher_forced" else self._generated(model, sample)
        )
        control = elsewhere(len(sample.ids), sample.answer_span, sample.needle_span)
        # Nothing was generated where the answer was forced.
        judged = self.mode == "generate" and callable(getattr(probe, "judge", None))
        passed = probe.judge(sample, text) if judged else True
        passed = passed or not self._gated
        value, null = (
            on_grid(copied(top_key, produced, sample.ids, span, dedupe=self.dedupe), model, "text")
            for span in (sample.answer_span, control)
        )
        return (value, null) if passed else (np.full_like(value, np.nan), np.full_like(null, np.nan))

    def _generated(self, model: Model, sample: Any) -> tuple[xr.DataArray, list[int], str]:
        inputs = inputs_of(sample, model)
        with hooked(model, capture=self._capture("last")) as run:
            ids = model.generate(
                inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=False,
                stopping_criteria=_at_newline(model, len(sample.ids)),
            )  # fmt: skip
        data = run.trace["text"]
        # The row that was fed at position q produces the token at q + 1: the trace pairs them.
        produced = data["token_produced_id"].values[0].tolist()
        return self._top(data), produced, model.decode(ids[0, len(sample.ids) :])

    def _forced(self, model: Model, sample: Any) -> tuple[xr.DataArray, list[int], str]:
        answer = list(sample.answer_ids)
        first = len(sample.ids) - 1
        ids = torch.tensor([[*sample.ids, *answer]], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rows = tuple(range(first, first + len(answer)))
        data = forward(model, inputs, self._capture(rows), "text")
        return self._top(data), answer, sample.answer

    def _capture(self, rows: Any) -> Capture:
        return Capture(topk=1 + self.skip_first, queries=rows, stacks=("text",))

    def _top(self, data: xr.Dataset) -> xr.DataArray:
        keys = data["topk_key"]
        first = keys.isel(k=0)
        return xr.where(first == 0, keys.isel(k=1), first) if self.skip_first else first


class _Judged:
    """A probe whose samples are made, which remembers what it judged."""

    def __init__(self, probe: Any, samples: list[Any]) -> None:
        self.samples, self.verdicts = samples, list[bool]()
        self._judge = getattr(probe, "judge", None)
        self.judge: Any = self._record if callable(self._judge) else None

    def build(self, model: Any) -> list[Any]:
        return self.samples

    def _record(self, sample: Any, text: str) -> bool:
        assert self._judge is not None
        self.verdicts.append(bool(self._judge(sample, text)))
        return self.verdicts[-1]


def copied(
    top_key: xr.DataArray | NDArray[np.int32],
    produced: Sequence[int],
    prompt: Sequence[int],
    span: Span,
    *,
    dedupe: bool,
) -> xr.DataArray:
    """Retrieval score of every head for one span.

    Args:
        top_key: key with the largest weight ``[..., query]``, -1 for none; row q is the one that produced ``produced[q]``.
        produced: ids; -1 where a row produced none.
        prompt: ids of the prompt.
        span: ``(start, stop)`` of the needle in the prompt.
        dedupe: count distinct tokens of the distinct tokens in the span (paper), or steps over its length (released code).

    Returns:
        ``[...]``, NaN for heads without any top key (a layer that has no such head).
    """
    keys = (
        top_key
        if isinstance(top_key, xr.DataArray)
        else xr.DataArray(top_key, dims=[*"abcdefg"[: top_key.ndim - 1], "query"])
    )
    if keys.sizes["query"] != len(produced):
        raise AnalysisError(f"produced must have one id a row, {keys.sizes['query']}, got {len(produced)}")
    start, stop = span
    ids = np.asarray(prompt)
    needle = ids[start:stop]
    inside = (keys >= start) & (keys < stop)
    at_key = xr.DataArray(ids[np.clip(keys.values, 0, len(ids) - 1)], dims=keys.dims)
    hit = inside & (at_key == xr.DataArray(np.asarray(produced), dims="query"))
    if dedupe:
        kinds = sorted({int(i) for i in needle})
        got = [(hit & (at_key == kind)).any("query") for kind in kinds]
        score = sum(g.astype(float) for g in got) / len(kinds)
    else:
        score = hit.sum("query") / len(needle)
    return xr.DataArray(score).where((keys >= 0).any("query"))


def elsewhere(length: int, span: Span, avoid: Span) -> Span:
    """A span as long as ``span`` within ``length`` positions that does not touch ``avoid``; the same for the same arguments.

    Raises:
        AnalysisError: there is no room for it.
    """
    width = span[1] - span[0]
    # Position 0 is left out: a sink there would be no fair control.
    starts = [*range(1, avoid[0] - width + 1), *range(avoid[1], length - width + 1)]
    if not starts:
        raise AnalysisError(
            f"the prompt must have room for a control span of {width} tokens outside the needle, {length} are too few"
        )
    start = random.Random(f"{length} {span}").choice(starts)
    return start, start + width


def _at_newline(model: Model, prompt: int) -> list[Any]:
    from transformers import StoppingCriteria

    class Newline(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> Any:
            text = model.decode(input_ids[0, prompt:])
            # A newline before the first word is no end of an answer.
            return torch.tensor(["\n" in text.lstrip()], device=input_ids.device)

    return [Newline()]
