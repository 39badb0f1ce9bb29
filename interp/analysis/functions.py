"""Analyses that give something else than a number a head: :func:`analyses` lists them."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, NamedTuple


class AnalysisInfo(NamedTuple):
    """One entry of :func:`analyses`.

    Attributes:
        name: of the function.
        module: where it is: ``from {module} import {name}``.
        summary: first line of its documentation.
        paper: reference with link.
        unit: of what it gives.
        control: what its result is to be held against.
        needs: what the model must be.
        settings: keyword arguments and their defaults; ``"required"`` where there is none. What a function passes on
            (``**settings``) is not among them.
    """

    name: str
    module: str
    summary: str
    paper: str
    unit: str
    control: str
    needs: str
    settings: dict[str, Any]


_WU = "Wu et al. 2025, https://arxiv.org/abs/2404.15574"
_YEH = "Yeh et al. 2023, https://arxiv.org/abs/2305.03210"
_LI = "after Li et al. 2023, https://arxiv.org/abs/2303.13731"
_WANG = "Wang et al. 2022, https://arxiv.org/abs/2211.00593, section 4"
_ANY, _VLM, _TEXT = "any model", "a vision-language model", "a language model with a tokenizer"
_TABLE: dict[str, tuple[str, str, str, str, str]] = {
    # name: module, paper, unit, control, needs
    "rollout": (
        "rollout", "Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928", "share of the row",
        "columns of sinks removed (drop=)", "self-attention",
    ),
    "relevancy": (
        "relevancy", "Chefer et al. 2021, https://arxiv.org/abs/2103.15679", "gradient times attention", "another target (targets=)",
        "self-attention and logits",
    ),
    "token_divergence": (
        "vision_divergence", "He et al. 2025, https://arxiv.org/abs/2412.13949", "norm of z", "an answer about another image", _VLM,
    ),
    "image_mass_by_step": (
        "image_mass", "Kang et al. 2025, https://arxiv.org/abs/2503.03321", "fraction of row mass", "a uniform head (uniform)", _VLM,
    ),
    "visual_sinks": ("image_centric", "Kang et al. 2025, https://arxiv.org/abs/2503.03321", "|x| / RMS", "text tokens' phi", _VLM),
    "by_context": ("activation_frequency", _WU, "fraction of samples", "a span elsewhere in the prompt (null)", "a retrieval score"),
    "attention_influence": (
        "attention_influence", "Hua et al. 2025, https://arxiv.org/abs/2505.07293", "relative change of loss",
        "as many random heads", _TEXT,
    ),
    "rank_jsonl": (
        "attention_influence", "Hua et al. 2025, https://arxiv.org/abs/2505.07293", "relative change of loss",
        "as many random heads", _TEXT,
    ),
    "head_detector": (
        "head_detector", "Nanda & Bloom 2022, https://github.com/TransformerLensOrg/TransformerLens", "likeness",
        "the scores of the same names", "a language model",
    ),
    "composition": (
        "circuits", "Elhage et al. 2021, https://transformer-circuits.pub/2021/framework", "ratio of Frobenius norms",
        "normal random matrices (null)", "known projections",
    ),
    "hop_profile": ("attention_distance", f"ours, {_LI}", "fraction of row mass", "a uniform head", "patches on a grid"),
    "head_similarity": (
        "redundancy", "ours, after Michel et al. 2019, https://arxiv.org/abs/1905.10650", "fraction of row mass shared",
        "the mean over all pairs", _ANY,
    ),
    "massive_activations": (
        "massive_activations", "Sun et al. 2024, https://arxiv.org/abs/2402.17762", "activation", "the layer's median (median)", _ANY,
    ),
    "head_features": ("head_maps", f"ours, {_LI}", "standardised", "features shuffled over heads (Clusters.null)", _ANY),
    "fit_autoencoder": ("autoencoder", f"ours, {_LI}", "squared error", "principal components (pca_error)", "pooled maps"),
    "query_key_embedding": ("query_key_embedding", _YEH, "place", "rank agreement with dot products (agreement)", _ANY),
    "kind_agreement": (
        "ablation", "ours, after Chan et al. 2022, https://www.alignmentforum.org/posts/JvZhhzycHu2Yd57RN", "Spearman's rho",
        "1, the agreement of a kind with itself", "logits",
    ),
    "faithfulness": ("faithfulness", _WANG, "fraction of the metric", "random rankings of the same layers (random_faithfulness)", "logits"),
    "components": (
        "logit_attribution", "Elhage et al. 2021, https://transformer-circuits.pub/2021/framework", "logits", "the real logit (total)",
        "a residual stream (pre-norm)",
    ),
    "partial_pruning": (
        "partial_pruning", f"ours, {_LI}", "of the metric", "the whole map set to zero (all)", "images, or masks for a map",
    ),
    "diagnose": (
        "icl_regression", "He et al. 2025, https://arxiv.org/abs/2503.12734", "of the weights", "theory (best_mu, reduced_loss)",
        "weights of one layer, no model",
    ),
    "diff": ("diff", "ours", "of each score", "paired tests over samples (p_adjusted)", "two models of one shape"),
}  # fmt: skip


def analyses() -> list[AnalysisInfo]:
    """Every analysis that there is."""
    return [_info(name) for name in _TABLE]


def _info(name: str) -> AnalysisInfo:
    home, paper, unit, control, needs = _TABLE[name]
    module = f"interp.analysis.{home}"
    function = getattr(import_module(module), name)
    summary = inspect.cleandoc(function.__doc__ or "").partition("\n")[0]
    settings = {
        p.name: "required" if p.default is p.empty else p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    }
    return AnalysisInfo(name, module, summary, paper, unit, control, needs, settings)
