"""Which heads copy a needle, and which other heads are fair to compare them with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import interp

Place = tuple[int, int]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def answer_ids(model: Any, sample: Any) -> list[int]:
    return model.tokenizer(f" {sample.answer}", add_special_tokens=False)["input_ids"]


def detect(model: Any, samples: Iterable[Any]) -> tuple[Floats, Floats]:
    """Retrieval score ``[sample, layer, head]`` and mean write norm ``[layer, head]`` over the rows that produce the answer.

    The score is the share of answer tokens at which a head's top-1 key is the needle's own copy of the token being
    produced (Wu et al. 2404.15574, set form, teacher-forced).
    """
    scores, norms = [], []
    for sample in samples:
        answer = answer_ids(model, sample)
        ids = torch.tensor([[*sample.ids, *answer[:-1]]], device=model.device)
        rows = list(range(len(sample.ids) - 1, ids.shape[1]))
        with torch.no_grad(), interp.hooked(model, capture=interp.Capture(topk=1, z=True, queries=rows)) as run:
            model.module(input_ids=ids, logits_to_keep=1)
        data = run.trace["text"]
        top = data["topk_key"].values[0, ..., 0]
        first, last = sample.answer_span
        sequence = ids[0].cpu().numpy()
        digits = [n for n, token in enumerate(answer) if token in sample.ids[first:last]]
        copied = [
            (top[:, :, n] >= first) & (top[:, :, n] < last) & (sequence[np.maximum(top[:, :, n], 0)] == answer[n])
            for n in digits
        ]
        scores.append(np.mean(copied, 0))
        norms.append(write_norms(model, torch.from_numpy(np.nan_to_num(data["z"].values[0]))))
    return np.stack(scores), np.mean(norms, 0)


def write_norms(model: Any, z: Tensor) -> Floats:
    """Mean L2 norm of what each head writes through its slice of ``o_proj``; z is ``[layer, head, row, dim]``."""
    shape = interp.anatomy(model.module)
    out = np.zeros(z.shape[:2])
    for site in shape.stacks["text"]:
        weight = getattr(model.module.get_submodule(site.name), site.out_proj).weight.detach().float().cpu()
        slices = weight.view(weight.shape[0], site.n_heads, site.v_head_dim)
        write = torch.einsum("hrd,mhd->hrm", z[site.layer], slices)
        out[site.layer] = write.norm(dim=-1).mean(-1).numpy()
    return out


def ranked(score: Floats) -> list[Place]:
    """All heads as ``(layer, head)``, the highest score first."""
    order = np.argsort(-score, axis=None, kind="stable")
    return [tuple(int(x) for x in np.unravel_index(n, score.shape)) for n in order]


def as_mask(heads: Iterable[Place], shape: Sequence[int]) -> Bools:
    mask = np.zeros(tuple(shape), bool)
    for layer, head in heads:
        mask[layer, head] = True
    return mask


def matched_on_layer(top: Sequence[Place], shape: Sequence[int], rng: np.random.Generator) -> Bools:
    """As many heads in every layer as ``top`` has, none of them in ``top`` (where a layer has enough others)."""
    mask = np.zeros(tuple(shape), bool)
    for layer in {layer for layer, _ in top}:
        taken = [h for one, h in top if one == layer]
        free = [h for h in range(shape[1]) if h not in taken]
        chosen = rng.permutation(free if len(free) >= len(taken) else range(shape[1]))[: len(taken)]
        mask[layer, chosen] = True
    return mask


def matched_on_norm(top: Sequence[Place], norms: Floats, rng: np.random.Generator) -> Bools:
    """For every head of ``top``, one of the eight unused heads with the closest write norm, whatever the layer."""
    mask = np.zeros(norms.shape, bool)
    used = set(top)
    for layer, head in top:
        free = [(a, b) for a in range(norms.shape[0]) for b in range(norms.shape[1]) if (a, b) not in used]
        near = sorted(free, key=lambda p: abs(np.log(norms[p] / norms[layer, head])))[:8]
        pick = near[rng.integers(len(near))]
        used.add(pick)
        mask[pick] = True
    return mask
