"""What the commands of ``headscope`` share: errors in one line, loading with a notice, inputs, tables and JSON."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from interp.models.model import Model

BAD_INPUT = 2
FAILED = 1
CHECK_TEXT = "The old lighthouse keeper counted the ships, and then he counted the ships again."

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file, hub id or bundled name.")]
DTypeOption = Annotated[str | None, typer.Option(help="Weights as this torch dtype, e.g. float32 or bfloat16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
TextOption = Annotated[str | None, typer.Option(help="The text to run on.")]
ImageOption = Annotated[list[Path] | None, typer.Option(help="A picture; give it again for several.")]
TokensOption = Annotated[int, typer.Option(min=0, help="Tokens to generate (greedy).")]


class UsageError(ValueError):
    """An argument of a command that cannot be used; the message names it, the rule and what was got."""


def friendly(function: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that the user can mend into one line on stderr and exit code 2.

    Anything else keeps its traceback: it is our mistake, and hiding it would make it unfindable. ``HEADSCOPE_DEBUG=1``
    keeps them all.
    """

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        from interp.tracing.installation import SessionError
        from interp.tracing.store import TraceStoreError

        try:
            function(*args, **kwargs)
        except (ValueError, LookupError, OSError, ImportError, SessionError, TraceStoreError) as error:
            if os.environ.get("HEADSCOPE_DEBUG"):
                raise
            message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            typer.echo(f"headscope: {' '.join(message.split()) or type(error).__name__}", err=True)
            raise typer.Exit(BAD_INPUT) from None

    return command


def stderr() -> Any:
    """A rich console on stderr: progress and notices, so that stdout holds results alone."""
    from rich.console import Console

    return Console(stderr=True)


def show(renderable: Any) -> None:
    """Print to stdout with rich, at least 100 columns where the output is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(100, console.width))
    console.print(renderable)


def show_json(value: Any) -> None:
    from interp.files import jsonable

    typer.echo(json.dumps(finite(jsonable(value, "result")), indent=2, ensure_ascii=False, allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A rich table of plain text: brackets in model output are no markup."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=escape(title), title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    return made


def load_model(name: str, dtype: str | None, device: str | None, trust_remote_code: bool) -> Model:
    """``interp.load`` with a notice on stderr, and the device checked before weights are read."""
    import torch

    from interp.models.loading import load

    if device is not None:
        try:
            wanted = torch.device(device)
        except RuntimeError:
            raise UsageError(f"--device must be a torch device such as cpu or cuda:0, got {device!r}") from None
        if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"--device must exist; this machine has {torch.cuda.device_count()} CUDA devices, got {device!r}"
            )
    with working(f"loading {name}"), without_bars():
        return load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


@contextmanager
def without_bars() -> Iterator[None]:
    """Transformers' own bar counts tensors, on stderr, also where nobody watches; the notice says as much."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def read_text(text: str | None, text_file: Path | None) -> str | None:
    """The text of ``--text`` or ``--text-file``."""
    if text is not None and text_file is not None:
        raise UsageError("--text and --text-file must not both be given")
    if text_file is None:
        return text
    if not text_file.is_file():
        raise UsageError(f"--text-file must be a file, got {text_file}")
    return text_file.read_text(encoding="utf-8")


def read_images(images: list[Path] | None) -> Any:
    """What ``Model.encode`` takes for ``--image``: None, one path or several."""
    for image in images or []:
        if not image.is_file():
            raise UsageError(f"--image must be a file, got {image}")
    if not images:
        return None
    return images[0] if len(images) == 1 else list(images)


def check_inputs(model: Model, text: str | None, pictures: Any) -> Any:
    """Inputs to compare two computations on: what was given, else a text of ours and, where the model sees, noise."""
    from interp.models.anatomy import anatomy

    shape = anatomy(model)
    shape.require_sites()
    content = text if text is not None or model.tokenizer is None else CHECK_TEXT
    if pictures is None and "vision" in shape.stacks and model.processor is not None:
        import numpy as np

        pictures = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    return model.encode(content, pictures)


def read_score(path: Path, model: Model | None = None) -> Any:
    """A score of any file that has one; a table of KV heads needs the model."""
    from interp.scores import read_score as read

    if not path.is_file():
        raise UsageError(f"a score must be a file, got {path}")
    if path.suffix == ".tsv" and model is None:
        raise UsageError(f"MODEL must be given for a .tsv: how many query heads share a KV head, got {path} alone")
    return read(path, group_size=group_size(model, "text") if model is not None and path.suffix == ".tsv" else None)


def group_size(model: Model, stack: str) -> int:
    """Query heads per KV head.

    Raises:
        UsageError: no such stack, or layers that differ.
    """
    from interp.models.anatomy import anatomy

    sizes = sorted({site.n_heads // site.n_kv_heads for site in anatomy(model).stacks.get(stack, ())})
    if len(sizes) != 1:
        raise UsageError(
            f"MODEL must have one number of query heads per KV head in stack {stack!r}, got {sizes or 'none'}"
        )
    return sizes[0]


def read_layers(text: str | None) -> list[int] | None:
    """``0,3-5`` as layer numbers."""
    if text is None:
        return None
    out: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UsageError(f"--layers must be numbers and ranges such as 0,3-5, got {text!r}")
        out.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return out


def generate_text(
    model: Model, inputs: Any, max_new_tokens: int, label: str, *, beams: int = 1
) -> tuple[str, list[int]]:
    """Greedy continuation or that of beam search (text, ids), with a progress bar on a terminal."""
    import torch
    from rich.progress import Progress

    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress, torch.no_grad():
        task = progress.add_task(label, total=max_new_tokens)
        # Beam search takes no streamer.
        told = {"streamer": _Counter(progress, task)} if beams == 1 else {}
        ids = model.generate(inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=beams, **told)
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    new = ids[0].tolist()[0 if encoder_decoder else inputs["input_ids"].shape[1] :]
    return model.decode(new), new


class _Counter:
    """A transformers streamer that moves a progress bar."""

    def __init__(self, progress: Any, task: Any) -> None:
        self.progress, self.task, self.prompt = progress, task, True

    def put(self, value: Any) -> None:
        if self.prompt:
            self.prompt = False
            return
        self.progress.advance(self.task)

    def end(self) -> None:
        return


def finite(value: Any) -> Any:
    """NaN as null: JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value
