"""The command ``headscope generate``: a text as the model writes it, and as it does under interventions."""

from __future__ import annotations

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
    TrustOption,
    UsageError,
    friendly,
)
from interp.cli_dashboard import read_interventions

DESCRIBE = "Describe the picture."

WithOption = Annotated[
    list[str] | None,
    typer.Option("--with", help="Methods such as 'VHR(alpha=2)+VAR(p=.6)', 'VCD', 'DoLa', 'beam=5'; again for more."),
]


@friendly
def generate(
    model: ModelName,
    prompt: Annotated[str | None, typer.Option(help=f"What the model continues; with an image: {DESCRIBE!r}.")] = None,
    image: ImageOption = None,
    vhr: Annotated[float | None, typer.Option(help="Vision-aware head reinforcement with this alpha, such as 2.")] = None,
    var: Annotated[float | None, typer.Option(help="Move this share of the sinks' weight to the image, such as 0.6.")] = None,
    mask: Annotated[str | None, typer.Option(help="Heads to mask, such as L3H1,L5H0-3 or L2H*.")] = None,
    kind: Annotated[str, typer.Option(help="Of --mask: zero, uniform or first_token.")] = "zero",
    scope: Annotated[str, typer.Option(help="Of --mask: all, prefill or decode.")] = "all",
    methods: WithOption = None,
    interventions: Annotated[
        Path | None, typer.Option(help="JSON that the page exports, or a list of {name, settings}.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to generate (greedy); default 40, with an image 128.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the model's chat template.")] = False,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Generate, and with --vhr, --var, --mask, --with or --interventions generate again under all of them: texts side by side."""
    setting, held = read_setting(
        vhr=vhr, var=var, mask=mask, kind=kind, scope=scope, methods=methods, file=interventions
    )
    prompt = held.get("prompt") if prompt is None else prompt
    pictures = common.read_images(image)
    if prompt is None and pictures is not None:
        prompt = DESCRIBE
    if prompt is None:
        raise UsageError("--prompt must be given (or a file of the page that has one)")
    most = max_new_tokens or held.get("max_new_tokens") or (40 if pictures is None else 128)
    loaded = common.load_model(model, dtype, device, trust_remote_code)
    # Without the flag the model's own way decides: some know conversations only.
    inputs = loaded.encode(prompt, pictures, chat=True if chat or held.get("chat") else None)
    result = plain_and_changed(loaded, inputs, setting, int(most))
    if as_json:
        asked = {"model": loaded.name, "prompt": prompt, "mask": mask, "kind": kind, "scope": scope}
        described = setting.describe()
        common.show_json({**asked, "setting": setting.name, "beams": setting.beams, "random": setting.random,
                          "interventions": described["interventions"], **result})  # fmt: skip
        return
    show_texts(result, setting.name)


def read_setting(
    *, vhr: float | None, var: float | None, mask: str | None, kind: str, scope: str, methods: list[str] | None,
    file: Path | None,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """The one setting that the options ask for, and what else the page's file says."""
    from interp.evaluation.settings import Setting, parse_setting
    from interp.interventions import VAR, VHR, MaskHeads

    if kind == "mean":
        raise UsageError(
            "--kind must be zero, uniform or first_token here (mean needs reference inputs: use Python), got 'mean'"
        )
    changes: list[Any] = [] if mask is None else [MaskHeads(mask, kind=kind, scope=scope)]  # type: ignore[arg-type]
    said = [] if mask is None else [f"{mask} masked ({kind}, {scope})"]
    if vhr is not None:
        changes.append(VHR(alpha=vhr))
        said.append(f"VHR {vhr:g}")
    if var is not None:
        changes.append(VAR(p=var))
        said.append(f"VAR {var:g}")
    beams, seed = 1, None
    for text in methods or ():
        found = parse_setting(text)
        changes += found.interventions
        beams, seed = max(beams, found.beams), seed if found.random is None else found.random
        said.append(found.name)
    held: dict[str, Any] = {}
    if file is not None:
        more, held = read_interventions(file)
        changes += more
        said += [str(change.describe()["name"]) for change in more]
    return Setting(", ".join(said) or "plain", tuple(changes), beams, seed), held


def plain_and_masked(model: Any, inputs: Any, changes: list[Any], max_new_tokens: int) -> dict[str, Any]:
    """Greedy continuations: ``plain``, ``plain_ids``, and with interventions ``masked``, ``masked_ids``, ``same``."""
    from interp.evaluation.settings import Setting

    return plain_and_changed(model, inputs, Setting("masked", tuple(changes)), max_new_tokens)


def plain_and_changed(model: Any, inputs: Any, setting: Any, max_new_tokens: int) -> dict[str, Any]:
    """The plain model's greedy text, and that of a setting; see :func:`plain_and_masked`. ``extra_passes`` are the setting's."""
    from interp.evaluation.baselines import check_together
    from interp.models.anatomy import anatomy
    from interp.tracing.session import hooked

    session = None
    if not setting.plain:
        # Made before the plain run: it refuses heads that the model does not have.
        interventions = setting.on(anatomy(model.module))
        check_together(interventions)
        session = hooked(model, interventions=interventions)
    text, ids = common.generate_text(model, inputs, max_new_tokens, "plain")
    result: dict[str, Any] = {"plain": text, "plain_ids": ids}
    if session is not None:
        with session:
            masked, masked_ids = common.generate_text(model, inputs, max_new_tokens, "changed", beams=setting.beams)
        result.update(masked=masked, masked_ids=masked_ids, same=ids == masked_ids, extra_passes=session.extra_forwards)
    return result


def show_texts(result: dict[str, Any], title: str) -> None:
    """Both texts side by side, or the plain one alone."""
    if "masked" not in result:
        typer.echo(result["plain"])
        return
    common.show(common.table("", ("plain", title), [(result["plain"], result["masked"])]))
    if result["same"]:
        typer.echo("The tokens are the same.")
