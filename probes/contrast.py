"""Pairs of inputs that differ in what decides the answer, and what tells a model's two answers apart (:func:`evaluate`)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from probes.samples import ProbeError, encode, image_prompt

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Metric = Callable[["Tensor", int, int], "Tensor"]


@dataclass(frozen=True)
class ContrastPair:
    """A clean input, whose right answer is ``answer``, and a corrupt one, for which the answer is another or unknown.

    Attributes:
        clean: a :class:`probes.samples.Sample`, or anything with ``inputs(device)``; its last position predicts the answer.
        corrupt: likewise.
        answer: id of the token (or class) that is right for ``clean``.
        foil: id of the one it is compared with, such as the right answer for ``corrupt``.
        images: the clean and the corrupt image, to be shown, where the pair is one of images; see :func:`image_pair`.
        positions: named token positions that both inputs share, such as the mentions of a name.
        answer_text: of the answer.
        foil_text: of the foil.
    """

    clean: Any
    corrupt: Any
    answer: int
    foil: int
    images: tuple[Any, Any] | None = field(default=None, repr=False, compare=False)
    positions: tuple[tuple[str, int], ...] = ()
    answer_text: str = ""
    foil_text: str = ""

    def __post_init__(self) -> None:
        for name in ("clean", "corrupt"):
            if not callable(getattr(getattr(self, name), "inputs", None)):
                raise ProbeError(f"{name} must have inputs(device), got {type(getattr(self, name)).__name__}")
        if self.answer < 0 or self.foil < 0 or self.answer == self.foil:
            raise ProbeError(f"answer and foil must be two different ids of at least 0, got {self.answer}, {self.foil}")
        if self.images is not None and len(self.images) != 2:
            raise ProbeError(f"images must be the clean and the corrupt one, got {len(self.images)}")

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the clean input: as a sample by itself, a pair is its clean half."""
        return _ids(self.clean)

    def inputs(self, device: Any = None) -> dict[str, Any]:
        """Of the clean input."""
        return self.clean.inputs(device)

    @property
    def aligned(self) -> bool:
        """Do both inputs have as many tokens, so that position i of one can be patched into position i of the other?"""
        return len(_ids(self.clean)) == len(_ids(self.corrupt)) > 0

    def differences(self) -> tuple[int, ...]:
        """Positions at which the tokens differ (none for a pair that differs in its images alone).

        Raises:
            ProbeError: the inputs are not aligned.
        """
        a, b = _ids(self.clean), _ids(self.corrupt)
        if not self.aligned:
            raise ProbeError(f"the pair must be aligned token by token, and has {len(a)} and {len(b)} tokens")
        return tuple(n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)

    def position(self, name: str) -> int:
        """A named position.

        Raises:
            ProbeError: there is none of that name.
        """
        named = dict(self.positions)
        if name not in named:
            raise ProbeError(f"name must be one of {list(named)}, got {name!r}")
        return named[name]


@dataclass(frozen=True)
class ContrastResult:
    """A metric of every pair.

    Attributes:
        metric: its name.
        clean: value on the clean inputs, fp64 ``[pair]``.
        corrupt: value on the corrupt inputs, fp64 ``[pair]``.
    """

    metric: str
    clean: Floats
    corrupt: Floats

    @property
    def n(self) -> int:
        return len(self.clean)

    @property
    def difference(self) -> Floats:
        """Clean minus corrupt, ``[pair]``."""
        return self.clean - self.corrupt

    def summary(self) -> dict[str, float]:
        """Mean of clean, corrupt and difference and the standard error of the latter; NaN where there are too few pairs."""
        parts = {"clean": self.clean, "corrupt": self.corrupt, "difference": self.difference}
        out = {name: float(values.mean()) if self.n else math.nan for name, values in parts.items()}
        se = float(self.difference.std(ddof=1) / math.sqrt(self.n)) if self.n > 1 else math.nan
        return {**out, "se": se, "n": float(self.n)}

    def restored(self, values: Sequence[float] | Floats) -> Floats:
        """``(value - corrupt) / (clean - corrupt)``, ``[..., pair]``: 0 is the corrupt run, 1 the clean one.

        NaN for pairs whose clean and corrupt values are equal: they have nothing to restore.
        """
        given = np.asarray(values, dtype=np.float64)
        if not given.ndim or given.shape[-1] != self.n:
            raise ProbeError(f"values must be [..., pair] with {self.n} pairs, got {list(given.shape)}")
        whole = self.difference
        out = np.full(given.shape, math.nan)
        return np.divide(given - self.corrupt, whole, out=out, where=np.broadcast_to(whole != 0, given.shape))


def evaluate(model: Any, pairs: Iterable[ContrastPair], metric: str | Metric = "logit_difference") -> ContrastResult:
    """A metric of the model's logits at the last position of both inputs of every pair.

    Args:
        model: an :class:`interp.Model` or a transformers model; sessions that are open on it apply.
        pairs: may be none.
        metric: one of :data:`METRICS`, or a function ``(logits [vocabulary] fp64, answer, foil) -> number``.

    Raises:
        ProbeError: no such metric, a model without logits, or an answer that is not in its vocabulary.
    """
    if isinstance(metric, str) and metric not in METRICS:
        raise ProbeError(f"metric must be one of {sorted(METRICS)} or a function, got {metric!r}")
    function = METRICS[metric] if isinstance(metric, str) else metric
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
    values: tuple[list[float], list[float]] = ([], [])
    for pair in pairs:
        for sample, out in zip((pair.clean, pair.corrupt), values, strict=True):
            logits = last_logits(model, sample)
            if max(pair.answer, pair.foil) >= len(logits):
                raise ProbeError(f"answer and foil must be below {len(logits)}, got {pair.answer} and {pair.foil}")
            out.append(float(function(logits, pair.answer, pair.foil)))
    return ContrastResult(name, np.array(values[0], dtype=np.float64), np.array(values[1], dtype=np.float64))


def last_logits(model: Any, sample: Any) -> Tensor:
    """Logits at the last position of one sample (of an image classifier: of the classes), fp64 ``[vocabulary]`` on the CPU."""
    import torch

    inputs = sample.inputs(model.device)
    module = getattr(model, "module", model)
    # The logits of a long prompt with a large vocabulary are gigabytes, of which one row is read.
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}
    with torch.no_grad():
        logits = getattr(model(**inputs, **few), "logits", None)
    if logits is None or logits.ndim not in (2, 3) or logits.shape[0] != 1:
        shape = None if logits is None else list(logits.shape)
        raise ProbeError(f"model must give logits of one sample, [1, position, vocabulary] or [1, class], got {shape}")
    return (logits[0, -1] if logits.ndim == 3 else logits[0]).double().cpu()


def logit_difference(logits: Tensor, answer: int, foil: int) -> Tensor:
    """Logit of the answer minus that of the foil, ``[...]`` for logits ``[..., vocabulary]``; also their log-odds."""
    return logits[..., answer] - logits[..., foil]


def probability(logits: Tensor, answer: int, foil: int) -> Tensor:
    """Probability of the answer among all tokens, 0 to 1."""
    return logits.softmax(-1)[..., answer]


def log_probability(logits: Tensor, answer: int, foil: int) -> Tensor:
    """Natural logarithm of :func:`probability`, in nats."""
    return logits.log_softmax(-1)[..., answer]


def rank(logits: Tensor, answer: int, foil: int) -> Tensor:
    """1 + the number of tokens with a larger logit than the answer: 1 is the model's choice, ties are in its favour."""
    return 1 + (logits > logits[..., answer, None]).sum(-1)


def preference(logits: Tensor, answer: int, foil: int) -> Tensor:
    """1 where the answer's logit is above the foil's, else 0; its mean is the rate of right choices between the two."""
    return (logits[..., answer] > logits[..., foil]).to(logits.dtype)


METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "probability": probability,
    "log_probability": log_probability,
    "rank": rank,
    "preference": preference,
}


def text_pair(model_or_tokenizer: Any, clean: str, corrupt: str, answer: str, foil: str) -> ContrastPair:
    """A pair of two texts.

    Args:
        model_or_tokenizer: whose tokens.
        clean: up to where the answer starts.
        corrupt: likewise.
        answer: must go on from ``clean`` with one token, its space included: ``" Mary"``.
        foil: likewise.

    Raises:
        ProbeError: no tokenizer, or an answer or foil that is not one token behind ``clean``.
    """
    from probes.samples import Sample

    ids = [next_id(model_or_tokenizer, clean, text) for text in (answer, foil)]
    a, b = (Sample(encode(model_or_tokenizer, text), text) for text in (clean, corrupt))
    return ContrastPair(a, b, ids[0], ids[1], answer_text=answer, foil_text=foil)


def image_pair(
    model: Any, text: str, images: tuple[Any, Any], answer: str, foil: str, *, chat: bool = False
) -> ContrastPair:
    """A pair of one text with two images, such as a scene with and without an object.

    Args:
        model: an :class:`interp.Model` that takes images.
        text: up to where the answer starts.
        images: the clean and the corrupt one, each as ``model.encode`` takes it.
        answer: the one token, as text, that is right for the clean image.
        foil: likewise, that it is compared with.
        chat: put the text in the model's chat template.

    Raises:
        ProbeError: no tokenizer, or an answer or foil that is not one token.
    """
    # In a template the answer stands at the start of a turn, which the bare text cannot show.
    ids = [next_id(model, "" if chat else text, part) for part in (answer, foil)]
    clean, corrupt = (image_prompt(model, text, image, chat=chat) for image in images)
    return ContrastPair(clean, corrupt, ids[0], ids[1], images, answer_text=answer, foil_text=foil)


def next_id(model_or_tokenizer: Any, text: str, following: str) -> int:
    """The one id by which ``following`` goes on from ``text``.

    Raises:
        ProbeError: it is several, none, or changes the tokens before it.
    """
    before, both = (_closed(model_or_tokenizer, part) for part in (text, text + following))
    if len(both) != len(before) + 1 or both[:-1] != before:
        raise ProbeError(f"{following!r} must be one token behind {text[-40:]!r}, got {both[len(before) :]}")
    return both[-1]


def _closed(model_or_tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids without special tokens: an end token behind the text would hide what follows it."""
    from probes.samples import tokenizer_of

    return tuple(int(i) for i in tokenizer_of(model_or_tokenizer)(text, add_special_tokens=False)["input_ids"])


def _ids(sample: Any) -> tuple[int, ...]:
    return tuple(getattr(sample, "ids", ()))
