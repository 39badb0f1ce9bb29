"""The Trace: labelled arrays by stack, and errors that say what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from interp.tracing.trace import CAPTURE_KEYWORD, Trace


def stack(**variables: tuple[tuple[str, ...], np.ndarray]) -> xr.Dataset:
    return xr.Dataset(variables, coords={"layer": [0, 2]})


def html_of(trace: Trace) -> str:
    return trace._repr_html_()  # pyright: ignore[reportPrivateUsage]


@pytest.fixture
def trace() -> Trace:
    ones = np.ones((1, 2, 3, 4), np.float32)
    return Trace(
        {
            "text": stack(entropy=(("sample", "layer", "head", "query"), ones)),
            "vision": stack(lse=(("sample", "layer", "head", "query"), np.ones((1, 2, 6, 9), np.float32))),
        },
        {"model": "tiny", "seed": np.int64(3), "capture": {"row_stats": True, "layers": (0, 2)}},
    )


def test_stacks_are_datasets_with_their_own_dims(trace: Trace) -> None:
    assert list(trace) == ["text", "vision"]
    assert len(trace) == 2
    assert "vision" in trace
    assert "audio" not in trace
    assert dict(trace["text"].sizes) == {"sample": 1, "layer": 2, "head": 3, "query": 4}
    assert trace["vision"].lse.sizes["query"] == 9
    assert trace["text"].entropy.sel(layer=2).shape == (1, 3, 4)
    assert list(trace.stacks) == ["text", "vision"]


def test_attributes_are_what_json_gives_back(trace: Trace) -> None:
    assert trace.attrs == {"model": "tiny", "seed": 3, "capture": {"row_stats": True, "layers": [0, 2]}}
    assert type(trace.attrs["seed"]) is int


def test_an_attribute_that_json_cannot_hold_is_named() -> None:
    with pytest.raises(TypeError, match=r"attrs\['capture'\]\['dtype'\].*dtype\('float32'\)"):
        Trace({}, {"capture": {"dtype": np.dtype("f4")}})


@pytest.mark.parametrize("name", ["", "a/b", "."])
def test_a_stack_needs_a_name_that_can_be_a_folder(name: str) -> None:
    with pytest.raises(ValueError, match="stacks must be named"):
        Trace({name: xr.Dataset()})


def test_a_stack_must_be_a_dataset() -> None:
    with pytest.raises(TypeError, match=r"stacks\['text'\] must be an xarray.Dataset, got dict"):
        Trace({"text": {}})  # type: ignore[dict-item]


def test_an_unknown_stack_lists_the_stacks(trace: Trace) -> None:
    with pytest.raises(KeyError) as error:
        trace["audio"]
    assert str(error.value) == "no stack 'audio' in this trace; it has: text, vision"


@pytest.mark.parametrize(("variable", "keyword"), sorted(CAPTURE_KEYWORD.items()))
def test_what_was_not_captured_says_how_to_capture_it(variable: str, keyword: str) -> None:
    trace = Trace({"text": stack(other=(("layer",), np.zeros(2)))})
    with pytest.raises(KeyError) as error:
        trace["text"][variable]
    assert f"Capture({keyword})" in str(error.value)
    with pytest.raises(AttributeError) as attribute_error:
        getattr(trace["text"], variable)
    assert f"Capture({keyword})" in str(attribute_error.value)


def test_the_keywords_it_names_exist() -> None:
    from dataclasses import fields

    from interp.tracing.capture import Capture

    known = {field.name for field in fields(Capture)}
    assert {keyword.split("=")[0] for keyword in CAPTURE_KEYWORD.values()} <= known


def test_the_hint_survives_selection(trace: Trace) -> None:
    with pytest.raises(KeyError, match=r"Capture\(attention=True\)"):
        trace["text"].sel(layer=0)["attention"]


def test_an_unknown_variable_lists_what_is_there(trace: Trace) -> None:
    with pytest.raises(KeyError, match=r"no variable 'entrpy' in this stack; it has: .*entropy"):
        trace["text"]["entrpy"]
    with pytest.raises(AttributeError, match="entrpy"):
        _ = trace["text"].entrpy


def test_the_tree_shares_the_arrays(trace: Trace) -> None:
    tree = trace.tree
    assert list(tree.children) == ["text", "vision"]
    assert tree.attrs == trace.attrs
    tree["text"].to_dataset()["entropy"].values[:] = 7
    assert float(trace["text"].entropy.max()) == 7


def test_a_variable_added_to_a_stack_stays(trace: Trace, tmp_path: Path) -> None:
    trace["text"]["doubled"] = 2 * trace["text"].entropy
    assert float(Trace.open(trace.save(tmp_path / "t"))["text"].doubled.min()) == 2


def test_nbytes_counts_all_arrays(trace: Trace) -> None:
    assert trace.nbytes == 4 * (1 * 2 * 3 * 4 + 1 * 2 * 6 * 9) + 2 * 2 * 8


def test_description(trace: Trace) -> None:
    text = trace.describe()
    assert text.startswith("Trace of tiny: 2 stacks, 560 B")
    assert "text: sample 1, layer 2, head 3, query 4" in text
    assert "entropy (sample, layer, head, query) float32, 96 B" in text
    assert "attention=True" in text.splitlines()[-1]
    assert "row_stats" not in text.splitlines()[-1]
    assert repr(trace) == f"<{text}>"
    page = html_of(trace)
    assert "vision" in page
    assert "entropy" in page


def test_a_reading_named_as_its_dim_is_a_reading(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    dataset = stack(offset=(("sample", "layer", "head", "offset"), values))
    dataset.coords["offset_position"] = ("offset", np.arange(4.0))
    trace = Trace.open(Trace({"text": dataset}).save(tmp_path / "t"))
    np.testing.assert_array_equal(trace["text"]["offset"].sel(layer=2), values[:, 1])
    assert "  offset (sample, layer, head, offset) float32, 96 B" in trace.describe()
    assert "offset=True" not in trace.describe()


@pytest.mark.parametrize(
    ("model", "title"),
    [
        ({"name": "scenes-lvlm", "class": "LlavaForConditionalGeneration", "revision": None}, "Trace of scenes-lvlm: "),
        ({"name": "", "class": "LlamaForCausalLM"}, "Trace of LlamaForCausalLM: "),
        ({}, "Trace: "), (None, "Trace: "), (7, "Trace: "),
    ],
)  # fmt: skip
def test_the_title_names_the_model_as_sessions_write_it(model: Any, title: str) -> None:
    trace = Trace({"text": stack(entropy=(("sample",), np.zeros(1)))}, {"model": model})
    assert trace.describe().startswith(title) and f"<b>{title}" in html_of(trace)


def test_html_escapes_what_it_is_given() -> None:
    assert "<script>" not in html_of(Trace({"text": xr.Dataset()}, {"model": "<script>"}))


NO_ZARR = """
import sys
import xarray as xr
from interp.tracing.trace import Trace
assert "zarr" not in sys.modules, "importing a trace imports zarr"
sys.modules["zarr"] = None
trace = Trace({"text": xr.Dataset({"x": ("layer", [1.0])})})
for action in (lambda: trace.save(sys.argv[1]), lambda: Trace.open(sys.argv[1])):
    try:
        action()
    except ImportError as error:
        assert "zarr" in str(error), error
    else:
        raise SystemExit("worked without zarr")
"""


def test_without_zarr_all_but_saving_works(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", NO_ZARR, str(tmp_path / "t")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "t").exists()
