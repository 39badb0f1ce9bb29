"""The command ``headscope evaluate``: a table of settings on a probe."""

from __future__ import annotations

import ast
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Annotated, Any, Self

import typer

from interp import cli_common as common
from interp.cli_common import DeviceOption, DTypeOption, JsonOption, ModelName, TrustOption, UsageError, friendly
from interp.cli_dashboard import read_interventions
from interp.cli_generate import WithOption

SPLITS = ("test", "against", "dev")
LINE_EVERY = 30.0


@friendly
def evaluate(
    model: ModelName,
    probe: Annotated[
        str, typer.Option(help="chair, captions, pope, margin, needle, or a probe by name such as IndirectObject.")
    ],
    methods: WithOption = None,
    interventions: Annotated[
        list[Path] | None, typer.Option(help="JSON that the page exports, one more setting; again for more.")
    ] = None,
    random: Annotated[
        int, typer.Option(min=0, help="Controls of each setting with heads: so many draws of other heads, layer by layer.")
    ] = 0,
    n: Annotated[int | None, typer.Option(min=1, help="Scenes, images or samples (64; a probe's own number).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of scenes, draws and the bootstrap.")] = 0,
    split: Annotated[str, typer.Option(help="Of the bundled scenes: test, against (companions missing) or dev.")] = "test",
    images: Annotated[Path | None, typer.Option(help="Folder of pictures, in place of the bundled scenes.")] = None,
    coco: Annotated[Path | None, typer.Option(help="COCO's instances_*.json: what is in the pictures.")] = None,
    coco_captions: Annotated[Path | None, typer.Option(help="COCO's captions_*.json: what they name counts, too.")] = None,
    questions: Annotated[Path | None, typer.Option(help="POPE's questions, a .jsonl; --images has their pictures.")] = None,
    items: Annotated[
        Path | None, typer.Option(help="JSONL of margins: prompt, prefix, present, absent, and maybe image, a line.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="name=value of a probe by name; again for more.")] = None,
    request: Annotated[str | None, typer.Option(help="What is asked for a caption, or with {} around a question.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put requests in the model's chat template.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one call.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 160,
    folder: Annotated[Path | None, typer.Option(help="Folder of the answers: a killed run goes on; results are put there.")] = None,
    out: Annotated[list[Path] | None, typer.Option(help="Write to .json, .csv, .html, .svg or .pdf; again for more.")] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out what cannot act on this model, and say why.")] = False,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Compare settings on a probe: the metric with its interval, the plain model beside it, what it costs.

    Each --with is a row: methods of `headscope interventions` with their arguments, VCD, DoLa, beam=5, joined by +. The second
    line of a cell is the paired difference to the plain model, resampled by image.
    """
    from interp.evaluation.report import FORMATS
    from interp.evaluation.settings import Setting, heads_of, parse_setting, random_control

    for path in out or ():
        if path.suffix not in FORMATS:
            raise UsageError(f"--out must end in one of {', '.join(FORMATS)}, got {path}")
    settings = [parse_setting(text) for text in methods or ()]
    for path in interventions or ():
        made, _ = read_interventions(path)
        settings.append(Setting(path.stem, tuple(made)))
    with_heads = [s for s in settings if s.random is None and any(heads_of(i) is not None for i in s.interventions)]
    if random and not with_heads:
        raise UsageError("--random must stand beside a method with heads, such as --with 'MaskHeads(L3H1)'")
    settings += [random_control(s, seed + k) for s in with_heads for k in range(random)]
    task = read_task(
        probe, n=n, seed=seed, split=split, images=images, coco=coco, coco_captions=coco_captions, questions=questions, items=items,
        settings=_settings(setting), request=request, chat=chat, batch=batch, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    loaded = common.load_model(model, dtype, device, trust_remote_code)
    from interp.evaluation.report import as_json as told
    from interp.evaluation.report import cells, header, write
    from interp.evaluation.running import evaluate as run
    from interp.evaluation.tasks import Statistics

    with Bars() as bars:
        result = run(
            loaded,
            task,
            settings,
            folder=folder,
            batch=batch,
            refuse=not skip,
            how=Statistics(seed=seed),
            progress=bars,
        )
    written = [
        *(out or ()),
        *(() if folder is None else (folder / f"results{end}" for end in (".json", ".csv", ".html"))),
    ]
    for path in written:
        write(result, path)
    if as_json:
        common.show_json(told(result))
        return
    title = (
        f"{task.name}, {result.about['model']}, n = {result.about['n']}; below each value: difference to greedy, paired"
    )
    _show(common.table(title, header(result), [cells(result, row) for row in result.rows]))
    _matched(result)
    if result.resumed:
        typer.echo(f"{result.resumed} answers were there before")
    for path in written:
        typer.echo(f"written to {path}")


def _matched(result: Any) -> None:
    """CHAIR at the baseline's length and recall: without it a shorter text wins."""
    rows: list[list[str]] = []
    for row in result.rows[1:]:
        for on in ("words", "recall"):
            both = row.more.get(f"matched_{on}")
            if both is not None:
                d = [
                    f"{v:+.3f} [{low:+.3f}, {high:+.3f}]"
                    for v, low, high, _ in (both["differences"][k] for k in ("chair_s", "chair_i"))
                ]
                rows.append([row.setting.name, on, *d, str(both["left_out"])])
    if rows:
        columns = ("setting", "same", "chair s, difference", "chair i, difference", "left out")
        _show(common.table("Captions cut to the same length, or at the same recall, pair by pair", columns, rows))


def _show(table: Any) -> None:
    """Intervals are not folded where no terminal sets the width."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=max(240, console.width))).print(table)


def read_task(
    probe: str, *, n: int | None, seed: int, split: str, images: Path | None, coco: Path | None, coco_captions: Path | None,
    questions: Path | None, items: Path | None, settings: dict[str, Any], request: str | None, chat: bool, batch: int,
    max_new_tokens: int,
) -> Any:  # fmt: skip
    """The task that the options name, before any model is loaded.

    Raises:
        UsageError: options that do not belong to the probe, files that are not there.
    """
    if split not in SPLITS:
        raise UsageError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}")
    given = {"--images": images, "--coco": coco, "--coco-captions": coco_captions, "--questions": questions, "--items": items,
             "--set": settings or None}  # fmt: skip
    fits = {"chair": ("--images", "--coco", "--coco-captions"), "captions": ("--images",),
            "pope": ("--images", "--coco", "--questions"), "margin": ("--items",)}.get(probe, ("--set",))  # fmt: skip
    if wrong := [name for name, value in given.items() if value is not None and name not in fits]:
        raise UsageError(f"--probe {probe} must come without {', '.join(wrong)}; it takes {', '.join(fits)}")
    for name, path in given.items():
        if isinstance(path, Path) and not (path.is_dir() if name == "--images" else path.is_file()):
            raise UsageError(f"{name} must be a {'folder' if name == '--images' else 'file'}, got {path}")
    if (coco or questions) and images is None:
        raise UsageError("--images must be given with --coco and --questions: the folder of their pictures")
    from interp.evaluation import captions, forced, pope
    from interp.evaluation.answers import registered

    options: dict[str, Any] = {"chat": True if chat else None, "max_new_tokens": max_new_tokens}
    if request is not None and probe in ("chair", "captions"):
        options["request"] = request
    if probe == "captions" or (probe == "chair" and images is not None and coco is None):
        if probe == "chair":
            raise UsageError(
                "--coco must be given with --images: CHAIR needs to know what is in the pictures (or take captions)"
            )
        if images is None:
            raise UsageError("--images must be given for captions (the bundled scenes are judged: take chair)")
        return captions.folder_captions(images, n, **options)
    if probe == "chair":
        if coco is not None and images is not None:
            return captions.coco_captions(coco, images, n, captions=coco_captions, seed=seed, **options)
        return captions.scene_captions(split, n or 64, seed=seed, max_new_tokens=max_new_tokens)
    if probe == "pope":
        if images is None:
            return pope.scene_pope(n or 64, split=split, seed=seed, batch=batch)
        how: dict[str, Any] = {"n": n, "seed": seed, "prompt": request or "{}", "chat": options["chat"], "batch": batch}
        return pope.file_pope(images, questions=questions, coco=coco, **how)
    if probe == "margin" and items is not None:
        return forced.file_margins(items, n, chat=chat, batch=batch)
    if probe == "margin":
        return forced.scene_margins(split, n or 64, seed=seed, batch=batch)
    return registered(probe, n, seed, settings)


def _settings(texts: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        if not sign or not name.strip().isidentifier():
            raise UsageError(f"--set must be name=value, got {text!r}")
        try:
            found[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name.strip()] = value
    return found


class Bars:
    """A bar a setting where somebody watches, lines where a log is kept."""

    def __init__(self) -> None:
        self._console = common.stderr()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._told = monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        if self._bars is not None:
            from rich.markup import escape

            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(escape(name), total=total)
            self._bars.update(self._tasks[name], completed=done)
        elif monotonic() - self._told >= LINE_EVERY:
            self._told = monotonic()
            typer.echo(f"evaluate: {name}: {done} of {total}", err=True)
