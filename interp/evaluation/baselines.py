"""Decoding methods to compare with: contrast with a noised image (VCD), contrast of layers (DoLa)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from interp.interventions.image_groups import require_vision
from interp.interventions.text_only import TextBranch
from interp.models.anatomy import Anatomy, Site
from interp.tracing.calls import Intervention, InterventionError, RunState
from interp.tracing.session import untouched

STEPS = 1000
MOST_ROWS = 64
"""Rows of a forward, from its end, that DoLa keeps of the layers' outputs."""


@runtime_checkable
class Scoring(Protocol):
    """A method that changes the scores of tokens: :class:`Decoding`, and guidance of PAI and PAINT."""

    def forced(self, model: Any, inputs: Any, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, int]:
        """See :meth:`Decoding.forced`."""
        ...


def scoring(interventions: Sequence[Intervention]) -> list[Scoring]:
    """Those that change scores as they are set, in order: a ``gamma`` of 1 is no guidance."""
    return [i for i in interventions if isinstance(i, Scoring) and getattr(i, "gamma", None) != 1]


class Decoding(Intervention):
    """A method that changes the scores of tokens, not attention.

    Where a text is forced, not generated, :meth:`forced` gives the scores that its tokens have.
    """

    def acts_on(self, site: Site, run: RunState) -> bool:
        return False

    def forced(self, model: Any, inputs: Any, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, int]:
        """Scores ``[B, n, V]`` in place of the logits of the last n positions of a forward; and extra forwards made.

        The plausibility cutoff is left out: a forced token below it would have probability 0.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class VCD(Decoding):
    """Visual contrastive decoding (Leng et al. 2024, https://arxiv.org/abs/2311.16922).

    ``l = (1 + alpha) l(image) - alpha l(noised image)`` over the tokens with ``l(image) >= log(beta) + max l(image)``, where the
    image was noised by ``step`` of 1,000 steps of diffusion. The noised branch is the plain model with a KV cache of its own:
    one more forward at every step. The noise is the same for every image, so that a batch gives what single samples give.

    When not to use it: as a measure of what the paper reports, which samples at temperature 1; here decoding stays what it
    is (greedy or beams). The release before commit c637c85 used the clean image's cache from the second token on, not done here.

    Args:
        alpha: 1 (CLI of the release; 0.5 is its fallback); 0 leaves the cutoff alone.
        beta: cutoff, 0.1 (0.2 in the release's LLaVA script); 0 is none.
        step: of the diffusion, 500.
        seed: of the noise.

    Raises:
        ValueError: a number that cannot be.
        InterventionError: before the first token: a model or prompt without an image.
    """

    alpha: float = 1.0
    beta: float = 0.1
    _: KW_ONLY
    step: int = 500
    seed: int = 0

    paper: ClassVar[str] = "https://arxiv.org/abs/2311.16922"
    extra_passes: ClassVar[str] = "the noised image beside every step"

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, float | int) or not math.isfinite(self.alpha) or self.alpha < 0:
            raise ValueError(f"alpha must be a finite number >= 0, got {self.alpha!r}")
        if not isinstance(self.beta, float | int) or not 0 <= self.beta < 1:
            raise ValueError(f"beta must be a number within 0 .. 1, below 1, got {self.beta!r}")
        if not isinstance(self.step, int) or not 0 <= self.step < STEPS:
            raise ValueError(f"step must be a whole number within 0 .. {STEPS - 1}, got {self.step!r}")

    def prepare(self, anatomy: Anatomy) -> None:
        require_vision(self, anatomy)

    def start(self, run: RunState) -> None:
        if not isinstance(run.inputs.get("pixel_values"), Tensor):
            raise InterventionError("VCD needs an image in the prompt, as pixel_values; got none")

    def logits_processors(self, run: RunState) -> list[Any]:
        return [_Contrast(_NoisedBranch(self, run), self.alpha, self.beta)]

    def noised(self, pixels: Tensor) -> Tensor:
        """``sqrt(a) x + sqrt(1 - a) e``, with a the product of 1 - betas up to ``step``; e is one draw for all images."""
        betas = torch.sigmoid(torch.linspace(-6, 6, STEPS)) * (0.5e-2 - 1e-5) + 1e-5
        kept = float((1 - betas).cumprod(0)[self.step])
        shape = pixels.shape[1:] if pixels.ndim > 3 else pixels.shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(pixels)
        return kept**0.5 * pixels + (1 - kept) ** 0.5 * noise

    def forced(self, model: Any, inputs: Any, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, int]:
        noisy = {**inputs, "pixel_values": self.noised(inputs["pixel_values"])}
        with untouched(model), torch.no_grad():
            other: Tensor = model(noisy, **options).logits[:, -logits.shape[1] :]
        return (1 + self.alpha) * logits - self.alpha * other, 1


class _NoisedBranch(TextBranch):
    """The plain model on the noised image, beside a generation."""

    on = "the noised image"

    def __init__(self, who: VCD, run: RunState) -> None:
        self.who, self.run = who, run
        self.module: nn.Module = run.root if run.root is not None else run.module
        ids: Tensor = run.inputs["input_ids"]
        given = {k: v for k, v in run.inputs.items() if isinstance(v, Tensor)}
        given["pixel_values"] = who.noised(given["pixel_values"])
        given.setdefault("attention_mask", torch.ones_like(ids))
        self.inputs = given
        self.cache: Any = None
        self.mask = given["attention_mask"]
        self.fed: Tensor | None = None
        self.deltas: dict[int, Any] = {}


class _Contrast:
    """Logits processor: ``(1 + alpha) l - alpha l'``, minus infinity where ``l < log(beta) + max l``."""

    def __init__(self, branch: TextBranch, alpha: float, beta: float) -> None:
        self.branch, self.alpha, self.beta = branch, alpha, beta
        self.start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.start is None:
            self.start = input_ids.shape[1]
        clean = scores.float().log_softmax(-1)
        noisy = self.branch.logits(input_ids[:, self.start :]).to(clean.device).float().log_softmax(-1)
        return _cut((1 + self.alpha) * clean - self.alpha * noisy, clean, self.beta).to(scores.dtype)


@dataclass(frozen=True, eq=False)
class DoLa(Decoding):
    """Decoding by contrasting layers (Chuang et al. 2024, https://arxiv.org/abs/2309.03883).

    ``log p_last - log p_early`` over the tokens with ``p_last >= cutoff max p_last``, where p_early is read by the output
    embedding from the layer among the candidates whose distribution is farthest from the last one's (Jensen-Shannon), for
    every row by itself (transformers' port takes one layer for the whole batch, so there a sample's text hangs on the others).
    Early states go to the output embedding without the final norm, as in the release.

    When not to use it: on small models. The paper's gains are for factual answers of 7B models and more.

    Args:
        layers: ``low`` or ``high``: every second layer of the lower or upper half, from the output of none (the embeddings; left
            out where they are tied to the output) on; or numbers of layers' outputs, 0 being the embeddings.
        cutoff: 0.1; 0 is none.

    Raises:
        ValueError: a name or number that cannot be.
        InterventionError: on opening a session: no text decoder, layers that do not exist.
    """

    layers: Literal["low", "high"] | Sequence[int] = "low"
    cutoff: float = 0.1
    _seen: dict[str, Any] = field(init=False, repr=False, default_factory=dict[str, Any])

    paper: ClassVar[str] = "https://arxiv.org/abs/2309.03883"

    def __post_init__(self) -> None:
        named = isinstance(self.layers, str)
        if named and self.layers not in ("low", "high"):
            raise ValueError(f"layers must be 'low', 'high' or whole numbers, got {self.layers!r}")
        if not named and not (self.layers and all(type(n) is int and n >= 0 for n in self.layers)):
            raise ValueError(f"layers must be 'low', 'high' or whole numbers, got {self.layers!r}")
        if not isinstance(self.cutoff, float | int) or not 0 <= self.cutoff < 1:
            raise ValueError(f"cutoff must be a number within 0 .. 1, below 1, got {self.cutoff!r}")

    def prepare(self, anatomy: Anatomy) -> None:
        if "text" not in anatomy.stacks:
            raise InterventionError(f"DoLa needs a text decoder, and {anatomy.model_class} has {list(anatomy.stacks)}")
        depth = anatomy.shape("text")[0]
        if not isinstance(self.layers, str) and max(self.layers) >= depth:
            raise InterventionError(f"DoLa's layers must be below {depth}, got {list(self.layers)}")

    def start(self, run: RunState) -> None:
        root: Any = run.root if run.root is not None else run.module
        head = root.get_output_embeddings()
        if head is None:
            raise InterventionError(f"DoLa needs an output embedding, and {type(root).__name__} has none")
        text = sorted((s for s in run.anatomy.sites if s.stack == "text"), key=lambda s: s.layer)
        candidates = self._candidates(len(text), head.weight is root.get_input_embeddings().weight)
        self._seen.clear()
        self._seen["head"] = head
        config = root.config.get_text_config()
        self._seen["cap"] = getattr(config, "final_logit_softcapping", None)
        self._seen["states"] = {}
        for number in candidates:
            # The output of layer n - 1 is the input of layer n.
            layer = root.get_submodule(text[number].name.rpartition(".")[0])
            hook = layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)
            run.at_end.append(hook.remove)

    def _candidates(self, depth: int, tied: bool) -> list[int]:
        if not isinstance(self.layers, str):
            return sorted(set(self.layers))
        half = depth // 2
        found = list(range(0, half, 2) if self.layers == "low" else range(half, depth, 2))
        kept = [n for n in found if n or not tied]
        return kept or [min(1, depth - 1)]

    def _hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            self._seen["states"][number] = hidden[:, -MOST_ROWS:].detach()

        return hook

    def logits_processors(self, run: RunState) -> list[Any]:
        return [self._process]

    def _process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = scores.float().log_softmax(-1)
        return _cut(self._contrast(last[:, None])[:, 0], last, self.cutoff).to(scores.dtype)

    def forced(self, model: Any, inputs: Any, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, int]:
        return self._contrast(logits.float().log_softmax(-1)), 0

    def _contrast(self, last: Tensor) -> Tensor:
        """``log p_last - log p_early`` ``[B, n, V]`` of the last n rows."""
        if last.shape[1] > MOST_ROWS:
            raise InterventionError(f"DoLa reads at most {MOST_ROWS} forced tokens at once, got {last.shape[1]}")
        early = torch.stack([self._read(state[:, -last.shape[1] :]) for state in self._seen["states"].values()])
        mean = (early.exp() + last.exp()).div(2).log()
        divergence = (early.exp() * (early - mean) + last.exp() * (last - mean)).nan_to_num().sum(-1)
        farthest = divergence.argmax(0)
        chosen = early.gather(0, farthest[None, ..., None].expand(1, *last.shape))[0]
        return last - chosen

    def _read(self, state: Tensor) -> Tensor:
        logits: Tensor = self._seen["head"](state).float()
        cap = self._seen["cap"]
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    def describe(self) -> dict[str, Any]:
        layers = self.layers if isinstance(self.layers, str) else list(self.layers)
        return {"name": "DoLa", "layers": layers, "cutoff": self.cutoff}


def check_together(interventions: Sequence[Intervention]) -> None:
    """Raise InterventionError for methods that would read each other's passes: DoLa beside a second branch."""
    branches = [i for i in interventions if isinstance(i, VCD) or getattr(i, "gamma", 1) != 1]
    if branches and any(isinstance(i, DoLa) for i in interventions):
        raise InterventionError(
            f"DoLa must not stand beside {type(branches[0]).__name__} with a second branch, whose layers it would read"
        )


def _cut(scores: Tensor, clean: Tensor, share: float) -> Tensor:
    if not share:
        return scores
    return scores.masked_fill(clean < math.log(share) + clean.max(-1, keepdim=True).values, -torch.inf)
