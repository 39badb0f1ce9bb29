"""Query-focused retrieval heads: how much of the question's attention goes to what it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from interp.analysis.retrieval import Span, elsewhere
from interp.analysis.running import AnalysisError, Floats, HeadScore, forward, inputs_of, on_grid
from interp.models.model import Model
from interp.tracing.capture import Capture


@dataclass(frozen=True)
class QueryMass(HeadScore):
    """Query-to-gold attention mass: QRHead, Zhang et al. 2025, https://arxiv.org/abs/2506.09944.

    Formula: ``1 / |Q| * sum over i in Q, j in gold of A_ij``: Q the rows of the question's tokens, gold the keys of what holds the
    answer. One forward, no generation; ``mass`` of ``row_stats`` with gold as a key group, linear in length. The formula is from a
    description of the method; the authors' calibration by a query without content is not done here.

    Unit: fraction of row mass.

    Args:
        rows: ``"question"``, or ``"last"``: the row that predicts the answer's first token alone.

    Needs: a decoder with a tokenizer. Probe: ``NeedleInHaystack``, ``KeyValue`` and their kin.
    Control: a span of the needle's length elsewhere in the prompt, not touching it.
    When not to use: as proof of copying (see ``retrieval``); a needle next to the question is favoured by every local head.
    """

    name: ClassVar[str] = "query_mass"
    summary: ClassVar[str] = "attention from the question's tokens to the passage that answers it"
    paper: ClassVar[str] = "Zhang et al. 2025, https://arxiv.org/abs/2506.09944"
    unit: ClassVar[str] = "fraction of row mass"
    probe: ClassVar[str] = "NeedleInHaystack"
    control: ClassVar[str] = "a span of the same length elsewhere in the prompt"
    needs: ClassVar[str] = "a language model with a tokenizer"

    rows: Literal["question", "last"] = "question"

    def __post_init__(self) -> None:
        if self.rows not in ("question", "last"):
            raise AnalysisError(f"rows must be 'question' or 'last', got {self.rows!r}")

    def default_probe(self) -> Any:
        from probes.needle import NeedleInHaystack

        return NeedleInHaystack()

    def values(self, model: Model, sample: Any, probe: Any) -> tuple[Floats, Floats | None]:
        missing = [n for n in ("ids", "needle_span") if not hasattr(sample, n)]
        if missing:
            raise AnalysisError(
                f"{self.name} needs samples of NeedleInHaystack, got {type(sample).__name__} without {missing}"
            )
        gold: Span = sample.needle_span
        control = elsewhere(len(sample.ids), gold, gold)
        length = len(sample.ids)
        rows = range(length - 1, length) if self.rows == "last" else question_rows(sample, model)
        groups = np.zeros(length, dtype=np.int64)
        groups[slice(*gold)], groups[slice(*control)] = 1, 2
        # A control inside the question sees only itself; rows before a key's position cannot see it.
        capture = Capture(
            row_stats=True,
            queries=tuple(rows),
            stacks=("text",),
            groups=torch.from_numpy(groups),
            group_names=("rest", "gold", "control"),
        )
        mass = forward(model, inputs_of(sample, model), capture, "text")["mass"].mean("query")
        value, null = (on_grid(mass.sel(group=g), model, "text") for g in ("gold", "control"))
        return value, null


def question_rows(sample: Any, model: Model) -> range:
    """Rows of the question, which stands behind the text.

    Raises:
        AnalysisError: the sample has no question that its tokens give back.
    """
    if getattr(sample, "query_span", (0, 0)) != (0, 0):
        return range(*sample.query_span)
    from probes.haystack import locate_by_decoding
    from probes.samples import ProbeError

    question = getattr(sample, "question", "")
    after = sample.needle_span[1]
    try:
        if not question:
            raise ProbeError("it is empty")
        start, stop = locate_by_decoding(model.tokenizer, tuple(sample.ids[after:]), question)
    except ProbeError as error:
        raise AnalysisError(f"a sample's question must stand behind its needle: {error}") from error
    return range(after + start, after + stop)
