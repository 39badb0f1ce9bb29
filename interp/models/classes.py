"""Which transformers class a config asks for."""

from __future__ import annotations

from typing import Any

HEADS = ("SpeechSeq2Seq", "ImageTextToText", "Seq2SeqLM", "MaskedLM", "CausalLM", "ImageClassification")
"""Auto classes to try in this order for a config that names no architecture; plain ``AutoModel`` is last."""


def model_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The class to load a checkpoint of ``config`` with.

    The first of ``config.architectures`` that transformers has; for code that comes with the checkpoint (only where
    trusted) the auto class its ``auto_map`` names; else by the kind of config.
    """
    import transformers

    remote = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    if trust_remote_code and remote:
        return getattr(transformers, min(remote, key=lambda name: name == "AutoModel"))
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for head in HEADS:
        if head == "MaskedLM" and getattr(config, "is_decoder", False):
            continue
        if head == "Seq2SeqLM" and not getattr(config, "is_encoder_decoder", False):
            continue
        # Without labels of its own a classifier would be a random one on top of a good backbone.
        if head == "ImageClassification" and (getattr(config, "id2label", None) or {}).get(0, "LABEL_0") == "LABEL_0":
            continue
        auto = getattr(transformers, f"AutoModelFor{head}")
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModel
