"""The model without the image: its inputs, the module that runs on them, and z of the last row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from interp.models.module_walk import having
from interp.tracing.calls import Intervention, InterventionError, RunState, SiteCall
from interp.tracing.prompt import IMAGE, PAD, Prompt
from interp.tracing.session import Session, untouched

if TYPE_CHECKING:
    from interp.models.anatomy import Site

TOKENWISE = ("input_ids", "attention_mask", "token_type_ids")
TEXT_ALONE = "the text alone"


def text_only_inputs(run: RunState, prompt: Prompt) -> dict[str, Tensor]:
    """The run's inputs with the image tokens cut out and nothing of the image beside them, padded on the left anew.

    Markers around an image stay, as in the released code of VHR, which cuts the visual embeddings alone.
    """
    ids: Tensor = run.inputs["input_ids"]
    # Places are worked out beside the device, which would have to be waited for, and go there in one piece.
    kind = prompt.kind[:, : ids.shape[1]].cpu().numpy()
    keep = (kind != PAD) & (kind != IMAGE)
    lengths = keep.sum(-1)
    longest = int(lengths.max())
    sources = np.argsort(keep, axis=-1, kind="stable")[:, keep.shape[1] - longest :]
    padded = bool((lengths < longest).any())
    slots = torch.from_numpy(np.arange(longest) >= longest - lengths[:, None]).to(ids.device) if padded else None
    sources = torch.from_numpy(sources).to(ids.device)
    mask = torch.ones_like(sources) if slots is None else slots.to(torch.int64)
    out = {"attention_mask": mask}
    for name in TOKENWISE:
        given = run.inputs.get(name)
        if name == "attention_mask" or not isinstance(given, Tensor) or given.ndim != 2:
            continue
        taken = given.gather(1, sources.to(given.device))
        out[name] = taken if slots is None else taken.masked_fill(~slots.to(given.device), 0)
    return out


def text_module(run: RunState, inputs: dict[str, Any], who: Any) -> nn.Module:
    """What runs without an image: the called module, or its language model where the module requires pixels (BLIP-2).

    Raises:
        InterventionError: neither does.
    """
    missing = _required(run.module, inputs)
    if not missing:
        return run.module
    from transformers import PreTrainedModel

    root = run.root if run.root is not None else run.module
    text = {root.get_submodule(site.name) for site in run.anatomy.sites if site.stack == "text"}
    others = {root.get_submodule(site.name) for site in run.anatomy.sites if site.stack not in ("text", "cross")}
    for module in root.modules():
        if isinstance(module, PreTrainedModel) and not _required(module, inputs):
            inside = set(module.modules())
            if text <= inside and not others & inside:
                return module
    raise InterventionError(
        f"{type(who).__name__} needs a text-only prefill, and {type(run.module).__name__} does not run without {missing}; it has no "
        "language model that could be run by itself"
    )


def last_z(who: Intervention, run: RunState, prompt: Prompt, layers: Sequence[int]) -> dict[str, Tensor]:
    """One text-only prefill of the plain model: z of the last row at every text site of ``layers``.

    Returns:
        By site name, ``[S, H, Dv]`` in the model's dtype, where the layer ran.

    Raises:
        InterventionError: the model refuses to run without an image.
    """
    inputs = text_only_inputs(run, prompt)
    module = text_module(run, inputs, who)
    reader = _LastRow(set(layers))
    with plain_model(who, run, module), Session(run.root or run.module, None, [reader], "auto", run.anatomy):
        module(**inputs, **options_of(module, use_cache=False, logits_to_keep=1))
    return reader.z


class _LastRow(Intervention):
    def __init__(self, layers: set[int]) -> None:
        self.layers, self.z = layers, dict[str, Tensor]()

    def acts_on(self, site: Site, run: RunState) -> bool:
        return site.stack == "text" and site.layer in self.layers

    def after(self, call: SiteCall, z: Tensor) -> None:
        if self.acts_on(call.site, call.run):
            self.z[call.site.name] = z[:, -1].clone()


def options_of(module: nn.Module, **wanted: Any) -> dict[str, Any]:
    names = inspect.signature(module.forward).parameters
    return {name: value for name, value in wanted.items() if name in names}


def _required(module: nn.Module, inputs: dict[str, Any]) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.default is p.empty and p.kind in kinds and p.name not in inputs]


@contextmanager
def plain_model(
    who: Any, run: RunState, module: nn.Module, deltas: dict[int, Any] | None = None, *, on: str = TEXT_ALONE
) -> Iterator[None]:
    """Run the plain model aside: sessions suspended, no gradients, and what a model notes on itself put back.

    Qwen-VL keeps ``rope_deltas`` of the last prefill on the module: ``deltas`` holds those of a branch between its calls.
    ``on`` says in errors what it runs on.
    """
    root = run.root or run.module
    noting = having(root, "rope_deltas")
    own = [part.rope_deltas for part in noting]
    for part in noting:
        part.rope_deltas = None if deltas is None else deltas.get(id(part))
    run.extra_forwards += 1
    try:
        with untouched(root), torch.no_grad():
            yield
    except (InterventionError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        without = "to run without an image" if on == TEXT_ALONE else "that"
        raise InterventionError(
            f"{type(who).__name__} needs to run the model on {on}, and {type(module).__name__} refuses {without}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for part, value in zip(noting, own, strict=True):
            if deltas is not None:
                deltas[id(part)] = part.rope_deltas
            part.rope_deltas = value
