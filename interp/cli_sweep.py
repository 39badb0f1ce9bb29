"""The command ``headscope sweep``: a score of every head over many prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from interp import cli_common as common
from interp.cli_common import DeviceOption, DTypeOption, JsonOption, ModelName, TrustOption, UsageError, friendly

PAIR = ("text", "corrupt", "answer", "foil")


@friendly
def sweep(
    model: ModelName,
    name: Annotated[str, typer.Option("--score", help="One of `headscope scores`.")] = "ablation",
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL: text, or text, corrupt, answer and foil, a line.")
    ] = None,
    probe: Annotated[str | None, typer.Option(help="A probe by name, such as IndirectObject.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Prompts at most (a probe's own number where it has one).")] = 16,
    kind: Annotated[str | None, typer.Option(help="Of an ablation: resample, mean, zero or uniform.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="loss, logit, logit_difference, probability, accuracy, jsd.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="name=value of the score, in JSON; again for more.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the job: what is done stays done.")] = None,
    part: Annotated[
        str | None, typer.Option(help="i/n: only the i-th of n parts, counted from 0 (SLURM arrays).")
    ] = None,
    split: Annotated[str, typer.Option(help="Tasks are a sample, or a layer of one.")] = "sample",
    shortlist: Annotated[
        int | None, typer.Option(min=1, help="Exact for the heads with the largest gradients only.")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, auto, or local to start one.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Of Ray; default one a GPU.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads to show.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the score to this .json (interp.scores.open_score reads it), or all heads to this .csv."
        ),
    ] = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every head over many prompts: exact ablations by default, resumable, here, on Ray or as an array of jobs."""
    if prompts is not None and probe is not None:
        raise UsageError("--prompts and --probe must not both be given")
    if out is not None and out.suffix not in (".csv", ".json"):
        raise UsageError(f"--out must end in .csv or .json, got {out}")
    settings = _settings(setting, kind=kind, metric=metric)
    lines = None if prompts is None else _lines(prompts)[:n]
    from interp.sweeps import sweep as run

    loading = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded = common.load_model(model, dtype, device, trust_remote_code)
    what = _probe(probe, n) if lines is None else _samples(lines, loaded)
    result = run(
        loaded if ray is None else model, what, score=name, folder=folder, part=_part(part), split=split,  # type: ignore[arg-type]
        shortlist=shortlist, ray=ray, workers=workers, load=None if ray is None else loading, **settings,
    )  # fmt: skip
    _write(result, out)
    for sample, why in json.loads(result.attrs["failed"]).items():
        typer.echo(f"headscope: prompt {sample} is left out: {why}", err=True)
    if as_json:
        common.show_json(_as_json(result, top))
        return
    _show(result, top)
    if out is not None:
        typer.echo(f"written to {out}")


def _settings(given: list[str] | None, **named: Any) -> dict[str, Any]:
    settings = {key: value for key, value in named.items() if value is not None}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set must be name=value, got {text!r}")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            # A bare word is text: --set positions=last.
            settings[key] = value
    return settings


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, slash, last = text.partition("/")
    if not slash or not first.isdigit() or not last.isdigit():
        raise UsageError(f"--part must be i/n such as 3/16, got {text!r}")
    return int(first), int(last)


def _lines(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Usable lines with their numbers from 1; the others are named on stderr and the rest goes on."""
    if not path.is_file():
        raise UsageError(f"--prompts must be a file, got {path}")
    found: list[tuple[int, dict[str, str]]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry: Any = json.loads(line)
            problem = (
                "" if isinstance(entry, dict) and isinstance(entry.get("text"), str) and entry["text"] else "no text"
            )
            some = [key for key in PAIR[1:] if isinstance(entry, dict) and key in entry]
            if not problem and some and len(some) < len(PAIR) - 1:
                problem = f"a pair needs {', '.join(PAIR)}, and it has only {', '.join(some)}"
        except json.JSONDecodeError as error:
            entry, problem = {}, "empty" if not line.strip() else f"no JSON ({error.msg})"
        if problem:
            typer.echo(f"headscope: line {number} of {path} is left out: {problem}", err=True)
        else:
            found.append((number, entry))
    if not found:
        raise UsageError(f"--prompts must have at least one line with text, got none in {path}")
    pairs = {len([key for key in PAIR if key in entry]) for _, entry in found}
    if len(pairs) > 1:
        raise UsageError(f"--prompts must be all texts or all pairs, got both in {path}")
    return found


def _samples(lines: list[tuple[int, dict[str, str]]], model: Any) -> list[Any]:
    from probes.contrast import text_pair
    from probes.samples import Sample, encode

    out: list[Any] = []
    for number, entry in lines:
        try:
            if "corrupt" in entry:
                out.append(text_pair(model, *(entry[key] for key in PAIR)))
            else:
                out.append(Sample(encode(model, entry["text"]), entry["text"]))
        except ValueError as error:
            typer.echo(f"headscope: line {number} is left out: {error}", err=True)
    if not out:
        raise UsageError("--prompts must have at least one line that this model can take, got none")
    return out


def _probe(name: str | None, n: int) -> Any:
    if name is None:
        return None
    from dataclasses import fields

    from probes import probe as found

    cls: Any = found(name)
    return cls(**({"n": n} if "n" in {f.name for f in fields(cls)} else {}))


def _as_json(result: Any, top: int) -> dict[str, Any]:
    frame = result.heads.table()
    keys = ("name", "unit", "paper", "stack", "settings", "missing", "failed", "seconds", "shortlist")
    attrs = {key: result.attrs[key] for key in keys if key in result.attrs}
    return {**attrs, "heads": frame.head(top).to_dict("records")}


def _write(result: Any, out: Path | None) -> None:
    if out is None:
        return
    if out.suffix == ".csv":
        result.heads.to_csv(out)
    else:
        from interp.scores import save_score

        save_score(result, out)


def _show(result: Any, top: int) -> None:
    frame = result.heads.table().head(top)
    columns = [c for c in ("id", "value", "se", "n", "ci_low", "ci_high", "null", "gradient") if c in frame]
    rows = [[f"{v:.4g}" if isinstance(v, float) else v for v in row] for row in frame[columns].to_numpy().tolist()]
    common.show(common.table(f"{result.attrs['name']}, {result.attrs['unit']}", columns, rows))
    if result.attrs["missing"]:
        typer.echo(f"{result.attrs['missing']} tasks are not done; the same command goes on with them")
    if "shortlist" in result.attrs:
        short = result.attrs["shortlist"]
        typer.echo(
            f"shortlist of {short['k']}: rank correlation of gradient and ablation {short['rho']:.3f} over its heads"
        )
