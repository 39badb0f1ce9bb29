"""Before and after: a generation without and with interventions, streamed, and what the change is worth."""

from __future__ import annotations

import difflib
import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.errors import PageError, explain
from dashboards.forcing import answer_log_probs, divergence_by_step
from dashboards.jobs import Cancelled, Job
from dashboards.specs import build, build_all, takes_heads
from interp.heads import Head, Heads, as_heads

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

RANDOM_SETS = 5
VOLATILE = ("before", "after")


class Streamer:
    """A transformers streamer that puts each token on the page as it comes."""

    def __init__(self, job: Job, model: Any, side: str, encoder_decoder: bool = False) -> None:
        self.job, self.model, self.side = job, model, side
        self.ids: list[int] = []
        self.text = ""
        self.prompt = not encoder_decoder

    def put(self, value: Any) -> None:
        if self.prompt:
            self.prompt = False
            return
        self.ids.extend(int(v) for v in value.reshape(-1).tolist())
        whole = self.model.decode(self.ids)
        # A character of several tokens comes when it is whole.
        if whole.endswith("\ufffd"):
            return
        if whole.startswith(self.text):
            delta, self.text = whole[len(self.text) :], whole
            self.job.emit("token", side=self.side, text=delta, n=len(self.ids), at=time.time())
        else:
            self.text = whole
            self.job.emit("token", side=self.side, whole=whole, n=len(self.ids), at=time.time())

    def end(self) -> None:
        return


class Stop:
    """A stopping criterion: ends the generation at the next token after a job was cancelled."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self.job.cancel.is_set(), dtype=torch.bool, device=input_ids.device)


def stopping(job: Job) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList([Stop(job)])


def matched_random(heads: Heads, shape: Mapping[str, Any], seed: int) -> Heads:
    """As many other heads in each layer of each stack; a layer with too few others gives all it has.

    Args:
        shape: ``{stack: (layers, heads)}``.
    """
    draw = random.Random(seed)
    found: list[Head] = []
    for stack in heads.by_stack():
        for layer, mine in heads.by_layer(stack).items():
            others = sorted(set(range(shape[stack][1])) - set(mine))
            found += [Head(layer, h, stack) for h in sorted(draw.sample(others, min(len(mine), len(others))))]
    return Heads(found)


def token_diff(before: Sequence[str], after: Sequence[str]) -> list[dict[str, Any]]:
    """Runs of tokens: ``op`` is equal, delete, insert or replace, with the text of both sides."""
    matcher = difflib.SequenceMatcher(a=list(before), b=list(after), autojunk=False)
    return [
        {"op": op, "before": "".join(before[i0:i1]), "after": "".join(after[j0:j1]), "i": i0, "j": j0}
        for op, i0, i1, j0, j1 in matcher.get_opcodes()
    ]


def compare(workspace: Workspace, job: Job) -> dict[str, Any]:
    """The job ``generate``: plain text, changed text, and the numbers beside them.

    Spec: what :meth:`Workspace.spec` gives, with ``do_sample``, ``temperature`` and ``seed``.
    """
    from dashboards.workspace import uses_chat

    spec = dict(job.spec)
    model = workspace.model(spec["model"])
    if not model.is_generative:
        raise PageError(f"{model.name} does not generate text; the workbench needs a model that does")
    actions = build_all(spec["interventions"], model)
    inputs = workspace.encode(model, spec)
    prompt = int(inputs["input_ids"].shape[1])
    job.check()
    sides: dict[str, Any] = {}
    runs: dict[str, str] = {}
    for side, used in (("before", []), ("after", actions)):
        job.emit("side", side=side)
        run = _traced(workspace, job, model, inputs, spec, side, used)
        sides[side] = [int(i) for i in (run.ids or [])[prompt:]]
        runs[side] = run.id
        job.check()
    result = {
        "prompt": spec["prompt"], "spec": spec | {"chat": uses_chat(model, spec)}, "runs": runs,
        "text": {side: model.decode(ids) for side, ids in sides.items()}, "ids": sides,
        "diff": token_diff(*(_words(model, ids) for ids in sides.values())),
        "same": sides["before"] == sides["after"], "n_tokens": {side: len(ids) for side, ids in sides.items()},
    }  # fmt: skip
    job.emit("partial", partial=result)
    result["effect"] = effect(
        model, inputs, sides["before"], spec["interventions"], actions, job, int(spec.get("seed", 0))
    )
    result["curves"] = {
        side: curves(workspace, workspace.runs[runs[side]], model, spec, sides[side], side) for side in sides
    }
    result["verdict"] = verdict(result)
    return result


def _traced(
    workspace: Workspace, job: Job, model: Any, inputs: Any, spec: Mapping[str, Any], side: str, used: list[Any]
) -> Any:
    """One side as a run, so that its heads can be looked at."""
    import torch

    from dashboards.runs import FULL_MAP_BYTES, POOLED, full_bytes, run_id
    from interp.tracing.capture import Capture
    from interp.tracing.session import hooked

    new, prompt = int(spec["max_new_tokens"]) or 32, int(inputs["input_ids"].shape[1])
    kept = {k: spec[k] for k in ("model", "prompt", "image", "chat")}
    kept |= {"max_new_tokens": new, "interventions": spec["interventions"] if used else []}
    sampled = bool(spec.get("do_sample"))
    identity = kept | ({"seed": spec.get("seed", 0), "temperature": spec.get("temperature", 1.0)} if sampled else {})
    capture = Capture(
        row_stats=True, received=True, pooled=POOLED, attention=full_bytes(model, prompt + new) <= FULL_MAP_BYTES
    )
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": sampled, "num_beams": 1}
    if sampled:
        options["temperature"] = float(spec.get("temperature") or 1.0)
    torch.manual_seed(int(spec.get("seed", 0)))
    streamer = Streamer(job, model, side, bool(getattr(model.config, "is_encoder_decoder", False)))
    with hooked(model, capture=capture, interventions=used) as session, torch.no_grad():
        out = model.generate(inputs, streamer=streamer, stopping_criteria=stopping(job), **options)
    if job.cancel.is_set():
        raise Cancelled
    return workspace.keep_made(kept, model, session.trace, out[0].tolist(), prompt, run_id(identity))


def effect(
    model: Any,
    inputs: Any,
    answer: list[int],
    specs: Sequence[Mapping[str, Any]],
    actions: list[Any],
    job: Job,
    seed: int,
) -> dict[str, Any]:
    """Change of the plain answer's log-probability under the interventions, and under the same on matched random heads.

    Teacher-forced, nats summed over the answer; below 0 the answer became less likely. Methods that choose their own heads
    have no random counterpart, which is said.
    """
    from interp.models.anatomy import anatomy

    if not answer:
        return {"tokens": [], "change": None, "why": "the model generated nothing"}
    plain = answer_log_probs(model, inputs, answer)
    changed = answer_log_probs(model, inputs, answer, actions)
    found: dict[str, Any] = {
        "plain": plain.tolist(), "changed": changed.tolist(), "change": float((changed - plain).sum()),
        "tokens": _words(model, answer), "random": [], "why": "",
    }  # fmt: skip
    if not specs or not all(takes_heads(spec) for spec in specs):
        found["why"] = (
            "no intervention" if not specs else "no random control: a method here chooses its own heads or has none"
        )
        return found
    shape = anatomy(model.module).shapes()
    for n in range(RANDOM_SETS):
        job.check()
        try:
            sets = [
                matched_random(as_heads(spec["settings"]["heads"], shape), shape, seed * 1000 + n) for spec in specs
            ]
            if not all(sets):
                raise PageError("every head of those layers is chosen: there is none left to compare with")
            other = [build(spec, str(heads)) for spec, heads in zip(specs, sets, strict=True)]
            value = float((answer_log_probs(model, inputs, answer, other) - plain).sum())
        except Exception as error:
            found["why"] = f"no random control: {explain(error)}"
            break
        found["random"].append({"heads": ";".join(map(str, sets)), "change": value})
        job.emit("control", done=n + 1, total=RANDOM_SETS)
    return found


def curves(
    workspace: Workspace, run: Any, model: Any, spec: Mapping[str, Any], answer: list[int], side: str
) -> dict[str, Any]:
    """Image mass and VHD at each generated token; empty with a reason where there is no image."""
    if not spec.get("image") or not answer or "text" not in run.trace:
        return {"why": "no image in this prompt"}
    data = run.trace["text"].isel(sample=0)
    out: dict[str, Any] = {"why": ""}
    if "mass" in data.variables and "image" in [str(g) for g in data["group"].values]:
        rows = slice(run.prompt_length - 1, run.prompt_length - 1 + len(answer))
        mass = data["mass"].sel(group="image").isel(query=rows).mean(["layer", "head"], skipna=True)
        out["image_mass"] = [float(v) for v in np.nan_to_num(mass.values)]
    if side == "before":
        try:
            inputs = workspace.encode(model, spec)
            text = workspace.encode(model, {**spec, "image": None})
            out["vhd"] = [float(v) for v in divergence_by_step(model, inputs, text, answer)]
        except Exception as error:
            out["why"] = f"no VHD: {explain(error)}"
    return out


def verdict(result: Mapping[str, Any]) -> str:
    """What came of it, in one sentence."""
    found = result["effect"]
    change = found.get("change")
    if change is None:
        return found.get("why", "")
    if result["same"] and change == 0:
        return "No effect: the same tokens, and the same log-probability to the last bit."
    text = "The text is the same" if result["same"] else "The text changed"
    line = f"{text}; the plain answer's log-probability changed by {change:+.3f} nats"
    others = [r["change"] for r in found.get("random", [])]
    if not others:
        return f"{line}."
    low, high = min(others), max(others)
    line += f", matched random heads by {low:+.3f} to {high:+.3f}"
    if low <= change <= high:
        return f"{line}. No effect beyond that of random heads."
    if abs(change) > max(abs(low), abs(high)):
        return f"{line}. More than random heads do."
    less = abs(change) < min(abs(v) for v in others)
    return f"{line}. {'Less than random heads do.' if less else 'Outside what random heads do, and not larger.'}"


def _words(model: Any, ids: Sequence[int]) -> list[str]:
    return model.tokens(list(ids)) if len(ids) else []
