"""Prompts with an image, as the scores of vision need them: where the image is, z of chosen rows, and the text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from interp.analysis.running import AnalysisError, forward, inputs_of, require_stack
from interp.models.anatomy import anatomy
from interp.models.layout import layout
from interp.models.model import Model
from interp.tracing.calls import Intervention, InterventionError, RunState
from interp.tracing.capture import Capture
from interp.tracing.prompt import Prompt
from interp.tracing.session import hooked
from interp.tracing.text_only import TOKENWISE, options_of, plain_model, text_module, text_only_inputs


def require_images(model: Model, name: str) -> None:
    """Raise unless the model's text stack can hold image tokens."""
    require_stack(model, "text")
    stacks = list(anatomy(model.module).stacks)
    if not any(stack.startswith("vision") for stack in stacks):
        raise AnalysisError(
            f"{name} needs a vision-language model, and {type(model.module).__name__} has the stacks {stacks}"
        )


def prompt_of(model: Model, inputs: Mapping[str, Any], name: str) -> Prompt:
    """What the positions of the inputs are.

    Raises:
        AnalysisError: a sample without image tokens in its text.
    """
    found = layout(model.module, inputs, model.tokenizer).get("text")
    if found is None:
        raise AnalysisError(
            f"{name} must know what the positions of the text are, and inputs {sorted(inputs)} do not tell"
        )
    prompt = Prompt(torch.from_numpy(found.kind.copy()), torch.from_numpy(found.image.astype("int16")))
    if not bool(prompt.image.any(-1).all()):
        raise AnalysisError(f"{name} needs image tokens in every prompt, and there are none")
    if len(prompt) != 1:
        raise AnalysisError(f"{name} takes one prompt a sample, got a batch of {len(prompt)}")
    return prompt


def answered(sample: Any, model: Model) -> tuple[dict[str, Any], range]:
    """Inputs with the sample's answer behind them, and the rows that predict its tokens.

    A sample without an answer has its last row alone.
    """
    inputs = inputs_of(sample, model)
    length = inputs["input_ids"].shape[1]
    count = len(getattr(sample, "answer_ids", ()))
    if not count or not callable(getattr(sample, "forced", None)):
        return inputs, range(length - 1, length)
    forced: dict[str, Any] = sample.forced(model.device)
    return forced, range(length - 1, length - 1 + count)


def z_with(model: Model, inputs: Mapping[str, Any], rows: Sequence[int]) -> xr.DataArray:
    """z ``[sample, layer, head, query, dim]`` of the rows, in one forward."""
    return forward(model, inputs, Capture(z=True, queries=tuple(rows), stacks=("text",)), "text")["z"]


def z_without(model: Model, inputs: Mapping[str, Any], prompt: Prompt, rows: Sequence[int], name: str) -> xr.DataArray:
    """z of the same rows where the image tokens are cut out of the sequence (paper and release of VHD).

    Raises:
        AnalysisError: a row before the end of the image, or a model that does not run without one.
    """
    places = prompt.image[0].nonzero().flatten()
    if min(rows) <= int(places[-1]):
        raise AnalysisError(f"{name} is of rows behind the image, which ends at {int(places[-1])}, got row {min(rows)}")
    run = RunState(
        module=model.module, anatomy=anatomy(model.module), inputs=dict(inputs), generating=False,
        tokenizer=model.tokenizer, root=model.module,
    )  # fmt: skip
    try:
        alone = text_only_inputs(run, prompt)
        module = text_module(run, alone, named(name))
        shift = int((~prompt.real | prompt.image)[0].sum())
        capture = Capture(z=True, queries=tuple(row - shift for row in rows), stacks=("text",))
        with plain_model(named(name), run, module), hooked(model, capture=capture) as session:
            module(**alone, **options_of(module, use_cache=False))
    except InterventionError as error:
        raise AnalysisError(str(error)) from error
    found = session.trace["text"]["z"]
    return found.assign_coords(query=list(rows))


def with_other_image(inputs: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs with the image of others; None where the two images do not have one shape."""
    images = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and k not in (*TOKENWISE, "mm_token_type_ids")}
    for name, value in images.items():
        theirs = other.get(name)
        if not isinstance(theirs, Tensor) or theirs.shape != value.shape:
            return None
    return {**inputs, **{name: other[name].to(value.device) for name, value in images.items()}}


def named(name: str) -> Intervention:
    """What errors of the text branch call the one who asks."""
    return type(name, (Intervention,), {})()
