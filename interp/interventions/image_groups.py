"""What the positions of a prompt are, for policies that treat image and text differently, and key groups made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.attention import Edit
from interp.models.anatomy import Anatomy
from interp.models.layout import text_cells
from interp.tracing.calls import Intervention, InterventionError, RunState, SiteCall
from interp.tracing.prompt import GENERATED, Prompt


def reads_text(run: RunState) -> bool:
    """Does the module that was called hold the text stack? (A vision tower called by itself does not.)"""
    if run.root is None or run.module is run.root:
        return True
    wanted = {run.root.get_submodule(site.name) for site in run.anatomy.sites if site.stack == "text"}
    return any(module in wanted for module in run.module.modules())


def require_vision(who: Intervention, anatomy: Anatomy) -> None:
    """Raise unless the model has more than a text stack.

    Raises:
        InterventionError: a text model.
    """
    if "text" not in anatomy.stacks or not any(s.startswith("vision") for s in anatomy.stacks):
        raise InterventionError(
            f"{_name(who)} needs a vision-language model: it acts on image tokens, and {anatomy.model_class} has the "
            f"stacks {list(anatomy.stacks)}"
        )


def read_prompt(who: Intervention, run: RunState) -> Prompt:
    """The run's prompt; positions in a KV cache that this session filled are known from the run that filled it.

    Raises:
        InterventionError: what the positions are cannot be told.
    """
    state = run.of(who)
    if "prompt" in state:
        return state["prompt"]
    inputs, before = run.inputs, 0 if run.generating else run.past_length
    if before and _new(run) == 1 and run.given_prompt_length is None and "prompt" in run.earlier(who):
        # A user's own decoding loop: the token fed is a generated one.
        state["prompt"] = run.earlier(who)["prompt"]
        return state["prompt"]
    if before:
        # Inputs of a later forward hold the new tokens, and an attention mask of all.
        inputs = {name: _tail(value, run) for name, value in inputs.items()}
    try:
        found = text_cells(run.module, inputs, run.tokenizer)
    except Exception as error:
        raise InterventionError(f"{_name(who)} must know what the prompt's positions are: {error}") from error
    if found is None:
        raise InterventionError(
            f"{_name(who)} must know what the prompt's positions are; inputs {sorted(inputs)} do not tell"
        )
    prompt = Prompt(torch.from_numpy(found["kind"].astype("int8")), torch.from_numpy(found["image"].astype("int16")))
    if before:
        prompt = _after(who, run, prompt, before)
    if run.given_prompt_length is not None:
        prompt = Prompt(prompt.kind[:, : run.prompt_length], prompt.picture[:, : run.prompt_length])
    state["prompt"] = prompt
    return prompt


def require_images(who: Intervention, run: RunState) -> Prompt:
    """The run's prompt, every sample of which has an image.

    Raises:
        InterventionError: a sample without one, or positions that cannot be told.
    """
    prompt = read_prompt(who, run)
    without = [sample for sample, shown in enumerate(prompt.image.any(-1).tolist()) if not shown]
    if len(without) == len(prompt):
        crossing = "" if "cross" not in run.anatomy.stacks else (
            f": images reach {run.anatomy.model_class} through cross attention, not through its text sequence"
        )  # fmt: skip
        raise InterventionError(f"{_name(who)} needs image tokens in the prompt, got none{crossing}")
    if without:
        raise InterventionError(
            f"{_name(who)} needs an image in every sample of the batch; samples {without} of {len(prompt)} have none"
        )
    return prompt


def _after(who: Intervention, run: RunState, new: Prompt, before: int) -> Prompt:
    earlier: Prompt | None = run.earlier(who).get("prompt")
    if earlier is None or len(earlier) != len(new) or earlier.kind.shape[1] > before:
        raise InterventionError(
            f"{_name(who)} must know the {before} positions in past_key_values, and this session has not filled them: run the "
            "prompt inside the session, on the same cache"
        )
    gap = before - earlier.kind.shape[1]
    parts = [
        (torch.nn.functional.pad(old, (0, gap), value=value), now)
        for old, now, value in ((earlier.kind, new.kind, GENERATED), (earlier.picture, new.picture, -1))
    ]
    return Prompt(*(torch.cat(pair, -1) for pair in parts))


def _tail(value: Any, run: RunState) -> Any:
    new = _new(run)
    whole = isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == run.past_length + new
    return value[:, -new:] if whole else value


def _new(run: RunState) -> int:
    ids = run.inputs.get("input_ids")
    return ids.shape[-1] if isinstance(ids, Tensor) else 1


def _name(who: Any) -> str:
    return type(who).__name__


def repeats(call_batch: int, samples: int) -> int:
    """Rows of a call for each sample: beams and returned sequences repeat every prompt.

    Raises:
        InterventionError: the rows are no multiple of the prompts.
    """
    if call_batch % samples:
        raise InterventionError(f"a call's {call_batch} rows must be a multiple of the {samples} prompts of the run")
    return call_batch // samples


def prompt_rows(call: SiteCall, flags: Tensor, beyond: bool) -> Tensor:
    """Flags of a prompt's positions ``[S, P]`` as rows of a call: bool ``[B, Lq]``, ``beyond`` for later positions."""
    n = call.q.shape[2]
    flags = flags[:, call.mask.q_offset : call.mask.q_offset + n]
    flags = torch.nn.functional.pad(flags, (0, n - flags.shape[1]), value=beyond)
    return flags.repeat_interleave(repeats(call.q.shape[0], len(flags)), 0).to(call.q.device)


def answering_rows(call: SiteCall, prompt: Prompt, *, first_token: bool) -> Tensor | None:
    """Rows that predict an answer's tokens: bool ``[B, Lq]``; None where that is every row of the call.

    Args:
        first_token: whether the prompt's last row, which predicts the first token, is one of them.
    """
    if call.generated and not (call.mask.q_offset < prompt.kind.shape[1]):
        return None
    flags = torch.zeros_like(prompt.real)
    if first_token:
        flags[torch.arange(len(prompt)), prompt.last] = True
    return prompt_rows(call, flags, beyond=True)


class KeyGroups:
    """Key groups of a prompt's positions, handed out call by call, with an edit for each length of the sequence.

    Layers that share the groups share the object, hence the edit: what the op prepares for an edit is found again by its
    identity.
    """

    def __init__(self, codes: Tensor, beyond: int = 0) -> None:
        """``codes`` are int8 ``[S, P]``; positions after the prompt are in group ``beyond``."""
        self.codes, self.beyond = codes, beyond
        self.buffers: dict[tuple[torch.device, int], Tensor] = {}
        self.edits: dict[tuple[int, torch.device], tuple[Edit, tuple[int, ...], Edit]] = {}

    def of(self, call: SiteCall) -> Tensor:
        """Int8 ``[B, Lk]`` of a call."""
        return self.at(call.q.shape[0], call.mask.kv_offset, call.k.shape[2], call.q.device)[:, : call.k.shape[2]]

    def at(self, batch: int, start: int, n_keys: int, device: torch.device) -> Tensor:
        """Groups of so many keys from a position on and perhaps of more after them, int8 ``[B, n]``: cutting costs a launch."""
        key = (device, batch)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.shape[1] < start + n_keys:
            room = max(start + n_keys + 256, self.codes.shape[1])
            grown = torch.nn.functional.pad(self.codes, (0, room - self.codes.shape[1]), value=self.beyond)
            buffer = grown.repeat_interleave(repeats(batch, len(grown)), 0).to(device)
            self.buffers[key] = buffer
        return buffer[:, start:] if start else buffer

    def edit(self, call: SiteCall, template: Edit) -> Edit:
        """``template`` with the call's groups; the same object for all layers, and as long as no key is added."""
        return self.edit_at(call.q.shape[0], call.mask.kv_offset, call.k.shape[2], call.q.device, template)

    def edit_at(self, batch: int, start: int, n_keys: int, device: torch.device, template: Edit) -> Edit:
        """As :meth:`edit`, of a call of so many samples and of so many keys from a position on."""
        place = (id(template), device)
        key = (batch, start, n_keys)
        known = self.edits.get(place)
        if known is None or known[0] is not template or known[1] != key:
            self.edits[place] = known = (
                template,
                key,
                template.regrouped(self.at(batch, start, n_keys, device)[:, :n_keys]),
            )
        return known[2]
