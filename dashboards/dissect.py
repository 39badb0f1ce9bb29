"""One head taken apart: parts of its attention map are pruned, and the model's output is compared (partial pruning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dashboards.errors import PageError
from dashboards.forcing import forced_inputs
from dashboards.jobs import Job
from interp.heads import Head
from interp.models.layout_cells import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from dashboards.workspace import Workspace

RADII = (1, 2, 4)
AT_ONCE = 4
"""Parts in one repetition of the model (a batch of nine): results show early, and a large model fits."""


def kind_parts(kinds: Sequence[int]) -> dict[str, Tensor]:
    """Parts of a map whose keys are of these kinds, by name, bool ``[query, key]``: true is pruned.

    Args:
        kinds: code of every key, as in ``KINDS``.
    """
    import torch

    codes = torch.tensor(list(kinds))
    present = [k for k in range(len(KINDS)) if bool((codes == k).any())]
    found: dict[str, Any] = {}
    if len(present) > 1:
        found |= {f"{KINDS[k]} keys": codes == k for k in present}
        found |= {f"all but {KINDS[k]} keys": codes != k for k in present}
    found["all"] = torch.ones_like(codes, dtype=torch.bool)
    return {name: keys[None].expand(len(codes), -1) for name, keys in found.items()}


def dissect(workspace: Workspace, job: Job) -> dict[str, Any]:
    """The job ``dissect``. Spec: ``run`` and ``head``.

    :func:`interp.analysis.partial_pruning` of the run's prompt: of patches and CLS in a vision stack, of kinds of keys elsewhere.
    For each part its share of the map, the Jensen-Shannon divergence of the output (bits, mean over the rows that decide the
    answer, or all rows where there is none) with the part set to zero and with rows made to sum to 1 again behind that, and
    the change of the answer's log-probability (nats, the part set to zero).
    """
    from interp.analysis.partial_pruning import map_parts

    head = Head.parse(str(job.spec["head"]))
    run = workspace.remake(str(job.spec["run"]))
    if "trace" in run.spec:
        raise PageError("a saved trace has no model to change: trace its prompt again")
    data = run.check_head(head.stack, head.layer, head.head)
    model = workspace.model(run.spec["model"])
    plain = workspace.encode(model, run.spec)
    answer = (run.ids or [])[run.prompt_length :]
    inputs = _labelled(plain, answer)
    if head.stack == "vision":
        parts = map_parts(model, {k: v for k, v in inputs.items() if k != "labels"}, "vision", _radii(data), ())
    else:
        if data.sizes.get("query") != data.sizes.get("key"):
            raise PageError(
                f"taking a head apart needs a stack whose rows and keys are one sequence, not {head.stack!r}"
            )
        kinds = [int(k) for k in data["kind"].isel(sample=0).values.ravel()]
        # The run never fed the answer's last token.
        parts = kind_parts([*kinds, *[KINDS.index("generated")] * (inputs["input_ids"].shape[1] - len(kinds))])
    rows: list[dict[str, Any]] = list((job.partial or {}).get("rows", []))
    done = {row["name"] for row in rows}
    left = [name for name in parts if name not in done]
    for start in range(0, len(left), AT_ONCE):
        job.step(len(parts) - len(left) + start, len(parts))
        rows += _pruned(model, head, inputs, {name: parts[name] for name in left[start : start + AT_ONCE]}, len(answer))
        job.tell({"head": str(head), "rows": rows})
    job.step(len(parts), len(parts))
    return {"head": str(head), "run": run.id, "rows": rows, "answer": run.answer}


def _pruned(
    model: Any, head: Head, inputs: Mapping[str, Any], parts: Mapping[str, Tensor], answer: int
) -> list[dict[str, Any]]:
    from interp.analysis.partial_pruning import partial_pruning

    def by(metric: str) -> Any:
        return partial_pruning(
            model, [head], [inputs], parts=parts, stack=head.stack, metric=metric, progress=False
        ).isel(head=0)

    jsd, loss = by("jsd"), by("loss") if answer else None
    return [
        {
            "name": name, "mass": float(jsd["mass"].sel(part=name)),
            "zeroed": float(jsd["value"].sel(part=name, renormalised=False)),
            "renormalised": float(jsd["value"].sel(part=name, renormalised=True)),
            # A mean over the answer's tokens in the analysis, a sum on the page, as in the workbench.
            "change": None if loss is None else -answer * float(loss["value"].sel(part=name, renormalised=False)),
        }
        for name in parts
    ]  # fmt: skip


def _labelled(inputs: Mapping[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    """Prompt and answer, with labels on the answer alone: what is read are the rows that decide it."""
    import torch

    from interp.analysis.targets import IGNORED

    if not answer or "input_ids" not in inputs:
        return dict(inputs)
    whole = forced_inputs(inputs, answer)
    ids = whole["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    labels[:, -len(answer) :] = ids[:, -len(answer) :]
    return whole | {"labels": labels}


def _radii(data: Any) -> list[int]:
    """Rings that the grid has."""
    largest = (
        max(int(data[name].max()) for name in ("row_in_image", "column_in_image")) if "row_in_image" in data else 0
    )
    return [r for r in RADII if r < largest]
