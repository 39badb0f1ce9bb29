"""The demo's trip through the bundled LLaVA, short."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import interp
from interp import cli_demo
from interp.cli import app
from interp.heads import Head
from probes.scenes.world import Placed, Scene


def test_words_for_what_is_not_there_are_marked() -> None:
    scene = Scene("x", "desk", (Placed("dog", 0, (20.0, 20.0), 20.0),))
    assert cli_demo.marked("A dog, two cats and a bus.", scene) == "A dog, two *cats* and a *bus*."


def test_matched_heads_are_others_of_the_same_layers() -> None:
    model = interp.load("scenes-lvlm", device="cpu")
    heads = [Head(2, 1), Head(2, 5), Head(6, 0)]
    found = cli_demo.matched(heads, model)
    assert [h.layer for h in found] == [2, 2, 6]
    assert not {(h.layer, h.head) for h in found} & {(h.layer, h.head) for h in heads}
    assert len({(h.layer, h.head) for h in found}) == 3


@pytest.mark.slow
def test_the_whole_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_demo, "SHOWN", 2)
    result = CliRunner().invoke(app, ["demo", "--no-serve"])
    assert result.exit_code == 0, result.output
    for words in ("in the picture: boat, coconut, dog, shell", "image_mass", "without others:", "VHR, alpha 2:"):
        assert words in result.output
