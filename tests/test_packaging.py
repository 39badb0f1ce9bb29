"""What an installed Headscope is made of: the wheel and the source distribution, and a wheel in an empty environment."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PACKAGES = ("interp", "probes", "dashboards")
BUNDLED = ("recall-lm", "recall-lm-planted", "scenes-lvlm", "scenes-lvlm-planted", "scenes-vit")
# Measurements of the bundled models: of use in the repository, read by nothing that is installed.
RECORDS = ("metrics.json", "measured.json", "surface.svg")
LARGEST = 45 * 2**20
EMPTY = "HEADSCOPE_EMPTY_ENVIRONMENT"

pytestmark = pytest.mark.slow


def command(*arguments: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, arguments)), cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    # hatchling itself, not `pip wheel` or `build`: these make an environment first, for which they need a network.
    command(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder, cwd=source)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone: what is half written in somebody's checkout must not decide whether this passes."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("source")
    for name in listed.stdout.split("\0"):
        if name and (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution: the longest way that a release goes."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files(root: Path, *folders: str) -> set[str]:
    """Of the folders (none: all), as paths from ``root``."""
    found = [path for folder in folders or (".",) for path in (root / folder).rglob("*")]
    return {path.relative_to(root).as_posix() for path in found if path.is_file()}


# --- what is in them


def test_the_wheel_has_every_module_and_the_types(names: set[str], source: Path) -> None:
    modules = {name for name in files(source, *PACKAGES) if name.endswith(".py")}
    assert len(modules) > 200 and not modules - names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    scripts = files(source, "dashboards/assets")
    assert scripts and scripts <= names
    assert "headscope.py" in names


def test_the_wheel_has_nothing_else(names: set[str], wheel: Path) -> None:
    version = re.search(r'__version__ = "(.+)"', (REPOSITORY / "interp/_version.py").read_text())
    assert version
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, "headscope.py", f"headscope-{version[1]}.dist-info"}
    kinds = {Path(name).suffix for name in names if name.split("/")[0] in PACKAGES}
    known = {".py", ".typed", ".js", ".css", ".json", ".safetensors", ".jinja", ".md", ".png", ".txt"}
    assert kinds == known, kinds ^ known
    assert not [
        name for name in names if name.rpartition("/")[2] in RECORDS or "screenshots" in name or "tests/" in name
    ]
    assert wheel.stat().st_size < LARGEST


def test_the_wheel_has_the_data_that_is_read(names: set[str], wheel: Path, source: Path) -> None:
    places = {"data/models": "interp/_bundled/models", "data/text": "probes/_text", "data/scenes": "probes/_scenes"}
    with zipfile.ZipFile(wheel) as archive:
        for folder, target in places.items():
            for file in files(source, folder):
                place = target + file.removeprefix(folder)
                assert (place in names) == (Path(file).name not in RECORDS), file
                if place in names:
                    there = hashlib.sha256(archive.read(place)).digest()
                    assert there == hashlib.sha256((source / file).read_bytes()).digest(), file
    models = {name.split("/")[3] for name in names if name.startswith("interp/_bundled/models/")}
    assert models == set(BUNDLED)
    assert all(f"interp/_bundled/models/{name}/model.safetensors" in names for name in BUNDLED)


def test_the_papers_of_the_wheel_are_those_of_the_project(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (place,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(place).decode()
        points = archive.read(place.replace("METADATA", "entry_points.txt")).decode()
    said = Parser().parsestr(text)
    assert said["Requires-Python"] == PROJECT["requires-python"] and said["License-Expression"] == PROJECT["license"]
    needs = [Requirement(line) for line in said.get_all("Requires-Dist", [])]
    plain = {(need.name, str(need.specifier)) for need in needs if need.marker is None}
    assert plain == {(need.name, str(need.specifier)) for need in map(Requirement, PROJECT["dependencies"])}
    assert set(said.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert "headscope = headscope:main" in points
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", text), "a path of the machine that built it"


def test_a_source_distribution_has_what_it_builds_and_tests_with(unpacked: Path, source: Path) -> None:
    # All of ours, so that its tests and its documentation can be run. (The wheel of these tests is built from it.)
    assert files(unpacked) - {"PKG-INFO"} == files(source)


# --- the wheel at work

USE = """
import json, sys
import interp
from interp import analysis
assert "site-packages" in interp.__file__ or "installed" in interp.__file__, interp.__file__
model = interp.load("recall-lm")
score = analysis.score("previous_token", model)
print(json.dumps({"top": str(score.heads.top(1)), "names": [n for n in interp.__all__ if not hasattr(interp, n)]}))
"""


def test_an_installed_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    command(*pip, "--target", target, wheel, cwd=tmp_path)
    # The checkout is on the path of an editable install, after what PYTHONPATH names.
    told = json.loads(command(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()[-1])
    assert re.fullmatch(r"L\d+H\d+", told["top"]) and told["names"] == []


def test_the_wheel_installs_into_an_empty_environment_with_its_declared_needs(wheel: Path, tmp_path: Path) -> None:
    if not os.environ.get(EMPTY):
        pytest.skip(f"downloads its needs, which takes minutes; `make release-check` (or {EMPTY}=1) runs it")
    folder = tmp_path / "empty"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = REPOSITORY / "constraints.txt"
    install = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "-c", constraints)
    # torch first, as .ci/environment does: asked for by a range, pip may take a newer build.
    command(*install, "torch", cwd=tmp_path)
    command(*install, wheel, cwd=tmp_path)
    command(python, "-m", "pip", "check", cwd=tmp_path)
    told = json.loads(command(python, "-c", USE, cwd=tmp_path).splitlines()[-1])
    assert re.fullmatch(r"L\d+H\d+", told["top"]) and told["names"] == []
    headscope = folder / "bin" / "headscope"
    assert command(headscope, "--version", cwd=tmp_path).strip() == wheel.name.split("-")[1]
    assert "sweep" in command(headscope, "--help", cwd=tmp_path)
    scored = json.loads(command(headscope, "score", "recall-lm", "induction", "--json", cwd=tmp_path))
    assert scored["name"] == "induction" and scored["heads"][0]["value"] > scored["heads"][-1]["value"]
