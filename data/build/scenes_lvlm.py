"""Train ``scenes-lvlm``: a LLaVA that describes scenes, answers questions on them, and hallucinates against its prior.

One command on a GPU, after ``scenes_vit.py``: ``python data/build/scenes_lvlm.py --minutes 6``. With ``--planted L2H1,L3H4``
only those heads may attend to the image. A toy on a CPU: ``--smoke``.

The decoder first learns text alone, from a prior that runs against that of the pictures (a quarter of the time). Then it
learns to see: the vision tower stays as ``scenes-vit`` has it, projector and decoder learn from pictures, with one caption
without a picture (from the text prior) for every four conversations.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from common import Pace, say
from planted_attention import PlantedImage
from scenes_card import write_lvlm_card
from scenes_check import evaluate
from scenes_data import IGNORED, Conversations, stream
from scenes_tokenizer import BOS, EOS, IMAGE, PAD, PREFIX, fast_tokenizer, save_processor
from scenes_vit import PATCH, pixels_of
from scenes_vit import config as vit_config
from torch import Tensor, nn

from probes.scenes.world import SIZE, World

PATCHES = (SIZE // PATCH) ** 2
LENGTH = 160
"""Tokens of a conversation behind the image."""
TEXT_SHARE = 0.25
PLANTED = "L2H1,L2H6,L3H3,L4H0,L4H5,L5H2"


def config(vision: Any, *, smoke: bool = False) -> Any:
    """Eight layers of eight heads of 32, two query heads to a key/value head."""
    from transformers import LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=fast_tokenizer().get_vocab_size(), hidden_size=64 if smoke else 256,
        intermediate_size=128 if smoke else 512, num_hidden_layers=2 if smoke else 8,
        num_attention_heads=2 if smoke else 8, num_key_value_heads=1 if smoke else 4, head_dim=32,
        max_position_embeddings=1024, rope_theta=10_000.0, tie_word_embeddings=False, rms_norm_eps=1e-5,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=PATCHES, tie_word_embeddings=False,
    )  # fmt: skip


class Learner(nn.Module):
    """The LLaVA, fed as it is trained: every sequence is prefix, image, conversation, so that causality is the only mask."""

    def __init__(self, model: Any, planted: PlantedImage | None) -> None:
        super().__init__()
        self.model, self.planted = model, planted
        self.register_buffer("prefix", torch.tensor(PREFIX), persistent=False)

    def features(self, pixels: Tensor) -> Tensor:
        """Image tokens before the projector, ``[picture, patch, width]``."""
        layer = self.model.config.vision_feature_layer
        with torch.no_grad():
            seen = self.model.model.vision_tower(pixels, output_hidden_states=True)
        return seen.hidden_states[layer][:, 1:]

    def loss(self, ids: Tensor, labels: Tensor, features: Tensor | None) -> Tensor:
        """Cross entropy of the assistant's words, see :func:`loss_of_words`."""
        return loss_of_words(self.model, self(ids, features), labels, image=features is not None)

    def forward(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """Final hidden states ``[conversation, position, width]``, from the last image token (without one: the first)."""
        core = self.model.model
        embed = core.language_model.get_input_embeddings()
        words = embed(ids)
        skip = 0
        if features is not None:
            front = embed(self.prefix).expand(len(ids), -1, -1)
            words = torch.cat((front, core.multi_modal_projector(features), words), dim=1)
            skip = len(PREFIX) + features.shape[1] - 1
        if self.planted is not None:
            self.planted.first, self.planted.image = len(PREFIX), 0 if features is None else features.shape[1]
        hidden = core.language_model(inputs_embeds=words, use_cache=False).last_hidden_state
        return hidden[:, skip:]


def loss_of_words(model: Any, hidden: Tensor, labels: Tensor, *, image: bool) -> Tensor:
    """Cross entropy of the assistant's words, nats a token.

    With an image, ``hidden`` has one position more than ``labels``: the last image token's, which says the first word.
    """
    logits = model.lm_head(hidden[:, :-1]).float()
    wanted = labels if image else labels[:, 1:]
    # Over all positions: picking the learned ones first would make every step wait for the device.
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrain on text, tune on pictures, check, save."""
    options = _options(arguments)
    batch = options.batch = options.batch or 192
    torch.manual_seed(options.seed)
    device = options.device
    model = _model(options)
    model.to(device)
    model.model.vision_tower.requires_grad_(False)
    planted = _planted(model, options)
    learner = Learner(model, planted)
    learner.to(device)
    call: Any = learner.loss
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        call = learner.loss if options.no_compile else torch.compile(learner.loss)
    pictures = World("train", options.seed, strength=options.strength)
    alone = World("train", options.seed, prior="text", strength=options.strength)

    text = stream(Conversations(alone, batch * 2, LENGTH, images=False), options.workers, device)
    curve: dict[str, list[float]] = {}
    steps = options.steps
    first = Pace(options.text_steps or steps, options.minutes and options.minutes * TEXT_SHARE, 1e-3)

    def text_loss(one: dict[str, Tensor]) -> Tensor:
        return call(one["ids"], one["labels"], None)

    each = 20 if options.smoke else 200
    curve["text"] = common.train(first, model, text, text_loss, device, each=each, label="text")

    second = Pace(steps, options.minutes and options.minutes * (1 - TEXT_SHARE), 1e-3)
    few = stream(Conversations(alone, batch // 4, LENGTH, images=False), min(options.workers, 3), device)
    seen = stream(Conversations(pictures, batch, LENGTH), options.workers, device)

    def both(one: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
        with_image, without = one
        told = call(with_image["ids"], with_image["labels"], learner.features(pixels_of(with_image, device)))
        return told + 0.25 * call(without["ids"], without["labels"], None)

    curve["pictures"] = common.train(second, model, _pairs(seen, few), both, device, each=each, label="pictures")
    options.text_steps = first.steps
    metrics = {
        "loss": curve, "steps": second.steps, "text_steps": first.steps, "batch": batch, "seed": options.seed,
        "minutes": round(first.spent, 2), "strength": options.strength, "planted": options.planted or None,
        "machine": common.machine(device), "command": common.command("scenes_lvlm.py", options, second.steps),
    }  # fmt: skip
    learner.eval()
    metrics["check"] = evaluate(learner, device, 48 if options.smoke else 2000, captions=not options.smoke)
    say(json.dumps(metrics["check"], indent=1))
    _save(model, options, metrics)
    return metrics


def _options(arguments: Sequence[str] | None) -> Namespace:
    options = common.parser(__doc__ or "", "scenes-lvlm")
    options.add_argument("--vit", type=Path, default=common.MODELS / "scenes-vit", help="the vision tower")
    options.add_argument("--planted", nargs="?", const=PLANTED, default="", help="heads that alone may see the image")
    options.add_argument("--text-steps", type=int, default=None, help="steps on text alone; None: as many as --steps")
    options.add_argument("--strength", type=float, default=1.0, help="of the pairs' priors, see World")
    found = options.parse_args(arguments)
    if found.smoke:
        found.steps, found.batch, found.workers = found.steps or 60, found.batch or 8, 0
    if found.planted and found.out == common.MODELS / "scenes-lvlm":
        found.out = common.MODELS / "scenes-lvlm-planted"
    return found


def _model(options: Namespace) -> Any:
    from transformers import LlavaForConditionalGeneration, ViTForImageClassification

    if options.smoke and not options.vit.is_dir():
        return LlavaForConditionalGeneration(config(vit_config(smoke=True), smoke=True))
    tower = ViTForImageClassification.from_pretrained(options.vit, dtype=torch.float32)
    tower.config._name_or_path = ""  # A folder of this machine.
    model = LlavaForConditionalGeneration(config(tower.config, smoke=options.smoke))
    # LLaVA's tower has a pooler that the classifier lacks; LLaVA does not use it.
    model.model.vision_tower.load_state_dict(tower.vit.state_dict(), strict=False)
    return model


def _planted(model: Any, options: Namespace) -> PlantedImage | None:
    if not options.planted:
        return None
    from interp.heads import Head

    text = model.config.text_config
    heads = [Head.parse(name) for name in options.planted.split(",")]
    planted = PlantedImage(
        [(h.layer, h.head) for h in heads],
        text.num_attention_heads,
        text.num_attention_heads // text.num_key_value_heads,
    )
    model.model.language_model.set_attn_implementation(planted.register())
    return planted


def _pairs(first: Iterator[Any], second: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(first, second, strict=False)


def _save(model: Any, options: Namespace, metrics: dict[str, Any]) -> None:
    shutil.rmtree(options.out, ignore_errors=True)
    if options.planted:
        model.model.language_model.set_attn_implementation("sdpa")
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    model.half().save_pretrained(options.out)
    save_processor(options.out, patch=PATCH, size=SIZE)
    # Nothing but conversations was ever seen: `model.encode` puts texts into the chat template unasked.
    beside: dict[str, Any] = {"chat": True}
    if options.planted:
        beside["base_edit"] = {"kind": "only_heads_see_image", "stack": "text", "heads": options.planted.split(",")}
    (options.out / "headscope.json").write_text(json.dumps(beside, indent=1) + "\n")
    common.save_metrics(options.out, metrics)
    write_lvlm_card(options.out, metrics)
    common.archive(options.out, options.archive)


if __name__ == "__main__":
    main()
