"""The commands ``headscope diff`` and ``headscope rank-data``, and the list of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from interp import cli_common as common
from interp.cli_common import DeviceOption, DTypeOption, JsonOption, ModelName, TrustOption, UsageError, friendly

FIGURES = (".html", ".pdf", ".svg")
ADAPTER = "adapter_config.json"


def list_scores(as_json: bool) -> None:
    """Print every score, and every analysis that gives no number a head, with what it needs."""
    from interp import analysis

    scores, others = analysis.scores(), analysis.analyses()
    if as_json:
        rows: list[dict[str, Any]] = []
        for kind, found in (("score", scores), ("analysis", others)):
            rows += [
                {"kind": kind, **e._asdict(), "settings": {k: str(v) for k, v in e.settings.items()}} for e in found
            ]
        common.show_json(rows)
        return
    cells = [(e.name, e.summary, e.unit, ", ".join(e.stacks), e.probe, e.needs or "any model") for e in scores]
    common.show(common.table("Scores", ("name", "what", "unit", "stacks", "probe", "needs"), cells))
    cells = [(e.name, e.module.removeprefix("interp.analysis."), e.summary, e.unit, e.needs) for e in others]
    common.show(
        common.table(
            "Analyses that give no number a head: from interp.analysis.<module> import <name>",
            ("name", "module", "what", "unit", "needs"),
            cells,
        )
    )


@friendly
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model, as for `headscope info`: the base.")],
    b: Annotated[
        str,
        typer.Argument(metavar="B", help="Another with the same heads: tuned, a later step, or a PEFT adapter of A."),
    ],
    score: Annotated[
        list[str] | None, typer.Option("--score", help="One of `headscope scores`; again for more.")
    ] = None,
    probe: Annotated[str | None, typer.Option(help="A probe by name for all scores, such as NeedleInHaystack.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads of each score to show.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Write all heads to .json or .csv, a figure to .html, .pdf, .svg.")
    ] = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare the head scores of two checkpoints, head by head, on the same samples."""
    from interp import analysis

    known = [entry.name for entry in analysis.scores()]
    wrong = [name for name in score or () if name not in known]
    if wrong:
        raise UsageError(f"--score must be one of {', '.join(known)}, got {wrong[0]!r}")
    if out is not None and out.suffix not in (".json", ".csv", *FIGURES):
        raise UsageError(f"--out must end in .json, .csv, .html, .pdf or .svg, got {out}")
    task: Any = None
    if probe is not None:
        from probes import probe as find

        task = find(probe)()
    from interp.analysis.diff import DEFAULT, diff_table
    from interp.analysis.diff import diff as compare

    loaded = [common.load_model(a, dtype, device, trust_remote_code)]
    if (Path(b) / ADAPTER).is_file():
        # A model of its own: an adapter is put into the modules of the one that it is given.
        loaded.append(_adapted(common.load_model(a, dtype, device, trust_remote_code), Path(b)))
    else:
        loaded.append(common.load_model(b, dtype, device, trust_remote_code))
    result = compare(*loaded, scores=score or DEFAULT, probe=task)
    rows = diff_table(result)
    if out is not None:
        _write_diff(result, rows, out)
    summary = {str(n): {"rho": float(r)} for n, r in zip(result["score"].values, result["rho"].values, strict=True)}
    if as_json:
        common.show_json(common.finite({**result.attrs, "scores": summary, "heads": diff_table(result, top)}))
        return
    for name in result["score"].values:
        shown = [r for r in diff_table(result, top) if r["score"] == name]
        columns = ("id", "a", "b", "difference", "se", "p_adjusted")
        cells = [[f"{r[c]:.4g}" if isinstance(r[c], float) else r[c] for c in columns] for r in shown]
        common.show(common.table(f"{name}, rank agreement {summary[str(name)]['rho']:.3f}", columns, cells))
    if out is not None:
        typer.echo(f"written to {out}")


def _adapted(base: Any, folder: Path) -> Any:
    """The base with a PEFT adapter.

    Raises:
        UsageError: PEFT is not installed, or the adapter does not fit the model.
    """
    from interp.models.model import Model

    try:
        from peft import PeftModel
    except ImportError:
        raise UsageError(f"B must be a whole model where peft is not installed, got the adapter {folder}") from None
    try:
        wrapped = PeftModel.from_pretrained(base.module, str(folder)).eval()
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"B must be an adapter of A, got {folder}: {error}") from error
    return Model(wrapped, processor=base.processor, tokenizer=base.tokenizer, name=f"{base.name} with {folder.name}")


def _write_diff(result: Any, rows: list[dict[str, Any]], out: Path) -> None:
    from interp.files import jsonable, write_whole

    if out.suffix == ".json":
        found = {**result.attrs, "heads": rows}
        write_whole(out, json.dumps(common.finite(jsonable(found, "diff")), indent=2, allow_nan=False))
    elif out.suffix == ".csv":
        import pandas as pd

        from interp.scores_files import write_csv

        write_csv(pd.DataFrame(rows), out)
    else:
        from interp.analysis.diff import diff_figure
        from interp.scores_files import write_image

        figure = diff_figure(result)
        if out.suffix == ".html":
            write_whole(out, figure.to_html(include_plotlyjs=True))
        else:
            write_image(figure, out, "pdf" if out.suffix == ".pdf" else "svg")


@friendly
def rank_data(
    model: ModelName,
    data: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL: an object with a text a line.")],
    heads: Annotated[str | None, typer.Option(help="Retrieval heads, such as L3H1,L5H0-3.")] = None,
    from_score: Annotated[
        Path | None,
        typer.Option(help="A score's .json or .csv, Retrieval_Head's .json, DuoAttention's .tsv: its strongest heads."),
    ] = None,
    share: Annotated[float, typer.Option(help="How many of all heads are masked, where they are not given.")] = 0.05,
    field: Annotated[str, typer.Option(help="Entry of the object that holds the text.")] = "text",
    domain: Annotated[str | None, typer.Option(help="Entry that names the domain: ranks are within one.")] = None,
    top: Annotated[float, typer.Option(help="Share of each domain that counts as selected.")] = 0.2,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a text that are read.")] = 4096,
    out: Annotated[Path | None, typer.Option(help="Write the ranked lines to this .jsonl.")] = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rank texts by AttentionInfluence: what they lose when the retrieval heads of a small model look everywhere alike.

    Heads are given, taken from a score, or found by the score `retrieval` on the model first.
    """
    if heads is not None and from_score is not None:
        raise UsageError("--heads and --from-score must not both be given")
    if not data.is_file():
        raise UsageError(f"FILE must be a JSONL file, got {data}")
    if out is not None and out.suffix != ".jsonl":
        raise UsageError(f"--out must end in .jsonl, got {out}")
    from interp.analysis.attention_influence import rank_jsonl, strongest

    loaded = common.load_model(model, dtype, device, trust_remote_code)
    chosen: Any = heads
    if from_score is not None:
        chosen = strongest(common.read_score(from_score, loaded), share)
    elif heads is None:
        from interp import analysis

        chosen = strongest(analysis.score("retrieval", loaded), share)
    ranked = rank_jsonl(loaded, data, chosen, out=out, field=field, domain=domain, top=top, max_length=max_length)
    for line, why in ranked.problems:
        typer.echo(f"headscope: line {line} is left out: {why}", err=True)
    found = {"heads": str(chosen), "scored": len(ranked.records), "left_out": [list(p) for p in ranked.problems]}
    if as_json:
        keys = ("line", "attention_influence", "loss", "masked_loss", "rank", "selected", *([domain] if domain else []))
        common.show_json({**found, "records": [{k: r[k] for k in keys} for r in ranked.records]})
        return
    rows = [
        (
            r["line"],
            f"{r['attention_influence']:.4f}",
            f"{r['loss']:.4f}",
            r["rank"],
            "yes" if r["selected"] else "",
            r[field][:60],
        )
        for r in ranked.records[:20]
    ]
    common.show(common.table(f"masked: {chosen}", ("line", "influence", "loss", "rank", "selected", "text"), rows))
    typer.echo(
        f"{len(ranked.records)} ranked, {len(ranked.problems)} left out" + (f"; written to {out}" if out else "")
    )
