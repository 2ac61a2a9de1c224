"""The steps of a decoder block between its linear layers, as torch operators `torch.ops.twofour.*`: one kernel each.

    rms_norm(residual_MK!, x_MK, weight, eps, multiplier, dtype)   residual += x; its RMSNorm, rounded
    rope_and_cache(qkv_MN, ..., keys!, values!, ...) -> q_MHD       rotary embedding; keys and values into the cache
    decode_attention(q_BHD, keys, values, positions, ...)          one new token's attention, rounded: two kernels
    silu_mul(gate_up_MN, multiplier, dtype)                        silu(gate) * up, rounded

Rounded: for the linear layer that follows. `multiplier` ([1] or [K] float32: 1 / input scale) and `dtype` (int8 or
float8_e4m3fn) are that layer's; None and the compute dtype where it takes numbers as they are.

On CUDA these run Triton kernels; on a CPU reference.py, whose numbers they give.

Legend: M tokens, K hidden size, N out_features, D head_dim, S positions, P cache rows (or pages), B requests,
H key-value heads.
"""

from __future__ import annotations

from typing import Any

import torch

from plugins.triton_kernels import reference

LAUNCHES = {"rms_norm": 1, "rope_and_cache": 1, "decode_attention": 2, "silu_mul": 1}  # of one call on CUDA


@torch.library.custom_op("twofour::rms_norm", mutates_args=("residual_MK",), device_types="cpu")
def rms_norm(
    residual_MK: torch.Tensor,
    x_MK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    multiplier: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Adds `x_MK`, where given, to `residual_MK` in place; returns the RMSNorm [M, K] of the sum, rounded."""
    return reference.rms_norm(residual_MK, x_MK, weight_K, eps, multiplier, dtype)


@torch.library.custom_op("twofour::rope_and_cache", mutates_args=("keys_PHSD", "values_PHSD"), device_types="cpu")
def rope_and_cache(
    qkv_MN: torch.Tensor,
    cos_SD: torch.Tensor,
    sin_SD: torch.Tensor,
    positions_M: torch.Tensor,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    eps: float,
    keys_PHSD: torch.Tensor,
    values_PHSD: torch.Tensor,
    k_multiplier: torch.Tensor | None,
    v_multiplier: torch.Tensor | None,
    table: torch.Tensor | None,
    q_first: int = 0,
    k_first: int = 0,
    v_first: int = 0,
) -> torch.Tensor:
    """Rotated queries [M, heads, D] of q, k and v side by side; writes token m's key and value at positions_M[m].

    `q_norm_D` and `k_norm_D` normalize each head first. The cache [P, H, S, D] is contiguous; `table` int32
    [M, pages] names the pages of S positions that hold token m's sequence; None: all of it lies in row m.
    Multipliers [1] float32 (1 / scale) belong to an 8-bit cache. The first so many heads of q, k and v (`q_first`,
    `k_first`, `v_first`) come before all others in `qkv_MN`: those of 2:4 weights (Linear.sparse_rows).
    """
    return reference.rope_and_cache(
        qkv_MN,
        cos_SD,
        sin_SD,
        positions_M,
        q_norm_D,
        k_norm_D,
        eps,
        keys_PHSD,
        values_PHSD,
        k_multiplier,
        v_multiplier,
        table,
        q_first,
        k_first,
        v_first,
    )


@torch.library.custom_op("twofour::decode_attention", mutates_args=(), device_types="cpu")
def decode_attention(
    q_BHD: torch.Tensor,
    keys_PHSD: torch.Tensor,
    values_PHSD: torch.Tensor,
    positions_B: torch.Tensor,
    table: torch.Tensor | None,
    length: int,
    window: int | None,
    scale: float,
    v_scale: float,
    multiplier: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Attention [B, heads * D], rounded, of each request's query over its positions 0 to positions_B[b].

    No position is `length` or more. `window`: only the last so many are seen. `scale` multiplies q k (a cache's
    k_scale included), `v_scale` the result. The cache and `table` as `rope_and_cache` has them.
    """
    return reference.decode_attention(
        q_BHD, keys_PHSD, values_PHSD, positions_B, table, length, window, scale, v_scale, multiplier, dtype
    )


@torch.library.custom_op("twofour::silu_mul", mutates_args=(), device_types="cpu")
def silu_mul(
    gate_up_MN: torch.Tensor,
    multiplier: torch.Tensor | None,
    dtype: torch.dtype,
    gate_first: int = 0,
    up_first: int = 0,
) -> torch.Tensor:
    """silu(gate) * up [M, N / 2], rounded, of gate and up side by side.

    Their first `gate_first` and `up_first` columns come before all others: those of 2:4 weights (Linear.sparse_rows).
    """
    return reference.silu_mul(gate_up_MN, multiplier, dtype, gate_first, up_first)


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


@rms_norm.register_kernel("cuda")
def _(*arguments: Any) -> torch.Tensor:
    from plugins.triton_kernels import rms_norm as kernel

    result: torch.Tensor = kernel.rms_norm(*arguments)
    return result


@rope_and_cache.register_kernel("cuda")
def _(*arguments: Any) -> torch.Tensor:
    from plugins.triton_kernels import rope as kernel

    result: torch.Tensor = kernel.rope_and_cache(*arguments)
    return result


@decode_attention.register_kernel("cuda")
def _(*arguments: Any) -> torch.Tensor:
    from plugins.triton_kernels import decode_attention as kernel

    result: torch.Tensor = kernel.decode_attention(*arguments)
    return result


@silu_mul.register_kernel("cuda")
def _(*arguments: Any) -> torch.Tensor:
    from plugins.triton_kernels import silu as kernel

    result: torch.Tensor = kernel.silu_mul(*arguments)
    return result
