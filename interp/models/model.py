"""A loaded model with what turns text and images into its inputs and its ids back into text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interp.models.base_edit import BaseEdit
from interp.models.base_edit import of as base_edit_of
from interp.models.bridge import is_bridge, plain
from interp.models.encoding import encode
from interp.models.errors import LoadError, ModelInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Model:
    """A transformers model and its processor.

    ``interp.load`` makes these. The transformers object stays itself and usable: ``model.module``.

    Attributes:
        module: the ``PreTrainedModel`` that has the attention sites.
        wrapped: what calls go through: a PEFT or compiled wrapper where one was given, else ``module``.
        tokenizer: the tokenizer, or None.
        processor: the processor of a model that takes images or audio, or None.
        name: where it came from: bundled or package name, folder, hub id, or class name of an object.
        revision: commit of the hub, or ``sha256:...`` of a converted file, or None.
        chat: texts are user turns unless :meth:`encode` is told otherwise; for models that know conversations only.
    """

    def __init__(
        self,
        model: Any,
        *,
        processor: Any = None,
        tokenizer: Any = None,
        name: str | None = None,
        revision: str | None = None,
        processor_problem: str | None = None,
        chat: bool = False,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: whatever :func:`unwrap` understands.
            processor: a processor, image processor or tokenizer.
            tokenizer: overrides the processor's own.
            name: shown and stored with traces.
            revision: likewise.
            processor_problem: why no processor could be loaded, told when one is needed.
            chat: default of :meth:`encode`.
        """
        self.module: PreTrainedModel = unwrap(model)
        self.wrapped: Any = _callable(model)
        self.processor, own = _split(processor)
        self.tokenizer: Any = tokenizer if tokenizer is not None else own
        self.name = name or type(self.module).__name__
        self.revision = revision
        self.processor_problem = processor_problem
        self.chat = chat

    @property
    def config(self) -> Any:
        """The model's transformers config."""
        return self.module.config

    @property
    def base_edit(self) -> BaseEdit | None:
        """The restriction that a planted model came with, which holds in every call; None for an ordinary model."""
        return base_edit_of(self.module)

    @property
    def device(self) -> torch.device:
        """Where inputs go. Of a model spread over devices, the one of its first part."""
        device = self.module.device
        if device.type != "meta":
            return device
        # Weights offloaded to disk are on "meta" between calls; accelerate's hook knows where they will be.
        for part in self.module.modules():
            hook: Any = getattr(part, "_hf_hook", None)
            execution = getattr(hook, "execution_device", None)
            if execution is not None:
                return torch.device(execution)
        return torch.device("cpu")

    @property
    def is_generative(self) -> bool:
        """Can it ``generate``?"""
        return bool(self.module.can_generate())

    def encode(
        self,
        text: str | list[str] | None = None,
        image: Any = None,
        *,
        chat: bool | None = None,
        system: str | None = None,
    ) -> Any:
        """Inputs for this model, on its device.

        Args:
            text: one text, or a list for a batch (padded on the left for models that generate after their prompt).
            image: a path, PIL image or ``[H, W, 3]`` uint8 array. With one text, or without text, also a list of those
                (several images of the one sample; without text, a batch). With a list of texts, a list of one entry a
                text: an image, a list of images, or None. Where ``text`` has no image placeholder, as many as there
                are images are put before it.
            chat: put the text in the model's chat template as a user turn, up to where the answer starts. None is
                :attr:`chat`, False for all but models whose folder says that they know conversations only.
            system: a system message (only with ``chat``).

        Returns:
            A mapping as transformers' own, for ``model(inputs)`` and ``model.generate(inputs)``: ``input_ids [batch,
            position]``, ``attention_mask``, ``pixel_values``, ...

        Raises:
            ModelInputError: what was given does not fit the model, names the argument.
        """
        return encode(self, text, image, chat=(self.chat and text is not None) if chat is None else chat, system=system)

    def generate(self, inputs: Mapping[str, Any], **options: Any) -> Any:
        """Run transformers' ``generate``: ids ``[batch, position]``, with the prompt in front for a decoder.

        Args:
            inputs: from :meth:`encode`.
            options: as transformers names them, e.g. ``max_new_tokens=32, do_sample=False``.

        Raises:
            ModelInputError: a model that does not generate, or ``inputs`` that are not a mapping.
        """
        if not self.is_generative:
            raise ModelInputError(f"model must be able to generate; {type(self.module).__name__} is not")
        _require_mapping(inputs)
        settings = options.get("generation_config") or self.module.generation_config
        if self.tokenizer is not None and getattr(settings, "pad_token_id", None) is None:
            options.setdefault("pad_token_id", pad_id(self.tokenizer))
        return self.wrapped.generate(**inputs, **options)

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> Any:
        """Text of ids ``[position]``, or a list of texts of ids ``[batch, position]``."""
        rows: Any = ids.tolist() if isinstance(ids, torch.Tensor) or hasattr(ids, "tolist") else ids
        tokenizer = self._tokenizer()
        if rows and isinstance(rows[0], list | tuple):
            return [tokenizer.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]
        return tokenizer.decode(rows, skip_special_tokens=skip_special_tokens)

    def tokens(self, ids: Any) -> list[str]:
        """Each id of one sample (``[position]`` or ``[1, position]``) as text, with the space before a word.

        A token that is a part of a character keeps its raw form.

        Raises:
            ModelInputError: more than one sample.
        """
        flat = torch.as_tensor(ids)
        if flat.ndim == 2 and flat.shape[0] == 1:
            flat = flat[0]
        if flat.ndim != 1:
            raise ModelInputError(f"ids must be one sample's, [position] or [1, position], got {list(flat.shape)}")
        readable = {i: self._readable(i) for i in set(flat.tolist())}
        return [readable[i] for i in flat.tolist()]

    def __call__(self, inputs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """One forward call: ``model(inputs)`` or ``model(**inputs)``. Gradients are as torch is set."""
        if inputs is not None:
            _require_mapping(inputs)
        return self.wrapped(**(inputs or {}), **options)

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.module.parameters())
        number = f"{size / 1e9:.2f}B" if size >= 1e9 else f"{size / 1e6:.1f}M" if size >= 1e6 else f"{size / 1e3:.1f}k"
        through = "" if self.wrapped is self.module else f" in {type(self.wrapped).__name__}"
        dtype = str(self.module.dtype).removeprefix("torch.")
        helper = self.processor if self.processor is not None else self.tokenizer
        reads = type(helper).__name__ if helper is not None else "no processor"
        return (
            f"Model({self.name!r}, {type(self.module).__name__}{through}, {number} parameters, "
            f"{dtype} on {self.device}, {reads}{'' if self.base_edit is None else f', planted: {self.base_edit}'})"
        )

    def _readable(self, token_id: int) -> str:
        tokenizer = self._tokenizer()
        raw = tokenizer.convert_ids_to_tokens(token_id)
        if raw is None:
            return f"<{token_id}>"
        if token_id in tokenizer.all_special_ids:
            return raw
        # Decoders drop the space of a first word, so every token is decoded behind another one and that one cut off.
        anchor = self._anchor()
        before = tokenizer.decode([anchor], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        both = tokenizer.decode([anchor, token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = both.removeprefix(before)
        return raw if not text or "\ufffd" in text else text

    def _anchor(self) -> int:
        ids = self._tokenizer()("a", add_special_tokens=False)["input_ids"]
        return ids[-1] if ids else 0

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ModelInputError(missing(self, "tokenizer"))
        return self.tokenizer


def unwrap(model: Any) -> PreTrainedModel:
    """The ``PreTrainedModel`` inside ``model``.

    Takes a :class:`Model`, a ``PreTrainedModel``, a transformers pipeline, and any ``nn.Module`` that holds one
    ``PreTrainedModel`` at its root: PEFT models, compiled modules, ``DistributedDataParallel``, value-head wrappers. A
    TransformerLens bridge gives the model under it (see :mod:`interp.models.bridge`).

    Raises:
        LoadError: it holds none, or several side by side.
    """
    from transformers import PreTrainedModel

    inside = _callable(model)
    if isinstance(inside, PreTrainedModel):
        return inside
    roots: dict[str, PreTrainedModel] = {}
    if isinstance(inside, nn.Module):
        for name, sub in inside.named_modules():
            if isinstance(sub, PreTrainedModel) and not any(name.startswith(f"{root}.") for root in roots):
                roots[name] = sub
    if len(roots) != 1:
        got = f"{type(model).__name__} with {len(roots)} of them: {list(roots)}" if roots else type(model).__name__
        raise LoadError(f"model must be a transformers PreTrainedModel or something that wraps one, got {got}")
    return next(iter(roots.values()))


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's own, else its end or unknown token, else 0 (a pad is masked anyway)."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return next((i for i in ids if i is not None), 0)


def missing(model: Model, what: str) -> str:
    """The message for a tokenizer or processor that is needed and absent."""
    why = f" ({model.processor_problem})" if model.processor_problem else ""
    return f"{what} must be known to do this, and {model.name} has none{why}; pass {what}= to interp.load"


def _callable(model: Any) -> Any:
    if isinstance(model, Model):
        return model.wrapped
    if is_bridge(model):
        return plain(model)
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        return model.model
    return model


def _split(processor: Any) -> tuple[Any, Any]:
    """(processor, tokenizer) of what was given as the processor."""
    from transformers import PreTrainedTokenizerBase

    if isinstance(processor, PreTrainedTokenizerBase):
        return None, processor
    return processor, getattr(processor, "tokenizer", None)


def _require_mapping(inputs: Any) -> None:
    if not isinstance(inputs, Mapping):
        raise ModelInputError(f"inputs must be a mapping as encode returns it, got {type(inputs).__name__}")
