"""The tokenizer and the processor of the scenes models: byte-level BPE that knows every word of the world."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts the repository on the path)

from probes.scenes.language import DESCRIBE, sentences

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
PAD, BOS, EOS, IMAGE = range(4)
EXTRA = (
    "Please help me describe the image in detail.",
    "Is this a picture of a scene? Answer with one word: yes or no.",
    "Describe this picture in one sentence.",
)
CHAT = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% else %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@functools.cache
def fast_tokenizer(lines: int = 20_000) -> Any:
    """A ``tokenizers.Tokenizer`` trained on the world's language; the same on every run."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    corpus = [line.replace("<image>", "") for line in sentences(lines)] + [*EXTRA, *DESCRIBE] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return made


PREFIX_TEXT = "USER: "
PREFIX = (BOS, *fast_tokenizer().encode(PREFIX_TEXT, add_special_tokens=False).ids)
"""What stands before the image in every prompt."""


def tokenizer() -> Any:
    """The transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(), pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        model_max_length=1024, chat_template=CHAT, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def save_processor(folder: Path, *, patch: int, size: int) -> None:
    """Write tokenizer, image processor and LLaVA's processor into the folder of a model."""
    from transformers import LlavaProcessor

    LlavaProcessor(
        image_processor=image_processor(size), tokenizer=tokenizer(), patch_size=patch,
        vision_feature_select_strategy="default", chat_template=CHAT, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


def image_processor(size: int) -> Any:
    """Pixels to [-1, 1]; other pictures are resized and cropped to the world's size."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
