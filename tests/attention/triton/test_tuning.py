"""Configurations that were timed are kept, found again, and never in the way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from interp.attention import Edit, Gain, Mask, Readout, SinkWindow
from interp.attention.call import Call
from interp.attention.triton import configs, decode_launch, tuned, tuning
from interp.attention.triton.configs import Config
from interp.attention.triton.decode_arguments import Work
from interp.attention.triton.passes import Wanted
from interp.attention.triton.tables import tables

CPU = torch.device("cpu")


class Pair(NamedTuple):
    rows: int
    keys: int


SHIPPED = Pair(64, 64)


@pytest.fixture(autouse=True)
def fresh(cache: Path) -> Iterator[None]:
    tuned.reload()
    yield
    tuned.reload()


def picked(kind: str = "rows", *facts: object) -> Pair:
    return tuned.pick(kind, CPU, lambda: facts, SHIPPED)


def tune(
    costs: dict[tuple[int, ...], float], run: Callable[[], Any] | None = None, **options: Any
) -> list[tuning.Tuned]:
    """With a timer that asks which configuration it is, and one launch unless ``run`` makes others."""
    at: list[Pair] = []

    def one() -> torch.Tensor:
        at[:] = [picked("rows", "causal")]
        return torch.ones(2)

    return tuning.tune(
        one if run is None else run, candidates=lambda key, shipped: list(costs), timer=lambda run: costs[at[0]], **options
    )  # fmt: skip


COSTS: dict[tuple[int, ...], float] = {(64, 64): 2.0, (128, 64): 1.5, (128, 128): 1.0, (32, 32): 3.0}


def test_the_fastest_is_kept_and_found() -> None:
    assert picked("rows", "causal") == SHIPPED
    (row,) = tune(COSTS)
    assert (row.shipped, row.shipped_ms, row.config, row.ms) == ((64, 64), 2.0, (128, 128), 1.0)
    found = picked("rows", "causal")
    assert found == (128, 128) and isinstance(found, Pair)
    assert picked("rows", "full") == SHIPPED and picked("statistics", "causal") == SHIPPED


def test_another_process_reads_it(cache: Path) -> None:
    tune(COSTS)
    tuned.reload()
    assert picked("rows", "causal") == (128, 128)
    said = json.loads((cache / "kernels" / "tuned.json").read_text())
    assert said["format"] == tuned.FORMAT and len(said["configurations"]) == 1
    assert [path.name for path in (cache / "kernels").iterdir() if "partial" in path.name] == []


def test_what_is_hardly_faster_is_not_kept(cache: Path) -> None:
    (row,) = tune({(64, 64): 2.0, (128, 64): 1.99})
    assert row.config == row.shipped and picked("rows", "causal") == SHIPPED
    assert json.loads((cache / "kernels" / "tuned.json").read_text())["configurations"] == {}


def test_tuning_again_forgets_what_no_longer_wins() -> None:
    tune(COSTS)
    tune({(64, 64): 1.0, (128, 128): 2.0})
    assert picked("rows", "causal") == SHIPPED


def test_a_dry_run_keeps_nothing(cache: Path) -> None:
    assert tune(COSTS, keep=False)[0].config == (128, 128)
    assert picked("rows", "causal") == SHIPPED and not (cache / "kernels").exists()


def test_launches_of_one_call_are_tuned_in_turn() -> None:
    at: dict[str, Pair] = {}

    def run() -> None:
        at.update(rows=picked("rows"), statistics=picked("statistics"))

    costs = {(64, 64): 2.0, (128, 64): 1.0}
    rows = tuning.tune(
        run, candidates=lambda key, shipped: [(64, 64), (128, 64)], timer=lambda run: sum(costs[x] for x in at.values())
    )  # fmt: skip
    assert [(row.shipped_ms, row.ms) for row in rows] == [(4.0, 3.0), (3.0, 2.0)]
    assert picked("rows") == picked("statistics") == (128, 64)


def test_candidates_that_fail_or_differ_are_passed_over() -> None:
    def run() -> torch.Tensor:
        at[:] = [picked("rows", "causal")]
        if at[0] == (128, 128):
            raise RuntimeError("out of shared memory")
        return torch.full((2,), float("nan") if at[0] == (128, 64) else 1.0)

    at: list[Pair] = []
    lines: list[str] = []
    (row,) = tuning.tune(
        run, candidates=lambda key, shipped: list(COSTS), timer=lambda run: COSTS[at[0]], progress=lines.append
    )  # fmt: skip
    assert row.config == (64, 64)
    assert any("RuntimeError" in line for line in lines) and any("another result" in line for line in lines)
    assert picked("rows", "causal") == SHIPPED


def test_a_call_without_a_launch_is_refused() -> None:
    with pytest.raises(ValueError, match="run: must make a call that the kernels compute"):
        tuning.tune(lambda: torch.ones(1), timer=lambda run: 1.0)


def test_the_trial_ends_with_an_error() -> None:
    def run() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        tuning.tune(run, timer=lambda run: 1.0)
    assert tuned._trial is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{ not json", "cannot be read"),
        ("[1, 2]", "no file of this format"),
        ('{"format": 99, "configurations": {}}', "no file of this format"),
        ('{"format": 1, "configurations": []}', "no file of this format"),
        (
            '{"format": 1, "configurations": {"a": {"config": ["x"]}, "b": 3, "c": {"config": [1, -2]}}}',
            "3 damaged entries",
        ),
    ],
)
def test_a_damaged_file_is_not_used_and_written_anew(cache: Path, content: str, says: str) -> None:
    path = cache / "kernels" / "tuned.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match=says):
        assert picked("rows", "causal") == SHIPPED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picked("rows", "causal") == SHIPPED  # said once a process
    with pytest.warns(UserWarning, match=says):
        tune(COSTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picked("rows", "causal") == (128, 128)


def test_an_entry_of_another_length_is_not_used() -> None:
    tuned.write(tuned.file(), {"|".join((tuned.machine(CPU), "rows", "causal")): {"config": [1, 2, 3]}})
    assert picked("rows", "causal") == SHIPPED


def test_another_machine_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tune(COSTS)
    monkeypatch.setattr(tuned, "machine", lambda device: "another GPU|triton 9|0")
    assert picked("rows", "causal") == SHIPPED


def test_facts_are_not_asked_for_where_nothing_is_tuned() -> None:
    def facts() -> list[object]:
        raise AssertionError

    assert tuned.pick("rows", CPU, facts, SHIPPED) == SHIPPED


def test_the_folder_is_that_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from interp.models.cache import cache_dir

    for name, value in (("HEADSCOPE_CACHE", "~/x"), ("XDG_CACHE_HOME", str(tmp_path)), ("HOME", str(tmp_path))):
        for other in ("HEADSCOPE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        assert tuned.file().parent.parent == cache_dir()
    assert tuned.file(tmp_path) == tmp_path / "kernels" / "tuned.json"


# What launches are told apart by


def call(length: int = 40, **given: Any) -> Call:
    q, k = torch.zeros(1, 4, length, 16), torch.zeros(1, 2, length, 16)
    defaults: dict[str, Any] = {
        "mask": Mask(), "softcap": None, "sinks": None, "bias": None, "edit": Edit(), "readout": Readout(),
        "want_output": True,
    }  # fmt: skip
    return Call(q, k, k, 0.25, **{**defaults, **given})


def facts(given: Call, wanted: Wanted) -> tuple[str, ...]:
    return tuple(configs.facts(given, tables(given, upcast=True), wanted))


def test_facts_tell_what_matters_and_no_more() -> None:
    plain = facts(call(), Wanted(output=True))
    assert plain[:2] == ("float32", "16x16") and plain[3] == "64x64"
    assert "output" in plain[2].split(",")
    assert facts(call(60), Wanted(output=True)) == plain
    others = [
        facts(call(70), Wanted(output=True)),
        facts(call(mask=Mask(causal=True)), Wanted(output=True)),
        facts(call(edit=Edit((Gain(torch.ones(1, 4, 1)),))), Wanted(output=True)),
        facts(call(edit=Edit((SinkWindow(4, 8),))), Wanted(output=True)),
        facts(call(), Wanted(row_stats=True)),
        facts(call(), Wanted(output=True, row_stats=True)),
        facts(call(), Wanted(output=True, row_stats=True, n_groups=3, groups=torch.zeros(1, 40))),
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_facts_of_decoding() -> None:
    one, other = (Work.of(call(edit=edit), None) for edit in (Edit(), Edit((Gain(torch.ones(1, 4, 1)),))))
    assert decode_launch._facts(one, 16, 1, False, 1) != decode_launch._facts(other, 16, 1, False, 1)
    assert decode_launch._facts(one, 16, 1, False, 1) != decode_launch._facts(one, 16, 1, True, 1)


def test_candidates_are_of_the_launch_kind() -> None:
    for config in tuning._candidates("gpu|triton|x|rows|float16", Config(64, 64, 4, 2)):
        assert Config(*config).registers == 0
    assert {config[5] for config in tuning._candidates("gpu|triton|x|rows|float16", Config(64, 64, 4, 2))} == {0, 1}
    assert {config[4] for config in tuning._candidates("gpu|triton|x|statistics|float16", Config(64, 64, 4, 2))} == {
        0,
        128,
    }
    assert {
        len(config) for config in tuning._candidates("gpu|triton|x|decode|float16", decode_launch.Config(64, 4, 3))
    } == {3}


# The command line


@pytest.mark.parametrize("shape", ["1,2", "1,2,x,4,5", "1,2,0,4,5", ""])
def test_a_bad_shape_is_named(shape: str) -> None:
    options = tuning._parser().parse_args(["--shape", shape])
    with pytest.raises(ValueError, match="--shape: must be 5 or 6 numbers"):
        tuning._call(shape, options, CPU)


@pytest.mark.parametrize(
    "more", [["--read", "all", "--edit", "gain"], ["--backward"], ["--queries", "1", "--window", "8"]]
)
def test_the_call_of_the_command_line_runs(more: list[str]) -> None:
    options = tuning._parser().parse_args(["--shape", "1,2,1,20,16", "--causal", "--dtype", "fp32", *more])
    given = tuning._call("1,2,1,20,16", options, CPU if not torch.cuda.is_available() else torch.device("cuda"))()
    assert given[0].shape == (1, options.queries or 20, 2, 16)
    assert len(given) == (4 if options.backward else 10 if options.read == "all" else 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tuning.main(["--shape", "1,2,1,20,16"])
    assert caught.value.code == 2 and "a CUDA GPU is needed" in capsys.readouterr().err


def test_the_table_has_before_and_after() -> None:
    rows = [
        tuning.Tuned("gpu|triton 3|abc|rows|bfloat16|128x128", (64, 64, 4, 2, 0), 2.0, (128, 64, 8, 3, 0), 1.0),
        tuning.Tuned("gpu|triton 3|abc|statistics|bfloat16", (64, 64, 4, 2, 0), 1.0, (64, 64, 4, 2, 0), 1.0),
    ]
    heading, one, other = tuning.table(rows).splitlines()
    assert heading.split() == ["launch", "shipped", "ms", "tuned", "ms", "speed"]
    assert one.startswith("rows bfloat16 128x128") and one.endswith("1.0000  2.00 x") and other.endswith("as shipped")


HALF = torch.tensor([16, 1 << 20], dtype=torch.int32)


@pytest.mark.parametrize(
    ("wanted", "width", "keys", "edit", "best"),
    [
        ({"output": True, "row_stats": True}, 64, 257, Edit(), Config(64, 32, 4, 3, wide=1)),
        ({"output": True, "row_stats": True}, 64, 600, Edit(), Config(64, 128, 4, 3)),
        ({"output": True, "row_stats": True}, 128, 600, Edit(), Config(64, 64, 4, 2, wide=1)),
        ({"output": True, "weights": 1}, 128, 8192, Edit(), Config(64, 64, 4, 3)),
        ({"output": True}, 64, 8192, Edit(), Config(64, 64, 4, 3)),
        ({"output": True}, 128, 4096, Edit(), Config(64, 64, 4, 3)),
        ({"output": True}, 128, 4097, Edit(), Config(128, 128, 8, 3, wide=1)),
        ({"output": True}, 128, configs.LONG, Edit((SinkWindow(4, HALF),)), Config(128, 128, 8, 3, wide=1)),
        ({"output": True}, 128, configs.LONG // 2, Edit((SinkWindow(4, HALF),)), Config(64, 64, 4, 3)),
        ({"output": True}, 128, configs.LONG, Edit((SinkWindow(4, 16),)), Config(64, 32, 4, 3)),
        ({"output": True}, 64, configs.LONG, Edit((SinkWindow(4, 16),)), Config(64, 64, 4, 2)),
    ],
)
def test_tiles_follow_what_a_launch_does(
    wanted: dict[str, Any], width: int, keys: int, edit: Edit, best: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_shared_memory", lambda _: 227 << 10)
    monkeypatch.setattr(tuned, "pick", lambda kind, device, facts, shipped: shipped)
    q, k = torch.empty(1, 2, keys, width, dtype=torch.bfloat16), torch.empty(1, 1, keys, width, dtype=torch.bfloat16)
    call = Call(q, k, k, 0.3, Mask(causal=True), None, None, None, edit, Readout(), True)
    shared = tables(call, upcast=True)
    shared.device = torch.device("cuda", 0)
    assert configs.choose(call, Wanted(**wanted), shared) == best


@pytest.mark.parametrize(
    ("rows", "width", "best"),
    [(257, 64, Config(64, 32, 4, 3)), (257, 128, Config(64, 64, 4, 3, 128)), (600, 64, Config(128, 64, 4, 3))],
)
def test_tiles_of_statistics_follow_rows_and_width(
    rows: int, width: int, best: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_shared_memory", lambda _: 227 << 10)
    monkeypatch.setattr(tuned, "pick", lambda kind, device, facts, shipped: shipped)
    q = torch.empty(1, 2, rows, width, dtype=torch.bfloat16)
    call = Call(q, q, q, 0.3, Mask(), None, None, None, Edit(), Readout(received=True), True)
    shared = tables(call, upcast=True)
    shared.device = torch.device("cuda", 0)
    assert configs.choose_statistics(call, shared) == best
