"""The list of probes: made of what exists, with what each needs."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module

import pytest

import probes
from probes.needle import NeedleInHaystack
from probes.text import Passages


def test_probes_are_listed_by_existing() -> None:
    found = {p.name: p for p in probes.probes()}
    wanted = {
        "NeedleInHaystack", "MultiKey", "VariableTracking", "NonLiteral", "KeyValue", "KeyValueTokens", "RepeatedTokens",
        "IndirectObject", "ImageFolder", "Passages", "ClosedBook",
    }  # fmt: skip
    assert wanted <= set(found) and list(found) == sorted(found)
    assert "Haystack" not in found and "LinearProbe" not in found  # an abstract form, and no task
    assert len(found) == len(probes.probes())


def test_what_the_list_says() -> None:
    needle = next(p for p in probes.probes() if p.name == "NeedleInHaystack")
    assert needle.needs == ("tokenizer",) and needle.judged and needle.module == "probes.needle"
    assert needle.settings["lengths"] == (256, 512) and "Kamradt" in needle.paper
    assert next(p for p in probes.probes() if p.name == "KeyValueTokens").settings["keys"] == "required"
    assert not next(p for p in probes.probes() if p.name == "Passages").judged


def test_every_entry_can_be_had() -> None:
    for entry in probes.probes():
        cls = probes.probe(entry.name)
        assert cls is getattr(import_module(entry.module), entry.name)
        assert entry.summary and len(entry.summary) < 160, entry
        assert set(entry.needs) <= {"tokenizer", "images", "model"}, entry
        assert set(entry.settings) == {f.name for f in fields(cls) if f.init}
        if "required" not in entry.settings.values():
            assert callable(cls().build)
    assert probes.probe("NeedleInHaystack") is NeedleInHaystack and probes.probe("Passages") is Passages
    with pytest.raises(ValueError, match=r"name must be one of .*'Passages'.*, got 'Nothing'"):
        probes.probe("Nothing")
