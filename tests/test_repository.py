"""What holds for the repository as a whole: who imports whom, how light imports are, and that its papers agree."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PACKAGES = ("interp", "probes", "dashboards")
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            yield file.relative_to(REPOSITORY)


def run(*arguments: object, cwd: Path = REPOSITORY, **kwargs: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, **kwargs
    )


# --- who imports whom


def contract_modules() -> set[str]:
    keys = ("layers", "source_modules", "forbidden_modules", "protected_modules", "allowed_importers")
    lines = [line for contract in CONTRACTS for key in keys for line in contract.get(key, [])]
    return {name for line in lines for name in re.findall(r"[\w.*]+", line) if "*" not in name}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sources, with the modules that the contract names and nobody has written yet as empty ones."""
    for package in PACKAGES:
        shutil.copytree(
            REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "_bundled")
        )
    for name in {*PACKAGES, *contract_modules()}:
        path = tmp_path.joinpath(*name.split("."))
        if not path.is_dir() and not path.with_suffix(".py").exists():
            path.with_suffix(".py").touch()
        elif path.is_dir():
            (path / "__init__.py").touch()
    return tmp_path


def lint_imports(folder: Path) -> tuple[int, str]:
    program = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    done = run("-c", program, "--no-cache", "--config", REPOSITORY / "pyproject.toml", cwd=folder)
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


def test_import_contract(copy: Path) -> None:
    code, output = lint_imports(copy)
    assert code == 0, output
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken" in output


def module_file(folder: Path, name: str) -> Path:
    path = folder.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("interp.attention", "interp.heads"),
        ("interp.attention", "probes"),
        ("interp.models", "interp.attention"),
        ("interp.heads", "interp.attention"),
        ("interp.scores", "interp.attention"),
        ("interp.tracing", "interp.interventions"),
        ("interp.interventions", "interp.analysis"),
        ("probes", "interp.tracing"),
        ("interp.testing", "interp.cli"),
        ("interp.testing", "dashboards"),
        ("dashboards", "interp.cli"),
    ],
)
def test_import_contract_can_fail(copy: Path, importer: str, imported: str) -> None:
    # Inside a function, as the lazy imports of this project are: they count too.
    with module_file(copy, importer).open("a") as file:
        file.write(f"\ndef late():\n    import {imported}\n")
    code, output = lint_imports(copy)
    assert code == 1 and importer in output and imported in output, output


def test_every_module_is_seen_by_the_contract() -> None:
    # Files of a folder without __init__.py are invisible to the contract, and to `import` from a wheel they are not.
    homeless = {str(file.parent) for file in sources() if not (REPOSITORY / file.parent / "__init__.py").exists()}
    assert not homeless, f"folders with modules but no __init__.py: {sorted(homeless)}"


# --- dependencies


def imported_roots() -> dict[str, str]:
    """Every third-party root module that our sources import, and one file that does."""
    roots: dict[str, str] = {}
    for file in sources():
        for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                roots.setdefault(name.split(".")[0], str(file))
    return {name: file for name, file in roots.items() if name not in {*PACKAGES, *sys.stdlib_module_names}}


def requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    # What only `dev` has is no user's, and nothing that ships may import it.
    lists = [PROJECT["project"]["dependencies"], *(names for extra, names in extras.items() if extra != "dev")]
    return [Requirement(line) for names in lists for line in names]


def test_imports_are_declared() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    # Optional peers that a user has or has not; each is imported where it is used, and its absence is handled there.
    declared |= {"peft", "triton", "pytest", "bitsandbytes", "bertviz", "circuitsvis"}
    owners = importlib.metadata.packages_distributions()
    undeclared = {
        name: file
        for name, file in imported_roots().items()
        if not {canonicalize_name(owner) for owner in owners.get(name, [name])} & declared
    }
    assert not undeclared, f"imported, but in no dependency list of pyproject.toml: {undeclared}"


def test_constraints_pin_what_is_declared() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert all(re.fullmatch(r"==[^,*]+", text) for text in versions.values())
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*requirements(), *map(Requirement, extras["dev"])]:
        name = canonicalize_name(requirement.name)
        assert name in versions, f"constraints.txt does not pin {name}"
        assert versions[name][2:] in requirement.specifier, f"{requirement} does not allow the pin {versions[name]}"


# --- light imports

HEAVY = (
    "dash",
    "zarr",
    "ray",
    "umap",
    "triton",
    "plotly",
    "scipy",
    "sklearn",
    "transformers.models",
    "transformers.modeling_utils",
)
IMPORTS = {
    "": "pass",
    "interp": "import interp",
    "names": "import interp; [getattr(interp, name) for name in interp.__all__]",
    "layout": "import interp.models.layout",
    "testing": "import interp.testing",
    "probes": "import probes; probes.probes()",
    "heavy": "import plotly.graph_objects, zarr",
}
# Each in a process of its own, with nothing before it but what all of them may take for granted, and takes long.
PROBE = """
import json, os, sys, torch, xarray
for name, code in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    if not os.fork():
        exec(code, {})
        print(json.dumps([name, list(sys.modules)]), flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, code
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """Names of all modules that are loaded after each of the imports."""
    done = run("-c", PROBE, json.dumps(IMPORTS))
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert list(found) == list(IMPORTS)
    return found


def heavy_modules(loaded: list[str]) -> set[str]:
    return {heavy for heavy in HEAVY for name in loaded if name == heavy or name.startswith(heavy + ".")}


def test_import_interp_is_light(imported: dict[str, list[str]]) -> None:
    # Measured in tests/benchmarks/bench_import.py; here only what must not be there, which no busy machine can change.
    alone = heavy_modules(imported[""])
    assert heavy_modules(imported["interp"]) <= alone
    assert heavy_modules(imported["names"]) <= alone


def test_layouts_specimens_and_the_list_of_probes_are_light(imported: dict[str, list[str]]) -> None:
    assert [name for name in imported["layout"] if name.startswith("transformers")] == []
    assert [name for name in imported["testing"] if "transformers.models" in name or ".modeling_" in name] == []
    assert {"transformers", "sklearn", "scipy"} & set(imported["probes"]) == set()


@pytest.mark.parametrize("package", ["interp", "interp.attention", "interp.tracing"])
def test_every_public_name_resolves(package: str) -> None:
    # Names are resolved on first use: a wrong one would show only to its first user.
    module = importlib.import_module(package)
    assert module.__all__
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_light_import_can_fail(imported: dict[str, list[str]]) -> None:
    assert {"plotly", "zarr"} <= heavy_modules(imported["heavy"])


def test_the_op_and_tracing_need_no_zarr() -> None:
    block = "sys.modules['zarr'] = sys.modules['dash'] = sys.modules['plotly'] = None"
    done = run("-c", f"import sys; {block}; import interp.attention; import interp.tracing")
    assert done.returncode == 0, done.stderr


# --- our packages are ours


def make_package(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise SystemExit('a foreign package was run')\n")


@pytest.mark.parametrize("name", PACKAGES)
def test_foreign_package_is_named(tmp_path: Path, name: str) -> None:
    make_package(tmp_path, name)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(REPOSITORY)!r}]; import headscope; headscope.main()"
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 1
    assert f"package '{name}' must be Headscope's" in done.stderr and str(tmp_path / name) in done.stderr
    assert "Traceback" not in done.stderr and "foreign package was run" not in done.stderr


def test_own_packages_pass() -> None:
    done = run("-c", "import headscope; headscope.check_packages()")
    assert done.returncode == 0, done.stderr


# --- papers agree


def test_versions_agree() -> None:
    version = re.search(r'__version__ = "(.+)"', (REPOSITORY / "interp/_version.py").read_text())
    assert version
    headings = re.findall(r"^## \[(\d+\.\d+\.\d+.*?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == version[1]
    assert importlib.metadata.version("headscope") == version[1]


def test_readme_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:`|^|\s)make ([a-z][a-z -]*)", (REPOSITORY / page).read_text(), re.MULTILINE))
        wanted = {word for words in named for word in words.split()}
        shown = {word for word in wanted if word in targets}
        assert shown, page
        code = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", (REPOSITORY / page).read_text(), re.MULTILINE)
        assert {first or second for first, second in code} <= targets
    assert {"demo", "test"} <= targets


def test_readme_links_exist() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", (REPOSITORY / page).read_text()):
            assert (REPOSITORY / link).exists(), f"{page}: {link}"


def test_readme_sections_are_marked_in_pairs() -> None:
    marks = re.findall(r"<!-- (generated: [\w-]+|end) -->", (REPOSITORY / "README.md").read_text())
    assert marks and marks[1::2] == ["end"] * (len(marks) // 2) and len(marks) % 2 == 0
    assert len(set(marks[::2])) == len(marks) // 2


def test_no_path_of_one_machine_in_tracked_files() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(r"/work/(main|shared|steering)|/home/\w+/|/Users/\w+/")
    for name in listed.stdout.split("\0"):
        file = REPOSITORY / name
        if not name or name == "tests/test_repository.py" or not file.is_file() or file.stat().st_size > 1_000_000:
            continue
        found = machine.search(file.read_text(errors="ignore"))
        assert not found, f"{name}: {found and found[0]}"
