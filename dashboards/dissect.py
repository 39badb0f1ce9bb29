"""One head taken apart: parts of its attention are pruned, one at a time, and the model's output is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dashboards.errors import PageError
from dashboards.forcing import forced_inputs
from dashboards.jobs import Job
from interp.heads import Head
from interp.models.layout_cells import KINDS

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

RADII = (1, 2, 4)


def parts_of(kinds: Sequence[int], vision: bool, grid: bool) -> list[dict[str, Any]]:
    """What may be pruned of a head that sees these kinds of keys.

    Args:
        kinds: code of every key, as in ``KINDS``; -1 is a pad.
        vision: rows are of those kinds too.
        grid: patches have places.

    Returns:
        For each part ``name``, and what it is: ``whole`` (a kind of ablation), ``keys`` (knocked out), ``keep`` (all others
        knocked out), with ``rows`` where only rows of a kind are meant, or ``radius`` (only patches so near are seen).
    """
    present = [k for k in range(len(KINDS)) if k in set(kinds)]
    found: list[dict[str, Any]] = [
        {"name": "whole head: zero", "whole": "zero"}, {"name": "whole head: uniform", "whole": "uniform"},
        {"name": "whole head: first key", "whole": "first_token"},
    ]  # fmt: skip
    if len(present) > 1:
        found += [{"name": f"without {KINDS[k]} keys", "keys": k} for k in present]
        found += [{"name": f"only {KINDS[k]} keys", "keep": k} for k in present]
        if vision:
            found += [
                {"name": f"{KINDS[r]} rows without {KINDS[k]} keys", "keys": k, "rows": r}
                for r in present
                for k in present
            ]
    if grid:
        found += [{"name": f"only patches within {r} step{'s' if r > 1 else ''}", "radius": r} for r in RADII]
    return found


def dissect(workspace: Workspace, job: Job) -> dict[str, Any]:
    """The job ``dissect``. Spec: ``run`` and ``head``.

    For each part: the Jensen-Shannon divergence (nats) of the model's output from the plain one, mean over rows that decide
    the answer (the last row, or the class, where there is none), and the change of the answer's log-probability.
    """
    head = Head.parse(str(job.spec["head"]))
    run = workspace.remake(str(job.spec["run"]))
    if "trace" in run.spec:
        raise PageError("a saved trace has no model to change: trace its prompt again")
    data = run.check_head(head.stack, head.layer, head.head)
    model = workspace.model(run.spec["model"])
    kinds = [int(k) for k in np.ravel(data["kind"].isel(sample=0).values)] if "kind" in data.variables else []
    places = _places(data)
    parts = parts_of(kinds, head.stack == "vision", head.stack == "vision" and places is not None)
    inputs = workspace.encode(model, run.spec)
    answer = (run.ids or [])[run.prompt_length :]
    plain = _output(model, inputs, answer, [])
    rows: list[dict[str, Any]] = list((job.partial or {}).get("rows", []))
    done = {row["name"] for row in rows}
    for n, part in enumerate(parts):
        job.step(n, len(parts))
        if part["name"] in done:
            continue
        changed = _output(model, inputs, answer, [_policy(part, head, kinds, places)])
        rows.append({"name": part["name"], **_compare(plain, changed, answer)})
        job.tell({"head": str(head), "rows": rows})
    job.step(len(parts), len(parts))
    return {"head": str(head), "run": run.id, "rows": rows, "answer": run.answer}


def jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of log-probabilities ``[row, class]``: nats ``[row]``, 0 to ln 2."""
    middle = np.logaddexp(p, q) - np.log(2)
    with np.errstate(invalid="ignore"):
        left = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - middle)).sum(-1)
        right = np.where(np.isneginf(q), 0.0, np.exp(q) * (q - middle)).sum(-1)
    return (left + right) / 2


def _output(
    model: Any, inputs: Mapping[str, Any], answer: Sequence[int], interventions: list[Any]
) -> NDArray[np.float64]:
    """Log-probabilities ``[row, class]`` of the rows that decide the answer."""
    import torch

    from interp.tracing.session import hooked

    whole = forced_inputs(inputs, answer[:-1]) if answer else dict(inputs)
    with hooked(model, interventions=interventions) as session, torch.no_grad():
        prompt = int(inputs["input_ids"].shape[1]) if "input_ids" in inputs else None
        session.prompt_length = prompt
        out: Any = model(whole)
    logits = getattr(out, "logits", None)
    if logits is None:
        raise PageError(f"{model.name} gives no logits, so there is no output to compare")
    logits = logits[0]
    rows = logits[None] if logits.ndim == 1 else logits[-max(1, len(answer)) :]
    return rows.double().log_softmax(-1).cpu().numpy()


def _compare(plain: NDArray[np.float64], changed: NDArray[np.float64], answer: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"jsd": float(jensen_shannon(plain, changed).mean()), "change": None}
    if len(answer):
        at = (np.arange(len(answer)), np.asarray(answer))
        found["change"] = float((changed[at] - plain[at]).sum())
    return found


def _places(data: Any) -> tuple[NDArray[Any], NDArray[Any]] | None:
    if "row_in_image" not in data.variables or "key" not in data["row_in_image"].dims:
        return None
    row, column = (np.ravel(data[n].isel(sample=0).values) for n in ("row_in_image", "column_in_image"))
    return (row, column) if (row >= 0).any() else None


def _policy(part: Mapping[str, Any], head: Head, kinds: Sequence[int], places: Any) -> Any:
    from interp.interventions import Custom, MaskHeads

    if "whole" in part:
        return MaskHeads([head], kind=part["whole"])
    edit = _near(part["radius"], places) if "radius" in part else _groups(part, kinds)
    return Custom(before=edit, heads=[head])


def _groups(part: Mapping[str, Any], kinds: Sequence[int]) -> Callable[[Any], Any]:
    import torch

    from interp.attention import Edit, GroupWeights

    chosen = int(part.get("keys", part.get("keep", 0)))

    def before(call: Any) -> Any:
        count = call.k.shape[2]
        codes = torch.tensor(
            [*kinds[:count], *[KINDS.index("generated")] * max(0, count - len(kinds))], device=call.q.device
        )
        mine = (codes == chosen) if "keys" in part else (codes != chosen)
        where = None
        if "rows" in part:
            start = call.mask.q_offset
            where = (codes == int(part["rows"]))[start : start + call.q.shape[2]][None, None]
        weight = torch.tensor([[[[1.0, 0.0]]]], device=call.q.device)
        return Edit((GroupWeights(weight, True, where),), groups=mine[None].to(torch.int8), n_groups=2)

    return before


def _near(radius: int, places: tuple[NDArray[Any], NDArray[Any]]) -> Callable[[Any], Any]:
    import torch

    from interp.attention import Edit, Neighbourhood

    def before(call: Any) -> Any:
        coords = torch.tensor(np.stack(places, -1), device=call.q.device)[None]
        return Edit((Neighbourhood(radius, coords, coords),))

    return before
