"""Weights of a site's projections, head by head, and the direction in which a write moves a logit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.analysis.norms import LinearNorm, is_norm
from interp.analysis.running import AnalysisError
from interp.models.anatomy import Site, anatomy
from interp.models.model import Model
from interp.tracing.calls import Intervention, RunState, SiteCall
from interp.tracing.session import hooked

NAMES = {
    "q": ("q_proj", "query", "q", "q_lin", "query_proj"),
    "k": ("k_proj", "key", "k", "k_lin", "key_proj"),
    "v": ("v_proj", "value", "v", "v_lin", "value_proj"),
}
FUSED = ("qkv_proj", "qkv", "Wqkv", "c_attn")
INTERLEAVED = ("query_key_value",)
NORMS_BEFORE = ("input_layernorm", "ln_1", "layernorm_before", "layer_norm1", "norm1", "self_attn_layer_norm")


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """One site's weights in fp32, by query head; keys and values of GQA are repeated.

    Right multiplication: ``q = x @ W_Q[h]``, ``write = z @ W_O[h]``.

    Attributes:
        W_Q, W_K: ``[H, d, D]``, without rotation by position and without norms of q and k.
        W_V: ``[H, d, Dv]``.
        W_O: ``[H, Dv, d]``.
    """

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor


def linear_weight(module: nn.Module, width: int) -> Tensor:
    """fp32 ``[width, out]`` of an affine map, by running it on the identity: quantised, LoRA and offloaded weights too."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    device = torch.device("cpu") if parameter is None or parameter.device.type == "meta" else parameter.device
    eye = torch.eye(width, dtype=dtype, device=device)
    with torch.no_grad():
        out: Tensor = module(torch.cat([eye, torch.zeros_like(eye[:1])]))
    return (out[:-1] - out[-1:]).float().cpu()


def weight_in_memory(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter of a module's own, fetched from where accelerate keeps it if it is not in memory between calls."""
    weight: Any = getattr(module, name)
    if weight.device.type != "meta" or not hasattr(module, "_hf_hook"):
        return weight.detach()
    from accelerate.utils import align_module_device

    with align_module_device(module, torch.device("cpu")):
        weight = getattr(module, name)
        return weight.detach().clone()


def output_weight(model: Model, site: Site) -> Tensor:
    """``W_O [H, Dv, d]`` of a site.

    Raises:
        AnalysisError: no output projection is known.
    """
    attention = model.module.get_submodule(site.name)
    if site.out_proj is None:
        raise AnalysisError(f"the output projection of {site.name} ({type(attention).__name__}) is not known")
    weight = linear_weight(getattr(attention, site.out_proj), site.n_heads * site.v_head_dim)
    return weight.reshape(site.n_heads, site.v_head_dim, -1)


def head_weights(model: Model, site: Site, *, fold_norm: bool = True) -> HeadWeights:
    """All projections of a site.

    Args:
        model: the model.
        site: which.
        fold_norm: multiply W_Q, W_K, W_V by the weight of the norm in front (and centre them for a LayerNorm), as TransformerLens'
            ``fold_ln`` does.

    Raises:
        AnalysisError: projections that are not recognised.
    """
    attention = model.module.get_submodule(site.name)
    W_O = output_weight(model, site)
    width = W_O.shape[-1]
    sizes = {
        "q": (site.n_heads, site.head_dim), "k": (site.n_kv_heads, site.head_dim), "v": (site.n_kv_heads, site.v_head_dim),
    }  # fmt: skip
    flat = _projections(attention, site, width, sizes)
    norm = _norm_before(model, site) if fold_norm else None
    heads: dict[str, Tensor] = {}
    for name, weight in flat.items():
        folded = weight if norm is None else _folded(norm, weight)
        count, dim = sizes[name]
        if folded.shape[1] != count * dim:
            raise AnalysisError(
                f"the {name} projection of {site.name} ({type(attention).__name__}) must give {count} heads of {dim}, got {folded.shape[1]}"
                " numbers: it holds a gate or something else beside"
            )
        split = folded.reshape(width, count, dim).transpose(0, 1)
        heads[name] = split.repeat_interleave(site.n_heads // count, 0)
    return HeadWeights(heads["q"], heads["k"], heads["v"], W_O)


def _projections(
    attention: nn.Module, site: Site, width: int, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """``[width, heads * dim]`` of q, k and v."""
    # ViT's own class keeps them one level down in some releases.
    for owner in (attention, getattr(attention, "attention", None)):
        if not isinstance(owner, nn.Module):
            continue
        parts = {n: _child(owner, names) for n, names in NAMES.items()}
        if all(part is not None for part in parts.values()):
            return {n: linear_weight(part, width) for n, part in parts.items() if part is not None}
        for name in (*FUSED, *INTERLEAVED):
            fused = getattr(owner, name, None)
            if not isinstance(fused, nn.Module):
                continue
            weight = linear_weight(fused, width)
            wide = {n: count * dim for n, (count, dim) in sizes.items()}
            if weight.shape[1] != sum(wide.values()):
                break
            if name in INTERLEAVED:
                block = weight.reshape(width, site.n_heads, 3, site.head_dim)
                return {n: block[:, :, i].reshape(width, -1) for i, n in enumerate("qkv")}
            return dict(zip("qkv", weight.split(list(wide.values()), 1), strict=True))
    raise AnalysisError(
        f"the projections of {site.name} ({type(attention).__name__}) are not known: it has {[n for n, _ in attention.named_children()]}"
    )


def _child(owner: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first of these submodules that there is."""
    return next((part for name in names if isinstance(part := getattr(owner, name, None), nn.Module)), None)


def layer_module(model: Model, site: Site) -> nn.Module:
    """The layer that holds a site."""
    parts = site.name.split(".")
    for n, part in enumerate(parts):
        if part.isdigit() and int(part) == site.layer:
            return model.module.get_submodule(".".join(parts[: n + 1]))
    return model.module.get_submodule(site.name.rpartition(".")[0])


def _norm_before(model: Model, site: Site) -> nn.Module | None:
    return _child(layer_module(model, site), NORMS_BEFORE)


def _folded(norm: nn.Module, weight: Tensor) -> Tensor:
    gain = next((p for p in norm.parameters() if p.is_floating_point()), weight)
    device = "cpu" if gain.device.type == "meta" else gain.device
    some = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(device, gain.dtype)
    # What its numbers mean is asked of the norm itself: Gemma's multiply by 1 + weight, Cohere's own class centres.
    acts = LinearNorm.of(norm, some)
    weight = acts.weight.cpu()[:, None] * weight
    return weight - weight.mean(0, keepdim=True) if acts.centred else weight


def require_plain_heads(model: Model, inputs: Mapping[str, Any], stack: str, name: str) -> list[Site]:
    """Sites of a stack whose z goes straight into the output projection, as one forward shows.

    Raises:
        AnalysisError: a model that gates or normalises in between (Qwen3-Next, BitNet), or without a known projection.
    """
    sites = anatomy(model.module).stacks[stack]
    reader = _Z(stack)
    wrong: list[str] = []
    handles: list[Any] = []
    for site in sites:
        if site.out_proj is None:
            raise AnalysisError(f"{name} needs output projections that are known, and {site.name} has none")

        def compare(_: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
            z = reader.found.get(site.name)
            if z is None or not torch.equal(z.reshape(args[0].shape), args[0]):
                wrong.append(site.name)

        handles.append(model.module.get_submodule(f"{site.name}.{site.out_proj}").register_forward_pre_hook(compare))
    try:
        with torch.no_grad(), hooked(model, interventions=[reader]):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        raise AnalysisError(
            f"{name} needs z to go straight into the output projection, and {wrong[0]} changes it in between"
        )
    return sites


class _Z(Intervention):
    """z of every site of a stack."""

    def __init__(self, stack: str) -> None:
        self.stack, self.found = stack, dict[str, Tensor]()

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == self.stack

    def after(self, call: SiteCall, z: Tensor) -> None:
        if call.site.stack == self.stack:
            self.found[call.site.name] = z.detach()


class LogitDirections:
    """For every row of one forward, what a write to the residual stream at some layer adds to a token's logit.

    The final norm keeps the scale it had in that forward (as direct logit attribution does), and so does a norm that a model puts
    between a layer's output projection and the stream (Gemma 2 and 3, OLMo 2). A softcap on logits is left out.
    """

    def __init__(self, model: Model, inputs: Mapping[str, Any], sites: list[Site], name: str) -> None:
        """Run the model once.

        Raises:
            AnalysisError: no output embeddings, or no norm before them that is a LayerNorm or RMSNorm.
        """
        head: Any = model.module.get_output_embeddings()
        if head is None or getattr(head, "weight", None) is None:
            raise AnalysisError(
                f"{name} needs a model with output embeddings, and {type(model.module).__name__} has none"
            )
        self.unembedding = weight_in_memory(head)
        last: dict[str, tuple[nn.Module, Tensor]] = {}
        final: list[LinearNorm] = []
        self.after: dict[int, LinearNorm] = {}

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last["norm"] = (module, args[0].detach())

        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            if last:
                final.append(LinearNorm.of(*last["norm"]))

        def keep(layer: int) -> Any:
            return lambda module, args, output: self.after.__setitem__(layer, LinearNorm.of(module, args[0].detach()))

        handles = [m.register_forward_hook(note) for m in model.module.modules() if is_norm(m)]
        handles.append(head.register_forward_pre_hook(read))
        for site in sites:
            norm = _norm_after(layer_module(model, site))
            if norm is not None:
                handles.append(norm.register_forward_hook(keep(site.layer)))
        try:
            with torch.no_grad():
                model(inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not final:
            raise AnalysisError(
                f"{name} needs a final norm before the output embeddings of {type(model.module).__name__}"
            )
        self.final = final[0]

    def of(self, rows: list[int], weights: Tensor, layer: int) -> Tensor:
        """``[row, n, d]``: at each row, the direction of every unembedding vector of ``weights [n, d]`` or ``[row, n, d]``."""
        directions = self.final.pull_back(weights, rows)
        return self.after[layer].pull_back(directions, rows) if layer in self.after else directions


def _norm_after(layer: nn.Module) -> nn.Module | None:
    """The norm between attention's output and the residual stream."""
    norm = getattr(layer, "post_attention_layernorm", None)
    sandwich = hasattr(layer, "pre_feedforward_layernorm") or not any(hasattr(layer, n) for n in NORMS_BEFORE)
    return norm if isinstance(norm, nn.Module) and sandwich else None
