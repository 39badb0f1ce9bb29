"""Every source a model can come from, and what is said where none comes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.models import LoadError, Model, load, unwrap
from interp.models import loading as loading_module
from interp.models.classes import model_class
from interp.testing import build


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(10, 20)[None]).logits


def test_local_folder(llama_folder: Path) -> None:
    model = load(llama_folder)
    assert type(model.module).__name__ == "LlamaForCausalLM" and not model.module.training
    assert model.name == str(llama_folder) and model.revision is None
    assert model.tokenizer is not None and model.processor is None and model.is_generative
    assert torch.equal(logits(model), logits(build("llama").module))
    assert "LlamaForCausalLM" in repr(model) and "float32 on " in repr(model)


def test_default_device_is_cuda_where_there_is_one(llama_folder: Path) -> None:
    assert load(llama_folder).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load(llama_folder, device="cpu").device.type == "cpu"


def test_fp16_checkpoint_becomes_fp32_on_a_cpu_only_by_default(tmp_path: Path) -> None:
    build("llama").module.half().save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").module.dtype == torch.float32
    assert load(tmp_path, device="cpu", dtype="auto").module.dtype == torch.float16
    assert load(tmp_path, device="cpu", dtype="bfloat16").module.dtype == torch.bfloat16
    build("llama").module.bfloat16().save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").module.dtype == torch.bfloat16


def test_device_map_places_the_model(llama_folder: Path, tmp_path: Path) -> None:
    # Even on a CPU accelerate takes the decoder layers off the disk one by one.
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    model = load(llama_folder, device_map=places, offload_folder=str(tmp_path))
    assert model.module.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    assert model.device.type == "cpu"
    assert torch.allclose(logits(model), logits(build("llama").module), atol=1e-6)
    with pytest.raises(LoadError, match="device and device_map"):
        load(llama_folder, device="cpu", device_map="auto")


def test_options_reach_from_pretrained(llama_folder: Path) -> None:
    assert load(llama_folder, attn_implementation="eager").config._attn_implementation == "eager"


def hub_cache(tmp_path: Path, source: Path, name: str, commit: str) -> Path:
    """The hub's own cache layout, as a download leaves it."""
    root = tmp_path / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "tuned").write_text(commit)
    return tmp_path


def test_a_model_with_a_softcap_is_loaded_where_it_is_applied(tmp_path: Path) -> None:
    build("gemma2").module.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model), logits(build("gemma2").module))


def test_hub_id_with_revision(llama_folder: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = hub_cache(tmp_path, llama_folder, "some-lab/tiny-llama", commit)
    model = load("some-lab/tiny-llama", revision="tuned", cache_dir=str(cache), local_files_only=True)
    assert (model.name, model.revision) == ("some-lab/tiny-llama", commit)
    assert model.tokenizer is not None
    assert torch.equal(logits(model), logits(build("llama").module))
    with pytest.raises(LoadError, match="some-lab/tiny-llama"):
        load("some-lab/tiny-llama", revision="other", cache_dir=str(cache), local_files_only=True)


def test_hub_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"^some-lab/nothing is neither .* hub cannot be reached.* pass a folder"):
        load("some-lab/nothing", cache_dir=str(tmp_path))


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_name_is_not_the_folder_one_is_in(source: str) -> None:
    with pytest.raises(LoadError, match=f"source must name a model, a folder, a file or a hub id, got '{source}'"):
        load(source)


def test_bundled_name(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(llama_folder, tmp_path / "scenes-tiny")
    monkeypatch.setattr(loading_module, "BUNDLED", (tmp_path / "absent", tmp_path))
    assert load("scenes-tiny").name == "scenes-tiny"


def test_loaded_object_is_used_as_it_is(tokenizer: Any) -> None:
    module = build("llama").module.train()
    model = load(module, tokenizer=tokenizer())
    assert model.module is module and model.wrapped is module and not module.training
    assert load(model).tokenizer is model.tokenizer and load(model).module is module
    assert load(module, dtype=torch.float64).module.dtype == torch.float64
    refused: list[dict[str, Any]] = [{"revision": "main"}, {"token": "x"}]
    for options in refused:
        with pytest.raises(LoadError, match=f"{next(iter(options))} must not be given with a loaded model"):
            load(module, **options)


def test_peft_model(tokenizer: Any) -> None:
    import peft

    base = build("llama").module
    plain = logits(base)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model = load(wrapped, tokenizer=tokenizer())
    assert model.module is base and unwrap(wrapped) is base and model.wrapped is wrapped
    assert not torch.equal(logits(model), plain)
    assert torch.equal(logits(model), logits(wrapped))
    inputs = model.encode("w10 w11 w12")
    assert torch.equal(
        model.generate(inputs, max_new_tokens=4, do_sample=False),
        wrapped.generate(**inputs, max_new_tokens=4, do_sample=False),
    )


def test_prompt_tuning_keeps_its_soft_prompt() -> None:
    import peft

    base = build("llama").module
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = load(peft.get_peft_model(base, config))
    assert model.module is base
    assert logits(model).shape[1] == 10 + 3


def test_compiled_model() -> None:
    module = build("llama").module
    compiled = torch.compile(module, backend="eager")
    assert unwrap(compiled) is module
    assert load(compiled).wrapped is compiled
    assert torch.allclose(logits(load(compiled)), logits(module), atol=1e-6)


def test_pipeline(llama_folder: Path) -> None:
    from transformers import pipeline

    pipe = pipeline("text-generation", model=str(llama_folder), device="cpu")
    model = load(pipe)
    assert model.module is pipe.model and model.tokenizer is pipe.tokenizer


def test_one_model_inside_any_module() -> None:
    module = build("llama").module
    holder = torch.nn.Module()
    holder.value_head, holder.pretrained_model = torch.nn.Linear(2, 2), module
    assert unwrap(holder) is module
    # A vision-language model holds several; it is itself the outermost.
    llava = build("llava").module
    assert unwrap(llava) is llava
    holder.other = build("bert").module
    with pytest.raises(LoadError, match=r"2 of them: \['pretrained_model', 'other'\]"):
        unwrap(holder)
    for wrong in (torch.nn.Linear(2, 2), 3, None):
        with pytest.raises(LoadError, match="model must be a transformers PreTrainedModel"):
            unwrap(wrong)


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("bert", "AutoModelForMaskedLM"),
        ("bart", "AutoModelForSeq2SeqLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("whisper", "AutoModelForSpeechSeq2Seq"),
        ("gemma3", "AutoModelForImageTextToText"),
        ("llava", "AutoModelForImageTextToText"),
        ("vit", "AutoModelForImageClassification"),
        ("clip", "AutoModel"),
        ("deit", "AutoModel"),
    ],
)
def test_class_from_config(family: str, auto: str) -> None:
    module = build(family).module
    config = module.config
    config.architectures = None
    if family == "vit":
        config.id2label = {0: "tench", 1: "goldfish"}
    assert model_class(config).__name__ == auto
    config.architectures = ["NoSuchThing", type(module).__name__]
    assert model_class(config) is type(module)


def test_weights_that_are_not_there_are_told(tmp_path: Path) -> None:
    module = build("llama").module
    module.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(architectures=["LlamaForCausalLM"], tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"1 weights of LlamaForCausalLM .* random: lm_head\.weight"):
        load(tmp_path)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_runs_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "own"
    build("llama").module.save_pretrained(folder)
    (folder / "modeling_own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    autos = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config.update(model_type="own-llama", architectures=["OwnModel"], auto_map=autos)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="pass trust_remote_code=True if you trust it"):
        load(folder)
    assert type(load(folder, trust_remote_code=True).module).__name__ == "OwnModel"


def test_sources_that_are_no_model(tmp_path: Path, llama_folder: Path, picture: Path) -> None:
    for source, says in (
        (tmp_path / "absent", "that exists"),
        ("./absent", "that exists"),
        ("absent.gguf", "that exists"),
        (picture, r"folder or a \.gguf file, got the file"),
        (picture.parent, r"with config\.json or a \.gguf file, got .*noise\.png"),
        (3, "PreTrainedModel"),
        (None, "PreTrainedModel"),
    ):
        with pytest.raises(LoadError, match=says):
            load(source)
    with pytest.raises(LoadError, match=r"dtype must be .* got 'float33'"):
        load(llama_folder, dtype="float33")
    broken = shutil.copytree(llama_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(LoadError, match=r"broken could not be loaded"):
        load(broken)
    (broken / "config.json").write_text('{"model_type": "llama-of-2040"}')
    with pytest.raises(LoadError, match="llama-of-2040"):
        load(broken)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match=r"peft\.PeftModel\.from_pretrained"):
        load(adapter)


def test_without_tokenizer_files_there_is_no_tokenizer(tmp_path: Path) -> None:
    # transformers makes an empty GPT-2 tokenizer where there is no file, and every text would be no token.
    build("gpt2").module.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.tokenizer is None and "no processor" in repr(model)
    assert isinstance(model, Model) and model.processor_problem


def test_importing_the_package_is_light() -> None:
    code = "import sys, interp.models, interp.heads; assert 'transformers' not in sys.modules"
    environment = {"PYTHONPATH": str(Path(loading_module.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
