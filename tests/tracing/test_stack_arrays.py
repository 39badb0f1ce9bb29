"""What is written straight into memory without contents equals what is written cell by cell into missing values, to the bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.testing import build
from interp.tracing import assembly, recorder
from interp.tracing.stack_arrays import Piece, StackArrays, span, union

POISON = 12345
plain_empty = np.empty


def poisoned(shape: Any, dtype: Any = float, **more: Any) -> Any:
    """Memory as ``np.empty`` may give it: numbers that nobody wrote."""
    made = plain_empty(shape, dtype, **more)
    if made.dtype.kind in "fi":
        made.fill(POISON)
    return made


class CellByCell(StackArrays):
    """The general path alone: missing values first, then one sample and head at a time."""

    def array(self, name: str, dims: Any, sizes: Any, like: Any) -> Any:
        new = name not in self.variables
        array = super().array(name, dims, sizes, like)
        if new:
            array[...] = np.nan if array.dtype.kind == "f" else -1
        return array

    def write(self, name: str, piece: Piece, values: Any, *rest: Any, add: bool = False) -> None:
        array = self.variables[name][1]
        targets, _, rows = self.samples_of(piece)
        rows = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        rest = tuple(np.arange(p.start, p.stop) if isinstance(p, slice) else p for p in rest)
        values = np.broadcast_to(values.detach().numpy(), (len(values), len(piece.heads), *values.shape[2:]))
        for target, row in zip(targets, rows, strict=True):
            for n, head in enumerate(piece.heads):
                part = array[target, self.layers.index(piece.layer), self.heads.index(head)]
                where, picked = np.ix_(*rest), values[row, n]
                if add:
                    none = np.isnan(part[where]) if array.dtype.kind == "f" else part[where] < 0
                    picked = np.where(none, array.dtype.type(0), part[where]) + picked
                part[where] = picked

    def finish(self) -> None:
        pass


def same(got: xr.Dataset, wanted: xr.Dataset) -> None:
    xr.testing.assert_identical(got, wanted)
    for name, array in wanted.variables.items():
        mine = got.variables[name]
        assert mine.dtype == array.dtype, name
        assert array.dtype.kind not in "fi" or not (mine.values == POISON).any(), name
        if array.dtype.kind == "f":  # 0 and -0 are not the same
            assert np.array_equal(np.signbit(np.nan_to_num(mine.values)), np.signbit(np.nan_to_num(array.values))), name


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stacks that were assembled; each is, by both paths."""
    stacks: list[str] = []
    assemble = recorder.assemble_stack

    def both(stack: str, *given: Any, **more: Any) -> xr.Dataset:
        with monkeypatch.context() as m:
            m.setattr(np, "empty", poisoned)
            got = assemble(stack, *given, **more)
        with monkeypatch.context() as m:
            m.setattr(assembly, "StackArrays", CellByCell)
            same(got, assemble(stack, *given, **more))
        stacks.append(stack)
        return got

    monkeypatch.setattr(recorder, "assemble_stack", both)
    return stacks


READINGS: Any = {
    "row_stats": True, "topk": 2, "received": True, "pooled": 4, "offset": True, "distance": "euclidean", "rows": [1, -1],
    "group_output": "last", "attention": True, "z": True,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    # Family, of the capture, of generate (None is a forward).
    "prefill": ("llama", {}, None),
    "a batch with pads": ("llama", {"batch": True}, None),
    "generation": ("llama", {}, {}),
    "generation of a batch with pads": ("llama", {"batch": True}, {}),
    "samples that stop early": ("llama", {"batch": True}, {"stop": True}),
    "beams": ("llama", {"batch": True}, {"num_beams": 2, "num_return_sequences": 2}),
    "drafts": ("llama", {"repeat": True}, {"prompt_lookup_num_tokens": 2}),
    "one layer": ("llama", {"layers": [1]}, None),
    "heads of their own in each layer": ("llama", {"heads": ["L0H1", "L0H3", "L1H0"]}, None),
    "scattered rows": ("llama", {"queries": [0, 1, 4, 7]}, None),
    "generated rows alone": ("llama", {"queries": "generated", "rows": None, "group_output": None}, {}),
    "a sliding window": ("gpt_oss", {}, {"max_new_tokens": 6}),
    "tiles": ("llava_onevision", {}, {}),
    "windows of a packed tower": ("qwen2_5_vl", {}, None),
    "windows pooled alone": ("qwen2_5_vl", {"attention": False, "stacks": ["vision"]}, None),
    "cross attention": ("mllama", {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_trace_is_that_of_the_general_path(case: str, compared: list[str]) -> None:
    family, capture, generate = CASES[case]
    specimen: Any = build(family)
    if "cross" in case or family in ("qwen2_5_vl", "llava_onevision"):
        capture = {**capture, "offset": "cross" not in case}
    inputs = dict(specimen.batch if capture.pop("batch", False) else specimen.inputs)
    if capture.pop("repeat", False):
        inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 3])}
    settings = interp.Capture(**{**READINGS, **capture})
    with torch.no_grad():
        if generate is None:
            with interp.hooked(specimen.module, capture=settings) as run:
                specimen.module(**inputs)
        else:
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **generate}
            if options.pop("stop", False):
                # The first sample makes its stop at its second new token.
                prompt = inputs["input_ids"].shape[1]
                options["eos_token_id"] = int(specimen.module.generate(**inputs, **options)[0, prompt + 1])
            with interp.hooked(specimen.module, capture=settings) as run:
                specimen.module.generate(**inputs, **options)
    trace = run.trace
    assert set(compared) == set(trace)
    assert all(trace[stack].data_vars for stack in compared)


def piece(layer: int, heads: list[int], sample: int, batch: int, start: int, stop: int) -> Piece:
    return Piece(
        layer=layer, heads=heads, n_heads=4, sample=sample, batch=batch, start=start, stop=stop, key_start=0, n_keys=6,
        generated=False, readings=None, rows=[], output_rows=[], offsets=None, pooled=0, z=None, forward=1,
    )  # fmt: skip


@pytest.mark.parametrize("add", [False, True], ids=["put", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32], ids=str)
def test_any_pieces(dtype: torch.dtype, add: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    whole = 0
    for _ in range(100):
        pieces, values = [], []
        for _ in range(random.integers(1, 6)):
            heads = [[0, 1, 2, 3], [1, 2], [0, 3]][random.integers(3)]
            start = int(random.integers(0, 3)) * int(random.integers(0, 2))
            pieces.append(
                piece(int(random.integers(2)), heads, int(random.integers(2)), int(random.integers(1, 3)), start, 6)
            )
            drawn = torch.from_numpy(random.normal(size=(pieces[-1].batch, len(heads), 6 - start, 6)) * 3)
            drawn = torch.where(drawn.abs() < 1, -0.0, drawn).to(dtype)
            values.append(drawn[:, :1].expand_as(drawn) if random.integers(2) else drawn)
        run: Any = SimpleNamespace(generating=False, prompt_length=None)
        made = []
        for kind in (StackArrays, CellByCell):
            out = kind("vision", [0, 1, 2], pieces, run, None, None)
            with monkeypatch.context() as m:
                m.setattr(np, "empty", poisoned)
                array = out.array("x", ("query", "key"), (len(out.positions), 6), values[0])
            for p, v in zip(pieces, values, strict=True):
                # Keys that follow on each other for some pieces, others for others.
                keys = slice(0, 6) if p.layer == 0 else np.array([0, 2, 3])
                out.write("x", p, v if p.layer == 0 else v[..., :3], out.rows_of(p), keys, add=add)
            out.finish()
            made.append(xr.Dataset({"x": (out.variables["x"][0], array)}))
        same(*made)
        whole += len(pieces) == 1 and pieces[0].heads == [0, 1, 2, 3]
    assert whole


def test_places_in_a_row_are_a_slice() -> None:
    assert span([3, 4, 5]) == slice(3, 6)
    assert span([7]) == slice(7, 8)
    for places in ([], [0, 2], [2, 1], [1, 1]):
        assert np.array_equal(np.asarray(span(places)), places)


def test_spans_are_united() -> None:
    assert union([(5, 7), (0, 3), (2, 4), (6, 7), (9, 9)]).tolist() == [0, 1, 2, 3, 5, 6]
    assert union([]).tolist() == []
