"""Show code: Python that rebuilds what a view shows, from the page's state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dashboards import specs
from dashboards.errors import PageError
from interp.heads import Head, Heads

if TYPE_CHECKING:
    from dashboards.runs import Run
    from dashboards.workspace import Workspace


def show_code(workspace: Workspace, state: Mapping[str, Any]) -> str:
    """A script for one view.

    Args:
        state: of the page: run, view, stack, layer, head, query, metric, sel.

    Raises:
        PageError: no run yet.
    """
    if not state.get("run"):
        raise PageError("trace a prompt first: code rebuilds what a view shows")
    run = workspace.run(str(state["run"]))
    view = str(state.get("view") or "overview")
    lines = [*_open(workspace, run), "", *_view(run, view, state)]
    return "\n".join(lines) + "\n"


def _open(workspace: Workspace, run: Run) -> list[str]:
    if "trace" in run.spec:
        return ["import interp", "", f"trace = interp.Trace.open({run.spec['trace']!r})"]
    spec = run.spec
    paths = [str(path) for path in workspace.image_paths(spec["image"])] if spec.get("image") else []
    image = f", image={(paths if len(paths) > 1 else paths[0])!r}" if paths else ""
    chat = ", chat=True" if run.chat else ""
    text = repr(spec["prompt"]) if run.takes_text and (spec.get("prompt") or not image) else "None"
    lines = [
        "import torch", "", "import interp", "", f"model = interp.load({spec['model']!r})",
        f"inputs = model.encode({text}{image}{chat})",
    ]  # fmt: skip
    made = [specs.code(s) for s in spec.get("interventions") or []]
    change = f", interventions=[{', '.join(made)}]" if made else ""
    full = any("attention" in run.trace[s].variables for s in run.trace)
    wish = f"row_stats=True, received=True, pooled=32{', attention=True' if full else ''}"
    call = (
        f"model.generate(inputs, max_new_tokens={spec['max_new_tokens']}, do_sample=False)"
        if spec.get("max_new_tokens") and run.ids is not None
        else "model(inputs)"
    )
    lines += [
        f"with interp.hooked(model, capture=interp.Capture({wish}){change}) as run, torch.no_grad():",
        f"    output = {call}",
    ]
    return [*lines, "trace = run.trace"]


def _view(run: Run, view: str, state: Mapping[str, Any]) -> list[str]:
    stack = str(state.get("stack") or next(iter(run.trace)))
    data = f"data = trace[{stack!r}].isel(sample=0)"
    if view == "importance" and "trace" not in run.spec:
        head = Head(int(state.get("layer") or 0), int(state.get("head") or 0), stack)
        lines = [data, *_metric(str(state.get("metric") or ""), stack)]
        if stack == "vision":  # what the page's button does; in other stacks it prunes kinds of keys
            call = f"partial_pruning(model, '{head}', [inputs], rings=(1, 2, 4))"
            lines += ["", "from interp.analysis.partial_pruning import partial_pruning", f"print({call})"]
        return lines
    if view in ("overview", "map", "importance"):
        lines = [data, *_metric(str(state.get("metric") or ""), stack)]
        if view == "map" and str(state.get("sx") or "pca") in ("pca", "umap"):
            method = str(state.get("sx") or "pca")
            lines += [
                "", "import numpy as np", "", "from interp.analysis.head_maps import embed",
                "pooled = data['pooled'].stack(of=('layer', 'head'), block=('query_block', 'key_block'))",
                "blocks = np.sqrt(pooled.transpose('of', 'block').fillna(0).values.clip(0))",
                f"places = embed(blocks, {method!r}, seed=0)  # [head, 2]; the page adds this prompt's numbers to the blocks",
            ]  # fmt: skip
        return lines
    if view in ("head", "image"):
        head = Head(int(state.get("layer") or 0), int(state.get("head") or 0), stack)
        if "attention" in run.stack(stack).variables:
            lines = [data, f"attention = data['attention'].sel(layer={head.layer}, head={head.head})  # [query, key]"]
        elif "trace" in run.spec:
            lines = [data, f"attention = data['pooled'].sel(layer={head.layer}, head={head.head})  # sums of blocks"]
        else:
            lines = [
                f"capture = interp.Capture(attention=True, heads='{head}')",
                "with interp.hooked(model, capture=capture) as again, torch.no_grad():", "    model(inputs)",
                f"attention = again.trace[{stack!r}].isel(sample=0)['attention'].sel(layer={head.layer}, head={head.head})",
            ]  # fmt: skip
        if view == "image" and state.get("query") not in (None, ""):
            lines += [
                f"row = attention.isel(query={int(state['query'])})",
                "patches = row.where(data['row_in_image'] >= 0, drop=True)  # with row_in_image, column_in_image",
            ]
        return lines
    if view == "sinks":
        return [data, "received = (data['received'].sum('query_group') / data['received_rows'].sum('query_group'))  # [layer, head, key]",
                f"sinks = (received > {float(state.get('thr') or 0.3)}).mean(['layer', 'head'])"]  # fmt: skip
    if view == "workbench":
        if "trace" in run.spec or not run.takes_text:
            return ["# the workbench needs a model that generates text"]
        return _workbench(state)
    return [data]


def _workbench(state: Mapping[str, Any]) -> list[str]:
    """Before and after, with the cards as they stand."""
    try:
        cards = json.loads(str(state.get("wb") or "[]"))
        made = [specs.code(card) for card in cards]
    except (ValueError, AttributeError, TypeError) as error:
        raise PageError(f"the workbench's cards cannot be read: {error}") from error
    if not made and state.get("sel"):
        made = [f"interp.MaskHeads({str(Heads.parse(str(state['sel'])))!r})"]
    wish = f"max_new_tokens={int(state.get('wnew') or 32)}, "
    wish += (
        f"do_sample=True, temperature={float(state.get('temp') or 1.0)}" if state.get("sample") else "do_sample=False"
    )
    return [
        "prompt = inputs['input_ids'].shape[1]", f"for changes in ([], [{', '.join(made)}]):",
        f"    torch.manual_seed({int(state.get('seed') or 0)})",
        "    with interp.hooked(model, interventions=changes), torch.no_grad():",
        f"        ids = model.generate(inputs, {wish})", "    print(model.decode(ids[0, prompt:]))",
    ]  # fmt: skip


def _metric(metric: str, stack: str) -> list[str]:
    kind, _, key = metric.partition(":")
    if kind == "s":
        return [f"score = interp.score({key!r}, model)", "print(score.heads.table().head(20))", "score.heads.grid()"]
    over = "[d for d in values.dims if d not in ('layer', 'head')]"
    if key.startswith("mass_"):
        return [
            f"values = data['mass'].sel(group={key.removeprefix('mass_')!r})",
            f"values = values.mean({over}, skipna=True)",
        ]
    if key == "first_key":
        return ["values = (data['received'].sum('query_group') / data['received_rows'].sum('query_group')).isel(key=0)"]
    if key == "reach":
        return [
            "values = abs(data['query'] - data['top_key']).where(data['top_key'] >= 0)",
            f"values = values.mean({over})",
        ]
    name = key if key in ("entropy", "top_weight", "sink_share") else "entropy"
    return [f"values = data[{name!r}]", f"values = values.mean({over}, skipna=True)"]
