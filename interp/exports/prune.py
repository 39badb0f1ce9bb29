"""A smaller checkpoint without some heads, which plain transformers loads."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interp.exports.prune_plan import Cut, PruneError, cuts, exact
from interp.exports.prune_weights import QUERY, cut_weights, inputs_of, zero
from interp.files import local_path, sibling, write_whole
from interp.heads import Head, Heads, as_heads
from interp.models.anatomy import Site, anatomy
from interp.models.base_edit import FILE
from interp.models.base_edit import of as base_edit_of
from interp.models.model import Model, unwrap

__all__ = ["PruneError", "Pruned", "prune_heads"]

COUNTS = ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads")


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune_heads` made.

    Attributes:
        module: the model, as ``from_pretrained`` gives it back from the checkpoint.
        removed: heads that are gone. Those that stay are numbered anew, in their old order.
        zeroed: heads that are still there and write nothing.
        folder: of the checkpoint, None where none was asked for.
        parameters: number before and after.
    """

    module: Any
    removed: Heads
    zeroed: Heads
    folder: Path | None
    parameters: tuple[int, int]


def prune_heads(
    model: Any, heads: Any, folder: str | os.PathLike[str] | None = None, *, uneven: Literal["error", "zero"] = "error",
    check: Mapping[str, Any] | None = None,
) -> Pruned:  # fmt: skip
    """Remove heads: their rows of the query (key, value) projections and their columns of the output projection.

    The result computes what the model computes with these heads' output z at zero (``MaskHeads(heads, kind="zero")``), without
    computing them. A config has one number of heads for all layers of a stack and one size of a head; so as many heads must go from
    every layer, under grouped-query attention as many from every key-value head that stays (or all of it), and the family must be
    one whose config holds the size of a head: Llama, Mistral, Qwen 2 and 3, Gemma, GPT-OSS, DeepSeek V3, LFM2, the text stacks of
    models made with these, ViT, DeiT, DINOv2. Where it is always ``hidden_size / num_attention_heads`` (GPT-2, GPT-NeoX, BERT, BART,
    CLIP, SigLIP) fewer heads would be wider ones, which is an error.

    Heads that do nothing to one metric may do much to another: measure the pruned model on what it is for.

    Args:
        model: with weights in memory, neither quantised nor with an adapter. It is not changed.
        heads: to remove, of one stack or several.
        folder: of the checkpoint, which must not exist; None writes none. A model with a processor or tokenizer has it saved too.
        uneven: ``"zero"`` removes as many as can be removed evenly, and has the others write nothing (their columns of the output
            projection, or their rows of the value projection, are zero).
        check: inputs of one forward call; given, the logits of both are compared, and a difference is an error.

    Raises:
        HeadError: heads that the model does not have.
        PruneError: no head, heads that cannot be removed, or a check that fails.
        FileExistsError: the folder exists.
    """
    module: Any = unwrap(model)
    shape = anatomy(module)
    wanted = as_heads(heads, shape)
    if uneven not in ("error", "zero"):
        raise PruneError(f"uneven must be 'error' or 'zero', got {uneven!r}")
    if not len(wanted):
        raise PruneError("heads must name at least one head, got none")
    final = None if folder is None else local_path(folder)
    if final is not None and final.exists():
        raise FileExistsError(f"folder must be new, got {final}")
    _require_plain(module)
    parts = _by_config(module, shape.sites, wanted)
    plan = _Plan(module, parts, uneven)
    removed = Heads(h for h in wanted if h.head in plan.gone.get(shape.site(h.stack, h.layer).name, ()))
    zeroed = wanted - removed
    state = plan.state(zeroed, {h: shape.site(h.stack, h.layer) for h in zeroed})
    with tempfile.TemporaryDirectory() as held:
        target = Path(held) / "model" if final is None else sibling(final, "partial")
        try:
            plan.empty.save_pretrained(target, state_dict=state)
            if isinstance(model, Model):
                _save_helpers(model, target)
            made = type(module).from_pretrained(target, dtype="auto", local_files_only=True).to(module.device).eval()
            if check is not None:
                _require_equal(module, made, wanted, {h: shape.site(h.stack, h.layer) for h in wanted}, check)
            if final is not None:
                final.parent.mkdir(parents=True, exist_ok=True)
                target.rename(final)
        finally:
            shutil.rmtree(target, ignore_errors=True)
    sizes = tuple(sum(p.numel() for p in m.parameters()) for m in (module, made))
    return Pruned(made, removed, zeroed, final, (sizes[0], sizes[1]))


def _save_helpers(model: Model, folder: Path) -> None:
    """What reads the model's inputs, and what Headscope knows about its folder."""
    helper = model.tokenizer if model.processor is None else model.processor
    if helper is not None:
        helper.save_pretrained(folder)
    if model.chat:
        write_whole(folder / FILE, json.dumps({"chat": True}))


def _require_plain(module: Any) -> None:
    name = type(module).__name__
    if getattr(module, "is_quantized", False):
        raise PruneError(f"model must have plain weights, got the quantised {name}: prune before quantising")
    if any(p.device.type == "meta" for p in module.parameters()):
        raise PruneError(f"model must have its weights in memory, got {name} with weights offloaded to disk")
    if any("lora_" in n or ".base_layer." in n for n, _ in module.named_parameters()):
        raise PruneError(f"model must have no adapter, got {name} with one: merge_and_unload() it first")
    if base_edit_of(module) is not None:
        raise PruneError(f"model must be an ordinary one, got {name} planted with a restriction by head number")


def _by_config(module: Any, sites: tuple[Site, ...], wanted: Heads) -> list[tuple[Any, dict[Site, frozenset[int]]]]:
    """The wanted heads of every site whose heads one config counts, for each such config."""
    by_site = {
        (stack, layer): numbers for stack in wanted.by_stack() for layer, numbers in wanted.by_layer(stack).items()
    }
    found: dict[tuple[int, int, int], tuple[Any, dict[Site, frozenset[int]]]] = {}
    for site in sites:
        config = getattr(module.get_submodule(site.name), "config", None)
        if config is not None:
            # BART counts the heads of encoder and decoder apart, in one config.
            mine = found.setdefault((id(config), site.n_heads, site.n_kv_heads), (config, {}))[1]
            mine[site] = frozenset(by_site.get((site.stack, site.layer), ()))
    return [(config, mine) for config, mine in found.values() if any(mine.values())]


class _Plan:
    """The cut of each config that the model's class takes, and the empty model of that shape."""

    def __init__(self, module: Any, parts: list[tuple[Any, dict[Site, frozenset[int]]]], uneven: str) -> None:
        self.module = module
        self.sites = {site.name: site for _, mine in parts for site in mine}
        self.gone: dict[str, frozenset[int]] = {}
        self.config = copy.deepcopy(module.config)
        self.empty: Any = _empty(module, self.config)
        for config, mine in parts:
            choices = [exact(mine)] if uneven == "error" else cuts(mine)
            for cut in choices:
                try:
                    self._take(config, mine, cut)
                    break
                except PruneError:
                    if uneven == "error":
                        raise

    def _take(self, config: Any, sites: Mapping[Site, frozenset[int]], cut: Cut) -> None:
        changed = _with_counts(self.module, self.config, config, next(iter(sites)), cut)
        empty = _empty(self.module, changed)
        gone = {**self.gone, **cut.heads}
        _require_shapes(self.module, empty, self.sites, gone)
        self.config, self.empty, self.gone = changed, empty, gone

    def state(self, zeroed: Heads, sites: Mapping[Head, Site]) -> dict[str, Tensor]:
        """Weights of the new model."""
        state = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        for head in zeroed:
            zero(state, self.module, sites[head], head.head)
        return cut_weights(self.module, state, self.sites, self.gone)


def _empty(module: Any, config: Any) -> Any:
    try:
        with torch.device("meta"):
            return type(module)._from_config(copy.deepcopy(config), dtype=module.dtype).eval()
    except ValueError as error:
        raise PruneError(
            f"{type(module).__name__} does not take so many heads: {' '.join(str(error).split())[:300]}"
        ) from error


def _with_counts(module: Any, whole: Any, config: Any, site: Site, cut: Cut) -> Any:
    """The model's config with fewer heads in the part that ``config`` is."""
    path = _path(module.config, config)
    if path is None:
        raise PruneError(
            f"config of {site.name} must be part of the model's, and is not in {type(module.config).__name__}"
        )
    old = whole
    for name in path:
        old = getattr(old, name)
    values: dict[str, Any] = {
        name: cut.n_heads for name in COUNTS if getattr(old, name, None) == site.n_heads and name in old.to_dict()
    }
    if not values:
        raise PruneError(
            f"{type(old).__name__} must say the number of heads as one of {COUNTS}, and does not say {site.n_heads}"
        )
    if getattr(old, "num_key_value_heads", None) is not None:
        values["num_key_value_heads"] = cut.n_kv_heads
    if getattr(old, "head_dim", None) is None:
        values["head_dim"] = site.head_dim
    try:
        new = type(old).from_dict({**old.to_dict(), **values})
    except Exception as error:
        says = " ".join(str(error).split())
        raise PruneError(f"{type(old).__name__} does not take {values}: {says[:300]}") from error
    new._attn_implementation_internal = getattr(old, "_attn_implementation_internal", None)
    if not path:
        return new
    out = copy.deepcopy(whole)
    owner = out
    for name in path[:-1]:
        owner = getattr(owner, name)
    setattr(owner, path[-1], new)
    return out


def _path(whole: Any, part: Any) -> list[str] | None:
    """Attributes from the model's config to the one that a module holds, which may be a copy of it."""
    if whole is part or (type(whole) is type(part) and whole.to_dict() == part.to_dict()):
        return []
    for name in getattr(whole, "sub_configs", {}):
        below = getattr(whole, name, None)
        rest = None if below is None else _path(below, part)
        if rest is not None:
            return [name, *rest]
    return None


def _require_shapes(module: Any, empty: Any, sites: Mapping[str, Site], gone: Mapping[str, frozenset[int]]) -> None:
    """The class with the new config has weights of the shapes that the cut gives."""
    sizes = {name: p.shape for name, p in empty.named_parameters()}
    for name, heads in gone.items():
        site = sites[name]
        kept = (site.n_heads - len(heads)) * site.v_head_dim
        proj = None if site.out_proj is None else getattr(empty.get_submodule(name), site.out_proj)
        width = None if proj is None else inputs_of(proj)
        if width is None:
            projections = (f"{name}.{p}.weight" for p in QUERY)
            width = next((sizes[p][0] for p in projections if p in sizes), None)
        if width != kept:
            raise PruneError(
                f"{type(module).__name__} must take the size of a head from its config, and makes it hidden_size / heads in {site.stack}: "
                f"{site.n_heads - len(heads)} heads of {site.v_head_dim} need {kept} inputs of the output projection, got {width}; "
                "MaskHeads(kind='zero') does the same to the answers"
            )
    with torch.device("meta"):
        empties = {n: torch.empty(t.shape) for n, t in module.state_dict().items()}
        cut = cut_weights(module, empties, sites, gone)
    for name, size in sizes.items():
        if name in cut and cut[name].shape != size:
            raise PruneError(
                f"{type(module).__name__} must need no other weights changed, and {name} would be {tuple(size)}, "
                f"got {tuple(cut[name].shape)}"
            )


def _require_equal(
    module: Any, made: Any, wanted: Heads, sites: Mapping[Head, Site], inputs: Mapping[str, Any]
) -> None:
    """The pruned model's output is the model's with the heads' inputs of the output projection at zero."""
    by_site: dict[str, list[int]] = {}
    for head in wanted:
        by_site.setdefault(sites[head].name, []).append(head.head)
    handles: list[Any] = []
    try:
        for name, numbers in by_site.items():
            site = next(s for s in sites.values() if s.name == name)
            if site.out_proj is None:
                raise PruneError(f"check must see the input of an output projection, and {name} has none of its own")
            projection: nn.Module = getattr(module.get_submodule(name), site.out_proj)
            handles.append(projection.register_forward_pre_hook(_silence(site.n_heads, numbers)))
        with torch.no_grad():
            wants, got = _output(module(**inputs)), _output(made(**inputs))
    finally:
        for handle in handles:
            handle.remove()
    worst, scale = float((wants - got).abs().max()), float(wants.abs().max())
    if not worst <= 1e-2 * scale * (1 if wants.dtype in (torch.float16, torch.bfloat16) else 1e-2):
        raise PruneError(
            f"the pruned model must give the outputs of the model with these heads at zero, and differs by {worst:.3g}"
        )


def _silence(n_heads: int, numbers: list[int]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = args[0].clone()
        for number in numbers:
            z.chunk(n_heads, -1)[number].zero_()
        return (z, *args[1:])

    return hook


def _output(out: Any) -> Tensor:
    found = getattr(out, "logits", None)
    return out[0] if found is None else found
