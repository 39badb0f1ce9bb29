"""The command ``headscope score``: every head of a model by a score, or a score's file, as a table, a figure or another's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from interp import cli_common as common
from interp.cli_analysis import list_scores
from interp.cli_common import DeviceOption, DTypeOption, JsonOption, ModelName, TrustOption, UsageError, friendly

FORMATS = {
    "table": (".csv", ".json"), "score": (".json",), "retrieval-head": (".json",), "duo-attention": (".tsv",),
    "figure": (".pdf", ".svg", ".html"),
}  # fmt: skip
REDUCE = ("equal", "mean", "max")


@friendly
def score(
    model: ModelName = "",
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="One of --list, or several.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show what there is and what each needs, then leave.")] = False,
    top: Annotated[int, typer.Option(min=1, help="How many heads to show.")] = 20,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A score's file in place of NAME: our .json or .csv, Retrieval_Head's .json, DuoAttention's .tsv (give MODEL)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write all heads to .csv, .json or .tsv (DuoAttention), a figure to .pdf, .svg or .html."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Of --out: table (.csv, .json), score (.json, all samples), retrieval-head (.json), duo-attention (.tsv), figure.",
        ),
    ] = None,
    reduce: Annotated[
        str, typer.Option(help="duo-attention: a KV head's gate is its query heads' mean or max; equal: they must agree.")
    ] = "equal",
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Score every head of a model, each score on its own probe; or show and convert a score's file."""
    if list_:
        list_scores(as_json)
        return
    from interp import analysis

    names = names or []
    known = [entry.name for entry in analysis.scores()]
    if from_ is not None and names:
        raise UsageError(f"NAME must be left out with --from, got {names[0]!r}")
    if from_ is None and (not model or not names):
        raise UsageError(f"MODEL and NAME must be given (--list shows the names), got {model or 'none'}")
    for name in names:
        if name not in known:
            raise UsageError(f"NAME must be one of {', '.join(known)}, got {name!r}")
    wanted = _format(out, form)
    if reduce not in REDUCE:
        raise UsageError(f"--reduce must be one of {', '.join(REDUCE)}, got {reduce!r}")
    if out is not None and len(names) > 1:
        raise UsageError(f"--out must be left out for several scores, got {len(names)}: it holds one")
    if wanted == "duo-attention" and not model:
        raise UsageError(
            "MODEL must be given with --format duo-attention: how many query heads share a KV head, got none"
        )
    loaded = common.load_model(model, dtype, device, trust_remote_code) if model else None
    found: list[dict[str, Any]] = []
    results = (
        [common.read_score(from_, loaded)] if from_ is not None else (analysis.score(name, loaded) for name in names)
    )
    for result in results:
        if out is not None:
            _write(result, out, wanted, loaded, reduce)
        if as_json:
            found.append(as_table(result, top))
        else:
            show_score(result, top)
    if as_json:
        common.show_json(found[0] if len(found) == 1 else found)
    elif out is not None:
        typer.echo(f"written to {out}")


def _format(out: Path | None, form: str | None) -> str:
    """The format of ``--out``, by its name where none is given."""
    if form is not None and form not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    if out is None:
        if form is not None:
            raise UsageError(f"--format is that of --out, which must be given, got --format {form} alone")
        return ""
    endings = [e for name in ([form] if form else FORMATS) for e in FORMATS[name]]
    if out.suffix not in endings:
        raise UsageError(
            f"--out must end in {', '.join(dict.fromkeys(endings))}{f' for {form}' if form else ''}, got {out}"
        )
    return form or next(name for name, ends in FORMATS.items() if out.suffix in ends)


def as_table(result: Any, top: int | None = None) -> dict[str, Any]:
    """JSON of a score: what it is, and its heads, the highest first."""
    frame = result.heads.table()
    attrs = {key: result.attrs.get(key) for key in ("name", "unit", "paper", "stack", "settings")}
    return {**attrs, "heads": (frame if top is None else frame.head(top)).to_dict("records")}


def show_score(result: Any, top: int) -> None:
    """Print the highest heads."""
    frame = result.heads.table().head(top)
    columns = [c for c in ("id", "value", "se", "n", "null") if c in frame]
    rows = [[f"{v:.4g}" if isinstance(v, float) else v for v in row] for row in frame[columns].to_numpy().tolist()]
    common.show(common.table(f"{result.attrs['name']}, {result.attrs['unit']}", columns, rows))


def _write(result: Any, out: Path, form: str, model: Any, reduce: str) -> None:
    from interp.files import jsonable, write_whole
    from interp.scores import save_score, write_retrieval_head_json

    if form == "score":
        save_score(result, out)
    elif form == "retrieval-head":
        write_retrieval_head_json(result, out)
    elif form == "duo-attention":
        _write_duo(result, out, model, reduce)
    elif form == "figure" and out.suffix == ".html":
        write_whole(out, result.heads.grid().to_html(include_plotlyjs=True))
    elif form == "figure":
        (result.heads.to_pdf if out.suffix == ".pdf" else result.heads.to_svg)(out)
    elif out.suffix == ".csv":
        result.heads.to_csv(out)
    else:
        write_whole(out, json.dumps(common.finite(jsonable(as_table(result), "score")), indent=2, allow_nan=False))


def _write_duo(result: Any, out: Path, model: Any, reduce: Any) -> None:
    """The table, and beside it the ``config.json`` that DuoAttention's loader reads, where the score says its window."""
    from interp.files import write_whole
    from interp.scores import write_duo_attention_tsv

    settings = result.attrs.get("settings") or {}
    sizes = {name: settings[name] for name in ("sink_size", "recent_size") if name in settings}
    config = out.with_name("config.json")
    if sizes and config.exists():
        held = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(held, dict) or {name: held.get(name) for name in sizes} != sizes:
            raise UsageError(f"--out must lie beside no config.json of other sizes than {sizes}, got {config}")
    write_duo_attention_tsv(result, out, group_size=common.group_size(model, str(result.attrs["stack"])), reduce=reduce)
    if sizes and not config.exists():
        write_whole(config, json.dumps(sizes) + "\n")
