"""Arguments at random, for every command: no traceback, a refusal that names what was wrong, and nothing written on a refusal."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from interp.cli import app
from interp.models import loading


class Parameter(NamedTuple):
    """Of a command, read off its function: what Typer makes of it differs from release to release."""

    name: str
    kind: type
    options: tuple[str, ...]
    """Empty for an argument."""
    required: bool
    many: bool
    metavar: str


def parameters(function: Any) -> list[Parameter]:
    found: list[Parameter] = []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        base, info = get_args(hints[name])
        kinds = [kind for kind in (bool, int, float, Path) if kind.__name__ in str(base)]
        options: tuple[str, ...] = ()
        if isinstance(info, typer.models.OptionInfo):
            said = [one for text in info.param_decls or () for one in text.split("/") if one.startswith("--")]
            options = tuple(said) or ("--" + name.strip("_").replace("_", "-"),)
        required, many = parameter.default is inspect.Parameter.empty, "list" in str(base)
        found.append(Parameter(name, kinds[0] if kinds else str, options, required, many, info.metavar or ""))
    return found


COMMANDS = {
    info.name or info.callback.__name__: parameters(info.callback) for info in app.registered_commands if info.callback
}
RUN = {
    "info": [], "trace": ["--text", "x x x", "--row-stats", "--out", "made.zarr"],
    "generate": ["--prompt", "x x x", "--max-new-tokens", "2"],
    "check": ["--text", "x x x"],
}  # fmt: skip
"""Commands that are also run to their end, on a tiny model (they are quick there), with what each needs."""

MODELS = ("model", "models", "source", "a", "b")
TEXTS = (
    "",
    " ",
    "x",
    "-",
    "L0H0",
    "L0H0-1,L2H3",
    "L9H9",
    "L0H*",
    "0,2",
    "9",
    "3-1",
    "é💥",
    "[]",
    "{}",
    "[bold]",
    "a" * 300,
    "None",
    "1/2",
)
WORDS = {
    "device": ("cpu", "fridge", "cuda:99", ""), "dtype": ("float32", "float99", "", "Tensor"), "kind": ("zero", "mean", "half", ""),
    "scope": ("all", "decode", "never"), "split": ("test", "dev", "nowhere", "sample", "layer"), "part": ("0/2", "2/2", "-1/3", "a/b", "1"),
    "methods": ("VHR(alpha=2)", "VHR(", "PAI(.2)+beam=0", "Nonsense", "MaskHeads(L9H9)", "greedy", "VHR(alpha=None)", "__import__('os')"),
    "score": ("sink", "nonsense", ""), "name": ("sink", "nonsense", ""), "names": ("sink", "nonsense", ""), "metric": ("loss", "joy"),
    "probe": ("chair", "pope", "margin", "captions", "IndirectObject", "Nonsense", ""), "setting": ("n=2", "n", "=1", "n=[", "no such=1"),
    "stacks": ("text", "vision", "", ","), "layers": ("0", "0-1", "2,0", "9", "-1", "x"), "ray": ("nowhere:1",),
    "to": ("page", "headvis", "tsv", ""),
}  # fmt: skip
PATHS = (
    "missing",
    "there.txt",
    "there.json",
    "folder",
    "no/such/out.json",
    "out.json",
    "out.csv",
    "out.zarr",
    "out.html",
    "out",
    "",
)


class Outcome(NamedTuple):
    code: int
    told: str
    error: BaseException | None
    wrote: list[str]


def values(parameter: Parameter, model: str) -> st.SearchStrategy[str]:
    if parameter.name in MODELS:
        # A name of the hub is looked up and not found: tests are offline.
        return st.sampled_from((*[model] * 9, "missing/", "./missing", "folder", "there.txt", "", "no-one/has-this"))
    if parameter.kind is Path:
        return st.sampled_from(PATHS)
    if parameter.kind is int:
        return st.sampled_from(("-1", "0", "1", "2", "x", "1.5", ""))
    if parameter.kind is float:
        return st.sampled_from(("nan", "inf", "-1", "0", "0.5", "2", "x", ""))
    return st.sampled_from((*WORDS[parameter.name], *TEXTS[:6]) if parameter.name in WORDS else TEXTS)


@st.composite
def arguments(draw: st.DrawFn, name: str, model: str) -> list[str]:
    """Of one command: some of its options with values that fit or do not, and now and then something it does not know."""
    found: list[str] = []
    for parameter in COMMANDS[name]:
        if not parameter.options:
            count = draw(st.integers(0, 2)) if parameter.many else int(parameter.required or draw(st.booleans()))
            found += [draw(values(parameter, model)) for _ in range(count)]
    options = [p for p in COMMANDS[name] if p.options]
    required = [p for p in options if p.required and draw(st.integers(0, 5))]
    others = [p for p in options if p not in required]
    chosen = draw(st.lists(st.sampled_from(others), max_size=3, unique=True)) if others else []
    for parameter in [*required, *chosen]:
        found.append(draw(st.sampled_from(parameter.options)))
        if parameter.kind is not bool:
            found.append(draw(values(parameter, model)))
    if not draw(st.integers(0, 9)):
        found.insert(draw(st.integers(0, len(found))), draw(st.sampled_from(("--nonsense", "-Z", "--", "surplus"))))
    return found


def invoke(name: str, given_: list[str]) -> Outcome:
    """In a folder of its own that holds some files, with what was written or changed there."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "1000")
        Path("folder").mkdir()
        Path("there.txt").write_text("not JSON")
        Path("there.json").write_text('[{"name": "Nonsense"}]')

        def state() -> dict[str, tuple[int, int]]:
            found = (Path(root, file) for root, folders, files in os.walk(".") for file in (*folders, *files))
            return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}

        before = state()
        result = CliRunner().invoke(app, [name, *given_])
        after = state()
        error = None if isinstance(result.exception, SystemExit) else result.exception
        return Outcome(result.exit_code, result.stderr, error, [p for p in after if after[p] != before.get(p)])


def judge(name: str, given_: list[str], outcome: Outcome) -> None:
    shown = f"headscope {name} {given_}: {outcome.told[-500:]}"
    if outcome.error is not None:
        raise AssertionError(shown) from outcome.error
    assert outcome.code in (0, 2), shown
    if outcome.code == 0:
        return
    assert outcome.wrote == [], shown
    assert "Traceback" not in outcome.told, shown
    ours = outcome.told.startswith("headscope: ")
    assert ours or "Usage:" in outcome.told, shown
    message = outcome.told.strip() if ours else outcome.told.partition("Usage:")[2].partition("\n")[2]
    # What was got, or the name of what it was got for.
    known = [one for p in COMMANDS[name] for one in (*p.options, p.name, p.metavar)]
    # `interp.load` calls a model its source.
    known += ["source"] * any(p.name in MODELS for p in COMMANDS[name])
    names = [one.strip("[]-").replace("-", "_") for one in known if len(one) > 1]
    words = message.replace("-", "_").lower()
    assert any(one.lower() in words for one in names) or any(len(one) > 1 and one in message for one in given_), shown


def stop(*_: Any, **__: Any) -> None:
    """In place of loading a model: what could be checked before has been."""
    raise typer.Exit(0)


@pytest.fixture(scope="module")
def served() -> Iterator[None]:
    """No page is served, no model is read."""
    import dashboards.app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", stop)
        patch.setattr(dashboards.app, "serve", stop)
        yield


EXAMPLES = int(os.environ.get("HEADSCOPE_FUZZ", "3"))
"""Argument lists for each command: few, so that this is quick; more by hand."""

quick = settings(
    max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("name", sorted(COMMANDS))
@quick
@given(data=st.data())
def test_any_arguments_are_taken_or_refused_before_a_model_is_read(name: str, data: st.DataObject) -> None:
    given_ = data.draw(arguments(name, "some/model"))
    judge(name, given_, invoke(name, given_))


@pytest.fixture(scope="module")
def tiny() -> Any:
    """A tiny Llama whose tokenizer knows letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from interp.models.model import Model
    from interp.testing import build

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "x": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    return Model(build("llama").module, tokenizer=tokenizer, name="tiny")


@pytest.mark.parametrize("name", list(RUN))
@quick
@given(data=st.data())
def test_any_arguments_run_or_are_refused_with_a_model(name: str, tiny: Any, data: st.DataObject) -> None:
    real = loading.load

    def load(source: Any, **options: Any) -> Any:
        return tiny if source == "tiny" else real(source, **options)

    given_ = data.draw(arguments(name, "tiny")) + data.draw(st.sampled_from([RUN[name], RUN[name], []]))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(loading, "load", load)
        judge(name, given_, invoke(name, given_))


def test_the_judge_can_fail() -> None:
    good = Outcome(2, "headscope: --out must end in .csv, got x.txt", None, [])
    judge("score", ["m", "--out", "x.txt"], good)
    for bad in (
        good._replace(wrote=["./x.txt"]), good._replace(code=1), good._replace(error=RuntimeError("ours")),
        good._replace(told="headscope: it did not go well"), good._replace(told="Traceback (most recent call last)"),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            judge("score", ["m"], bad)
