"""Tokenizers and pictures for tiny models, made here so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHAT = (
    "{% for m in messages %}{% if m.content is string %}<s> {{ m.content }} {% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image> {% else %}{{ p.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w90{% endif %}"
)


def tiny_tokenizer(special: Mapping[str, int] | None = None, *, pad: bool = True, **options: Any) -> Any:
    """Words ``w10`` to ``w95`` are the ids 10 to 95; ``<s>`` (1) is put before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **(special or {})}
    taken = set(vocab.values())
    vocab.update({f"w{i}": i for i in range(96) if i not in taken})
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **({"pad_token": "<pad>"} if pad else {})}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=list(special or {}), **names, **options
    )


@pytest.fixture
def tokenizer() -> Callable[..., Any]:
    return tiny_tokenizer


@pytest.fixture(scope="session")
def chat_template() -> str:
    return CHAT


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with a tokenizer that has no pad token."""
    from interp.testing import build

    folder = tmp_path_factory.mktemp("llama")
    build("llama").module.save_pretrained(folder)
    tiny_tokenizer(pad=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG of 40 x 30 coloured noise."""
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
