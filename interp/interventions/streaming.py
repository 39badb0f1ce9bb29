"""Heads that see only a part of the keys: sink and recent window, shards, spans, neighbourhoods."""

from __future__ import annotations

import hashlib
import os
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from interp.attention import Edit, SinkWindow
from interp.duo_files import check_gates, read_gates, streaming
from interp.heads import Head, HeadError, Heads, as_heads
from interp.interventions._base import SCOPES, HeadPolicy, Strength, every_head
from interp.interventions.patterns import Pattern, SinkRecent
from interp.interventions.selection import first_key, in_decoder, read_heads, resolve_heads
from interp.models.anatomy import Anatomy
from interp.tracing.calls import Lasting, SiteCall


@dataclass(frozen=True, eq=False)
class KVGates:
    """KV heads chosen by a number for each: the ones with the smallest stream.

    Args:
        gates: ``[layer, KV head]``, or ``[layer, query head]`` with ``reduce``; NaN is a head that is not there.
        sparsity: share that streams; None (without a threshold) is DuoAttention's 0.75, and 0.5 under GQA.
        threshold: in place of a share: those below it stream.
        reduce: ``max`` or ``mean`` over the query heads of a KV head.
        method, seed: see :func:`interp.duo_files.streaming`.
        stack: of the heads.
        name: of where the gates came from.
    """

    gates: Any
    sparsity: float | None = None
    threshold: float | None = None
    reduce: Literal["max", "mean"] | None = None
    method: Literal["rank", "quantile"] = "rank"
    seed: int = 0
    stack: str = "text"
    name: str = ""

    def __post_init__(self) -> None:
        gates = np.asarray(self.gates, dtype=np.float64)
        check_gates(np.nan_to_num(gates))
        object.__setattr__(self, "gates", gates)
        if self.sparsity is not None and self.threshold is not None:
            raise ValueError(f"one of sparsity and threshold must be given, got {self.sparsity} and {self.threshold}")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must be a share within 0 .. 1, got {self.sparsity}")

    def heads(self, anatomy: Anatomy) -> Heads:
        """The query heads that stream, whole KV groups.

        Raises:
            ValueError: gates of another shape than the model's heads.
        """
        sites = anatomy.stacks.get(self.stack)
        if not sites:
            raise HeadError(f"stack must be one of {list(anatomy.stacks)}, got {self.stack!r}")
        layers, queries, kv = anatomy.n_layers[self.stack], sites[0].n_heads, sites[0].n_kv_heads
        wanted = (layers, kv if self.reduce is None else queries)
        if self.gates.shape != wanted:
            what = "KV head" if self.reduce is None else "head"
            raise ValueError(
                f"gates must be [layer, {what}] {wanted} for {anatomy.model_class}, got {self.gates.shape} {self.name}".rstrip()
            )
        gates, group = self.gates, queries // kv
        if self.reduce is not None:
            grouped = gates.reshape(layers, kv, group)
            gates = grouped.max(-1) if self.reduce == "max" else grouped.mean(-1)
        there = ~np.isnan(gates)
        there[[layer for layer in range(layers) if layer not in {s.layer for s in sites}]] = False
        sparsity = self.sparsity
        if sparsity is None and self.threshold is None:
            sparsity = 0.75 if group == 1 else 0.5
        chosen = np.zeros_like(there)
        if there.any():
            chosen[there] = streaming(
                gates[there][None], sparsity=sparsity, threshold=self.threshold, method=self.method, seed=self.seed
            )[0]
        return Heads(Head(int(n), int(g) * group + h, self.stack) for n, g in np.argwhere(chosen) for h in range(group))

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        said = {
            "gates": self.name or f"array {self.gates.shape}",
            # Two files of one name are two settings.
            "digest": hashlib.sha256(np.ascontiguousarray(self.gates).tobytes()).hexdigest()[:12],
            "stack": self.stack,
            "reduce": self.reduce,
            "method": self.method,
        }
        return {**said, "sparsity": self.sparsity, "threshold": self.threshold}


@dataclass(frozen=True, eq=False)
class Streaming(HeadPolicy):
    """Let chosen heads see a part of the keys only (Xiao et al. 2024, DuoAttention, https://arxiv.org/abs/2410.10819).

    The keys that the pattern hides leave the softmax. Which pattern: :class:`SinkRecent` (StreamingLLM, DuoAttention),
    :class:`Spans` (MoA), :class:`Shards` (S2-Attention), :class:`Near` (neighbourhoods in 1-D, and in 2-D on patch grids). The
    cache keeps all keys: this shows what a head loses, it saves no memory.

    When not to use it: to measure DuoAttention's speed; and with a fixed threshold of 0.5 on a GQA model, where nearly all
    gates are above it (take a share).

    Args:
        heads: what :func:`interp.heads.as_heads` takes, or :class:`KVGates`. An empty set changes nothing.
        pattern: what they may see; by default 64 sink and 256 recent keys, DuoAttention's deployment.
        kv: ``heads`` names KV heads (``L5H1`` is the second KV head, all of its query heads).
        scope: ``cached`` (calls that find something in the cache: later turns and decode; the first prompt sees everything,
            as DuoAttention deploys it), or ``all`` (as it trains), ``prefill``, ``decode``, ``next``.
        rows: absolute positions in place of a scope.

    Raises:
        HeadError: heads that cannot be read, or (on opening a session) that the model does not have.
        ValueError: gates or spans of another shape than the model, cross attention, a 2-D pattern without a patch grid.
        TypeError: a pattern that is none.
    """

    heads: Any = "L*H*"
    _: KW_ONLY
    pattern: Pattern | None = None
    kv: bool = False
    scope: Literal["all", "prefill", "decode", "next", "cached"] = "cached"  # pyright: ignore[reportIncompatibleVariableOverride]

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"
    unit: ClassVar[str] = "keys seen"
    scopes: ClassVar[tuple[str, ...]] = (*SCOPES, "cached")

    def __post_init__(self) -> None:
        if self.rows is not None and self.scope == "cached":
            object.__setattr__(self, "scope", "all")
        if self.pattern is None:
            object.__setattr__(self, "pattern", SinkRecent())
        if not all(callable(getattr(self.pattern, name, None)) for name in ("check", "key", "operation")):
            raise TypeError(f"pattern must be SinkRecent, Spans, Shards or Near, got {type(self.pattern).__name__}")
        super().__post_init__()

    @classmethod
    def from_tsv(
        cls, path: str | os.PathLike[str], *, sparsity: float | None = None, threshold: float | None = None,
        method: Literal["rank", "quantile"] = "rank", seed: int = 0, **settings: Any,
    ) -> Streaming:  # fmt: skip
        """DuoAttention's ``full_attention_heads.tsv``: KV heads with the smallest gates stream.

        Args:
            path: the file.
            sparsity: share of KV heads that stream; by default 0.75, and 0.5 under GQA, as the paper deploys.
            threshold: in place of a share.
            method, seed: see :func:`interp.duo_files.streaming`.
            settings: ``pattern``, ``scope``.
        """
        name = os.path.basename(os.fspath(path))  # noqa: PTH119 - a name, which may belong to no file system here
        return cls(KVGates(read_gates(path), sparsity, threshold, method=method, seed=seed, name=name), **settings)

    @classmethod
    def from_score(
        cls, score: Any, *, share: float | None = None, threshold: float | None = None, reduce: Literal["max", "mean"] = "max",
        **settings: Any,
    ) -> Streaming:  # fmt: skip
        """A score per query head, such as retrieval: KV heads with the smallest stream.

        Args:
            score: a score Dataset with ``value (layer, head)``, or the path of a file with one, such as Retrieval_Head's
                ``head_score/<model>.json``; see :func:`interp.scores.read_score`.
            share: of KV heads that stream; exactly one of this and ``threshold``.
            threshold: those below it stream.
            reduce: a KV head's number from those of its query heads: the largest (it streams only where all are small), or
                the mean.
            settings: ``pattern``, ``scope``.
        """
        if (share is None) == (threshold is None):
            raise ValueError(f"one of share and threshold must be given, got {share} and {threshold}")
        if isinstance(score, str | os.PathLike):
            from interp.scores import read_score

            score = read_score(score)
        values = score["value"].transpose("layer", "head")
        table = np.full((int(values["layer"].max()) + 1, int(values["head"].max()) + 1), np.nan)
        table[np.ix_(values["layer"].values, values["head"].values)] = values.values
        stack, name = str(score.attrs.get("stack", "text")), str(score.attrs.get("name", "score"))
        return cls(KVGates(table, share, threshold, reduce, stack=stack, name=name), **settings)

    @classmethod
    def example(cls, model: Any, *, strength: Strength) -> Streaming:
        heads = every_head(model, cross=False) if strength == "on" else []
        return cls(heads, pattern=SinkRecent(1, 2), scope="all")

    def read(self, heads: Any) -> Any:
        return heads if isinstance(heads, KVGates) else read_heads(heads)

    def resolve(self, anatomy: Anatomy) -> Heads:
        if isinstance(self.heads, KVGates):
            return self.heads.heads(anatomy)
        if not self.kv:
            return resolve_heads(self.heads, anatomy)
        # The same model with its KV heads in place of its query heads.
        sites = tuple(replace(site, n_heads=site.n_kv_heads) for site in anatomy.sites)
        named = resolve_heads(self.heads, replace(anatomy, sites=sites))
        groups = {(s.stack, s.layer): s.n_heads // s.n_kv_heads for s in anatomy.sites}
        found: list[Head] = []
        for head in named:
            group = groups[head.stack, head.layer]
            found += [Head(head.layer, head.head * group + h, head.stack) for h in range(group)]
        return as_heads(found, anatomy)

    @property
    def _seen(self) -> Pattern:
        assert self.pattern is not None
        return self.pattern

    def prepare(self, anatomy: Anatomy) -> None:
        super().prepare(anatomy)
        for head in self.resolve(anatomy):
            self._seen.check(anatomy.site(head.stack, head.layer), anatomy.n_layers[head.stack])

    def before(self, call: SiteCall) -> Edit | None:
        where = self.where(call)
        if where is None:
            return None
        if call.mask.first is None and call.mask.dense is not None and in_decoder(call):
            # A model that hands over a dense mask does not say where its samples begin.
            call.mask = self.kept(
                call, "mask", lambda: replace(call.mask, first=first_key(call)), of=(call.mask,), lasting=False
            )
        seen = self._seen
        key = seen.key(call)
        return self.kept(call, key, lambda: Edit((seen.operation(call, where),)), of=(where,))

    def lasting(self, call: SiteCall) -> Lasting | None:
        said = self.unvarying(call)
        # Tables of blocks and of coordinates are as long as the sequence.
        moving = said is None or (
            said.template is not None and len(said.template.of(SinkWindow)) < len(said.template.operations)
        )
        return None if moving else said
