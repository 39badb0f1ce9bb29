"""The success gate: which samples does the model solve by greedy decoding, and at what rate (:func:`gate`)?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from probes.samples import ProbeError


@dataclass(frozen=True)
class GateResult:
    """What passed.

    Attributes:
        rate: share of samples judged right; NaN without samples.
        passed: the samples judged right, in order: a probe's samples for a score that only means something where the model
            does the task.
        n: samples that were judged, empty answers included.
        interval: Wilson's interval of the rate at ``level``; ``(0, 1)`` without samples.
        level: of the interval.
        right: the verdict on each sample.
        answers: what was judged: texts, tuples of ids, or classes.
        empty: answers without a single visible character (or id). They count as judged, like any other.
    """

    rate: float
    passed: tuple[Any, ...]
    n: int
    interval: tuple[float, float]
    level: float
    right: tuple[bool, ...]
    answers: tuple[Any, ...]
    empty: int


def gate(
    model: Any,
    probe: Any,
    samples: Iterable[Any] | None = None,
    *,
    max_new_tokens: int | None = None,
    stop: str | None = "\n",
    level: float = 0.95,
) -> GateResult:
    """Let the model answer every sample and keep those that the probe judges right.

    Greedy decoding, one sample at a time. What the judge is given follows the probe's ``judges``: ``"text"`` (the default),
    ``"ids"`` (a tuple of generated ids) or ``"class"`` (the index of the largest logit, or None where there are none).

    Args:
        model: an :class:`interp.Model`.
        probe: anything with ``judge(sample, answer)``, and ``build(model)`` where no samples are given.
        samples: what to answer; None is all that the probe builds.
        max_new_tokens: None is the probe's own ``max_new_tokens``, else 32.
        stop: decoding ends once the answer has this text behind its first word, as in the released code of Wu et al. 2025;
            None goes on to the end token. No end for probes that judge ids or classes.
        level: of the interval.

    Raises:
        ProbeError: a probe without a judge, a model that cannot answer, or numbers out of range.
    """
    judge = getattr(probe, "judge", None)
    if not callable(judge):
        raise ProbeError(f"probe must have judge(sample, answer), {type(probe).__name__} has none")
    if max_new_tokens is None:
        max_new_tokens = int(getattr(probe, "max_new_tokens", 32))
    if max_new_tokens < 1:
        raise ProbeError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    kind = getattr(probe, "judges", "text")
    answer = _answerer(model, kind, max_new_tokens, stop)
    wilson(0, 0, level)
    chosen: list[Any] = list(probe.build(model) if samples is None else samples)
    answers = [answer(sample) for sample in chosen]
    right = [bool(judge(sample, given)) for sample, given in zip(chosen, answers, strict=True)]
    n = len(chosen)
    return GateResult(
        rate=sum(right) / n if n else math.nan,
        passed=tuple(sample for sample, ok in zip(chosen, right, strict=True) if ok),
        n=n,
        interval=wilson(sum(right), n, level),
        level=level,
        right=tuple(right),
        answers=tuple(answers),
        empty=sum(given is None or given == () or (isinstance(given, str) and not given.strip()) for given in answers),
    )


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) interval of a rate, which stays within 0 and 1 and has a width at both ends; ``(0, 1)`` for n = 0.

    Raises:
        ProbeError: a level outside (0, 1), or more successes than trials.
    """
    if not 0 < level < 1:
        raise ProbeError(f"level must lie between 0 and 1, got {level}")
    if not 0 <= successes <= n:
        raise ProbeError(f"successes must lie in [0, n = {n}], got {successes}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # Rounding leaves 1e-17 where the ends are exactly 0 and 1.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def _answerer(model: Any, kind: str, max_new_tokens: int, stop: str | None) -> Callable[[Any], Any]:
    import torch

    if kind not in ("text", "ids", "class"):
        raise ProbeError(f"a probe's judges must be 'text', 'ids' or 'class', got {kind!r}")
    if not hasattr(model, "is_generative"):
        raise ProbeError(f"model must be an interp.Model (see interp.load), got {type(model).__name__}")
    name = type(model.module).__name__
    if kind != "class" and not model.is_generative:
        raise ProbeError(f"model must be able to generate for a probe that judges {kind}, and {name} is not")

    @torch.no_grad()
    def classify(sample: Any) -> int | None:
        logits = getattr(model(sample.inputs(model.device)), "logits", None)
        if logits is None or logits.ndim != 2:
            raise ProbeError(f"model must give logits [batch, class] for a probe that judges classes, {name} does not")
        return int(logits[0].argmax()) if logits.shape[1] else None

    @torch.no_grad()
    def generate(sample: Any) -> Any:
        inputs = sample.inputs(model.device)
        # An encoder-decoder's output does not repeat the prompt.
        prompt = 0 if getattr(model.config, "is_encoder_decoder", False) else inputs["input_ids"].shape[1]
        criteria = [_stop_at(model, prompt, stop)] if stop is not None and kind == "text" else []
        ids = model.generate(
            inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=False,
            stopping_criteria=criteria,
        )[0, prompt:]  # fmt: skip
        return tuple(ids.tolist()) if kind == "ids" else model.decode(ids)

    return classify if kind == "class" else generate


def _stop_at(model: Any, prompt: int, stop: str) -> Any:
    import torch

    def ended(input_ids: Any, scores: Any, **options: Any) -> Any:
        # Before the first word it is no end of an answer.
        return torch.tensor([stop in model.decode(input_ids[0, prompt:]).lstrip()], device=input_ids.device)

    return ended


def first_of(text: str, wanted: str, others: Sequence[str], *, ignore_case: bool = False) -> bool:
    """Is ``wanted`` in the text as a word of its own, with none of ``others`` before it?"""

    def at(word: str) -> int:
        flags = re.IGNORECASE if ignore_case else 0
        found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags)
        return found.start() if found else len(text)

    return at(wanted) < len(text) and all(at(wanted) < at(other) for other in others if at(other) < len(text))
