"""What one head does, in numbers and tokens: its place among all, its strongest pairs, what it writes, where it fires."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.errors import PageError
from dashboards.maps import Look
from dashboards.overview import values_by_name
from dashboards.runs import Run
from interp.heads import Head

if TYPE_CHECKING:
    from dashboards.workspace import Workspace

PAIRS = 10
TOKENS = 10


def facts(workspace: Workspace, run: Run, head: Head) -> dict[str, Any]:
    """Every number of the head with its rank among all heads of the stack (1 is the largest), and its sinks."""
    run.check_head(head.stack, head.layer, head.head)
    rows: list[dict[str, Any]] = []
    for key, values in values_by_name(workspace, run, head.stack).items():
        value = float(values[head.layer, head.head])
        flat = values[np.isfinite(values)]
        if np.isfinite(value):
            rows.append({"key": key, "value": value, "rank": int((flat > value).sum()) + 1, "of": int(flat.size)})
    group = run.kv_groups.get(head.stack, 1)
    return {
        "head": str(head), "numbers": rows, "sinks": run.sinks(head.stack, head.layer, head.head),
        "kv_group": head.head // group if group > 1 else None,
    }  # fmt: skip


def pairs(workspace: Workspace, run: Run, head: Head, hide: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """The strongest cells of a head's map: which query looks at which key (QK), one a query row, sinks left out on demand."""
    values = workspace.pyramid(run, head, Look(False, hide)).levels[0]
    best = np.where(np.isnan(values), -1.0, values)
    keys = best.argmax(1)
    top = best[np.arange(len(best)), keys]
    if len(top) > 1:
        top[0] = -1.0  # the first row of a causal map has one key to look at
    tokens = run.tokens(head.stack)
    order = np.argsort(-top, kind="stable")[:PAIRS]
    full = len(tokens["queries"]) == values.shape[0]
    return [
        {
            "query": int(q), "key": int(keys[q]), "weight": float(top[q]), "query_token": tokens["queries"][q] if full else "",
            "key_token": tokens["keys"][keys[q]] if full else "",
        }
        for q in order
        if top[q] > 0
    ]  # fmt: skip


def direct_logits(workspace: Workspace, run: Run, head: Head, row: int | None = None) -> dict[str, Any]:
    """Direct logit contribution: tokens that the head's write at one row makes more and less likely; on the worker.

    The write is what the output projection makes of this head's z alone (its bias left out); the final norm is linear with
    its scale taken from the run, as is usual (Elhage et al. 2021). Logits, softcap not applied.

    Args:
        row: absolute position; None is the row that decided the first generated token, or the last.

    Raises:
        PageError: not a head of the text stack, or a model whose final norm, projection or output layer is not found.
    """
    import torch

    from dashboards.forcing import forced_inputs
    from dashboards.specs import build_all
    from interp.models.anatomy import anatomy
    from interp.tracing.capture import Capture
    from interp.tracing.session import hooked

    if head.stack != "text" or run.ids is None:
        raise PageError("direct logits need a head of the text stack and a model that generates", 409)
    model = workspace.model(run.spec["model"])
    inputs = forced_inputs(workspace.encode(model, run.spec), run.ids[run.prompt_length : -1])
    row = run.prompt_length - 1 if row is None else row
    site = anatomy(model.module).site("text", head.layer)
    final, unembed = _final_norm(model), model.module.get_output_embeddings()
    project = model.module.get_submodule(f"{site.name}.{site.out_proj}") if site.out_proj else None
    if final is None or unembed is None or project is None or site.z_is_projected is False:
        raise PageError(f"direct logits need the final norm, output projection and output layer of {model.name}", 409)
    seen: list[Any] = []
    handle = final.register_forward_hook(lambda _m, args, out: seen.append((args[0].detach(), out.detach())))
    try:
        capture = Capture(z=True, heads=[head], queries=[row])
        with (
            hooked(
                model, capture=capture, interventions=build_all(run.spec.get("interventions") or [], model)
            ) as session,
            torch.no_grad(),
        ):
            session.prompt_length = run.prompt_length
            model(inputs)
    finally:
        handle.remove()
    x, _ = seen[-1]
    x = x[0, row] if x.shape[1] > row else x[0, -1]
    z = torch.tensor(session.trace["text"]["z"].sel(layer=head.layer, head=head.head).values.reshape(-1))
    with torch.no_grad():
        alone = torch.zeros(1, site.n_heads, site.v_head_dim, dtype=x.dtype, device=x.device)
        nothing = project(alone.flatten(1))
        alone[0, head.head] = z.to(x)
        write = (project(alone.flatten(1)) - nothing)[0]
        logits = unembed(_scaled(final, x, write)[None])[0].float()
        bias = getattr(unembed, "bias", None)
        logits = logits - (bias.float() if bias is not None else 0.0)
        share = float(write.norm() / x.norm())
    order = logits.argsort(descending=True).tolist()
    names = model.tokens([*order[:TOKENS], *order[-TOKENS:]])
    made = [(name, float(logits[i])) for name, i in zip(names, [*order[:TOKENS], *order[-TOKENS:]], strict=True)]
    produced = run.ids[row + 1] if row + 1 < len(run.ids) else None
    return {
        "row": row, "up": made[:TOKENS], "down": made[TOKENS:][::-1], "write_share": share,
        "produced": None if produced is None else [model.tokens([produced])[0], float(logits[produced])],
    }  # fmt: skip


def examples(workspace: Workspace, run: Run, head: Head, at_most: int = 12) -> list[dict[str, Any]]:
    """Rows of other texts (the probe ``Passages``) where the head's largest weight is largest; on the worker.

    A head's behaviour on one prompt rarely is its behaviour everywhere. Rows whose top key is the first position are left
    out: every head can rest there.
    """
    import torch

    from interp.tracing.capture import Capture
    from interp.tracing.session import hooked
    from probes.text import Passages

    if head.stack != "text" or "trace" in run.spec:
        raise PageError("examples need a head of the text stack and its model", 409)
    model = workspace.model(run.spec["model"])
    if model.tokenizer is None:
        raise PageError("examples need a tokenizer", 409)
    found: list[dict[str, Any]] = []
    for sample in Passages(n=6, length=64).build(model):
        inputs = sample.inputs(model.device)
        with hooked(model, capture=Capture(row_stats=True, heads=[head])) as session, torch.no_grad():
            model(inputs)
        data = session.trace["text"].sel(layer=head.layer, head=head.head).isel(sample=0)
        tokens = [str(t) for t in data["token_fed"].values]
        weight, key = data["top_weight"].values, data["top_key"].values
        for q in np.argsort(-weight)[:at_most]:
            if key[q] > 0 and q > 1:
                low = max(0, min(int(q), int(key[q])) - 6)
                found.append(
                    {
                        "weight": float(weight[q]), "tokens": tokens[low : int(q) + 3], "query": int(q) - low, "key": int(key[q]) - low,
                    }
                )  # fmt: skip
    return sorted(found, key=lambda e: -e["weight"])[:at_most]


def _final_norm(model: Any) -> Any:
    """The last norm of the language model: the one beside its list of layers."""
    from torch import nn

    base: Any = model.module
    text = getattr(base, "get_decoder", None)
    decoder = text() if callable(text) else None
    for holder in (decoder, getattr(base, "model", None), getattr(base, "transformer", None), base):
        if holder is None:
            continue
        for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
            found = getattr(holder, name, None)
            if isinstance(found, nn.Module):
                return found
    return None


def _scaled(norm: Any, x: Any, write: Any) -> Any:
    """The final norm of a part of its input, with the scale that the whole had."""
    import torch
    from torch import nn

    if isinstance(norm, nn.LayerNorm):
        spread = torch.sqrt(x.float().var(unbiased=False) + norm.eps)
        centred = (write - write.mean()).float() / spread
        return (centred * norm.weight.float()).to(write.dtype) if norm.weight is not None else centred.to(write.dtype)
    # A norm without a mean is x times a vector that does not depend on direction: y / x gives it.
    y = norm(x[None])[0].float()
    safe = torch.where(x == 0, torch.ones_like(x), x).float()
    return (write.float() * (y / safe)).to(write.dtype)
