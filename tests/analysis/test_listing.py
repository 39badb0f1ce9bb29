"""What the lists of scores and analyses say of each."""

from __future__ import annotations

from importlib import import_module

import pytest

from interp.analysis import ScoreInfo, analyses, scores


@pytest.mark.parametrize("entry", scores(), ids=lambda e: e.name)
def test_every_score_has_what_a_reader_needs(entry: ScoreInfo) -> None:
    assert entry.summary and len(entry.summary) < 120 and entry.unit and entry.stacks and entry.probe
    assert "https://" in entry.paper and entry.control


def test_every_analysis_can_be_had() -> None:
    found = analyses()
    assert len({e.name for e in found}) == len(found) >= 16
    for entry in found:
        assert callable(getattr(import_module(entry.module), entry.name))
        assert (
            entry.summary
            and entry.unit
            and entry.control
            and entry.needs
            and (entry.paper == "ours" or "https://" in entry.paper)
        )
