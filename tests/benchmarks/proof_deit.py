"""What the class token's heads of DeiT-tiny look at on photographs, and whether the prediction needs them.

    python tests/benchmarks/proof_deit.py --model FOLDER --images FOLDER

Per head, mean over the photographs: the class token's entropy (control: the same photographs with their patches in random
order), its mass on itself, how much its rows of two photographs overlap (1: the head looks at the same places whatever the
picture), how far the patches of the same head look, and the change of the prediction's log-probability when the head is
zeroed in the class token's row. Attention is not causation: the first four are read from attention, the last is masking.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import record
from numpy.typing import NDArray

import interp
from interp.models.layout import KINDS

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
    options = parser.parse_args()
    model = interp.load(options.model, dtype=torch.float32)
    paths = photographs(options.images)
    inputs = model.encode(image=paths)
    readings = read_heads(model, inputs)
    control = {**inputs, "pixel_values": shuffled(inputs["pixel_values"], model.config.patch_size, 0)}
    change, labels = masking(model, inputs)
    rows = rows_of(readings, read_heads(model, control)["entropy"], change)
    seen = ", ".join(f"{path.stem}: {label}" for path, label in zip(paths, labels, strict=True))
    record(
        "proof_deit",
        rows,
        note=f"Means over photographs; entropy in nats of ln(197) = {np.log(197):.2f}, distance in patches of 16 pixels. {seen}",
    )


if __name__ == "__main__":
    main()
