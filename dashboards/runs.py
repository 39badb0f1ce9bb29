"""A run: one prompt through one model, with everything the page shows of it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from dashboards.errors import PageError
from dashboards.maps import sink_columns
from dashboards.metrics import Metric, grid_of, metrics_of, pooled_mean
from interp.tracing.trace import Trace

Floats = NDArray[np.float32]
FULL_MAP_BYTES = 192 * 2**20
"""Full maps of all heads are traced with the prompt where they take less than this; else one head at a time."""
POOLED = 32


def run_id(spec: Mapping[str, Any]) -> str:
    """The id of what a spec describes: equal specs are one run."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def pack(values: NDArray[Any]) -> str:
    """fp32 little-endian, base64: what the page's script reads without parsing numbers."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


@dataclass(eq=False)
class Run:
    """One traced prompt.

    Attributes:
        id: of its spec.
        spec: model, prompt, image, chat, max_new_tokens, interventions; or the path of a saved trace.
        trace: what was captured.
        title: for the picker.
        answer: text generated.
        ids: token ids of prompt and answer, None for a saved trace.
        prompt_length: positions of the prompt in the text stack.
        images: names (SHA-256) of the prompt's pictures.
        takes_text, chat: whether the model reads text at all, and whether the prompt went through its chat template: the spec
            holds what was wished, these what was done.
    """

    id: str
    spec: dict[str, Any]
    trace: Trace
    title: str
    answer: str = ""
    ids: list[int] | None = None
    prompt_length: int = 0
    images: tuple[str, ...] = ()
    kv_groups: dict[str, int] = field(default_factory=dict[str, int])
    takes_text: bool = True
    chat: bool = False
    _made: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def stack(self, name: str) -> xr.Dataset:
        if name not in self.trace:
            raise PageError(f"stack must be one of {list(self.trace)}, got {name[:40]!r}", 404)
        return self.trace[name]

    def shape(self, stack: str) -> tuple[int, int]:
        data = self.stack(stack)
        return int(data["layer"].max()) + 1, int(data["head"].max()) + 1

    def check_head(self, stack: str, layer: int, head: int) -> xr.Dataset:
        data = self.stack(stack)
        if layer not in data["layer"].values or head not in data["head"].values:
            raise PageError(f"no head L{layer}H{head} in stack {stack!r} of this run", 404)
        return data

    def once(self, key: Any, make: Any) -> Any:
        """Made at the first use and kept with the run."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def known(self, key: Any) -> Any:
        """What :meth:`once` made, None where it has not."""
        return self._made.get(key)

    def metric_values(self, stack: str) -> list[tuple[Metric, Floats]]:
        data = self.stack(stack)
        return self.once(("metrics", stack), lambda: [(m, grid_of(data, m.values(data))) for m in metrics_of(data)])

    def pooled(self, stack: str) -> Floats | None:
        """``[layer, head, P, P]``, or None where pooled maps were not traced."""
        data = self.stack(stack)
        if "pooled" in data.variables:
            return self.once(("pooled", stack), lambda: pooled_mean(data))
        return None

    def pooled_top(self, stack: str) -> float:
        """The top of the sprite's scale: the 99.5th percentile of all heads' blocks, at least 0.05."""
        pooled = self.pooled(stack)
        if pooled is None:
            return 1.0
        return self.once(
            ("top", stack),
            lambda: (
                float(max(0.05, np.nanquantile(pooled[np.isfinite(pooled)], 0.995)))
                if np.isfinite(pooled).any()
                else 1.0
            ),
        )

    def full_map(self, stack: str, layer: int, head: int) -> Floats | None:
        """``[query, key]`` of one head, or None where full maps were not traced."""
        data = self.check_head(stack, layer, head)
        if "attention" not in data.variables:
            return None
        found = data["attention"].sel(layer=layer, head=head).isel(sample=0).transpose("query", "key")
        return np.asarray(found.values, dtype=np.float32)

    def sinks(self, stack: str, layer: int, head: int) -> list[int]:
        """Keys that this head attends to from everywhere."""
        data = self.check_head(stack, layer, head)
        if "received" not in data.variables:
            return []
        chosen = data[["received", "received_rows"]].sel(layer=layer, head=head).isel(sample=0)
        if "query_group" in chosen.dims:
            chosen = chosen.sum("query_group")
        return sink_columns(chosen["received"].values, chosen["received_rows"].values)

    def tokens(self, stack: str) -> dict[str, Any]:
        """Keys and rows of a stack in words: what the token strips show."""
        data = self.stack(stack)
        first = data.isel(sample=0)
        n_keys = int(first.sizes.get("key", 0) or first.sizes.get("query", 0))

        def column(name: str, dim: str) -> list[Any] | None:
            if name not in first.variables or first[name].dims != (dim,):
                return None
            return first[name].values.tolist()

        rows = (
            column("token_fed", "query")
            or column("token", "key")
            or [str(i) for i in range(first.sizes.get("query", 0))]
        )
        return {
            "keys": column("token", "key") or [str(i) for i in range(n_keys)],
            "queries": rows,
            "kind": column("kind", "key"),
            "row": column("row_in_image", "key"),
            "column": column("column_in_image", "key"),
            "image": column("image", "key"),
            "tile": column("tile", "key"),
            "phase": column("phase", "query"),
            "produced": column("token_produced", "query"),
        }

    def describe(self) -> dict[str, Any]:
        """What the page must know before it draws anything."""
        stacks: dict[str, Any] = {}
        for name in self.trace:
            layers, heads = self.shape(name)
            data = self.trace[name]
            stacks[name] = {
                "layers": layers,
                "heads": heads,
                "queries": int(data.sizes.get("query", 0)),
                "keys": int(data.sizes.get("key", data.sizes.get("query", 0))),
                "pooled": "pooled" in data.variables,
                "full": "attention" in data.variables,
                "kv_group": self.kv_groups.get(name, 1),
            }
        return {
            "id": self.id,
            "title": self.title,
            "model": self.model_name,
            "stacks": stacks,
            "answer": self.answer,
            # A model that generates, was asked to, and ended at once.
            "silent": bool(self.ids is not None and self.spec.get("max_new_tokens") and not self.answer),
            "prompt": self.spec.get("prompt", ""),
            "images": list(self.images),
            "prompt_length": self.prompt_length,
            "interventions": self.spec.get("interventions") or [],
            "saved": "trace" in self.spec,
            "chat": bool(self.spec.get("chat")),
            "max_new_tokens": self.spec.get("max_new_tokens", 0),
            "image": self.spec.get("image"),
        }

    @property
    def model_name(self) -> str:
        model: Any = self.trace.attrs.get("model")
        return str(self.spec.get("model") or (model.get("name") if isinstance(model, Mapping) else model) or "")


def saved_run(path: Path) -> Run:
    """A run of a trace on disk.

    Raises:
        PageError: nothing there, or nothing that can be read; the cause is named.
    """
    from dashboards.errors import explain

    try:
        trace = Trace.open(path, verify="sizes")
    except Exception as error:
        raise PageError(f"trace {path.name} cannot be opened: {explain(error)}", 410) from error
    return Run(run_id({"trace": str(path)}), {"trace": str(path)}, trace, f"saved: {path.name}")


def too_long(model: Any, length: int) -> str:
    """Why a prompt does not fit, empty where it does."""
    config = model.config
    text = getattr(config, "get_text_config", lambda: config)()
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        return f"prompt must have at most {limit} tokens for {model.name}, got {length}"
    return ""


def full_bytes(model: Any, length: int) -> int:
    """Bytes of all full maps of the text stacks at a length, and of vision at its own."""
    from interp.models.anatomy import anatomy

    return sum(site.n_heads * 4 * length * length for site in anatomy(model.module).sites)


def trace_prompt(
    model: Any, inputs: Any, spec: Mapping[str, Any], interventions: list[Any], streamer: Any, stop: Any
) -> Any:
    """One traced generate (or forward): ``(trace, ids, prompt length)``; on the worker."""
    import torch

    from interp.tracing.capture import Capture
    from interp.tracing.session import hooked

    ids = inputs.get("input_ids")
    prompt = int(ids.shape[1]) if ids is not None else 0
    new = int(spec.get("max_new_tokens") or 0) if model.is_generative else 0
    length = max(prompt + new, 256 if prompt == 0 else 0)
    capture = Capture(
        row_stats=True, received=True, pooled=POOLED, attention=full_bytes(model, length) <= FULL_MAP_BYTES
    )
    with hooked(model, capture=capture, interventions=interventions) as run, torch.no_grad():
        if new:
            options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
            out = model.generate(inputs, max_new_tokens=new, streamer=streamer, stopping_criteria=stop, **options)
            found = out[0].tolist()
        else:
            model(inputs)
            found = ids[0].tolist() if ids is not None else None
    return run.trace, found, prompt
