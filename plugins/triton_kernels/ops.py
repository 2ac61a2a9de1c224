"""The steps of a decoder block between its linear layers, as torch operators `torch.ops.twofour.*`: one kernel each.

    rms_norm(residual_MK!, x_MK, weight, eps, multiplier, dtype)   residual += x; its RMSNorm, rounded
    rope_and_cache(qkv_MN, ..., keys!, values!, ...) -> q_MHD       rotary embedding; keys and values into the cache
    decode_attention(q_BHD, keys, values, positions, ...)          one new token's attention, rounded: two kernels
    silu_mul(gate_up_MN, multiplier, dtype)                        silu(gate) * up, rounded

Rounded: for the linear layer that follows. `multiplier` ([1] or [K] float32: 1 / input scale) and `dtype` (int8 or
float8_e4m3fn) are that layer's; None and the compute dtype where it takes numbers as they are.

On CUDA these run Triton kernels; on a CPU reference.py, which states each one's arguments and whose numbers they give.

Legend: M tokens, K hidden size, N out_features, D head_dim, S positions, P cache rows (or pages), B requests,
H key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from plugins.triton_kernels import reference

LAUNCHES = {"rms_norm": 1, "rope_and_cache": 1, "decode_attention": 2, "silu_mul": 1}  # of one call on CUDA


@cache
def _kernels() -> dict[str, Callable[..., torch.Tensor]]:
    from plugins.triton_kernels import decode_attention, rms_norm, rope, silu

    functions = (rms_norm.rms_norm, rope.rope_and_cache, decode_attention.decode_attention, silu.silu_mul)
    return {function.__name__: function for function in functions}


def _operator(function: Callable[..., torch.Tensor], mutates: tuple[str, ...] = ()) -> torch.library.CustomOpDef:
    """The operator of a function of reference.py, which writes to its arguments `mutates`."""
    name = function.__name__
    operator = torch.library.custom_op(f"twofour::{name}", function, mutates_args=mutates, device_types="cpu")
    operator.register_kernel("cuda")(lambda *arguments: _kernels()[name](*arguments))
    return operator


rms_norm = _operator(reference.rms_norm, ("residual_MK",))
rope_and_cache = _operator(reference.rope_and_cache, ("keys_PHSD", "values_PHSD"))
decode_attention = _operator(reference.decode_attention)
silu_mul = _operator(reference.silu_mul)


@rms_norm.register_fake
def _(residual_MK, x_MK, weight_K, eps, multiplier, dtype):  # type: ignore[no-untyped-def]
    return residual_MK.new_empty(residual_MK.shape, dtype=dtype)


@rope_and_cache.register_fake
def _(qkv_MN, cos, sin, positions, q_norm, k_norm, eps, keys, *_):  # type: ignore[no-untyped-def]
    _, kv_heads, _, head_dim = keys.shape
    return qkv_MN.new_empty((qkv_MN.shape[0], qkv_MN.shape[1] // head_dim - 2 * kv_heads, head_dim))


@decode_attention.register_fake
def _(q_BHD, keys, values, positions, table, length, window, scale, v_scale, multiplier, dtype):  # type: ignore[no-untyped-def]
    return q_BHD.new_empty((q_BHD.shape[0], q_BHD.shape[1] * q_BHD.shape[2]), dtype=dtype)


@silu_mul.register_fake
def _(gate_up_MN, multiplier, dtype, *_):  # type: ignore[no-untyped-def]
    return gate_up_MN.new_empty((gate_up_MN.shape[0], gate_up_MN.shape[1] // 2), dtype=dtype)
