"""Attention knockout: no attention from one group of rows to one group of keys, in a window of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp.attention import Edit, GroupWeights
from interp.interventions._base import Strength
from interp.interventions.image_groups import KeyGroups, Prompt, prompt_rows, read_prompt, reads_text
from interp.interventions.knockout_effect import KnockoutEffect, answer_probabilities
from interp.interventions.layers import read_layers, resolve_layers
from interp.interventions.prompt_groups import check_group, key_prompt, members
from interp.interventions.selection import heads_at, read_heads, resolve_heads
from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.model import unwrap
from interp.tracing.calls import NOTHING_LASTS, Intervention, InterventionError, Lasting, RunState, SiteCall
from interp.tracing.session import hooked

Group = str | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Knockout(Intervention):
    """Block attention from target rows to source keys (Geva et al. 2023, https://arxiv.org/abs/2304.14767).

    ``renormalise``: ``s_ij = -inf`` for target rows i and source keys j, so the row's other keys share its weight. ``zero``:
    ``p_ij = 0`` after the softmax, and the row loses that weight. A row whose visible keys are all blocked gives 0. With images
    as groups and windows of 9 layers: Zhang et al. 2025, https://arxiv.org/abs/2411.18620, whose report is :meth:`effect`.

    Groups are named, or given as positions: ``image`` (all image tokens), ``image:0`` (of the first image), ``text``, ``special``
    (kinds of the layout; text without image and special tokens), ``first`` (the first real token), ``question`` (real tokens after
    the last image token but the last; without an image all but the last), ``last`` (the position that predicts the first token; as
    a target also every generated row), ``generated``, ``prompt``, ``all``; whole numbers (pads count, negative ones from the prompt's
    end); or a bool tensor ``[sample, position]`` such as an object's patches.

    When not to use it: as an ablation of a head (take MaskHeads). ``-inf`` also changes what the other keys contribute; compare both
    kinds where a group holds much of the weight (at the first token, attention sinks).

    Args:
        source: keys that are not seen.
        target: rows that do not see them.
        layers: of the stack; None is all, () none. Negative ones count from the last. See :meth:`window` and :meth:`over_layers`.
        kind: ``renormalise`` or ``zero``.
        heads: what :func:`interp.heads.as_heads` takes, to block in these alone; None is all heads.
        stack: ``text``, or a stack of cross attention (``source`` then speaks of its keys).

    Raises:
        ValueError: a group, kind or layers that cannot be.
        InterventionError: before the first token: no such stack or layer, or a group that a sample of the prompt does not have.
    """

    source: Group
    target: Group
    layers: Sequence[int] | None = None
    _: KW_ONLY
    kind: Literal["renormalise", "zero"] = "renormalise"
    heads: Any = None
    stack: str = "text"

    paper: ClassVar[str] = "https://arxiv.org/abs/2304.14767"
    unit: ClassVar[str] = "edges blocked"
    stacks: ClassVar[tuple[str, ...]] = ("text", "cross")
    needs: ClassVar[str] = "a prompt with the groups named"

    def __post_init__(self) -> None:
        if self.kind not in ("renormalise", "zero"):
            raise ValueError(f"kind must be 'renormalise' or 'zero', got {self.kind!r}")
        object.__setattr__(self, "source", check_group("source", self.source))
        object.__setattr__(self, "target", check_group("target", self.target))
        object.__setattr__(self, "layers", read_layers(self.layers))
        object.__setattr__(self, "heads", None if self.heads is None else read_heads(self.heads))

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> Knockout:
        return cls("first", "last", None if strength == "on" else ())

    @staticmethod
    def window(layer: int, width: int, n_layers: int) -> tuple[int, ...]:
        """The ``width`` layers around ``layer`` that exist: from ``layer - width // 2`` on.

        >>> Knockout.window(2, 9, 32)
        (0, 1, 2, 3, 4, 5, 6)
        """
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        start = layer - width // 2
        return tuple(range(max(0, start), min(n_layers, start + width)))

    def prepare(self, anatomy: Anatomy) -> None:
        self._layers(anatomy)
        if self.heads is not None:
            resolve_heads(self.heads, anatomy)
        if self.stack != "text" and not all(site.cross for site in anatomy.stacks[self.stack]):
            raise InterventionError(f"stack must be 'text' or one of cross attention, got {self.stack!r}")

    def start(self, run: RunState) -> None:
        layers = self._layers(run.anatomy)
        if not layers or not reads_text(run):
            return
        prompt, state = read_prompt(self, run), run.of(self)
        keys = prompt if self.stack == "text" else key_prompt(self, run, self.stack)
        state["rows"] = members(self, "target", self.target, prompt)
        source = members(self, "source", self.source, keys)
        state["groups"] = KeyGroups(source.to(torch.int8), beyond=int(_beyond(self.source) and self.stack == "text"))
        state.update(layers=layers, templates={})
        if self.heads is not None:
            state["heads"] = resolve_heads(self.heads, run.anatomy)

    def acts_on(self, site: Site, run: RunState) -> bool:
        state = run.of(self)
        chosen = self.heads is None or bool(state["heads"].at(site.layer, site.stack)) if state else False
        return chosen and site.stack == self.stack and site.layer in state.get("layers", ())

    def before(self, call: SiteCall) -> Edit | None:
        state = call.run.of(self)
        if not self.acts_on(call.site, call.run):
            return None
        heads = None if self.heads is None else heads_at(call, state["heads"])
        prompt: Prompt = state["prompt"]
        later = call.mask.q_offset >= prompt.kind.shape[1]
        beyond = self.target == "last" or _beyond(self.target)
        if later and not beyond:
            return None
        key = (heads, call.q.device, None if later else (call.run.forwards, call.q.shape[2]))
        if key not in state["templates"]:
            rows = None if later else prompt_rows(call, state["rows"], beyond=beyond)
            state["templates"][key] = self._template(call, rows, heads)
        template = state["templates"][key]
        return None if template is None else state["groups"].edit(call, template)

    def lasting(self, call: SiteCall) -> Lasting | None:
        edit = self.before(call)
        if call.mask.q_offset < call.run.of(self)["prompt"].kind.shape[1]:
            return None
        return NOTHING_LASTS if edit is None else Lasting(template=edit.family, groups=call.run.of(self)["groups"])

    def _template(self, call: SiteCall, rows: Tensor | None, heads: tuple[int, ...] | None) -> Edit | None:
        where = None if rows is None else rows[:, None]
        if rows is not None and not bool(rows.any()):
            return None
        if heads is not None:
            chosen = call.heads(list(heads))
            where = chosen if where is None else where & chosen
        weight = torch.tensor([[[[1.0, 0.0]]]], device=call.q.device)
        return Edit((GroupWeights(weight, self.kind == "renormalise", where),), n_groups=2)

    def _layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        wanted = self.layers
        if wanted is None:
            wanted = range(anatomy.shape(self.stack)[0]) if self.stack in anatomy.stacks else (0,)
        return resolve_layers(wanted, anatomy, self.stack)

    def effect(self, model: Any, inputs: Mapping[str, Any], answer: Any = None) -> KnockoutEffect:
        """What the knockout does to the probability of the first answer token: one plain and one blocked forward.

        Args:
            model: as :func:`interp.hooked` takes; interventions of a session that is open on it apply to both forwards.
            inputs: of one forward.
            answer: a token id, or one for each sample; None is the plain model's most likely token.
        """
        ids, plain = answer_probabilities(model, inputs, answer)
        with hooked(model, interventions=[self]):
            _, blocked = answer_probabilities(model, inputs, ids)
        return KnockoutEffect(ids, plain[:, None], blocked[:, None], ())

    @classmethod
    def over_layers(
        cls, model: Any, inputs: Mapping[str, Any], source: Group, target: Group, *, width: int = 9, answer: Any = None,
        **options: Any,
    ) -> KnockoutEffect:  # fmt: skip
        """:meth:`effect` with a window of ``width`` layers around each layer of the stack, layer by layer.

        Args:
            width: layers of a window, 9 in the script for LLaVA.
            options: ``kind``, ``heads``, ``stack``.
        """
        stack = options.get("stack", "text")
        count = anatomy(unwrap(model)).shape(stack)[0]
        ids, plain = answer_probabilities(model, inputs, answer)
        blocked: list[Tensor] = []
        for layer in range(count):
            with hooked(model, interventions=[cls(source, target, cls.window(layer, width, count), **options)]):
                blocked.append(answer_probabilities(model, inputs, ids)[1])
        return KnockoutEffect(ids, plain[:, None].expand(-1, count), torch.stack(blocked, -1), tuple(range(count)))


def _beyond(group: Any) -> bool:
    return isinstance(group, str) and group in ("generated", "all")
