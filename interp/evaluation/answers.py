"""Tasks of the registry of probes: answers that the probe judges, and pairs of inputs that differ in what decides."""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp.evaluation.baselines import scoring
from interp.evaluation.tasks import Call, Pairs, Record, Sample, Statistics, Task, greedy, padded
from probes.contrast import ContrastPair, evaluate
from probes.intervals import Estimate, mean_interval, paired_difference
from probes.samples import ProbeError, tokenizer_of


@dataclass(frozen=True)
class _Means(Task):
    """What is a mean over samples: every entry of a record that is a number."""

    probe: Any
    label: str = ""
    source: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def describe(self) -> dict[str, Any]:
        return {"probe": self.label or type(self.probe).__name__, "settings": repr(self.probe), **self.source}

    def columns(self, found: Pairs) -> dict[str, list[float]]:
        return {name: [float(r[name]) for _, r in found] for name in self.shown if name in found[0][1]}

    def figures(self, found: Pairs, how: Statistics) -> dict[str, Estimate]:
        units = [s.unit for s, _ in found]
        return {name: mean_interval(v, units, **how.options()) for name, v in self.columns(found).items()}

    def differences(self, a: Pairs, b: Pairs, how: Statistics) -> dict[str, Estimate]:
        units, one, two = [s.unit for s, _ in a], self.columns(a), self.columns(b)
        return {name: paired_difference(one[name], two[name], units, **how.options()) for name in one}

    def values(self, found: Pairs) -> tuple[list[Hashable], list[float]]:
        return [s.unit for s, _ in found], self.columns(found)[self.primary]


@dataclass(frozen=True)
class AnswerTask(_Means):
    """Greedy answers to the samples of a probe with ``judge``: the share that is right, and what the answer's text weighs.

    ``answer_logprob``, where samples know the ids of their answer: their summed log-probability under teacher forcing, nats. It
    moves where a weak model's answers do not.

    Args:
        probe: with ``build(model)`` and ``judge(sample, answer)``, judging texts or ids.
        stop: answers end with this text behind their first word, as in :func:`probes.gate.gate`; None: at the end token.
    """

    stop: str | None = "\n"

    name: ClassVar[str] = "answers"
    primary: ClassVar[str] = "accuracy"
    shown: ClassVar[tuple[str, ...]] = ("accuracy", "answer_logprob")
    records_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(getattr(self.probe, "judge", None)):
            raise ProbeError(f"a probe must have judge(sample, answer), {type(self.probe).__name__} has none")
        if getattr(self.probe, "judges", "text") not in ("text", "ids"):
            raise ProbeError(f"a probe must judge texts or ids, {type(self.probe).__name__} judges {self.probe.judges}")

    def check(self, model: Any) -> None:
        tokenizer_of(model)
        if not model.is_generative:
            raise ProbeError(
                f"a probe that judges texts needs a model that writes them, got {type(model.module).__name__}"
            )

    def samples(self, model: Any) -> list[Sample]:
        built = self.probe.build(model)
        return [Sample(str(n), n, sample) for n, sample in enumerate(built)]

    def run(self, call: Call, samples: Sequence[Sample]) -> list[Record]:
        contents = [s.content for s in samples]
        if "inputs" not in call.shared:
            call.shared["inputs"] = _batch(call.model, contents)
        inputs = call.shared["inputs"]
        new, lengths = greedy(call, inputs, int(getattr(self.probe, "max_new_tokens", 32)))
        ids = [row[:n] for row, n in zip(new.tolist(), lengths, strict=True)]
        texts = [self._cut(text) for text in call.model.decode(ids)]
        given: list[Any] = texts if getattr(self.probe, "judges", "text") == "text" else [tuple(row) for row in ids]
        found: list[Record] = [
            {"answer": text, "accuracy": float(bool(self.probe.judge(sample, answer))), "tokens": n}
            for sample, text, answer, n in zip(contents, texts, given, lengths, strict=True)
        ]
        forced = [list(getattr(sample, "answer_ids", ())) for sample in contents]
        if all(forced) and not getattr(call.model.config, "is_encoder_decoder", False):
            logs = forced_logprobs(call, inputs, forced)
            found = [{**record, "answer_logprob": value} for record, value in zip(found, logs, strict=True)]
        return found

    def _cut(self, text: str) -> str:
        if self.stop is None:
            return text
        lead = len(text) - len(text.lstrip())
        end = text.find(self.stop, lead)
        return text if end < 0 else text[: end + len(self.stop)]


def forced_logprobs(call: Call, inputs: Mapping[str, Tensor], answers: Sequence[Sequence[int]]) -> list[float]:
    """Summed log-probability of each sample's answer behind its prompt, nats; the prompt's batch is padded on the left.

    Answers of several lengths are padded on the right, which no row of a causal model sees.
    """
    longest = max(map(len, answers))
    tail = torch.tensor([[*a, *[a[-1]] * (longest - len(a))] for a in answers], device=inputs["input_ids"].device)
    length = inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tail], 1)}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tail)], 1)
    call.session.prompt_length = length
    takes = inspect.signature(call.model.module.forward).parameters
    options = {"logits_to_keep": longest + 1} if "logits_to_keep" in takes else {}
    with torch.inference_mode():
        logits: Tensor = call.model(whole, **options).logits[:, -longest - 1 :]
        for method in scoring(call.interventions):
            logits, extra = method.forced(call.model, whole, logits, options)
            call.session.extra_forwards += extra
    logits = logits[:, :-1]
    logp = logits.float().log_softmax(-1).gather(-1, tail[..., None])[..., 0].double()
    return [float(row[: len(a)].sum()) for row, a in zip(logp, answers, strict=True)]


def _batch(model: Any, contents: Sequence[Any]) -> dict[str, Tensor]:
    if len(contents) == 1 or not all(type(c).inputs is type(contents[0]).inputs for c in contents):
        if len(contents) > 1:
            raise ProbeError("samples of several kinds must be answered one by one: give batch 1")
        return contents[0].inputs(model.device)
    made = [c.inputs(model.device) for c in contents]
    if set(made[0]) - {"input_ids", "attention_mask"}:
        # Pictures: rows of one length stand beside each other.
        if len({tuple(m["input_ids"].shape) for m in made}) > 1:
            raise ProbeError("samples with pictures must be of one length in a batch: give batch 1")
        return {name: torch.cat([m[name] for m in made]) for name in made[0]}
    return padded(model, [m["input_ids"][0].tolist() for m in made])


@dataclass(frozen=True)
class ContrastTask(_Means):
    """Pairs of inputs that differ in what decides the answer: does the model prefer the right one of the two?

    Figures: ``difference`` of the logits of answer and foil on the clean input, ``preference`` (the share above 0), and
    ``effect``, the difference on the clean minus on the corrupt input.
    """

    name: ClassVar[str] = "contrast"
    primary: ClassVar[str] = "difference"
    shown: ClassVar[tuple[str, ...]] = ("difference", "preference", "effect")

    def samples(self, model: Any) -> list[Sample]:
        built = list(self.probe.build(model))
        if not built or not isinstance(built[0], ContrastPair):
            raise ProbeError(
                f"probe {type(self.probe).__name__} must build pairs or have judge(sample, answer), and does neither"
            )
        return [Sample(str(n), n, pair) for n, pair in enumerate(built)]

    def run(self, call: Call, samples: Sequence[Sample]) -> list[Record]:
        if methods := scoring(call.interventions):
            raise ProbeError(
                f"what changes scores (VCD, DoLa, guidance of PAI and PAINT) does not act on the logits of single forwards, and "
                f"{type(methods[0]).__name__} does: take another probe"
            )
        with torch.inference_mode():
            result = evaluate(call.model, [s.content for s in samples])
        return [
            {"difference": float(c), "preference": float(c > 0), "effect": float(c - o)}
            if math.isfinite(c)
            else {"difference": math.nan, "preference": math.nan, "effect": math.nan}
            for c, o in zip(result.clean, result.corrupt, strict=True)
        ]


def registered(name: str, n: int | None, seed: int, settings: Mapping[str, Any] | None = None) -> Task:
    """The task of a probe by its registered name (``needle`` is NeedleInHaystack).

    Raises:
        ProbeError: no such probe, or settings that it does not have.
    """
    from probes import probe, probes

    wanted = {"needle": "NeedleInHaystack"}.get(name, name)
    known = {info.name: info for info in probes()}
    if wanted not in known:
        raise ProbeError(
            f"probe must be chair, captions, pope, margin, needle or one of {', '.join(sorted(known))}, got {name!r}"
        )
    info = known[wanted]
    options = dict(settings or {})
    for key, value in (("n", n), ("seed", seed)):
        if value is not None and key in info.settings:
            options.setdefault(key, value)
    try:
        made = probe(wanted)(**options)
    except TypeError as error:
        raise ProbeError(f"probe {wanted}: {error}; it has {', '.join(info.settings)}") from error
    return AnswerTask(made, wanted) if info.judged else ContrastTask(made, wanted)
