"""What a session learns from the arguments and results of forwards and of ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interp.tracing.calls import RunState


def begin_run(
    run: RunState, sub: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, forward: bool = True
) -> None:
    """Note the inputs of the run (at its first call) and how many positions the cache holds before this forward."""
    inputs = _bound(sub.forward if forward else None, args, kwargs)
    if not run.inputs:
        run.inputs = {name: value for name, value in inputs.items() if value is not None}
    if not forward:
        run.cache = inputs.get("past_key_values")
        run.prompt_length = _new_positions(run, inputs)
        return
    run.forwards += 1
    run.cache = inputs.get("past_key_values")
    run.past_length = _cached(run.cache)
    if run.generating and _start_was_put_before(run, inputs):
        run.prompt_length = (run.prompt_length or 0) + 1
    if not run.generating:
        run.prompt_length = run.past_length + _new_positions(run, inputs)
        if run.given_prompt_length is not None:
            run.prompt_length = min(run.given_prompt_length, run.prompt_length)


def _bound(function: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    if function is None:
        # generate(inputs, ...): the first argument is the main input.
        return {"input_ids": args[0], **kwargs}
    try:
        names = inspect.signature(function).bind_partial(*args, **kwargs)
        bound = dict(names.arguments)
        bound.update(bound.pop("kwargs", {}))
        return bound
    except TypeError:
        return dict(kwargs)


def _cached(cache: Any) -> int:
    length: Any = getattr(cache, "get_seq_length", None)
    return int(length()) if length is not None else 0


def _new_positions(run: RunState, inputs: dict[str, Any]) -> int:
    encoder_decoder = bool(getattr(getattr(run.module, "config", None), "is_encoder_decoder", False))
    names = (
        ("decoder_input_ids", "decoder_inputs_embeds") if encoder_decoder else ("input_ids", "inputs_embeds", "inputs")
    )
    for name in names:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1]:
            return value.shape[1]
    return 1 if encoder_decoder else 0


def _start_was_put_before(run: RunState, inputs: dict[str, Any]) -> bool:
    """Did generate put its start token before the decoder's prompt that it was given?"""
    given, fed = run.inputs.get("decoder_input_ids"), inputs.get("decoder_input_ids")
    if not (isinstance(given, Tensor) and isinstance(fed, Tensor)) or run.prompt_length != given.shape[1]:
        return False
    length = given.shape[1]
    later = fed[0, 1 : length + 1]
    return (
        run.past_length == 0 and len(later) == length and bool((later == given[0]).all() and fed[0, 0] != given[0, 0])
    )


def generation_options(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[Any], Any]]:
    """Ask generate for what a trace needs (beam indices) and give back a function that returns what the user asked for."""
    config = kwargs.get("generation_config") or getattr(module, "generation_config", None)
    beams = kwargs.get("num_beams", getattr(config, "num_beams", 1)) or 1
    wants_dict = kwargs.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", False))
    if beams == 1 or wants_dict:
        return args, kwargs, lambda result: result
    return args, {**kwargs, "return_dict_in_generate": True, "output_scores": True}, lambda result: result.sequences


class Sequences:
    """Token ids of a finished run and, for beams, which batch row each generated position came from.

    Attributes:
        ids: int64 ``[sample, position]``, prompt and generated.
        lengths: int64 ``[sample]``, positions up to and with the last token produced.
        beams: int64 ``[sample, step]`` or None.
    """

    def __init__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64], beams: NDArray[np.int64] | None) -> None:
        self.ids, self.lengths, self.beams = ids, lengths, beams


def finish_generate(run: RunState, result: Any) -> Sequences | None:
    """What ``generate`` returned, as :class:`Sequences`; None where it is no token ids."""
    sequences = result if isinstance(result, Tensor) else getattr(result, "sequences", None)
    if not isinstance(sequences, Tensor) or sequences.ndim != 2:
        return None
    ids = sequences.detach().cpu().numpy().astype(np.int64)
    prompt = run.prompt_length or 0
    given = run.inputs.get("input_ids")
    if (
        isinstance(given, Tensor)
        and given.shape[1]
        and ids.shape[1]
        and not getattr(run.module.config, "is_encoder_decoder", False)
    ):
        shown = given.detach().cpu().numpy()
        if ids.shape[1] < shown.shape[1] or (ids[0, : shown.shape[1]] != shown[0]).any():
            # Some models return the new tokens alone.
            ids = np.concatenate([np.repeat(shown, max(1, len(ids) // len(shown)), 0), ids], axis=1)
    lengths = np.full(len(ids), ids.shape[1])
    stops = _stop_ids(run)
    for sample, row in enumerate(ids):
        ends = np.flatnonzero(np.isin(row[prompt:], stops))
        if len(ends):
            lengths[sample] = prompt + ends[0] + 1
    beams = getattr(result, "beam_indices", None)
    return Sequences(ids, lengths, None if beams is None else beams.detach().cpu().numpy().astype(np.int64))


def _stop_ids(run: RunState) -> list[int]:
    config = getattr(run.module, "generation_config", None)
    given = run.inputs.get("generation_config") or config
    stop = run.inputs.get("eos_token_id", getattr(given, "eos_token_id", None))
    if stop is None:
        return []
    return [
        int(s)
        for s in (
            stop.tolist() if isinstance(stop, torch.Tensor) else stop if isinstance(stop, list | tuple) else [stop]
        )
    ]
