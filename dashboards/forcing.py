"""A prompt and its answer in one forward: what a model thinks of a given text, with and without a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def forced_inputs(inputs: Mapping[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    """Inputs ``[1, prompt]`` with the ids of an answer behind: whatever has one number a position goes on."""
    import torch

    old = inputs.get("input_ids")
    if old is None or not len(answer):
        return dict(inputs)
    more = torch.tensor([list(answer)], dtype=old.dtype, device=old.device)
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "input_ids":
            out[name] = torch.cat([value, more], -1)
        elif isinstance(value, torch.Tensor) and value.shape == old.shape and not value.is_floating_point():
            filler = 1 if name == "attention_mask" else 0  # of token types, 0 is text
            out[name] = torch.cat([value, torch.full_like(more, filler, dtype=value.dtype)], -1)
        else:
            out[name] = value
    return out


def answer_log_probs(
    model: Any, inputs: Mapping[str, Any], answer: Sequence[int], interventions: Sequence[Any] = ()
) -> NDArray[np.float64]:
    """Log-probability (nats) of each token of an answer ``[token]``, teacher-forced; on the worker."""
    import torch

    from interp.tracing.session import hooked

    whole = forced_inputs(inputs, answer)
    prompt = int(inputs["input_ids"].shape[1])
    with hooked(model, interventions=list(interventions)) as session, torch.no_grad():
        session.prompt_length = prompt
        logits = model(whole).logits[0, prompt - 1 : prompt - 1 + len(answer)]
    chosen = torch.tensor(list(answer), device=logits.device)
    return logits.double().log_softmax(-1).gather(-1, chosen[:, None])[:, 0].cpu().numpy()


def divergence_by_step(
    model: Any, inputs: Mapping[str, Any], text_inputs: Mapping[str, Any], answer: Sequence[int]
) -> NDArray[np.float64]:
    """How far heads' outputs move when the image is taken away, at each token of an answer: ``[token]``.

    Mean over all heads of the text stack of ``|| z(image, text) - z(text) ||`` at the row that decides the token (He et al.
    2025, https://arxiv.org/abs/2412.13949, eq. 4, there at one row), both teacher-forced with the same answer; on the worker.
    """
    full, text = (_answer_z(model, given, answer) for given in (inputs, text_inputs))
    return np.sqrt(((full - text) ** 2).sum(-1)).mean((0, 1))


def _answer_z(model: Any, inputs: Mapping[str, Any], answer: Sequence[int]) -> NDArray[np.float64]:
    """z of the rows that decide an answer's tokens, ``[layer, head, token, dim]``."""
    import torch

    from interp.tracing.capture import Capture
    from interp.tracing.session import hooked

    prompt = int(inputs["input_ids"].shape[1])
    rows = list(range(prompt - 1, prompt - 1 + len(answer)))
    with hooked(model, capture=Capture(z=True, stacks=("text",), queries=rows)) as session, torch.no_grad():
        session.prompt_length = prompt
        model(forced_inputs(inputs, answer[:-1]))
    z = session.trace["text"]["z"].isel(sample=0)
    return z.transpose("layer", "head", "query", "dim").values.astype(np.float64)
