"""The plain loops that head-ablation sweeps are compared with: one forward and one ``.item()`` a head."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import interp

Effects = NDArray[np.float64]


def hook_loop(module: Any, ids: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> Effects:
    """Change of ``read(logits)`` when a head's z is set to 0 by a transformers hook, ``[layer, head]``."""
    base = read(module(ids, use_cache=False, **options).logits).item()
    sites = interp.anatomy(module).stacks["text"]
    out = np.full((len(sites), sites[0].n_heads), np.nan)
    for site in sites:
        projection = module.get_submodule(f"{site.name}.{site.out_proj}")
        for head in range(site.n_heads):
            part = slice(head * site.v_head_dim, (head + 1) * site.v_head_dim)

            def hook(_: Any, args: tuple[torch.Tensor, ...], part: slice = part) -> tuple[torch.Tensor]:
                z = args[0].clone()
                z[..., part] = 0
                return (z,)

            handle = projection.register_forward_pre_hook(hook)
            out[site.layer, head] = base - read(module(ids, use_cache=False, **options).logits).item()
            handle.remove()
    return out


def lens_of(module: Any) -> Any:
    """The same weights in TransformerLens; None where it is not installed."""
    try:
        from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"-- TransformerLens: not measured ({error})")
        return None
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<s>")
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, device="cpu")


def lens_loop(
    lens: Any, ids: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, int]
) -> Effects:
    """The loop of ``generic_activation_patch``: one ``run_with_hooks`` and one ``.item()`` a head."""
    base = read(lens(ids)).item()
    out = np.full(shape, np.nan)
    for layer in range(shape[0]):
        for head in range(shape[1]):

            def hook(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
                z[:, :, head] = 0
                return z

            logits = lens.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", hook)])
            out[layer, head] = base - read(logits).item()
    return out


def difference(answer: int, foil: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: (logits[0, -1, answer] - logits[0, -1, foil]).double()


def same_order(a: Effects, b: Effects, floor: float) -> float:
    """Share of pairs of heads that both sort alike, of those further apart than the floor in both."""
    x, y = a.ravel(), b.ravel()
    dx, dy = x[:, None] - x[None], y[:, None] - y[None]
    apart = (np.abs(dx) > floor) & (np.abs(dy) > floor)
    return float((np.sign(dx) == np.sign(dy))[apart].mean()) if apart.any() else float("nan")
