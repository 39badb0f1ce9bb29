"""Teacher-forced hallucination margin: what a model would rather name at the point of mention (:func:`margins`).

A caption is given up to where an object is named, and two names are weighed: one of an object that is in the image and one
of its typical partner that is not:

    margin = log p(absent | image, prompt, prefix) - log p(present | image, prompt, prefix)      (nats)

Above 0 the model would hallucinate there. Unlike CHAIR it needs no generation, has no threshold, and compares two models
(or one under two interventions) at the same place of the same text. The logit margin of a yes/no question is the same thing
(:func:`yes_no_margins`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probes.intervals import LEVEL, RESAMPLES, Estimate, mean_interval
from probes.pope import Question
from probes.samples import ProbeError

if TYPE_CHECKING:
    import torch

CAUSAL_WITHIN = 0.5  # Nats. Batching moves bf16 log-probabilities by a few hundredths.


@dataclass(frozen=True)
class MarginItem:
    """One point of mention.

    Attributes:
        prompt: the instruction, as for ``model.encode``.
        prefix: the caption up to the name. A space is put between it and the name where there is none.
        present: name of the object that is in the image, as the text would go on: where the two names ask for different
            articles, end the prefix before the article and put it here ("an apple").
        absent: name of the other one, likewise.
        image: as for ``model.encode``; None for text alone.
        image_id: what intervals resample; None makes each item a unit of its own.
        chat: put the prompt in the model's chat template; the prefix is then the beginning of the answer, tokenised apart
            from the prompt, as in generation.
    """

    prompt: str
    prefix: str
    present: str
    absent: str
    image: Any = None
    image_id: Hashable = None
    chat: bool = False


@dataclass(frozen=True)
class Margin:
    """The log-probabilities at one point of mention, nats, summed over the tokens of a name.

    It is the probability of those tokens, not of the whole word: "car" has that of "carpet" too where this begins with the
    same token. A name of more tokens is not less likely by rule, but is where the model spreads its belief over spellings.

    Attributes:
        item: what was asked.
        present: log p of the present object's name.
        absent: log p of the absent one's.
        n_present: tokens of the former.
        n_absent: tokens of the latter.
    """

    item: MarginItem
    present: float
    absent: float
    n_present: int
    n_absent: int

    @property
    def value(self) -> float:
        """log p(absent) - log p(present): above 0 the model prefers what is not there."""
        return self.absent - self.present


@dataclass(frozen=True)
class _Row:
    """One sequence to run: the context and a name but for its last token, and which tokens are read off."""

    inputs: Mapping[str, Any]
    reads: tuple[tuple[int, str, tuple[int, ...]], ...]

    @property
    def keep(self) -> int:
        """Logits needed, counted from the last position."""
        return len(self.reads[0][2])

    @property
    def shape(self) -> tuple[Any, ...]:
        """Rows of one shape can stand in one batch without padding."""
        return tuple(sorted((name, tuple(value.shape)) for name, value in self.inputs.items()))


def margins(model: Any, items: Sequence[MarginItem], batch_size: int = 8) -> list[Margin]:
    """The margins of ``items``, in their order.

    Items whose names are one token each take one row, others two. Rows of equal length run together, so nothing is padded.
    An open :func:`interp.hooked` session sees the calls, interventions act.

    Args:
        model: an :class:`interp.Model`: a causal language model, with or without images.
        items: any mixture of lengths, with and without images.
        batch_size: most rows in one call.

    Raises:
        ProbeError: no items, a model that is an encoder-decoder or does not generate, names that are empty, the same or unknown to
            the tokenizer, a context without a token of its own before the names, a model whose logits change with tokens to come.
        interp.models.ModelInputError: what the model cannot take (an image for a text model, a damaged file).
    """
    if batch_size < 1:
        raise ProbeError(f"batch_size must be at least 1, got {batch_size}")
    if not items:
        raise ProbeError("items must be at least one, got none")
    if not getattr(model, "is_generative", False) or getattr(model.config, "is_encoder_decoder", False):
        got = getattr(model, "name", type(model).__name__)
        raise ProbeError(f"model must be an interp.Model of a causal language model, got {got}")
    for n, item in enumerate(items):
        if not item.present.strip() or not item.absent.strip() or item.present.strip() == item.absent.strip():
            raise ProbeError(
                f"present and absent must be two names, got {item.present!r} and {item.absent!r} in items[{n}]"
            )
    found: list[dict[str, tuple[float, int]]] = [{} for _ in items]
    # A window at a time, so that not all images are in memory at once; wide enough for rows of equal length to meet.
    window = 8 * batch_size
    for start in range(0, len(items), window):
        rows = [row for n in range(start, min(start + window, len(items))) for row in _rows(model, n, items[n])]
        starts: dict[int, tuple[float, float]] = {}
        for batch in _batches(rows, batch_size):
            _read(model, batch, found, starts)
    return [
        Margin(item, f["present"][0], f["absent"][0], f["present"][1], f["absent"][1])
        for item, f in zip(items, found, strict=True)
    ]


def yes_no_margins(
    model: Any,
    questions: Sequence[Question],
    images: Mapping[Hashable, Any] | Callable[[Hashable], Any],
    *,
    prompt: str = "{}",
    chat: bool = False,
    yes: str = "Yes",
    no: str = "No",
    batch_size: int = 8,
) -> list[float]:
    r"""log p(yes) - log p(no) of each question, for :func:`probes.pope_judge.judge_pope`.

    Args:
        model: as for :func:`margins`.
        questions: of :mod:`probes.pope`.
        images: ``question.image`` to what ``model.encode`` takes: a mapping, or a function that opens one when it is needed.
        prompt: with ``{}`` for the question, e.g. "USER: <image>\n{} ASSISTANT:".
        chat: use the chat template instead.
        yes: how the model writes it.
        no: likewise.
        batch_size: most rows in one call.

    Raises:
        ProbeError: as :func:`margins`; a question whose image is not in ``images``; a prompt without ``{}``.
    """
    if prompt.count("{}") != 1:
        raise ProbeError(f"prompt must have one {{}} for the question, got {prompt!r}")
    if isinstance(images, Mapping) and (without := [q for q in questions if q.image not in images]):
        raise ProbeError(
            f"images must have the image of each question, got none for {len(without)}, first {without[0].image!r}"
        )
    out: list[float] = []
    window = 8 * batch_size
    for start in range(0, len(questions), window):
        part = [
            MarginItem(
                prompt.replace("{}", q.text),
                "",
                present=no,
                absent=yes,
                image=images[q.image] if isinstance(images, Mapping) else images(q.image),
                chat=chat,
            )
            for q in questions[start : start + window]
        ]
        out += [margin.value for margin in margins(model, part, batch_size)]
    return out


def summarise_margins(
    found: Sequence[Margin], *, n_resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, Estimate]:
    """Mean ``margin`` in nats, and ``prefers_absent``, the share above 0; intervals resample images."""
    units = [n if m.item.image_id is None else (m.item.image_id,) for n, m in enumerate(found)]
    values = [m.value for m in found]

    def interval(x: Sequence[float]) -> Estimate:
        return mean_interval(x, units, n_resamples=n_resamples, level=level, seed=seed)

    return {"margin": interval(values), "prefers_absent": interval([float(v > 0) for v in values])}


def _rows(model: Any, n: int, item: MarginItem) -> Iterator[_Row]:
    """The one or two sequences of an item."""
    encoded, context, tails = _encode(model, n, item)
    by_fed: dict[tuple[int, ...], list[tuple[int, str, tuple[int, ...]]]] = {}
    for side, tail in tails.items():
        by_fed.setdefault(tail[:-1], []).append((n, side, tail))
    for fed, reads in by_fed.items():
        yield _Row(_with_ids(encoded, [*context, *fed]), tuple(reads))


def _encode(model: Any, n: int, item: MarginItem) -> tuple[Any, list[int], dict[str, tuple[int, ...]]]:
    """Encoded context (the image with it), its ids as far as both names share them, and the ids of each name.

    The image is processed once: the names' ids come from the tokenizer alone.
    """
    text = item.prefix if item.chat else item.prompt + item.prefix
    encoded = model.encode(item.prompt if item.chat else text, image=item.image, chat=item.chat)
    given: list[int] = encoded["input_ids"][0].tolist()
    base = _tokens(model, text, special=not item.chat)
    whole = {
        side: _tokens(model, _join(text, name), special=not item.chat)
        for side, name in (("present", item.present), ("absent", item.absent))
    }
    # Where a tokeniser joins the end of the prefix with a name, what parts the two begins before the names: the tokens they
    # share cancel, so the margin is exact.
    cut = 0
    for ids in zip(base, *whole.values(), strict=False):
        if len(set(ids)) > 1:
            break
        cut += 1
    tails = {side: tuple(ids[cut:]) for side, ids in whole.items()}
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if (
        not all(tails.values())
        or tails["present"] == tails["absent"]
        or any(unknown in tail for tail in tails.values())
    ):
        raise ProbeError(
            f"present and absent of items[{n}] must give different and known tokens, got {item.present!r} and {item.absent!r}: "
            f"{list(tails['present'])} and {list(tails['absent'])}"
        )
    if item.chat:
        return encoded, [*given, *base[:cut]], tails
    given, lost = _ids(model, given), len(base) - cut
    if cut == 0 or given[len(given) - lost - 1 :] != base[cut - 1 :]:
        raise ProbeError(
            f"prompt and prefix of items[{n}] must end in the tokens that the tokenizer gives them, and at least one of them "
            f"before the names; got {given[-3:]} from {model.name} for {base[-3:]}"
        )
    return encoded, given[: len(given) - lost], tails


def _join(text: str, name: str) -> str:
    return text + name if not text or text[-1].isspace() or name[0].isspace() else f"{text} {name}"


def _tokens(model: Any, text: str, *, special: bool) -> list[int]:
    return _ids(model, list(model.tokenizer(text, add_special_tokens=special)["input_ids"])) if text or special else []


def _ids(model: Any, ids: list[int]) -> list[int]:
    """Without the end token that some tokenizers put behind every text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == model.tokenizer.eos_token_id else ids


def _with_ids(encoded: Any, ids: list[int]) -> dict[str, Any]:
    """The encoded sample with other ids of text at its end: what has one number a position is cut or goes on."""
    import torch

    old = encoded["input_ids"]
    out: dict[str, Any] = {}
    for name, value in encoded.items():
        if name == "input_ids":
            out[name] = torch.tensor([ids], dtype=old.dtype, device=old.device)
        elif isinstance(value, torch.Tensor) and value.shape == old.shape and not value.is_floating_point():
            # A mask of ones goes on with 1, types of tokens (0 is text) with 0.
            more = max(0, len(ids) - value.shape[1])
            filler = 1 if name == "attention_mask" else 0
            out[name] = torch.nn.functional.pad(value[:, : len(ids)], (0, more), value=filler)
        else:
            out[name] = value
    return out


def _batches(rows: list[_Row], batch_size: int) -> Iterator[list[_Row]]:
    groups: dict[tuple[Any, ...], list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.shape, []).append(row)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _read(
    model: Any,
    batch: list[_Row],
    found: list[dict[str, tuple[float, int]]],
    starts: dict[int, tuple[float, float]],
) -> None:
    """Run one batch and put the log-probabilities where they belong."""
    import torch

    inputs = {name: torch.cat([row.inputs[name] for row in batch]) for name in batch[0].inputs}
    keep = max(row.keep for row in batch)
    takes = inspect.signature(model.module.forward).parameters
    options = {"logits_to_keep": keep} if "logits_to_keep" in takes else {}
    with torch.no_grad():
        logits: torch.Tensor = model(inputs, **options).logits
    log_p = logits[:, -keep:].float().log_softmax(-1).cpu()
    for k, row in enumerate(batch):
        for n, side, tail in row.reads:
            at = log_p[k, keep - row.keep :]
            found[n][side] = (float(sum(at[j, token].double() for j, token in enumerate(tail))), len(tail))
            _check_causal(n, row, at[0], starts)


def _check_causal(n: int, row: _Row, first: torch.Tensor, starts: dict[int, tuple[float, float]]) -> None:
    """Both rows of an item have the same context, so the same distribution behind it, unless later tokens change it."""
    likeliest = first.topk(2).values.tolist()
    pair = (likeliest[0], likeliest[1])
    known = starts.setdefault(n, pair)
    if max(abs(a - b) for a, b in zip(known, pair, strict=True)) > CAUSAL_WITHIN:
        raise ProbeError(
            f"model must be causal: in items[{n}] the log-probabilities before the names differ with the names fed behind them "
            f"({known[0]:.2f} and {pair[0]:.2f}); a model that reads its prompt both ways needs names of one token"
        )
