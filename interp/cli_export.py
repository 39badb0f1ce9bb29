"""The command ``headscope export``: a saved trace, or a model's run on a text, in the forms that other tools read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from interp import cli_common as common
from interp.cli_common import DeviceOption, DTypeOption, ImageOption, TrustOption, UsageError, friendly
from interp.cli_dashboard import write_page

FORMS = ("page", "headvis", "bertviz", "circuitsvis")
SUFFIXES = {"page": (".html",), "headvis": ("",), "bertviz": (".html", ".json"), "circuitsvis": (".html", ".json")}
VIEWS = ("head", "model")
DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body>
{body}
</body>
</html>
"""


@friendly
def export(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Saved traces (.zarr; one, for headvis several); with --text or --image one MODEL to run."
        ),
    ],
    to: Annotated[
        str | None, typer.Option("--to", help="page, headvis, bertviz or circuitsvis; each is described above.")
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="The same as --to page.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .html, or .json (bertviz, circuitsvis); headvis: a folder. Default: beside a trace."),
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads such as L3H1,L5H0-3. Default: page 12, headvis all; circuitsvis needs these or --layer.")
    ] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="circuitsvis: all heads of this layer.")] = None,
    stack: Annotated[str | None, typer.Option(help="Of the heads: text (default), vision, encoder, cross, ...")] = None,
    sample: Annotated[int, typer.Option(min=0, help="bertviz, circuitsvis: number of the sample in the trace.")] = 0,
    view: Annotated[str, typer.Option(help="bertviz: head or model.")] = "head",
    score: Annotated[
        list[Path] | None,
        typer.Option(help="headvis: a score's file (.json, Retrieval_Head's .json) as one more axis; again for more."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to run MODEL on; headvis: again for more.")] = None,
    lines: Annotated[Path | None, typer.Option(help="headvis: a UTF-8 file with a text a line to run MODEL on.")] = None,
    image: ImageOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="headvis: replace a folder that this wrote.")] = False,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
) -> None:  # fmt: skip
    """Write a trace for other tools.

    page: one self-contained HTML page (overview, maps of chosen heads, table). headvis: the data folder of HeadVis' page, any number of
    sequences. bertviz: head_view or model_view as .html (needs the package bertviz; the page loads scripts from a network), or its
    arguments as .json. circuitsvis: attention_heads, likewise. All but page need a trace with full maps (headscope trace
    --attention), or MODEL with --text.
    """
    form = _form(to, html)
    texts = _texts(text, lines)
    runs_model = bool(texts) or image is not None
    _check(form, source, out, view, heads, layer, texts, runs_model)
    target = _target(form, source[0], out, runs_model)
    if form == "headvis" and target.exists() and not overwrite:
        raise UsageError(f"--out must not exist (or give --overwrite), got {target}")
    capture = _capture(form, stack, heads, layer)
    loading = (dtype, device, trust_remote_code)
    with _traces(source, texts, image, capture, loading, runs_model) as paths:
        if form == "page":
            written = write_page(paths[0], target, heads)
        elif form == "headvis":
            from interp.exports import write_headvis

            scores = [common.read_score(path) for path in score or ()]
            written = write_headvis(
                paths, target, heads=heads, stack=stack or "text", scores=scores, overwrite=overwrite
            )
        else:
            written = _write_view(form, paths[0], target, heads, layer, stack, sample, view)
    size = sum(f.stat().st_size for f in ([written] if written.is_file() else written.rglob("*")) if f.is_file())
    typer.echo(f"written to {written} ({size / 1e6:.1f} MB)")


def _form(to: str | None, html: bool) -> str:
    if html and to not in (None, "page"):
        raise UsageError(f"--html is --to page and must not be given with --to {to}")
    form = "page" if html else to
    if form not in FORMS:
        raise UsageError(f"--to must be given as one of {', '.join(FORMS)} (or --html), got {to or 'none'}")
    return form


def _texts(text: list[str] | None, lines: Path | None) -> list[str]:
    found = list(text or ())
    if lines is not None:
        if not lines.is_file():
            raise UsageError(f"--lines must be a file, got {lines}")
        found += [line for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise UsageError(f"--lines must hold at least one line of text, got {lines}")
    return found


def _check(
    form: str, source: Sequence[str], out: Path | None, view: str, heads: str | None, layer: int | None, texts: Sequence[str],
    runs_model: bool,
) -> None:  # fmt: skip
    """Everything that can be told before a model or a trace is opened."""
    if out is not None and out.suffix not in SUFFIXES[form] and form != "headvis":
        raise UsageError(f"--out must end in {' or '.join(SUFFIXES[form])} for {form}, got {out}")
    if out is not None and form != "headvis" and out.is_dir():
        raise UsageError(f"--out must be a file, got the folder {out}")
    if view not in VIEWS:
        raise UsageError(f"--view must be head or model, got {view!r}")
    if len(source) > 1 and (runs_model or form != "headvis"):
        what = "model with --text or --image" if runs_model else f"trace for {form}"
        raise UsageError(f"SOURCE must be one {what}, got {len(source)}")
    if len(texts) > 1 and form != "headvis":
        raise UsageError(f"--text must be one for {form}, got {len(texts)} (headvis takes several)")
    if runs_model and out is None:
        raise UsageError("--out must be given where a model is run, got none")
    if form == "circuitsvis" and (heads is None) == (layer is None):
        raise UsageError(
            "one of --heads and --layer must be given for circuitsvis, got " + ("none" if heads is None else "both")
        )
    if form == "bertviz" and heads is not None:
        raise UsageError("--heads must be left out for bertviz, which shows all heads of a layer")
    if out is None or out.suffix == ".html":
        _require(form)


def _require(form: str) -> None:
    if form in ("bertviz", "circuitsvis") and not find_spec(form):
        raise UsageError(f"{form} as .html needs the package {form}: pip install {form}; --out FILE.json needs none")


def _target(form: str, source: str, out: Path | None, runs_model: bool) -> Path:
    if out is not None:
        return out
    assert not runs_model
    trace = Path(source)
    endings = {"page": ".html", "headvis": ".headvis", "bertviz": ".bertviz.html", "circuitsvis": ".circuitsvis.html"}
    return trace.with_name(trace.stem + endings[form])


def _capture(form: str, stack: str | None, heads: str | None, layer: int | None) -> dict[str, Any]:
    """What is asked of a model that is run."""
    if form == "page":
        return {"row_stats": True, "pooled": 64}
    wanted: dict[str, Any] = {"attention": True, "stacks": None if stack is None else (stack,)}
    if form == "circuitsvis":
        wanted |= {"heads": heads} if heads is not None else {"layers": [layer]}
    return wanted | ({"heads": heads} if form == "headvis" and heads is not None else {})


@contextmanager
def _traces(
    source: Sequence[str], texts: Sequence[str], image: list[Path] | None, capture: Mapping[str, Any],
    loading: tuple[str | None, str | None, bool], runs_model: bool,
) -> Iterator[list[Path]]:  # fmt: skip
    """Saved traces; those of a model that is run lie in a temporary folder, so that no more than one is in memory."""
    if not runs_model:
        for path in source:
            if not Path(path).is_dir():
                raise UsageError(
                    f"SOURCE must be a saved trace, which cannot be opened here: {path} (a model needs --text or --image)"
                )
        yield [Path(path) for path in source]
        return
    import torch

    from interp.tracing.capture import Capture
    from interp.tracing.session import hooked

    pictures = common.read_images(image)
    loaded = common.load_model(source[0], *loading)
    with tempfile.TemporaryDirectory() as folder:
        paths: list[Path] = []
        for number, text in enumerate(texts or [None]):
            inputs = loaded.encode(text, pictures)
            with hooked(loaded, capture=Capture(**capture)) as run, torch.no_grad(), common.working("tracing"):
                loaded(inputs)
            paths.append(run.trace.save(Path(folder) / f"{number}.zarr"))
        yield paths


def _write_view(
    form: str, path: Path, target: Path, heads: str | None, layer: int | None, stack: str | None, sample: int, view: str
) -> Path:
    from interp.exports import bertviz_inputs, circuitsvis_inputs
    from interp.files import write_whole
    from interp.tracing.trace import Trace

    trace = Trace.open(path)
    if form == "bertviz":
        function, arguments = f"{view}_view", bertviz_inputs(trace, stack, sample=sample)
    else:
        function = "attention_heads"
        arguments = circuitsvis_inputs(trace, heads, layer=layer, stack=stack or "text", sample=sample)
    if target.suffix == ".json":
        held = {"for": form, "function": function, "arguments": {k: plain(v) for k, v in arguments.items()}}
        return write_whole(target, json.dumps(held, ensure_ascii=False, allow_nan=False))
    _require(form)
    if form == "bertviz":
        import bertviz  # pyright: ignore[reportMissingImports]  # optional, and asked for by name above

        body = str(getattr(bertviz, function)(**arguments, html_action="return").data)
    else:
        import circuitsvis  # pyright: ignore[reportMissingImports]  # the same

        body = str(circuitsvis.attention.attention_heads(**arguments))
    return write_whole(target, DOCUMENT.format(title=f"{form}: {path.stem}", body=body))


def plain(value: Any) -> Any:
    """Tensors as lists of numbers (fp32 in six digits; NaN, of a layer without maps, as null), all else as it is."""
    import torch

    if isinstance(value, torch.Tensor):
        return _rounded(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return None if value != value else float(f"{value:.6g}")  # noqa: PLR0124 - NaN is the number that is not itself
