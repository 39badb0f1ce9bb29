"""What the class token's heads of DeiT-tiny look at on photographs, and whether the prediction needs them.

    python tests/benchmarks/proof_deit.py --model FOLDER --images FOLDER

Per head, mean over the photographs: the class token's entropy (control: the same photographs with their patches in random
order), its mass on itself, how much its rows of two photographs overlap (1: the head looks at the same places whatever the
picture), how far the patches of the same head look and their k-hop profile (control: patches in random order, and a head that
looks everywhere alike), and the change of the prediction's log-probability when the head is zeroed in the class token's row.
Attention is not causation: these but the last are read from attention, the last is masking.

Importance: the Jensen-Shannon divergence of the class probabilities when the whole head is pruned, resampled by photograph. Heads
that it puts first on one half of the photographs are pruned together on the other half, against random sets of as many heads of
the same layers, and of like write norm. A demonstration: a handful of photographs says how it is done, not what holds of images.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _detection import as_mask, matched_on_layer, matched_on_norm, ranked
from _record import record
from numpy.typing import NDArray

import interp
from interp.analysis.attention_distance import hop_profile, uniform_distance
from interp.heads import Heads
from interp.models.layout import KINDS
from interp.scores import bootstrap_ci, split_half

Floats = NDArray[np.float64]
CLASS_TOKEN = 0
NAMES = ("*.png", "*.jpg")


def photographs(folder: str | Path) -> list[Path]:
    return sorted(path for pattern in NAMES for path in Path(folder).glob(pattern))


def read_heads(model: Any, inputs: Mapping[str, Any]) -> dict[str, Floats]:
    """Readings by name, each ``[photograph, layer, head]``: entropy in nats, masses, distance in patches."""
    capture = interp.Capture(row_stats=True, rows=[CLASS_TOKEN], offset=True)
    with torch.no_grad(), interp.hooked(model, capture=capture) as run:
        model(inputs)
    data = run.trace["vision"]
    class_row = data["row_attention"].values[..., 0, :].astype(np.float64)
    special = data["mass"].sel(group="special").values
    on_class = data["kind"].values[0] == KINDS.index("special")
    if np.flatnonzero(on_class).tolist() != [CLASS_TOKEN]:
        raise ValueError(
            f"the model must have one class token, at position {CLASS_TOKEN}, got {int(on_class.sum())} special ones"
        )
    grid = data["offset"].where(~data["offset_special"], 0.0)
    steps = np.hypot(np.nan_to_num(data["offset_row"].values), np.nan_to_num(data["offset_column"].values))
    return {
        "entropy": data["entropy"].values[..., CLASS_TOKEN].astype(np.float64),
        "mass on itself": class_row[..., CLASS_TOKEN],
        "mass of patches on the class token": special[..., CLASS_TOKEN + 1 :].mean(-1),
        "distance of patches": (grid.values * steps).sum(-1) / grid.values.sum(-1),
        "overlap": overlap(class_row[..., CLASS_TOKEN + 1 :]),
    }


def overlap(rows: Floats) -> Floats:
    """Mean over the other photographs of ``sum_j min(p_j, p'_j)``, rows normalised: ``[photograph, layer, head, key]`` to 0..1."""
    p = rows / rows.sum(-1, keepdims=True)
    out = np.zeros(p.shape[:-1])
    for a, b in itertools.permutations(range(len(p)), 2):
        out[a] += np.minimum(p[a], p[b]).sum(-1) / (len(p) - 1)
    return out


def shuffled(pixels: torch.Tensor, patch: int, seed: int) -> torch.Tensor:
    """``[image, channel, row, column]`` with the patches of each image in a random order of its own."""
    n, channels, height, width = pixels.shape
    cells = pixels.unfold(2, patch, patch).unfold(3, patch, patch).reshape(n, channels, -1, patch, patch)
    generator = torch.Generator().manual_seed(seed)
    cells = torch.stack([image[:, torch.randperm(image.shape[1], generator=generator)] for image in cells])
    cells = cells.view(n, channels, height // patch, width // patch, patch, patch)
    return cells.permute(0, 1, 2, 4, 3, 5).reshape(n, channels, height, width)


def masking(model: Any, inputs: Mapping[str, Any], layers: Sequence[int] | None = None) -> tuple[Floats, list[str]]:
    """Change of the prediction's log-probability ``[photograph, layer, head]`` in nats, and the predictions.

    Each head is zeroed alone, in the class token's row of its layer. ``layers`` limits it to some; NaN elsewhere.
    """
    n_layers, n_heads = interp.anatomy(model.module).shape("vision")
    with torch.no_grad():
        plain = model(inputs).logits.log_softmax(-1)
        picked = plain.argmax(-1, keepdim=True)
        change = np.full((len(plain), n_layers, n_heads), np.nan)
        for layer, head in itertools.product(range(n_layers) if layers is None else layers, range(n_heads)):
            mask = interp.MaskHeads(f"vision.L{layer}H{head}", kind="zero", rows=[CLASS_TOKEN])
            with interp.hooked(model, interventions=[mask]):
                masked = model(inputs).logits.log_softmax(-1)
            change[:, layer, head] = (masked - plain).gather(-1, picked)[:, 0].cpu().numpy()
    return change, [model.config.id2label[int(i)].split(",")[0] for i in picked[:, 0]]


def one_by_one(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Inputs of each photograph alone."""
    return [{**inputs, "pixel_values": pixels[None]} for pixels in inputs["pixel_values"]]


def hops(model: Any, samples: Sequence[Mapping[str, Any]]) -> Floats:
    """Mass of the patches' rows in ring k, ``[photograph, layer, head, hop]``; see :func:`hop_profile`."""
    return np.stack([hop_profile(model, [sample])["mass"].values for sample in samples])


def mean_hop(mass: Floats) -> Floats:
    """Mean ring of what falls on patches, of masses ``[..., hop]``."""
    return (mass * np.arange(mass.shape[-1])).sum(-1) / mass.sum(-1)


def uniform_hop(model: Any) -> float:
    """Mean ring of a head that looks at all patches alike."""
    side = model.config.image_size // model.config.patch_size
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2).astype(float)
    return uniform_distance(places, "hop", causal=False, renormalise=True)


def divergence(model: Any, inputs: Mapping[str, Any], sets: Sequence[Any]) -> Floats:
    """JSD in bits of the class probabilities when every head of a set ``bool [layer, head]`` is pruned, ``[set, photograph]``."""
    found: list[Floats] = []
    with torch.no_grad():
        p = model(inputs).logits.double().softmax(-1)
        for one in sets:
            with interp.hooked(model, interventions=[interp.MaskHeads(Heads.from_mask(one, "vision"), kind="zero")]):
                q = model(inputs).logits.double().softmax(-1)
            m = (p + q) / 2
            parts = torch.special.entr(m) - (torch.special.entr(p) + torch.special.entr(q)) / 2
            found.append((parts.sum(-1) / np.log(2)).cpu().numpy())
    return np.stack(found)


def sets_of(
    model: Any, inputs: Mapping[str, Any], jsd: Floats, norms: Floats, k: int, n_sets: int
) -> list[dict[str, Any]]:
    """The first k heads of one half of the photographs, pruned on the other half, and the other way round; one row a half."""
    rows: list[dict[str, Any]] = []
    n = len(jsd)
    rng = np.random.default_rng(0)
    halves = (np.arange(0, n, 2), np.arange(1, n, 2))
    for finding, testing in (halves, halves[::-1]):
        top = ranked(jsd[finding].mean(0))[:k]
        layer = [matched_on_layer(top, norms.shape, rng) for _ in range(n_sets)]
        norm = [matched_on_norm(top, norms, rng) for _ in range(n_sets)]
        given = {**inputs, "pixel_values": inputs["pixel_values"][torch.as_tensor(testing)]}
        found = divergence(model, given, [as_mask(top, norms.shape), *layer, *norm])
        own, controls = found[0], {"layer": found[1 : n_sets + 1].mean(1), "norm": found[n_sets + 1 :].mean(1)}
        row: dict[str, Any] = {
            "what": f"{k} heads pruned together", "found on": len(finding), "n": len(testing),
            "heads": " ".join(f"L{a}H{b}" for a, b in top), "JSD, bits": float(own.mean()),
            "se": float(own.std(ddof=1) / len(own) ** 0.5), "sets of each control": n_sets,
        }  # fmt: skip
        for name, values in controls.items():
            row[f"{name}-matched mean"], row[f"{name}-matched largest"] = float(values.mean()), float(values.max())
            row[f"p against {name}-matched"] = float((1 + (values >= own.mean()).sum()) / (1 + n_sets))
        rows.append(row)
    return rows


def importance(
    model: Any, inputs: Mapping[str, Any], k: int, n_sets: int
) -> tuple[dict[str, Floats], list[dict[str, Any]]]:
    """JSD by head with its interval, by name ``[layer, head]``, and what says how far to believe it."""
    samples = one_by_one(inputs)
    result = bootstrap_ci(interp.score("vit_importance", model, samples, metric="jsd", progress=False))
    norms = interp.score("write_norm", model, samples, stack="vision", progress=False)["value"].values
    jsd = result["value_by_sample"].values.astype(np.float64)
    by_head = {
        "JSD, bits": result["value"].values, "JSD, low": result["ci_low"].values, "JSD, high": result["ci_high"].values,
        "write norm": norms,
    }  # fmt: skip
    layers = np.repeat(np.arange(norms.shape[0]), norms.shape[1])
    mean = jsd.mean(0).ravel()
    rows: list[dict[str, Any]] = [
        {
            "what": "importance", "n": len(jsd), "heads": norms.size, "rank correlation with layer": spearman(layers, mean),
            "rank correlation with write norm": spearman(norms.ravel(), mean),
            "split-half reliability": split_half(result).reliability,
            "split-half reliability within layers": split_half(result, within_layers=True).reliability,
            "largest JSD with nothing pruned": float(np.abs(result["null"].values).max()),
        }
    ]  # fmt: skip
    return by_head, [*rows, *sets_of(model, inputs, jsd, norms, k, n_sets)]


def rows_of(readings: Mapping[str, Floats], shuffled_entropy: Floats, change: Floats) -> list[dict[str, Any]]:
    """One row a head, and the rank correlation of each reading with the effect of masking over all heads."""
    rows: list[dict[str, Any]] = []
    n, n_layers, n_heads = change.shape
    for layer, head in itertools.product(range(n_layers), range(n_heads)):
        row: dict[str, Any] = {"what": f"L{layer}H{head}", "n": n}
        columns = {**readings, "entropy, patches shuffled": shuffled_entropy, "change of log-probability": change}
        for name, values in columns.items():
            row[name] = float(values[:, layer, head].mean())
            row[f"{name}, se"] = float(values[:, layer, head].std(ddof=1) / n**0.5)
        rows.append(row)
    size = np.abs(change).mean(0).ravel()
    layers = np.repeat(np.arange(n_layers), n_heads)
    correlations = {name: spearman(values.mean(0).ravel(), size) for name, values in readings.items()}
    rows.append(
        {"what": "rank correlation with |change|", "n": len(size), "layer": spearman(layers, size), **correlations}
    )
    return rows


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    import pandas as pd

    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of DeiT-tiny, or facebook/deit-tiny-patch16-224")
    parser.add_argument("--images", required=True, help="folder with photographs")
    parser.add_argument("--heads", type=int, default=3, help="pruned together")
    parser.add_argument("--sets", type=int, default=19, help="random sets of each control")
    options = parser.parse_args()
    model = interp.load(options.model, dtype=torch.float32)
    paths = photographs(options.images)
    inputs = model.encode(image=paths)
    readings = read_heads(model, inputs)
    control = {**inputs, "pixel_values": shuffled(inputs["pixel_values"], model.config.patch_size, 0)}
    rings, rings_shuffled = hops(model, one_by_one(inputs)), hops(model, one_by_one(control))
    readings |= {"mean hop": mean_hop(rings), "mean hop, patches shuffled": mean_hop(rings_shuffled)}
    readings["mass within one hop"] = rings[..., :2].sum(-1) / rings.sum(-1)
    change, labels = masking(model, inputs)
    rows = rows_of(readings, read_heads(model, control)["entropy"], change)
    by_head, more = importance(model, inputs, options.heads, options.sets)
    for row, (layer, head) in zip(rows, itertools.product(*map(range, change.shape[1:])), strict=False):
        row |= {name: float(values[layer, head]) for name, values in by_head.items()}
        row["mass by hop"] = [round(float(v), 4) for v in rings[:, layer, head].mean(0)]
    rows += [*more, {"what": "a head that looks at all patches alike", "n": len(paths), "mean hop": uniform_hop(model)}]
    seen = ", ".join(f"{path.stem}: {label}" for path, label in zip(paths, labels, strict=True))
    record(
        "proof_deit",
        rows,
        note=f"Means over photographs; entropy in nats of ln(197) = {np.log(197):.2f}, distance and hops in patches of 16 pixels; "
        f"JSD with 95 % intervals over photographs (percentile bootstrap, too narrow below about 20). {seen}",
    )


if __name__ == "__main__":
    main()
