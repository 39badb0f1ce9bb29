"""The measuring tools measure what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

SCRIPT = """
import json, time
from pathlib import Path
import _record
from _record import measure, measure_ratios, peak_memory, record

def prepare(size, kept):
    import numpy
    before = numpy.ones(kept, numpy.uint8)
    def call():
        numpy.ones(size // 2, numpy.uint8)
        return numpy.ones(size, numpy.uint8), before
    return call

if __name__ == "__main__":
    order = []
    def sleeper(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)
        return call
    timings = measure({"a": sleeper("a", 0.02), "b": sleeper("b", 0.06)}, repeats=4, warmup=1)
    _, ratios = measure_ratios({"a": sleeper("a", 0.02), "b": sleeper("b", 0.06)}, "a", repeats=3, warmup=0)
    # The large array of the preparation must not be counted, nor hide what comes after it.
    peak = peak_memory(prepare, 64 << 20, 200 << 20)
    _record.RESULTS = Path("results")
    record("trial", [{"what": "a", "seconds": timings["a"].median}], note="a note")
    print(json.dumps({"order": "".join(order), "a": timings["a"].median, "b": timings["b"].median,
                      "low": timings["b"].low,
                      "ratio": [ratios["a"].median, ratios["b"].median], "growth": peak.growth, "before": peak.before}))
"""


def test_the_commit_of_a_copy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import _record

    monkeypatch.setenv("HEADSCOPE_COMMIT", "abc1234")
    assert _record.versions()["commit"] == "abc1234"
    monkeypatch.delenv("HEADSCOPE_COMMIT")
    assert _record.versions().get("commit") != "abc1234"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_measure_peak_and_record(tmp_path: Path) -> None:
    script = tmp_path / "bench_trial.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, "--option"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["order"] == "ab" + "ab" + "ba" + "ab" + "ba" + "abbaab"
    assert got["ratio"][0] == 1.0 and 2 < got["ratio"][1] < 3.5
    assert 0.02 <= got["a"] < got["low"] <= got["b"] and got["b"] >= 0.06
    assert 64 << 20 <= got["growth"] < 80 << 20
    assert got["before"] > 200 << 20

    written = json.loads((tmp_path / "results" / "trial.json").read_text())
    assert written["rows"][0]["what"] == "a" and written["note"] == "a note"
    assert written["machine"]["cores"] >= 1 and written["machine"]["memory_gib"] > 0
    assert written["versions"]["python"].startswith("3.") and "headscope" in written["versions"]
    assert written["command"] == "python bench_trial.py --option"
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["trial.json"]
