"""Scores of attention heads: :func:`scores` lists them, :func:`score` runs one; :func:`analyses` lists what gives no number a head."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from interp.analysis.functions import AnalysisInfo, analyses

if TYPE_CHECKING:
    import xarray as xr

    from interp.analysis.running import HeadScore

_HOMES = {
    "entropy": ("entropy", "Entropy"),
    "sink": ("sink", "Sink"),
    "effective_keys": ("effective_keys", "EffectiveKeys"),
    "top_k_mass": ("top_k_mass", "TopKMass"),
    "selection_margin": ("selection_margin", "SelectionMargin"),
    "attention_distance": ("attention_distance", "AttentionDistance"),
    "elasticity": ("elasticity", "Elasticity"),
    "redundancy": ("redundancy", "Redundancy"),
    "previous_token": ("diagonals", "PreviousToken"),
    "duplicate_token": ("diagonals", "DuplicateToken"),
    "induction": ("diagonals", "Induction"),
    "prefix_matching": ("diagonals", "PrefixMatching"),
    "copying": ("copying", "Copying"),
    "ov_copying": ("circuits", "OVCopying"),
    "qk_matching": ("circuits", "QKMatching"),
    "retrieval": ("retrieval", "Retrieval"),
    "activation_frequency": ("activation_frequency", "ActivationFrequency"),
    "needle_contribution": ("needle_contribution", "NeedleContribution"),
    "duo_attention": ("duo_attention", "DuoAttention"),
    "streaming_mass": ("streaming_mass", "StreamingMass"),
    "query_mass": ("query_mass", "QueryMass"),
    "vision_aware_divergence": ("vision_divergence", "VisionAwareDivergence"),
    "local_vision_divergence": ("local_divergence", "LocalDivergence"),
    "image_mass": ("image_mass", "ImageMass"),
    "image_centric": ("image_centric", "ImageCentric"),
    "visual_sink_share": ("image_centric", "VisualSinkShare"),
    "grounding": ("grounding", "Grounding"),
    "ablation": ("ablation", "Ablation"),
    "direct_effect": ("direct_effect", "DirectEffect"),
    "logit_attribution": ("logit_attribution", "LogitAttribution"),
    "activation_patching": ("activation_patching", "ActivationPatching"),
    "attribution_patching": ("attribution_patching", "AttributionPatching"),
    "path_patching": ("path_patching", "PathPatching"),
    "head_gates": ("head_gates", "HeadGates"),
    "write_norm": ("write_norm", "WriteNorm"),
    "entry_influence": ("entry_influence", "EntryInfluence"),
    "vit_importance": ("vit_importance", "VitImportance"),
}
_CLASSES = {class_name: home for home, class_name in _HOMES.values()}

__all__ = ["AnalysisInfo", "ScoreInfo", "analyses", "score", "scores"]


class ScoreInfo(NamedTuple):
    """One entry of :func:`scores`.

    Attributes:
        name: for :func:`score`.
        summary: one line.
        paper: reference with link.
        unit: of the value.
        stacks: stacks it applies to.
        probe: the probe it runs on by default.
        settings: keyword arguments and their defaults.
        control: what the score's ``null`` is.
        needs: what the model must be.
    """

    name: str
    summary: str
    paper: str
    unit: str
    stacks: tuple[str, ...]
    probe: str
    settings: dict[str, Any]
    control: str = ""
    needs: str = ""


def scores() -> list[ScoreInfo]:
    """Every score that there is."""
    return [_info(_class(name)) for name in _HOMES]


def score(name: str, model: Any, probe: Any = None, *, progress: bool = True, **settings: Any) -> xr.Dataset:
    """Run the score ``name`` on a model.

    >>> induction = interp.score("induction", model)  # doctest: +SKIP
    >>> induction.heads.top(5)  # doctest: +SKIP

    Args:
        name: one of :func:`scores`.
        model: an :class:`interp.Model` or a transformers model.
        probe: what to run it on; None is the score's own default.
        progress: show a progress bar where the output is a terminal.
        settings: fields of the score's class; see its documentation.

    Returns:
        Dataset of ``value``, ``se``, ``n``, ``null`` ``(layer, head)`` and ``value_by_sample (sample, layer, head)``.

    Raises:
        AnalysisError: no such score, an unknown setting, or a model that the score does not apply to.
    """
    from interp.analysis.running import AnalysisError

    if name not in _HOMES:
        raise AnalysisError(f"name must be one of {sorted(_HOMES)}, got {name!r}")
    method = _class(name)
    known = [f.name for f in fields(method)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise AnalysisError(f"settings of {name!r} must be among {known}, got {unknown}")
    return method(**settings).run(model, probe, progress=progress)


def _class(name: str) -> type[HeadScore]:
    home, class_name = _HOMES[name]
    return getattr(import_module(f"{__name__}.{home}"), class_name)


def _info(method: type[HeadScore]) -> ScoreInfo:
    settings = {f.name: f.default for f in fields(method)}
    return ScoreInfo(
        method.name,
        method.summary,
        method.paper,
        method.unit,
        method.stacks,
        method.probe,
        settings,
        method.control,
        method.needs,
    )


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
