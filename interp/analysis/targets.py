"""What is read off a model's output when something in it was changed: at which positions, for which answers, by which number."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from interp.analysis.running import AnalysisError
from interp.models.anatomy import anatomy
from interp.models.model import Model

Positions = Literal["all", "last"] | Sequence[int]
IGNORED = -100
"""The label that transformers' losses leave out."""


@dataclass(frozen=True)
class Target:
    """Read-out positions of one sample and the right answers there.

    Attributes:
        positions: rows of the output; None for a classifier of whole inputs.
        ids: right id at each position; empty: the model's own choice in the clean run.
        foils: the id that each answer is compared with, or None.
    """

    positions: tuple[int, ...] | None
    ids: tuple[int, ...]
    foils: tuple[int, ...] | None = None

    def resolved(self, clean: Tensor) -> Target:
        """With ids, from the clean logits ``[position, class]`` where there were none.

        Raises:
            AnalysisError: an id that the output does not have, or logits that are not finite.
        """
        if not bool(torch.isfinite(clean).all()):
            bad = int((~torch.isfinite(clean)).sum())
            raise AnalysisError(
                f"logits of the clean run must be finite, got {bad} of {clean.numel()} that are not: a model in float16 may "
                "overflow (load it as bfloat16 or float32), a damaged one may hold NaN"
            )
        ids = self.ids or tuple(int(i) for i in clean.argmax(-1))
        largest = max((*ids, *(self.foils or ())))
        if largest >= clean.shape[-1]:
            raise AnalysisError(f"answers must be below the {clean.shape[-1]} classes of the output, got {largest}")
        return Target(self.positions, ids, self.foils)


class Measure(NamedTuple):
    """One metric of the output: ``function(logits, clean, target) -> [rows]``.

    ``sign`` makes the change of the metric a damage: +1 where the metric grows when the model gets worse.
    """

    function: Callable[[Tensor, Tensor, Target], Tensor]
    sign: int
    unit: str


def target_of(sample: Any, inputs: Mapping[str, Any], model: Model, positions: Positions = "all") -> Target:
    """The target of a sample.

    - A contrast pair: its answer and foil at the last position.
    - ``labels`` among the inputs: of a classifier ``[1]``; of a causal model ``[1, position]``, each read one position
      before; of a masked one at their own positions. -100 is left out.
    - Any other text of a causal model: every ordinary token, read one position before.
    - Any other input of a classifier: the class that the model chooses in the clean run.

    Args:
        sample: a probe's sample or a mapping of inputs.
        inputs: its inputs.
        model: whose.
        positions: of a text, those of the read-out positions that count: ``"all"``, ``"last"``, or numbers (negative ones from
            the end of the text).

    Raises:
        AnalysisError: a text model that is not causal without labels, positions that nothing is predicted at.
    """
    answer, foil = getattr(sample, "answer", None), getattr(sample, "foil", None)
    textual = _positional(model)
    if isinstance(answer, int) and isinstance(foil, int):
        return Target((-1,) if textual else None, (answer,), (foil,))
    labels = inputs.get("labels")
    if not textual:
        given = () if labels is None else tuple(int(i) for i in torch.as_tensor(labels).reshape(-1))
        return Target(None, given)
    decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    causal = decoder or all(site.causal for site in anatomy(model.module).stacks.get("text", ()))
    ids = inputs.get("decoder_input_ids" if decoder else "input_ids")
    if labels is None and not causal:
        raise AnalysisError(f"inputs must have labels: {type(model.module).__name__} predicts no next token")
    if not isinstance(ids, Tensor):
        raise AnalysisError(f"inputs must have {'decoder_input_ids' if decoder else 'input_ids'}, got {sorted(inputs)}")
    at, right = _next_tokens(ids[0], labels, inputs, model, decoder=decoder, causal=causal)
    chosen = _chosen(at, positions, ids.shape[1])
    return Target(tuple(at[n] for n in chosen), tuple(right[n] for n in chosen))


def _next_tokens(
    ids: Tensor, labels: Any, inputs: Mapping[str, Any], model: Model, *, decoder: bool, causal: bool
) -> tuple[list[int], list[int]]:
    from probes.samples import special_ids

    if isinstance(labels, Tensor):
        row = labels.reshape(-1).tolist()
        # An encoder-decoder's labels are what its decoder is to say at the same place.
        back = 1 if causal and not decoder else 0
        pairs = [(n - back, int(i)) for n, i in enumerate(row) if i != IGNORED and n >= back]
    else:
        mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
        real = mask[0].bool().tolist() if isinstance(mask, Tensor) and mask.ndim == 2 else [True] * len(ids)
        special = special_ids(model.tokenizer, model.config)
        row = ids.tolist()
        pairs = [(n - 1, i) for n, i in enumerate(row) if n and real[n] and real[n - 1] and i not in special]
    if not pairs:
        raise AnalysisError(f"a text must have at least two ordinary tokens to predict one, got {len(ids)} tokens")
    return [p for p, _ in pairs], [i for _, i in pairs]


def _chosen(at: list[int], positions: Positions, length: int) -> list[int]:
    if isinstance(positions, str):
        if positions not in ("all", "last"):
            raise AnalysisError(f"positions must be 'all', 'last' or numbers, got {positions!r}")
        return [len(at) - 1] if positions == "last" else list(range(len(at)))
    wanted = [p + length if p < 0 else p for p in positions]
    missing = [p for p in wanted if p not in at]
    if missing or not wanted:
        raise AnalysisError(f"positions must be some that an ordinary token follows, got {list(positions)}")
    return [at.index(p) for p in wanted]


def _positional(model: Model) -> bool:
    """Has the output a row for each token of a text?"""
    parameters = inspect.signature(model.module.forward).parameters
    return "input_ids" in parameters and not type(model.module).__name__.endswith("ForSequenceClassification")


def measure(metric: str | Callable[..., Any]) -> Measure:
    """A metric by name, or a function ``(logits [rows, class], answer, foil) -> [rows]`` of the last read-out position.

    A function's damage is by how much it falls.

    Raises:
        AnalysisError: no such metric.
    """
    if callable(metric):
        return Measure(_called(metric), -1, "of the metric")
    if metric not in MEASURES:
        raise AnalysisError(f"metric must be one of {sorted(MEASURES)} or a function, got {metric!r}")
    return MEASURES[metric]


def _called(function: Callable[..., Any]) -> Callable[[Tensor, Tensor, Target], Tensor]:
    def call(logits: Tensor, clean: Tensor, target: Target) -> Tensor:
        foil = target.foils[-1] if target.foils else -1
        # In double precision, as probes.contrast.evaluate calls it.
        found = torch.as_tensor(function(logits[:, -1].double(), target.ids[-1], foil))
        if found.shape != logits.shape[:1]:
            raise AnalysisError(f"metric must give one number a row, {len(logits)}, got shape {tuple(found.shape)}")
        return found.double()

    return call


def _at(values: Tensor, ids: Sequence[int]) -> Tensor:
    """Values ``[rows, position, class]`` at one class a position, ``[rows, position]``."""
    index = torch.tensor(ids, device=values.device)[None, :, None].expand(values.shape[0], -1, 1)
    return values.gather(-1, index)[..., 0]


def _loss(logits: Tensor, clean: Tensor, target: Target) -> Tensor:
    return -_at(logits.log_softmax(-1), target.ids).double().mean(-1)


def _logit(logits: Tensor, clean: Tensor, target: Target) -> Tensor:
    return _at(logits, target.ids).double().mean(-1)


def _difference(logits: Tensor, clean: Tensor, target: Target) -> Tensor:
    if target.foils is None:
        raise AnalysisError("metric 'logit_difference' needs samples with a foil (probes.contrast pairs), got others")
    return (_at(logits, target.ids).double() - _at(logits, target.foils).double()).mean(-1)


def _probability(logits: Tensor, clean: Tensor, target: Target) -> Tensor:
    return _at(logits.softmax(-1), target.ids).double().mean(-1)


def _accuracy(logits: Tensor, clean: Tensor, target: Target) -> Tensor:
    right = torch.tensor(target.ids, device=logits.device)
    return (logits.argmax(-1) == right).double().mean(-1)


def _jsd(logits: Tensor, clean: Tensor, target: Target) -> Tensor:
    p, q = logits.log_softmax(-1), clean[None].log_softmax(-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    halves = (p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)
    # Rounding can leave a divergence of equal distributions a little below 0.
    return (halves.double() / 2 / torch.log(torch.tensor(2.0, dtype=torch.float64))).clamp_min(0).mean(-1)


MEASURES: dict[str, Measure] = {
    "loss": Measure(_loss, 1, "nats"),
    "logit": Measure(_logit, -1, "logits"),
    "logit_difference": Measure(_difference, -1, "logits"),
    "probability": Measure(_probability, -1, "probability"),
    "accuracy": Measure(_accuracy, -1, "fraction right"),
    "jsd": Measure(_jsd, 1, "bits"),
}
