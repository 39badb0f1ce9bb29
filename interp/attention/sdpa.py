"""Calls that nobody reads, and that PyTorch's scaled dot product attention can express.

An all-visible or causal description reaches its fast kernels without any mask; every other description is evaluated to
a dense bool mask first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from interp.attention.call import Call
from interp.attention.edits import Gain, Temperature
from interp.attention.readouts import Readings
from interp.attention.reference import bias_hides, gain


def supports(call: Call) -> str | None:
    """What keeps this backend from a call, or None."""
    if not call.readout.empty:
        return "it gives no readings"
    if call.softcap is not None:
        return "it has no softcap"
    if call.sinks is not None:
        return "it has no sink logits"
    for op in call.edit.operations:
        scalar = isinstance(op, Temperature) and isinstance(op.value, float | int) and op.where is None
        if not isinstance(op, Gain) and not scalar:
            return f"it cannot apply {type(op).__name__} (only Gain and one Temperature for all rows)"
    return None


def mask_bytes(call: Call) -> int:
    """Bytes of the dense mask that the call would need, 0 where it needs none."""
    if call.bias is None and (call.mask.trivial or upper_left_causal(call)):
        return 0
    batch, heads, n_queries, n_keys = call.shape
    per_head = [t for t in (call.mask.dense, call.bias) if t is not None and t.shape[1] > 1]
    per_sample = [t for t in (call.mask.dense, call.mask.padding, call.bias) if t is not None and t.shape[0] > 1]
    rule = call.mask.rule is not None
    size = 1 if call.bias is None else call.q.element_size()
    return (batch if per_sample or rule else 1) * (heads if per_head else 1) * n_queries * n_keys * size


def upper_left_causal(call: Call) -> bool:
    """SDPA's own causality lets row r see slots 0 .. r, whatever their number."""
    mask = call.mask
    others = (mask.window, mask.padding, mask.rule, mask.dense)
    return mask.causal and mask.q_offset == mask.kv_offset and all(x is None for x in others)


def run(call: Call) -> tuple[Tensor | None, Readings]:
    """Give z ``[B, Lq, H, Dv]`` in q's dtype, and no readings."""
    if not call.want_output:
        return None, Readings()
    causal = call.bias is None and upper_left_causal(call)
    plain = causal or (call.bias is None and call.mask.trivial)
    mask, alive = (None, None) if plain else dense_mask(call)
    scale = call.scale
    for op in call.edit.of(Temperature):
        scale /= float(op.value)
    z = F.scaled_dot_product_attention(
        call.q,
        call.k,
        call.v,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=call.q.shape[1] != call.k.shape[1],
    )
    factor = gain(call)
    if factor is not None:
        z = (z * factor.unsqueeze(-1)).to(z.dtype)
    if alive is not None:
        z = torch.where(alive.unsqueeze(-1), z, 0.0)
    return z.transpose(1, 2).contiguous(), Readings()


def fused(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None, enable_gqa: bool = False
) -> tuple[Tensor, Tensor] | None:
    """What ``F.scaled_dot_product_attention`` gives without a mask, to the bit, with the log-sum-exp of its kernel.

    Returns:
        z ``[B, H, Lq, Dv]`` and lse float32 ``[B, H, Lq]`` (natural log); None where PyTorch would not choose a kernel that has it.
    """
    if q.device.type != "cuda" or q.requires_grad or k.requires_grad or v.requires_grad:
        return None
    chosen = torch._fused_sdp_choice(  # pyright: ignore[reportPrivateUsage]
        q, k, v, None, 0.0, causal, scale=scale, enable_gqa=enable_gqa
    )
    aten, options = torch.ops.aten, {"scale": scale}
    if chosen == SDPBackend.CUDNN_ATTENTION.value:
        z, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, **options)
    elif chosen == SDPBackend.FLASH_ATTENTION.value and q.shape[-1] % 8 == 0:
        z, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, **options)
    elif chosen == SDPBackend.EFFICIENT_ATTENTION.value and not enable_gqa:
        z, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, **options)
    else:
        return None
    return z, lse.reshape(q.shape[0], q.shape[1], -1)[..., : q.shape[2]].float().contiguous()


def dense_mask(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """The visible set as SDPA takes it, and the rows that see something (None where all do)."""
    batch, _, n_queries, n_keys = call.shape
    visible = call.mask.visible(batch, n_queries, n_keys, call.q.device)
    if call.bias is not None:
        hidden = bias_hides(call.bias)
        if bool(hidden.any()):
            visible = ~hidden if visible is None else visible & ~hidden
    if visible is None:
        return None if call.bias is None else call.bias.to(call.q.dtype), None
    alive = visible.any(-1)
    visible = visible.expand(-1, -1, n_queries, n_keys)
    whole = None if bool(alive.all()) else alive
    if whole is not None:
        visible = visible | ~alive.unsqueeze(-1)  # an empty row would be NaN in some kernels; it is zeroed afterwards
    if call.bias is None:
        return visible, whole
    bias = torch.where(visible, call.bias.masked_fill(bias_hides(call.bias), 0.0).to(call.q.dtype), -torch.inf)
    return bias, whole
