"""The command ``headscope prune``: a smaller checkpoint without some heads, checked against the model with them masked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from interp import cli_common as common
from interp.cli_common import (
    DeviceOption,
    DTypeOption,
    ImageOption,
    JsonOption,
    ModelName,
    TextOption,
    TrustOption,
    UsageError,
    friendly,
)


@friendly
def prune(
    model: ModelName,
    heads: Annotated[str, typer.Option(help="Heads to remove, such as L0H1,L1H2 or L*H3 (vision.L0H1 in another stack).")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint; it must not exist.")],
    uneven: Annotated[
        str,
        typer.Option(help="Heads that a config cannot leave out evenly: error, or zero (they stay and write nothing)."),
    ] = "error",
    text: TextOption = None,
    image: ImageOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Remove heads from a model for good: a smaller checkpoint that plain transformers loads.

    A config has one number of heads for all layers: as many must go from every layer, and under grouped-query attention as many from
    every key-value head. Families whose config fixes heads x size (GPT-2, BERT, CLIP, ...) are refused. The new
    checkpoint is loaded again and must answer --text (a text of ours by default) as the model does with these heads masked to zero;
    if it does not, nothing is written.
    """
    if uneven not in ("error", "zero"):
        raise UsageError(f"--uneven must be error or zero, got {uneven!r}")
    if out.exists():
        raise UsageError(f"--out must not exist, got {out}")
    from interp.exports import prune_heads

    pictures = common.read_images(image)
    loaded = common.load_model(model, dtype, device, trust_remote_code)
    inputs = common.check_inputs(loaded, text, pictures)
    with common.working("pruning"), common.without_bars():
        # This refuses before it writes, and checks once before the folder has its name.
        pruned = prune_heads(loaded, heads, out, uneven=uneven, check=inputs)  # type: ignore[arg-type]
        removed, zeroed, sizes = pruned.removed, pruned.zeroed, pruned.parameters
        del pruned
    try:
        worst, scale = _difference(loaded, inputs, removed | zeroed, out, device, trust_remote_code)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    if not worst <= _tolerance(loaded) * scale:
        shutil.rmtree(out, ignore_errors=True)
        typer.echo(
            f"headscope: the checkpoint must answer as the model with these heads masked, and differs by {worst:.3g} of {scale:.3g}: "
            "nothing is written", err=True,
        )  # fmt: skip
        raise typer.Exit(common.FAILED)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    told: dict[str, Any] = {
        "model": loaded.name, "out": str(out), "removed": str(removed), "zeroed": str(zeroed), "parameters_before": sizes[0],
        "parameters_after": sizes[1], "bytes": size, "largest_difference": worst, "largest_logit": scale,
    }  # fmt: skip
    if as_json:
        common.show_json(told)
        return
    typer.echo(f"removed: {removed or 'none'}" + (f"; there still, and writing nothing: {zeroed}" if zeroed else ""))
    typer.echo(f"parameters: {sizes[0]:,} before, {sizes[1]:,} after ({1 - sizes[1] / sizes[0]:.1%} fewer)")
    typer.echo(
        f"loaded again, outputs differ from the model with these heads masked by at most {worst:.2g} (largest output {scale:.3g})"
    )
    typer.echo(f"written to {out} ({size / 1e6:.1f} MB); measure it on what it is for")


def _difference(
    model: Any, inputs: Any, heads: Any, folder: Path, device: str | None, trust_remote_code: bool
) -> tuple[float, float]:
    """Largest difference of any output between the checkpoint, loaded anew, and the model with the heads masked; largest output."""
    import torch

    from interp.interventions import MaskHeads
    from interp.tracing.session import hooked

    with torch.no_grad(), hooked(model, interventions=[MaskHeads(heads, kind="zero")]):
        wanted = _output(model(inputs))
    small = common.load_model(str(folder), str(model.module.dtype).removeprefix("torch."), device, trust_remote_code)
    with torch.no_grad():
        got = _output(small(inputs))
    return float((wanted - got.to(wanted.device)).abs().max()), float(wanted.abs().max())


def _output(out: Any) -> Any:
    logits = getattr(out, "logits", None)
    return (out[0] if logits is None else logits).float()


def _tolerance(model: Any) -> float:
    import torch

    return 1e-2 if model.module.dtype in (torch.float16, torch.bfloat16) else 1e-4
