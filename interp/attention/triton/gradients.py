"""z with a gradient, where the kernels have one, and what they lack otherwise.

The function known to autograd is ``z = attention(q, k, v, T, sinks)`` alone. How gains and temperatures make one factor and
one divisor per row is the specification's own torch code, so its gradient is torch's.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from interp.attention import reference
from interp.attention.backends import BackendUnavailable
from interp.attention.call import Call
from interp.attention.edits import Gain, SinkWindow, Temperature
from interp.attention.readouts import Readout
from interp.attention.triton import backward, backward_keys, tuned
from interp.attention.triton.configs import INTERPRETED, Config, facts
from interp.attention.triton.devices import interpreted
from interp.attention.triton.launching import Arguments, Launch
from interp.attention.triton.passes import Live, Pass, Wanted
from interp.attention.triton.tables import operands, tables

forced: tuple[Config, Config] | None = None
"""Set by the tuner and by tests: configurations of the key-stationary and of the query-stationary kernel."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def lacks_gradient(call: Call) -> str | None:
    """What keeps :func:`differentiable` from a call, or None."""
    for op in call.edit.operations:
        if not isinstance(op, Gain | Temperature | SinkWindow):
            return f"it has no gradient for {type(op).__name__} (only for Gain, Temperature and SinkWindow)"
    if call.bias is not None:
        return "it has no gradient where a bias is added to the scores"
    if not call.readout.empty:
        return "it has no gradient of readings"
    return None


def differentiable(call: Call) -> Tensor:
    """z ``[B, Lq, H, Dv]`` in q's dtype, with gradients of q, k, v, sinks, gains and temperatures.

    Memory is linear in Lq and Lk, in the backward pass too. A second derivative raises BackendUnavailable.

    Args:
        call: one for which :func:`lacks_gradient` and the backend's ``supports`` have nothing to say.
    """
    memo = {} if call.memo is None else call.memo
    plan = memo.get("triton gradient")
    if plan is None:
        plan = memo["triton gradient"] = GradientPlan(call)
    z = cast(Tensor, Attention.apply(*operands(call), divisor(call), call.sinks, plan))
    gain = reference.gain(call)
    return z if gain is None else (z * gain.transpose(1, 2).unsqueeze(-1)).to(z.dtype)


def divisor(call: Call) -> Tensor | None:
    """The product of the temperatures that are not the same number everywhere, ``[B|1, H|1, Lq|1]``; None without any."""
    total = None
    for op in call.edit.of(Temperature):
        if isinstance(op.value, Tensor) or op.where is not None:
            factor = reference.selected(op.value, op.where, 1.0, call)
            total = factor if total is None else total * factor
    return total


class Attention(torch.autograd.Function):
    """``z [B, Lq, H, Dv]`` of q, k, v, a divisor of q.k ``[B|1, H|1, Lq|1]`` or None, sinks ``[H]`` or None."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, divisor: Tensor | None, sinks: Tensor | None, plan: GradientPlan
    ) -> Tensor:
        given = plan.forward(Live(q, k, v, sinks))
        ctx.save_for_backward(q, k, v, divisor, sinks, given["z"], given["lse"])
        ctx.plan = plan
        return given["z"]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Torch's once_differentiable would let a second derivative through as 0 where dz itself has no gradient.
        if torch.is_grad_enabled():
            raise BackendUnavailable(
                "backend 'triton' has no second derivative (create_graph=True); ask for 'blockwise' or 'reference'"
            )
        q, k, v, divisor, sinks, z, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return *ctx.plan.backward(Live(q, k, v, sinks), divisor, z, lse, grad_outputs[0], needs), None


class GradientPlan:
    """The launches of the forward and of the backward pass, which calls of one kind share."""

    def __init__(self, call: Call) -> None:
        # Gains are applied to z afterwards: their gradient needs z without them, and they may be 0.
        kept = tuple(call.edit.of(Temperature, SinkWindow))
        bare = replace(call, edit=replace(call.edit, operations=kept), readout=Readout(), memo=None)
        with torch.no_grad():
            self.shared = tables(bare, upcast=interpreted())
            self.forward = Pass(self.shared, Wanted(output=True))
        self.launches: dict[str, Launch] = {}

    def backward(
        self, x: Live, divisor: Tensor | None, z: Tensor, lse: Tensor, dz: Tensor, needs: tuple[bool, ...]
    ) -> Gradients:
        """The gradients of q, k, v, the divisor and the sinks; None for those that are not needed.

        Args:
            x: q, k, v and sinks.
            divisor: ``[B|1, H|1, Lq|1]`` or None.
            z: ``[B, Lq, H, Dv]`` as the forward pass gave it.
            lse: its natural log-sum-exp ``[B, H, Lq]``, sinks included.
            dz: the gradient of z.
            needs: which gradients to give.
        """
        q_needed, k_needed, v_needed, divisor_needed, sinks_needed = needs[:5]
        dz = dz.contiguous()
        before = {"z_ptr": z, "dz_ptr": dz, "lse_ptr": lse, "lse2_ptr": torch.empty_like(lse)}
        before["mean_ptr"] = mean = torch.empty_like(lse)
        self._launch("rows before")(before)
        live = {"q_ptr": x.q, "k_ptr": x.k, "v_ptr": x.v, "dz_ptr": dz, "mean_ptr": mean}
        live["lse2_ptr"] = before["lse2_ptr"]
        dq = dk = dv = d_divisor = d_sinks = None
        if k_needed or v_needed:
            # Not empty_like: the kernels write them contiguously.
            dk, dv = x.k.new_empty(x.k.shape), x.v.new_empty(x.v.shape)
            self._launch("keys")({**live, "dk_ptr": dk, "dv_ptr": dv})
        if divisor is not None and divisor_needed:
            dq, turned = x.q.new_empty(x.q.shape), torch.empty_like(lse)
            self._launch("queries and divisor")({**live, "dq_ptr": dq, "turned_ptr": turned})
            d_divisor = -turned.sum_to_size(divisor.shape) / divisor
        elif q_needed:
            dq = x.q.new_empty(x.q.shape)
            self._launch("queries")({**live, "dq_ptr": dq})
        if x.sinks is not None and sinks_needed:
            # A sink is a key whose value is 0: du = share * (0 - mean).
            share = torch.where(lse > -torch.inf, torch.exp(x.sinks.float()[:, None] - lse), 0.0)
            d_sinks = -(share * mean).sum((0, 2)).to(x.sinks.dtype)
        return dq if q_needed else None, dk if k_needed else None, dv if v_needed else None, d_divisor, d_sinks

    def _launch(self, name: str) -> Launch:
        """The launch of that name, prepared when it is first needed."""
        found = self.launches.get(name)
        if found is None:
            found = self.launches[name] = self._prepare(name)
        return found

    def _tuned(self, kind: str, config: Config) -> Config:
        if forced is not None or self.shared.device.type == "cpu":
            return config
        return tuned.pick(kind, self.shared.device, lambda: facts(self.shared.call, self.shared), config)

    def _prepare(self, name: str) -> Launch:
        call, shared, device = self.shared.call, self.shared.arguments, self.shared.device
        batch, heads, n_queries, n_keys = call.shape
        if name == "rows before":
            sizes = {"n_heads": heads, "n_queries": n_queries, "V_DIM": shared["V_DIM"], "DV": shared["DV"]}
            return Launch(backward.rows_before_kernel, (batch * heads * -(-n_queries // 32),), sizes, BM=32)
        a: Arguments = {argument: shared[argument] for argument in SHARED}
        # A rule that acts on every row needs no table of the rows it acts on.
        a.update(BITS=shared["BITS"] and not shared["bits_all"])
        for_keys, for_queries = configurations(call.q.dtype, device, max(shared["D"], shared["DV"]))
        if name == "keys":
            config, kernel = self._tuned("keys gradient", for_keys), backward_keys.keys_gradient_kernel
            grid = batch * call.k.shape[1] * -(-n_keys // config.bn)
        else:
            config, kernel = self._tuned("queries gradient", for_queries), backward.queries_gradient_kernel
            grid = batch * heads * -(-n_queries // config.bm)
            a.update(DIVISOR_GRADIENT=name == "queries and divisor")
            if name == "queries":
                a.update(turned_ptr=a["row_scale_ptr"])
        return Launch(kernel, (grid,), a, BM=config.bm, BN=config.bn, num_warps=config.warps, num_stages=config.stages)


SHARED = (
    "q_b", "q_h", "q_m", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "scale", "softcap", "n_samples", "n_heads", "n_queries",
    "n_keys", "delta", "kv_offset", "left", "right", "row_scale_ptr", "row_scale_b", "row_scale_h", "row_scale_q", "bits_ptr",
    "bits_b", "bits_h", "bits_q", "dense_ptr", "dense_b", "dense_h", "dense_q", "padding_ptr", "padding_b", "first_ptr",
    "first_b", "sw_sink_ptr", "sw_window_ptr", "sw_h", "sw_window_h", "HEAD_DIM", "V_DIM", "D", "DV", "KV_GROUP", "UPCAST",
    "PRECISION", "CAUSAL", "LEFT", "RIGHT", "SOFTCAP", "DENSE", "PADDING", "ROW_SCALE", "SINK_WINDOW",
)  # fmt: skip
"""Arguments that both kernels have in common with that of the forward pass."""


def configurations(dtype: torch.dtype, device: torch.device, width: int) -> tuple[Config, Config]:
    """Of the key-stationary and of the query-stationary kernel, by the padded head dim."""
    if forced is not None:
        return forced
    if device.type == "cpu":
        return INTERPRETED, INTERPRETED
    # The largest tiles at which ptxas for sm_90 spills no register in the loop without a mask (in fp32: few); not timed yet.
    if dtype == torch.float32:
        if width <= 64:
            return Config(32, 32, 8, 1), Config(32, 32, 4, 1)
        if width <= 128:
            return Config(16, 32, 8, 1), Config(32, 16, 4, 1)
        return Config(16, 16, 8, 1), Config(16, 32, 4, 1)
    if width <= 64:
        return Config(64, 64, 4, 2), Config(128, 64, 8, 2)
    if width <= 128:
        return Config(32, 64, 4, 2), Config(64, 64, 4, 2)
    stages = 2 if _shared_bytes(device) >= 132 << 10 else 1
    return Config(32, 64, 8, stages), Config(64, 32, 8, stages)


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have: 99 to 227 KiB, depending on the GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
